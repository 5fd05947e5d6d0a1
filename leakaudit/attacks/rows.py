"""What the rows of the embeddings' gradients say: tokens, their places, and labels.

Let e_p be the gradient of the loss for the input embedding of position p.  A lookup hands it on unchanged,
so the word embedding's gradient has the row  sum of e_p over the places p that hold token t,  and the
learnt position embedding's the row  sum of e_p over the batch's tokens at position i.  Rows of tokens that
do not occur are zero (Melis et al. 2019).  Dropout and norms after the sum of embeddings change e_p, but
the same e_p enters both.

Where the word embedding also scores tokens (tied weights), the score side adds  sum over labelled places of
(softmax - onehot) h_p  to every row: a matrix of rank m, the number of labelled places.  Rows of tokens
that are not in the input lie in its m-dimensional row space; each input token adds a direction of its own.
Scaled to length 1, such a row has a statistical leverage near 1, the others share theirs among thousands
(but for a label that next to nothing else was likely for, whose row the others span all the same).
Projecting the row space out leaves the input side (as long as m and the tokens together stay below the width).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from scipy.special import chdtri
from torch import Tensor

from leakaudit.models.language import LanguageVictim
from leakaudit.numerics import least_squares
from leakaudit.threat import View
from leakaudit.update import BLOCK

IMAGES = "it reconstructs text, this model takes images"
"""Why attacks on text do not run on other models."""
LEVERAGE = 0.5
INSIDE = 1e-3
"""Relative distance from the score side, up to which a row belongs to it."""
RANK_FLOOR = 1e-8
"""Eigenvalue of the Gram matrix of rows of length 1, below which a direction is rounding."""
FALSE_ALARMS = 1e-3
"""Rows of noise taken for tokens, expected over the whole vocabulary."""
WIDER = 2
"""Tokens of the whole vocabulary that are added for each position under noise."""
EXPLAINED = 1e-4
"""Share of the word rows that rounding may leave unexplained."""
CLEAR = 6.0
"""Standard deviations that a number must stand out from noise."""
COMPARED = 256
"""Rows that are looked at for right angles."""
LEVELS = 1 << 8
"""Different numbers in the rows, up to which they were quantised and do not add up."""


@dataclass(frozen=True)
class Rows:
    """Evidence about the input.

    Attributes:
        tokens: (n,) int64, the tokens of the input, or the likeliest candidates.
        certain: whether `tokens` are exactly those that occur.
        ranked: whether `tokens` are candidates in the order of their evidence, most of which do not occur.
        word: (n, H) float64, the input side of their rows, without what `outputs` spans.
        position: (P, H) float64 rows of the position embedding from the first token on, up to the last
            that is not zero; (0, H) for a model without learnt positions, or when they were not shared.
        outputs: (m, H) orthonormal rows that span the score side; (0, H) where there is none or it could
            not be told from the input side.
        noise: standard deviation of noise on each number, estimated or known; 0 without.
        reason: why `tokens` are not certain; empty when they are.
    """

    tokens: Tensor
    certain: bool
    word: Tensor
    position: Tensor
    outputs: Tensor
    noise: float
    reason: str = ""
    ranked: bool = False

    @property
    def length(self) -> int:
        """Tokens of the longest sentence, as the positions tell; 0 when they do not."""
        return len(self.position)


def text_victim(view: View) -> LanguageVictim | None:
    """The view's victim when it takes text."""
    return view.victim if isinstance(view.victim, LanguageVictim) else None


def language(view: View) -> LanguageVictim:
    """The victim of a view that is known to be of text."""
    assert isinstance(view.victim, LanguageVictim)
    return view.victim


