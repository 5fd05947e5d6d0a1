"""What installed packages add to ours, by entry point; found and imported only when it is asked for.

    [project.entry-points."leakaudit.defenses"]       # or leakaudit.attacks, leakaudit.models
    my-defense = "my_package.module:MyDefense"

A package that cannot be loaded costs its own names and nothing else: one line when one of them is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from leakaudit.errors import InputError

T = TypeVar("T")


class Registry(MutableMapping[str, T]):
    """Our own presets by name, then those of installed packages; a name of ours is never replaced.

    Args:
        group: of the entry points.
        kind: what one is called in messages.
        check: (name, what was loaded) -> the preset; raises `ValueError` saying what is accepted.
        built_in: our own.

    Looking one up raises `KeyError` for an unknown name, and `InputError` where its package cannot be loaded.
    """

    def __init__(
        self, group: str, kind: str, check: Callable[[str, object], T], built_in: Mapping[str, T]
    ) -> None:
        self._group, self._kind, self._check = group, kind, check
        self._own = dict(built_in)
        self._loaded: dict[EntryPoint, T] = {}

    def __getitem__(self, name: str) -> T:
        if name in self._own:
            return self._own[name]
        entry = self._plugins()[name]
        if entry not in self._loaded:
            self._loaded[entry] = self._load(entry)
        return self._loaded[entry]

    def __setitem__(self, name: str, preset: T) -> None:
        self._own[name] = preset

    def __delitem__(self, name: str) -> None:
        del self._own[name]

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self._plugins()

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from (name for name in self._plugins() if name not in self._own)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def usable(self) -> tuple[dict[str, T], list[str]]:
        """Every preset that can be loaded, and a line for each of the others."""
        found: dict[str, T] = {}
        broken = [
            f"{self._kind} {name!r} of {_origin(entry)} is not used: the name is ours"
            for name, entry in self._plugins().items()
            if name in self._own
        ]
        for name in self:
            try:
                found[name] = self[name]
            except InputError as error:
                broken.append(str(error))
        return found, broken

    def _plugins(self) -> dict[str, EntryPoint]:
        try:
            return {entry.name: entry for entry in entry_points(group=self._group)}
        except Exception:  # another package's broken metadata is not our user's mistake
            return {}

    def _load(self, entry: EntryPoint) -> T:
        owner = f"{self._kind} {entry.name!r} of {_origin(entry)}"
        try:
            loaded = entry.load()
        except Exception as error:  # their code may raise anything
            raise InputError(f"{owner} cannot be loaded: {_reason(error)}") from error
        try:
            return self._check(entry.name, loaded)
        except Exception as error:
            raise InputError(f"{owner} cannot be used: {_reason(error)}") from error


def instance(loaded: object) -> object:
    """An instance: a class is called without arguments."""
    return loaded() if isinstance(loaded, type) else loaded


def _origin(entry: EntryPoint) -> str:
    return entry.value if entry.dist is None else f"{entry.dist.name} ({entry.value})"


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if type(error) is ValueError else f"{type(error).__name__}: {text}"
