"""Quality of the PTQ methods on the digits DDIM, over several calibration draws.

    python benchmarks/quality_digits.py --jobs 2

Each draw is a run of the recipe `ddim-digits-ptq` with another seed, that is with other calibration
trajectories and other batches; the noise of the evaluation is the same for all. An interrupted
study goes on where it stopped. Rivals that are trained run on every draw, the other methods once.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median
from typing import Any

from tdq_plugin.files import atomic_file

EVERY_DRAW = ["lsq", "tdq"]
ONCE = {
    "int8_methods": ["learned_table", "minmax", "mse", "timestep_minmax", "tdq_paper"],
    "fake_methods": ["dynamic"],
}
METRICS = {
    "trajectory_mse": "error, seen t",
    "trajectory_mse_unseen": "error, unseen t",
    "t0_mse": "error, t = 0",
    "pixel_mse": "pixel MSE",
    "frechet_distance": "Fréchet to data",
    "frechet_distance_to_float": "Fréchet to float",
}


def main() -> None:
    """Run what is missing, then write the results."""
    options = parse_arguments()
    jobs = [(bits, draw) for draw in range(options.draws) for bits in options.bits]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda job: run_draw(options, *job), jobs))
    results = {bits: summarise(options, bits) for bits in options.bits}
    content = {"command": " ".join(["python", *sys.argv]), "results": results}
    write(options.results.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
    write(options.results.with_suffix(".md"), markdown(options, results))
    print(options.results.with_suffix(".md").read_text())


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", nargs="+", default=["W8A4", "W4A4"])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--noise-seed", type=int, default=57)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--output", type=Path, default=Path("runs/quality"))
    parser.add_argument("--results", type=Path, default=Path("studies/ddim-digits-ptq"))
    return parser.parse_args()


def run_draw(options: argparse.Namespace, bits: str, draw: int) -> None:
    """One run of the recipe, in a process of its own; its output goes to a log file."""
    once = ONCE if draw == 0 else {"int8_methods": [], "fake_methods": []}
    settings = {
        "bits": bits,
        "seed": draw,
        "threads": 1,
        "name": f"{bits}-draw{draw}",
        "output": options.output,
        "int8_methods": json.dumps(EVERY_DRAW + once["int8_methods"]),
        "fake_methods": json.dumps(once["fake_methods"]),
        "evaluation.samples": options.samples,
        "evaluation.seed": options.noise_seed,
        "latency_rounds": 2,
    }
    if (report_path(options, bits, draw)).exists():
        return
    options.output.mkdir(parents=True, exist_ok=True)
    command = ["tdq", "run", "ddim-digits-ptq", *(f"{k}={v}" for k, v in settings.items())]
    with (options.output / f"{bits}-draw{draw}.log").open("a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)
    print(f"{bits}, draw {draw}: done", flush=True)


def report_path(options: argparse.Namespace, bits: str, draw: int) -> Path:
    """Where the recipe writes its report."""
    path: Path = options.output / f"{bits}-draw{draw}" / "report.json"
    return path


def summarise(options: argparse.Namespace, bits: str) -> dict[str, Any]:
    """All rows of all draws by method, and TDQ relative to static LSQ."""
    reports = [
        json.loads(report_path(options, bits, draw).read_text()) for draw in range(options.draws)
    ]
    rows: dict[str, dict[str, list[float]]] = {}
    for report in reports:
        for row in report["rows"]:
            values = rows.setdefault(f"{row['method']} ({row['execution']})", {})
            for metric in METRICS:
                values.setdefault(metric, []).append(row[metric])
    return {
        "samples": options.samples,
        "feature_space": reports[0]["rows"][0]["feature_space"],
        "noise_floor": reports[0]["noise_floor"],
        "rows": rows,
        "tdq_to_static_lsq": {
            name: ratios(rows[f"TDQ{name} (int8)"], rows[f"static LSQ{name} (int8)"])
            for name in ("", ", corrected")
        },
    }


def ratios(
    tdq: dict[str, list[float | None]], lsq: dict[str, list[float | None]]
) -> dict[str, float | None]:
    """Mean errors and median distances of TDQ divided by those of static LSQ."""
    found: dict[str, float | None] = {}
    for metric in METRICS:
        middle: Any = median if "frechet" in metric else mean
        known = None not in tdq[metric]
        found[metric] = middle(tdq[metric]) / middle(lsq[metric]) if known else None
    return found


def markdown(options: argparse.Namespace, results: dict[str, Any]) -> str:
    """Tables for people."""
    lines = ["# PTQ of the digits DDIM", ""]
    lines += [
        f"Command: `{' '.join(['python', *sys.argv])}`. Median [smallest, largest] over "
        f"{options.draws} calibration draws; {options.samples} samples a row; rows without "
        "brackets ran once. Lower is better.",
        "",
    ]
    for bits, result in results.items():
        floor = result["noise_floor"]["frechet_distance_to_float"]
        lines += [f"## {bits}", ""]
        lines += ["| method | " + " | ".join(METRICS.values()) + " |"]
        lines += ["| --- |" + " --- |" * len(METRICS)]
        for name, values in result["rows"].items():
            cells = [cell(values[metric]) for metric in METRICS]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        for name, found in result["tdq_to_static_lsq"].items():
            shares = ["–" if value is None else f"{value:.2f}" for value in found.values()]
            lines.append(f"| **TDQ / static LSQ{name}** | " + " | ".join(shares) + " |")
        lines += ["", f"Float against float from other noise: {floor:.2f}.", ""]
    return "\n".join(lines)


def cell(values: list[float | None]) -> str:
    """Median and range of one metric."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    if len(set(known)) == 1:
        return f"{known[0]:.3g}"
    return f"{median(known):.3g} [{min(known):.3g}, {max(known):.3g}]"


def write(path: Path, text: str) -> None:
    """Replace a file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
