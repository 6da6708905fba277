"""What each method has made of the model: its scale table, and the weights that it rounded."""

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tdq_plugin as tdq
from tdq_plugin.files import atomic_file
from tdq_plugin.freeze import evaluate_table
from tdq_plugin.recipes.ptq.methods import METHODS
from tdq_plugin.recipes.ptq.weights import set_weight_ranges
from tdq_plugin.recipes.run_state import RunState
from tdq_plugin.scales import TrainableBank
from tdq_plugin.weights import WeightQuantizer

__all__ = ["MethodStates"]


class MethodStates:
    """Brings one model into the state of any finished method.

    Args:
        state: The run; the tables and weights lie below its folder.
        model: The attached model, with the weights that every method starts from.
    """

    def __init__(self, state: RunState, model: nn.Module) -> None:
        self._state, self._model = state, model
        self._original = {name: value.clone() for name, value in _weights(model).items()}
        self._grids = {
            module: module.grid for module in model.modules() if isinstance(module, WeightQuantizer)
        }

    def finished(self, method: str) -> bool:
        """Whether a method has been saved."""
        return self._state.table_path(method).exists()

    def save(self, method: str, bank: TrainableBank, timesteps: list[float]) -> None:
        """Save a method's scales and the weights that it changed; the table comes last."""
        weights = _weights(self._model)
        changed = {
            name: value
            for name, value in weights.items()
            if not torch.equal(value, self._original[name])
        }
        with atomic_file(self._state.weights_path(method)) as temporary:
            save_file(changed, temporary)
        evaluate_table(bank, timesteps).save(self._state.table_path(method))

    def reset(self) -> None:
        """Give the model back the weights that every method starts from."""
        self._load(self._original)
        for quantizer, grid in self._grids.items():
            quantizer.grid = grid

    def load(self, method: str) -> nn.Module:
        """The model with a method's weights and scale table."""
        self.reset()
        own = METHODS[method].weights
        if own is not None:
            set_weight_ranges(self._model, own)
        self._load(load_file(self._state.weights_path(method)))
        tdq.load_scales(self._model, tdq.load_table(self._state.table_path(method)))
        for _, quantizer in tdq.named_quantizers(self._model):
            quantizer.mode = "dynamic" if METHODS[method].dynamic else "quantize"
        return self._model

    @torch.no_grad()
    def _load(self, weights: dict[str, Tensor]) -> None:
        current = _weights(self._model)
        for name, value in weights.items():
            current[name].copy_(value)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    weights = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if not name.startswith("scale_bank.")
    }
    for path, module in model.named_modules():
        if isinstance(module, WeightQuantizer):
            weights |= {f"{path}.{name}": value for name, value in module.named_buffers()}
    return weights
