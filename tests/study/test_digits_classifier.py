"""The committed classifier is as good as it says, and the recipe makes such a one."""

import json
import re
from pathlib import Path

import pytest
import torch

from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes.config import CONFIG_FOLDER, load_config
from tdq_plugin.recipes.digits_classifier import (
    COMMITTED,
    ClassifierConfig,
    accuracy,
    augment,
    load_classifier,
    plan,
    run,
    split_digits,
)


def test_committed_weights_on_the_held_out_digits() -> None:
    _, (images, labels) = split_digits()
    assert torch.bincount(labels).tolist() == [50] * 10
    measured = accuracy(load_classifier(), images, labels)
    description = json.loads((COMMITTED / "config.json").read_text())
    assert measured >= 0.98
    assert measured == pytest.approx(description["held_out_accuracy"], abs=0.0021)
    assert sum(file.stat().st_size for file in COMMITTED.iterdir()) <= 500_000


def test_features_are_the_input_of_the_head() -> None:
    classifier = load_classifier()
    images = split_digits()[1][0][:7]
    features = classifier.features(images)
    assert features.shape == (7, 64)
    assert torch.equal(classifier.head(features), classifier(images))


def test_recipe_writes_what_load_classifier_reads(tmp_path: Path) -> None:
    path = CONFIG_FOLDER / "digits-classifier.yaml"
    config = load_config(ClassifierConfig, path, [f"output={tmp_path}", "epochs=1"])
    folder = run(config)
    description = json.loads((folder / "config.json").read_text())
    _, held_out = split_digits()
    assert accuracy(load_classifier(folder), *held_out) == pytest.approx(
        description["held_out_accuracy"], abs=1e-4
    )
    assert description["held_out_accuracy"] > 0.85
    assert "epochs=1" in description["command"]


def test_augmentation_only_shifts_without_noise() -> None:
    images = torch.full((64, 1, 16, 16), -1.0)
    images[:, :, 8, 8] = 1.0
    shifted = augment(images, max_shift=1, noise=0.0)
    assert shifted.shape == images.shape
    assert torch.equal((shifted == 1).sum(dim=(1, 2, 3)), torch.ones(64, dtype=torch.long))
    places = (shifted == 1).nonzero()[:, 2:]
    assert places.min() == 7
    assert places.max() == 9


def test_missing_weights_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tdq run digits-classifier"):
        load_classifier(tmp_path)


def test_dry_run_checks_the_folder(tmp_path: Path) -> None:
    config = load_config(
        ClassifierConfig, CONFIG_FOLDER / "digits-classifier.yaml", [f"output={tmp_path}"]
    )
    assert re.search(r"steps +1,406 of 64 images", str(plan(config)))
    config.run_folder.mkdir(parents=True)
    (config.run_folder / "notes.txt").write_text("")
    with pytest.raises(ConfigError, match="digits-classifier"):
        plan(config)
