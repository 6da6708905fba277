"""The recipes that train float models: what they write, and that a restart changes nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMPipeline, LDMPipeline
from matplotlib.image import imread
from safetensors.torch import load_file

from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes import Recipe, find_recipe
from tdq_plugin.recipes.digits import load_digits
from tdq_plugin.recipes.float_model import load_float_model
from tdq_plugin.recipes.pretraining import training as pretraining

pytestmark = pytest.mark.whole

SHORT = ["iterations=6", "batch_size=4", "warmup=2", "checkpoint_every=2"]
SMALL_UNET = [
    "unet.block_out_channels=[8, 16]",
    "unet.down_block_types=[DownBlock2D, AttnDownBlock2D]",
    "unet.up_block_types=[AttnUpBlock2D, UpBlock2D]",
    "unet.norm_num_groups=4",
    "unet.attention_head_dim=8",
]
SMALL_AUTOENCODER = [
    "autoencoder.sample_size=8",
    "autoencoder.block_out_channels=[4, 8]",
    "autoencoder.down_block_types=[DownEncoderBlock2D, DownEncoderBlock2D]",
    "autoencoder.up_block_types=[UpDecoderBlock2D, UpDecoderBlock2D]",
    "autoencoder.norm_num_groups=4",
]
PIXELS = find_recipe("ddim-digits-pretrain")
AUTOENCODER = find_recipe("ldm-digits-autoencoder")
LATENTS = find_recipe("ldm-digits-pretrain")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def autoencoder(output: Path) -> Path:
    overrides = [*SHORT, *SMALL_AUTOENCODER, f"output={output}"]
    return AUTOENCODER.run(AUTOENCODER.configure(overrides))


@pytest.fixture(scope="module")
def overrides(output: Path, autoencoder: Path) -> dict[str, list[str]]:
    """For a small and short run of each recipe."""
    common = [*SHORT, f"output={output}"]
    latents = ["unet.sample_size=4", f"autoencoder={autoencoder / 'model'}"]
    return {
        PIXELS.name: [*common, *SMALL_UNET],
        AUTOENCODER.name: [*common, *SMALL_AUTOENCODER],
        LATENTS.name: [*common, *SMALL_UNET, *latents],
    }


@pytest.fixture(scope="module")
def finished(autoencoder: Path, overrides: dict[str, list[str]]) -> dict[str, Path]:
    folders = {
        recipe.name: recipe.run(recipe.configure(overrides[recipe.name]))
        for recipe in (PIXELS, LATENTS)
    }
    return {AUTOENCODER.name: autoencoder, **folders}


def weights(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(file) for file in sorted((folder / "model").rglob("*.safetensors"))]


def test_the_model_is_a_pipeline_that_draws(finished: dict[str, Path]) -> None:
    for recipe, kind, size in ((PIXELS, DDIMPipeline, 16), (LATENTS, LDMPipeline, 8)):
        pipeline = kind.from_pretrained(finished[recipe.name] / "model")
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(batch_size=2, num_inference_steps=2, output_type="np").images
        assert images.shape == (2, size, size, 1)


@pytest.mark.parametrize("recipe", [PIXELS, LATENTS], ids=lambda recipe: recipe.name)
def test_another_schedule_starts_from_trained_weights(
    recipe: Recipe, finished: dict[str, Path], overrides: dict[str, list[str]]
) -> None:
    first = finished[recipe.name] / "model"
    config: Any = recipe.configure(
        [
            *overrides[recipe.name],
            f"name={recipe.name}-cosine",
            f"start_from={first}",
            "beta_schedule=squaredcos_cap_v2",
            "iterations=2",
            "warmup=0",
        ]
    )
    folder = recipe.run(config)
    schedulers = [load_float_model(path).scheduler for path in (first, folder / "model")]
    assert [scheduler.config.beta_schedule for scheduler in schedulers] == [
        "linear", "squaredcos_cap_v2"
    ]  # fmt: skip
    assert schedulers[1].config.clip_sample == schedulers[0].config.clip_sample
    # Two steps of Adam move a weight by little more than their learning rates; random weights are
    # far away.
    start, end = (load_float_model(path).unet.state_dict() for path in (first, folder / "model"))
    distance = max(float((end[name] - start[name]).abs().max()) for name in start)
    assert 0 < distance < 3 * config.learning_rate


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "start_from=nowhere",
            r"^start_from = 'nowhere' is neither .* Set start_from=",
        ),
        ("unet.block_out_channels=[16, 16]", r"^start_from = .* has a UNet of other shapes than"),
        ("beta_schedule=cosine", r"^beta_schedule = 'cosine': Input should be 'linear' or 'squ"),
    ],
)
def test_a_start_that_does_not_fit(
    setting: str,
    message: str,
    finished: dict[str, Path],
    overrides: dict[str, list[str]],
) -> None:
    start = f"start_from={finished[PIXELS.name] / 'model'}"
    given = [*overrides[PIXELS.name], "name=misfit", start]
    fitting = PIXELS.configure(given)
    PIXELS.plan(fitting)
    for action in (PIXELS.plan, PIXELS.run):
        with pytest.raises(ConfigError, match=message):
            action(PIXELS.configure([*given, setting]))
    assert not fitting.run_folder.exists()


def test_latents_have_a_spread_of_one(finished: dict[str, Path]) -> None:
    model = AutoencoderKL.from_pretrained(finished[AUTOENCODER.name] / "model")
    with torch.no_grad():
        latents = model.encode(load_digits(8)[0]).latent_dist.mean * model.config.scaling_factor
    assert float(latents.std()) == pytest.approx(1, rel=1e-4)
    scheduler = LDMPipeline.from_pretrained(finished[LATENTS.name] / "model").scheduler
    assert not scheduler.config.clip_sample


def test_the_figures_are_pictures(finished: dict[str, Path]) -> None:
    for recipe, picture in (
        (PIXELS, "samples"),
        (AUTOENCODER, "reconstructions"),
        (LATENTS, "samples"),
    ):
        for name in ("loss", picture):
            height, width, _ = imread(finished[recipe.name] / f"{name}.png").shape
            assert min(height, width) > 100


@pytest.mark.parametrize("recipe", [PIXELS, AUTOENCODER, LATENTS], ids=lambda recipe: recipe.name)
def test_a_restart_changes_nothing(
    recipe: Recipe,
    finished: dict[str, Path],
    overrides: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = recipe.configure([*overrides[recipe.name], f"name={recipe.name}-interrupted"])
    steps: list[int] = []
    original = pretraining.Training.advance

    def interrupted(training: Any, *args: Any) -> None:
        steps.append(training.step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        original(training, *args)

    monkeypatch.setattr(pretraining.Training, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recipe.run(config)
    assert not (config.run_folder / "model").exists()
    recipe.run(config)
    assert steps == [0, 1, 2, 3, 2, 3, 4, 5]
    folders = (finished[recipe.name], config.run_folder)
    for uninterrupted, resumed in zip(*map(weights, folders), strict=True):
        assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)
    losses = [
        torch.load(folder / "checkpoint.pt", weights_only=True)["losses"] for folder in folders
    ]
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]


def test_training_moves_the_weights_by_the_seed(
    finished: dict[str, Path], overrides: dict[str, list[str]]
) -> None:
    config = PIXELS.configure([*overrides[PIXELS.name], "name=seed1", "seed=1"])
    (first,), (other,) = weights(finished[PIXELS.name]), weights(PIXELS.run(config))
    assert not any(
        torch.equal(other[name], weight)
        for name, weight in first.items()
        if name.endswith("conv1.weight")
    )


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    config = PIXELS.configure([*SHORT, f"output={tmp_path}", "checkpoint_every=1"])
    network = torch.nn.Linear(1, 1)
    with pytest.raises(ConfigError, match=r"training loss is nan at step 1, .* Lower learning_r"):
        pretraining.pretrain(config, network, lambda generator: network.weight.sum() * torch.nan)
    assert not config.run_folder.exists()


def test_a_run_folder_belongs_to_one_configuration(
    finished: dict[str, Path], overrides: dict[str, list[str]]
) -> None:
    other = PIXELS.configure([*overrides[PIXELS.name], "batch_size=5"])
    message = r"holds a run with other settings: batch_size=4, not 5\. Choose another name"
    with pytest.raises(ConfigError, match=message):
        PIXELS.run(other)
    with pytest.raises(ConfigError, match=message):
        PIXELS.plan(other)


def test_a_run_of_another_recipe_is_left_alone(
    overrides: dict[str, list[str]], tmp_path: Path
) -> None:
    config = PIXELS.configure([*overrides[PIXELS.name], f"output={tmp_path}"])
    kept = config.run_folder / "model" / "int8.bin"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"precious")
    (config.run_folder / "config.json").write_text('{"bits": "W4A4"}')
    with pytest.raises(ConfigError, match=r"holds a run with other settings: .*bits='W4A4', not N"):
        PIXELS.run(config)
    assert kept.read_bytes() == b"precious"


def test_a_restart_repeats_dropout(overrides: dict[str, list[str]], tmp_path: Path) -> None:
    settings = [*overrides[PIXELS.name], "unet.dropout=0.3", f"output={tmp_path}"]
    config = PIXELS.configure(settings)
    (whole,) = weights(PIXELS.run(config))
    resumed = PIXELS.configure([*settings, "name=resumed"])
    state = torch.load(config.run_folder / "checkpoint.pt", weights_only=True)
    assert state["step"] == 6
    shorter = PIXELS.configure([*settings, "name=resumed", "checkpoint_every=4"])
    original = pretraining.Training.advance

    def interrupted(training: Any, *args: Any) -> None:
        if training.step == 5:
            raise KeyboardInterrupt
        original(training, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining.Training, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            PIXELS.run(shorter)
    torch.rand(1)  # A new process draws other numbers.
    (second,) = weights(PIXELS.run(resumed))
    assert all(torch.equal(second[name], whole[name]) for name in whole)


@pytest.mark.parametrize("recipe", [PIXELS, AUTOENCODER, LATENTS], ids=lambda recipe: recipe.name)
def test_a_plan_writes_nothing(
    recipe: Recipe, finished: dict[str, Path], overrides: dict[str, list[str]]
) -> None:
    config = recipe.configure([*overrides[recipe.name], "name=planned"])
    plan = recipe.plan(config)
    assert plan.startswith(f"tdq run {recipe.name}\n")
    assert "6 in batches of 4\n" in plan
    assert not config.run_folder.exists()
    assert "6 in batches of 4, 6 are done" in recipe.plan(recipe.configure(overrides[recipe.name]))


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        (
            PIXELS,
            "unet.block_out_channels=[8]",
            r"^unet: UNet2DModel cannot be built: Must provide",
        ),
        (PIXELS, "unet.in_channels=2", r"^UNet2DModel does not take the digits: .* 2 channels"),
        (LATENTS, "unet.in_channels=1", r"^UNet2DModel does not take the digits: .* 1 channels"),
        (AUTOENCODER, "autoencoder.norm_num_groups=3", r"^autoencoder: AutoencoderKL cannot be"),
    ],
)
def test_networks_that_do_not_fit(
    recipe: Recipe, override: str, message: str, overrides: dict[str, list[str]]
) -> None:
    config = recipe.configure([*overrides[recipe.name], "name=misfit", override])
    for act in (recipe.plan, recipe.run):
        with pytest.raises(ConfigError, match=message):
            act(config)
    assert not config.run_folder.exists()


def test_an_autoencoder_that_is_not_there(tmp_path: Path) -> None:
    config = LATENTS.configure([f"autoencoder={tmp_path}", f"output={tmp_path}"])
    message = r"is no folder of a saved autoencoder. Train one: tdq"
    for act in (LATENTS.plan, LATENTS.run):
        with pytest.raises(ConfigError, match=message):
            act(config)


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        (PIXELS, "iterations=0", r"^iterations = 0: Input should be greater than 0"),
        (PIXELS, "ema_decay=1", r"^ema_decay = 1: Input should be less than 1"),
        (PIXELS, "unet.norm_groups=3", r"^unet = .*: UNet2DModel takes no \['norm_groups'\], but"),
        (PIXELS, "unet=3", r"^unet = 3: Input should be a valid dictionary"),
        (AUTOENCODER, "kl_weight=-1", r"^kl_weight = -1: Input should be greater than or equal"),
        (LATENTS, "kl_weight=1", r"^Unknown key 'kl_weight'. Known keys: autoencoder, batch_si"),
    ],
)
def test_mistakes_in_the_configuration(recipe: Recipe, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe.configure([override])
