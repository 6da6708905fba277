"""Tracing: the graph equals the model at other batch sizes and in every form of the timestep."""

import copy
import warnings
from functools import cache

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from diffusers_models import tiny_unet
from torch import Tensor, fx, nn
from torch.ao.quantization import QConfigMapping, get_default_qat_qconfig
from torch.ao.quantization.quantize_fx import prepare_qat_fx
from torch.nn import functional

from tdq_plugin.errors import TimestepError, TraceError
from tdq_plugin.graph import copy_module_paths, find_timestep_node, trace
from tdq_plugin.timestep import as_timesteps

TIMESTEPS = [
    pytest.param(7, id="int"),
    pytest.param(7.0, id="float"),
    pytest.param(torch.tensor(3), id="0-d"),
    pytest.param(torch.tensor([3]), id="one"),
    pytest.param(torch.tensor([3.0]), id="one-float"),
    pytest.param(torch.tensor([1, 500, 999]), id="per-sample"),
]


def unet(**options) -> nn.Module:
    return tiny_unet(in_channels=3, out_channels=3, **options)


def conditional_unet(**options) -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **options,
    )


def dit() -> nn.Module:
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        norm_num_groups=4,
        num_embeds_ada_norm=10,
    )


def image(batch: int) -> dict:
    return {"sample": torch.randn(batch, 3, 8, 8), "timestep": 10}


def labelled_image(batch: int) -> dict:
    return {**image(batch), "class_labels": torch.arange(batch)}


def prompted_image(batch: int) -> dict:
    return {**image(batch), "encoder_hidden_states": torch.randn(batch, 7, 12)}


def prompted_image_with_sizes(batch: int) -> dict:
    sizes = {"text_embeds": torch.randn(batch, 10), "time_ids": torch.randn(batch, 6)}
    return {**prompted_image(batch), "added_cond_kwargs": sizes}


def latent(batch: int) -> dict:
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8),
        "timestep": 10,
        "class_labels": torch.arange(batch),
    }


def text_time_unet() -> nn.Module:
    return conditional_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 10,
    )


def fir_unet() -> nn.Module:
    return unet(
        block_out_channels=(32, 32),
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    )


