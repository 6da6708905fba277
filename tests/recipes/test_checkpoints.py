"""What is kept of a run on disk, and what happens if it is damaged."""

from pathlib import Path

import pytest

from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes.checkpoints import load_checkpoint, previous_checkpoint, save_checkpoint
from tdq_plugin.recipes.run_state import RunState


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None], ids=["empty", "text", "half"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "checkpoint.pt"
    assert load_checkpoint(path) is None
    for step in (1, 2):
        save_checkpoint(path, {"step": step})
    assert load_checkpoint(path) == {"step": 2}
    path.write_bytes(path.read_bytes()[:300] if content is None else content)
    with pytest.warns(UserWarning, match=r"checkpoint\.pt .* is damaged; going on from .*previous"):
        assert load_checkpoint(path) == {"step": 1}
    previous_checkpoint(path).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"^Damaged: .*pt .* and .*previous\.pt .*Remove them to"):
        load_checkpoint(path)


def test_a_damaged_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(ConfigError, match=r"config\.json is damaged: .*\. If the run had the"):
        RunState(tmp_path, {"seed": 0})
