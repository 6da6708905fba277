"""A reader sees the old file or folder, or the new one: through errors, full disks and kills."""

import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tdq_plugin.files
from tdq_plugin.errors import ConfigError, StorageError
from tdq_plugin.files import atomic_file, atomic_folder, recover_folder


def no_space(_: Path) -> None:
    raise OSError(28, "No space left on device")


def write_file(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text)


def write_folder(path: Path, text: str) -> None:
    with atomic_folder(path, marker="first") as temporary:
        (temporary / "deep").mkdir()
        for name in ("first", "deep/second"):
            (temporary / name).write_text(text)


def write_half(context: AbstractContextManager[Path], *part: str) -> None:
    with context as temporary:
        temporary.joinpath(*part).write_text("half")
        raise KeyboardInterrupt


def test_threads_leave_the_process_s_permissions(tmp_path: Path) -> None:
    before, interval = os.umask(0o022), sys.getswitchinterval()
    sys.setswitchinterval(1e-7)
    try:
        with ThreadPoolExecutor(4) as threads:
            seen = set(threads.map(lambda _: tdq_plugin.files._umask(), range(50_000)))
        assert seen == {0o022}
    finally:
        sys.setswitchinterval(interval)
        os.umask(before)


def read_folder(path: Path) -> set[str]:
    return {(path / name).read_text() for name in ("first", "deep/second")}


def test_a_file_is_created_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    for text in ("old", "new"):
        write_file(path, text)
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_is_created_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder"
    for text in ("old", "new"):
        write_folder(path, text)
        assert read_folder(path) == {text}
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_does_not_replace_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_text("kept")
    with pytest.raises(ConfigError, match="model is a file; remove it"):
        write_folder(path, "new")
    assert path.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_does_not_replace_a_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=f"{tmp_path.name} is a folder; give the name of a file"),
        atomic_file(tmp_path) as temporary,
    ):
        temporary.write_text("")
    assert list(tmp_path.iterdir()) == []


def test_others_may_read_what_was_written(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        write_file(tmp_path / "file", "text")
        write_folder(tmp_path / "folder", "text")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o755


@pytest.mark.parametrize("existing", [True, False])
def test_an_error_in_the_block_changes_nothing(tmp_path: Path, existing: bool) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    if existing:
        write_file(file, "old")
        write_folder(folder, "old")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        write_half(atomic_file(file))
    with pytest.raises(KeyboardInterrupt):
        write_half(atomic_folder(folder, marker="first"), "first")
    assert sorted(tmp_path.iterdir()) == before
    if existing:
        assert file.read_text() == "old"
        assert read_folder(folder) == {"old"}


def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    write_file(file, "old")
    write_folder(folder, "old")
    monkeypatch.setattr(tdq_plugin.files, "_flush_to_disk", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_file(file, "new")
    with pytest.raises(OSError, match="No space left"):
        write_folder(folder, "new")
    assert sorted(tmp_path.iterdir()) == [file, folder]
    assert file.read_text() == "old"
    assert read_folder(folder) == {"old"}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_under_safetensors_tells_the_path(tmp_path: Path) -> None:
    tensors = {"weight": torch.zeros(100_000)}
    folder = partial(atomic_folder, marker="weights")
    for context, names in ((atomic_file, ()), (folder, ("weights",))):
        path = tmp_path / "model"
        with (
            pytest.raises(
                StorageError, match=rf"^{path} cannot be written: .*I/O error.*Free space"
            ),
            files_of_at_most(1000),
            context(path) as temporary,
        ):
            save_file(tensors, temporary.joinpath(*names))
        assert not list(tmp_path.iterdir())


def test_a_replacement_that_stopped_between_its_renames_is_undone(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write_folder(folder, "old")
    folder.rename(tmp_path / ".folder.old")
    recover_folder(folder)
    assert read_folder(folder) == {"old"}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_replacement_that_stopped_after_its_renames_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for recover in (recover_folder, lambda folder: write_folder(folder, "new")):
        write_folder(folder, "new")
        (tmp_path / ".folder.old").mkdir()
        (tmp_path / ".folder.old" / "first").write_text("old")
        recover(folder)
        assert read_folder(folder) == {"new"}
        assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_with_other_content_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    write_folder(folder, "new")
    (folder / "first").rename(folder / "notes")
    message = r"has no first, but \['deep', 'notes'\]\. Choose another folder, or empty this one"
    with pytest.raises(ConfigError, match=message):
        write_folder(folder, "other")
    assert (folder / "notes").read_text() == "new"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_reader_between_the_renames_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, original = tmp_path / "folder", Path.rename
    write_folder(folder, "old")
    seen = []

    def rename(path: Path, target: Path) -> Path:
        renamed = original(path, target)
        if path == folder and not seen:
            recover_folder(folder)
            seen.append(read_folder(folder))
        return renamed

    monkeypatch.setattr(Path, "rename", rename)
    write_folder(folder, "new")
    assert seen == [{"old"}]
    assert read_folder(folder) == {"new"}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_reader_that_comes_too_late_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, original = tmp_path / "folder", Path.rename
    write_folder(folder, "old")
    folder.rename(tmp_path / ".folder.old")

    def rename(path: Path, target: Path) -> Path:
        # The writer's second rename comes between the reader's look and its rename.
        monkeypatch.undo()
        write_folder(tmp_path / "new", "new")
        original(tmp_path / "new", folder)
        return original(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    recover_folder(folder)
    assert read_folder(folder) == {"new"}
    assert list(tmp_path.iterdir()) == [folder]


WRITE_FOREVER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_files import write_folder
while True:
    for letter in "ab":
        write_folder(Path(sys.argv[2]), letter * 1_000_000)
        print(flush=True)
"""


def test_a_kill_leaves_the_old_or_the_new_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    interrupted = 0
    for moment in range(8):
        command = [sys.executable, "-c", WRITE_FOREVER, str(Path(__file__).parent), str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(0.0005 * moment)
            os.kill(child.pid, signal.SIGKILL)
        interrupted += len(list(tmp_path.iterdir())) > 1
        recover_folder(folder)
        contents = read_folder(folder)
        assert contents in ({"a" * 1_000_000}, {"b" * 1_000_000})
    # At least one kill must have come in the middle of a write, else this test proves nothing.
    assert interrupted


def test_what_a_link_points_to_is_replaced(tmp_path: Path) -> None:
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    for text in ("first", "second"):
        with atomic_folder(link, marker="file") as temporary:
            (temporary / "file").write_text(text)
        with atomic_file(link / "other") as path:
            path.write_text(text)
    assert link.is_symlink()
    assert (folder / "file").read_text() == (folder / "other").read_text() == "second"