MODELS = [
    pytest.param(unet, image, id="unet"),
    pytest.param(lambda: unet(resnet_time_scale_shift="scale_shift"), image, id="scale-shift"),
    pytest.param(lambda: unet(time_embedding_type="fourier"), image, id="fourier"),
    pytest.param(lambda: unet(num_class_embeds=4), labelled_image, id="class-labels"),
    pytest.param(fir_unet, image, id="numpy-constants"),
    pytest.param(conditional_unet, prompted_image, id="cross-attention"),
    pytest.param(text_time_unet, prompted_image_with_sizes, id="nested-inputs"),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def reference(model: nn.Module, inputs: dict) -> Tensor:
    return model(**inputs, return_dict=False)[0]


@cache
def traced_once(build, make_inputs) -> tuple[nn.Module, fx.GraphModule]:
    """For tests that change neither."""
    model = build().eval()
    return model, trace(model, make_inputs(2))


@pytest.mark.parametrize("timestep", TIMESTEPS)
@pytest.mark.parametrize(("build", "make_inputs"), MODELS)
def test_graph_equals_model_at_another_batch_size(build, make_inputs, timestep):
    model, graph_module = traced_once(build, make_inputs)
    inputs = {**make_inputs(3), "timestep": timestep}
    with torch.no_grad():
        torch.testing.assert_close(graph_module(**inputs), reference(model, inputs), rtol=0, atol=0)


@pytest.mark.parametrize("example_timestep", [4, torch.tensor([4, 5])])
def test_graph_of_a_transformer_equals_the_model(example_timestep):
    model = dit().eval()
    graph_module = trace(model, {**latent(2), "timestep": example_timestep})
    inputs = {**latent(3), "timestep": torch.tensor([1, 500, 999])}
    with torch.no_grad():
        torch.testing.assert_close(graph_module(**inputs), reference(model, inputs), rtol=0, atol=0)


def test_graph_traced_at_batch_one_serves_mixed_timesteps():
    model = unet().eval()
    graph_module = trace(model, (torch.randn(1, 3, 8, 8), 0))
    inputs = (torch.randn(3, 3, 8, 8), torch.tensor([0, 10, 999]))
    with torch.no_grad():
        torch.testing.assert_close(graph_module(*inputs), model(*inputs).sample, rtol=0, atol=0)


def test_timestep_matters():
    _, graph_module = traced_once(unet, image)
    sample = torch.randn(1, 3, 8, 8)
    assert not torch.equal(graph_module(sample, 0), graph_module(sample, 999))


def test_inputs_are_the_example_arguments_under_their_names():
    graph_module = trace(unet(num_class_embeds=4), (torch.randn(2, 3, 8, 8), 10, torch.arange(2)))
    inputs = [node.target for node in graph_module.graph.find_nodes(op="placeholder")]
    assert inputs == ["sample", "timestep", "class_labels"]


def test_leaf_modules_keep_their_names_and_are_shared():
    model, graph_module = traced_once(conditional_unet, prompted_image)
    called = {node.target for node in graph_module.graph.find_nodes(op="call_module")}
    layers = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert layers <= called
    assert all(graph_module.get_submodule(name) is model.get_submodule(name) for name in layers)


def test_every_node_knows_the_module_that_ran_it():
    graph = traced_once(unet, image)[1].graph
    paths = {str(node.target): node.meta["module_path"] for node in graph.nodes}
    assert paths["down_blocks.0.resnets.0.conv1"] == "down_blocks.0.resnets.0"
    assert paths["mid_block.attentions.0.to_out.0"] == "mid_block.attentions.0"
    assert paths["conv_in"] == ""
    attention = graph.find_nodes(op="call_function", target=functional.scaled_dot_product_attention)
    assert attention[0].meta["module_path"] == "down_blocks.1.attentions.0"


def test_gradients_equal_the_models():
    model = unet()
    graph_module = trace(model, image(2))
    inputs = {**image(3), "timestep": torch.tensor([1, 2, 3])}
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = torch.autograd.grad(reference(model, inputs).square().sum(), parameters)
    actual = torch.autograd.grad(graph_module(**inputs).square().sum(), parameters)
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for name, left, right in zip(names, actual, expected, strict=True):
        # Gradients that meet in one tensor are summed in another order; those of a key's bias are
        # zero but for rounding.
        tolerance = 1e-5 * float(right.abs().max()) + 1e-7 * largest
        torch.testing.assert_close(left, right, rtol=1e-5, atol=tolerance, msg=name)


def test_deepcopy_has_its_own_parameters_and_the_same_output():
    graph_module = trace(unet().eval(), image(2))
    inputs = image(3)
    before = graph_module(**inputs)
    duplicate = copy.deepcopy(graph_module)
    with torch.no_grad():
        for parameter in graph_module.parameters():
            parameter.zero_()
    torch.testing.assert_close(duplicate(**inputs), before, rtol=0, atol=0)
    assert find_timestep_node(duplicate.graph) is not None


def test_graph_moves_to_another_device():
    graph_module = trace(unet().eval(), image(2)).to("meta")
    output = graph_module(torch.empty(3, 3, 8, 8, device="meta"), 5)
    assert output.device.type == "meta"
    assert output.shape == (3, 3, 8, 8)


def prepare(graph_module: fx.GraphModule, inputs: dict) -> fx.GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qconfig = get_default_qat_qconfig("x86")
        mapping = QConfigMapping().set_object_type(nn.Conv2d, qconfig)
        mapping = mapping.set_object_type(nn.Linear, qconfig)
        return prepare_qat_fx(graph_module.train(), mapping, tuple(inputs.values()))


@pytest.mark.parametrize(("build", "make_inputs"), [MODELS[0], MODELS[5]])
@pytest.mark.filterwarnings("ignore")
def test_timestep_node_survives_prepare_qat(build, make_inputs):
    prepared = prepare(trace(build(), make_inputs(2)), make_inputs(2))
    node = find_timestep_node(prepared.graph)
    assert node is not None
    assert node.args[0].target == "timestep"
    for timestep in (5, torch.tensor(5), torch.tensor([1, 2, 3])):
        prepared(**{**make_inputs(3), "timestep": timestep}).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in prepared.parameters())


@pytest.mark.filterwarnings("ignore")
def test_module_paths_can_be_copied_to_a_retraced_graph():
    graph_module = trace(unet(), image(2))
    prepared = prepare(graph_module, image(2))
    assert not any("module_path" in node.meta for node in prepared.graph.nodes)
    copy_module_paths(graph_module.graph, prepared.graph)
    for node in prepared.graph.find_nodes(
        op="call_function", target=functional.scaled_dot_product_attention
    ):
        # The attention's output flows, through a quantizer at most, into its own projection.
        assert f"{node.meta['module_path']}.to_out.0" in downstream_modules(node)


def downstream_modules(node: fx.Node) -> set[str]:
    found: set[str] = set()
    users = list(node.users)
    while users and not any(name.endswith("to_out.0") for name in found):
        user = users.pop(0)
        found.add(str(user.target))
        users.extend(user.users)
    return found


