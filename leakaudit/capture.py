"""The client's side of one round: a private batch -> the file the server sees.

The truth goes to its own file (`leakaudit.data.save_truth`, `leakaudit.text_data.save_truth`);
nothing here writes labels, pixels or tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from leakaudit.data import PrivateBatch
from leakaudit.defenses import Defense, apply
from leakaudit.defenses.noise import Noise
from leakaudit.errors import InputError
from leakaudit.formats.checkpoint import parameters_sha256
from leakaudit.formats.loading import SharedUpdate
from leakaudit.formats.manifest import Manifest, build_manifest
from leakaudit.formats.phrases import counted
from leakaudit.formats.writing import CREATED_BY, write_update
from leakaudit.media import medium_of
from leakaudit.models.victim import LOSSES, Victim
from leakaudit.randomness import fork, seeded
from leakaudit.rounds import Round, client_update, trained_buffers
from leakaudit.update import Update

if TYPE_CHECKING:
    from leakaudit.text_data import PrivateText


@dataclass(frozen=True)
class Captured:
    """What one client shares.

    Attributes:
        update: the pseudo-gradient after defenses, in the victim's parameter order.
        buffers: BatchNorm statistics and the like after training; empty when not shared.
        manifest: how it was made, without anything private.
    """

    update: Update
    buffers: dict[str, Tensor]
    manifest: Manifest


def capture(
    victim: Victim,
    batch: PrivateBatch | PrivateText,
    round: Round,
    *,
    defenses: Sequence[tuple[str, Defense]] = (),
    include_buffers: bool = False,
    seed: int = 0,
) -> Captured:
    """Run one client's round on `batch` and keep what it uploads.

    Args:
        victim: the model as downloaded; its mode, loss and normalisation are the client's.  Dropout, which
            only language models in train mode have, is drawn from `seed`.
        batch: exactly `round.num_examples` private examples.
        round: what the client does in the end: defenses that change it (`Defense.round`) are the caller's to ask.
        defenses: (spec, defense) in the order they are applied, the spec for the manifest.
        include_buffers: also share buffers, as a client that uploads its state dict does.
            They move only in train mode; defenses do not touch them.
        seed: of the defenses' randomness, and dropout's.

    One local step is FedSGD (McMahan et al. 2017) and gives a gradient; several give a delta.
    Raises `InputError` when the batch does not fit the round or the model, the local steps do not
    come to every example, or the update is not finite (a learning rate too large).
    """
    refuse_idle_examples(round)
    for _, defense in defenses:
        victim = defense.victim(victim)
    if len(batch) != round.num_examples:
        raise InputError(f"the round takes {round.num_examples} examples, the batch holds {len(batch)}")
    x, y = medium_of(victim).tensors(victim, batch)
    client = apply(client_update, [defense for _, defense in defenses], fork(seed, "capture/defenses"))
    with seeded(seed, "capture/dropout", victim.device):
        update = client(victim, victim.params, round, x, y).detach().to("cpu")
    if not update.is_finite():
        raise InputError(
            f"the update is not finite after {counted(round.local_steps, 'step')} with"
            f" learning_rate={round.learning_rate}; lower it"
        )
    buffers: dict[str, Tensor] = {}
    if include_buffers:
        moved = trained_buffers(victim, round, x, y) if victim.mode == "train" else victim.buffers
        buffers = {name: tensor.detach().cpu().clone() for name, tensor in moved.items()}
    return Captured(
        update, buffers, build_manifest(manifest_fields(victim, round, update, buffers, defenses))
    )


def as_shared(captured: Captured, victim: Victim) -> SharedUpdate:
    """What was captured as whoever reads its file gets it, on the victim's device."""
    update = captured.update.to(victim.device)
    return SharedUpdate(
        update=update,
        manifest=captured.manifest,
        buffers=captured.buffers,
        has_scale=True,
        missing=tuple(name for name in victim.params if name not in update),
        notes=(),
        dtypes=dict.fromkeys(update, "float32"),
        sha256="",
        raw=update,
    )


