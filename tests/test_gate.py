from __future__ import annotations

import json
import math
from datetime import date, timedelta
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sweep_samples import LEAKING, POLICY, SAFE, TODAY, sample_cell, sample_cells, sample_run, sample_sweep

from leakaudit.cli import main
from leakaudit.errors import InputError
from leakaudit.gate import (
    BASELINE_SCHEMA_VERSION,
    Baseline,
    check_baseline,
    crossed,
    deciding_score,
    deciding_scores,
    gate,
    judge_cell,
    read_baseline,
    read_sweep,
    standing,
    write_baseline,
)
from leakaudit.policy import POLICY_METRICS, Policy, Threshold, parse_policy
from leakaudit.sweep_results import SWEEP_NAME, Acceptance, Cell, Example, Run, SweepResult

METRICS = ("ssim", "psnr")
THRESHOLDS = st.builds(
    Threshold,
    metric=st.sampled_from(METRICS),
    operator=st.sampled_from(["<", ">"]),
    value=st.floats(0, 1),
)
POLICIES = st.lists(THRESHOLDS, min_size=1, max_size=3).map(lambda found: Policy(tuple(found)))
SCORES = st.one_of(st.none(), st.just(math.nan), st.floats(0, 1))
RUNS = st.builds(
    Run,
    key=st.just("k"),
    group=st.integers(0, 2),
    seed=st.integers(0, 2),
    status=st.sampled_from(["done", "done", "done", "failed", "interrupted", "pending"]),
    verdict=st.sampled_from([None, "leaks", "not-recovered", "inconclusive"]),
    reasons=st.lists(
        st.sampled_from(["The positive control did not run.", "The budget ended it."]), max_size=2
    ),
    examples=st.lists(
        st.builds(Example, index=st.just(0), scores=st.fixed_dictionaries(dict.fromkeys(METRICS, SCORES))),
        max_size=4,
    ),
)
QUANTILES = st.one_of(st.just(1.0), st.floats(0.05, 1))
END = (TODAY + timedelta(days=30)).isoformat()


def rows(runs: list[Run]) -> list[dict[str, float | None]]:
    return [example.scores for run in runs for example in run.examples]


# ------------------------------------------------------------------ one cell


@given(st.lists(RUNS, max_size=4), POLICIES, QUANTILES, st.sampled_from([None, True, False]))
def test_not_recovered_is_said_only_when_everything_supports_it(
    runs: list[Run], policy: Policy, quantile: float, control: bool | None
) -> None:
    verdict, reasons = judge_cell(runs, policy, quantile, control)
    assert reasons
    assert all(reason.endswith(".") for reason in reasons)
    if verdict != "not-recovered":
        return
    assert control
    assert runs
    assert all(run.status == "done" and run.examples and run.verdict is not None for run in runs)
    assert all(run.reasons in ([], ["The positive control did not run."] * len(run.reasons))
               for run in runs if run.verdict == "inconclusive")  # fmt: skip
    for row in rows(runs):
        assert all(row[metric] is not None and not math.isnan(row[metric]) for metric in policy.metrics)
    over = sum(any(t.crossed(row[t.metric]) for t in policy.thresholds) for row in rows(runs))
    assert over <= (1 - quantile) * len(rows(runs)) * len(policy.thresholds) + 1e-6
    if quantile == 1:
        assert over == 0


@given(st.lists(RUNS, max_size=4), POLICIES, st.sampled_from([None, True, False]))
def test_in_the_worst_case_one_score_over_one_threshold_leaks(
    runs: list[Run], policy: Policy, control: bool | None
) -> None:
    assume(policy.broken_by(rows(runs)))
    assert judge_cell(runs, policy, 1.0, control)[0] == "leaks"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), QUANTILES, st.sampled_from("<>"))
