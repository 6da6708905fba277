"""The layers of a model whose rounding is being learned."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from tdq_plugin.errors import AdapterError
from tdq_plugin.reconstruct.blocks import Block
from tdq_plugin.rounding import LearnedRounding
from tdq_plugin.weights import WeightQuantizer

__all__ = ["RoundedLayers"]


class RoundedLayers:
    """Puts `LearnedRounding` in the place of weight quantizers for a while.

    Within a `with` statement the weights themselves stay float, so that the float model can still
    be run. At its end the rounded weights are written into the layers and the weight quantizers
    return: they reproduce exactly the codes that were learned. After an error the weights stay as
    they were.

    Args:
        model: An attached graph.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._roundings: dict[str, LearnedRounding] = {}

    def learn(self, block: Block) -> list[LearnedRounding]:
        """Start to learn the rounding of the block's layers, save those that are learned."""
        paths = dict.fromkeys(str(n.target) for n in block.nodes if n.op == "call_module")
        return [self._replace(path) for path in paths if self._has_quantizer(path)]

    def harden(self) -> None:
        """Decide every rounding; they are no longer trained."""
        for rounding in self._roundings.values():
            rounding.hard = True

    def state_dict(self) -> dict[str, Tensor]:
        """The learned variables by path of the layer."""
        return {path: rounding.v.detach() for path, rounding in self._roundings.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore layers that are learned."""
        for path, v in state.items():
            self._replace(path).v.data.copy_(v)
        self.harden()

    def check(self) -> None:
        """See that there is something to learn.

        Raises:
            AdapterError: No layer of the model has a weight quantizer.
        """
        if not any(self._has_quantizer(path) for path, _ in self._model.named_modules()):
            raise AdapterError(
                f"learn_rounding=True needs layers with a weight quantizer, and this "
                f"{type(self._model).__name__} has none that is enabled. Prepare the model with "
                "prepare_qat_fx, or set learn_rounding=False."
            )

    def __enter__(self) -> "RoundedLayers":
        return self

    @torch.no_grad()
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for path, rounding in self._roundings.items():
            layer = self._layer(path)
            if error is None:
                layer.weight.copy_(rounding(layer.weight))
            layer.weight_fake_quant = rounding.quantizer

    def _layer(self, path: str) -> Any:
        return self._model.get_submodule(path)

    def _has_quantizer(self, path: str) -> bool:
        quantizer = getattr(self._layer(path), "weight_fake_quant", None)
        return isinstance(quantizer, WeightQuantizer) and quantizer.enabled

    def _replace(self, path: str) -> LearnedRounding:
        layer = self._layer(path)
        rounding = LearnedRounding(layer.weight_fake_quant, layer.weight)
        layer.weight_fake_quant = self._roundings[path] = rounding
        return rounding
