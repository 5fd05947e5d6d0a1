"""Imports run one way: errors, spec, results <- update <- models, formats <- rounds <- threat <- attacks,
defenses <- audit <- sweep <- cli."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import leakaudit
from leakaudit.federated.options import SYSTEMS

PACKAGE = Path(leakaudit.__file__).parent

LAYERS = (
    (
        "errors",
        "atomic",
        "spec",
        "units",
        "results",
        "sweep_results",
        "leakage_results",
        "simulation_results",
        "inference_results",
        "scenario",
        "randomness",
        "numerics",
        "plugins",
    ),
    ("update",),
    ("models", "formats"),
    ("rounds",),
    ("threat",),
    ("attacks", "defenses"),
    ("auditing",),
    ("sweep",),
    ("cli",),
)
"""Lowest first; modules that are not listed belong to the layer of the audit."""

LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path, *, at_import_time: bool = False) -> set[str]:
    """Dotted names imported anywhere in a file, or only outside functions and TYPE_CHECKING blocks."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if at_import_time and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return
        if at_import_time and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def part(path: Path) -> str:
    """The first component under the package: `attacks/labels.py` -> `attacks`."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def own(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("leakaudit.")} - {"__version__"}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_imports_from_a_higher_layer(path: Path) -> None:
    if part(path) in ("__init__", "__main__"):  # the public list, which imports on first use; the entry
        return
    middle = LEVELS["auditing"]
    level = LEVELS.get(part(path), middle)
    higher = {
        name for name in own(imports(path, at_import_time=True)) if LEVELS.get(name, middle) > level
    } - {part(path)}
    assert not higher, f"{part(path)} imports {higher}"


def test_the_layers_name_real_modules() -> None:
    there = {part(path) for path in modules()}
    assert set(LEVELS) <= there
    assert {"execution", "capture", "inspection", "report", "api", "metrics", "text_metrics", "gate"} <= there


def of(*names: str) -> list[Path]:
    found = [path for path in modules() if part(path) in names]
    assert found
    return found


def test_attacks_never_see_data_metrics_defenses_or_results() -> None:
    for path in of("attacks", "threat", "rounds"):
        assert not own(imports(path)) & {"data", "metrics", "text_metrics", "defenses", "results"}, path


def test_defenses_never_see_attacks() -> None:
    for path in of("defenses"):
        assert not own(imports(path)) & {"attacks", "data", "metrics", "text_metrics", "results"}, path


def test_reports_never_import_torch() -> None:
    heavy = {"torch", "torchvision", "torchmetrics", "lpips", "transformers"}
    below = {
        "report",
        "results",
        "sweep_results",
        "leakage_results",
        "simulation_results",
        "inference_results",
        "errors",
        "atomic",
        "spec",
        "policy",
        "gate",
    }
    for path in of(*below, "judgement"):
        assert not {name.split(".")[0] for name in imports(path)} & heavy, path
        assert own(imports(path)) <= below, path


def test_nothing_imports_the_command_line() -> None:
    for path in modules():
        if part(path) not in ("cli", "__main__"):
            assert "cli" not in own(imports(path)), path


def test_truth_enters_where_it_may() -> None:
    """The metrics, which hold the truth against a reconstruction, are called after the attacks only."""
    scores = {"metrics", "text_metrics"}
    users = {part(path) for path in modules() if scores & own(imports(path))}
    assert users <= {"auditing", "media", "api", "listing", *scores}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["attack", "--help"],
        ["--version"],
        ["simulate", "--help"],
        ["simulate", "compare", "--help"],
        ["simulate", "leakage", "--help"],
        ["infer", "--help"],
        *(["simulate", name, "--help"] for name in SYSTEMS),
    ],
    ids=" ".join,
)
def test_help_loads_no_torch(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from leakaudit.cli import main\n"
        f"sys.argv = ['leakaudit', *{arguments!r}]\n"
        "try:\n    main()\n"
        "except SystemExit as ended:\n    assert not ended.code, ended.code\n"
        "heavy = {'torch', 'torchvision', 'transformers', 'scipy', 'lpips'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "leakaudit" in done.stdout
