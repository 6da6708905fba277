"""Write the result of a study: `report.json` for programs, `report.html` for people."""

import json
from collections.abc import Mapping
from pathlib import Path

from tdq_plugin.files import atomic_file
from tdq_plugin.study.page import render_page
from tdq_plugin.study.schema import Report, validate_report

__all__ = ["write_report"]


def write_report(
    folder: str | Path, report: Report, figures: Mapping[str, tuple[bytes, str]]
) -> Path:
    """Write `report.json` and a self-contained `report.html` into a folder.

    Args:
        folder: Created if it does not exist; files of an earlier report are replaced.
        report: See `tdq_plugin.study.schema.Report`.
        figures: For each title a PNG and its caption, shown in this order.

    Returns:
        The path of `report.html`.

    Raises:
        ConfigError: The report lacks a key or has a value the schema does not allow; nothing is
            written then.
    """
    validate_report(report)
    page = render_page(report, figures)
    data = json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False)
    folder = Path(folder)
    for name, text in {"report.json": data + "\n", "report.html": page}.items():
        with atomic_file(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return folder / "report.html"