def refuse_idle_examples(round: Round) -> None:
    """`InputError` where no step uses an example: it leaves no trace in the update, yet the truth would list it."""
    count, size = round.num_examples, round.batch_size
    if round.examples_used < count:
        raise InputError(
            f"{counted(round.local_steps, 'local step')} of {counted(size, 'example')} would use only"
            f" {round.examples_used} of the {count} examples; accepted: at least"
            f" {steps_of_epochs(1, count, size)} local steps, a batch size of {count}, or fewer examples"
        )


def write_captured(path: str | Path, captured: Captured) -> None:
    """Write the update as .safetensors: the gradient, or for several local steps the real difference of
    parameters, before minus after, which is learning rate times pseudo-gradient.

    Raises `InputError` for another suffix or a folder that cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".safetensors":
        raise InputError(f"updates are saved as .safetensors, got {path.name!r}")
    manifest = captured.manifest
    shared = captured.update
    if manifest.kind == "delta":
        assert manifest.learning_rate is not None  # `capture` always states it
        shared = shared * manifest.learning_rate
    write_update(path, {**shared, **captured.buffers}, manifest)


def steps_of_epochs(epochs: int, num_examples: int, local_batch_size: int | None = None) -> int:
    """Local SGD steps in `epochs` passes over the examples; the last batch of a pass may be short."""
    size = local_batch_size or num_examples
    if epochs < 1 or num_examples < 1 or size < 1:
        raise InputError(
            f"epochs={epochs}, num_examples={num_examples}, local_batch_size={size}: accepted are 1 and above"
        )
    return epochs * -(-num_examples // size)


def round_of(
    batch_size: int,
    num_examples: int | None,
    local_steps: int | None,
    epochs: int | None,
    learning_rate: float | None,
) -> Round:
    """The round of one client by its options; `InputError` where they do not fit together.

    Args:
        num_examples: None for one batch.
        local_steps or epochs: 1 step unless one of them is given.
        learning_rate: needed for several steps.
    """
    if local_steps is not None and epochs is not None:
        raise InputError(f"local steps {local_steps} and epochs {epochs} given; accepted is one of them")
    count = batch_size if num_examples is None else num_examples
    steps = steps_of_epochs(epochs, count, batch_size) if epochs is not None else local_steps
    steps = 1 if steps is None else steps
    if steps > 1 and learning_rate is None:
        raise InputError(f"{steps} local steps need a learning rate")
    try:
        return Round(
            num_examples=count,
            local_steps=steps,
            local_batch_size=batch_size if batch_size < count else None,
            learning_rate=1.0 if learning_rate is None else learning_rate,
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def manifest_fields(
    victim: Victim,
    round: Round,
    update: Update,
    buffers: Mapping[str, Tensor],
    defenses: Sequence[tuple[str, Defense]],
) -> dict[str, Any]:
    """What the manifest of such an update says, for `build_manifest`."""
    single = round.local_steps == 1
    loss, reduction = _loss(victim)
    return {
        "kind": "gradient" if single else "delta",
        "sign": None if single else "before-minus-after",
        "learning_rate": None if single else round.learning_rate,
        "local_steps": round.local_steps,
        "num_examples": round.num_examples,
        "local_batch_size": round.local_batch_size,
        "clients": round.clients if round.clients > 1 else None,
        "sizes": round.sizes,
        "weights": round.weights,
        "client_steps": round.client_steps,
        "loss": loss,
        "reduction": reduction,
        "mode": victim.mode,
        **medium_of(victim).manifest_fields(victim),
        "model": victim.name,
        "checkpoint_sha256": parameters_sha256({**victim.params, **victim.frozen}),
        "defenses": tuple(text for text, _ in defenses),
        "noise_std": _noise(defenses),
        "parameter_order": tuple(update),
        "buffers": tuple(buffers),
        "created_by": CREATED_BY,
    }


def _loss(victim: Victim) -> tuple[str | None, str | None]:
    return next((key for key, function in LOSSES.items() if function is victim.loss_function), (None, None))


def _noise(defenses: Sequence[tuple[str, Defense]]) -> float | None:
    """Standard deviation of noise on the update as shared, when it is stated and nothing changes it afterwards."""
    last = defenses[-1][1] if defenses else None
    return last.std if isinstance(last, Noise) and last.relative is None else None
