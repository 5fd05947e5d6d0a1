"""`Setup`: the model and the private data of a sweep, as every worker loads them for itself."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leakaudit.atomic import sha256_of
from leakaudit.attacks.compiling import Compiler
from leakaudit.data import PrivateBatch
from leakaudit.formats.checkpoint import parameters_sha256
from leakaudit.media import medium_of
from leakaudit.models.victim import Mode, Victim
from leakaudit.models.zoo import LANGUAGE, load_victim, parse_normalisation
from leakaudit.rounds import Round
from leakaudit.subject import pick_device, private_source
from leakaudit.sweep.config import SweepConfig
from leakaudit.threat import View
from leakaudit.update import Update

if TYPE_CHECKING:
    from leakaudit.text_data import PrivateText


@dataclass(frozen=True)
class Setup:
    """What to load; fields as in `SweepConfig`, `count` the private examples that some run needs."""

    model: str
    source: str
    count: int
    checkpoint: str | None
    task: str | None
    lora: str | None
    max_length: int | None
    normalisation: str
    mode: Mode
    input_shape: tuple[int, int, int] | None
    num_classes: int | None
    start: int
    seed: int
    device: str

    @property
    def language(self) -> bool:
        return self.model.startswith(LANGUAGE)


def setup_of(config: SweepConfig, count: int) -> Setup:
    """Raises `InputError` unless there is one source of private examples, of the kind that the model takes."""
    return Setup(
        model=config.model,
        source=str(private_source(config.model, config.data, config.text, config.max_length)),
        count=count,
        checkpoint=None if config.checkpoint is None else str(config.checkpoint),
        task=config.task,
        lora=config.lora,
        max_length=config.max_length,
        normalisation=config.normalisation,
        mode=config.mode,
        input_shape=config.input_shape,
        num_classes=config.num_classes,
        start=config.start,
        seed=config.seed,
        device=config.device,
    )


@functools.lru_cache(maxsize=1)
def load_model(setup: Setup) -> Victim:
    """The model that every client downloads, in the client's mode; loaded once a process."""
    return fresh_model(setup, setup.seed).to(pick_device(setup.device))


def fresh_model(setup: Setup, seed: int) -> Victim:
    """The same model with what no checkpoint gives drawn from `seed`, on the CPU."""
    return load_victim(
        setup.model,
        checkpoint=setup.checkpoint,
        num_classes=setup.num_classes,
        input_shape=setup.input_shape,
        normalisation=parse_normalisation(setup.normalisation),
        mode=setup.mode,
        seed=seed,
        task=setup.task,
        lora=setup.lora,
    )


@functools.cache
def shared_compiler() -> Compiler:
    """It keeps the compiled steps of a process's attacks: one graph serves every run on the same model."""
    return Compiler.of()


@functools.lru_cache(maxsize=1)
def load_examples(setup: Setup) -> PrivateBatch | PrivateText:
    """The private examples that are attacked, on the CPU; loaded once a process."""
    return _load(setup, setup.count, setup.start)


@functools.lru_cache(maxsize=1)
def load_all(setup: Setup, count: int | None) -> PrivateBatch | PrivateText:
    """The data to train on: the first `count` examples, or all; loaded once a process."""
    return _load(setup, count, 0)


def _load(setup: Setup, count: int | None, start: int) -> PrivateBatch | PrivateText:
    victim = load_model(setup)
    return medium_of(victim).load(
        setup.source, victim, count, start=start, max_length=setup.max_length, seed=setup.seed
    )


@functools.lru_cache(maxsize=1)
def load_pool(setup: Setup) -> Any:
    """Unrelated examples, for chance levels; loaded once a process."""
    victim = load_model(setup)
    blank = View(
        victim, Round(1), Update(victim.params)
    )  # a pool is of a model's inputs, whatever was observed
    return medium_of(victim).read_pool(None, blank)


def model_identity(setup: Setup) -> list[str | None]:
    """What makes the model another one: its code, as far as the spec's file and the module's own description
    show it, its parameters and buffers, and how it is used.  Where its file lies does not matter.

    Buffers count because in eval mode BatchNorm's averages change the update.
    """
    victim = load_model(setup)
    target, _, function = setup.model.rpartition(":")
    file = Path(target) if target.endswith(".py") else None
    return [
        setup.model if file is None else f"{file.name}:{function}",
        None if file is None else sha256_of(file),
        repr(victim.module),
        parameters_sha256({**victim.params, **victim.frozen, **victim.buffers}),
        setup.task,
        setup.lora,
        setup.mode,
        setup.normalisation,
    ]


def example_hashes(setup: Setup) -> list[str]:
    """SHA-256 of the model input and label of every private example."""
    victim, batch = load_model(setup), load_examples(setup)
    return [batch_hash(victim, batch.part(row, 1)) for row in range(len(batch))]


def batch_hash(victim: Victim, batch: PrivateBatch | PrivateText) -> str:
    """SHA-256 of the model inputs and labels."""
    return _hash(*medium_of(victim).tensors(victim, batch))


def _hash(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
