"""The code blocks of the README and the docs run as they are printed."""

import re
import warnings
from pathlib import Path

import pytest

pytestmark = pytest.mark.whole

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    if not blocks:
        pytest.skip("no code on this page")
    with warnings.catch_warnings():
        # The block runs as a script of the user's, where warnings are no errors.
        warnings.simplefilter("ignore")
        exec(compile("\n".join(blocks), page.name, "exec"), {"__name__": "__main__"})
