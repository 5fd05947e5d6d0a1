"""The manifest: what a shared-update file says about how it was made.

It travels as JSON, in the safetensors metadata under `leakaudit` or beside the
file as NAME.manifest.json.  Every field may be missing; what is missing is
unknown to the adversary and is reported so, never filled in silently.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MANIFEST_KEY = "leakaudit"

Positive = Annotated[int, Field(ge=1)]


class Normalisation(BaseModel):
    """Model input = (pixel - mean) / std, one number a channel, pixels in [0, 1]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: tuple[float, ...]
    std: tuple[Annotated[float, Field(gt=0)], ...]


class Manifest(BaseModel):
    """Attributes:
    kind: "gradient" (p.grad, or the mean of it), or "delta" (difference of parameters).
    sign: for a delta, which way it points: "before-minus-after" or "after-minus-before".
    learning_rate: of the local SGD that made a delta.
    local_steps, num_examples, local_batch_size: the round; num_examples is the client's N.
    loss, reduction: "cross-entropy", "mean" or "sum".
    mode: "train" or "eval" of the module while the gradient was taken.
    normalisation, input_shape (C, H, W), num_classes, model, checkpoint_sha256: the model.
    defenses: specs applied before sharing, in order; [] says none were.
    noise_std: standard deviation of added noise per number of the update, in its units.
    parameter_order: names in the order the module lists them (safetensors sorts its keys).
    buffers: names of entries that are buffers, not parameters.
    created_by: program and version.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    format_version: Literal[1] = 1
    kind: Literal["gradient", "delta"] | None = None
    sign: Literal["before-minus-after", "after-minus-before"] | None = None
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    local_steps: Positive | None = None
    num_examples: Positive | None = None
    local_batch_size: Positive | None = None
    loss: str | None = None
    reduction: Literal["mean", "sum"] | None = None
    mode: Literal["train", "eval"] | None = None
    normalisation: Normalisation | None = None
    input_shape: tuple[Positive, Positive, Positive] | None = None
    num_classes: Positive | None = None
    model: str | None = None
    checkpoint_sha256: str | None = None
    defenses: tuple[str, ...] | None = None
    noise_std: Annotated[float, Field(ge=0)] | None = None
    parameter_order: tuple[str, ...] | None = None
    buffers: tuple[str, ...] | None = None
    created_by: str | None = None
