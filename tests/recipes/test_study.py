"""One study through a real recipe, from the command line, and again."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from typer.testing import CliRunner

from tdq_plugin.cli import app
from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes import find_recipe
from tdq_plugin.studies.conduct import Study


@pytest.fixture(scope="module")
def study_file(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = {
        "threads": 1,
        "steps": 4,
        "model": str(tiny_pipeline),
        "calibration.images": 4,
        "training.iterations": 2,
        "training.batch_size": 4,
        "scale_history": [0, 2],
        "evaluation.samples": 100,
        "evaluation.trajectories": 4,
    }
    good = {
        "recipe": "ddim-digits-qat",
        "name": "good-{seed}",
        "settings": {"methods": ["tdq"]},
        "vary": {"seed": [0, 1]},
    }
    content = {
        "title": "Tiny",
        "introduction": ["Tiny."],
        "settings": {"ddim-digits-qat": tiny},
        "costs": {"ddim-digits-qat": {"start": 60, "method": 30, "step": 0}},
        "parts": {
            "good": {
                "title": "Good",
                "question": "Does it run?",
                "paper": "not in it",
                "runs": [good],
                "group_by": "bits",
                "figures": ["errors", "training"],
            }
        },
    }
    path = tmp_path_factory.mktemp("study") / "tiny.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def tdq_study(study_file: Path, *options: str) -> tuple[int, str, str]:
    arguments = ["study", str(study_file), "--output", str(study_file.parent / "runs"), *options]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})
    return result.exit_code, result.stdout, result.stderr


def test_the_parts_of_a_study(study_file: Path) -> None:
    code, out, _ = tdq_study(study_file, "--list")
    assert code == 0
    assert "good         Good. Finished: 0 of 2 runs; the others take 3 min." in out
    assert not (study_file.parent / "runs").exists()


def test_a_study_that_is_killed_goes_on(study_file: Path) -> None:
    """Two processes import the frameworks one after the other, so this takes its seconds."""
    runs = study_file.parent / "runs"
    first, second = Study(str(study_file), runs).planned("good")
    recipe = find_recipe(first.spec.recipe)
    recipe.run(recipe.configure(first.spec.overrides))
    finished = times(first.folder)
    kill_while_it_runs(study_file)
    assert not (second.folder / "report.json").exists()
    code, out, _ = tdq_study(study_file, "--jobs", "2")
    assert code == 0
    assert "good: Good. 1 of 2 runs to do, about 1 min" in out
    assert "[1/1] good-1 (done)" in out
    assert times(first.folder) == finished
    text = (runs / "tiny.md").read_text()
    assert "| TDQ | simulated |" in text
    assert all(f"| {run.spec.name} | `tdq run" in text for run in (first, second))
    assert "Not finished" not in text
    assert len(list((runs / "tiny").glob("good-*.png"))) == 2


def kill_while_it_runs(study_file: Path) -> None:
    """Start a study, and kill it when its worker has begun; the worker ends, too."""
    command = [sys.executable, "-c", "from tdq_plugin.cli import main; main()", "study"]
    options = [str(study_file), "--output", str(study_file.parent / "runs")]
    conductor = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)
    try:
        workers = psutil.Process(conductor.pid).children
        wait_for(lambda: len(workers()) == 1 and workers()[0].num_threads() > 1)
        (worker,) = workers()
    finally:
        conductor.kill()
        conductor.wait()
    wait_for(lambda: has_ended(worker))


def wait_for(condition: Callable[[], bool]) -> None:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < 300
        time.sleep(0.01)


def has_ended(process: psutil.Process) -> bool:
    try:
        # Perhaps there is nobody to wait for an orphan.
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_restart_does_only_what_is_missing(study_file: Path) -> None:
    folders = [study_file.parent / "runs" / f"good-{seed}" for seed in (0, 1)]
    before = [times(folder) for folder in folders]
    code, out, _ = tdq_study(study_file, "--part", "good")
    assert code == 0
    assert "good: Good. 0 of 2 runs to do, about no time" in out
    assert [times(folder) for folder in folders] == before


def test_only_the_report(study_file: Path, tmp_path: Path) -> None:
    code, out, _ = tdq_study(study_file, "--report", "--results", str(tmp_path))
    assert (code, out.replace("\n", "")) == (0, f"The report is in {tmp_path / 'tiny.md'}")


def test_a_folder_belongs_to_one_study(study_file: Path) -> None:
    message = r"holds a run with other settings: evaluation\.samples=100, not 200. .*--output"
    with pytest.raises(ConfigError, match=message):
        Study(str(study_file), study_file.parent / "runs", samples=200)


def test_a_part_that_is_not_there(study_file: Path) -> None:
    code, _, err = tdq_study(study_file, "--part", "goood")
    assert (code, err.strip()) == (1, "error: part = 'goood' is none of good.")
