"""The report: what is written, what is refused, and a page that stands alone."""

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from tdq_plugin.errors import ConfigError
from tdq_plugin.study import temporal_dynamics, write_report
from tdq_plugin.study.figures import loss_curve

FIGURES = {"Loss": (loss_curve([1.0, 0.5]), "Falls & falls.")}


def row(method: str, trajectory: float | None, frechet: float, execution: str) -> dict[str, Any]:
    return {
        "method": method,
        "execution": execution,
        "trajectory_mse": trajectory,
        "step_mse": trajectory,
        "pixel_mse": trajectory,
        "frechet_distance": frechet,
        "frechet_distance_to_float": None,
        "samples": 2000,
        "feature_space": "64 features of a digit classifier",
    }


@pytest.fixture
def report() -> dict[str, Any]:
    still = torch.ones(2, 3)
    return {
        "recipe": "ddim-digits-ptq",
        "seed": 7,
        "bits": "W8A4",
        "versions": {"torch": "2.13.0"},
        "rows": [
            row("float", None, 1.0, "float32"),
            row("LSQ <static>", 0.0057, 8.1, "fake"),
            row("TDQ", 0.0048, 14.2, "int8"),
        ],
        "latency": {
            "float32": 1.7,
            "static_int8": 1.0,
            "tdq_int8": 1.01,
            "dynamic_int8": None,
            "unit": "ratio to static_int8",
        },
        "size_bytes": {"float32": 4_000_000, "int8": 1_000_000},
        "noise_floor": {"frechet_distance": 1.5},
        "temporal_dynamics": temporal_dynamics(torch.arange(3), still, 2 * still).as_dict(),
        "command": "tdq run ddim-digits-ptq",
        "private_note": [1, 2],
    }


class Page(HTMLParser):
    """Collects attributes that point elsewhere, and complains about tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.open: list[str] = []
        self.marked: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append("best" if ("class", "best") in attrs else tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() in (tag, "best")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "best":
            self.marked.append(data)


def test_json_round_trip_keeps_unknown_keys(tmp_path: Path, report: dict[str, Any]) -> None:
    page = write_report(tmp_path / "run", report, FIGURES)
    assert page == tmp_path / "run" / "report.html"
    written = json.loads((tmp_path / "run" / "report.json").read_text())
    assert written == json.loads(json.dumps(report))


def test_page_is_well_formed_and_needs_nothing_else(tmp_path: Path, report: dict[str, Any]) -> None:
    text = write_report(tmp_path, report, FIGURES).read_text()
    page = Page(text)
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert len(page.references) == 1
    for external in ("http:", "https:", "<script", "@import", "url("):
        assert external not in text


def test_page_marks_the_best_quantized_row_of_each_column(
    tmp_path: Path, report: dict[str, Any]
) -> None:
    marked = Page(write_report(tmp_path, report, {}).read_text()).marked
    assert marked == ["8.10", "0.00480", "0.00480", "0.00480"]


def test_of_the_classifier_score_the_highest_is_marked(
    tmp_path: Path, report: dict[str, Any]
) -> None:
    for row, score in zip(report["rows"], (9.8, 8.5, 9.1), strict=True):
        row["classifier_score"] = score
    assert "9.10" in Page(write_report(tmp_path, report, {}).read_text()).marked


def test_page_shows_every_row_the_floor_and_how_to_repeat_it(
    tmp_path: Path, report: dict[str, Any]
) -> None:
    text = re.sub(r"base64,[^\"]+", "", write_report(tmp_path, report, FIGURES).read_text())
    for expected in (
        "0.00570",
        "14.2",
        "Noise floor",
        "1.50",
        "4.00 times smaller",
        "tdq run ddim-digits-ptq",
        "Seed 7",
        "2.13.0",
        "Falls &amp; falls.",
        "LSQ &lt;static&gt;",
    ):
        assert expected in text
    assert "<static>" not in text


def test_columns_that_nobody_measured_are_left_out(tmp_path: Path, report: dict[str, Any]) -> None:
    text = write_report(tmp_path, report, {}).read_text()
    assert "Fréchet distance to float" not in text
    assert "Error at t" not in text


def without(key: str) -> Any:
    return lambda report: report.pop(key)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("rows"), "The report lacks rows"),
        (lambda r: r["rows"].clear(), "no rows"),
        (lambda r: r["rows"][1].pop("pixel_mse"), r"rows\[1\] lacks pixel_mse"),
        (lambda r: r["rows"][1].update(execution="gpu"), r"rows\[1\].execution = 'gpu'"),
        (lambda r: r["rows"][2].update(step_mse="low"), r"rows\[2\].step_mse = 'low'"),
        (lambda r: r["rows"][2].update(t0_mse=float("nan")), r"rows\[2\].t0_mse = nan"),
        (lambda r: r["latency"].pop("unit"), "latency lacks unit"),
        (lambda r: r["size_bytes"].pop("int8"), "size_bytes lacks int8"),
        (lambda r: r["size_bytes"].update(int8=0), "size_bytes.int8 = 0"),
        (lambda r: r.update(bits="4 bits"), "bits = '4 bits'"),
        (lambda r: r["noise_floor"].update(fid=1.0), "noise_floor.fid"),
        (lambda r: r["temporal_dynamics"].pop("std_ratio"), "temporal_dynamics lacks std_ratio"),
        (lambda r: r.update(extra={"a": [torch.ones(2)]}), r"extra.a\[0\] is a Tensor"),
    ],
)
def test_refused_reports_leave_the_old_files(
    tmp_path: Path, report: dict[str, Any], damage: Any, message: str
) -> None:
    write_report(tmp_path, report, FIGURES)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    broken = copy.deepcopy(report)
    damage(broken)
    with pytest.raises(ConfigError, match=message):
        write_report(tmp_path, broken, FIGURES)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
