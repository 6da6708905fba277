"""One training step after the other: batches, parameters, checkpoints and the log."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, fx

import tdq_plugin as tdq
from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes.bits import Bits
from tdq_plugin.recipes.float_model import FloatModel, load_float_model
from tdq_plugin.recipes.frameworks import load_framework
from tdq_plugin.recipes.objectives import (
    BatchMemory,
    Drawn,
    FloatTrajectories,
    NoisedImages,
    Objective,
    weighting_of,
)
from tdq_plugin.recipes.processes import PATIENCE
from tdq_plugin.recipes.qat.best_checkpoints import BestCheckpoints
from tdq_plugin.recipes.qat.methods import METHODS, apply_method, calibrate_bank
from tdq_plugin.recipes.qat.model import frozen, load_weights, save_weights
from tdq_plugin.recipes.qat.training import Training, TrainingSection, parameter_groups
from tdq_plugin.recipes.qat.training_log import TrainingLog, make_accelerator
from tdq_plugin.reconstruct import CalibrationSet
from tdq_plugin.scales import GeneratorBank

pytestmark = pytest.mark.whole

SECTION = TrainingSection(
    iterations=8,
    batch_size=4,
    learning_rate=1e-3,
    weight_scale_learning_rate=2e-3,
    weight_decay=0.01,
    schedule="cosine",
    warmup=0,
    range_decay=0.0,
    ema_decay=0.9,
    max_gradient_norm=1.0,
    checkpoint_every=2,
    log_every=1,
)
# They differ from other methods in a number only.
OTHER_SIZES = {"table_1", "table_100", "tdq_depth_1", "tdq_depth_2", "tdq_depth_3", "tdq_depth_5"}
IMAGES = torch.rand(10, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def float_model(tiny_pipeline: Path) -> FloatModel:
    return load_float_model(tiny_pipeline)


@pytest.fixture
def inputs(float_model: FloatModel) -> NoisedImages:
    return NoisedImages(IMAGES, float_model.scheduler, batch_size=4, seed=3, flip=True)


def prepare(model: FloatModel) -> fx.GraphModule:
    points = CalibrationSet(torch.zeros(2, *model.latent_shape), torch.tensor([1.0, 2.0]))
    return load_framework("torch_ao").prepare(model.unet, points, Bits(4, 4))


@pytest.fixture(scope="module")
def calibrated(float_model: FloatModel) -> Any:
    """Makes a model with the scales of a method, as before training."""
    prepared = prepare(float_model)
    observed = copy.deepcopy(prepared)
    drawn = NoisedImages(IMAGES, float_model.scheduler, 16, seed=9).draw(0, slice(None))
    batch = (drawn.samples, drawn.timesteps)
    observations = tdq.calibrate(observed, [batch], samples=64, warm_start=False)

    @cache
    def make(name: str) -> fx.GraphModule:
        model = copy.deepcopy(prepared)
        apply_method(model, METHODS[name])
        calibrate_bank(model, METHODS[name], observations)
        return model

    return lambda name="tdq": copy.deepcopy(make(name))


def train(
    model: fx.GraphModule,
    objective: Objective,
    section: TrainingSection = SECTION,
    accelerator: Accelerator | None = None,
) -> Training:
    accelerator = accelerator or Accelerator(cpu=True)
    return Training(model, accelerator, section, 3e-3, {"a": 1}, seed=0)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def test_processes_share_a_batch(inputs: NoisedImages) -> None:
    whole = inputs.draw(7, slice(None))
    halves = [inputs.draw(7, slice(0, 2)), inputs.draw(7, slice(2, 4))]
    for name in Drawn._fields:
        parts = torch.cat([getattr(half, name) for half in halves])
        assert torch.equal(parts, getattr(whole, name))
    assert not torch.equal(inputs.draw(8, slice(None)).samples, whole.samples)


def test_images_get_the_noise_of_their_timestep(float_model: FloatModel) -> None:
    inputs = NoisedImages(IMAGES[:1], float_model.scheduler, batch_size=64, seed=0, flip=True)
    drawn = inputs.draw(0, slice(None))
    assert drawn.noise is not None
    signal = float_model.scheduler.alphas_cumprod[drawn.timesteps].sqrt()[:, None, None, None]
    clean = (drawn.samples - (1 - signal**2).sqrt() * drawn.noise) / signal
    sharp = drawn.timesteps < 500
    straight, mirrored = (
        (clean[sharp] - image).abs().amax(dim=(1, 2, 3)) < 1e-3
        for image in (IMAGES[0], IMAGES[0].flip(-1))
    )
    assert bool((straight ^ mirrored).all())
    assert straight.any()
    assert mirrored.any()


def test_targets(float_model: FloatModel, inputs: NoisedImages) -> None:
    drawn = inputs.draw(0, slice(None))
    assert drawn.noise is not None
    assert torch.equal(Objective(inputs).batch(0, slice(None)).target, drawn.noise)

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        return x * t[:, None, None, None]

    batch = Objective(inputs, teacher).batch(0, slice(None))
    assert torch.equal(batch.target, teacher(drawn.samples, drawn.timesteps))
    points = CalibrationSet(IMAGES, torch.arange(10.0))
    data_free = Objective(FloatTrajectories(points, 4, seed=0), teacher).batch(0, slice(1, 3))
    assert torch.equal(data_free.samples, IMAGES[data_free.timesteps.long()])
    assert len(data_free.samples) == 2


def test_methods_after_the_first_get_the_same_batches_for_nothing(inputs: NoisedImages) -> None:
    calls = 0

    def teacher(samples: Tensor, timesteps: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return samples + 1

    plain = Objective(inputs, teacher)
    batches = [plain.batch(step, slice(None)) for step in range(3)]
    calls, size = 0, sum(tensor.nbytes for tensor in batches[0])
    remembering = replace(plain, memory=BatchMemory(byte_budget=2 * size))
    for _ in range(2):
        for step, expected in enumerate(batches):
            batch = remembering.batch(step, slice(None))
            assert all(map(torch.equal, batch, expected))
    # The third does not fit and is computed twice.
    assert calls == 4


def test_losses(float_model: FloatModel, inputs: NoisedImages) -> None:
    batch = Objective(inputs).batch(0, slice(None))
    shift = torch.tensor([1.0, -2.0, 3.0, 0.0])[:, None, None, None]

    def model(x: Tensor, t: Tensor) -> Tensor:
        return batch.target + shift

    shares = (1 - float_model.scheduler.alphas_cumprod).sqrt()[batch.timesteps]
    weighting = weighting_of("noise_share", float_model.scheduler)
    expected = {
        Objective(inputs): (1 + 4 + 9) / 4,
        Objective(inputs, absolute=True): (1 + 2 + 3) / 4,
        Objective(inputs, weighting=weighting): float(shares @ torch.tensor([1.0, 4, 9, 0])) / 4,
    }
    for objective, loss in expected.items():
        assert float(objective.loss(model, batch)) == pytest.approx(loss, rel=1e-5)
    assert weighting_of("uniform", float_model.scheduler) is None


def test_min_snr_is_one_in_noise_and_small_near_the_image(float_model: FloatModel) -> None:
    weighting = weighting_of("min_snr", float_model.scheduler)
    assert weighting is not None
    alpha = float(float_model.scheduler.alphas_cumprod[50])
    weights = weighting(torch.tensor([50, 500, 999]))
    assert weights.tolist() == pytest.approx([5 * (1 - alpha) / alpha, 1.0, 1.0])


def test_every_parameter_has_one_learning_rate(calibrated: Any) -> None:
    model = calibrated()
    groups = parameter_groups(model, SECTION, 3e-3)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (1e-3, 0.01),
        (2e-3, 0.0),
        (3e-3, 0.0),
        (3e-2, 0.0),
    ]
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert len(set(grouped)) == len(grouped)
    assert groups[3]["params"][0] is tdq.scale_bank(model).zero_point


@pytest.mark.parametrize("name", sorted(METHODS.keys() - OTHER_SIZES))
def test_a_step_trains_weights_and_scales(name: str, calibrated: Any, inputs: NoisedImages) -> None:
    model = calibrated(name)
    bank = tdq.scale_bank(model)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    training = train(model, Objective(inputs))
    for _ in range(2):
        result = training.advance(Objective(inputs))
    assert result is not None
    assert 0 < result.loss < 10
    assert result.gradient_norm > 0
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert {key for key in before if key.endswith((".weight", ".log_ratio"))} <= moved
    assert any(key.startswith("scale_bank.") for key in moved) != METHODS[name].dynamic
    timesteps = torch.tensor([500.0, 750.0])
    with frozen(training.finish(), timesteps) as sampling:
        outputs = [sampling(IMAGES[:2], timesteps) for _ in range(2)]
    assert torch.equal(*outputs)
    assert tdq.scale_bank(model) is bank


def test_nothing_is_drawn_but_by_seed_and_step(calibrated: Any, inputs: NoisedImages) -> None:
    models = [calibrated("nipq"), calibrated("nipq")]
    for offset, model in enumerate(models):
        torch.manual_seed(offset)
        train(model, Objective(inputs)).advance(Objective(inputs))
    assert same(models[0].state_dict(), models[1].state_dict())


def test_a_checkpoint_restores_everything(
    calibrated: Any, inputs: NoisedImages, tmp_path: Path, float_model: FloatModel
) -> None:
    objective, path = Objective(inputs), tmp_path / "checkpoint.pt"
    straight = train(calibrated(), objective)
    for _ in range(4):
        straight.advance(objective)
    first = train(calibrated(), objective)
    for _ in range(2):
        first.advance(objective)
    first.save(path)
    uncalibrated = prepare(float_model)
    assert uncalibrated.get_parameter("conv_in.weight") is not float_model.unet.conv_in.weight
    apply_method(uncalibrated, METHODS["tdq"])
    second = train(uncalibrated, objective)
    assert second.resume(path)
    while second.step < 4:
        second.advance(objective)
    assert same(second.model.state_dict(), straight.model.state_dict())
    assert same(second.finish().state_dict(), straight.finish().state_dict())


def test_a_checkpoint_of_another_configuration(
    calibrated: Any, inputs: NoisedImages, tmp_path: Path
) -> None:
    model, accelerator = calibrated(), Accelerator(cpu=True)
    train(model, Objective(inputs)).save(tmp_path / "checkpoint.pt")
    other = Training(model, accelerator, SECTION, 3e-3, {"a": 2}, seed=0)
    with pytest.raises(ConfigError, match=r"was written with other settings: a=1, not 2\. Choose"):
        other.resume(tmp_path / "checkpoint.pt")


def test_validation_is_that_of_the_average(calibrated: Any, inputs: NoisedImages) -> None:
    objective = Objective(inputs)
    training = train(calibrated(), objective)
    for _ in range(3):
        training.advance(objective)
    now = {name: value.clone() for name, value in training.model.state_dict().items()}
    found = training.validation_loss(objective, batches=2)
    assert same(training.model.state_dict(), now)
    model = training.finish()
    with torch.no_grad():
        losses = [objective.loss(model, objective.batch(i, slice(None))) for i in range(2)]
    assert found == pytest.approx(float(sum(losses)) / 2, rel=1e-6)
    assert not same(model.state_dict(), now)


def test_pact_penalty(calibrated: Any, inputs: NoisedImages) -> None:
    section = SECTION.model_copy(update={"range_decay": 0.5})
    model = calibrated("pact")
    bank = tdq.scale_bank(model)
    with torch.no_grad():
        scales = bank(0)[0][:, 0]
    levels = torch.tensor([grid.quant_max - grid.quant_min for grid in bank.grids])
    results = [
        train(calibrated("pact"), Objective(inputs), each).advance(Objective(inputs))
        for each in (SECTION, section)
    ]
    expected = 0.5 * float((scales * levels).square().sum())
    assert results[1].loss - results[0].loss == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate refuses another precision in the same process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("fresh_accelerate")
def test_bfloat16_leaves_the_scales_alone(calibrated: Any, inputs: NoisedImages) -> None:
    model = calibrated()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    training = train(model, Objective(inputs), accelerator=accelerator)
    seen: list[torch.dtype] = []
    hook = model.get_submodule("conv_out").register_forward_hook(
        lambda module, args, output: seen.append(output.dtype)
    )
    result = training.advance(Objective(inputs))
    hook.remove()
    assert result.loss < 10
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in training.finish().parameters()} == {torch.float32}
    t = torch.tensor([3.0, 500.0])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = tdq.scale_bank(model)(t)[0]
    assert isinstance(tdq.scale_bank(model), GeneratorBank)
    assert torch.equal(mixed, tdq.scale_bank(model)(t)[0])
    assert model(IMAGES[:2], t).dtype == torch.float32


def test_a_loss_that_is_not_finite(calibrated: Any, inputs: NoisedImages) -> None:
    broken = Objective(inputs, teacher=lambda x, t: x * float("nan"))
    with pytest.raises(ConfigError, match=r"training loss is nan at step 1, .* Lower the"):
        train(calibrated(), broken).advance(broken)


def test_no_checkpoint_has_broken_weights(calibrated: Any, inputs: NoisedImages) -> None:
    broken = Objective(inputs, teacher=lambda x, t: x * float("nan"))
    seldom = SECTION.model_copy(update={"log_every": 100, "checkpoint_every": 1})
    with pytest.raises(ConfigError, match=r"training loss is nan at step 1"):
        train(calibrated(), broken, seldom).advance(broken)


def test_weights_travel_by_safetensors(calibrated: Any, tmp_path: Path) -> None:
    first, second = calibrated("learned_table"), calibrated("learned_table")
    with torch.no_grad():
        tdq.scale_bank(first).table.add_(0.1)
    save_weights(first, tmp_path / "weights.safetensors")
    load_weights(second, tmp_path / "weights.safetensors")
    assert same(first.state_dict(), second.state_dict())


def test_the_best_checkpoints_are_kept(tmp_path: Path) -> None:
    model, best = torch.nn.Linear(1, 1), BestCheckpoints(tmp_path, keep=2)
    for step, loss in enumerate((3.0, 1.0, 2.0, 4.0, 1.5)):
        best.add(model, step, loss)
    best.add(model, 4, 1.5)
    assert list(best.losses().items()) == [(1, 1.0), (4, 1.5)]
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "step-0000001.safetensors",
        "step-0000004.safetensors",
    ]


def test_the_log_goes_on_after_a_kill(tmp_path: Path) -> None:
    path, accelerator = tmp_path / "log.jsonl", Accelerator(cpu=True)
    log = TrainingLog(path, accelerator, start=0)
    for step in (1, 2, 3):
        log.write(step, loss=float(step))
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    TrainingLog(path, accelerator, start=2).write(3, loss=30.0)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": 30.0},
    ]


def test_processes_wait_for_each_other_for_days(tmp_path: Path) -> None:
    handler = make_accelerator(tmp_path, "no", [], {}).init_handler
    assert handler is not None
    assert handler.timeout == PATIENCE


def test_a_tracker_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdq_plugin.recipes.qat.training_log.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"trackio is not installed\. .*pip install trackio"):
        make_accelerator(tmp_path, "no", ["trackio"], {})
