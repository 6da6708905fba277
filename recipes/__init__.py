"""Recipes: one readable script and one YAML configuration each, found by name.

A recipe's module and its frameworks are imported when the recipe is loaded, not when it is listed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdq_plugin.errors import ConfigError

if TYPE_CHECKING:
    from tdq_plugin.recipes.config import RecipeConfig

__all__ = ["RECIPES", "Recipe", "find_recipe"]


@dataclass(frozen=True)
class Recipe:
    """Where to find a recipe.

    Attributes:
        name: What `tdq run` takes.
        module: The module with the function `run(config)`, below `tdq_plugin.recipes`.
        schema: The name of the configuration class in that module.
        description: One line.
    """

    name: str
    module: str
    schema: str
    description: str

    def configure(self, overrides: list[str] | None = None) -> "RecipeConfig":
        """Read the recipe's YAML file and apply `key=value` overrides.

        Raises:
            ConfigError: An override or a value is not valid.
        """
        from tdq_plugin.recipes.config import CONFIG_FOLDER, load_config

        schema: type[RecipeConfig] = getattr(self._load(), self.schema)
        return load_config(schema, CONFIG_FOLDER / f"{self.name}.yaml", overrides)

    def run(self, config: "RecipeConfig") -> Path:
        """Run the recipe; return the folder of its results.

        Raises:
            ConfigError: Nothing can be written to that folder.
        """
        self._require_output(config)
        run: Callable[[RecipeConfig], Path] = self._load().run
        return run(config)

    def plan(self, config: "RecipeConfig") -> str:
        """Check model, data and folder, and say what `run` would do.

        Raises:
            ConfigError: `run` would stop.
        """
        self._require_output(config)
        return str(self._load().plan(config))

    def _require_output(self, config: "RecipeConfig") -> None:
        from tdq_plugin.recipes.config import require_writable

        require_writable("output", config.run_folder)

    def _load(self) -> Any:
        return import_module(f"{__name__}.{self.module}")


_ALL = (
    Recipe(
        "ddim-digits-ptq",
        "ddim_digits_ptq",
        "PTQConfig",
        "Quantize the digits DDIM without retraining: static, TDQ and rivals side by side",
    ),
    Recipe(
        "ddim-cifar10-ptq",
        "ddim_cifar10_ptq",
        "FullSizePTQConfig",
        "Quantize the CIFAR-10 DDIM without retraining as in the TDQ paper; needs a GPU",
    ),
    Recipe(
        "ldm-digits-ptq",
        "ldm_digits_ptq",
        "LatentPTQConfig",
        "Quantize the digits LDM without retraining: the same comparison on latents",
    ),
    Recipe(
        "ldm-churches-ptq",
        "ldm_churches_ptq",
        "FullSizePTQConfig",
        "Quantize the LDM-8 of LSUN churches without retraining as in the TDQ paper; needs a GPU",
    ),
    Recipe(
        "ddim-digits-qat",
        "ddim_digits_qat",
        "DigitsQATConfig",
        "Train the digits DDIM with quantization: LSQ, PACT, NIPQ, and TDQ on each of them",
    ),
    Recipe(
        "ddim-cifar10-qat",
        "ddim_cifar10_qat",
        "CifarQATConfig",
        "Train the CIFAR-10 DDIM with quantization as in the TDQ paper; needs a GPU",
    ),
    Recipe(
        "ldm-digits-qat",
        "ldm_digits_qat",
        "LatentQATConfig",
        "Train the digits LDM with quantization: LSQ, PACT, NIPQ, and TDQ on each of them",
    ),
    Recipe(
        "ldm-churches-qat",
        "ldm_churches_qat",
        "ChurchesQATConfig",
        "Train the LDM-8 of LSUN churches with quantization as in the TDQ paper; needs a GPU",
    ),
    Recipe(
        "ddim-digits-pretrain",
        "ddim_digits_pretrain",
        "PretrainConfig",
        "Train the digits DDIM in float32, the model that the other recipes quantize",
    ),
    Recipe(
        "ldm-digits-autoencoder",
        "ldm_digits_autoencoder",
        "AutoencoderConfig",
        "Train the small KL autoencoder between 32x32 digits and 8x8 latents",
    ),
    Recipe(
        "ldm-digits-pretrain",
        "ldm_digits_pretrain",
        "LatentPretrainConfig",
        "Train the digits LDM in float32, a UNet on the latents of that autoencoder",
    ),
    Recipe(
        "ldm-churches-import",
        "ldm_churches_import",
        "ImportConfig",
        "Turn CompVis' checkpoint of the LDM-8 of LSUN churches into a diffusers pipeline",
    ),
    Recipe(
        "ddim-digits-ranges",
        "ddim_digits_ranges",
        "RangesConfig",
        "Measure how the digits DDIM's activations move over t, and what one scale for all t costs",
    ),
    Recipe(
        "digits-classifier",
        "digits_classifier",
        "ClassifierConfig",
        "Train the small CNN whose features measure digit samples",
    ),
)
RECIPES = {recipe.name: recipe for recipe in _ALL}


def find_recipe(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        ConfigError: There is none; the message lists the recipes and the nearest name.

    Example:
        >>> find_recipe("digits-classifier").schema
        'ClassifierConfig'
    """
    if name in RECIPES:
        return RECIPES[name]
    near = get_close_matches(name, RECIPES, n=1)
    suggestion = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"No recipe is called {name!r}.{suggestion} Recipes: {', '.join(RECIPES)}.")
