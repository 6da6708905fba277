"""Parts of `report.json` that the recipes share."""

import json
import platform
import shlex
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
import yaml

from tdq_plugin.observe import Observation
from tdq_plugin.recipes import find_recipe
from tdq_plugin.recipes.config import RecipeConfig
from tdq_plugin.study import temporal_dynamics

__all__ = ["command", "dynamics", "versions"]


def command(recipe: str, config: RecipeConfig) -> str:
    """The recipe with every setting that differs from its file, wherever the results go."""
    usual = dict(_leaves(find_recipe(recipe).configure().model_dump(mode="json")))
    chosen = _leaves(config.model_dump(mode="json", exclude={"output"}))
    overrides = [f"{key}={_yaml(value)}" for key, value in chosen if usual.get(key) != value]
    return shlex.join(["tdq", "run", recipe, *overrides])


def versions(*packages: str) -> dict[str, str]:
    """Versions of python and of the packages."""
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def dynamics(observations: dict[str, Observation]) -> dict[str, Any]:
    """How much the float model's activations move over t."""
    timesteps = next(iter(observations.values())).timesteps
    deviations = torch.stack([seen.deviation for seen in observations.values()])
    ranges = torch.stack(
        [seen.values.abs().quantile(0.999, dim=1) for seen in observations.values()]
    )
    found: dict[str, Any] = temporal_dynamics(timesteps, deviations, ranges).as_dict()
    return found


def _leaves(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) and _is_plain(value) else json.dumps(value)


def _is_plain(text: str) -> bool:
    # Some texts are others in YAML, `no`, `2026`, nothing at all, or not valid, `{bits}-mine`.
    try:
        return bool(yaml.safe_load(text) == text)
    except yaml.YAMLError:
        return False
