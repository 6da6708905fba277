"""What a study consists of: a YAML file, checked by pydantic."""

import itertools
import json
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes import find_recipe
from tdq_plugin.recipes.config import RECIPES, Section, load_config

__all__ = ["STUDIES", "Part", "RunGroup", "RunSpec", "StudyDefinition", "load_study"]

FOLDER = Path(__file__).parent / "definitions"
SAMPLES = "evaluation.samples"
STUDIES = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))
FigureName = Literal[
    "distances",
    "errors",
    "error_ratios",
    "samples",
    "ranges",
    "rounding_errors",
    "steps",
    "training",
]


class RunSpec(Section):
    """One run of a recipe.

    Attributes:
        recipe: Its name.
        name: Folder of the run. Parts that list a run of the same name and settings share it.
        settings: Dotted configuration keys and their values.
        needs: Names of earlier runs that this one reads; they are done first.
    """

    recipe: str
    name: str
    settings: dict[str, Any]
    needs: list[str]

    @property
    def overrides(self) -> list[str]:
        """The settings as `key=value`, which `Recipe.configure` takes."""
        return [f"{key}={json.dumps(value)}" for key, value in self.settings.items()]


class RunGroup(Section):
    """Runs of one recipe that differ in a few settings.

    Attributes:
        recipe: Its name.
        name: Name of the runs; `{key}` stands for a value of `vary`.
        settings: What all of them have; in texts `{runs}` stands for the folder of the runs, and
            `{recipes}` for the package of the recipes, which has small models.
        vary: Values of each further key; every combination is a run.
        needs: Names of runs that these read.
    """

    recipe: str
    name: str
    settings: dict[str, Any] = Field(default={})
    vary: dict[str, list[Any]] = Field(default={})
    needs: list[str] = Field(default=[])

    def expand(
        self, common: dict[str, Any], runs: Path, samples: int | None = None
    ) -> list[RunSpec]:
        """All runs.

        Args:
            common: Settings that the group can replace.
            runs: The folder of the runs.
            samples: Images per row, whatever the settings say, if the recipe draws any.
        """
        fixed = {} if samples is None or not _draws(self.recipe) else {SAMPLES: samples}
        specs = []
        for values in itertools.product(*self.vary.values()):
            chosen = dict(zip(self.vary, values, strict=True))
            name = _filled_in(self.name, chosen)
            settings = common | self.settings | chosen | fixed
            settings |= {"name": name, "output": str(runs)}
            settings = {key: _with_folders(value, runs) for key, value in settings.items()}
            specs.append(
                RunSpec(recipe=self.recipe, name=name, settings=settings, needs=self.needs)
            )
        return specs


class Part(Section):
    """What one question takes, and how the answer is shown.

    Attributes:
        title: Heading of its section in the report.
        question: What it asks, for a reader who does not know the paper.
        paper: The paper's table or figure that it corresponds to.
        runs: The runs.
        group_by: Dotted key of the runs' configuration; each of its values has its own table.
        ratios: Pairs of methods, by title: the first is divided by the second.
        figures: Names of figures, see `tdq_plugin.studies.figures`.
    """

    title: str
    question: str
    paper: str
    runs: list[RunGroup] = Field(min_length=1)
    group_by: str | None = None
    ratios: list[tuple[str, str]] = Field(default=[])
    figures: list[FigureName] = Field(default=[])


class Cost(Section):
    """Measured seconds of a recipe on one thread, all threads of the machine being busy.

    Attributes:
        start: Of a run besides its methods.
        method: Of a method besides its images.
        step: Of one sampler step of one image.
    """

    start: float = Field(ge=0)
    method: float = Field(ge=0)
    step: float = Field(ge=0)


class StudyDefinition(Section):
    """A study.

    Attributes:
        title: Heading of the report.
        introduction: Paragraphs at its beginning.
        settings: Settings of all runs, by recipe.
        costs: Times of the recipes, for estimates.
        parts: The parts by name.
    """

    title: str
    introduction: list[str]
    settings: dict[str, dict[str, Any]]
    costs: dict[str, Cost]
    parts: dict[str, Part] = Field(min_length=1)

    def runs(self, part: str, folder: Path, samples: int | None = None) -> list[RunSpec]:
        """The runs of a part, below `folder`.

        Args:
            part: Its name.
            folder: The folder of the runs.
            samples: Replaces `evaluation.samples` of all runs that draw images.

        Raises:
            ConfigError: There is no such part.
        """
        if part not in self.parts:
            raise ConfigError(f"part = {part!r} is none of {', '.join(self.parts)}.")
        groups = self.parts[part].runs
        specs = (
            group.expand(self.settings.get(group.recipe, {}), folder, samples) for group in groups
        )
        return list(itertools.chain.from_iterable(specs))


def load_study(name: str) -> StudyDefinition:
    """Read a study's definition.

    Args:
        name: One of `STUDIES`, or a path to a YAML file.

    Raises:
        ConfigError: There is no such study, a key is unknown, or a value is not valid.

    Example:
        >>> list(load_study("digits").parts)[:2]
        ['ranges', 'ptq']
    """
    path = FOLDER / f"{name}.yaml" if name in STUDIES else Path(name)
    if not path.is_file():
        raise ConfigError(
            f"No study is called {name!r}. Studies: {', '.join(STUDIES)}; or give the path of a "
            "YAML file."
        )
    try:
        definition = load_config(StudyDefinition, path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}.") from error
    _check(definition)
    return definition


def _check(definition: StudyDefinition) -> None:
    _check_recipes(definition)
    known: dict[str, RunSpec] = {}
    for name, part in definition.parts.items():
        earlier: set[str] = set()
        for spec in definition.runs(name, Path()):
            unknown = sorted(set(spec.needs) - earlier)
            if unknown:
                raise ConfigError(
                    f"{spec.name!r} needs {unknown}, which is no earlier run of {name!r}."
                )
            earlier.add(spec.name)
            if known.setdefault(spec.name, spec) != spec:
                raise ConfigError(
                    f"Two runs are called {spec.name!r} and have other settings. Put what differs "
                    "into the name: a key of `vary` in braces is filled in."
                )
        if "steps" in part.figures and part.group_by != "steps":
            raise ConfigError(f"{name!r}: the figure 'steps' needs group_by: steps.")


def _check_recipes(definition: StudyDefinition) -> None:
    used = {group.recipe for part in definition.parts.values() for group in part.runs}
    for recipe in sorted(used):
        find_recipe(recipe)
        if recipe not in definition.costs:
            raise ConfigError(f"costs has no entry for {recipe!r}. Give it start, method and step.")
    unused = sorted(definition.settings.keys() - used)
    if unused:
        raise ConfigError(f"settings: no part runs {unused}, but {sorted(used)}.")


def _draws(recipe: str) -> bool:
    evaluation = getattr(find_recipe(recipe).configure(), "evaluation", None)
    return hasattr(evaluation, "samples")


def _filled_in(name: str, values: dict[str, Any]) -> str:
    for key, value in values.items():
        text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
        name = name.replace(f"{{{key}}}", text)
    return name


def _with_folders(value: Any, runs: Path) -> Any:
    if not isinstance(value, str):
        return value
    return value.replace("{runs}", str(runs)).replace("{recipes}", str(RECIPES))
