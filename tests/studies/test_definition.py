"""A study's definition: what the shipped one says, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes import find_recipe
from tdq_plugin.recipes.config import ASSETS
from tdq_plugin.studies import conduct
from tdq_plugin.studies.conduct import Study
from tdq_plugin.studies.definition import STUDIES, load_study
from tdq_plugin.studies.execution import PlannedRun


def content() -> dict[str, Any]:
    group = {
        "recipe": "ddim-digits-qat",
        "name": "{bits}-{methods}-{seed}",
        "settings": {"steps": 10, "trained": "{runs}/other", "model": "{recipes}/assets/mine"},
        "vary": {"bits": ["W4A4", "W8A4"], "seed": [0, 1], "methods": [["lsq", "tdq"]]},
    }
    return {
        "title": "Demo",
        "introduction": [],
        "settings": {"ddim-digits-qat": {"evaluation.samples": 5000, "steps": 20}},
        "costs": {"ddim-digits-qat": {"start": 1, "method": 2, "step": 0}},
        "parts": {
            "one": {
                "title": "One",
                "question": "?",
                "paper": "-",
                "runs": [group],
                "group_by": "bits",
            },
        },
    }


def write(tmp_path: Path, values: dict[str, Any]) -> str:
    path = tmp_path / "demo.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return str(path)


def test_a_group_is_a_run_for_every_combination(tmp_path: Path) -> None:
    runs = load_study(write(tmp_path, content())).runs("one", Path("runs"))
    assert [run.name for run in runs] == [
        "W4A4-lsq-tdq-0", "W4A4-lsq-tdq-1", "W8A4-lsq-tdq-0", "W8A4-lsq-tdq-1"
    ]  # fmt: skip
    assert runs[-1].overrides == [
        "evaluation.samples=5000",
        "steps=10",
        'trained="runs/other"',
        f'model="{ASSETS}/mine"',
        'bits="W8A4"',
        "seed=1",
        'methods=["lsq", "tdq"]',
        'name="W8A4-lsq-tdq-1"',
        'output="runs"',
    ]
    config: Any = find_recipe(runs[-1].recipe).configure(runs[-1].overrides)
    assert (config.bits, config.steps, config.methods) == ("W8A4", 10, ["lsq", "tdq"])
    assert config.run_folder == Path("runs/W8A4-lsq-tdq-1")


def test_samples_replace_those_of_every_recipe_that_draws(tmp_path: Path) -> None:
    values = content()
    (group,) = values["parts"]["one"]["runs"]
    nowhere = {**group, "recipe": "ddim-digits-ptq", "name": "ptq", "settings": {}, "vary": {}}
    none = {**nowhere, "recipe": "ddim-digits-ranges", "name": "ranges"}
    values["parts"]["one"]["runs"] += [nowhere, none]
    cost = {"start": 1, "method": 2, "step": 0}
    values["costs"] |= {"ddim-digits-ptq": cost, "ddim-digits-ranges": cost}
    del values["settings"]["ddim-digits-qat"]["evaluation.samples"]
    group["settings"]["evaluation.samples"] = 5000
    runs = load_study(write(tmp_path, values)).runs("one", Path(), samples=100)
    samples = {run.name: run.settings.get("evaluation.samples") for run in runs}
    assert samples.pop("ranges") is None
    assert len(samples) == 5
    assert set(samples.values()) == {100}


@pytest.mark.parametrize("name", STUDIES)
def test_the_recipes_take_all_runs_of_the_shipped_studies(name: str) -> None:
    study = load_study(name)
    for part in study.parts:
        for run in study.runs(part, Path("runs")):
            config = find_recipe(run.recipe).configure(run.overrides)
            assert config.run_folder == Path("runs") / run.name


def test_the_digits_study_shares_runs_between_parts() -> None:
    study = load_study("digits")
    names = {part: {run.name for run in study.runs(part, Path())} for part in study.parts}
    trained = {"qat", "qat_gains", "qat_slower", "intervals", "generator", "steps", "training"}
    assert {"ranges", "ptq", "zero_point", "longer", "gains", *trained} == set(names)
    both = {"ptq-W8A4-zero-point-seed0", "ptq-W8A4-zero-point-seed1"}
    assert names["zero_point"] & names["longer"] == both
    assert names["training"] <= names["steps"] & names["qat"] & names["generator"]
    seeds = {run.settings["seed"] for run in study.runs("qat", Path()) if "W4A4" in run.name}
    assert seeds == {0, 1, 2}


def changed(path: str, value: Any) -> Any:
    def change(values: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            values = values[int(parent)] if isinstance(values, list) else values[parent]
        values[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("titel", "x"), r"^Unknown key 'titel'. Known keys: costs, introduction, parts,"),
        (
            changed("parts.one.figure", []),
            r"^Unknown key 'parts.one.figure'. Known keys: figures, group_by, paper, question,",
        ),
        (
            changed("parts.one.runs.0.seeds", [1]),
            r"^Unknown key 'parts.one.runs.0.seeds'. Known keys: name, needs, recipe, settings,",
        ),
        (changed("parts.one.figures", ["pie"]), r"^parts.one.figures.0 = 'pie': Input should be"),
        (
            changed("parts.one.figures", ["steps"]),
            r"^'one': the figure 'steps' needs group_by: steps",
        ),
        (changed("parts", {}), r"^parts = \{\}: Dictionary should have at least 1 item"),
        (changed("costs", {}), r"^costs has no entry for 'ddim-digits-qat'\. Give it start,"),
        (
            changed("settings.ddim-qat", {}),
            r"^settings: no part runs \['ddim-qat'\], but \['ddim-d",
        ),
        (
            changed("parts.one.runs.0.recipe", "ddim-digit-qat"),
            r"^No recipe is called 'ddim-digit-qat'\. Did you mean 'ddim-digits-qat'",
        ),
        (
            changed("parts.one.runs.0.needs", ["other"]),
            r"^'W4A4-lsq-tdq-0' needs \['other'\], which is no earlier run of 'one'",
        ),
        (
            changed("parts.one.runs.0.name", "{bits}"),
            r"^Two runs are called 'W4A4' and have other settings. Put what differs into the name",
        ),
    ],
)
def test_mistakes(tmp_path: Path, change: Any, message: str) -> None:
    values = content()
    change(values)
    with pytest.raises(ConfigError, match=message):
        load_study(write(tmp_path, values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            changed("parts.one.group_by", "bits.x"),
            r"^group_by = 'bits\.x' is no setting of W4A4-lsq-tdq-0",
        ),
        (
            changed("parts.one.ratios", [["TDQ", "PACT"]]),
            r"^ratios of 'one': \['PACT'\] are none of static LSQ, TDQ\.",
        ),
        (
            changed("parts.one.group_by", "steps"),
            r"^W8A4-lsq-tdq-0 and W4A4-lsq-tdq-0 both have 'static LSQ' with seed 0\. Set group_by",
        ),
    ],
)
def test_mistakes_in_what_is_compared_show_before_the_runs(
    tmp_path: Path, change: Any, message: str
) -> None:
    values = content()
    change(values)
    with pytest.raises(ConfigError, match=message):
        Study(write(tmp_path, values), tmp_path / "runs")


@pytest.mark.parametrize("name", STUDIES)
def test_the_shipped_studies_compare_what_they_run(name: str, tmp_path: Path) -> None:
    assert Study(name, tmp_path).definition.parts


def test_a_run_that_cannot_be_read_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave_half_a_run(run: PlannedRun, logs: Path) -> None:
        run.folder.mkdir(parents=True)
        (run.folder / "report.json").write_text("{}")

    monkeypatch.setattr(conduct, "run_in_a_process", leave_half_a_run)
    failures = Study(write(tmp_path, content()), tmp_path / "runs").run(["one"], 1, str)
    assert len(failures) == 4
    assert all("FileNotFoundError" in failure for failure in failures.values())
    assert "Not finished: W4A4-lsq-tdq-0, " in (tmp_path / "runs" / "demo.md").read_text()


def test_a_study_that_is_not_there() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^No study is called 'digit'. Studies: digits, learning-rates, models; or give",
    ):
        load_study("digit")


def test_a_file_that_is_no_yaml(tmp_path: Path) -> None:
    for content in (b"title: [", b"\xff\xfe"):
        (tmp_path / "demo.yaml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"demo.yaml is not YAML: "):
            load_study(str(tmp_path / "demo.yaml"))


def test_a_part_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"^part = 'pqt' is none of ranges, ptq, zero_point,"):
        load_study("digits").runs("pqt", Path())