class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.dropout = nn.Dropout(0.5)

    def forward(self, sample, timestep):
        hidden = functional.dropout(self.linear(sample), 0.5, self.training)
        return self.dropout(hidden) + 0 * timestep.view(-1, 1)


@pytest.mark.parametrize("traced_in_training", [True, False])
def test_dropout_follows_the_graphs_mode(traced_in_training):
    model = FunctionalDropout().train(traced_in_training)
    graph_module = trace(model, (torch.randn(2, 64), 0))
    assert graph_module.training is traced_in_training
    assert all(module.training is traced_in_training for module in graph_module.modules())
    sample = torch.randn(4, 64)
    torch.testing.assert_close(graph_module.eval()(sample, 0), model.linear(sample))
    dropped = (graph_module.train()(sample, 0) == 0).float().mean()
    assert 0.6 < dropped < 0.9  # two dropouts of one half each: three quarters


class WithState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, t):
        self.calls += 1
        x += 1
        return self.dropout(self.norm(x)) * t.view(-1, 1) + torch.tensor([1.0, 2.0, 3.0, 4.0])


def test_tracing_leaves_model_and_example_alone():
    model = WithState()
    model.dropout.eval()
    state = copy.deepcopy(model.state_dict())
    attributes = set(vars(model))
    example = torch.randn(3, 4)
    kept = example.clone()
    trace(model, (example, 1))
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    assert set(vars(model)) == attributes
    assert [model.training, model.norm.training, model.dropout.training] == [True, True, False]
    assert torch.equal(example, kept)


def test_graph_with_a_timestep_node_is_returned_as_it_is():
    _, graph_module = traced_once(unet, image)
    assert trace(graph_module, image(2)) is graph_module


class Denoiser(nn.Module):
    def forward(self, sample, timestep):
        return sample * timestep.reshape(-1, 1)


def test_graph_traced_elsewhere_gets_a_timestep_node():
    plain = fx.symbolic_trace(Denoiser())
    graph_module = trace(plain, (torch.ones(2, 3), 4))
    node = find_timestep_node(graph_module.graph)
    assert node.target is as_timesteps
    assert find_timestep_node(plain.graph) is None
    assert torch.equal(graph_module(torch.ones(2, 3), 4), torch.full((2, 3), 4.0))


def test_named_timestep_argument():
    class Model(nn.Module):
        def forward(self, x, step):
            return x * step

    graph_module = trace(Model(), (torch.ones(2), 3), timestep_argument="step")
    assert torch.equal(graph_module(torch.ones(2), 5), torch.full((2,), 5.0))
    with pytest.raises(TimestepError, match="timestep_argument"):
        trace(Model(), (torch.ones(2), 3))


class BranchesOnValues(nn.Module):
    def forward(self, sample, timestep):
        return sample if sample.sum() > 0 else -sample


class ReadsValues(nn.Module):
    def forward(self, sample, timestep):
        return sample * max(sample.max().item(), 1.0)


@pytest.mark.parametrize("model", [BranchesOnValues(), ReadsValues()])
def test_values_that_decide_control_flow_are_refused(model):
    with pytest.raises(TraceError, match=r"uses the values of the tensor.*torch\.where"):
        trace(model, (torch.randn(2, 3), 0))


class WritesInPlace(nn.Module):
    def forward(self, sample, timestep):
        sample[:, 0] = 0
        return sample


def test_what_cannot_be_recorded_is_named():
    with pytest.raises(TraceError, match=r"WritesInPlace.*item assignment.*tensor operations"):
        trace(WritesInPlace(), (torch.randn(2, 3), 0))


def test_example_that_forward_rejects_is_named():
    with pytest.raises(TraceError, match=r"UNet2DModel\.forward raises RuntimeError.*5 channels"):
        trace(unet(), (torch.randn(1, 5, 8, 8), 0))


def test_example_that_misses_an_argument_is_named():
    with pytest.raises(TraceError, match="missing a required argument: 'encoder_hidden_states'"):
        trace(conditional_unet(), (torch.randn(1, 3, 8, 8), 0))


def test_example_without_the_timestep_is_refused():
    class Model(nn.Module):
        def forward(self, sample, timestep=None):
            return sample

    with pytest.raises(TraceError, match="lack the timestep argument 'timestep'"):
        trace(Model(), (torch.ones(1),))


def test_variadic_arguments_are_refused():
    class Model(nn.Module):
        def forward(self, sample, timestep, **extra):
            return sample

    with pytest.raises(TraceError, match="variadic argument 'extra'"):
        trace(Model(), {"sample": torch.ones(1), "timestep": 0, "mask": torch.ones(1)})
