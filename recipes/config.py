"""Recipe configurations: a pydantic model, a YAML file, and `key=value` overrides."""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo

from tdq_plugin.errors import ConfigError

__all__ = [
    "ASSETS",
    "CONFIG_FOLDER",
    "RECIPES",
    "RecipeConfig",
    "Section",
    "Seed",
    "filled_in",
    "load_config",
    "other_noise",
    "require_writable",
]

RECIPES = Path(__file__).parent
CONFIG_FOLDER = RECIPES / "configs"
# Small models that come with the package.
ASSETS = RECIPES / "assets"
MODEL_CONFIG = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
# Steps and places in a batch are added to multiples of it, which must stay below 2**63.
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class RecipeConfig(BaseModel):
    """What every recipe takes.

    Attributes:
        name: Folder below `output` that receives the results.
        output: Folder for all runs.
        seed: Every random draw of the recipe is a function of it.
        threads: Number of CPU threads that torch uses.
    """

    model_config = MODEL_CONFIG

    name: str
    output: Path = Path("runs")
    seed: Seed = 0
    threads: int = Field(default=2, ge=1)

    @property
    def run_folder(self) -> Path:
        """Where the results go."""
        return self.output / self.name

    @property
    def changeable(self) -> frozenset[str]:
        """Settings that may change while a run goes on, by dotted key; all others are the run's."""
        return frozenset({"output"})


class Section(BaseModel):
    """A part of a configuration that several recipes share."""

    model_config = MODEL_CONFIG


class _Seeded(Protocol):
    seed: int


Seeded = TypeVar("Seeded", bound=_Seeded)


def other_noise(evaluation: Seeded, info: ValidationInfo) -> Seeded:
    """A pydantic validator: the evaluation has another seed than the recipe.

    Raises:
        ValueError: It has not, so that calibration would see the noise of the test.
    """
    if evaluation.seed == info.data.get("seed"):
        raise ValueError("with the same seed, calibration would see the noise of the test")
    return evaluation


def filled_in(name: str, **values: Any) -> str:
    """A run's name with its `{placeholders}` filled in.

    Raises:
        ConfigError: A placeholder is none of the values.

    Example:
        >>> filled_in("run-{bits}", bits="W4A4")
        'run-W4A4'
    """
    try:
        return name.format(**values)
    except (KeyError, IndexError, ValueError):
        known = ", ".join(f"{{{key}}}" for key in values)
        raise ConfigError(f"name = {name!r}: only {known} are filled in.") from None


def require_writable(option: str, folder: Path) -> None:
    """See that a folder can be made and written to, before hours of work.

    Args:
        option: Where the user gave it, for the message.
        folder: It need not exist.

    Raises:
        ConfigError: It cannot.
    """
    above = [folder, *folder.absolute().parents]
    existing = next(path for path in above if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        problem = "cannot be written to" if existing.is_dir() else "is not a folder"
        raise ConfigError(
            f"{option} = {str(folder)!r}: {existing} {problem}. Choose another folder."
        )


Config = TypeVar("Config", bound=BaseModel)


def load_config(schema: type[Config], path: Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply overrides, and validate.

    Args:
        schema: The configuration's class.
        path: The YAML file.
        overrides: `key=value` strings; the key may be a dotted path, the value is YAML.

    Raises:
        ConfigError: An override has no `=`, a key is unknown, or a value is not valid.
    """
    values = yaml.safe_load(path.read_text()) or {}
    for override in overrides or []:
        _apply(values, override)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(schema, error)) from None


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"Override {override!r} is not of the form key=value.")
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"Override {override!r}: {parent!r} is a value, not a section.")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"Override {override!r}: {text!r} is not YAML. In a shell, quote all of it, "
            "'key=[a, b]'; a text that begins with a brace needs quotes of its own, too: "
            "'name=\"{bits}-mine\"'."
        ) from error


def _explain(schema: type[BaseModel], error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = sorted(_section(schema, problem["loc"][:-1]).model_fields)
            lines.append(f"Unknown key {path!r}. Known keys: {', '.join(known)}.")
            near = get_close_matches(str(problem["loc"][-1]), known, n=1)
            lines[-1] += f" Did you mean {near[0]!r}?" if near else ""
        elif problem["type"] == "missing":
            lines.append(f"{path} is missing. Give it a value.")
        else:
            reason = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{path or 'The configuration'} = {problem['input']!r}: {reason}.")
    return "\n".join(lines)


def _section(schema: Any, path: tuple[Any, ...]) -> type[BaseModel]:
    for name in path:
        if isinstance(schema, type) and issubclass(schema, BaseModel):
            schema = schema.model_fields[name].annotation
        else:
            # `name` is the index of a list or the key of a dict.
            schema = get_args(schema)[-1]
    section: type[BaseModel] = schema
    return section
