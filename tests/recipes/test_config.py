"""YAML, overrides and validation: every mistake is one clear line."""

import os
from pathlib import Path

import pytest
from pydantic import Field

from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes.config import RecipeConfig, load_config, require_writable


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
        ("rate=[", r"^Override 'rate=\[': '\[' is not YAML\. In a shell, quote all of it, 'key="),
        ("name={a}-b", r"is not YAML\. .* quotes of its own, too: 'name=\"\{bits\}-mine\"'\.$"),
        ("rate.x=3", r"^Override 'rate.x=3': 'rate' is a value, not a section\.$"),
        ("rate=0", r"^rate = 0: Input should be greater than 0\.$"),
        ("rate=fast", r"^rate = 'fast': Input should be a valid number"),
        ("seed=4294967296", r"^seed = 4294967296: Input should be less than 4294967296\.$"),
        ("threads=0", r"^threads = 0: Input should be greater than or equal to 1\.$"),
        ("layers.first=x", r"^layers.first = 'x': Input should be a valid integer"),
        (
            "ratte=1",
            r"^Unknown key 'ratte'. Known keys: layers, name, output, rate, seed, threads\. "
            r"Did you mean 'rate'\?$",
        ),
        ("zzz=1", r"^Unknown key 'zzz'. Known keys: .*, threads\.$"),
    ],
)
def test_mistakes(path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Config, path, [override])


def test_a_missing_key(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"^name is missing\. Give it a value\.$"):
        load_config(Config, tmp_path / "empty.yaml", ["rate=1"])


def test_a_file_that_is_no_section(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match=r"^The configuration = \['a'\]: Input should be a valid"):
        load_config(Config, tmp_path / "list.yaml")


def test_a_folder_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    require_writable("output", tmp_path / "new" / "below")
    with pytest.raises(ConfigError, match=r"^output = .*below': .*file is not a folder. Choose a"):
        require_writable("output", tmp_path / "file" / "below")


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_a_folder_without_permission_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match=r"^--results = .*closed cannot be written to"):
        require_writable("--results", tmp_path / "closed" / "below")
