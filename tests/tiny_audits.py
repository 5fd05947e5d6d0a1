"""Small real models, one private batch, and the command line in process, for the tests of whole audits."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leakaudit.attacks.compiling import Compiler, Function
from leakaudit.models.spaces import Pixels
from leakaudit.models.victim import Mode, Victim
from leakaudit.results import AuditResult
from leakaudit.rounds import Round, client_update
from leakaudit.threat import UNKNOWN, Knowledge, View, known

SHAPE = (3, 8, 8)
CLASSES = 5
SPACE = Pixels(SHAPE, (0.5,) * 3, (0.25,) * 3)

FACTORIES = '''
from torch import nn


def smooth(num_classes=5, input_shape=(3, 8, 8)):
    channels, height, width = input_shape
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3, padding=1), nn.Sigmoid(),
        nn.Conv2d(6, 6, 3, stride=2, padding=1), nn.Sigmoid(),
        nn.Flatten(), nn.Linear(6 * (height // 2) * (width // 2), num_classes),
    )


def mlp(num_classes=5, input_shape=(3, 8, 8)):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 24), nn.Sigmoid(), nn.Linear(24, num_classes))


def norm(num_classes=5, input_shape=(3, 8, 8)):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.GELU(),
        nn.Flatten(), nn.Linear(128, num_classes),
    )


def narrow(num_classes=5, input_shape=(3, 8, 8)):
    """Too few equations to find the image: 3 features in all."""
    return nn.Sequential(
        nn.Conv2d(3, 3, 8, bias=False), nn.Sigmoid(), nn.Flatten(), nn.Linear(3, num_classes)
    )
'''


def build(name: str) -> nn.Sequential:
    """A factory of `FACTORIES`, always with the same parameters."""
    namespace: dict[str, Any] = {}
    exec(FACTORIES, namespace)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return namespace[name]()


def victim_of(name: str, mode: Mode = "eval") -> Victim:
    return Victim.of(build(name), SPACE, CLASSES, mode, name=name)


def private_batch(count: int = 1, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Smooth pictures as model inputs, (count, 3, 8, 8), and labels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 3, 3, generator=generator)
    pixels = nn.functional.interpolate(coarse, size=SHAPE[1:], mode="bilinear", align_corners=True)
    return SPACE.encode(pixels), torch.arange(1, count + 1) % CLASSES


def view_of(victim: Victim, round: Round | None = None, **facts: Any) -> View:
    """What a server sees of `private_batch`; all is known but labels and statistics; `facts` override."""
    round = round or Round(1)
    x, y = private_batch(round.num_examples)
    observed = client_update(victim, victim.params, round, x, y).detach()
    knowledge: dict[str, Any] = {
        "batch_size": known(round.num_examples, "test"),
        "local_steps": known(round.local_steps, "test"),
        "learning_rate": known(round.learning_rate, "test"),
        "mode": known(victim.mode, "test"),
        "normalisation": known((SPACE.mean, SPACE.std), "test"),
        "scale": known(True, "test"),
    }
    return View(victim, round, observed, Knowledge(**{**knowledge, **facts}))


UNSAID = UNKNOWN


# ------------------------------------------------------------------ the command line, in this process


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


Runner = Callable[..., Ran]


def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> Runner:
    """`run("attack", ...)` as a user in `folder` would; other exceptions than SystemExit pass through."""
    from leakaudit import cli

    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["leakaudit", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        code = ended.value.code
        return Ran(code if isinstance(code, int) else int(code is not None), captured.out, captured.err)

    return run


class Asked(Compiler):
    """Compiles nothing, and keeps for how many evaluations it was asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.evaluations: list[int] = []

    def prepare(
        self,
        function: Function,
        arguments: Sequence[Tensor],
        evaluations: int,
        seconds_left: float | None = None,
        compared: int | None = None,
    ) -> Function:
        self.evaluations.append(evaluations)
        return function


TIMES = ("created", "seconds", "compiling", "command")


def timeless(result: AuditResult) -> dict[str, Any]:
    """The result without what two runs of the same audit may differ in: times, and the command."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key not in TIMES}
        if isinstance(value, list):
            return [strip(item) for item in value]
        return value

    return strip(result.model_dump(mode="json"))


def words(text: str) -> str:
    """The text without colours, boxes and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text).split())