def test_the_deciding_score_is_exceeded_by_at_most_the_share_set_aside(
    scores: list[float], quantile: float, operator: str
) -> None:
    threshold = Threshold("ssim", operator, 0.5)  # type: ignore[arg-type]
    found = deciding_score([*scores, None, math.nan], threshold, quantile)
    assert found is not None
    worse = sum(score > found if operator == ">" else score < found for score in scores)
    at_least = sum(score >= found if operator == ">" else score <= found for score in scores)
    assert worse <= (1 - quantile) * len(scores) + 1e-6
    assert at_least > (1 - quantile) * len(scores) - 1 - 1e-6
    assert deciding_score(scores, threshold, 1.0) == (max(scores) if operator == ">" else min(scores))


def test_nine_tenths_forgive_one_of_ten_and_not_two() -> None:
    policy = parse_policy("ssim>0.5")
    one = [sample_run([{"ssim": 0.9}] + [{"ssim": 0.1}] * 9)]
    two = [sample_run([{"ssim": 0.9}] * 2 + [{"ssim": 0.1}] * 8)]
    verdict, reasons = judge_cell(one, policy, 0.9, True)
    assert verdict == "not-recovered"
    assert reasons[0] == (
        "1 of 10 examples cross ssim>0.5 (worst ssim 0.9), within the share that the quantile sets aside."
    )
    verdict, reasons = judge_cell(two, policy, 0.9, True)
    assert verdict == "leaks"
    assert reasons == ["2 of 10 examples cross ssim>0.5 (worst ssim 0.9), more than the 10 % that may."]


@pytest.mark.parametrize("quantile", [1.0, 0.5])
def test_a_proof_leaks_whatever_the_scores_say(quantile: float) -> None:
    proof = sample_run(verdict="leaks", headline="The shared update determines the private text.", seed=3)
    verdict, reasons = judge_cell([sample_run(), proof], parse_policy(POLICY), quantile, True)
    assert verdict == "leaks"
    assert reasons == ["Group 0, seed 3: The shared update determines the private text."]


def test_a_run_that_leaks_by_scores_is_left_to_the_quantile() -> None:
    runs = [sample_run([LEAKING], seed=0), *(sample_run([SAFE], seed=seed) for seed in range(1, 10))]
    assert runs[0].verdict == "leaks"
    assert judge_cell(runs, parse_policy(POLICY), 0.9, True)[0] == "not-recovered"
    assert judge_cell(runs, parse_policy(POLICY), 0.95, True)[0] == "leaks"


@pytest.mark.parametrize(
    ("runs", "control", "reason"),
    [
        ([], True, "No run was made."),
        ([sample_run(status="failed", error="out of memory.")], True, "Group 0, seed 0 failed: out of memory."),
        ([sample_run(status="pending")], True, "Group 0, seed 0 pending."),
        ([sample_run(())], True, "Group 0, seed 0 scored no example."),
        ([sample_run([{"ssim": 0.1, "psnr": None}])], True, "psnr was not measured on 1 of its examples"),
        ([sample_run([{"ssim": math.nan, "psnr": 3.0}])], True, "ssim was not measured on 1 of its examples"),
        ([sample_run([SAFE]).model_copy(update={"unmeasured": ["ssim"]})], True, "ssim was not measured on some"),
        ([sample_run()], None, "The positive control did not run"),
        ([sample_run()], False, "The positive control failed"),
        ([sample_run(reasons=["The budget ended the attack."])], True, "seed 0: The budget ended the attack."),
    ],
)  # fmt: skip
def test_doubts(runs: list[Run], control: bool | None, reason: str) -> None:
    verdict, reasons = judge_cell(runs, parse_policy(POLICY), 1.0, control)
    assert verdict == "inconclusive"
    assert any(reason in text for text in reasons), reasons


