"""Labels of recovered sentences, from the layer that makes the scores.

Its weight's gradient is the sum over scored items of  (softmax - onehot(label)) f^T  over the divisor of the
mean, where f is what enters the layer.  With the sentences known the f are known; where they are linearly
independent a least-squares fit gives each item's class vector, and its label is the most negative entry.
For masked language models the labelled places are those whose f lies in the row space of the gradient.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from leakaudit.attacks.rows import Rows, language
from leakaudit.models.language import IGNORED, LanguageVictim, text_as_labels
from leakaudit.models.spaces import NO_TOKEN
from leakaudit.numerics import least_squares
from leakaudit.threat import View

NEAR = 1e-3
"""Distance from the row space up to which a place counts as labelled."""
MOST_TRIALS = 64
ROUNDS = 6
TRIED = 12
"""Tokens tried as the label of a place whose score layer was not shared."""
WRONG = 0.5
"""Share of a label's weight in the difference of updates, above which another label is the right one."""


def complete_labels(view: View, x: Tensor, rows: Rows | None) -> Tensor:
    """y for sentences x (N, L), as `LanguageVictim` takes it: the likeliest labels given the update."""
    victim = language(view)
    if victim.task == "causal-lm":
        return text_as_labels(x)
    if victim.task == "mlm":
        return _masked_labels(view, victim, x, rows)
    given = view.knowledge.labels
    count = len(x)
    if given.status == "known" and len(set(given.value.tolist())) == 1:
        return given.value[:1].expand(count).clone()
    features = victim.head_inputs(x)
    head = victim.classifier()
    if features is None or head is None or head.weight not in view.observed:
        return _by_trial(view, victim, x)
    scores = _coefficients(view.observed[head.weight].double(), features.double())
    return _assign(scores, given.value if given.status == "known" else None)


def refine(view: View, x: Tensor, y: Tensor, places: Tensor) -> Tensor:
    """Labels y (N, L) with those at `places` (n, 2) corrected, for mlm and causal-lm.

    A wrong label at a place leaves (onehot(label) - onehot(right label)) f^T over the divisor in the
    difference of observed and simulated score rows; labels change until none of that is left.  In
    causal-lm `places` are those of the labels, one after the place that is scored.
    """
    victim = language(view)
    output, features = victim.output, victim.head_inputs(x)
    if output is None or features is None or output[0] not in view.observed:
        return _by_sensitivity(view, victim, x, y, places)
    shift = int(victim.task == "causal-lm")
    inputs = features.double()[places[:, 0], places[:, 1] - shift]
    scored = int((y[:, shift:] != IGNORED).sum())
    for _ in range(ROUNDS):
        simulated = view.simulate(x, y).detach()[output[0]]
        scores = _coefficients((view.observed[output[0]] - simulated).double(), inputs) * scored
        wrong = scores.amin(dim=1) < -WRONG
        if not bool(wrong.any()):
            break
        rows, columns = places[wrong].T
        y = y.clone()
        y[rows, columns] = scores[wrong].argmin(dim=1)
        if victim.task == "causal-lm":
            x = x.clone()
            x[rows, columns] = y[rows, columns]
    return y


def _by_sensitivity(view: View, victim: LanguageVictim, x: Tensor, y: Tensor, places: Tensor) -> Tensor:
    """The same where the score layer was not shared: in one local step the update is linear in the labels,
    so the tokens that turn it most towards the observed one are tried, place by place."""
    for row, column in places.tolist():
        soft = F.one_hot(y.clamp(min=0), victim.space.vocabulary).to(victim.dtype)
        soft = (soft * (y != IGNORED)[..., None]).requires_grad_()
        simulated = view.simulate(x, soft)
        missing = (view.observed - simulated).detach()
        (slope,) = torch.autograd.grad(missing.dot(simulated), soft)
        best = view.residual(x, y)
        for token in slope[row, column].topk(min(TRIED, victim.space.vocabulary)).indices.tolist():
            trial = y.clone()
            trial[row, column] = token
            residual = view.residual(x, trial)
            if residual < best:
                best, y = residual, trial
    return y


def _coefficients(gradient: Tensor, features: Tensor) -> Tensor:
    """(items, K) class vectors C with  C^T features = gradient, in least squares."""
    return least_squares(features.T, gradient.T)


def _assign(scores: Tensor, given: Tensor | None) -> Tensor:
    """The most negative class of each item; of the given labels, each once, where they are known."""
    if given is None:
        return scores.argmin(dim=1)
    _, columns = linear_sum_assignment(scores[:, given].cpu().numpy())
    return given[torch.as_tensor(columns)]


