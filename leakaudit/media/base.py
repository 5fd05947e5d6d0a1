"""`Medium`: the one seam between the audit and what the private examples are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from leakaudit.attacks.base import OnStep, Reconstruction
from leakaudit.formats.manifest import Manifest
from leakaudit.hypotheses import Sweep
from leakaudit.inspection import Inspection
from leakaudit.illustration import Yardstick
from leakaudit.metrics import BatchScores
from leakaudit.models.victim import Victim
from leakaudit.results import ExampleScores, Finding, Frame, Score, Verification
from leakaudit.threat import View
from leakaudit.update import Update
