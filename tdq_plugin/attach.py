"""`attach`: give a prepared model the one module that sees the timestep."""

from collections.abc import Iterator, Mapping
from typing import TypeVar

from torch import nn

from tdq_plugin.errors import AdapterError, ConfigError, TableMismatchError, TDQError
from tdq_plugin.quantizer import ActivationQuantizer
from tdq_plugin.registry import adapter_for
from tdq_plugin.scales.bank import BankFactory, ScaleBank
from tdq_plugin.scales.generator import GeneratorBank
from tdq_plugin.table import check_names

__all__ = ["attach", "named_quantizers", "scale_bank", "set_scale_bank"]

Model = TypeVar("Model", bound=nn.Module)


def attach(
    model: Model, bank: BankFactory | None = None, timestep_argument: str | None = None
) -> Model:
    """Attach a scale bank to a model that a framework has prepared; in place.

    Args:
        model: The prepared model.
        bank: Makes the bank from the grids by quantizer name. `GeneratorBank` is TDQ; pass
            `functools.partial(GeneratorBank, config=...)` to configure it, or another bank. By
            default the one that the framework's configuration asks for, else `GeneratorBank`.
        timestep_argument: Name of forward's argument that holds the timestep, if it is not
            `timestep`, `timesteps` or `t`.

    Returns:
        The model, with the bank as `model.scale_bank`.

    Raises:
        AdapterError: No adapter covers the model, it has no quantizers, or it, a part of it, or a
            model that it is a part of is attached already.
        ConfigError: No bank is given, and the quantizers' configurations ask for different ones.
        TimestepError: The model's forward has no timestep argument.
    """
    if hasattr(model, "scale_bank"):
        raise AdapterError("The model has a scale bank already. Use set_scale_bank to exchange it.")
    adapter = adapter_for(model)
    _check_parts(model)
    quantizers = adapter.quantizers(model)
    if not quantizers:
        raise AdapterError(
            "No compute layer of the model has a TDQ activation quantizer. "
            "Check the qconfig that the model was prepared with."
        )
    _name(quantizers)
    make = bank or _agreed_bank(quantizers)
    model.scale_bank = make({name: q.grid for name, q in quantizers.items()})
    try:
        adapter.connect(model, timestep_argument)
    except TDQError:
        # Else the corrected call would find a bank already.
        del model.scale_bank
        raise
    return model


def _check_parts(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, ScaleBank):
            part = path.rpartition(".")[0]
            raise AdapterError(
                f"The part {part!r} of this {type(model).__name__} is attached already, and a "
                "quantizer has one scale bank. Use the model as it is, with tdq_plugin's functions "
                f"on its part {part!r}, or attach the whole before any part."
            )


def _name(quantizers: Mapping[str, ActivationQuantizer]) -> None:
    for name, quantizer in quantizers.items():
        # The same name it has after an attach that was refused.
        if quantizer.name not in (None, name):
            raise AdapterError(
                f"The quantizer {name!r} is {quantizer.name!r} of another attached model, and a "
                "quantizer has one scale bank. Attach the whole or the part, not both."
            )
    for name, quantizer in quantizers.items():
        quantizer.name = name


def _agreed_bank(quantizers: Mapping[str, ActivationQuantizer]) -> BankFactory:
    asked = {quantizer.bank: name for name, quantizer in quantizers.items()}
    if len(asked) > 1:
        shown = "; ".join(f"{name!r} asks for {bank or 'none'}" for bank, name in asked.items())
        raise ConfigError(
            f"A model has one scale bank, and its quantizers ask for different ones: {shown}. "
            "Configure them alike, or give attach the bank."
        )
    return next(iter(asked)) or GeneratorBank


def scale_bank(model: nn.Module) -> ScaleBank:
    """The model's bank.

    Raises:
        AdapterError: The model is not attached.
    """
    bank = getattr(model, "scale_bank", None)
    if not isinstance(bank, ScaleBank):
        raise AdapterError(
            f"This {type(model).__name__} has no scale bank. Call tdq_plugin.attach(model) first."
        )
    return bank


def set_scale_bank(model: nn.Module, bank: ScaleBank) -> None:
    """Exchange the bank for another one with the same quantizers.

    Raises:
        TableMismatchError: The quantizers' names differ, their order, or their grids.
    """
    current = scale_bank(model)
    check_names(expected=current.names, given=bank.names)
    rows = zip(current.names, current.grids, strict=True)
    given = zip(bank.names, bank.grids, strict=True)
    for row, (mine, other) in enumerate(zip(rows, given, strict=True)):
        if mine != other:
            raise TableMismatchError(
                f"Row {row} of the new bank is {other[0]!r} with {other[1]}, the model has "
                f"{mine[0]!r} with {mine[1]}. Make the bank from the grids of "
                "tdq_plugin.scale_bank(model), in their order."
            )
    model.scale_bank = bank.to(current.device)


def named_quantizers(model: nn.Module) -> Iterator[tuple[str, ActivationQuantizer]]:
    """Name and module of every attached activation quantizer, in row order of the bank."""
    found = {
        module.name: module for module in model.modules() if isinstance(module, ActivationQuantizer)
    }
    for name in scale_bank(model).names:
        yield name, found[name]
