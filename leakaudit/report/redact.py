"""Taking the private examples out of a result, so that a report can be handed on."""

from __future__ import annotations

import re

from leakaudit.results import AuditResult, ExampleScores, Frame, KnowledgeRow, Token, Trial

WITHHELD = "withheld"


def redact(result: AuditResult) -> AuditResult:
    """The result without original pictures and sentences, difference pictures and true labels.

    A difference picture and the reconstruction together give the original back, so it
    goes too; so do marks on right tokens, which tell which of the recovered words are the
    original's, and labels the adversary was given, for those are the true ones.
    Reconstructions, scores and labels the attack inferred stay: they are what leaked.
    """
    given = any(row.name == "labels" and row.status == "known" for row in result.knowledge)
    return result.model_copy(
        update={
            "redacted": True,
            "knowledge": [_without_given_labels(row) for row in result.knowledge],
            "trials": [_without_truth(trial, given) for trial in result.trials],
            "command": without_labels(result.command),
        }
    )


def without_labels(command: str) -> str:
    """The command line without the labels that it states."""
    return re.sub(r"(--labels?)([ =]+)\S+", rf"\1\2{WITHHELD}", command)


def _without_given_labels(row: KnowledgeRow) -> KnowledgeRow:
    given = row.name == "labels" and row.status == "known"
    return row.model_copy(update={"text": WITHHELD}) if given else row


def _without_truth(trial: Trial, labels_given: bool) -> Trial:
    return trial.model_copy(
        update={
            "examples": [_blind(example, labels_given) for example in trial.examples],
            "strip": [_unmarked_frame(frame) for frame in trial.strip],
        }
    )


def _unmarked_frame(frame: Frame) -> Frame:
    return frame.model_copy(update={"sentences": [unmarked(tokens) for tokens in frame.sentences]})


def unmarked(tokens: list[Token]) -> list[Token]:
    """Without the marks that tell which of the tokens are the original's."""
    return [token.model_copy(update={"right": None}) for token in tokens]


def _blind(example: ExampleScores, labels_given: bool) -> ExampleScores:
    hidden: dict[str, object] = dict.fromkeys(("original", "original_tokens", "difference", "true_label"))
    if labels_given:
        hidden["recovered_label"] = None
    if example.recovered_tokens is not None:
        hidden["recovered_tokens"] = unmarked(example.recovered_tokens)
    return example.model_copy(update=hidden)
