"""The report as one HTML page that needs nothing beside itself."""

import re
from collections.abc import Mapping

from tdq_plugin.study.markup import (
    Markup,
    definitions,
    document,
    figure,
    number,
    paragraph,
    section,
    table,
    tag,
)
from tdq_plugin.study.results_table import results_section
from tdq_plugin.study.schema import Report, SizeBytes
from tdq_plugin.study.summary import summary

__all__ = ["render_page"]

LATENCY_LABELS = {
    "float32": "float32 model",
    "static_int8": "int8, static scales",
    "tdq_int8": "int8, TDQ scales read from the table",
    "dynamic_int8": "int8, scales computed from each input",
}


def render_page(report: Report, figures: Mapping[str, tuple[bytes, str]]) -> str:
    """Return the page as HTML.

    Args:
        report: A report that passed `validate_report`.
        figures: For each title a PNG and its caption.
    """
    title = f"{report['recipe']}, {report['bits']}"
    body = [
        tag("header", tag("p", "tdq-plugin study", kind="eyebrow"), tag("h1", title)),
        summary(report),
        _introduction(report),
        results_section(report),
        _figures(figures),
        _cost(report),
        _dynamics(report),
        _reproduce(report),
    ]
    return document(f"{title} | tdq-plugin", *body)


def _introduction(report: Report) -> Markup:
    weights, activations = re.findall(r"\d+", report["bits"])
    return section(
        "What is compared",
        paragraph(
            "A diffusion model draws an image step by step: one network is called many times, "
            "from pure noise (a high timestep t) down to the finished image (t = 0). "
            "Quantization lets that network calculate with small integers, which is faster and "
            "needs less memory, at the cost of rounding errors. Before an activation is rounded "
            "it is divided by a scale. A large scale rounds coarsely; a small one clips what does "
            "not fit."
        ),
        paragraph(
            "The range of the activations changes with t, more in some models than in others, so "
            "no single scale is right for the whole way. A static quantizer uses one all the "
            "same. A dynamic one measures every input while it runs, which costs time. Temporal "
            "dynamic quantization (TDQ) learns each scale as a function of t and stores it in a "
            "table, so that sampling only looks it up."
        ),
        paragraph(
            f"Here, {report['bits']} means weights of {weights} bits and activations of "
            f"{activations} bits ({2 ** int(activations)} levels). All methods quantize the same "
            "trained model and start from the same noise; the float32 model is what they are "
            "measured against."
        ),
        definitions(report.get("methods", {})),
    )


def _figures(figures: Mapping[str, tuple[bytes, str]]) -> Markup:
    shown = [figure(title, *drawn) for title, drawn in figures.items()]
    return section("Figures", *shown) if shown else Markup()


def _cost(report: Report) -> Markup:
    latency = report["latency"]
    times = [
        [label, number(latency[key])]  # type: ignore[literal-required]
        for key, label in LATENCY_LABELS.items()
    ]
    return section(
        "Speed and size",
        tag(
            "div",
            table(["Execution", "Time"], times, f"Time of one forward pass: {latency['unit']}."),
            _sizes(report["size_bytes"]),
            kind="pair",
        ),
    )


def _sizes(size: SizeBytes) -> Markup:
    rows = [["float32 model", f"{size['float32']:,}", "1.00"]]
    caption = "No method has a table of scales, so no int8 model was saved."
    if size["int8"] is not None:
        ratio = size["float32"] / size["int8"]
        rows.append(["int8 model with its table", f"{size['int8']:,}", number(1 / ratio)])
        caption = f"The int8 model is {number(ratio)} times smaller."
    return table(["Saved model", "Bytes", "Ratio"], rows, caption)


def _dynamics(report: Report) -> Markup:
    dynamics = report.get("temporal_dynamics")
    if not dynamics:
        return Markup()
    rows = [
        [label, *(number(dynamics[key][part]) for part in ("median", "p90", "maximum"))]
        for key, label in {"std_ratio": "standard deviation", "range_ratio": "range"}.items()
    ]
    over_half, over_seven = dynamics["share_correlated_0_5"], dynamics["share_correlated_0_7"]
    return section(
        "How much the activations move",
        paragraph(
            "Scales that depend on t can only help a model whose activations change with t. For "
            f"each of {dynamics['layers']} quantized layers of the float model, the table compares "
            f"the largest with the smallest value over {dynamics['timesteps']} timesteps; 1.00 "
            "would mean that nothing moves."
        ),
        table(["Largest / smallest", "Median layer", "90th percentile", "Maximum"], rows),
        paragraph(
            f"The standard deviation follows t with a correlation |r| over 0.5 in "
            f"{over_half:.0%} of the layers, over 0.7 in {over_seven:.0%}."
        ),
    )


def _reproduce(report: Report) -> Markup:
    versions = [[name, version] for name, version in report["versions"].items()]
    command = report.get("command")
    return section(
        "How to reproduce",
        tag("pre", tag("code", command)) if command else Markup(),
        paragraph(
            f"Seed {report['seed']}. Every number on this page, unrounded, is in report.json "
            "beside it. Another machine or another version of torch may change low-bit results "
            "slightly."
        ),
        table(["Package", "Version"], versions),
    )
