"""The one orchestrator of a sweep: plan, do what is left to do, judge, write."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from leakaudit.gate import check_baseline, read_baseline
from leakaudit.progress import OnSweep
from leakaudit.results import Value
from leakaudit.sweep.assemble import assemble
from leakaudit.sweep.config import SweepConfig
from leakaudit.sweep.engine import Engine, local_engine
from leakaudit.sweep.folder import alone, open_folder
from leakaudit.sweep.outputs import check_outputs, write_outputs
from leakaudit.sweep.plan import plan_sweep
from leakaudit.sweep.ray_engine import RayEngine, check_ray
from leakaudit.sweep.target_jobs import Bounds
from leakaudit.sweep.work import Job
from leakaudit.sweep.workers import begin_importing
from leakaudit.sweep_results import Run, SweepResult, Utility


def run_sweep(
    config: SweepConfig,
    *,
    resume: bool = False,
    force: bool = False,
    on_progress: OnSweep | None = None,
    command: str = "",
) -> SweepResult:
    """Do the sweep, or what is left of it, and write the folder and the files that the configuration names.

    Ctrl-C ends it with what is finished; the result says so.

    Args:
        resume: finish a sweep that was ended; force: start anew in a folder that holds one.

    Raises:
        InputError: for anything that cannot be used, before anything is computed.
    """
    began = time.monotonic()
    begin_importing(config)
    engine = engine_of(config)
    check_outputs(config)
    baseline = None if config.baseline is None else read_baseline(config.baseline)
    plan = plan_sweep(config)
    if baseline is not None:
        check_baseline(baseline, plan.policy, config.quantile)
    deadline = None if config.total_budget is None else began + config.total_budget
    with alone(config.out):
        folder = open_folder(plan, resume=resume, force=force)
        results, interrupted = do_jobs(plan.jobs, engine, folder, deadline, on_progress)
        result = assemble(
            plan,
            results,
            baseline,
            command=command,
            seconds=time.monotonic() - began,
            interrupted=interrupted,
        )
        write_outputs(result, config, folder)
    return result


def do_jobs(
    jobs: Sequence[Job], engine: Engine, folder: Path, deadline: float | None, on_progress: OnSweep | None
) -> tuple[dict[str, Value], bool]:
    """The results by key, those that lie in the folder read back, and whether Ctrl-C ended it."""
    results = {job.key: value for job in jobs if (value := job.stored(folder)) is not None}
    left = [job for job in jobs if job.key not in results]

    def report() -> None:
        if on_progress is not None:
            on_progress(len(results), sum(map(_failed, results.values())), len(jobs))

    def go_on() -> bool:
        return deadline is None or time.monotonic() < deadline

    report()
    try:
        with closing(engine.run(left, folder, go_on)) as finished:
            for job, value in finished:
                results[job.key] = value
                if isinstance(value, Run) and value.status == "interrupted":
                    return results, True
                report()
    except KeyboardInterrupt:
        return results, True
    return results, False


def _failed(value: Value) -> bool:
    if isinstance(value, Run):
        return value.status == "failed"
    return isinstance(value, (Utility, Bounds)) and value.failed


def engine_of(config: SweepConfig) -> Engine:
    """Who does the jobs; `InputError` for Ray where it is not installed."""
    if config.engine == "ray":
        check_ray()
        gpu = config.device.startswith("cuda")
        return RayEngine(config.address, config.workers, gpu=gpu)
    return local_engine(config.workers, config.device)
