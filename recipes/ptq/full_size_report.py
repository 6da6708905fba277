"""The result of a full-size PTQ recipe: `results.json`, and the same as Markdown and HTML."""

import base64
import json
from collections.abc import Iterable
from typing import Any

from tdq_plugin.files import atomic_file
from tdq_plugin.recipes.correction import CORRECTED, row_title
from tdq_plugin.recipes.evaluation.image_quality import FEATURE_SPACES
from tdq_plugin.recipes.evaluation.sample_rows import SampleRows
from tdq_plugin.recipes.ptq.full_size import FLOAT, FullSizePTQRun
from tdq_plugin.recipes.ptq.methods import METHODS
from tdq_plugin.recipes.ptq.weights import is_symmetric
from tdq_plugin.recipes.report_parts import command, versions
from tdq_plugin.study.figures import sample_grid
from tdq_plugin.study.markup import (
    Markup,
    definitions,
    document,
    number,
    paragraph,
    section,
    table,
    tag,
)
from tdq_plugin.study.schema import SizeBytes

__all__ = ["write_results"]

COLUMNS = {"frechet_distance": "Fréchet distance ↓", "inception_score": "Inception score ↑"}
CORRECTION = (
    "The method with an output correction: its prediction is brought near the float model's, and "
    "after every step, the mean of its samples is that of the float model's."
)


def write_results(
    recipe: str,
    run: FullSizePTQRun,
    rows: SampleRows,
    sizes: dict[str, SizeBytes],
) -> None:
    """Write what was measured.

    Args:
        recipe: Name of the recipe.
        run: The finished run.
        rows: Of the float model and of every method.
        sizes: Of the saved models, by method.
    """
    config = run.config
    results = {
        "recipe": recipe,
        "command": command(recipe, config),
        "seed": config.seed,
        "bits": config.bits,
        "weights": config.weights,
        "steps": config.evaluation.steps,
        "samples": config.evaluation.samples,
        "feature_space": FEATURE_SPACES[config.evaluation.features],
        "versions": versions("tdq-plugin", "torch", "diffusers", "torchmetrics"),
        "rows": [{"model": name, **rows.row(name)} for name in (FLOAT, *config.rows)],
        "size_bytes": sizes,
    }
    texts = {
        "results.json": json.dumps(results, indent=2) + "\n",
        "results.md": _markdown(results),
        "results.html": _page(results, _pictures(config.rows, rows)),
    }
    for name, text in texts.items():
        with atomic_file(run.state.folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _title(model: str) -> str:
    return model if model == FLOAT else row_title(METHODS, model)


def _conditions(results: dict[str, Any]) -> str:
    saved = is_symmetric(results["weights"])
    return (
        f"{results['bits']}, weights {results['weights']}. {results['samples']:,} samples by "
        f"{results['steps']} DDIM steps, quantization simulated in float32. Features: "
        f"{results['feature_space']}."
        + ("" if saved else " No int8 models: integer kernels take symmetric weights.")
    )


def _cells(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    scores = [score for score in COLUMNS if score in results["rows"][0]]
    rows = [
        [_title(row["model"]), *(number(row[score]) for score in scores)] for row in results["rows"]
    ]
    return ["Method", *(COLUMNS[score] for score in scores)], rows


def _markdown(results: dict[str, Any]) -> str:
    header, rows = _cells(results)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        [
            f"# {results['recipe']}",
            "",
            _conditions(results),
            "",
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
            f"Command: `{results['command']}`",
            "",
        ]
    )


def _pictures(models: Iterable[str], rows: SampleRows) -> Markup:
    shown = {_title(name): rows.images(name) for name in (FLOAT, *models)}
    png = base64.b64encode(sample_grid(shown, columns=8)).decode()
    return Markup(f'<div class="plate"><img src="data:image/png;base64,{png}" alt="samples"></div>')


def _page(results: dict[str, Any], pictures: Markup) -> str:
    header, rows = _cells(results)
    models = [row["model"] for row in results["rows"]]
    compared = {_title(name): METHODS[name].description for name in models if name in METHODS}
    if any(name.endswith(CORRECTED) for name in models):
        compared["corrected"] = CORRECTION
    return document(
        results["recipe"],
        tag("h1", results["recipe"]),
        paragraph(_conditions(results)),
        section("Results", table(header, rows)),
        section("What is compared", definitions(compared)),
        section("Samples from the same noise", pictures),
        section("How to reproduce", tag("pre", tag("code", results["command"]))),
    )
