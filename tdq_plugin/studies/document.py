"""A report as blocks, written as Markdown with pictures beside it and as one HTML page."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tdq_plugin.study.markup import Markup, document, figure, paragraph, section, table, tag

__all__ = ["Block", "Picture", "Section", "Table", "as_html", "as_markdown"]


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows; `best` are `(row, column)` to highlight."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    best: frozenset[tuple[int, int]] = field(default=frozenset())


@dataclass(frozen=True)
class Picture:
    """A PNG; `name` is the stem of its file."""

    name: str
    title: str
    png: bytes
    caption: str


Block = str | Table | Picture


@dataclass(frozen=True)
class Section:
    """A heading and what follows it; a string is a paragraph."""

    title: str
    blocks: Sequence[Block]


def as_markdown(title: str, sections: Sequence[Section], pictures: str) -> str:
    """Return the report as Markdown; `pictures` is the folder of the PNGs beside it."""
    lines = [f"# {title}"]
    for part in sections:
        lines.append(f"## {part.title}")
        lines += [_markdown(block, pictures) for block in part.blocks]
    return "\n\n".join(lines) + "\n"


def as_html(title: str, sections: Sequence[Section]) -> str:
    """Return the report as a page that needs nothing beside itself."""
    header = tag("header", tag("p", "tdq-plugin study", kind="eyebrow"), tag("h1", title))
    body = [section(part.title, *map(_html, part.blocks)) for part in sections]
    return document(f"{title} | tdq-plugin", header, *body)


def _html(block: Block) -> Markup:
    if isinstance(block, str):
        return paragraph(block)
    if isinstance(block, Picture):
        return figure(block.title, block.png, block.caption)
    return table(block.header, block.rows, block.caption, best=block.best)


def _markdown(block: Block, pictures: str) -> str:
    if isinstance(block, str):
        return block
    if isinstance(block, Picture):
        return f"![{block.title}]({pictures}/{block.name}.png)\n\n*{block.title}.* {block.caption}"
    rows = [
        [f"**{cell}**" if (y, x) in block.best else cell for x, cell in enumerate(row)]
        for y, row in enumerate(block.rows)
    ]
    lines = [_row(block.header), _row(["---"] * len(block.header)), *map(_row, rows)]
    return "\n".join(lines) + (f"\n\n{block.caption}" if block.caption else "")


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
