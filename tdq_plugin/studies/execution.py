"""Do the runs of a study: several at a time, one thread and one process each."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes import find_recipe
from tdq_plugin.recipes.run_state import differences, read_settings
from tdq_plugin.studies.definition import Cost, RunSpec, StudyDefinition
from tdq_plugin.studies.records import load_record, portable

__all__ = [
    "PlannedRun",
    "duration",
    "execute",
    "longest_first",
    "plan_run",
    "run_in_a_process",
]


@dataclass(frozen=True)
class PlannedRun:
    """A run of a study.

    Attributes:
        spec: What it is.
        folder: Where it runs.
        record: What is kept of it once it is finished, here or on another machine.
        seconds: That it is expected to take.
        here: Whether its folder is there and finished.
        finished: Whether it needs not be done any more.
    """

    spec: RunSpec
    folder: Path
    record: Path
    seconds: float
    here: bool
    finished: bool


def plan_run(definition: StudyDefinition, spec: RunSpec, records: Path) -> PlannedRun:
    """Check a run's settings and see whether it is finished.

    Args:
        definition: The study.
        spec: The run.
        records: Folder with the records of finished runs.

    Raises:
        ConfigError: The recipe does not take the settings, or its folder or its record are those of
            another run.
    """
    try:
        config = find_recipe(spec.recipe).configure(spec.overrides)
    except ConfigError as error:
        raise ConfigError(f"Run {spec.name!r}: {error}") from None
    folder = config.run_folder
    path = folder / "config.json"
    wanted = portable(config.model_dump(mode="json"))
    if path.exists():
        known = portable(read_settings(path))
        remedy = "Remove the folder, or choose another --output."
        _check_same(f"{folder} holds a run", known, wanted, remedy)
    seconds = _expected_seconds(definition.costs[spec.recipe], config)
    record, here = records / f"{spec.name}.safetensors", (folder / "report.json").exists()
    if record.exists() and not here:
        known = dict(load_record(record).config)
        remedy = "Remove the file, or choose another --results."
        _check_same(f"{record} is of a run", known, wanted, remedy)
    return PlannedRun(spec, folder, record, seconds, here, here or record.exists())


def longest_first(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Order runs so that no long one, nor one that waits for another, is alone at the end.

    Args:
        runs: Any runs; the time of one that is needed counts with the longest that needs it.
    """

    def seconds(run: PlannedRun) -> float:
        after = [other.seconds for other in runs if run.spec.name in other.spec.needs]
        return run.seconds + max(after, default=0.0)

    return sorted(runs, key=seconds, reverse=True)


def execute(
    runs: Sequence[PlannedRun],
    jobs: int,
    say: Callable[[str], None],
    do: Callable[[PlannedRun], str | None],
) -> dict[str, str]:
    """Do all runs that are not finished; one that fails does not stop the others.

    Args:
        runs: In the order of their start.
        jobs: Runs at a time.
        say: Told of every run that ends.
        do: Does a run and returns why it failed, `run_in_a_process` with a folder; an exception
            is a failure, too.

    Returns:
        Why runs failed, by their names.
    """
    waiting = [run for run in runs if not run.finished]
    progress, failures = _Progress(waiting, jobs, say), dict[str, str]()
    running: dict[Future[str | None], PlannedRun] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            pending = {run.spec.name for run in (*waiting, *running.values())}
            ready = [run for run in waiting if not pending & set(run.spec.needs)]
            for run in ready[: jobs - len(running)]:
                waiting.remove(run)
                running[pool.submit(do, run)] = run
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run, error = running.pop(future), future.exception()
                failure = f"{type(error).__name__}: {error}" if error else future.result()
                if failure is not None:
                    failures[run.spec.name] = failure
                progress.ended(run, failure)
    return failures


def duration(seconds: float) -> str:
    """Seconds as people say them.

    Example:
        >>> duration(29), duration(100), duration(5000)
        ('1 min', '2 min', '1 h 23 min')
    """
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _check_same(found: str, known: dict[str, Any], wanted: dict[str, Any], remedy: str) -> None:
    shown = differences(known, wanted)
    if shown:
        raise ConfigError(f"{found} with other settings: {shown}. {remedy}")


class _Progress:
    """Tells how many runs have ended, and the time left by how fast they were."""

    def __init__(self, runs: Sequence[PlannedRun], jobs: int, say: Callable[[str], None]) -> None:
        self.count, self.left = len(runs), sum(run.seconds for run in runs)
        self.jobs, self.say = jobs, say
        self.start, self.ended_runs, self.ended_seconds = time.monotonic(), 0, 0.0

    def ended(self, run: PlannedRun, failure: str | None) -> None:
        self.ended_runs += 1
        self.left -= run.seconds
        self.ended_seconds += run.seconds
        measured = (time.monotonic() - self.start) * self.jobs / self.ended_seconds
        left = f"about {duration(self.left * measured / self.jobs)} left" if self.left else "done"
        outcome = "" if failure is None else f" FAILED: {failure}"
        self.say(f"[{self.ended_runs}/{self.count}] {run.spec.name}{outcome} ({left})")


def run_in_a_process(run: PlannedRun, logs: Path) -> str | None:
    """Do one run, its output in a file of the folder `logs`; return why it failed."""
    log = logs / f"{run.spec.name}.log"
    logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tdq_plugin.studies.worker", run.spec.recipe]
    with log.open("a") as output:
        # The worker ends when this pipe closes, so that none outlives a killed study.
        process = subprocess.Popen(
            [*command, *run.spec.overrides],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        code = process.wait()
    if code == 0:
        return None
    lines = log.read_text(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return f"exit code {code}: {last} (see {log})"


def _expected_seconds(cost: Cost, config: Any) -> float:
    if not hasattr(config, "methods"):
        return cost.start
    fitted_on = len(config.correction.methods) * config.correction.denoised
    images = len(config.rows) * config.evaluation.samples + fitted_on
    training = len(config.methods) * cost.method
    return float(cost.start + training + images * config.steps * cost.step)
