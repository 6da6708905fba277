"""One study through a real recipe, from the command line, and again."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tdq_plugin.cli import app
from tdq_plugin.errors import ConfigError
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
    good = {"recipe": "ddim-digits-qat", "name": "good", "settings": {"methods": ["tdq"]}}
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


def test_a_study_from_the_command_line(study_file: Path) -> None:
    """A process of its own imports the frameworks and trains, so this takes its seconds."""
    code, out, _ = tdq_study(study_file, "--list")
    assert code == 0
    assert "good         Good. Finished: 0 of 1 runs; the others take 2 min." in out
    assert not (study_file.parent / "runs").exists()
    code, out, _ = tdq_study(study_file, "--jobs", "2")
    assert code == 0
    assert "good: Good. 1 of 1 runs to do, about 1 min" in out
    assert "[1/1] good (done)" in out
    text = (study_file.parent / "runs" / "tiny.md").read_text()
    assert "| TDQ | simulated |" in text
    assert "Not finished" not in text
    assert len(list((study_file.parent / "runs" / "tiny").glob("good-*.png"))) == 2


def test_a_restart_does_only_what_is_missing(study_file: Path) -> None:
    rows = study_file.parent / "runs" / "good" / "rows"
    before = {path: path.stat().st_mtime_ns for path in rows.iterdir()}
    code, out, _ = tdq_study(study_file, "--part", "good")
    assert code == 0
    assert "good: Good. 0 of 1 runs to do, about no time" in out
    assert {path: path.stat().st_mtime_ns for path in rows.iterdir()} == before


def test_only_the_report(study_file: Path, tmp_path: Path) -> None:
    code, out, _ = tdq_study(study_file, "--report", "--results", str(tmp_path))
    assert (code, out.replace("\n", "")) == (0, f"The report is in {tmp_path / 'tiny.md'}")


def test_a_folder_belongs_to_one_study(study_file: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"good holds a run with other settings: evaluation=.*another --output"
    ):
        Study(str(study_file), study_file.parent / "runs", samples=200)


def test_a_part_that_is_not_there(study_file: Path) -> None:
    code, _, err = tdq_study(study_file, "--part", "goood")
    assert (code, err.strip()) == (1, "error: part = 'goood' is none of good.")
