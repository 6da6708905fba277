"""`tdq study`: many runs, and one report."""

from pathlib import Path
from typing import Annotated

import typer

from tdq_plugin.errors import ConfigError
from tdq_plugin.extras import INSTALL

__all__ = ["study"]


def study(
    name: Annotated[
        str,
        typer.Argument(help="`digits`, `models`, `learning-rates`, or the path of a YAML file."),
    ],
    part: Annotated[
        list[str] | None, typer.Option(help="Do only this part; may be given several times.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, one CPU thread each.")] = 1,
    samples: Annotated[
        int | None, typer.Option(min=100, help="Images per row, instead of the study's number.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the runs; by default runs/study-NAME.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Folder of the report; by default that of the runs.")
    ] = None,
    list_parts: Annotated[
        bool, typer.Option("--list", help="List the parts and the time they take; do not run.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Write the report of what is finished; do not run.")
    ] = False,
) -> None:
    """Do what is not finished of a study, and write its report. Interrupted, it goes on."""
    try:
        from tdq_plugin.recipes.config import require_writable
        from tdq_plugin.studies.conduct import Study
    except ModuleNotFoundError as error:
        raise ConfigError(f"A study needs {error.name}. {INSTALL.format('recipes')}.") from None
    quick = f"-{samples}samples" if samples else ""
    folder = output or Path("runs") / f"study-{Path(name).stem}{quick}"
    if report and part:
        raise ConfigError(
            f"--part {' --part '.join(part)} with --report: the report has every part, with what "
            "is finished of it. Leave --part out."
        )
    chosen = Study(name, folder, samples, results)
    parts = part or list(chosen.definition.parts)
    if list_parts:
        for line in chosen.overview(parts, jobs):
            typer.echo("{:12} {}. Finished: {} runs; the others take {}.".format(*line))
        return
    require_writable("--output", folder)
    require_writable("--results", chosen.results)
    if report:
        typer.echo(f"The report is in {chosen.report()}")
    else:
        failures = chosen.run(parts, jobs, typer.echo)
        if failures:
            raise ConfigError(
                f"Runs failed: {', '.join(failures)}. Their logs are in {folder}/logs."
            )