def test_a_cell_says_that_its_attacks_were_cut_short() -> None:
    runs = [sample_run().model_copy(update={"cut": ["tv-path", "idlg"]}), sample_run(seed=1)]
    verdict, reasons = judge_cell(runs, parse_policy(POLICY), 1.0, True)
    assert verdict == "not-recovered"
    assert reasons[0] == "The time budget ended tv-path, idlg early in 1 of 2 runs: more may recover more."
    nearest = [run.model_copy(update={"attack": "tv-path"}) for run in runs]
    verdict, reasons = judge_cell(nearest, parse_policy(POLICY), 1.0, True)
    assert verdict == "inconclusive", "the attack that came nearest was still getting nearer"
    assert reasons[0].endswith("the time budget ended tv-path early, which came nearest; raise it.")


def test_the_want_of_a_runs_own_control_spoils_nothing() -> None:
    for sentence in ("The positive control did not run.", "The positive control did not run: no images."):
        runs = [sample_run(reasons=[sentence])]
        assert judge_cell(runs, parse_policy(POLICY), 1.0, True)[0] == "not-recovered"


@pytest.mark.parametrize("quantile", [0, -1, 1.01, math.nan])
def test_a_quantile_out_of_range_is_refused(quantile: float) -> None:
    with pytest.raises(InputError, match=r"accepted: above 0, up to 1"):
        judge_cell([], parse_policy(POLICY), quantile, True)


# ------------------------------------------------------------------ all cells


def accepts(cell: Cell, expires: str = END) -> Baseline:
    policy = parse_policy(POLICY)
    over = {str(t): deciding_scores(cell, policy, 1.0)[str(t)] for t in crossed(cell, policy, 1.0)}
    return Baseline(
        created="2026-03-01T00:00:00+00:00",
        policy=POLICY,
        entries=[Acceptance(cell=cell.name, owner="ada", expires=expires, reason="pilot", scores=over)],
    )


def test_new_leakage_fails_accepted_does_not_expired_does() -> None:
    cells, policy = [sample_cell("none", LEAKING), sample_cell("sign", SAFE)], parse_policy(POLICY)
    new = gate(cells, policy, 1.0, None, TODAY)
    assert (new.broken, new.exit_code) == ([cells[0].name], 1)
    old = gate(cells, policy, 1.0, accepts(cells[0]), TODAY)
    assert (old.broken, old.exit_code) == ([], 0)
    assert [entry.owner for entry in old.accepted] == ["ada"]
    for days, code in ((30, 0), (31, 1)):
        late = gate(cells, policy, 1.0, accepts(cells[0]), TODAY + timedelta(days=days))
        assert late.exit_code == code
        assert late.expired == ([cells[0].name] if code else [])
    assert late.broken == late.expired
    assert late.notes == [f"{cells[0].name}: accepted by ada until {END}, which is over."]


@pytest.mark.parametrize(
    ("policy", "accepted", "now", "worse"),
    [
        ("ssim>0.5", 0.60, 0.69, False),
        ("ssim>0.5", 0.60, 0.71, True),
        ("ssim>0.5", 0.71, 0.60, False),
        ("lpips<0.3", 0.25, 0.16, False),
        ("lpips<0.3", 0.25, 0.14, True),
        ("psnr>20", 22.0, 23.9, False),
        ("psnr>20", 22.0, 24.1, True),
        ("psnr>20", 45.0, 80.0, False),
        ("psnr>20", 39.0, math.inf, False),
        ("mse<0.01", 0.008, 0.0052, False),
        ("mse<0.01", 0.008, 0.0049, True),
        ("mse<0.01", 1e-4, 0.0, False),
        ("token-accuracy>0.2", 0.3, 0.41, True),
    ],
)
def test_accepted_leakage_may_not_get_clearly_worse(
    policy: str, accepted: float, now: float, worse: bool
) -> None:
    (metric,) = parse_policy(policy).metrics
    before, after = (
        sample_cell("none", runs=[sample_run([{metric: score}])], policy=policy) for score in (accepted, now)
    )
    entry = Acceptance(cell=before.name, owner="ada", expires=END, scores={policy: accepted})
    baseline = Baseline(created="", policy=policy, entries=[entry])
    for cell, fails in ((before, False), (after, worse)):
        found = gate([cell], parse_policy(policy), 1.0, baseline, TODAY)
        assert (found.exit_code, found.worse) == ((1, [cell.name]) if fails else (0, [])), found
    if worse:
        assert f"{metric} {now:.4g} where {accepted:.4g} was accepted" in found.notes[0]


