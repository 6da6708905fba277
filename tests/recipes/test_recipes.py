"""The list of recipes fits the modules and the configuration files that there are."""

from importlib import import_module

import pytest

from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes import RECIPES, find_recipe
from tdq_plugin.recipes.config import CONFIG_FOLDER, RecipeConfig


def test_every_configuration_has_a_recipe() -> None:
    assert sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml")) == sorted(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_loads_with_its_defaults(name: str) -> None:
    recipe = find_recipe(name)
    module = import_module(f"tdq_plugin.recipes.{recipe.module}")
    assert issubclass(getattr(module, recipe.schema), RecipeConfig)
    assert callable(module.run)
    assert recipe.description
    assert recipe.configure().run_folder.parent.name == "runs"


def test_overrides_reach_the_configuration() -> None:
    assert find_recipe("digits-classifier").configure(["epochs=3"]).epochs == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit-clasifier", r"'digit-clasifier'. Did you mean 'digits-classifier'\? Recipes"),
        ("zzz", r"^No recipe is called 'zzz'. Recipes: ddim-digits-ptq, .*digits-classifier.$"),
    ],
)
def test_an_unknown_name(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_recipe(name)
