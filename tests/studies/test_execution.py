"""The order of runs, failures, and a worker whose study has gone."""

import subprocess
import sys
import time
from pathlib import Path
from threading import Lock

import pytest

from tdq_plugin.errors import ConfigError
from tdq_plugin.studies.definition import RunSpec, load_study
from tdq_plugin.studies.execution import (
    PlannedRun,
    execute,
    longest_first,
    plan_run,
    run_in_a_process,
)
from tdq_plugin.studies.worker import STUDY_GONE


def planned(
    name: str, needs: tuple[str, ...] = (), finished: bool = False, seconds: float = 60.0
) -> PlannedRun:
    spec = RunSpec(recipe="any", name=name, settings={}, needs=list(needs))
    return PlannedRun(spec, Path(name), Path("record"), seconds, finished, finished)


@pytest.mark.parametrize("jobs", [1, 2, 4])
def test_what_is_needed_is_done_first_and_no_more_than_jobs_at_a_time(jobs: int) -> None:
    runs = [planned("a"), planned("c", needs=("a",)), planned("b"), planned("d", needs=("b", "c"))]
    now, most, order, lock = 0, 0, [], Lock()

    def do(run: PlannedRun) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
            assert set(run.spec.needs) <= set(order)
        time.sleep(0.02)
        with lock:
            now -= 1
            order.append(run.spec.name)

    assert execute(runs, jobs, str, do) == {}
    assert sorted(order) == ["a", "b", "c", "d"]
    assert most == min(jobs, 2)


def test_long_runs_and_those_that_long_ones_wait_for_start_first() -> None:
    runs = [planned("a"), planned("b", seconds=90), planned("c"), planned("d", ("c",), seconds=80)]
    assert [run.spec.name for run in longest_first(runs)] == ["c", "b", "d", "a"]


def test_a_failure_is_told_and_does_not_stop_the_others() -> None:
    said: list[str] = []
    runs = [planned("a"), planned("b", finished=True), planned("c")]
    failures = execute(runs, 1, said.append, lambda run: "broken" if run.spec.name == "a" else None)
    assert failures == {"a": "broken"}
    assert said == ["[1/2] a FAILED: broken (about 1 min left)", "[2/2] c (done)"]


def test_the_failure_of_a_process_is_the_last_line_of_its_log(tmp_path: Path) -> None:
    failure = run_in_a_process(planned("a"), tmp_path / "logs")
    assert failure is not None
    assert failure.startswith("exit code 1: No recipe is called 'any'. Recipes: ddim-digits-ptq,")
    assert failure.endswith(f"(see {tmp_path / 'logs' / 'a.log'})")


def test_a_mistake_in_the_settings_names_the_run(tmp_path: Path) -> None:
    spec = RunSpec(recipe="ddim-digits-qat", name="a", settings={"steps": 1}, needs=[])
    with pytest.raises(ConfigError, match=r"^Run 'a': steps = 1: Input should be greater than or"):
        plan_run(load_study("digits"), spec, tmp_path)


def test_a_worker_ends_with_the_study_that_started_it() -> None:
    command = [sys.executable, "-m", "tdq_plugin.studies.worker", "digits-classifier"]
    worker = subprocess.Popen([*command, "epochs=100000"], stdin=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        worker.wait(0.2)
    assert worker.stdin is not None
    worker.stdin.close()
    assert worker.wait(60) == STUDY_GONE