def _by_trial(view: View, victim: LanguageVictim, x: Tensor) -> Tensor:
    """Labels by residual, where the head cannot be read: all of them if few, else one sentence at a time."""
    classes, count = victim.num_classes, len(x)
    device = x.device
    if classes**count <= MOST_TRIALS:
        trials = torch.tensor(list(itertools.product(range(classes), repeat=count)), device=device)
        return min(trials, key=lambda y: view.residual(x, y))
    y = torch.zeros(count, dtype=torch.int64, device=device)
    for i in range(count if classes * count <= MOST_TRIALS else 0):
        options = y.repeat(classes, 1)
        options[:, i] = torch.arange(classes, device=device)
        y = min(options, key=lambda option: view.residual(x, option))
    return y


def _masked_labels(view: View, victim: LanguageVictim, x: Tensor, rows: Rows | None) -> Tensor:
    y = torch.full_like(x, IGNORED)
    outputs = victim.output
    features = victim.head_inputs(x)
    if outputs is None or features is None or outputs[0] not in view.observed:
        return y
    there = (x != NO_TOKEN).nonzero()
    inside = features.double()[there[:, 0], there[:, 1]]
    gradient = view.observed[outputs[0]].double()
    basis = rows.outputs if rows is not None and victim.tied else _row_basis(gradient)
    if len(basis) == 0:
        return y
    unit = inside / inside.norm(dim=1, keepdim=True)
    away = (unit - (unit @ basis.T) @ basis).norm(dim=1)
    labelled = away.argsort()[: len(basis)]
    labelled = labelled[away[labelled] < max(NEAR, 10 * float(away.min()))].sort().values
    if len(labelled) == 0:
        return y
    if victim.tied and rows is not None:
        gradient = _score_side(gradient, x, rows)
    scores = _coefficients(gradient, inside[labelled])
    tokens = _bias_labels(view, len(labelled), len(labelled))
    chosen = _assign(scores, tokens)
    for place, token in zip(there[labelled].tolist(), chosen.tolist(), strict=True):
        y[place[0], place[1]] = token
    return refine(view, x, y, there[labelled])


def _score_side(gradient: Tensor, x: Tensor, rows: Rows) -> Tensor:
    """The tied word rows without the input side: exact for one sentence, where position rows tell it."""
    cleaned = gradient.clone()
    for token in set(x[x != NO_TOKEN].tolist()):
        if len(x) == 1 and len(rows.position) >= x.shape[1]:
            cleaned[token] -= rows.position[: x.shape[1]][x[0] == token].sum(dim=0)
        else:
            cleaned[token] = (gradient[token] @ rows.outputs.T) @ rows.outputs
    return cleaned


def masked_labels(view: View, most: int) -> Tensor | str:
    """(M,) labels of a masked language model with their repetitions, M up to `most`, or why they cannot be told.

    M is the smallest number that `_bias_labels` bears out.  A model certain of its labels hides repetitions:
    then M comes out too small.
    """
    output = language(view).output
    if output is None or output[1] is None or output[1] not in view.observed:
        return "the labels cannot be told: the update holds no gradient of the output layer's bias"
    if view.round.local_steps > 1 or view.scale_free:
        return "the labels cannot be told: the output bias counts them only in one local step of known scale"
    labels = _bias_labels(view, 1, most)
    if labels is None:
        return (
            "the labels cannot be told: the output bias's gradient is not that of so many labelled positions"
        )
    return labels


def _bias_labels(view: View, least: int, most: int) -> Tensor | None:
    """(M,) labels of all places together, least <= M <= most, from the gradient of the output layer's bias.

    It is  db = 1/M sum_i (p_i - onehot(y_i)),  so  n_v = M p_v - M db_v  with p_v > 0 the mean probability of
    v.  M is the smallest number for which the labels, each counted ceil(-M db_v) times, are M.
    """
    output = language(view).output
    if output is None or output[1] is None or output[1] not in view.observed:
        return None
    shares = -view.observed[output[1]].double()
    around = shares.median()
    floor = 8 * float((shares - around).abs().median())
    values = ((shares > 0) & (shares - around > floor) & (shares > 1e-6)).nonzero().flatten()
    for total in range(max(least, len(values)), most + 1):
        counts = (total * shares[values] - 1e-3).ceil().long().clamp(min=1)
        if int(counts.sum()) == total:
            return values.repeat_interleave(counts)
    return None


def _row_basis(gradient: Tensor) -> Tensor:
    sizes, directions = torch.linalg.eigh(gradient.T @ gradient)
    return directions[:, sizes > 1e-10 * sizes[-1]].T
