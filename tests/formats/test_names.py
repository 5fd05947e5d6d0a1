from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from leakaudit.formats.names import PREFIXES, strip_prefix, strip_prefixes

NAMES = st.text(alphabet="abc.", min_size=1, max_size=8).filter(
    lambda n: not n.startswith(".") and not n.endswith(".")
)


@given(NAMES, st.lists(st.sampled_from(PREFIXES), max_size=4))
def test_stacked_prefixes_are_removed(name: str, prefixes: list[str]) -> None:
    assert strip_prefix("".join(prefixes) + name) == name


def test_compiled_submodules_lose_their_prefix_too() -> None:
    assert strip_prefix("backbone._orig_mod.conv.weight") == "backbone.conv.weight"


def test_a_module_called_module_inside_stays() -> None:
    assert strip_prefix("features.module.0.weight") == "features.module.0.weight"


def test_names_that_would_collide_are_left_alone() -> None:
    assert strip_prefixes(["module.w", "w"]) == {"module.w": "module.w", "w": "w"}


def test_a_name_that_is_only_a_prefix_is_left_alone() -> None:
    assert strip_prefixes(["module.", "b"]) == {"module.": "module.", "b": "b"}


@given(st.lists(NAMES, unique=True))
def test_names_stay_distinct_and_in_order(names: list[str]) -> None:
    stripped = strip_prefixes(names)
    assert list(stripped) == names
    assert len(set(stripped.values())) == len(names)