def read_rows(view: View) -> Rows | None:
    """None when the word embedding's gradient was not shared, or is zero."""
    victim = text_victim(view)
    if victim is None or victim.word not in view.observed:
        return None
    word = view.observed[victim.word]
    lengths = row_lengths(word)
    if not bool(lengths.any()):
        return None
    noise = noise_level(view)
    position = position_rows(view, noise)
    padding = None if noise else _padding_row(word[lengths > 0], victim, view)
    if padding is not None:
        token, lacking = padding
        word = word.double().index_add(0, torch.tensor([token], device=word.device), lacking[None])
        lengths[token] = word[token].norm()
    if victim.tied:
        return _tied_rows(word.double(), position, noise, view)
    found = lengths.square() > _row_threshold(len(word), word.shape[1], noise)
    tokens = found.nonzero().flatten()
    reason = "" if 0 < len(tokens) < len(word) // 2 else "most rows of the word embedding are filled"
    if noise:
        reason = f"noise of about {noise:.1g} per number covers tokens with a small gradient"
    elif _thinned(word[tokens]):
        reason = "the rows were pruned, and some tokens with them"
    used = word[tokens].double()
    return Rows(tokens, not reason, used, position, used[:0], noise, reason)


def row_lengths(rows: Tensor) -> Tensor:
    """(R,) float64 lengths of rows (R, H), a block at a time: a whole vocabulary in float64 takes 20 times as long."""
    parts = torch.split(rows, max(1, BLOCK // rows.shape[1]))
    return torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in parts])


def _padding_row(used: Tensor, victim: LanguageVictim, view: View) -> tuple[int, Tensor] | None:
    """What the word rows lack, (H,) float64, and the padding token it belongs to, whose lookup hands no gradient on
    (`padding_idx`); `used` (n, H) are those that are not zero.

    Both embeddings' rows sum to the e_p of all places (those of the score side of tied weights to zero), so
    what the word rows lack belongs to padding that the client did not mask.  Nothing is lacking where it did.
    """
    padding = getattr(victim.module.get_input_embeddings(), "padding_idx", None)
    if padding is None or victim.position is None or victim.position not in view.observed:
        return None
    position = view.observed[victim.position].double()
    if _thinned(used) or _thinned(position[position.any(dim=1)]) or quantised(used):
        return None
    lacking = position.sum(dim=0) - used.double().sum(dim=0)
    error = 10 * max(view.rounding, 1e-6) * float(position.norm(dim=1).sum())
    return (padding, lacking) if float(lacking.norm()) > error else None


def quantised(rows: Tensor) -> bool:
    """Whether the rows hold `LEVELS` different numbers at most; some of them tell where they hold more."""
    some = rows.reshape(-1)[: 16 * LEVELS]
    return len(torch.unique(some)) <= LEVELS and len(torch.unique(rows)) <= LEVELS


def noise_level(view: View) -> float:
    """Standard deviation of noise per number: as known, else as rows show it that should be zero; 0 without."""
    if view.knowledge.noise_std.value:
        return float(view.knowledge.noise_std.value)
    found = noisy_rows(view)
    return 0.0 if found is None else found[1]


def noisy_rows(view: View) -> tuple[str, float] | None:
    """The embedding whose rows that no text needs hold noise, and its standard deviation per number: of the
    words unless they also score tokens, else of the positions."""
    victim = language(view)
    for name in (None if victim.tied else victim.word, victim.position):
        if name is not None and name in view.observed:
            std = _common_size(view.observed[name])
            if std is not None:
                return name, std
    return None


def _common_size(rows: Tensor) -> float | None:
    """Standard deviation of noise that the smallest tenth of the rows (R, H) consists of; else None.

    Rows of nothing but Gaussian noise are equally large, up to a relative spread of 1 / sqrt(2 H) each, and
    at right angles, up to cosines of 1 / sqrt(H).
    """
    sizes = row_lengths(rows) / math.sqrt(rows.shape[1])
    order = sizes.argsort()[: max(4, len(sizes) // 10)]
    smallest = rows[order[:COMPARED]].double()
    least = float(sizes[order[0]])
    limit = least * math.exp(2 * math.sqrt(math.log(len(sizes)) / rows.shape[1]))
    if not least > 0 or float(sizes[order[-1]]) > limit or len(sizes) < 2 * len(order):
        return None
    unit = smallest / smallest.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool, device=unit.device)]
    if float(cosines.square().mean().sqrt()) > 2 / math.sqrt(rows.shape[1]):
        return None
    return float(sizes[sizes <= limit].square().mean().sqrt())


