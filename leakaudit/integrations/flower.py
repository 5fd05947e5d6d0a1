"""Record what a Flower client sends, and what a Flower server receives, as shared-update files.

On the client, one more mod; the first in the list is the outermost, so it sees what really leaves:

    app = ClientApp(mods=[record_mod("/data/audit"), LocalDpMod(...)])

On the server, one more call around any strategy, message-based or legacy:

    strategy = record_strategy(FedAvg(), "/data/audit")

Beside every update round-0001-client-7.safetensors lies the model the client received, so that

    leakaudit attack round-0001-client-7.safetensors --model task.py:Net \\
        --checkpoint round-0001-client-7-model.safetensors --input-shape 3,32,32

audits it.  Messages are read, never changed; whatever goes wrong here is logged, once for each kind, and
training goes on.  Flower itself is not imported: its messages are asked for their records.  Written against
flwr 1.41 (message-based and legacy applications).
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from leakaudit.capture import steps_of_epochs
from leakaudit.errors import InputError
from leakaudit.formats.checkpoint import parameters_sha256, save_checkpoint
from leakaudit.formats.manifest import Carried, Manifest, build_manifest
from leakaudit.formats.phrases import first_line, limit
from leakaudit.formats.writing import CREATED_BY, write_update
from leakaudit.integrations.advisories import installed_version
from leakaudit.messages import AGGREGATE

Sends = Literal["weights", "delta"]
"""What a client's arrays are: weights after training, as in Flower's own strategies, or after - before."""

Call = Callable[[Any, Any], Any]
Mod = Callable[[Any, Any, Call], Any]

_log = logging.getLogger("leakaudit")

_MASKED_RECORD, _MASKED_KEY = "secaggplus_configs", "masked_params"
_MASK_STATE, _MODULUS_KEY = "secaggplus_state", "mod_range"
_STATUS = "fitres.status"
_BATCH_NORM = ("running_mean", "running_var", "num_batches_tracked")

_COUNTS = ("num_examples", "num_samples", "num_train_examples")
_RATES = ("learning_rate", "lr", "local_lr", "client_lr")
_EPOCHS = ("local_epochs", "num_epochs", "epochs")
_STEPS = ("local_steps", "num_steps", "max_steps")
_BATCHES = ("batch_size", "local_batch_size", "train_batch_size")
_ROUNDS = ("server_round", "current_round", "round")


# ------------------------------------------------------------------ what users call


def record_mod(
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    facts: Manifest | None = None,
    sends: Sends = "weights",
    rounds: Container[int] | None = None,
) -> Mod:
    """A Flower client mod that records the replies to training messages, after the mods listed behind it.

    Args:
        folder: made when missing; give an absolute path, because `flwr run` starts clients elsewhere.
        model: the client's module, which names the arrays of legacy applications, tells buffers from
            parameters, and lets the recorded checkpoint be told from others.
        facts: what no message says but the audit needs, over what the messages say: Manifest(model=...,
            input_shape=..., num_classes=..., normalisation=..., learning_rate=..., local_batch_size=...).
        sends: see `Sends`.
        rounds: rounds to record, such as range(1, 4); None for all.

    Written for the client with partition-id (or node) C in round R are round-R-client-C.safetensors and, as
    that client received it, round-R-client-C-model.safetensors.  Rounds and counts come from the messages;
    learning rate, epochs, steps and batch size from their config or, failing that, from the run's
    (`lr`, `learning-rate`, `local-epochs`, `batch-size` and the like).  Of SecAgg+ the masked vector is
    recorded when this mod stands before `secaggplus_mod`.  Replies without arrays are left alone.
    """
    recorder = Recorder(Path(folder).absolute(), model, facts, sends, rounds)

    def mod(message: Any, context: Any, call_next: Call) -> Any:
        if not message.metadata.message_type.startswith("train"):
            return call_next(message, context)
        received = None
        with recorder.attempt():
            received = Parcel.of_content(message.content)  # now, because clients may empty the message
        reply = call_next(message, context)
        with recorder.attempt():
            if received is not None and not reply.has_error():
                sent = Parcel.of_reply(reply.content, received, context)
                recorder.write(
                    _sender(context), _round(received, message), sent, received, context.run_config
                )
        return reply

    return mod


def record_strategy(
    strategy: Any,
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    facts: Manifest | None = None,
    sends: Sends = "weights",
    rounds: Container[int] | None = None,
) -> Any:
    """The same strategy, which also records what arrives from each client, and the aggregate.

    Args:
        strategy: a strategy of flwr.serverapp or flwr.server; it is left as it is, and a shallow copy of a
            subclass of its own class is returned, so that everything else works as before.
        folder, model, facts, sends, rounds: as for `record_mod`.

    Written in round R are round-R-model.safetensors (for each client where they differ),
    round-R-client-NODE.safetensors and round-R-aggregate.safetensors.  Inside a wrapper such as
    DifferentialPrivacyServerSideFixedClipping it records what the wrapper hands on, around it what arrives.
    Raises `InputError` for anything that is no strategy.
    """
    recorder = Recorder(Path(folder).absolute(), model, facts, sends, rounds)
    mixins = {"configure_train": _RecordsMessages, "configure_fit": _RecordsFits}
    mixin = next((mixin for method, mixin in mixins.items() if hasattr(strategy, method)), None)
    if mixin is None:
        raise InputError(
            f"{type(strategy).__name__} is no Flower strategy; accepted: one with configure_train and"
            " aggregate_train, or with configure_fit and aggregate_fit"
        )
    kind = type(f"Recording{type(strategy).__name__}", (mixin, type(strategy)), {})
    recording: Any = object.__new__(kind)
    recording.__dict__.update(vars(strategy))
    recording._leakaudit = recorder
    recording._leakaudit_sent = {}
    return recording


# ------------------------------------------------------------------ strategies


class _RecordsMessages:
    """Before a message-based strategy in the order of method resolution."""

    _leakaudit: Recorder
    _leakaudit_sent: dict[object, Parcel]

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Iterable[Any]:
        messages = list(super().configure_train(server_round, arrays, config, grid))  # type: ignore[misc]
        with self._leakaudit.attempt():
            self._leakaudit_sent = {
                message.metadata.dst_node_id: Parcel.of_content(message.content) for message in messages
            }
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> tuple[Any, Any]:
        found = list(replies)
        received, self._leakaudit_sent = self._leakaudit_sent, {}
        parcels: dict[object, Parcel] = {}
        for reply in found:
            with self._leakaudit.attempt():
                sender = reply.metadata.src_node_id
                if not reply.has_error() and sender in received:
                    parcels[sender] = Parcel.of_reply(reply.content, received[sender])
        _record_round(self._leakaudit, server_round, received, parcels)
        arrays, metrics = super().aggregate_train(server_round, found)  # type: ignore[misc]
        with self._leakaudit.attempt():
            if arrays is not None:
                _record_aggregate(self._leakaudit, server_round, received, parcels, _serialised(arrays))
        return arrays, metrics


class _RecordsFits:
    """The same before a legacy strategy, whose parameters have no names."""

    _leakaudit: Recorder
    _leakaudit_sent: dict[object, Parcel]

    def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> list[tuple[Any, Any]]:
        instructions = list(super().configure_fit(server_round, parameters, client_manager))  # type: ignore[misc]
        with self._leakaudit.attempt():
            self._leakaudit_sent = {
                proxy.cid: Parcel(_numbered(ins.parameters), config=_texts(ins.config))
                for proxy, ins in instructions
            }
        return instructions

    def aggregate_fit(self, server_round: int, results: list[Any], failures: list[Any]) -> tuple[Any, Any]:
        received, self._leakaudit_sent = self._leakaudit_sent, {}
        parcels: dict[object, Parcel] = {}
        for proxy, fit in results:
            with self._leakaudit.attempt():
                if proxy.cid in received:
                    metrics, count = _texts(fit.metrics), fit.num_examples
                    parcels[proxy.cid] = Parcel(_numbered(fit.parameters), metrics=metrics, count=count)
        _record_round(self._leakaudit, server_round, received, parcels)
        parameters, metrics = super().aggregate_fit(server_round, results, failures)  # type: ignore[misc]
        with self._leakaudit.attempt():
            if parameters is not None:
                _record_aggregate(self._leakaudit, server_round, received, parcels, _numbered(parameters))
        return parameters, metrics


def _record_round(
    recorder: Recorder, number: int, received: Mapping[object, Parcel], sent: Mapping[object, Parcel]
) -> None:
    shared = _same_model(received)
    for sender, parcel in sent.items():
        with recorder.attempt():
            recorder.write(str(sender), number, parcel, received[sender], {}, shared_model=shared)


def _record_aggregate(
    recorder: Recorder,
    number: int,
    received: Mapping[object, Parcel],
    sent: Mapping[object, Parcel],
    arrays: Mapping[str, bytes],
) -> None:
    """What the server made of the round; N examples of K clients, where all have as many."""
    if not sent or not _same_model(received):
        return
    counts = {parcel.count for parcel in sent.values()}
    even = counts.pop() if len(counts) == 1 else None
    parcel = Parcel(dict(arrays), count=even)
    before = received[next(iter(sent))]
    recorder.write(AGGREGATE, number, parcel, before, {}, shared_model=True, clients=len(sent))


def _same_model(received: Mapping[object, Parcel]) -> bool:
    parcels = list(received.values())
    return all(
        parcel.arrays.keys() == parcels[0].arrays.keys()
        and all(parcel.arrays[name] is array for name, array in parcels[0].arrays.items())
        for parcel in parcels[1:]
    )


# ------------------------------------------------------------------ messages


@dataclass(frozen=True)
class Parcel:
    """What one message carries.

    Attributes:
        arrays: name -> array as `numpy.save` writes it, in order.
        metrics: what a client states, as text; config: what it was told.
        count: examples, as sent.
        records: names of other groups of arrays.
        modulus: arrays are integers modulo this.
    """

    arrays: dict[str, bytes]
    metrics: dict[str, str] = field(default_factory=dict)
    config: dict[str, str] = field(default_factory=dict)
    count: int | None = None
    records: tuple[str, ...] = ()
    modulus: int | None = None

    @classmethod
    def of_content(cls, content: Any) -> Parcel:
        """Of a message that a server sends."""
        name, *others = list(content.array_records) or [None]
        arrays = {} if name is None else _serialised(content.array_records[name])
        return cls(arrays, config=_settings(content.config_records), records=tuple(others))

    @classmethod
    def of_reply(cls, content: Any, received: Parcel, context: Any = None) -> Parcel:
        """Of a client's reply; the group of arrays is the one with the names that were received."""
        groups = {name: _serialised(record) for name, record in content.array_records.items()}
        main = next((name for name, group in groups.items() if group.keys() == received.arrays.keys()), None)
        main = next(iter(groups), None) if main is None else main
        metrics = {**_settings(content.config_records), **_settings(content.metric_records)}
        count = next((int(float(v)) for k, v in metrics.items() if _plain(k) in _COUNTS), None)
        parcel = cls(
            arrays={} if main is None else groups[main],
            metrics={name: value for name, value in metrics.items() if _plain(name) not in _COUNTS},
            count=count,
            records=tuple(name for name, group in groups.items() if group and name != main),
        )
        masked = content.config_records.get(_MASKED_RECORD, {}).get(_MASKED_KEY)
        if masked is None:
            return parcel
        hidden = {f"masked_{index:04d}": array for index, array in enumerate(masked)}
        return replace(parcel, arrays=hidden, modulus=_modulus(context))


