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
from tdq_plugin.studies.definition import RunSpec

pytestmark = pytest.mark.whole


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


@pytest.fixture(scope="module")
def runs(study_file: Path) -> Path:
    """The folder of the finished runs."""
    folder = study_file.parent / "runs"
    for run in Study(str(study_file), folder).planned("good"):
        do(run.spec)
    return folder


def do(run: RunSpec) -> None:
    recipe = find_recipe(run.recipe)
    recipe.run(recipe.configure(run.overrides))


def tdq_study(study_file: Path, runs: Path, *options: str) -> tuple[int, str, str]:
    arguments = ["study", str(study_file), "--output", str(runs), *options]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})
    return result.exit_code, result.stdout, result.stderr


def test_the_parts_of_a_study(study_file: Path, tmp_path: Path) -> None:
    code, out, _ = tdq_study(study_file, tmp_path / "runs", "--list")
    assert code == 0
    assert "good         Good. Finished: 0 of 2 runs; the others take 3 min." in out
    assert not (tmp_path / "runs").exists()


def test_a_restart_does_only_what_is_missing(study_file: Path, runs: Path) -> None:
    folders = [runs / f"good-{seed}" for seed in (0, 1)]
    before = [times(folder) for folder in folders]
    code, out, _ = tdq_study(study_file, runs, "--part", "good")
    assert code == 0
    assert "good: Good. 0 of 2 runs to do, about no time" in out
    assert [times(folder) for folder in folders] == before
    text = (runs / "tiny.md").read_text()
    assert "| TDQ | int8 kernels |" in text
    assert all(f"| good-{seed} | `tdq run" in text for seed in (0, 1))
    assert "Not finished" not in text
    assert len(list((runs / "tiny").glob("good-*.png"))) == 2


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on(study_file: Path, tmp_path: Path) -> None:
    """Two processes import the frameworks one after the other, so this takes its seconds."""
    do(Study(str(study_file), tmp_path).planned("good")[0].spec)
    finished = times(tmp_path / "good-0")
    kill_while_it_runs(study_file, tmp_path)
    assert not (tmp_path / "good-1" / "report.json").exists()
    code, out, _ = tdq_study(study_file, tmp_path, "--jobs", "2")
    assert code == 0
    assert "good: Good. 1 of 2 runs to do, about 1 min" in out
    assert "[1/1] good-1 (done)" in out
    assert times(tmp_path / "good-0") == finished
    assert "Not finished" not in (tmp_path / "tiny.md").read_text()


def kill_while_it_runs(study_file: Path, runs: Path) -> None:
    """Start a study, and kill it when its worker has begun; the worker ends, too."""
    command = [sys.executable, "-c", "from tdq_plugin.cli import main; main()", "study"]
    command += [str(study_file), "--output", str(runs)]
    conductor = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        workers = psutil.Process(conductor.pid).children
        wait_for(lambda: len(workers()) == 1 and workers()[0].num_threads() > 1, conductor)
        (worker,) = workers()
    finally:
        conductor.kill()
        conductor.wait()
    wait_for(lambda: has_ended(worker))


def wait_for(condition: Callable[[], bool], process: subprocess.Popen | None = None) -> None:
    start = time.monotonic()
    while not condition():
        assert process is None or process.poll() is None, "it ended before it was killed"
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


def test_only_the_report(study_file: Path, runs: Path, tmp_path: Path) -> None:
    code, out, _ = tdq_study(study_file, runs, "--report", "--results", str(tmp_path))
    assert (code, out.replace("\n", "")) == (0, f"The report is in {tmp_path / 'tiny.md'}")


def test_what_is_recorded_elsewhere_is_not_done_again(
    study_file: Path, runs: Path, tmp_path: Path
) -> None:
    results, elsewhere = tmp_path / "results", tmp_path / "elsewhere"
    tdq_study(study_file, runs, "--report", "--results", str(results))
    written = {path.name: path.read_bytes() for path in files(results)}
    tdq_study(study_file, runs, "--report", "--results", str(results))
    assert {path.name: path.read_bytes() for path in files(results)} == written
    code, out, _ = tdq_study(study_file, elsewhere, "--results", str(results))
    assert code == 0
    assert "good: Good. 0 of 2 runs to do, about no time" in out
    assert {path.name: path.read_bytes() for path in files(results)} == written
    assert {"good-0.safetensors", "good-1.safetensors", "tiny.md", "tiny.json"} <= written.keys()
    assert not any(path.is_dir() for path in elsewhere.glob("good-*"))


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_run_that_another_reads_is_done_where_that_one_runs(
    study_file: Path, runs: Path, tmp_path: Path
) -> None:
    content = yaml.safe_load(study_file.read_text())
    again = {"methods": ["tdq"], "seed": 0, "steps": 2, "trained": "{runs}/good-0"}
    again = {"recipe": "ddim-digits-qat", "name": "again", "settings": again, "needs": ["good-0"]}
    content["parts"]["good"]["runs"].append(again)
    content["parts"]["good"]["group_by"] = "steps"
    needing = tmp_path / "tiny.yaml"
    needing.write_text(yaml.safe_dump(content, sort_keys=False))
    tdq_study(study_file, runs, "--report", "--results", str(tmp_path))
    here = Study(str(needing), runs, results=tmp_path).planned("good")
    assert [run.finished for run in here] == [True, True, False]
    elsewhere = Study(str(needing), tmp_path / "elsewhere", results=tmp_path).planned("good")
    assert [run.finished for run in elsewhere] == [False, True, False]


def test_records_belong_to_one_study(study_file: Path, runs: Path, tmp_path: Path) -> None:
    tdq_study(study_file, runs, "--report", "--results", str(tmp_path))
    message = r"is of a run with other settings: evaluation\.samples=100, not 200. .*--results"
    with pytest.raises(ConfigError, match=message):
        Study(str(study_file), tmp_path / "elsewhere", samples=200, results=tmp_path)


def test_a_folder_belongs_to_one_study(study_file: Path, runs: Path) -> None:
    message = r"holds a run with other settings: evaluation\.samples=100, not 200. .*--output"
    with pytest.raises(ConfigError, match=message):
        Study(str(study_file), runs, samples=200)


def test_a_folder_may_be_written_in_another_way(
    study_file: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs.parent)
    finished = Study(str(study_file), Path(runs.name)).planned("good")
    assert [run.finished for run in finished] == [True, True]


def test_a_folder_of_pictures_may_hold_more(study_file: Path, runs: Path, tmp_path: Path) -> None:
    notes, stale = tmp_path / "tiny" / "notes.txt", tmp_path / "tiny" / "good-old-W4A4.png"
    notes.parent.mkdir()
    notes.write_text("precious")
    stale.write_bytes(b"")
    tdq_study(study_file, runs, "--report", "--results", str(tmp_path))
    assert notes.read_text() == "precious"
    assert not stale.exists()
    assert list(notes.parent.glob("good-*.png"))


def test_a_part_that_is_not_there(study_file: Path, tmp_path: Path) -> None:
    code, _, err = tdq_study(study_file, tmp_path, "--part", "goood")
    assert (code, err.strip()) == (1, "error: part = 'goood' is none of good.")
    code, _, err = tdq_study(study_file, tmp_path, "--part", "goood", "--list")
    assert (code, err.strip()) == (1, "error: part = 'goood' is none of good.")


def test_a_report_has_every_part(study_file: Path, tmp_path: Path) -> None:
    code, _, err = tdq_study(study_file, tmp_path, "--part", "good", "--report")
    assert code == 1
    assert err.startswith("error: --part good with --report: the report has every part, with what")
