"""The `tdq` command. It imports torch only in the verbs that need it."""

import errno
import logging
import platform
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tdq_plugin.errors import ConfigError, TDQError
from tdq_plugin.extras import INSTALL

try:
    import typer
    from rich.console import Console
    from rich.table import Table
    from typer.core import TyperGroup
except ModuleNotFoundError as error:
    sys.exit(f"The tdq command needs {error.name}. {INSTALL.format('recipes')}")

from tdq_plugin.export_cli import export
from tdq_plugin.study_cli import study

if TYPE_CHECKING:
    from tdq_plugin.recipes import Recipe
    from tdq_plugin.recipes.config import RecipeConfig
    from tdq_plugin.table import ScaleTable

__all__ = ["app", "main"]

# diffusers imports torchao where it is installed; on a CPU, these tell what it lacks of a GPU.
TORCHAO_LOGGERS = (
    "torchao",
    "torch.utils._pytree",
    "diffusers.quantizers.torchao.torchao_quantizer",
)
FRAMEWORKS = ("torch", "torchao", "brevitas", "nncf", "diffusers", "onnxruntime", "openvino")


class _Commands(TyperGroup):
    """Prints an error of this package, or of a file or disk, as a message without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        for name in TORCHAO_LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            return super().invoke(ctx)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # The reader of a pipe has gone; click knows what to do.
            shown: Exception = error
        except TDQError as error:
            shown = error
        _console(stderr=True).print("error:", str(shown), style="red", markup=False)
        raise typer.Exit(1)


app = typer.Typer(
    cls=_Commands,
    help="Timestep-dependent activation scales for diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(export, name="export")
app.command()(study)


def main() -> None:
    """Entry point of the console script."""
    app()


@app.command()
def recipes() -> None:
    """List the recipes."""
    from tdq_plugin.recipes import RECIPES

    table = Table("recipe", "what it does")
    for recipe in RECIPES.values():
        table.add_row(recipe.name, recipe.description)
    _console().print(table)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, see `tdq recipes`.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Configuration values.")
    ] = None,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print the configuration; do not run.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the plan; do not run.")
    ] = False,
) -> None:
    """Run a recipe."""
    from tdq_plugin.recipes import find_recipe

    chosen = find_recipe(recipe)
    try:
        config = chosen.configure(overrides)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"The recipe {recipe!r} needs {error.name}. {INSTALL.format('recipes')}"
        ) from None
    if show_config:
        import yaml

        typer.echo(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), nl=False)
    elif dry_run:
        typer.echo(chosen.plan(config))
    else:
        typer.echo(f"Results are in {_run(chosen, config)}")


@app.command()
def inspect(
    table: Annotated[Path, typer.Argument(help="A scale table, TABLE.safetensors.")],
) -> None:
    """Show the scales of a frozen table."""
    from tdq_plugin.table import load_table

    scales = load_table(table)
    low, high = float(scales.timesteps[0]), float(scales.timesteps[-1])
    typer.echo(
        f"{len(scales.names)} quantizers, {len(scales.timesteps)} timesteps {low:g} .. {high:g}"
    )
    _console().print(_summary(scales))


@app.command()
def doctor() -> None:
    """Show versions, which adapters can be used, and what this CPU's int8 kernels do."""
    from tdq_plugin.deploy.halves import has_32_bit_sums
    from tdq_plugin.registry import ENTRY_POINT_GROUP, unavailable_adapters

    versions = Table("package", "version")
    versions.add_row("python", platform.python_version())
    for name in ("tdq-plugin", *FRAMEWORKS):
        versions.add_row(name, _version(name))
    adapters = Table("adapter", "available")
    missing = unavailable_adapters()
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: entry.name):
        why = missing.get(entry.name)
        adapters.add_row(entry.name, "yes" if why is None else f"no: {why}")
    _console().print(versions, adapters)
    typer.echo(
        "int8: this CPU's kernels add products in 32 bits, as they should."
        if has_32_bit_sums()
        else "int8: this CPU has no VNNI. OpenVINO's, onnxruntime's and Inductor's layers with 8 "
        "bits on both sides can be wrong here, see docs/openvino.md; lower_to_int8 is exact."
    )


def _run(recipe: "Recipe", config: "RecipeConfig") -> Path:
    try:
        return recipe.run(config)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            # A full disk does not say where it is.
            error.filename = str(config.run_folder)
        raise


def _summary(table: "ScaleTable") -> Table:
    shown = Table("quantizer", "bits", "smallest scale", "largest scale", "ratio", "zero point")
    for column, (name, grid) in enumerate(table.grids.items()):
        low, high = (float(value) for value in table.scales[:, column].aminmax())
        zeros = sorted({int(zero) for zero in table.zero_points[:, column].tolist()})
        zero_point = f"{zeros[0]}" if len(zeros) == 1 else f"{zeros[0]} .. {zeros[-1]}"
        shown.add_row(
            name, str(grid.bits), f"{low:.4g}", f"{high:.4g}", f"{high / low:.2f}", zero_point
        )
    return shown


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _console(stderr: bool = False) -> Console:
    # Made for each use, so that it writes to the stream of that moment.
    return Console(stderr=stderr, highlight=False, soft_wrap=stderr)
