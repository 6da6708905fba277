"""What every error of the package has in common; the message of each is pinned where it is raised.

The source is read: a message shows the value that is wrong, ends as a sentence, and its class is
one of `tdq_plugin.errors`.
"""

import ast
from pathlib import Path

import pytest

import tdq_plugin
from tdq_plugin import errors

CORE = Path(tdq_plugin.__file__).parent
SOURCES = sorted(CORE.rglob("*.py"))
# Raised for Python's own protocols, not for a user to catch.
PROTOCOL = {"AttributeError", "NotImplementedError", "StopIteration"}


def raised(source: Path) -> list[tuple[str, ast.Call]]:
    """The class names and the calls of all `raise SomeError(...)` in a file."""
    found = []
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = ast.unparse(node.exc.func).rpartition(".")[2]
            if name[0].isupper():
                found.append((name, node.exc))
    return found


def endings(message: ast.expr) -> list[str]:
    """The last characters of a string expression, where they are written in the source."""
    if isinstance(message, ast.Constant) and isinstance(message.value, str):
        return [message.value[-1:]]
    if isinstance(message, ast.JoinedStr) and isinstance(message.values[-1], ast.Constant):
        return [str(message.values[-1].value)[-1:]]
    return []


def test_every_error_is_below_one_base() -> None:
    for name in errors.__all__:
        error = getattr(errors, name)
        assert issubclass(error, errors.TDQError)
        assert error.__doc__
        assert name == "TDQError" or issubclass(error, ValueError | RuntimeError | OSError)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(CORE)))
def test_only_own_errors_are_raised(source: Path) -> None:
    allowed = set(errors.__all__) | PROTOCOL | {"Exit"}
    assert {name for name, _ in raised(source)} <= allowed


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(CORE)))
def test_messages_are_sentences(source: Path) -> None:
    for name, call in raised(source):
        if name in errors.__all__:
            assert call.args, f"{name} in line {call.lineno} has no message"
            assert all(end in ".!?)'" for end in endings(call.args[0])), ast.unparse(call)


def test_the_reader_of_the_source_sees_a_wrong_error(tmp_path: Path) -> None:
    source = tmp_path / "wrong.py"
    source.write_text("raise ValueError('no end')\nraise ScaleError(f'ends {1}.')\n")
    assert [name for name, _ in raised(source)] == ["ValueError", "ScaleError"]
    assert [endings(call.args[0]) for _, call in raised(source)] == [["d"], ["."]]