def test_a_threshold_that_was_not_crossed_before_is_new_leakage() -> None:
    before, now = sample_cell("none", {"ssim": 0.6, "psnr": 15.0}), sample_cell("none", LEAKING)
    found = gate([now], parse_policy(POLICY), 1.0, accepts(before), TODAY)
    assert found.exit_code == 1
    assert "psnr>20 was not crossed when it was accepted, now psnr is 31." in found.notes[1]


def test_entries_that_are_not_needed_are_named() -> None:
    gone, healed, doubtful = (sample_cell(name, LEAKING) for name in ("gone", "healed", "doubtful"))
    baseline = accepts(gone)
    entries = [*baseline.entries, *accepts(healed).entries, *accepts(doubtful).entries]
    cells = [sample_cell("healed", SAFE), sample_cell("doubtful", SAFE, control=None)]
    found = gate(cells, parse_policy(POLICY), 1.0, baseline.model_copy(update={"entries": entries}), TODAY)
    assert found.notes == [
        f"{gone.name}: in the baseline, but not in this sweep.",
        f"{healed.name}: in the baseline, but leaks no more; its entry can go.",
    ]
    assert found.inconclusive == [doubtful.name]
    assert found.exit_code == 3


def test_never_fails_nothing_but_what_proves_nothing() -> None:
    leaks, doubtful = sample_cell("none", LEAKING), sample_cell("sign", control=None)
    assert gate([leaks], parse_policy("never"), 1.0, None, TODAY).exit_code == 0
    found = gate([leaks, doubtful], parse_policy("never"), 1.0, None, TODAY)
    assert found.exit_code == 3
    assert [standing(cell, found) for cell in (leaks, doubtful)] == ["reported", "inconclusive"]


def test_a_sweep_without_cells_is_not_green() -> None:
    with pytest.raises(InputError, match="no cells"):
        gate([], parse_policy(POLICY), 1.0, None, TODAY)


@given(
    st.lists(
        st.tuples(st.sampled_from([LEAKING, SAFE]), st.sampled_from([True, None])), min_size=1, max_size=6
    )
)
def test_exit_codes(kinds: list[tuple[dict[str, float | None], bool | None]]) -> None:
    cells = [
        sample_cell(f"d{index}", scores, control=control) for index, (scores, control) in enumerate(kinds)
    ]
    found = gate(cells, parse_policy(POLICY), 1.0, None, TODAY)
    verdicts = {cell.verdict for cell in cells}
    expected = 1 if "leaks" in verdicts else 3 if "inconclusive" in verdicts else 0
    assert found.exit_code == expected
    assert {standing(cell, found) for cell in cells if cell.verdict == "leaks"} <= {"broken"}


# ------------------------------------------------------------------ the baseline's file


def test_a_baseline_written_from_a_sweep_accepts_that_sweep_and_no_more(tmp_path: Path) -> None:
    sweep = sample_sweep()
    assert sweep.exit_code == 1
    path = tmp_path / "ci" / "baseline.json"
    written = write_baseline(sweep, path, "ada", END, reason="pilot", today=TODAY)
    baseline = read_baseline(path)
    assert baseline == written
    assert [entry.cell for entry in baseline.entries] == sweep.gate.broken
    policy = parse_policy(POLICY)
    again = gate(sweep.cells, policy, 1.0, baseline, TODAY)
    assert (again.broken, again.notes) == ([], [])
    assert again.exit_code == 3, "inconclusive cells stay inconclusive"
    for index, cell in enumerate(sweep.cells):
        if cell.verdict != "leaks":
            cells = [*sweep.cells]
            cells[index] = sample_cell(
                cell.defense, LEAKING, protocol=cell.protocol, adversary=cell.adversary
            )
            assert gate(cells, policy, 1.0, baseline, TODAY).broken == [cell.name]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.sampled_from(POLICY_METRICS), QUANTILES)
