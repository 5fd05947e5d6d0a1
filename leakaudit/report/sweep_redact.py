"""Taking the private examples out of a sweep's result, so that its page can be handed on."""

from __future__ import annotations

from leakaudit.report.redact import unmarked, without_labels
from leakaudit.sweep_results import Cell, Example, Run, SweepResult


def redact_sweep(result: SweepResult) -> SweepResult:
    """The result without original pictures and sentences, marks on tokens and labels.

    Reconstructions and scores stay: they are what leaked.  Labels go on both sides, for in a sweep
    the adversary may have been given the true ones.
    """
    return result.model_copy(
        update={
            "redacted": True,
            "cells": [_without_truth(cell) for cell in result.cells],
            "command": without_labels(result.command),
        }
    )


def _without_truth(cell: Cell) -> Cell:
    return cell.model_copy(update={"runs": [_blind_run(run) for run in cell.runs]})


def _blind_run(run: Run) -> Run:
    return run.model_copy(update={"examples": [blind_example(example) for example in run.examples]})


def blind_example(example: Example) -> Example:
    """The example without the original, its label and the marks that tell of it."""
    hidden: dict[str, object] = dict.fromkeys(
        ("original", "original_tokens", "true_label", "recovered_label")
    )
    if example.recovered_tokens is not None:
        hidden["recovered_tokens"] = unmarked(example.recovered_tokens)
    return example.model_copy(update=hidden)
