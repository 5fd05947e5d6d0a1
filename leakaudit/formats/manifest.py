"""The manifest: what a shared-update file says about how it was made.

It travels as JSON, in the safetensors metadata under `leakaudit` or beside the
file as NAME.manifest.json.  Every field may be missing; what is missing is
unknown to the adversary and is reported so, never filled in silently.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from leakaudit.errors import InputError

MANIFEST_KEY = "leakaudit"

Positive = Annotated[int, Field(ge=1, le=10**9)]


class Normalisation(BaseModel):
    """Model input = (pixel - mean) / std, one number a channel or one for all, pixels in [0, 1]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: tuple[float, ...]
    std: tuple[Annotated[float, Field(gt=0)], ...]

    @model_validator(mode="after")
    def _same_channels(self) -> Normalisation:
        if not len(self.mean) == len(self.std) > 0:
            raise ValueError(f"mean has {len(self.mean)} channels and std {len(self.std)}")
        return self


class Carried(BaseModel):
    """The message of a framework that an update came in, and what it carries beside the update.

    Values are kept as text, so that NaN and any type survive.

    Attributes:
        software: name and version, such as "flwr 1.41.0".
        sender: the client as the framework names it, or "aggregate" for what the server made of many.
        round: the framework's number of it.
        metrics: what the client states of itself: losses, accuracies, ...
        config: what the server told the client to do.
        records: other groups of arrays in the same message, by name; their numbers are not in the file.
        modulus: the tensors are integers modulo this, masked by secure aggregation.
        checkpoint: name of the file beside this one that holds the model the client received.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    software: str | None = None
    sender: str | None = None
    round: Annotated[int, Field(ge=0)] | None = None
    metrics: dict[str, str] = Field(default_factory=dict)
    config: dict[str, str] = Field(default_factory=dict)
    records: tuple[str, ...] = ()
    modulus: Annotated[int, Field(ge=2, le=2**64)] | None = None
    checkpoint: str | None = None


class Manifest(BaseModel):
    """Attributes:
    kind: "gradient" (p.grad, or the mean of it), "delta" (difference of parameters), or "weights" (parameters
        after local training; the checkpoint in use is the model before it).
    sign: for a delta, which way it points: "before-minus-after" or "after-minus-before".
    learning_rate: of the local SGD that made a delta.
    local_steps, num_examples, local_batch_size: the round; num_examples is N, of all clients together.
    clients: how many share the N examples, where the update is made of all of theirs (secure aggregation).
    sizes, weights, client_steps: of each client, where they differ; see `leakaudit.rounds.Round`.
    loss, reduction: "cross-entropy", "mean" or "sum".
    mode: "train" or "eval" of the module while the gradient was taken.
    normalisation, input_shape (C, H, W), num_classes, model, checkpoint_sha256: the model.
    task, lora: of a language model, see `leakaudit.models.language`.
    defenses: specs applied before sharing, in order; [] says none were.
    noise_std: standard deviation of added noise per number, in units of the pseudo-gradient.
    parameter_order: names in the order the module lists them (safetensors sorts its keys).
    buffers: names of entries that are buffers, not parameters, with their values after training.
    system, role, step, staleness: the training system that the update crossed, who saw it, the server's step, and
        how many steps old the model of each client was.
    bases: hashes of the models that the clients started from, in order, where they differ.
    exact: False where the update is not what the round and the defenses say, such as with a residual of older steps.
    note: how whoever saw the update came by it.
    created_by: program and version.
    message: what a framework's message carried beside the update.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    format_version: Literal[1] = 1
    kind: Literal["gradient", "delta", "weights"] | None = None
    sign: Literal["before-minus-after", "after-minus-before"] | None = None
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    local_steps: Positive | None = None
    num_examples: Positive | None = None
    local_batch_size: Positive | None = None
    clients: Positive | None = None
    sizes: tuple[Positive, ...] | None = None
    weights: tuple[float, ...] | None = None
    client_steps: tuple[Positive, ...] | None = None
    loss: str | None = None
    reduction: Literal["mean", "sum"] | None = None
    mode: Literal["train", "eval"] | None = None
    normalisation: Normalisation | None = None
    input_shape: tuple[Positive, Positive, Positive] | None = None
    num_classes: Positive | None = None
    task: Literal["classification", "mlm", "causal-lm"] | None = None
    lora: str | None = None
    model: str | None = None
    checkpoint_sha256: str | None = None
    defenses: tuple[str, ...] | None = None
    noise_std: Annotated[float, Field(ge=0)] | None = None
    parameter_order: tuple[str, ...] | None = None
    buffers: tuple[str, ...] | None = None
    system: str | None = None
    role: Literal["server", "peer", "network", "enclave-host"] | None = None
    step: Annotated[int, Field(ge=0)] | None = None
    staleness: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    bases: tuple[str, ...] | None = None
    exact: bool | None = None
    note: str | None = None
    created_by: str | None = None

    message: Carried | None = None

    @model_validator(mode="after")
    def _agree(self) -> Manifest:
        channels = None if self.normalisation is None else len(self.normalisation.mean)
        if channels not in (None, 1) and self.input_shape is not None and channels != self.input_shape[0]:
            raise ValueError(f"normalisation has {channels} channels, input_shape {self.input_shape[0]}")
        if (self.local_batch_size or 1) > (self.num_examples or self.local_batch_size or 1):
            raise ValueError(
                f"local_batch_size {self.local_batch_size} exceeds num_examples {self.num_examples}"
            )
        self._check_clients()
        return self

    def _check_clients(self) -> None:
        count = self.clients or 1
        for name in ("sizes", "weights", "client_steps", "staleness", "bases"):
            stated = getattr(self, name)
            if stated is not None and len(stated) != count:
                raise ValueError(f"{name} has {len(stated)} entries for clients {count}")
        if self.num_examples is None:
            return
        if self.sizes is None and self.num_examples % count:
            raise ValueError(f"num_examples {self.num_examples} is not a multiple of clients {count}")
        if self.sizes is not None and sum(self.sizes) != self.num_examples:
            raise ValueError(f"sizes come to {sum(self.sizes)}, num_examples is {self.num_examples}")

    def merged(self, overrides: Manifest | None) -> Manifest:
        """This manifest with every field that `overrides` states put in place of its own.

        Raises `InputError` when the two together contradict themselves.
        """
        if overrides is None:
            return self
        stated = overrides.model_dump(exclude_unset=True, exclude_none=True)
        try:
            return Manifest.model_validate({**self.model_dump(exclude_unset=True), **stated})
        except ValidationError as error:
            raise InputError(f"the manifest and the values given do not fit: {explain(error)}") from error

    def to_json(self, indent: int | None = None) -> str:
        """Only the fields that say something."""
        return self.model_dump_json(exclude_none=True, indent=indent)


def parse_manifest(text: str | bytes, source: str | Path) -> Manifest:
    """The manifest in a JSON text; `InputError` names `source`, the field, its value and what is accepted."""
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise InputError(f"the manifest of {source} is not valid: {explain(error)}") from error


def build_manifest(fields: dict[str, Any]) -> Manifest:
    """A manifest of the fields that are not None; `InputError` for a value that is not accepted."""
    try:
        return Manifest.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        raise InputError(f"the manifest cannot be written: {explain(error)}") from error


def explain(error: ValidationError) -> str:
    """The first fault of a validation as one short phrase: field, value, what is accepted."""
    fault = error.errors(include_url=False)[0]
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if fault["type"] == "json_invalid":
        return f"it is not JSON, {fault['ctx']['error']}"
    field = ".".join(str(part) for part in fault["loc"])
    message = fault["msg"].removeprefix("Value error, ")
    if not field or fault["type"] == "value_error":
        return f"{field + ': ' if field else ''}{message}{more}"
    return f"{field}={_short(fault['input'])}: {message[0].lower()}{message[1:]}{more}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
