"""Distributed training across the world: delayed update, temporally sparse update, Deep Gradient Compression.

Every worker takes T local steps and adds up their gradients, S_j.  What it sends is made by algorithm 4 of
Lin et al. 2018, with momentum m (`leakaudit.defenses.pruning.DeepGradientCompression`):

    u_j = m u_j + clip(S_j, thr / sqrt(N)),   v_j = v_j + u_j,   sent_j = the largest numbers of v_j,

and u_j and v_j are zeroed where they were sent.  d steps after the end of the block,

    w_j = w_j - eta (mean_j sent_j - S_j),

so that all workers stand where the means have brought them, less their own steps since (Zhu, Lin, Lu, Lin and Han
2019, for what is sent of S_j).  With d = 0 and T = 1 this is Deep Gradient Compression, with nothing to drop FedAvg
(T) and delayed SGD (d).  With keep=1 all of u_j is sent and zeroed, so momentum has no effect.

Choices of ours, which the papers leave open: the clipping is of S_j; local steps are without momentum; the
threshold is that of the exact share of each tensor, not of a sample; what is not sent stays in v_j and leaves
the worker's model when the mean arrives.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from leakaudit.defenses.pruning import DeepGradientCompression
from leakaudit.federated.delayed import Plan, train
from leakaudit.federated.options import AcrossTheWorld
from leakaudit.federated.simulation import Simulation


def run(options: AcrossTheWorld, simulation: Simulation) -> Generator[Any, Any, None]:
    yield from train(plan(options, len(simulation.clients)), simulation)


def plan(options: AcrossTheWorld, workers: int) -> Plan:
    """What the workers do; nothing is compressed where nothing is dropped or clipped."""

    def compression(step: int) -> DeepGradientCompression:
        return DeepGradientCompression(options.keep_at(step), options.momentum, options.clip, workers)

    sparse = options.keep < 1
    return Plan(
        options.delay,
        options.batch_size,
        options.learning_rate,
        options.topology,
        options.period,
        compression=compression if sparse or options.clip is not None else None,
        sparse=sparse,
    )
