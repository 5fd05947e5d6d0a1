"""What the pass or fail of many cells, or views, looks like on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

STATE_STYLES = {
    "leaks": "red",
    "not-recovered": "blue",
    "inconclusive": "yellow",
    "failed": "yellow",
    "interrupted": "yellow",
    "pending": "dim",
    "no-update": "dim",
}
STATE_MARKS = {
    "leaks": "!",
    "not-recovered": "-",
    "inconclusive": "?",
    "failed": "x",
    "interrupted": "?",
    "pending": ".",
    "no-update": " ",
}
EXIT_STYLES = {0: "blue", 1: "red", 3: "yellow"}
EXIT_WORDS = {0: "- WITHIN THE POLICY", 1: "! LEAKS", 3: "? INCONCLUSIVE"}


def gate_panel(lines: Sequence[RenderableType], code: int, *, unrecovered: bool) -> Panel:
    """The lines in the colour of the exit code 0, 1 or 3, with the caveat that not recovered is not safe."""
    caveat = [Text("What was not recovered by these attacks is not thereby safe.", style="dim")]
    style = EXIT_STYLES[code]
    title = Text(EXIT_WORDS[code], style=f"bold {style}")
    content = Group(*lines, *(caveat if unrecovered else []))
    return Panel(content, title=title, title_align="left", border_style=style, padding=(0, 1))
