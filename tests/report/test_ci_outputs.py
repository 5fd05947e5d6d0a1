"""What is written for CI: JUnit XML, SARIF and Markdown."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import jsonschema
import pytest
import xmlschema
from hypothesis import given
from hypothesis import strategies as st
from sweep_samples import LEAKING, POLICY, SAFE, TODAY, sample_cell, sample_cells, sample_run, sample_sweep

from leakaudit import __version__
from leakaudit.errors import InputError
from leakaudit.gate import Baseline, standing, write_baseline
from leakaudit.report.junit import junit_xml
from leakaudit.report.sarif import sarif
from leakaudit.report.summary import LIMIT, NOTE, append_summary, code, markdown, shorten, text_of
from leakaudit.sweep_results import Acceptance, Cell, SweepResult

SCHEMAS = Path(__file__).parents[1] / "data"
SARIF_SCHEMA = json.loads((SCHEMAS / "sarif-2.1.0-rtm.5.json").read_text())
SARIF_VALIDATOR = jsonschema.Draft4Validator(SARIF_SCHEMA)
JUNIT_SCHEMA = xmlschema.XMLSchema(SCHEMAS / "junit-10.xsd")
EVIL = "a<b>&\"'|`*_[x](y)\\ @team \x1b[31m\x00\ud800\uffff]]>\nnext <script>alert(1)</script>"
END = (TODAY + timedelta(days=30)).isoformat()


def accepting(*cells: Cell, reason: str = "pilot", owner: str = "ada") -> Baseline:
    scores = {"ssim>0.5": 0.93, "psnr>20": 31.0}
    entries = [
        Acceptance(cell=cell.name, owner=owner, expires=END, reason=reason, scores=scores) for cell in cells
    ]
    return Baseline(created="", policy=POLICY, entries=entries)


@pytest.fixture(scope="module")
def sweep() -> SweepResult:
    """Eight cells: the first accepted, one broken, two inconclusive, the others within the policy."""
    cells = sample_cells()
    return sample_sweep(cells, baseline=accepting(cells[0]))


def nasty() -> SweepResult:
    cells = [
        sample_cell(EVIL, LEAKING),
        sample_cell(EVIL, LEAKING, attack=EVIL),
        sample_cell(EVIL, SAFE, protocol=EVIL, control=None),
    ]
    baseline = accepting(cells[0], reason=EVIL, owner=EVIL)
    return sample_sweep(cells, baseline=baseline, title=EVIL, command=EVIL, model=EVIL, files={})


# ------------------------------------------------------------------ JUnit


def cases(text: str) -> dict[str, ET.Element]:
    return {case.get("name", ""): case for case in ET.fromstring(text.encode()).iter("testcase")}


def test_junit_has_one_suite_a_protocol_and_one_case_a_cell(sweep: SweepResult) -> None:
    text = junit_xml(sweep)
    JUNIT_SCHEMA.validate(text)
    root = ET.fromstring(text.encode())
    assert [suite.get("name") for suite in root] == ["fedsgd", "fedavg:steps=5,learning_rate=0.1"]
    assert list(cases(text)) == [cell.name for cell in sweep.cells]
    counts = ("tests", "failures", "errors", "skipped")
    assert [[suite.get(name) for name in counts] for suite in root] == [
        ["5", "1", "0", "1"],
        ["3", "0", "2", "0"],
    ]
    assert [root.get(name) for name in counts[:3]] == ["8", "1", "2"]
    properties = {item.get("name"): item.get("value") for item in root[0].iter("property")}
    assert properties["policy"] == POLICY
    assert properties["command"] == sweep.command


def test_junit_says_how_each_cell_came_out(sweep: SweepResult) -> None:
    found = cases(junit_xml(sweep))
    elements = {"broken": "failure", "accepted": "skipped", "inconclusive": "error", "passed": None}
    for cell in sweep.cells:
        case = found[cell.name]
        outcomes = [child.tag for child in case if child.tag != "system-out"]
        assert outcomes == [name for name in [elements[standing(cell, sweep.gate)]] if name]
        assert case.get("time") == f"{1.5 * len(cell.runs):.3f}"
        assert "." not in (case.get("classname") or "").removeprefix("leakaudit.")
        for reason in cell.reasons:
            assert reason in (case.findtext("system-out") or "")
    broken = found[sweep.gate.broken[0]]
    assert broken.find("failure") is not None
    assert broken.findtext("failure") == (
        "Leaks: 4 of 4 examples cross ssim>0.5 (worst ssim 0.61).\n"
        "4 of 4 examples cross ssim>0.5 (worst ssim 0.61)."
    )
    assert (broken.findtext("system-out") or "").startswith(
        "verdict: leaks\nssim>0.5 worst: 0.61\npsnr>20 worst: 19\nruns done: 2 of 2\n"
    )
    accepted = found[sweep.gate.accepted[0].cell].find("skipped")
    assert accepted is not None
    assert accepted.get("message") == f"Leaks; accepted by ada until {END}: pilot"
    assert any("out of memory" in (case.findtext("error") or "") for case in found.values())


def test_junit_never_shows_leakage_as_a_pass() -> None:
    sweep = sample_sweep([sample_cell("none", LEAKING)], policy="never")
    (case,) = cases(junit_xml(sweep)).values()
    skipped = case.find("skipped")
    assert skipped is not None
    assert "Leaks, but the policy is never" in (skipped.get("message") or "")


def test_rows_that_the_gate_does_not_count_are_shown_and_fail_nothing(tmp_path: Path) -> None:
    control = [sample_cell("none", LEAKING), sample_cell("none", control=None, attack="ig")]
    counted = [sample_cell("sign")]
    only_counted = sample_sweep(counted).gate
    sweep = sample_sweep([*control, *counted], gate=only_counted)
    assert sweep.exit_code == 0
    elements = [[child.tag for child in case] for case in cases(junit_xml(sweep)).values()]
    assert elements == [["skipped", "system-out"], ["skipped", "system-out"], ["system-out"]]
    assert "Leaks, but the gate does not count this cell" in junit_xml(sweep)
    assert results(sarif(sweep)) == []
    text = markdown(sweep)
    assert text.startswith("## Defense sweep: Within the policy\n")
    assert "| leaks (not counted), ssim 0.93, psnr 31 |" in text
    assert "| inconclusive (not counted), ssim 0.1, psnr 9 |" in text
    assert write_baseline(sweep, tmp_path / "b.json", "ada", END, today=TODAY).entries == []


def test_junit_names_what_the_baseline_no_longer_covers() -> None:
    cell = sample_cell("none", {"ssim": 0.99, "psnr": 21.0})
    baseline = accepting(cell)
    entry = baseline.entries[0].model_copy(update={"scores": {"ssim>0.5": 0.6, "psnr>20": 21.0}})
    sweep = sample_sweep([cell], baseline=baseline.model_copy(update={"entries": [entry]}))
    (case,) = cases(junit_xml(sweep)).values()
    assert "ssim 0.99 where 0.6 was accepted: worse by more than 0.1." in (case.findtext("failure") or "")


def test_junit_escapes_everything() -> None:
    text = junit_xml(nasty())
    JUNIT_SCHEMA.validate(text)
    root = ET.fromstring(text.encode())
    assert "<script>alert(1)</script>" not in text
    assert any("<script>alert(1)</script>" in (case.get("name") or "") for case in root.iter("testcase"))


@given(st.text(max_size=40))
def test_junit_is_well_formed_whatever_a_spec_holds(text: str) -> None:
    sweep = sample_sweep([sample_cell(text, LEAKING, protocol=text)], command=text)
    JUNIT_SCHEMA.validate(junit_xml(sweep))


@pytest.mark.parametrize("damage", ["element", "name", "count", "time"])
def test_the_junit_schema_refuses_a_broken_document(sweep: SweepResult, damage: str) -> None:
    root = ET.fromstring(junit_xml(sweep).encode())
    JUNIT_SCHEMA.validate(root)
    if damage == "element":
        root[0][1].tag = "case"
    elif damage == "time":
        root[0].set("time", "3 s")
    else:
        del root[0].attrib["name" if damage == "name" else "tests"]
    with pytest.raises(xmlschema.XMLSchemaException):
        JUNIT_SCHEMA.validate(root)


# ------------------------------------------------------------------ SARIF


def results(log: dict[str, Any]) -> list[dict[str, Any]]:
    return log["runs"][0]["results"]


def test_sarif_is_valid_and_complete(sweep: SweepResult) -> None:
    log = sarif(sweep)
    SARIF_VALIDATOR.validate(json.loads(json.dumps(log)))
    driver = log["runs"][0]["tool"]["driver"]
    assert (driver["name"], driver["version"]) == ("leakaudit", __version__)
    rules = [rule["id"] for rule in driver["rules"]]
    assert rules == ["leakage-ssim-above", "leakage-psnr-above", "leakage-proven", "inconclusive"]
    assert [(item["ruleId"], item["level"], "suppressions" in item) for item in results(log)] == [
        ("leakage-ssim-above", "error", True),
        ("leakage-psnr-above", "error", True),
        ("leakage-ssim-above", "error", False),
        ("inconclusive", "warning", False),
        ("inconclusive", "warning", False),
    ]
    for item in results(log):
        assert rules[item["ruleIndex"]] == item["ruleId"]
        place = item["locations"][0]["physicalLocation"]
        assert place == {"artifactLocation": {"uri": "audit.toml"}, "region": {"startLine": 1}}
    suppression = results(log)[0]["suppressions"][0]
    assert suppression["justification"] == f"Accepted by ada until {END}. pilot"
    assert results(log)[2]["message"]["text"] == (
        "Leaks: fedsgd | gaussian-noise:std=0.01 | dlg | adaptive. ssim 0.61 crosses ssim>0.5."
    )
    assert log["runs"][0]["invocations"] == [
        {"executionSuccessful": True, "exitCode": 1, "commandLine": sweep.command}
    ]


def test_sarif_fingerprints_outlive_scores_order_and_thresholds() -> None:
    def prints(result: SweepResult) -> dict[str, str]:
        return {item["message"]["text"].split(". ")[0] + item["ruleId"]:
                item["partialFingerprints"]["primaryLocationLineHash"] for item in results(sarif(result))}  # fmt: skip

    cells = [sample_cell("none", LEAKING), sample_cell("sign", LEAKING), sample_cell("top-k", control=None)]
    first = prints(sample_sweep(cells))
    moved = [sample_cell("none", {"ssim": 0.7, "psnr": 40.0}), *cells[1:]]
    assert prints(sample_sweep(moved[::-1], policy="ssim>0.4,psnr>19")) == first
    assert len(set(first.values())) == len(first) == 5


def test_sarif_points_at_the_file_it_is_given(sweep: SweepResult) -> None:
    def place(artifact: str) -> dict[str, Any]:
        return results(sarif(sweep, artifact))[0]["locations"][0]["physicalLocation"]

    assert place("ci/my audit.toml")["artifactLocation"]["uri"] == "ci/my%20audit.toml"
    assert place("m.pt") == {"artifactLocation": {"uri": "m.pt"}}
    assert place("/srv/m.pt")["artifactLocation"]["uri"] == "file:///srv/m.pt"


def test_sarif_of_a_proof_names_no_threshold() -> None:
    proof = sample_run(verdict="leaks", headline="The shared update determines the private images.")
    log = sarif(sample_sweep([sample_cell("none", runs=[proof])]))
    SARIF_VALIDATOR.validate(log)
    (item,) = results(log)
    assert item["ruleId"] == "leakage-proven"
    assert "determines the private images" in item["message"]["text"]


def test_sarif_notes_what_leaks_under_never() -> None:
    cells = [sample_cell("none", LEAKING), sample_cell("sign")]
    log = sarif(sample_sweep(cells, policy="never"))
    SARIF_VALIDATOR.validate(log)
    assert [item["level"] for item in results(log)] == ["note", "note"]


def test_sarif_has_one_result_a_rule_where_a_policy_asks_twice() -> None:
    policy = "ssim>0.5,ssim>0.6,ssim<0.99"
    log = sarif(sample_sweep([sample_cell("none", LEAKING, policy=policy)], policy=policy))
    assert [item["ruleId"] for item in results(log)] == ["leakage-ssim-above", "leakage-ssim-below"]


def test_sarif_of_strange_names_is_valid() -> None:
    log = sarif(nasty())
    SARIF_VALIDATOR.validate(json.loads(json.dumps(log)))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["version"], "2.0.0"),
        (["runs", 0, "tool", "driver", "name"], None),
        (["runs", 0, "results", 0, "level"], "fatal"),
        (["runs", 0, "results", 0, "message"], "text"),
        (["runs", 0, "results", 0, "suppressions", 0, "kind"], "outside"),
        (["runs", 0, "results", 0, "locations", 0, "physicalLocation", "region", "startLine"], 0),
        (["runs", 0, "results", 0, "colour"], "red"),
    ],
)
def test_the_sarif_schema_refuses_a_broken_document(
    sweep: SweepResult, path: list[Any], value: object
) -> None:
    log = json.loads(json.dumps(sarif(sweep)))
    item = log
    for key in path[:-1]:
        item = item[key]
    item[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        SARIF_VALIDATOR.validate(log)


# ------------------------------------------------------------------ Markdown


def test_the_summary_reads_from_verdict_to_table(sweep: SweepResult) -> None:
    lines = markdown(sweep).splitlines()
    assert lines[0] == "## Defense sweep: 1 cell above the policy"
    assert lines[2] == (
        "`synthetic-cnn`, 8 cells (1 broken, 1 accepted, 2 inconclusive, 4 passed), 4 private examples, 2 seeds."
        " Policy `ssim>0.5,psnr>20` over the worst case. Exit code 1."
    )
    assert sweep.command in lines
    headings = [line for line in lines if line.startswith("#")]
    assert headings[1:] == [
        "### Leakage above the policy",
        "### Inconclusive",
        "### Accepted",
        "### Cells",
    ]
    assert (
        "- `fedsgd \\| gaussian-noise:std=0.01 \\| dlg \\| adaptive`: 4 of 4 examples cross ssim\\>0.5"
        " (worst ssim 0.61)."
    ) in lines
    assert f"- `fedsgd \\| none \\| dlg \\| oblivious`: by ada until {END}, pilot" in lines
    table = lines[lines.index("### Cells") + 2 :]
    assert table[:3] == [
        "| Protocol | Defense | Attack | Oblivious | Adaptive | Accuracy | Epsilon | Theory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| `fedsgd` | `none` | `dlg` | leaks (accepted), ssim 0.93, psnr 31 | – | – | – | – |",
    ]
    assert table[3] == (
        "| `fedsgd` | `gaussian-noise:std=0.01` | `dlg` | not recovered, ssim 0.1, psnr 9"
        " | **LEAKS**, ssim 0.61, psnr 19 | 0.712 (0.690 to 0.734) | – | bayesian-cramer-rao 0.021 (indicator) |"
    )
    assert table[5].endswith("| – | 0.650 | 3.2 | reconstruction-robustness 0.12 (bound) |")
    assert len(table) == 2 + 6


def test_a_clean_sweep_says_so_and_an_inconclusive_one_does_not() -> None:
    clean = markdown(sample_sweep([sample_cell("sign")]))
    assert clean.startswith("## Defense sweep: Within the policy\n")
    doubtful = markdown(sample_sweep([sample_cell("sign", control=None)], interrupted=True))
    assert doubtful.startswith("## Defense sweep: 1 cell inconclusive: nothing is proven\n")
    assert "**Interrupted" in doubtful


def split_row(line: str) -> list[str]:
    """Cells of a table row as GFM splits them: at pipes that no backslash precedes."""
    cells, current, escaped = [], "", False
    for character in line.strip().removeprefix("|").removesuffix("|"):
        if character == "|" and not escaped:
            cells.append(current)
            current = ""
        else:
            current += character
        escaped = character == "\\" and not escaped
    return [*cells, current]


@given(st.text(max_size=30), st.text(max_size=30))
def test_no_name_breaks_a_row_or_starts_markup(defense: str, title: str) -> None:
    text = markdown(sample_sweep([sample_cell(defense, LEAKING)], title=title, command=""))
    lines = text.splitlines()
    assert sum(line.startswith("#") for line in lines) == 3
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == 3
    if "\\" not in defense:  # where a name ends in a backslash, GFM itself is ambiguous inside code
        assert {len(split_row(row)) for row in rows} == {8}


def test_markup_in_names_is_text() -> None:
    text = markdown(nasty())
    outside = re.sub(r"(?<!\\)`[^`]*`", "", re.sub(r"(?ms)^```+\n.*?^```+$", "", text))
    assert "<" in outside
    assert re.findall(r"(?<!\\)[<`]", outside) == []
    assert "\x1b" not in text
    assert "\x00" not in text
    assert text_of("a|b <i> [x](y) @team") == "a\\|b \\<i\\> \\[x\\](y) \\@team"
    assert code("a`b|c\nd") == "`a'b\\|c d`"


def test_a_summary_that_is_too_long_is_cut_at_a_row() -> None:
    cells = [sample_cell(f"gaussian-noise:std={index:06d}" + "0" * 400, LEAKING) for index in range(3000)]
    text = markdown(sample_sweep(cells))
    assert len(text.encode()) <= LIMIT
    assert text.endswith(NOTE)
    assert text.removesuffix(NOTE).splitlines()[-1].endswith("– |")
    assert "- and 2,950 more" in text


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=30)), st.integers(0, 400)
)
def test_shortening_keeps_whole_lines_within_the_limit(lines: list[str], limit: int) -> None:
    text = "".join(f"{line}\n" for line in lines)
    cut = shorten(text, limit)
    assert len(cut.encode()) <= limit
    if len(text.encode()) <= limit:
        assert cut == text
    elif cut:
        assert cut.endswith(NOTE)
        kept = cut.removesuffix(NOTE)
        assert text.startswith(kept)
        assert kept == "" or kept.endswith("\n")


def test_the_summary_is_appended_and_the_file_keeps_within_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "summary.md"
    append_summary(path, "one\n")
    append_summary(path, "two\n")
    assert path.read_text() == "one\n\ntwo\n"
    for _ in range(4):
        append_summary(path, "long line\n" * 40_000)
    assert path.stat().st_size <= LIMIT
    assert path.read_text().count(NOTE) == 1
    with pytest.raises(InputError, match="cannot write the summary"):
        append_summary(tmp_path / "none" / "summary.md", "x")
