"""Every token at every position against the first attention layer's span.

Where that layer sees LN(u_t + v_i), a LayerNorm of what token t and position i add (BERT and its kin, GPT-2, OPT),
no pair has to be made.  With c the centred u_t + v_i, its deviation s and D = diag(gamma),

    LN = D c / s + beta,    |P LN|^2 = |P D c|^2 / s^2 + 2 (P D c) . (P beta) / s + |P beta|^2

for every linear P, and c is a sum: norms of tokens, norms of positions and one matrix of inner products give
s, |LN| and |Q LN| (with Q the span's basis) of all pairs.  That is ours; DAGER (Petrov et al. 2024, section 4)
makes the pairs.  Differences of squares lose half of the digits near zero, so it runs in float64 and what comes
near the span is made and measured all the same: those distances are what the model itself would give.

Whether a model has this form is seen by comparing some pairs, not read off its name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leakaudit.attacks.spans import Span, Test
from leakaudit.models.language import LanguageVictim

CHUNK = 1 << 22
"""Numbers of the largest intermediate result of a scan."""
FEW = 1 << 13
"""(position, token) pairs up to which making them all costs no more than finding a way around it."""
NEAR = 1e-2
"""Distance below which a token is made at every position."""
PROBES = 4
"""Sentences of other tokens by which a model's form is checked."""
ALIKE = 1e3
"""Relative error, in units of the model's precision, up to which two inputs are the same."""


def scan(victim: LanguageVictim, span: Span, tokens: Tensor, positions: int) -> Tensor:
    """Distance of every (position, token) pair from the first layer's span, (positions, n) in [0, 1].

    Without absolute positions one row serves all.
    """
    count = positions if victim.position is not None else 1
    form = additive(victim, tokens, count) if count > 1 and count * len(tokens) > FEW else None
    if form is None:
        return every_pair(victim, span, tokens, count).expand(positions, -1)
    distance = form.distance(victim, span, tokens)
    close = (distance < NEAR).any(dim=0) | (tokens == victim.filler)  # by which RoBERTa counts positions
    close[distance.argmin(dim=1)] = True
    distance[:, close] = every_pair(victim, span, tokens[close], count)
    return distance


