"""What an observer of the network can tell from sizes and times alone (network.csv of a run).  No torch here."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from leakaudit.errors import InputError
from leakaudit.report.words import plural

NETWORK_NAME = "network.csv"
COLUMNS = ("sent", "received", "sender", "receiver", "kind", "bytes")
SERVER = "server"
SPARSE = 0.9
"""Share of the model's size below which an upload is compressed."""
TELLING = 0.05
"""Relative difference of computing times from which on clients can be told apart."""
BYTES_A_VALUE = 8
"""Of a sparse message: a float32 and its position."""


@dataclass(frozen=True)
class Message:
    """What an observer of the network sees of one message; times are seconds of the virtual clock."""

    sent: float
    received: float
    sender: str
    receiver: str
    kind: str
    size: int


@dataclass(frozen=True)
class Speeds:
    """What the observer is told of the devices: seconds of a local step, and whether all are as fast."""

    step_seconds: float
    alike: bool


def read_network(folder: Path) -> list[Message] | None:
    """All messages of a run; None where it logged none.  `InputError` for a file that is not such a table."""
    path = folder / NETWORK_NAME
    if not path.is_file():
        return None
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))
        lacking = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if lacking:
            raise InputError(f"{path} lacks the columns {', '.join(lacking)}; accepted: {', '.join(COLUMNS)}")
        return [_message(row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not a table of messages: {error}") from error


def _message(row: dict[str, str]) -> Message:
    sent, received = float(row["sent"]), float(row["received"])
    if not (math.isfinite(sent) and math.isfinite(received)):
        raise ValueError(f"time {row['sent']} to {row['received']}")
    return Message(sent, received, row["sender"], row["receiver"], row["kind"], int(float(row["bytes"])))


def infer(
    messages: Sequence[Message], speeds: Speeds | None = None, parameters: int | None = None
) -> list[str]:
    """What sizes and times give away, in sentences.

    Args:
        speeds: None for an observer who knows nothing of the devices.
        parameters: numbers of the model, whose architecture is usually public; None to take the size of downloads
            for the model's, which is too small where these are sparse too.

    The computing time of a client is taken to be that from the end of a download to the beginning of its next
    upload, each of the kind that is largest in its direction; where messages cross (delayed training) it is less.
    """
    down = _largest_kind(m for m in messages if m.sender == SERVER)
    up = _largest_kind(m for m in messages if m.receiver == SERVER)
    if not down or not up:
        return _among_peers([m for m in messages if SERVER not in (m.sender, m.receiver)])
    return [
        *_participation(up),
        *_sizes(median(m.size for m in down) if parameters is None else 4 * parameters, up),
        *_computing(down, up, speeds),
    ]


def _largest_kind(messages: Iterable[Message]) -> list[Message]:
    kinds: dict[str, list[Message]] = defaultdict(list)
    for message in messages:
        kinds[message.kind].append(message)
    return max(kinds.values(), key=lambda group: max(m.size for m in group), default=[])


def _among_peers(messages: Sequence[Message]) -> list[str]:
    if not messages:
        return []
    workers = {m.sender for m in messages} | {m.receiver for m in messages}
    times = sorted({m.sent for m in messages})
    pace = [after - before for before, after in pairwise(times)]
    said = f"{len(workers)} workers exchange {median(m.size for m in messages):,.0f} bytes each at a time"
    return [said + (f", every {median(pace):.3g} s." if pace else ".")]


def _participation(up: Sequence[Message]) -> list[str]:
    counts = Counter(m.sender for m in up)
    least, most = min(counts.values()), max(counts.values())
    each = plural(most, "upload") if least == most else f"{least} to {plural(most, 'upload')}"
    return [f"{plural(len(counts), 'client')} took part, with {each} each."]


def _sizes(model: float, up: Sequence[Message]) -> list[str]:
    """Of uploads, beside the `model` bytes of all its numbers."""
    share = median(m.size for m in up) / model if model else 1.0
    if share >= SPARSE:
        return [f"Uploads are {share:.2f} times as large as the model: dense, so their size tells nothing."]
    kept = share * 4 / BYTES_A_VALUE
    return [
        f"Uploads are {share:.2%} of the model's size: about {kept:.2%} of its numbers at {BYTES_A_VALUE} bytes each."
    ]


def _computing(down: Sequence[Message], up: Sequence[Message], speeds: Speeds | None) -> list[str]:
    """How long clients computed, and how many steps that is."""
    seconds = {client: median(found) for client, found in _gaps(down, up).items()}
    if not seconds:
        return []
    least, most = min(seconds.values()), max(seconds.values())
    spread = (most - least) / most if most > 0 else 0.0
    apart = "From the end of a download to the next upload"
    if spread < TELLING:
        said = [f"{apart} {most:.3g} s pass with every client: nothing tells them apart."]
    else:
        slowest = max(seconds, key=lambda client: seconds[client])
        said = [
            f"{apart} {least:.3g} to {most:.3g} s pass (longest: {slowest}): computing, unless it overlaps with"
            " messages, which tells apart who has more data or a slower device."
        ]
    if speeds is None or speeds.step_seconds <= 0:
        return said
    few, many = (round(value / speeds.step_seconds) for value in (least, most))
    steps = plural(many, "local step") if few == many else f"{few} to {plural(many, 'local step')}"
    certainty = "" if speeds.alike else ", if all devices were as fast as the median one, which they are not"
    return [
        *said,
        f"At {speeds.step_seconds:g} s a step that is {steps} a client{certainty}.",
    ]


def _gaps(down: Sequence[Message], up: Sequence[Message]) -> dict[str, list[float]]:
    """Client -> seconds from each download's end to the next upload's beginning."""
    gaps: dict[str, list[float]] = defaultdict(list)
    arrived: dict[str, float] = {}
    events = [(m.received, 0, m.receiver) for m in down] + [(m.sent, 1, m.sender) for m in up]
    for time, is_upload, client in sorted(events):
        if not is_upload:
            arrived[client] = time
        elif client in arrived:
            gaps[client].append(time - arrived.pop(client))
    return dict(gaps)
