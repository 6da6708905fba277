"""Adapters are found by their model, and the message says why when none is."""

from importlib.metadata import EntryPoint

import pytest
from torch import nn

import tdq_plugin.registry as registry
from tdq_plugin.errors import AdapterError


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ADAPTERS", {})


def make_adapter(kind: type[nn.Module]) -> type:
    class SomeAdapter:
        @staticmethod
        def covers(model):
            return isinstance(model, kind)

    return SomeAdapter


def entries(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    group = registry.ENTRY_POINT_GROUP
    found = [EntryPoint(name, value, group) for name, value in values.items()]
    monkeypatch.setattr(registry, "entry_points", lambda group: found)


def test_the_adapter_that_covers_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    entries(monkeypatch)
    linear, conv = make_adapter(nn.Linear), make_adapter(nn.Conv2d)
    registry.register_adapter("linear")(linear)
    registry.register_adapter("conv")(conv)
    assert registry.adapter_for(nn.Linear(1, 1)) is linear
    assert registry.adapter_for(nn.Conv2d(1, 1, 1)) is conv


def test_a_covered_model_imports_no_further_framework(monkeypatch: pytest.MonkeyPatch) -> None:
    entries(monkeypatch, other="no_such_framework")
    registry.register_adapter("linear")(make_adapter(nn.Linear))
    monkeypatch.setattr(registry, "unavailable_adapters", lambda: pytest.fail("imported"))
    registry.adapter_for(nn.Linear(1, 1))


def test_no_adapter_names_those_loaded_and_why_others_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entries(monkeypatch, other="no_such_framework")
    registry.register_adapter("linear")(make_adapter(nn.Linear))
    message = (
        r"No adapter covers this ReLU: it has no TDQ activation quantizers. Prepare the model .* "
        r"loaded: linear. other is not available: No module named 'no_such_framework'."
    )
    with pytest.raises(AdapterError, match=message):
        registry.adapter_for(nn.ReLU())


def test_no_adapter_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    entries(monkeypatch)
    with pytest.raises(AdapterError, match=r"Adapters loaded: none.$"):
        registry.adapter_for(nn.ReLU())


def test_a_name_is_taken_once() -> None:
    class Another:
        pass

    registry.register_adapter("linear")(make_adapter(nn.Linear))
    with pytest.raises(AdapterError, match=r"name 'linear' is taken by make_adapter.*SomeAdapter"):
        registry.register_adapter("linear")(Another)


def test_a_module_that_is_loaded_again_may_register_again() -> None:
    for _ in range(2):
        registry.register_adapter("linear")(make_adapter(nn.Linear))


def test_a_third_party_is_found_by_its_entry_point(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    (tmp_path / "third_party_adapter.py").write_text(
        "from tdq_plugin.registry import register_adapter\n"
        "@register_adapter('third')\n"
        "class Third:\n"
        "    covers = staticmethod(lambda model: True)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    entries(monkeypatch, third="third_party_adapter")
    assert registry.adapter_for(nn.ReLU()).__name__ == "Third"