def test_what_was_accepted_is_accepted_the_same_day(
    scores: list[float], metric: str, quantile: float
) -> None:
    policy = Policy((Threshold(metric, ">", 0.25), Threshold(metric, "<", 0.75)))
    cells = [sample_cell("none", runs=[sample_run([{metric: s} for s in scores])], policy=str(policy),
                         quantile=quantile)]  # fmt: skip
    assert cells[0].verdict == "leaks" or quantile < 1
    over = {
        str(t): deciding_scores(cells[0], policy, quantile)[str(t)]
        for t in crossed(cells[0], policy, quantile)
    }
    entry = Acceptance(cell=cells[0].name, owner="a", expires=END, scores=over)
    baseline = Baseline(created="", policy=str(policy), quantile=quantile, entries=[entry])
    read = Baseline.model_validate_json(baseline.model_dump_json())
    assert gate(cells, policy, quantile, read, TODAY).exit_code == 0


def test_writing_anew_keeps_what_others_accepted(tmp_path: Path) -> None:
    first, second = sample_cell("none", LEAKING), sample_cell("sign", LEAKING)
    path = tmp_path / "baseline.json"
    sweep = sample_sweep([first, second], baseline=accepts(first))
    later = (TODAY + timedelta(days=90)).isoformat()
    path.write_text("{}")
    with pytest.raises(InputError, match="exists; pass --force"):
        write_baseline(sweep, path, "bob", later, today=TODAY)
    assert path.read_text() == "{}"
    written = write_baseline(sweep, path, "bob", later, force=True, today=TODAY)
    assert [(entry.owner, entry.expires) for entry in written.entries] == [("ada", END), ("bob", later)]
    after = TODAY + timedelta(days=31)
    assert [e.owner for e in write_baseline(sweep, path, "bob", later, force=True, today=after).entries] == [
        "bob",
        "bob",
    ]


