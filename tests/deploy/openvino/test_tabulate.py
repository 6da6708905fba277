"""The pass that tabulates what depends on the timestep alone."""

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from tdq_plugin.deploy.openvino.precision import DEFAULT_PROPERTIES
from tdq_plugin.deploy.openvino.tabulate import tabulate_timestep_path

STEPS = np.array([0, 100, 250, 999], dtype=np.float32)
WEIGHT = np.random.default_rng(0).standard_normal((1, 5)).astype(np.float32)


def constant(value, dtype=np.float32):
    return ops.constant(np.asarray(value, dtype=dtype))


def embedding(timestep):
    """Shape (N, 5)."""
    return ops.sin(
        ops.matmul(ops.unsqueeze(timestep, constant(1, int)), constant(WEIGHT), *[False] * 2)
    )


def build(join):
    """A model of a sample `(B, 5)` and a timestep `(N,)`."""
    sample, timestep = ops.parameter((-1, 5), np.float32), ops.parameter((-1,), np.float32)
    for parameter, name in ((sample, "sample"), (timestep, "timestep")):
        parameter.set_friendly_name(name)
    return ov.Model([join(sample, timestep)], [sample, timestep])


def run(model, rows, timesteps):
    compiled = ov.Core().compile_model(model, "CPU", DEFAULT_PROPERTIES)
    sample = np.random.default_rng(1).standard_normal((rows, 5)).astype(np.float32)
    return compiled([sample, np.array(timesteps, dtype=np.float32)])[0]


def operations(model):
    return {node.get_type_name() for node in model.get_ops()}


def spread(sample, timestep):
    """As diffusers: one timestep becomes one for each sample."""
    batch = ops.gather(ops.shape_of(sample), constant([0], int), constant(0, int))
    return ops.broadcast(timestep, batch)


@pytest.mark.parametrize(("rows", "timesteps"), [(1, [100]), (3, [250]), (4, [999, 0, 250, 100])])
@pytest.mark.parametrize("steps", [STEPS, STEPS[1:2]])
def test_the_path_becomes_a_gather(rows, timesteps, steps):
    model = build(lambda x, t: ops.multiply(ops.add(x, embedding(spread(x, t))), embedding(t)))
    tabulated = model.clone()
    tabulate_timestep_path(tabulated, "timestep", steps, mixed_timesteps=True)
    assert not operations(tabulated) & {"Sin", "MatMul", "Broadcast"}
    timesteps = timesteps if len(steps) > 1 else [100]
    np.testing.assert_array_equal(run(tabulated, rows, timesteps), run(model, rows, timesteps))
    if len(steps) > 1:
        wrong = run(tabulated, rows, [0 if t else 999 for t in timesteps])
        assert np.abs(wrong - run(model, rows, timesteps)).max() > 0.01


@pytest.mark.parametrize("rows", [1, 3])
def test_one_timestep_a_call(rows):
    def join(x, t):
        first = ops.gather(t, constant([0], int), constant(0, int))
        number = ops.squeeze(ops.sin(first), constant(0, int))
        return ops.multiply(ops.add(x, embedding(first)), number)

    model = build(join)
    tabulated = model.clone()
    tabulate_timestep_path(tabulated, "timestep", STEPS, mixed_timesteps=False)
    assert "Sin" not in operations(tabulated)
    np.testing.assert_array_equal(run(tabulated, rows, [250]), run(model, rows, [250]))


STAYS = {
    "no row per sample": lambda x, t: ops.add(
        x, embedding(ops.reduce_mean(t, constant([0], int), keep_dims=True))
    ),
    "concatenated": lambda x, t: ops.concat([x, embedding(spread(x, t))], 1),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_cannot_be_tabulated_is_computed(name):
    model = build(STAYS[name])
    tabulated = model.clone()
    tabulate_timestep_path(tabulated, "timestep", STEPS, mixed_timesteps=True)
    assert "Sin" in operations(tabulated)
    for timesteps in ([250], [999, 0]):
        np.testing.assert_array_equal(run(tabulated, 2, timesteps), run(model, 2, timesteps))


def test_a_model_without_a_timestep_path():
    model = build(lambda x, t: ops.relu(x))
    tabulate_timestep_path(model, "timestep", STEPS, mixed_timesteps=True)
    assert operations(model) == {"Parameter", "Relu", "Result"}
