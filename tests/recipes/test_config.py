"""YAML, overrides and validation: every mistake is one clear line."""

from pathlib import Path

import pytest
from pydantic import Field

from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes.config import RecipeConfig, load_config


class Config(RecipeConfig):
    rate: float = Field(gt=0)
    layers: dict[str, int] = Field(default_factory=dict)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: demo\nrate: 1e-3\nlayers: {first: 8}\n")
    return path


def test_a_file_without_overrides(path: Path) -> None:
    config = load_config(Config, path)
    # PyYAML reads 1e-3 as a string.
    assert (config.rate, config.seed, config.layers) == (1e-3, 0, {"first": 8})
    assert config.run_folder == Path("runs/demo")


def test_overrides_are_yaml_and_may_be_dotted(path: Path) -> None:
    overrides = ["rate=2", "layers.last=4", "output=/elsewhere", "layers.first=6"]
    config = load_config(Config, path, overrides)
    assert config.rate == 2.0
    assert config.layers == {"first": 6, "last": 4}
    assert config.run_folder == Path("/elsewhere/demo")


def test_a_value_may_contain_the_equals_sign(path: Path) -> None:
    assert load_config(Config, path, ["name=a=b"]).name == "a=b"


def test_a_configuration_does_not_change(path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(Config, path).rate = 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rate", r"^Override 'rate' is not of the form key=value\.$"),
        ("=3", r"^Override '=3' is not of the form key=value\.$"),
        ("rate=[", r"^Override 'rate=\[': '\[' is not YAML\.$"),
        ("rate.x=3", r"^Override 'rate.x=3': 'rate' is a value, not a section\.$"),
        ("rate=0", r"^rate = 0: Input should be greater than 0\.$"),
        ("rate=fast", r"^rate = 'fast': Input should be a valid number"),
        ("threads=0", r"^threads = 0: Input should be greater than or equal to 1\.$"),
        ("layers.first=x", r"^layers.first = 'x': Input should be a valid integer"),
        ("ratte=1", r"^Unknown key 'ratte'. Known keys: layers, name, output, rate, seed, threads"),
    ],
)
def test_mistakes(path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Config, path, [override])


def test_a_missing_key(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"name = \{\}: Field required"):
        load_config(Config, tmp_path / "empty.yaml")