@pytest.mark.parametrize(
    ("owner", "expires", "message"),
    [
        (" ", END, "has no owner"),
        ("ada", "2026-13-01", "expires '2026-13-01' is not a date; accepted: YYYY-MM-DD"),
        ("ada", "20261201", "is not a date"),
        ("ada", "soon", "is not a date"),
        ("ada", "2026-02-28", "that day is over; accepted: 2026-03-01 or later"),
    ],
)
def test_who_accepts_and_until_when_must_be_said(
    owner: str, expires: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        write_baseline(sample_sweep(), tmp_path / "b.json", owner, expires, today=TODAY)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_accepted_where_nothing_is_judged(tmp_path: Path) -> None:
    cells = [sample_cell("none", LEAKING)]
    with pytest.raises(InputError, match="judged by never"):
        write_baseline(sample_sweep(cells, policy="never"), tmp_path / "b.json", "ada", END, today=TODAY)


ENTRY = {"cell": "c", "owner": "ada", "expires": "2026-12-01"}
GOOD = {"schema_version": 1, "created": "", "policy": "ssim>0.5", "entries": [ENTRY]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1", "is not JSON"),
        ("[1]", "has schema_version None; this leakaudit reads 1"),
        ({**GOOD, "schema_version": 2}, "has schema_version 2; this leakaudit reads 1"),
        ({**GOOD, "owners": []}, "is not a baseline: owners: Extra inputs"),
        ({**GOOD, "entries": [{"cell": "c"}]}, r"is not a baseline: entries.0.owner: Field required"),
        ({**GOOD, "entries": [{**ENTRY, "owner": ""}]}, "the acceptance of 'c' has no owner"),
        ({**GOOD, "entries": [{**ENTRY, "expires": "2026-02-30"}]}, "'2026-02-30' is not a date"),
        ({**GOOD, "entries": [ENTRY, ENTRY]}, "names the cell 'c' twice"),
        ({**GOOD, "policy": "sim>0.5"}, "unknown metric 'sim', did you mean 'ssim'"),
        ({**GOOD, "quantile": 0}, "quantile 0; accepted"),
    ],
)
def test_a_baseline_that_cannot_be_used_is_refused_in_one_line(
    content: object, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "baseline.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=message) as caught:
        read_baseline(path)
    assert "\n" not in str(caught.value)
    assert "baseline.json" in str(caught.value)


def test_a_baseline_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the baseline .*: No such file"):
        read_baseline(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("policy", "quantile", "fits"),
    [
        ("psnr>20,ssim>0.5", 1.0, True),
        ("ssim>0.50, psnr>20", 1.0, True),
        ("ssim>0.5", 1.0, False),
        ("ssim>0.6,psnr>20", 1.0, False),
        (POLICY, 0.9, False),
        ("never", 1.0, False),
    ],
)
def test_a_baseline_of_another_policy_is_refused(policy: str, quantile: float, fits: bool) -> None:
    baseline = accepts(sample_cell("none", LEAKING))
    if fits:
        check_baseline(baseline, parse_policy(policy), quantile)
        return
    with pytest.raises(InputError, match=r"the baseline accepts leakage under ssim>0\.5,psnr>20"):
        gate(sample_cells(), parse_policy(policy), quantile, baseline, TODAY)


def test_a_sweep_is_read_from_its_folder_or_file(tmp_path: Path) -> None:
    sweep = sample_sweep([sample_cell("none", {"ssim": 1.0, "psnr": math.inf})])
    (tmp_path / SWEEP_NAME).write_text(sweep.to_json())
    assert read_sweep(tmp_path) == read_sweep(tmp_path / SWEEP_NAME) == sweep
    (tmp_path / SWEEP_NAME).write_text(sweep.to_json().replace('"schema_version": 1', '"schema_version": 9'))
    with pytest.raises(InputError, match="has schema_version 9"):
        read_sweep(tmp_path)
    with pytest.raises(InputError, match="cannot read the sweep"):
        read_sweep(tmp_path / "elsewhere")


def test_results_without_the_newer_fields_are_still_read() -> None:
    content = json.loads(sample_sweep().to_json())
    for name in ("worse", "notes"):
        content["gate"].pop(name)
    assert SweepResult.from_json(json.dumps(content)).gate.notes == []
    assert BASELINE_SCHEMA_VERSION == 1
    assert date.fromisoformat(END) > TODAY


def test_the_command_accepts_and_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["leakaudit", "baseline", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    sweep = sample_sweep()
    (tmp_path / SWEEP_NAME).write_text(sweep.to_json())
    out = tmp_path / "baseline.json"
    options = ["--owner", "ada", "--expires", "2999-01-01", "--reason", "pilot", "--out", str(out)]
    assert run(str(tmp_path), *options) == 0
    assert [entry.cell for entry in read_baseline(out).entries] == sweep.gate.broken
    assert f"{sweep.gate.broken[0]}: ada, until 2999-01-01" in capsys.readouterr().out
    before = out.read_bytes()
    assert run(str(tmp_path), *options) == 2
    assert run(str(tmp_path / "none"), *options) == 2
    assert run(str(tmp_path), "--owner", "ada", "--expires", "soon", "--out", str(tmp_path / "b.json")) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert all(line.startswith("leakaudit: ") for line in errors)
    assert out.read_bytes() == before
    assert run(str(tmp_path), *options, "--force") == 0
