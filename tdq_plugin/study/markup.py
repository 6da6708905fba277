"""The few HTML elements a report needs. Text is escaped unless it is `Markup` already."""

import base64
import html
from collections.abc import Collection, Mapping, Sequence

from tdq_plugin.study.page_style import STYLE_SHEET

__all__ = [
    "Markup",
    "definitions",
    "document",
    "figure",
    "number",
    "paragraph",
    "section",
    "table",
    "tag",
]


class Markup(str):
    """Text that is HTML already, so that it is not escaped again."""

    __slots__ = ()

    @classmethod
    def escape(cls, text: str) -> "Markup":
        """Return the text as HTML, unchanged if it is `Markup`."""
        return text if isinstance(text, cls) else cls(html.escape(text))


def tag(name: str, *children: str, kind: str = "") -> Markup:
    """Wrap children in an element, with `kind` as its class.

    Example:
        >>> tag("p", "a < b", kind="note")
        '<p class="note">a &lt; b</p>'
    """
    attribute = f' class="{kind}"' if kind else ""
    content = "".join(Markup.escape(child) for child in children)
    return Markup(f"<{name}{attribute}>{content}</{name}>")


def paragraph(text: str, kind: str = "") -> Markup:
    """Return a paragraph of text."""
    return tag("p", text, kind=kind)


def section(title: str, *children: str) -> Markup:
    """Return a section under a heading."""
    return tag("section", tag("h2", title), *children)


def document(title: str, *body: str) -> str:
    """Return a whole page that needs nothing beside itself."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{tag('title', title)}\n<style>\n{STYLE_SHEET}</style>\n</head>\n"
        f"<body>\n{tag('main', *body)}\n</body>\n</html>\n"
    )


def figure(title: str, png: bytes, caption: str) -> Markup:
    """Return a picture with its title and caption."""
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    image = Markup(f'<div class="plate"><img src="{source}" alt="{Markup.escape(title)}"></div>')
    return tag("figure", tag("h3", title), image, tag("figcaption", caption))


def definitions(terms: Mapping[str, str]) -> Markup:
    """Return a list of terms and what they mean, or nothing for no terms."""
    if not terms:
        return Markup()
    items = (Markup(tag("dt", term) + tag("dd", meaning)) for term, meaning in terms.items())
    return tag("dl", *items)


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str = "",
    *,
    best: Collection[tuple[int, int]] = (),
    footer: Sequence[Sequence[str]] = (),
) -> Markup:
    """Return a table whose first column names its rows.

    Args:
        header: One title per column.
        rows: Cells of the body.
        caption: Shown below the table.
        best: `(row, column)` of the body's cells to highlight.
        footer: Rows that are set apart at the end.
    """
    body = [
        _row([("best" if (y, x) in best else "", cell) for x, cell in enumerate(row)])
        for y, row in enumerate(rows)
    ]
    parts = [
        tag("caption", caption) if caption else Markup(),
        tag("thead", tag("tr", *(tag("th", title) for title in header))),
        tag("tbody", *body),
    ]
    if footer:
        parts.append(tag("tfoot", *(_row([("", cell) for cell in row]) for row in footer)))
    return tag("div", tag("table", *parts), kind="scroll")


def _row(cells: Sequence[tuple[str, str]]) -> Markup:
    (_, name), *others = cells
    return tag("tr", tag("th", name), *(tag("td", cell, kind=kind) for kind, cell in others))


def number(value: float | None) -> str:
    """Write a number with three significant digits, or a dash for none.

    Example:
        >>> number(0.0048), number(24.71), number(1234.0), number(None)
        ('0.00480', '24.7', '1230', '–')
    """
    if value is None:
        return "–"
    if value == 0 or 1e-5 <= abs(value) < 1e6:
        rounded = float(f"{value:.3g}")
        text = f"{rounded:#.3g}"
        return f"{rounded:.0f}" if "e" in text else text.removesuffix(".")
    return f"{value:.2e}"
