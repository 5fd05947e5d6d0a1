"""The HTML report: golden page, no remote references, escaping, redaction, odd results."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sample_audits import EVIL, GOLDEN, GOLDEN_TEXT, SAMPLES, hostile_audit, photo_audit

from leakaudit.errors import InputError
from leakaudit.report.charts import loss_chart
from leakaudit.report.folder import read_run, write_run
from leakaudit.report.html import render_html
from leakaudit.results import Attempt, AuditResult, Frame, KnowledgeRow, Trial

SECTIONS = ["verdict", "figures", "pictures", "strip", "verification", "knowledge", "controls", "curves"]
SECTIONS += ["attacks", "restarts", "findings", "setup", "environment", "repeat"]


class Page(HTMLParser):
    """Collects tags, attributes and text; complains about tags that do not nest."""

    VOID = frozenset({"meta", "link", "img", "br", "wbr", "rect", "line", "circle", "polyline", "path"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every sample written once, as a run folder."""
    root = tmp_path_factory.mktemp("runs")
    for name, make in SAMPLES.items():
        write_run(make(root / name), root / name)
    return {name: root / name for name in SAMPLES}


@pytest.mark.parametrize("golden", [GOLDEN, GOLDEN_TEXT], ids=lambda folder: folder.name)
def test_the_golden_report_is_unchanged(golden: Path) -> None:
    page = render_html(read_run(golden), golden)
    expected = (golden / "report.html").read_text(encoding="utf-8")
    assert page == expected, "regenerate with: python tests/report/sample_audits.py --golden, and look at it"


@pytest.mark.parametrize("name", SAMPLES)
def test_every_sample_is_well_formed_with_all_sections_in_order(folders: dict[str, Path], name: str) -> None:
    page = Page((folders[name] / "report.html").read_text(encoding="utf-8"))
    assert [attributes["id"] for attributes in page.named("section")] == SECTIONS
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    assert [tag for tag, _ in page.tags].count("h1") == 1
    anchors = [attributes["href"] or "" for attributes in page.named("a")]
    assert {anchor.removeprefix("#") for anchor in anchors} <= set(identities)


