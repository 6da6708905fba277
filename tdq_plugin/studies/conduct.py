"""List the parts of a study, do what is missing, and write the report."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tdq_plugin.studies.definition import StudyDefinition, load_study
from tdq_plugin.studies.execution import (
    PlannedRun,
    duration,
    execute,
    plan_run,
    run_in_a_process,
)
from tdq_plugin.studies.report import PartResults, write_study
from tdq_plugin.studies.results import load_run

__all__ = ["Study"]


class Study:
    """A study and the folder of its runs.

    Args:
        name: A study's name or the path of its YAML file.
        output: Folder of the runs.
        samples: Replaces the number of images per row, for a quick pass.

    Raises:
        ConfigError: The study or the settings of one of its runs are not valid, or `output` holds
            runs with other settings.
    """

    def __init__(self, name: str, output: Path, samples: int | None = None) -> None:
        self.name, self.output = Path(name).stem, output
        self.definition: StudyDefinition = load_study(name, samples)
        for part in self.definition.parts:
            self.planned(part)

    def planned(self, part: str) -> list[PlannedRun]:
        """The runs of a part.

        Raises:
            ConfigError: There is no such part.
        """
        specs = self.definition.runs(part, self.output)
        return [plan_run(self.definition, spec) for spec in specs]

    def overview(self, jobs: int) -> list[tuple[str, str, str, str]]:
        """For each part its name, its title, finished runs, and the time that the others take."""
        lines, counted = [], set[str]()
        for name, part in self.definition.parts.items():
            runs = self.planned(name)
            missing = [run for run in runs if not run.finished and run.spec.name not in counted]
            counted |= {run.spec.name for run in runs}
            finished = f"{sum(run.finished for run in runs)} of {len(runs)}"
            lines.append((name, part.title, finished, _time(missing, jobs)))
        return lines

    def run(
        self, parts: Sequence[str], jobs: int, results: Path, say: Callable[[str], None]
    ) -> dict[str, str]:
        """Do parts, and write the report after each.

        Args:
            parts: Their names.
            jobs: Runs at a time, one process and one thread each.
            results: Folder of the report.
            say: Told of the progress.

        Returns:
            Why runs failed, by their names.

        Raises:
            ConfigError: There is no such part.
        """
        failures: dict[str, str] = {}
        for part in parts:
            self.planned(part)
        for part in parts:
            runs = self.planned(part)
            missing = [run for run in runs if not run.finished]
            say(
                f"{part}: {self.definition.parts[part].title}. {len(missing)} of {len(runs)} runs "
                f"to do, about {_time(missing, jobs)}"
            )
            do = partial(run_in_a_process, logs=self.output / "logs")
            failures |= execute(missing, jobs, say, do)
            say(f"The report is in {self.report(results)}")
        return failures

    def report(self, results: Path) -> Path:
        """Write the report of everything that is finished; return the Markdown file."""
        found = {}
        for name, part in self.definition.parts.items():
            runs = self.planned(name)
            finished = [load_run(run.folder) for run in runs if run.finished]
            missing = [run.spec.name for run in runs if not run.finished]
            found[name] = PartResults(part, finished, missing)
        return write_study(results, self.name, self.definition, found)


def _time(runs: Sequence[PlannedRun], jobs: int) -> str:
    return duration(sum(run.seconds for run in runs) / jobs) if runs else "no time"
