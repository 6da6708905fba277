"""The report of a study: everything that is finished, as JSON, Markdown and HTML."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tdq_plugin.files import atomic_file
from tdq_plugin.studies.definition import Part, StudyDefinition
from tdq_plugin.studies.document import Block, Picture, Section, Table, as_html, as_markdown
from tdq_plugin.studies.figures import FIGURES
from tdq_plugin.studies.numbers import part_numbers
from tdq_plugin.studies.results import FinishedRun, Group, groups_of
from tdq_plugin.studies.tables import SHOWN, methods_table, ratios_table
from tdq_plugin.study.results_table import COLUMNS

__all__ = ["PartResults", "write_study"]

READING = (
    "A cell is one draw, or over several draws (other calibration data, other batches, the same "
    "noise in the evaluation) the mean [smallest, largest]; for Fréchet distances, which jump from "
    "draw to draw, the median instead of the mean. The best quantized row of each column is "
    "marked; rows whose ranges overlap are not told apart by so few draws.",
    "Simulated: the rounding is imitated in float32. Int8 kernels: integer arithmetic, as "
    "deployed. The noise floor is the float model against itself, drawing from other noise: what a "
    "Fréchet distance is by chance alone. Samples drawn from the same noise can lie below it.",
    "A ratio below 1 is in favour of the first method, but for the classifier score. "
    "Each draw: both methods with the same calibration data and batches. The interval is that of "
    "the geometric mean of these ratios by Student's t; for a handful of draws it is wide.",
)


@dataclass(frozen=True)
class PartResults:
    """A part, its finished runs, and the names of those that are missing."""

    part: Part
    runs: Sequence[FinishedRun]
    missing: Sequence[str]

    @property
    def groups(self) -> list[Group]:
        """The runs by what makes them comparable."""
        return groups_of(self.part, self.runs)


def write_study(
    folder: Path, name: str, definition: StudyDefinition, results: Mapping[str, PartResults]
) -> Path:
    """Write `NAME.json`, `NAME.md` with its pictures in `NAME/`, and `NAME.html`.

    Args:
        folder: Where to; earlier files are replaced.
        name: Stem of the files.
        definition: The study.
        results: What there is of each part.

    Returns:
        The Markdown file.
    """
    parts = {key: _part(key, found) for key, found in results.items()}
    sections = [
        Section("What is compared", definition.introduction),
        Section("How it is measured", _measurement(results)),
        *parts.values(),
        Section("Runs", [_commands(results)]),
    ]
    numbers = {key: part_numbers(found.part, found.groups) for key, found in results.items()}
    texts = {
        f"{name}.json": json.dumps(numbers, indent=1, ensure_ascii=False) + "\n",
        f"{name}.html": as_html(definition.title, sections),
        f"{name}.md": as_markdown(definition.title, sections, name),
    }
    _write_pictures(folder / name, parts)
    for file, text in texts.items():
        with atomic_file(folder / file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return folder / f"{name}.md"


def _part(key: str, results: PartResults) -> Section:
    part, groups = results.part, results.groups
    blocks: list[Block] = [part.question, f"In the paper: {part.paper}."]
    if results.missing:
        blocks.append(f"Not finished: {', '.join(results.missing)}.")
    for group in groups:
        blocks += _tables(part, group)
    if results.runs:
        for figure in part.figures:
            pictures = FIGURES[figure](groups, results.runs)
            blocks += [_renamed(picture, key) for picture in pictures]
    return Section(part.title, blocks)


def _tables(part: Part, group: Group) -> list[Block]:
    heading = f"{group.name} steps" if part.group_by == "steps" else group.name
    blocks: list[Block] = [f"{heading}:"] if heading else []
    blocks.append(methods_table(group))
    ratios = ratios_table(group, part.ratios)
    return [*blocks, ratios] if ratios else blocks


def _renamed(picture: Picture, part: str) -> Picture:
    """Pictures of all parts are in one folder; a group's name may be no name of a file."""
    stem = re.sub(r"[^\w.]+", "-", f"{part}-{picture.name}").strip("-")
    return Picture(stem, picture.title, picture.png, picture.caption)


def _measurement(results: Mapping[str, PartResults]) -> list[Block]:
    rows = [
        row
        for found in results.values()
        for run in found.runs
        for row in run.report.get("rows", [])
    ]
    spaces = sorted({row["feature_space"] for row in rows})
    samples = sorted({row["samples"] for row in rows})
    counts = ", ".join(f"{count:,}" for count in samples) or "none yet"
    columns = [[COLUMNS[metric][0], COLUMNS[metric][1]] for metric in SHOWN]
    return [
        f"Images of each row: {counts}. Feature space of the Fréchet distances: "
        f"{'; '.join(spaces) or 'none yet'}. They can be compared only with distances in the same "
        "space from equally many samples.",
        Table(["Column", "Meaning"], columns),
        *READING,
    ]


def _commands(results: Mapping[str, PartResults]) -> Table:
    commands = {run.name: run.report["command"] for found in results.values() for run in found.runs}
    return Table(["Run", "Command"], [[name, f"`{text}`"] for name, text in commands.items()])


def _write_pictures(folder: Path, parts: Mapping[str, Section]) -> None:
    blocks = [block for section in parts.values() for block in section.blocks]
    pictures = {f"{block.name}.png": block.png for block in blocks if isinstance(block, Picture)}
    for name, png in pictures.items():
        with atomic_file(folder / name) as temporary:
            temporary.write_bytes(png)
    # The folder may hold what is not the study's.
    for old in folder.glob("*.png"):
        if old.name not in pictures and old.name.startswith(tuple(f"{part}-" for part in parts)):
            old.unlink()