def _serialised(record: Any) -> dict[str, bytes]:
    strange = {array.stype for array in record.values()} - {"numpy.ndarray"}
    if strange:
        raise InputError(
            f"arrays of type {sorted(strange)} cannot be recorded; accepted: those made of NumPy arrays or tensors"
        )
    return {name: array.data for name, array in record.items() if array.data}


def _numbered(parameters: Any) -> dict[str, bytes]:
    return {str(index): array for index, array in enumerate(parameters.tensors)}


def _settings(records: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Every entry of every record as text, but the protocol's own."""
    found: dict[str, str] = {}
    for name, record in records.items():
        if name not in (_STATUS, _MASKED_RECORD):
            found.update(_texts(record))
    return found


def _texts(record: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: f"{len(value)} bytes" if isinstance(value, bytes) else limit(str(value))
        for name, value in record.items()
    }


def _modulus(context: Any) -> int:
    state = {} if context is None else context.state.config_records.get(_MASK_STATE, {})
    return int(state.get(_MODULUS_KEY, 1 << 32))  # Flower's default


def _sender(context: Any) -> str:
    return str(context.node_config.get("partition-id", context.node_id))


def _round(received: Parcel, message: Any) -> int | None:
    stated = _number(received.config, _ROUNDS)
    if stated is None and message.metadata.group_id.isdecimal():
        stated = float(message.metadata.group_id)
    return None if stated is None else int(stated)


def _plain(name: str) -> str:
    """`train.batch-size` -> `batch_size`."""
    return name.lower().replace("-", "_").rpartition(".")[2]


def _number(settings: Mapping[str, Any], names: Iterable[str]) -> float | None:
    """The first of `names` that is set to a positive number."""
    plain = {_plain(name): value for name, value in settings.items()}
    for name in names:
        try:
            value = float(plain[name])
        except (KeyError, TypeError, ValueError):
            continue
        if value > 0 and np.isfinite(value):
            return value
    return None


# ------------------------------------------------------------------ files


@dataclass(frozen=True)
class Recorder:
    """Writes parcels as files; see `record_mod` for its attributes."""

    folder: Path
    model: nn.Module | None = None
    facts: Manifest | None = None
    sends: Sends = "weights"
    rounds: Container[int] | None = None
    told: set[str] = field(default_factory=set, compare=False)
    saved: set[Path] = field(default_factory=set, compare=False)

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Log whatever goes wrong inside, once for each kind of fault, and go on."""
        try:
            yield
        except Exception as error:  # recording must never end the training it records
            text = f"{type(error).__name__}: {first_line(error)}"
            if text not in self.told:
                self.told.add(text)
                _log.warning("leakaudit could not record a Flower message, training goes on: %s", text)

    def write(
        self,
        sender: str,
        number: int | None,
        sent: Parcel,
        received: Parcel,
        run_config: Mapping[str, Any],
        *,
        shared_model: bool = False,
        clients: int | None = None,
    ) -> None:
        """The update, and the model it started from: one of the round when `shared_model`."""
        if not sent.arrays or (self.rounds is not None and number not in self.rounds):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        who = sender if sender == AGGREGATE else f"client-{sender}"
        number = self._next(who) if number is None else number
        tensors, before = self._tensors(sent), self._tensors(received)
        stem = f"round-{number:04d}"
        checkpoint = self.folder / f"{stem if shared_model else f'{stem}-{who}'}-model.safetensors"
        if before and not (shared_model and checkpoint in self.saved):
            save_checkpoint(before, checkpoint)
            self.saved.add(checkpoint)
        message = Carried(
            software=_software(),
            sender=sender,
            round=number,
            metrics=sent.metrics,
            config=received.config,
            records=sent.records,
            modulus=sent.modulus,
            checkpoint=checkpoint.name if before else None,
        )
        fields = self._fields(sent, {**run_config, **received.config}, clients)
        fields |= {"message": message, "checkpoint_sha256": self._hash(before), "created_by": CREATED_BY}
        fields |= {"parameter_order": tuple(tensors), "buffers": self._buffers(tensors)}
        write_update(
            self.folder / f"{stem}-{who}.safetensors", tensors, build_manifest(fields).merged(self.facts)
        )

    def _fields(self, sent: Parcel, settings: Mapping[str, Any], clients: int | None) -> dict[str, Any]:
        """What the settings say of the round, as far as it fits together."""
        size, count, steps = _number(settings, _BATCHES), sent.count, _number(settings, _STEPS)
        epochs = _number(settings, _EPOCHS)
        size = None if size is None or (count is not None and size > count) else int(size)
        if steps is None and epochs is not None and count and (size or _number(settings, _BATCHES)):
            steps = steps_of_epochs(int(epochs), count, size)
        return {
            "kind": None if sent.modulus is not None else self.sends,
            "sign": "after-minus-before" if self.sends == "delta" and sent.modulus is None else None,
            "learning_rate": _number(settings, _RATES),
            "local_steps": None if steps is None else int(steps),
            "num_examples": count * clients if count and clients else count or None,
            "clients": clients if count else None,
            "local_batch_size": size,
        }

    def _next(self, who: str) -> int:
        """The first round that is not recorded yet, where no message says which it is."""
        number = 1
        while (self.folder / f"round-{number:04d}-{who}.safetensors").exists():
            number += 1
        return number

    def _tensors(self, parcel: Parcel) -> dict[str, Tensor]:
        arrays = {
            name: np.load(io.BytesIO(array), allow_pickle=False) for name, array in parcel.arrays.items()
        }
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        if self.model is None or parcel.modulus is not None:
            return tensors
        return _named(tensors, self.model)

    def _buffers(self, tensors: Mapping[str, Tensor]) -> tuple[str, ...] | None:
        """Buffers with their values after training; None for differences, which the reader recognises."""
        if self.sends == "delta":
            return None
        own = set() if self.model is None else {name for name, _ in self.model.named_buffers()}
        return tuple(name for name in tensors if name in own or name.split(".")[-1] in _BATCH_NORM)

    def _hash(self, before: Mapping[str, Tensor]) -> str | None:
        """Of the parameters the client received; None where nobody knows which of the arrays those are."""
        names = [] if self.model is None else [name for name, _ in self.model.named_parameters()]
        if not names or not set(names) <= before.keys():
            return None
        return parameters_sha256({name: before[name] for name in names})


def _named(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Arrays without names under those of the module's state dict, or of its parameters; in their order."""
    if list(tensors) != [str(index) for index in range(len(tensors))]:
        return tensors
    shapes = [tensor.shape for tensor in tensors.values()]
    for known in (model.state_dict(), dict(model.named_parameters())):
        if [tensor.shape for tensor in known.values()] == shapes:
            return dict(zip(known, tensors.values(), strict=True))
    return tensors


def _software() -> str:
    return f"flwr {installed_version('flwr') or ''}".strip()
