"""What a message gives away besides the update: metrics, settings, seeds, counts, and whether it is masked."""

from __future__ import annotations

from leakaudit.findings import Notes
from leakaudit.formats.manifest import Carried, Manifest
from leakaudit.formats.masked import Masked
from leakaudit.formats.phrases import counted, limit, listing
from leakaudit.integrations.advisories import notices
from leakaudit.results import Finding

AGGREGATE = "aggregate"
"""The sender of what a server made of many updates."""


def message_findings(manifest: Manifest, hidden: Masked | None = None) -> list[Finding]:
    """Findings on what the message carries; none where the file says nothing of a message.

    Args:
        hidden: how the tensors are masked, where they are.
    """
    notes = Notes()
    if hidden is not None:
        _mask(manifest, hidden, notes)
    message = manifest.message
    if message is None:
        return notes.findings
    _origin(message, notes)
    _count(manifest, message, hidden, notes)
    _metrics(message, notes)
    _seeds(message, notes)
    if message.records:
        notes.hint(
            "other records",
            f"The message carries {counted(len(message.records), 'more group')} of arrays besides the model"
            f" ({listing(message.records)}), which are not in this file: inspect them on their own.",
            names=list(message.records),
        )
    return notes.findings


def _mask(manifest: Manifest, hidden: Masked, notes: Notes) -> None:
    """Masked tensors, how uniform they are, and what is publicly known of the software that masked them."""
    data = {"modulus": hidden.modulus, "numbers": hidden.numbers, "p_value": hidden.p_value}
    how = "states that its numbers are" if hidden.stated else "holds what looks like"
    if hidden.uniform:
        notes.info(
            "masked",
            f"The file {how} integers modulo {hidden.modulus:,}, and its {hidden.numbers:,} numbers are uniform"
            f" (p = {hidden.p_value:.2g}): masked; nothing to reconstruct from this message alone. The server"
            " learns the sum over the clients that stay to the end: audit that.",
            **data,
        )
    else:
        notes.warning(
            "masked",
            f"The file {how} integers modulo {hidden.modulus:,}, but its {hidden.numbers:,} numbers are not"
            f" uniform (p = {hidden.p_value:.2g}): a mask is missing, or is worn too thin to hide them.",
            **data,
        )
    software = None if manifest.message is None else manifest.message.software
    for notice in notices(software, "secagg+"):
        notes.warning(
            "advisory",
            notice.text,
            package=notice.advisory.package,
            version=notice.version,
            confirmed=notice.confirmed,
            references=list(notice.advisory.references),
        )


def _origin(message: Carried, notes: Notes) -> None:
    sender = (
        "what the server made of the round" if message.sender == AGGREGATE else f"client {message.sender}"
    )
    number = "" if message.round is None else f" in round {message.round}"
    notes.info(
        "message",
        f"Recorded from {message.software or 'a framework'}: {sender}{number}.",
        sender=message.sender,
        round=message.round,
    )


def _count(manifest: Manifest, message: Carried, hidden: Masked | None, notes: Notes) -> None:
    count = manifest.num_examples
    if count is None or message.sender == AGGREGATE:
        return
    if hidden is None:
        text = f"The message states that {counted(count, 'example')} stand behind it."
        notes.info("number of examples", text, examples=count)
        return
    notes.hint(
        "number of examples",
        f"The tensors are masked, but the message states in clear that the client holds {counted(count, 'example')}:"
        " how much data each client has, and over the rounds how it grows, stays visible.",
        examples=count,
    )


def _metrics(message: Carried, notes: Notes) -> None:
    if not message.metrics or message.sender == AGGREGATE:
        return
    listed = [limit(f"{name}={value}") for name, value in message.metrics.items()]
    notes.hint(
        "metrics in clear",
        f"The message carries, in clear, what the client measured on its own data: {listing(listed, most=8)}."
        " A loss or an accuracy of one client tells of its private examples (how hard, how many of them are"
        " right), and no noise or mask on the update touches it.",
        metrics=message.metrics,
    )


def _seeds(message: Carried, notes: Notes) -> None:
    settings = {**message.config, **message.metrics}
    seeds = {name: value for name, value in settings.items() if "seed" in name.lower()}
    if seeds:
        listed = listing([limit(f"{name}={value}") for name, value in seeds.items()])
        notes.hint(
            "seed in clear",
            f"The settings that travel with the update hold a seed ({listed}): whoever knows it can repeat the"
            " client's shuffling, augmentation and dropout, and noise drawn from it is no noise at all.",
            seeds=seeds,
        )