@pytest.mark.parametrize("name", SAMPLES)
def test_nothing_is_fetched_from_anywhere(folders: dict[str, Path], name: str) -> None:
    page = Page((folders[name] / "report.html").read_text(encoding="utf-8"))
    for tag, attributes in page.tags:
        for attribute in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            value = attributes.get(attribute)
            assert value is None or value.startswith(("data:", "#")), (tag, attribute, value)
        assert "style" not in attributes
        assert not any(attribute.startswith("on") for attribute in attributes), (tag, attributes)
    style = re.search(r"<style>(.*?)</style>", (folders[name] / "report.html").read_text(), re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    policies = [meta.get("content") or "" for meta in page.named("meta") if "http-equiv" in meta]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none'")


@pytest.mark.parametrize("name", SAMPLES)
def test_every_picture_and_chart_has_a_text(folders: dict[str, Path], name: str) -> None:
    page = Page((folders[name] / "report.html").read_text(encoding="utf-8"))
    assert all(image.get("alt") for image in page.named("img"))
    for drawing in page.named("svg"):
        assert drawing.get("aria-hidden") == "true" or drawing.get("aria-label")


def test_strings_from_files_are_data_not_markup(folders: dict[str, Path]) -> None:
    text = (folders["hostile"] / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.named("script")) == 1
    assert "<script>alert" not in text
    assert "evil.example" not in str(page.named("img"))
    assert "".join(page.text).count('<script>alert("x")') > 20


def test_missing_numbers_and_pictures_are_said(folders: dict[str, Path]) -> None:
    hostile = "".join(Page((folders["hostile"] / "report.html").read_text(encoding="utf-8")).text)
    for said in ("NaN", "−∞", "no picture", "interrupted", "did not run", "losses of zero"):
        assert said in hostile
    one = "".join(Page((folders["one"] / "report.html").read_text(encoding="utf-8")).text)
    assert "not measured" in one
    assert "weights of lpips' AlexNet are not on this machine" in one
    assert "the matching loss was never finite" in one
    nothing = "".join(Page((folders["nothing"] / "report.html").read_text(encoding="utf-8")).text)
    assert "not evidence that the update is safe" in nothing


def test_findings_come_worst_first_and_attacks_best_first(folders: dict[str, Path]) -> None:
    text = (folders["one"] / "report.html").read_text(encoding="utf-8")
    findings = text[text.index('id="findings"') : text.index('id="setup"')]
    places = [findings.index(f"<h3>{name}</h3>") for name in ("labels", "checkpoint hash", "batch size")]
    assert places == sorted(places)
    attacks = text[text.index('id="attacks"') : text.index('id="restarts"')]
    assert attacks.index(">dlg ") < attacks.index(">inverting-gradients") < attacks.index(">idlg")


def test_time_spent_on_compiling_is_said(folders: dict[str, Path]) -> None:
    run = read_run(folders["one"])
    compiled = run.model_copy(update={"compiling": 13.0})
    assert "13 s of it for compiling" in render_html(compiled, folders["one"])
    assert "compiling" not in render_html(run, folders["one"])


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


@pytest.mark.parametrize("count", [1, 4])
def test_pictures_are_inlined_whole_and_redaction_removes_the_truth(tmp_path: Path, count: int) -> None:
    result = photo_audit(tmp_path, count)
    labels = [f"secret-{index}" for index in range(count)]
    best = result.trials[1]
    examples = [
        e.model_copy(update={"true_label": label}) for e, label in zip(best.examples, labels, strict=True)
    ]
    trial = best.model_copy(update={"examples": examples})
    result = result.model_copy(update={"trials": [trial], "best": 0})
    open_page, closed_page = render_html(result, tmp_path), render_html(result, tmp_path, redact=True)
    for index in range(count):
        reconstruction = encoded(tmp_path / f"images/best-{index}.png")
        assert reconstruction in open_page
        assert reconstruction in closed_page
        private = [encoded(tmp_path / f"images/{kind}-{index}.png") for kind in ("original", "difference")]
        for secret in [*private, labels[index]]:
            if secret != reconstruction:  # a perfect reconstruction is its original, byte for byte
                assert secret in open_page
                assert secret not in closed_page
    assert "withheld" in closed_page
    assert "Redacted" in closed_page


def test_labels_given_to_the_adversary_are_redacted_everywhere(tmp_path: Path) -> None:
    result = photo_audit(tmp_path)
    best = result.trials[1]
    example = best.examples[0].model_copy(update={"true_label": "tabby", "recovered_label": "tabby"})
    result = result.model_copy(
        update={
            "knowledge": [KnowledgeRow(name="labels", status="known", text="tabby", source="option")],
            "trials": [best.model_copy(update={"examples": [example]})],
            "best": 0,
            "command": "leakaudit attack --labels tabby --seed 1",
            "redacted": True,
        }
    )
    write_run(result, tmp_path)
    assert "tabby" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "tabby" not in (tmp_path / "result.json").read_text(encoding="utf-8")
    assert "original" not in read_run(tmp_path).trials[0].examples[0].model_dump(exclude_none=True)


def test_a_notebook_gets_the_report_in_a_sandboxed_frame(tmp_path: Path) -> None:
    result = write_run(photo_audit(tmp_path), tmp_path)
    frame = Page(result._repr_html_()).named("iframe")
    assert len(frame) == 1
    assert frame[0]["sandbox"] == "allow-scripts"
    assert frame[0]["srcdoc"] == render_html(result, tmp_path)
    alone = AuditResult.from_json(result.to_json())
    assert alone.folder is None
    assert "picture not at hand" in (Page(alone._repr_html_()).named("iframe")[0]["srcdoc"] or "")


def test_a_picture_outside_the_folder_is_refused(tmp_path: Path) -> None:
    result = photo_audit(tmp_path / "run")
    (tmp_path / "secret.png").write_bytes((tmp_path / "run/images/original-0.png").read_bytes())
    frame = Frame(iteration=0, loss=1.0, image="../secret.png")
    trial = result.trials[1].model_copy(update={"strip": [frame]})
    with pytest.raises(InputError, match="must stay inside the run folder"):
        render_html(result.model_copy(update={"trials": [trial], "best": 0}), tmp_path / "run")


def test_hostile_strings_do_not_escape_from_a_notebook_frame(tmp_path: Path) -> None:
    page = Page(hostile_audit(tmp_path)._repr_html_())
    assert [tag for tag, _ in page.tags] == ["iframe"]
    assert EVIL not in "".join(page.text)


def curve(history: list[tuple[int, float]]) -> Trial:
    attempt = Attempt(
        restart=0, loss=1, residual=1, iterations=9, seconds=1, stopped="finished", history=history
    )
    return Trial(attack="dlg", spec="dlg", status="done", best=0, attempts=[attempt])


def test_a_curve_lies_on_its_axes() -> None:
    chart = loss_chart(curve([(0, 100.0), (50, 1.0), (100, 0.01)]))
    assert chart is not None
    points = [tuple(map(float, point.split(","))) for point in chart.lines[0].points.split()]
    assert points == [
        (chart.left, chart.top),
        ((chart.left + chart.right) / 2, (chart.top + chart.bottom) / 2),
        (chart.right, chart.bottom),
    ]
    assert [tick.text for tick in chart.y_ticks] == ["10⁻²", "10⁻¹", "10⁰", "10¹", "10²"]
    assert chart.y_ticks[0].place == chart.bottom
    assert [tick.text for tick in chart.x_ticks] == ["0", "20", "40", "60", "80", "100"]


@pytest.mark.parametrize(
    "history",
    [
        [(0, 0.0)],
        [(0, 1.0)],
        [(0, -3.0), (1, 1e-300), (2, 1e300)],
        [(0, float("inf")), (1, 2.0)],
        [(i, 5e-324) for i in range(5000)],
    ],
)
def test_odd_curves_stay_inside_the_chart(history: list[tuple[int, float]]) -> None:
    chart = loss_chart(curve(history))
    assert chart is not None
    points = [tuple(map(float, point.split(","))) for point in chart.lines[0].points.split()]
    assert 1 <= len(points) <= 240
    for x, y in points:
        assert chart.left <= x <= chart.right
        assert chart.top <= y <= chart.bottom
    assert len(chart.y_ticks) <= 7
    assert chart.clipped == any(loss <= 0 for _, loss in history)


def test_no_finite_loss_no_chart() -> None:
    assert loss_chart(curve([(0, float("nan"))])) is None
    assert loss_chart(curve([])) is None


@pytest.mark.parametrize(
    ("frames", "text"), [(1, "found its answer in one step"), (2, "from iteration 0 to")]
)
def test_one_frame_is_not_called_a_course(tmp_path: Path, frames: int, text: str) -> None:
    result = photo_audit(tmp_path)
    assert result.best is not None
    best = result.trials[result.best]
    trial = best.model_copy(update={"strip": best.strip[:frames]})
    page = render_html(result.model_copy(update={"trials": [trial], "best": 0}), tmp_path)
    assert text in " ".join(Page(page).text)
