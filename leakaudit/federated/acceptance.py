"""What a server takes into a sum: every update of a client goes through `accept` first."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from leakaudit.formats.phrases import listing, quoted


class RefusedUpdate(ValueError):
    """What a client sent is no update of this model; the message says why."""


def accept(update: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """`RefusedUpdate` unless `update` has the names and shapes of `like` and every number of it is finite.

    Args:
        update: as a client sent it.
        like: the parameters of the model, or another update of it.
    """
    if update.keys() != like.keys():
        raise RefusedUpdate(f"names differ in {listing(sorted(map(quoted, update.keys() ^ like.keys())))}")
    for name, tensor in update.items():
        if tensor.shape != like[name].shape:
            raise RefusedUpdate(
                f"{name} has shape {tuple(tensor.shape)}, the model has {tuple(like[name].shape)}"
            )
        if not tensor.isfinite().all():
            raise RefusedUpdate(f"{name} is not finite")