def position_rows(view: View, noise: float) -> Tensor:
    """(P, H) rows of the positions in use; (0, H) without a learnt position embedding."""
    victim = language(view)
    if victim.position is None or victim.position not in view.observed:
        return torch.zeros((0, victim.hidden), dtype=torch.float64, device=victim.device)
    rows = view.observed[victim.position].double()[victim.first_position :]
    used = rows.square().sum(dim=1) > _row_threshold(len(rows), rows.shape[1], noise)
    last = int(used.nonzero().max()) + 1 if bool(used.any()) else 0
    return rows[:last]


def _row_threshold(rows: int, width: int, noise: float) -> float:
    """Squared length that one of so many rows of noise hardly exceeds; 0 without noise."""
    return noise**2 * float(chdtri(width, FALSE_ALARMS / rows)) if noise else 0.0


def _thinned(rows: Tensor) -> bool:
    """Zeros scattered over rows that are not zero."""
    return bool((rows == 0).double().mean() > 0.01) if len(rows) else False


def _tied_rows(word: Tensor, position: Tensor, noise: float, view: View) -> Rows:
    width = word.shape[1]
    nothing = word[:0]
    if noise or _thinned(word):
        reason = "noise or pruning hides which rows of the tied embedding belong to the input"
        return _likeliest(word, position, noise, reason, view, _label_directions(word, noise, view))
    lengths = word.norm(dim=1)
    alive = lengths > 0
    unit = word / lengths.where(alive, 1.0)[:, None]
    directions, sizes = _principal(unit)
    if len(sizes) >= width:
        reason = "tokens and labelled places together fill the width of the tied embedding"
        return _likeliest(word, position, noise, reason, view)
    leverage = (unit @ directions).square() @ (1 / sizes)
    own = leverage > LEVERAGE
    outputs = _principal(unit[~own])[0].T if bool((~own & alive).any()) else nothing
    own &= _without(unit, outputs).norm(dim=1) > INSIDE  # rows of confident labels stand out too
    tokens = own.nonzero().flatten()
    return Rows(
        tokens,
        certain=len(tokens) > 0,
        word=_without(word[tokens], outputs),
        position=position,
        outputs=outputs,
        noise=0.0,
    )


def _label_directions(word: Tensor, noise: float, view: View) -> Tensor:
    """The score side's row space as the rows of the labels show it, (m, H) orthonormal; they stand out in the
    bias's gradient, where there is one, with -1 over the number of labelled places each."""
    output = language(view).output
    if output is None or output[1] is None or output[1] not in view.observed:
        return word[:0]
    bias = view.observed[output[1]].double()
    labels = bias < -max(CLEAR * noise, 0.3 * float(-bias.min()))
    if not 0 < int(labels.sum()) < word.shape[1]:
        return word[:0]
    return torch.linalg.svd(word[labels], full_matrices=False)[2]


def _likeliest(
    word: Tensor, position: Tensor, noise: float, reason: str, view: View, outputs: Tensor | None = None
) -> Rows:
    """Tokens in the order of their evidence: the overlap with a position row, else the length of the row."""
    outputs = word[:0] if outputs is None else outputs
    word = _without(word, outputs)
    room = min(len(word), 8 * max(view.round.num_examples * len(position), 64))
    evidence = (word @ position.T).amax(dim=1) if len(position) else word.norm(dim=1)
    tokens = evidence.topk(room).indices
    return Rows(tokens, False, word[tokens], position, outputs, noise, reason, ranked=True)


