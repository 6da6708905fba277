"""Mistakes in what a study compares, found before hours of runs."""

from collections.abc import Iterable, Iterator
from typing import Any

from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes import find_recipe
from tdq_plugin.studies.definition import Part, RunSpec
from tdq_plugin.studies.results import group_name, same_draw

__all__ = ["check_comparisons"]


def check_comparisons(name: str, part: Part, specs: Iterable[RunSpec]) -> None:
    """See that a part's runs have the setting of `group_by` and the methods of `ratios`.

    Args:
        name: Of the part.
        part: What compares the runs.
        specs: Its runs, whose settings the recipes take.

    Raises:
        ConfigError: They have not, or two runs of a group have the same method with the same seed.
    """
    titles: dict[str, None] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for spec in specs:
        config: Any = find_recipe(spec.recipe).configure(spec.overrides)
        # Others have no rows to compare.
        if hasattr(config, "rows"):
            group = group_name(part, spec.name, config.model_dump(mode="json"))
            titles |= dict.fromkeys(config.rows.values())
            for kind, title in _methods(config):
                other = seen.setdefault((group, config.seed, kind, title), spec.name)
                if other != spec.name:
                    raise ConfigError(same_draw(spec.name, other, title, config.seed))
    unknown = sorted({title for pair in part.ratios for title in pair} - titles.keys())
    if unknown:
        raise ConfigError(f"ratios of {name!r}: {unknown} are none of {', '.join(titles)}.")


def _methods(config: Any) -> Iterator[tuple[str, str]]:
    """How a run's methods are run, as far as its configuration tells, and their titles."""
    kinds = ("int8_methods", "fake_methods") if hasattr(config, "int8_methods") else ("methods",)
    for kind in kinds:
        for method in getattr(config, kind):
            yield f"{config.adapter}, {kind}", config.rows[method]
