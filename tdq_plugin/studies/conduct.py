"""List the parts of a study, do what is missing, and write the report."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from tdq_plugin.studies.comparisons import check_comparisons
from tdq_plugin.studies.definition import RunSpec, StudyDefinition, load_study
from tdq_plugin.studies.execution import (
    PlannedRun,
    duration,
    execute,
    longest_first,
    plan_run,
    run_in_a_process,
)
from tdq_plugin.studies.records import load_record, save_record
from tdq_plugin.studies.report import PartResults, write_study
from tdq_plugin.studies.results import FinishedRun
from tdq_plugin.studies.run_folder import load_run, read_report

__all__ = ["Study"]


class Study:
    """A study, the folder of its runs and that of its report.

    Beside the report, in `NAME-runs`, there is a record of every finished run. A run that has one
    is not done again, but for those that read its folder.

    Args:
        name: A study's name or the path of its YAML file.
        output: Folder of the runs.
        samples: Replaces the number of images per row, for a quick pass.
        results: Folder of the report, by default that of the runs.

    Raises:
        ConfigError: The study or the settings of one of its runs are not valid, or `output` or
            `results` hold runs with other settings.
    """

    def __init__(
        self, name: str, output: Path, samples: int | None = None, results: Path | None = None
    ) -> None:
        self.name, self.output = Path(name).stem, output
        self.results, self.samples = results or output, samples
        self.definition: StudyDefinition = load_study(name)
        for key, part in self.definition.parts.items():
            self.planned(key)
            check_comparisons(key, part, self._specs(key))

    def planned(self, part: str) -> list[PlannedRun]:
        """The runs of a part.

        Raises:
            ConfigError: There is no such part.
        """
        records = self.results / f"{self.name}-runs"
        runs = [plan_run(self.definition, spec, records) for spec in self._specs(part)]
        needed = {name for run in runs if not run.finished for name in run.spec.needs}
        return [replace(run, finished=run.here) if run.spec.name in needed else run for run in runs]

    def _specs(self, part: str) -> list[RunSpec]:
        return self.definition.runs(part, self.output, self.samples)

    def overview(self, parts: Sequence[str], jobs: int) -> list[tuple[str, str, str, str]]:
        """For each part its name, its title, finished runs, and the time that the others take.

        Raises:
            ConfigError: There is no such part.
        """
        lines = []
        for name, (runs, missing) in self._missing(parts).items():
            finished = f"{sum(run.finished for run in runs)} of {len(runs)}"
            lines.append((name, self.definition.parts[name].title, finished, _time(missing, jobs)))
        return lines

    def _missing(
        self, parts: Iterable[str]
    ) -> dict[str, tuple[list[PlannedRun], list[PlannedRun]]]:
        """For each part its runs, and those to do that no earlier part does."""
        found, counted = {}, set[str]()
        for part in parts:
            runs = self.planned(part)
            missing = [run for run in runs if not (run.finished or run.spec.name in counted)]
            counted |= {run.spec.name for run in missing}
            found[part] = runs, missing
        return found

    def run(self, parts: Sequence[str], jobs: int, say: Callable[[str], None]) -> dict[str, str]:
        """Do parts, and write the report. What is finished has its record at once.

        Args:
            parts: Their names.
            jobs: Runs at a time, one process and one thread each.
            say: Told of the progress.

        Returns:
            Why runs failed, by their names.

        Raises:
            ConfigError: There is no such part.
        """
        waiting: list[PlannedRun] = []
        for part, (runs, missing) in self._missing(parts).items():
            say(
                f"{part}: {self.definition.parts[part].title}. {len(missing)} of {len(runs)} runs "
                f"to do, about {_time(missing, jobs)}"
            )
            waiting += missing
        failures = execute(longest_first(waiting), jobs, say, self._do)
        say(f"The report is in {self.report(without=failures)}")
        return failures

    def _do(self, run: PlannedRun) -> str | None:
        failure = run_in_a_process(run, self.output / "logs")
        if failure is None:
            _recorded(run)
        return failure

    def report(self, without: Collection[str] = ()) -> Path:
        """Write records and the report of everything that is finished; return the Markdown file.

        Args:
            without: Names of runs that count as not finished.
        """
        found, loaded = {}, dict[str, FinishedRun]()
        for name, part in self.definition.parts.items():
            runs = self.planned(name)
            there = [run for run in runs if run.here or run.record.exists()]
            finished = [run for run in there if run.spec.name not in without]
            for run in finished:
                if run.spec.name not in loaded:
                    loaded[run.spec.name] = _recorded(run)
            missing = [run.spec.name for run in runs if run not in finished]
            found[name] = PartResults(part, [loaded[run.spec.name] for run in finished], missing)
        return write_study(self.results, self.name, self.definition, found)


def _recorded(run: PlannedRun) -> FinishedRun:
    """A finished run as its record has it, written now if it is new.

    From the record even where the run is here, so that the report is the same on every machine.
    """
    kept = load_record(run.record) if run.record.exists() else None
    # Images are read, and records written, only once: the same record may have other bytes.
    if kept is not None and not (run.here and read_report(run.folder) != kept.report):
        return kept
    save_record(run.record, load_run(run.folder))
    return load_record(run.record)


def _time(runs: Sequence[PlannedRun], jobs: int) -> str:
    return duration(sum(run.seconds for run in runs) / jobs) if runs else "no time"
