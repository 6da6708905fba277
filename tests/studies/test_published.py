"""The results that are committed belong to the studies that are shipped."""

from pathlib import Path

import pytest

from tdq_plugin.studies.conduct import Study
from tdq_plugin.studies.definition import STUDIES

PUBLISHED = Path(__file__).parents[2] / "studies"


@pytest.mark.parametrize("name", STUDIES)
def test_published_runs_are_those_of_the_study(name: str, tmp_path: Path) -> None:
    """A record of other settings is refused, so a changed default of a recipe shows here, too."""
    study = Study(name, tmp_path, results=PUBLISHED)
    runs = [run for part in study.definition.parts for run in study.planned(part)]
    records = set((PUBLISHED / f"{name}-runs").iterdir())
    assert records
    assert records <= {run.record for run in runs}
