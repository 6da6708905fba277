"""`tdq export openvino`."""

import copy

import torch
from cpu import needs_vnni
from deploy.networks import frozen
from diffusers import DDIMPipeline, DDIMScheduler
from diffusers_models import one_level_unet
from typer.testing import CliRunner

import tdq_plugin as tdq
from tdq_plugin.cli import app
from tdq_plugin.deploy import lower_to_int8, save_int8
from tdq_plugin.deploy.openvino import OVDenoiser
from tdq_plugin.output_correction import CORRECTION_FILE

ENVIRONMENT = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}


def saved_model(folder):
    """A folder as the recipes write it."""
    unet = one_level_unet().eval()
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    scheduler.set_timesteps(4)
    batches = [(torch.randn(4, 1, 8, 8), torch.full((4,), int(t))) for t in scheduler.timesteps]
    example = (torch.zeros(2, 1, 8, 8), torch.zeros(2))
    model = frozen(model=copy.deepcopy(unet), batches=batches, example=example, steps=scheduler)
    unet.save_config(folder / "unet")
    scheduler.save_config(folder / "scheduler")
    save_int8(lower_to_int8(model), folder / "int8")
    return model


def export(model, folder):
    arguments = ["export", "openvino", str(model), str(folder)]
    return CliRunner().invoke(app, arguments, env=ENVIRONMENT)


@needs_vnni
def test_a_recipes_model_becomes_a_pipeline(tmp_path):
    model = saved_model(tmp_path / "model")
    result = export(tmp_path / "model", tmp_path / "openvino")
    assert result.exit_code == 0, result.output
    assert "correction" not in result.stdout
    assert "scales moved behind their layers" in result.stdout
    assert f"The model is in {tmp_path / 'openvino'}" in result.stdout
    denoiser = OVDenoiser.load(tmp_path / "openvino" / "unet")
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "openvino" / "scheduler")
    assert scheduler.config.beta_schedule == "squaredcos_cap_v2"
    pipeline = DDIMPipeline(unet=denoiser, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    assert len(pipeline(batch_size=2, num_inference_steps=4, output_type="np").images) == 2
    sample = torch.randn(2, 1, 8, 8)
    ours, theirs = denoiser(sample, 250).sample, model(sample, 250)
    assert (ours - theirs).norm() < 0.05 * theirs.norm()


@needs_vnni
def test_the_output_correction_comes_along(tmp_path):
    saved_model(tmp_path / "model")
    timesteps, ones = torch.tensor([0.0, 250.0, 500.0, 750.0]), torch.ones(4, 1)
    offsets = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 1, 8, 8)
    fitted = tdq.OutputCorrection(timesteps, ones, 0 * ones, offsets)
    fitted.save(tmp_path / "model" / CORRECTION_FILE)
    result = export(tmp_path / "model", tmp_path / "openvino")
    assert result.exit_code == 0, result.output
    assert (
        f"output correction, which the UNet does not apply, is {CORRECTION_FILE}" in result.stdout
    )
    correction = tdq.load_correction(tmp_path / "openvino" / CORRECTION_FILE)
    denoiser = OVDenoiser.load(tmp_path / "openvino" / "unet")
    sample = torch.randn(2, 1, 8, 8)
    corrected = tdq.CorrectedDenoiser(denoiser, correction)(sample, 250).sample
    torch.testing.assert_close(corrected, denoiser(sample, 250).sample + 1)


def test_a_folder_without_a_model_is_one_message(tmp_path):
    result = export(tmp_path / "no", tmp_path / "openvino")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert "quantization.json is not readable JSON" in result.stderr
    assert not (tmp_path / "openvino").exists()


def test_the_model_of_another_adapter_is_told_from_one_that_is_missing(tmp_path):
    (tmp_path / "int8").mkdir()
    (tmp_path / "int8" / "model.onnx").touch()
    result = export(tmp_path, tmp_path / "openvino")
    assert result.exit_code == 1
    assert "is not readable JSON: the folder has none, but ['model.onnx']. Give" in result.stderr
    assert "that save_int8 wrote; recipes of other adapters write other files" in result.stderr
