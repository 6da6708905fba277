"""Tables, figures and files from runs whose numbers are known."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tdq_plugin.errors import ConfigError
from tdq_plugin.studies.definition import Part, StudyDefinition
from tdq_plugin.studies.report import PartResults, write_study
from tdq_plugin.studies.results import FinishedRun, groups_of
from tdq_plugin.studies.tables import methods_table, ratios_table


def part(**values: Any) -> Part:
    runs = [{"recipe": "ddim-digits-ptq", "name": "any"}]
    common = {"title": "Demo", "question": "Which is best?", "paper": "Table 2", "runs": runs}
    return Part.model_validate({**common, "group_by": "bits", **values})


def study(**values: Any) -> StudyDefinition:
    content = {"title": "Demo study", "introduction": ["An <introduction>."], "settings": {}}
    return StudyDefinition.model_validate(
        {**content, "costs": {}, "parts": {"demo": part(**values)}}
    )


def test_a_cell_is_mean_or_median_with_smallest_and_largest(three_draws: list[FinishedRun]) -> None:
    (group,) = groups_of(part(), three_draws)
    table = methods_table(group)
    rows = {row[0]: row for row in table.rows}
    error, distance = (
        table.header.index(name) for name in ("Trajectory error", "Fréchet distance to float")
    )
    assert rows["TDQ"][error] == "0.800 [0.600, 1.00]"
    assert rows["TDQ"][distance] == "4.00 [2.00, 9.00]"
    assert rows["static LSQ"][error] == "1.20 [1.00, 1.60]"
    assert rows["MinMax"][error] == "3.00"
    assert [rows[name][-1] for name in ("TDQ", "MinMax", "float32")] == ["3", "1", "3"]
    assert rows["*noise floor*"][distance] == "0.500"
    assert next(iter(rows)) == "float32"


def test_the_best_quantized_row_is_marked(three_draws: list[FinishedRun]) -> None:
    (group,) = groups_of(part(), three_draws)
    table = methods_table(group)
    marked = {(table.rows[y][0], table.header[x]) for y, x in table.best}
    assert {name for name, _ in marked} == {"TDQ"}
    assert ("TDQ", "Classifier score") in marked  # Higher is better there.


def test_ratios_are_paired_by_draw(three_draws: list[FinishedRun]) -> None:
    (group,) = groups_of(part(), three_draws)
    table = ratios_table(group, [("TDQ", "static LSQ"), ("TDQ", "MinMax")])
    assert table is not None
    rows = {(row[0], row[1]): row[2:] for row in table.rows}
    error = rows["TDQ / static LSQ, int8 kernels", "Trajectory error"]
    assert error[:2] == ["0.67", "0.80, 0.60, 0.62"]
    distance = rows["TDQ / static LSQ, int8 kernels", "Fréchet distance to float"]
    assert distance[:2] == ["0.80", "0.80, 0.50, 1.50"]
    assert rows["TDQ / MinMax, int8 kernels", "Trajectory error"] == ["0.27", "0.27", "–"]


def test_a_method_that_is_only_simulated_has_its_ratio(
    make_run: Callable[..., FinishedRun],
) -> None:
    methods = {
        "TDQ": ("tdq", "int8", 0.2, 1.0),
        "dynamic": ("dynamic", "fake", 0.4, 4.0),
    }
    (group,) = groups_of(part(), [make_run("one", "W4A4", 0, methods)])
    table = ratios_table(group, [("TDQ", "dynamic")])
    assert table is not None
    ratios = {(row[0], row[1]): row[2] for row in table.rows}
    title = "TDQ, int8 kernels / dynamic, simulated"
    assert ratios[title, "Trajectory error"] == "0.50"
    assert ratios[title, "Fréchet distance to float"] == "0.25"


def test_pictures_of_groups_with_any_name(
    make_run: Callable[..., FinishedRun], tmp_path: Path
) -> None:
    run = make_run("one", "W4A4", 0, {"TDQ": ("tdq", "int8", 0.2, 1.0)})
    run = replace(run, config={**run.config, "model": ["../mine (1)", "b"]})
    definition = study(figures=["errors"], group_by="model")
    found = {"demo": PartResults(definition.parts["demo"], [run], [])}
    text = write_study(tmp_path / "out", "demo", definition, found).read_text()
    assert "](demo/demo-errors-..-mine-1-b.png)" in text
    assert (tmp_path / "out" / "demo" / "demo-errors-..-mine-1-b.png").exists()


def test_bits_are_not_mixed(
    three_draws: list[FinishedRun], make_run: Callable[..., FinishedRun]
) -> None:
    other = make_run("other", "W8A8", 0, {"TDQ": ("tdq", "int8", 0.1, 0.2)})
    groups = {group.name: group for group in groups_of(part(), [*three_draws, other])}
    assert list(groups) == ["W4A4", "W8A8"]
    assert [method.title for method in groups["W8A8"].methods] == ["float32", "TDQ"]


def test_the_files_have_every_row_and_stand_alone(
    three_draws: list[FinishedRun], tmp_path: Path
) -> None:
    definition = study(figures=["distances", "errors", "samples"], ratios=[["TDQ", "static LSQ"]])
    found = {"demo": PartResults(definition.parts["demo"], three_draws, [])}
    path = write_study(tmp_path / "out", "demo", definition, found)
    text = path.read_text()
    for expected in (
        "# Demo study",
        "Which is best?",
        "| MinMax |",
        "0.800 [0.600, 1.00]",
        "2,000",
    ):
        assert expected in text
    pictures = re.findall(r"\]\((demo/[^)]+\.png)\)", text)
    assert len(pictures) == 3
    assert all((path.parent / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
    page = path.with_suffix(".html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "An &lt;introduction&gt;." in page
    assert not re.search(r"https?:|<script|url\(", re.sub(r"base64,[^\"]+", "", page))
    numbers = json.loads(path.with_suffix(".json").read_text())
    rows = {row["method"]: row for row in numbers["demo"]["groups"]["W4A4"]["rows"]}
    assert rows["TDQ"]["metrics"]["trajectory_mse"]["draws"] == {"0": 0.8, "1": 0.6, "2": 1.0}
    assert rows["TDQ"]["metrics"]["trajectory_mse"]["mean"] == pytest.approx(0.8)
    assert rows["MinMax"]["metrics"]["trajectory_mse"]["interval_95_of_mean"] is None


def test_an_unfinished_part_says_what_is_missing(
    three_draws: list[FinishedRun], tmp_path: Path
) -> None:
    definition = study(figures=["errors"], ratios=[["TDQ", "PACT"]])
    found = {"demo": PartResults(definition.parts["demo"], three_draws[:1], ["w4a4-1", "w4a4-2"])}
    text = write_study(tmp_path / "out", "demo", definition, found).read_text()
    assert "Not finished: w4a4-1, w4a4-2." in text
    assert "| MinMax |" in text
    nothing = {"demo": PartResults(definition.parts["demo"], [], ["w4a4-0"])}
    assert "none yet" in write_study(tmp_path / "out", "demo", definition, nothing).read_text()


def test_a_group_by_that_no_run_has(three_draws: list[FinishedRun]) -> None:
    with pytest.raises(ConfigError, match=r"group_by = 'training.rate' is no setting of w4a4-0"):
        groups_of(part(group_by="training.rate"), three_draws)


def test_the_same_method_and_seed_twice(
    three_draws: list[FinishedRun], make_run: Callable[..., FinishedRun]
) -> None:
    again = make_run("again", "W4A4", 0, {"TDQ": ("tdq", "int8", 0.1, 0.2)})
    (group,) = groups_of(part(), [*three_draws, again])
    with pytest.raises(ConfigError, match=r"again and w4a4-0 both have 'TDQ' with seed 0"):
        _ = group.methods
