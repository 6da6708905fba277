"""Mistakes in what a study compares, found before hours of runs."""

from collections.abc import Iterable
from typing import Any

from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes import find_recipe
from tdq_plugin.studies.definition import Part, RunSpec
from tdq_plugin.studies.results import group_name

__all__ = ["check_comparisons"]


def check_comparisons(name: str, part: Part, specs: Iterable[RunSpec]) -> None:
    """See that a part's runs have the setting of `group_by` and the methods of `ratios`.

    Args:
        name: Of the part.
        part: What compares the runs.
        specs: Its runs, whose settings the recipes take.

    Raises:
        ConfigError: They have not.
    """
    titles: dict[str, None] = {}
    for spec in specs:
        config: Any = find_recipe(spec.recipe).configure(spec.overrides)
        # Others have no rows to compare.
        if hasattr(config, "rows"):
            group_name(part, spec.name, config.model_dump(mode="json"))
            titles |= dict.fromkeys(config.rows.values())
    unknown = sorted({title for pair in part.ratios for title in pair} - titles.keys())
    if unknown:
        raise ConfigError(f"ratios of {name!r}: {unknown} are none of {', '.join(titles)}.")
