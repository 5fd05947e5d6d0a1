"""Rows of words and places read off the first attention layer, beside those of the embeddings.

Where that layer sees LN(u_t + v_i) (see `leakaudit.attacks.scans`), the gradient of query, key and value is, over
the places p of the batch with token t and position i,

    G = sum_p delta_p (D c_p / s_p + beta)^T,    c_p = centred u_t + centred v_i,

and sum_p delta_p is the gradient of their bias.  So  G - bias beta^T = sum_t a_t (D u_t)^T + sum_i b_i (D v_i)^T,  with
a_t the sum of delta_p / s_p over the places of token t, b_i the same over those at position i.  As long as the u_t
and v_i together are fewer than the layer is wide, both follow from a least-squares fit, exactly.  They are sums over
the same places as the rows of the embeddings, in three times as many numbers: where several places share a token, what
stands at a position is read off all of them more surely than off the embeddings alone.  Ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leakaudit.attacks.rows import Rows
from leakaudit.attacks.scans import additive
from leakaudit.models.architectures import is_conv1d
from leakaudit.models.language import LanguageVictim
from leakaudit.models.lora import LoraLinear
from leakaudit.numerics import least_squares
from leakaudit.update import Update

UNEXPLAINED = 1e-3
"""Share of the gradient that the fit may leave, beyond which the rows say nothing."""


def joint_rows(victim: LanguageVictim, rows: Rows, update: Update) -> tuple[Tensor, Tensor]:
    """Rows of the tokens (n, k) and of the positions (P, k) float64, of all that tells them: the embeddings' own and,
    where they can be read, those of query, key and value, each kind scaled to the same size."""
    kinds = [(rows.word, rows.position), *attention_rows(victim, rows.tokens, rows.length, update)]
    sizes = [torch.cat(kind).norm().clamp(min=torch.finfo(torch.float64).tiny) for kind in kinds]
    words = torch.cat([word / size for (word, _), size in zip(kinds, sizes, strict=True)], dim=1)
    places = torch.cat([place / size for (_, place), size in zip(kinds, sizes, strict=True)], dim=1)
    return words, places


def attention_rows(
    victim: LanguageVictim, tokens: Tensor, count: int, update: Update
) -> list[tuple[Tensor, Tensor]]:
    """For every projection: a_t of each token (n, m) and b_i of `count` positions (count, m), float64.

    Empty where the model has another form, something of the layer was not shared, the tokens and positions are too
    many, or they do not explain the gradient.
    """
    layer = victim.projections(0)
    if any(isinstance(module, LoraLinear) for _, module in layer):
        return []
    if any(f"{name}.{part}" not in update for name, _ in layer for part in ("weight", "bias")):
        return []
    form = additive(victim, tokens, count)
    if form is None or len(tokens) + count - 1 > victim.hidden:
        return []
    words, places = form.directions(victim, tokens)
    nodes = torch.cat([words, places[1:]])  # the first position stands in every word
    found = []
    for name, module in layer:
        weight, bias = update[f"{name}.weight"].double(), update[f"{name}.bias"].double()
        whole = (weight if is_conv1d(module) else weight.T) - torch.outer(form.shift, bias)
        fit = least_squares(nodes.T, whole)
        if bool((nodes.T @ fit - whole).norm() > UNEXPLAINED * whole.norm()):
            return []
        of_words, of_places = fit[: len(tokens)], fit[len(tokens) :]
        first = of_words.sum(dim=0, keepdim=True) - of_places.sum(dim=0, keepdim=True)
        found.append((of_words, torch.cat([first, of_places])))
    return found
