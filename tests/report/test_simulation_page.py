"""The pages of a simulation and of a comparison, from hand-made results."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from leakaudit.comparing import summarised
from leakaudit.report import simulation_summary, words
from leakaudit.report.simulation_charts import comparison_plots, run_plots
from leakaudit.report.simulation_page import (
    MAX_VIEWS,
    render_comparison,
    render_simulation,
    write_simulation_page,
)
from leakaudit.simulation_results import (
    ComparedRun,
    Comparison,
    CurvePoint,
    LimitValues,
    PopulationSummary,
    QualityValue,
    RecordedView,
    SimulationResult,
    spread,
)

EVIL = "<script>alert(1)</script>"


def quality(accuracy: float, perplexity: float = 4.0) -> QualityValue:
    return QualityValue(accuracy=accuracy, loss=1.4, perplexity=perplexity)


def point(step: int, time: float, accuracy: float, **groups: float) -> CurvePoint:
    found = {"all": quality(accuracy), **{name.replace("_", " "): quality(a) for name, a in groups.items()}}
    return CurvePoint(
        step=step, time=time, uploaded=1000 * step, downloaded=900 * step, updates=4 * step, quality=found
    )


def result(**changes: Any) -> SimulationResult:
    values: dict[str, Any] = {
        "system": "ssgd",
        "spec": "ssgd:momentum=0.9",
        "summary": "Synchronous SGD: every worker's gradient.",
        "options": {"momentum": 0.9, "topology": "server", "cutoff": None},
        "scenario": {"model": "lenet", "task": None, "defense": ["clip"]},
        "model": "lenet",
        "parameters": 100,
        "population": PopulationSummary(
            clients=4, examples=80, held_out=20, sizes=spread([5, 20, 25, 30]), step_seconds=spread([0.3] * 4),
            bandwidth=spread([float("inf")] * 4), latency=0.24, dropout=0.1, availability=1.0,
        ),
        "limits": LimitValues(steps=10, every=5),
        "seed": 0,
        "curve": [point(0, 0.0, 0.25), point(5, 300.0, 0.5), point(10, 600.0, 0.8)],
        "counters": {"dropped out": 7},
        "views": [view()],
        "views_left_out": 3,
        "notes": ["BatchNorm is estimated anew."],
        "environment": {"leakaudit": "0.1.0"},
        "command": "leakaudit simulate ssgd --model lenet",
    }  # fmt: skip
    return SimulationResult(**{**values, **changes})


def view(**changes: Any) -> RecordedView:
    values: dict[str, Any] = {
        "name": "round-0005", "role": "server", "step": 5, "time": 300.0, "clients": [0, 1, 3], "examples": 24,
        "note": "the mean of all gradients", "command": "leakaudit attack out/views/round-0005.safetensors",
    }  # fmt: skip
    return RecordedView(**{**values, **changes})


class Text(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "br", "wbr", "line", "circle", "polyline", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words += data.split()

    def __str__(self) -> str:
        return " ".join(self.words)


def text_of(page: str) -> str:
    found = Text(page)
    assert not found.open
    return str(found)


def test_the_page_of_a_run_says_what_happened() -> None:
    said = text_of(render_simulation(result()))
    for words_ in (
        "ssgd came to 80 % accuracy in 10 min 00 s of virtual time, 10 steps",
        "40 updates of 4 clients arrived; clients sent 10 kB and received 9 kB.",
        "Synchronous SGD: every worker's gradient.",
        "dropped out 7",
        "3 clients: 0, 1, 3",
        "the mean of all gradients",
        "leakaudit attack out/views/round-0005.safetensors",
        "3 views of single clients at these steps were not written",
        "5 to 30, median 22",
        "240 ms one way",
        "bandwidth unlimited",
        "BatchNorm is estimated anew.",
        "cutoff none",
        "leakaudit simulate ssgd --model lenet",
    ):
        assert words_ in said.replace(words.NARROW_SPACE, " "), words_
    assert "task" not in said.partition("Of the scenario")[2].partition("Deviations")[0]


def test_nothing_from_elsewhere_and_nothing_unescaped() -> None:
    evil = result(
        spec=EVIL, system=EVIL, summary=EVIL, notes=[EVIL], options={EVIL: EVIL}, counters={EVIL: 1},
        views=[view(name=EVIL, note=EVIL, command=EVIL, role=EVIL)], command=EVIL,
    )  # fmt: skip
    for page in (
        render_simulation(evil),
        render_comparison(comparison(EVIL, "b", limits=LimitValues(steps=1))),
    ):
        assert EVIL not in page
        assert not re.search(r'(src|href)="(?!#|data:,|[\w.-]+/report\.html)', page.replace(f"{EVIL}", ""))
        assert "default-src 'none'" in page
        assert page.count("<script>") == 1


def test_a_target_is_reached_or_not() -> None:
    limits = LimitValues(steps=10, accuracy=0.5)
    met = result(limits=limits)
    assert met.reached == met.curve[1]
    assert (
        simulation_summary.run_headline(met)
        == "ssgd reached the accuracy of 50 % after 5 min 00 s of virtual time"
    )
    missed = result(limits=LimitValues(steps=10, accuracy=0.9))
    assert missed.reached is None
    assert simulation_summary.run_headline(missed).endswith("10 steps, short of the accuracy of 90 %")
    assert any(key.look == "threshold" for key in run_plots(met)[0].keys)


def test_many_views_are_cut_and_the_rest_is_counted() -> None:
    views = [view(name=f"round-{n:04d}-client-000") for n in range(MAX_VIEWS + 5)]
    page = render_simulation(result(views=views))
    assert f"round-{MAX_VIEWS - 1:04d}" in page
    assert f"round-{MAX_VIEWS:04d}" not in page
    assert "5 more views are in the run" in page


def test_groups_are_lines_of_their_own() -> None:
    curve = [point(0, 0.0, 0.2, top_1=0.1), point(10, 100.0, 0.8, top_1=0.6)]
    by_time, by_bytes, loss = run_plots(result(curve=curve))
    assert [key.text for key in by_time.keys] == ["all held-out data", "top 1"]
    assert len(by_time.strokes) == len(by_bytes.strokes) == len(loss.strokes) == 2
    assert "virtual time, seconds" in by_time.x_label
    assert "kB" in by_bytes.x_label
    assert "top 1 of clients by data" in text_of(render_simulation(result(curve=curve)))


def test_models_of_words_are_told_by_perplexity() -> None:
    found = result(medium="text", scenario={"task": "causal-lm"})
    assert "perplexity 4" in simulation_summary.run_headline(found)
    assert "log scale" in run_plots(found)[0].y_label
    assert not result(medium="text", scenario={"task": "classification"}).by_perplexity


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e304])
def test_a_run_that_went_astray_is_drawn_all_the_same(value: float) -> None:
    astray = CurvePoint(
        step=1, time=1.0, uploaded=1, downloaded=1, updates=1,
        quality={"all": QualityValue(accuracy=0.1, loss=value, perplexity=value)},
    )  # fmt: skip
    for medium in ("images", "text"):
        page = render_simulation(result(curve=[point(0, 0.0, 0.2), astray], medium=medium))
        assert "nan," not in page
        assert ",inf" not in page


def test_a_run_of_no_steps() -> None:
    assert "ssgd came to 25 %" in render_simulation(result(curve=[point(0, 0.0, 0.25)], views=[]))


def comparison(*specs: str, limits: LimitValues, seeds: int = 2) -> Comparison:
    systems = []
    for index, spec in enumerate(specs):
        runs = []
        for seed in range(seeds):
            curve = [
                point(0, 0.0, 0.25),
                point(5, 100.0 * (index + 1) + seed, 0.5),
                point(10, 700.0, 0.8 - index / 10),
            ]
            runs.append(
                ComparedRun(
                    seed=seed,
                    folder=f"run-{index}-seed-{seed}",
                    result=result(spec=spec, limits=limits, curve=curve),
                )
            )
        systems.append(summarised(spec, runs))
    return Comparison(systems=systems, limits=limits, seeds=list(range(seeds)))


def test_a_comparison_by_time_to_target() -> None:
    found = comparison("fast", "slow", limits=LimitValues(steps=10, accuracy=0.5))
    assert (found.systems[0].time.mean, found.systems[0].reached) == (100.5, 2)
    said = text_of(render_comparison(found)).replace(words.NARROW_SPACE, " ")
    assert "fast is first at the accuracy of 50 %, after 1 min 40 s; slow takes 2 times as long" in said
    assert "overlap" not in said
    assert "1 min 40 s ± 6.4 s" in said
    assert "dropped out" in said
    assert len(comparison_plots(found)[0].strokes) == 4 + 1


def test_a_comparison_says_where_chance_may_be_at_work() -> None:
    close = comparison("a", "b", limits=LimitValues(steps=10))
    for index, accuracies in enumerate(([0.5, 0.9], [0.4, 0.95])):
        runs = [
            ComparedRun(seed=s, folder="f", result=result(curve=[point(1, 1.0, a)]))
            for s, a in enumerate(accuracies)
        ]
        close.systems[index] = summarised("ab"[index], runs)
    assert simulation_summary.comparison_headline(close).endswith("(the intervals of the seeds overlap)")
    single = comparison("a", "b", limits=LimitValues(steps=10), seeds=1)
    assert "One seed has no interval" in render_comparison(single)
    assert simulation_summary.comparison_headline(single) == "a ends at the highest accuracy, 80 %"


def test_a_target_that_some_seeds_missed() -> None:
    found = comparison("a", limits=LimitValues(steps=10, accuracy=0.9))
    assert found.systems[0].reached == 0
    assert found.systems[0].time.mean == 700.0
    assert "No system reached the accuracy of 90 %" in render_comparison(found)
    assert "reached by 0 of 2" in render_comparison(found)


def test_results_survive_json() -> None:
    for value in (result(), comparison("a", "b", limits=LimitValues(steps=3))):
        assert type(value).model_validate_json(value.to_json()) == value


def test_the_page_is_written(tmp_path: Path) -> None:
    write_simulation_page(result(), tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").read_text() == render_simulation(result())