def every_pair(victim: LanguageVictim, span: Span, tokens: Tensor, count: int) -> Tensor:
    """The same, (count, n), for any model: sentences of one token over and over."""
    grid = max(1, CHUNK // (count * victim.hidden))
    parts = []
    for chunk in torch.split(tokens, grid):
        inputs = victim.attention_inputs(chunk[:, None].expand(-1, count).contiguous(), 0)
        parts.append(span.distance(inputs).T)
    return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class Additive:
    """LN(u_t + v_i): the norm, and v_i - v_0 for every position, (L, H) float64; u_t + v_0 is what a sentence of
    one token gives.

    Attributes:
        norm: what makes the first attention's input.
        gain, shift: (H,) float64, its gamma and beta.
        places: (L, H) float64.
    """

    norm: nn.LayerNorm
    gain: Tensor
    shift: Tensor
    places: Tensor

    def inputs(self, victim: LanguageVictim, x: Tensor) -> Tensor:
        """(N, L, H) float64 inputs of attention for sentences (N, L), as they would be in this form."""
        sums = self._alone(victim, x.flatten()).view(*x.shape, -1) + self.places
        centred = sums - sums.mean(dim=-1, keepdim=True)
        deviation = (centred.square().mean(dim=-1, keepdim=True) + self.norm.eps).sqrt()
        return self.gain * centred / deviation + self.shift

    def directions(self, victim: LanguageVictim, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What tokens (n, H) and positions (L, H) add to an input of attention, up to its deviation and `shift`; the
        first position is part of the tokens."""
        return _centred(self._alone(victim, tokens)) * self.gain, _centred(self.places) * self.gain

    def distance(self, victim: LanguageVictim, span: Span, tokens: Tensor) -> Tensor:
        """(L, n) distances of all pairs, in the victim's precision."""
        grid = max(1, CHUNK // self.places.shape[1])
        parts = [self._distance(victim, span, chunk) for chunk in torch.split(tokens, grid)]
        return torch.cat(parts).T.contiguous()

    def _distance(self, victim: LanguageVictim, span: Span, tokens: Tensor) -> Tensor:
        words, places = _centred(self._alone(victim, tokens)), _centred(self.places)
        spread = (_squares(words, places) / words.shape[1] + self.norm.eps).rsqrt()
        words, places = words * self.gain, places * self.gain
        farthest = torch.zeros_like(spread)
        for test in span.tests:
            farthest = torch.maximum(farthest, self._away(test, words, places, spread))
        return farthest.sqrt().to(victim.dtype)

    def _away(self, test: Test, words: Tensor, places: Tensor, spread: Tensor) -> Tensor:
        """(n, L) squared distances from words (n, H), places (L, H), and one over the deviation."""
        basis, shift = test.basis.to(words), self.shift
        if test.mapping is not None:
            mapping = test.mapping.to(words)
            words, places, shift = words @ mapping.T, places @ mapping.T, mapping @ shift
        whole = _lengths(words, places, shift, spread)
        inside = _lengths(words @ basis.T, places @ basis.T, basis @ shift, spread)
        return (1 - inside / whole.clamp(min=torch.finfo(whole.dtype).tiny)).clamp(0, 1)

    def _alone(self, victim: LanguageVictim, tokens: Tensor) -> Tensor:
        """(n, H) float64: u_t + v_0 of each token."""
        return victim.inputs_of(self.norm, tokens[:, None])[:, 0].double()


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(dim=1, keepdim=True)


def _squares(words: Tensor, places: Tensor) -> Tensor:
    """(n, L) squared lengths of all sums of words (n, k) and places (L, k)."""
    return torch.addmm(_own(words)[:, None] + _own(places), words, places.T, alpha=2)


def _own(rows: Tensor) -> Tensor:
    return torch.linalg.vecdot(rows, rows)


def _lengths(words: Tensor, places: Tensor, shift: Tensor, spread: Tensor) -> Tensor:
    """(n, L) squared lengths of  (words + places) * spread + shift."""
    along = (words @ shift)[:, None] + places @ shift
    return (_squares(words, places) * spread + 2 * along) * spread + shift.square().sum()


def additive(victim: LanguageVictim, tokens: Tensor, count: int) -> Additive | None:
    """The form of this model, or None where it has another."""
    spread = torch.linspace(0, len(tokens) - 1, PROBES * count, device=tokens.device).long()
    probes = tokens[spread].view(PROBES, count)
    probes = probes[(probes != victim.filler).all(dim=1)]
    if len(probes) == 0:
        return None
    found = _last_norm(victim, probes)
    if found is None:
        return None
    name, norm = found
    params = {**victim.params, **victim.frozen}
    ones = torch.ones(norm.normalized_shape, dtype=torch.float64, device=victim.device)
    gain = params[f"{name}.weight"].detach().double() if norm.weight is not None else ones
    shift = params[f"{name}.bias"].detach().double() if norm.bias is not None else 0 * ones
    here = victim.inputs_of(norm, probes[:1, :1].expand(1, count))[0].double()
    form = Additive(norm, gain, shift, here - here[0])
    seen = victim.attention_inputs(probes, 0).double()
    error = (form.inputs(victim, probes) - seen).norm(dim=-1)
    limit = ALIKE * torch.finfo(victim.dtype).eps
    return form if bool((error <= limit * seen.norm(dim=-1)).all()) else None


def _last_norm(victim: LanguageVictim, x: Tensor) -> tuple[str, nn.LayerNorm] | None:
    """The LayerNorm whose output is what the first attention sees, and its name."""
    made: list[tuple[str, nn.LayerNorm, Tensor]] = []

    def record(name: str, module: nn.LayerNorm) -> torch.utils.hooks.RemovableHandle:
        return module.register_forward_hook(lambda _, __, output: made.append((name, module, output)))

    norms = [(name, module) for name, module in victim.module.named_modules() if type(module) is nn.LayerNorm]
    handles = [record(name, module) for name, module in norms]
    try:
        seen = victim.attention_inputs(x, 0)
    finally:
        for handle in handles:
            handle.remove()
    return next(((name, norm) for name, norm, output in reversed(made) if torch.equal(output, seen)), None)