def _principal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Directions (H, k) and eigenvalues (k,) of the Gram matrix above rounding."""
    sizes, directions = torch.linalg.eigh(rows.T @ rows)
    kept = sizes > RANK_FLOOR
    return directions[:, kept], sizes[kept]


def _without(rows: Tensor, basis: Tensor) -> Tensor:
    """The part of each row that is orthogonal to the basis."""
    return rows - (rows @ basis.T) @ basis


def widened(view: View, rows: Rows) -> Rows:
    """Under noise, also the tokens whose rows overlap most with a position's: together the two rows show what
    neither shows by itself.  Unchanged where the tokens are certain or ranked already."""
    victim = text_victim(view)
    if victim is None or rows.certain or rows.ranked or not rows.noise or not rows.length:
        return rows
    word = view.observed[victim.word].double()
    best = (rows.position @ word.T - word.square().sum(dim=1) / 2).topk(WIDER, dim=1).indices
    tokens = torch.cat([rows.tokens, best.flatten()]).unique()  # type: ignore[no-untyped-call]
    return replace(rows, tokens=tokens, word=word[tokens])


def evidence(rows: Rows, sentence: Tensor) -> Tensor:
    """(P, n) how much of each token's row the row of each position explains, the others at the places that
    the sentence (L,) gives them: its coordinate descent puts the largest in its place."""
    position, own, left = _explained(rows, sentence)
    return position @ left.T + own * position.square().sum(dim=1, keepdim=True)


def explains(rows: Rows, sentence: Tensor) -> bool:
    """Whether the position rows at the places of each token of a sentence (P,) add up to its word row, to rounding:
    then the tokens and their order are what the client had, whatever else of the update does not fit."""
    if not rows.certain or rows.length != len(sentence):
        return False
    position, _, left = _explained(rows, sentence)
    return bool(left.norm() < EXPLAINED * rows.word.norm()) and bool(position.any(dim=1).all())


def _explained(rows: Rows, sentence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Position rows (P, H) without the score side, which candidate stands at each (P, n), and what the rows at
    their places leave of the word rows (n, H)."""
    position = _without(rows.position, rows.outputs)[: len(sentence)]
    own = (rows.tokens == sentence[: len(position), None]).to(position.dtype)
    return position, own, rows.word - own.T @ position


def place(rows: Rows) -> Tensor:
    """For one sentence: the token of each position, (P,) int64, by matching position rows to word rows.

    The token rows are sums of the position rows at their places, so the places minimise
    sum over t of |word_t - sum of position_i at t|^2: downhill, one place at a time, from the nearest
    directions, the nearest rows, the largest inner products (the likelihood ratio under noise), and the
    coefficients of position rows in word rows, which are 0 and 1 where the former are independent.
    """
    position = _without(rows.position, rows.outputs)
    overlap = position @ rows.word.T
    lengths = rows.word.norm(dim=1)
    shares = least_squares(position.T, rows.word.T, "gelsd")
    starts = (overlap / lengths, overlap - lengths.square() / 2, overlap, shares)
    descents = [_descend(start.argmax(dim=1), position, rows.word) for start in starts]
    chosen, _ = min(descents, key=lambda descent: descent[1])
    return rows.tokens[_fill(chosen, position, rows.word)]


def _fill(chosen: Tensor, position: Tensor, word: Tensor) -> Tensor:
    """Places whose row was pruned to nothing get the tokens that stand nowhere else, the longest rows first."""
    empty = ~position.any(dim=1)
    unused = torch.ones(len(word), dtype=torch.bool, device=word.device)
    unused[chosen[~empty]] = False
    places, tokens = empty.nonzero().flatten(), unused.nonzero().flatten()
    tokens = tokens[word[tokens].norm(dim=1).argsort(descending=True)]
    few = min(len(places), len(tokens))
    chosen = chosen.clone()
    chosen[places[:few]] = tokens[:few]
    return chosen


def _descend(chosen: Tensor, position: Tensor, word: Tensor) -> tuple[Tensor, float]:
    """Each place to the token whose row it explains best, until none moves; and what is left unexplained."""
    left = word.clone().index_add_(0, chosen, -position)
    for _ in range(2 * len(chosen)):
        before = chosen.clone()
        for i, row in enumerate(position):
            left[chosen[i]] += row
            chosen[i] = (left @ row).argmax()
            left[chosen[i]] -= row
        if torch.equal(before, chosen):
            break
    return chosen, float(left.square().sum())
