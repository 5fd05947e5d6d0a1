"""`leakaudit simulate leakage`: parse, call, print, exit code.  Nothing heavy is imported before it runs."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from leakaudit.progress import progress_bar


def leakage(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders written by leakaudit simulate.", show_default=False)
    ],
    attack: Annotated[
        list[str] | None, typer.Option(help="auto, or NAME:key=value; may be repeated; see list attacks.")
    ] = None,
    budget: Annotated[float, typer.Option(help="Seconds for the attacks on one view.")] = 120,
    per_role: Annotated[
        int, typer.Option(help="Views of each run and role, smallest cohorts first.", min=1)
    ] = 1,
    model: Annotated[
        str | None,
        typer.Option(help="Of the updates, where a file may not name it: hf:..., or your own code."),
    ] = None,
    fail_on: Annotated[
        str | None, typer.Option(help="Policy, as for attack: psnr>20,ssim>0.5; never: exit 0 for a leak.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the result; a rerun resumes.")] = Path("runs/leakage"),
    html: Annotated[Path | None, typer.Option(help="Write the HTML report here too.")] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON instead of the table.")
    ] = False,
    seed: Annotated[int, typer.Option(help="The one seed of the attacks.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    redact: Annotated[
        bool, typer.Option("--redact", help="Leave the originals out of everything written.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
) -> None:
    """Attack what each party of simulated runs saw, with what theory says beside it.

    Prints and reports the table system x role x best attack, over the views recorded in each run.
    """
    from leakaudit.federated.leakage import audit_runs
    from leakaudit.report.leakage_page import write_leakage_page
    from leakaudit.report.leakage_terminal import print_leakage

    with progress_bar(Console(stderr=True)) as on_progress:
        result = audit_runs(
            runs,
            attacks=attack or ("auto",),
            budget=budget,
            per_role=per_role,
            model=model,
            policy=fail_on,
            out=out,
            seed=seed,
            device=device,
            redact=redact,
            force=force,
            on_progress=on_progress,
            command=shlex.join(["leakaudit", *sys.argv[1:]]),
        )
    if html is not None:
        write_leakage_page(result, out, html, redact=redact)
    if json_output:
        typer.echo(result.to_json())
    else:
        print_leakage(result, Console(), out)
    raise typer.Exit(result.exit_code)
