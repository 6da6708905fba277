"""The process of one run: `python -m tdq_plugin.studies.worker RECIPE key=value ...`."""

import os
import sys
import threading

from tdq_plugin.errors import TDQError
from tdq_plugin.recipes import find_recipe

__all__ = ["STUDY_GONE", "main"]

STUDY_GONE = 3


def main(recipe: str, overrides: list[str]) -> None:
    """Run a recipe, for as long as the other end of the standard input lives."""
    threading.Thread(target=_end_with_the_study, daemon=True).start()
    chosen = find_recipe(recipe)
    chosen.run(chosen.configure(overrides))


def _end_with_the_study() -> None:
    # Not `sys.stdin.read`, whose lock the interpreter needs when it ends.
    os.read(sys.stdin.fileno(), 1)
    os._exit(STUDY_GONE)


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2:])
    except TDQError as error:
        sys.exit(str(error))
