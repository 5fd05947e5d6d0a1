"""The index of what was recorded in a run: views/index.json.  No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from leakaudit.errors import InputError
from leakaudit.formats.run_models import VIEWS
from leakaudit.results import Value, parse_versioned

INDEX_NAME = f"{VIEWS}/index.json"
INDEX_SCHEMA_VERSION = 1

RecordedFile = Annotated[str, Field(pattern=r"^(views|models|truth)/[A-Za-z0-9][A-Za-z0-9_-]*\.safetensors$")]
"""A path relative to the run folder, which it cannot leave."""


class ViewMember(Value):
    """One client's part in a view.

    Attributes:
        examples, local_steps: of its round.
        weight: of its pseudo-gradient in the sum that is seen.
        staleness: server steps between its download and the use of its update.
    """

    client: int
    examples: int
    local_steps: int
    weight: float
    staleness: int = 0


class ViewRecord(Value):
    """One update that a party saw, and its files, relative to the run folder.

    Attributes:
        name: of its files, unique in the run.
        observer: which of the parties of this role; None for the server's own view.
        step, time: of the server, and seconds of the virtual clock.
        members: whose updates are in it; none where the party cannot tell.
        defenses: specs of what was done to it.
        exact: False where the update holds more than its members' rounds.
        note: how the party came by it.
        update: None where the numbers were not finite.
        model: the model the clients started from, as this party knows it.
        truth: the private examples; None where the run had only tensors.
    """

    name: str
    role: Literal["server", "peer", "network", "enclave-host"]
    observer: int | None = None
    step: int
    time: float
    members: list[ViewMember]
    defenses: list[str] = Field(default_factory=list)
    exact: bool = True
    note: str = ""
    update: RecordedFile | None = None
    model: RecordedFile | None = None
    truth: RecordedFile | None = None

    @property
    def clients(self) -> int:
        return len(self.members)

    @property
    def examples(self) -> int:
        """Private examples of all members together."""
        return sum(member.examples for member in self.members)

    @property
    def staleness(self) -> int:
        """Of the member whose model was oldest."""
        return max((member.staleness for member in self.members), default=0)


class ViewIndex(Value):
    """Everything recorded in a run.  `model` is its spec, `system` the name of the training system."""

    schema_version: Literal[1] = 1
    system: str | None = None
    model: str
    views: list[ViewRecord] = Field(default_factory=list)


def read_index(folder: Path) -> ViewIndex:
    """The index of a run folder; `InputError` where there is none, or it is not one."""
    path = folder / INDEX_NAME
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{folder} holds no recorded views: cannot read {INDEX_NAME}: {error.strerror}; accepted: a folder"
            " written by leakaudit simulate, without --record none"
        ) from error
    return parse_versioned(
        text, ViewIndex, INDEX_SCHEMA_VERSION, path, called=str(path), noun="an index of views"
    )
