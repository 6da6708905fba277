"""Atomic writes: a reader sees the old file or folder, or the new one, never a part.

A folder that is replaced is absent for the moment between two renames.
"""

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tdq_plugin.errors import ConfigError, StorageError

__all__ = ["atomic_file", "atomic_folder"]

_UMASK_LOCK = threading.Lock()
_ATTEMPTS = 10


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it over `path` when the block succeeds.

    Args:
        path: The file to create or replace.

    Yields:
        The path to write to. It is removed if the block raises, and `path` stays as it was.

    Raises:
        ConfigError: There is a folder at `path`.
        OSError: Whatever the write itself raised, for example a full disk; safetensors' own error
            becomes a `StorageError`, which is one.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "scales.json"
        >>> with atomic_file(target) as temporary:
        ...     _ = temporary.write_text("{}")
        >>> target.read_text()
        '{}'
    """
    # What a link points to is replaced, not the link.
    path = Path(path).resolve()
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give the name of a file in it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with _safetensors_as_files(path):
            yield temporary
        temporary.chmod(0o666 & ~_umask())
        _flush_to_disk(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path, *, marker: str) -> Iterator[Path]:
    """Give a temporary folder beside `path`; put it in `path`'s place when the block succeeds.

    A kill between the two renames leaves the old folder under `.NAME.old`; `path` is then
    recovered from it by the next call.

    Args:
        path: The folder to create or replace.
        marker: Path within the folder of a file that every folder of this kind has. A folder
            without it holds something else, and is not replaced unless it is empty.

    Yields:
        The folder to fill. It is removed if the block raises, and `path` stays as it was.

    Raises:
        ConfigError: There is a file at `path`, or a folder with other content.
        OSError: Whatever the write itself raised, for example a full disk; safetensors' own error
            becomes a `StorageError`, which is one.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file; remove it, or choose another folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)
    _check_content(path, marker)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with _safetensors_as_files(path):
            yield temporary
        temporary.chmod(0o777 & ~_umask())
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_umask())
                _flush_to_disk(file)
        _replace(path, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def recover_folder(path: str | Path) -> None:
    """Undo a replacement by `atomic_folder` that was killed between its two renames."""
    path = Path(path).resolve()
    previous = _previous(path)
    if previous.exists() and not path.exists():
        try:
            previous.rename(path)
        except OSError:
            # A writer that lives has put the new folder there, or another reader the old one.
            if not path.exists():
                raise
    shutil.rmtree(previous, ignore_errors=True)


def _check_content(path: Path, marker: str) -> None:
    names = sorted(file.name for file in path.iterdir()) if path.exists() else []
    if names and not (path / marker).exists():
        raise ConfigError(
            f"{path} is not replaced: it has no {marker}, but {names[:5]}. Choose another folder, "
            "or empty this one."
        )


def _replace(path: Path, new: Path) -> None:
    previous = _previous(path)
    for _ in range(_ATTEMPTS):
        if path.exists():
            path.rename(previous)
        try:
            new.rename(path)
        except OSError:
            # A reader between the two renames took this for a writer that was killed.
            if not path.exists():
                raise
        else:
            shutil.rmtree(previous, ignore_errors=True)
            return
    raise StorageError(f"{path} cannot be replaced: other processes keep restoring it.")


@contextmanager
def _safetensors_as_files(path: Path) -> Iterator[None]:
    # safetensors has an error of its own for a full disk, which does not tell the path.
    try:
        yield
    except SafetensorError as error:
        raise StorageError(
            f"{path} cannot be written: {error}. Free space, or choose another folder."
        ) from error


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _umask() -> int:
    # The only way to read it is to set it; a second thread in between would restore the wrong one.
    with _UMASK_LOCK:
        mask = os.umask(0o077)
        os.umask(mask)
    return mask


def _flush_to_disk(path: Path) -> None:
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())
