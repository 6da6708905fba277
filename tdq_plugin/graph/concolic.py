"""A tracer that records a graph while concrete values decide control flow."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from inspect import BoundArguments
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from tdq_plugin.errors import TraceError

__all__ = ["ConcolicProxy", "ConcolicTracer"]

# Answers of these kinds steer control flow or name a storage format; both are fixed by the trace.
_FIXED_TYPES = (bool, str, torch.dtype, torch.layout, type(None))
_READS_TENSOR_VALUES = frozenset({"allclose", "equal", "is_nonzero", "item", "numpy", "tolist"})


class ConcolicProxy(fx.Proxy):
    """A graph node together with the value it has for the example inputs."""

    tracer: "ConcolicTracer"

    def __init__(self, node: fx.Node, tracer: "ConcolicTracer", value: Any) -> None:
        super().__init__(node, tracer)
        self.value = value

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:
        # Models ask isinstance(x, Tensor) and torch.is_tensor(x); the answer is the value's.
        return type(self.value)

    def __getattr__(self, name: str) -> Any:
        if callable(getattr(self.value, name)):
            return self._method(name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def _method(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return self.tracer.create_proxy("call_method", name, (self, *args), kwargs)

        return call

    def __bool__(self) -> bool:
        return bool(self._fixed_value("bool"))

    def __int__(self) -> int:
        return int(self._fixed_value("int"))

    def __float__(self) -> float:
        return float(self._fixed_value("float"))

    def __index__(self) -> int:
        return int(self._fixed_value("an index"))

    def __len__(self) -> int:
        return len(self.value)

    def __contains__(self, item: Any) -> bool:
        return item in self._fixed_value("a membership test")

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.value, dict):
            return iter(self.value)
        return map(self.__getitem__, range(len(self.value)))

    def _fixed_value(self, use: str) -> Any:
        if isinstance(self.value, Tensor):
            raise _data_dependent(self.node.name, use)
        return self.value


class ConcolicTracer(fx.Tracer):
    """Trace a module on example arguments.

    Sizes and devices stay symbolic, so that the graph serves every batch size. Branches, loop
    counts, dtypes, and sizes that python itself consumes (`range(x.shape[0])`) are the example's.

    Every node carries `meta["module_path"]`: the dotted path of the innermost module whose forward
    ran it, `""` for the model itself.

    Args:
        call: The example call, bound to the signature of the module's forward.
        placeholders: The arguments that become inputs of the graph; the others are constants.
        read_output: From what forward returns to what the graph shall return.
    """

    # Buffers become nodes as parameters do; else arithmetic on them would be done once, here.
    proxy_buffer_attributes = True

    def __init__(
        self, call: BoundArguments, placeholders: list[str], read_output: Callable[[Any], Any]
    ) -> None:
        super().__init__()
        self._call = call
        self._placeholders = placeholders
        self._read_output = read_output
        self._unneeded_if_unused: set[fx.Node] = set()
        self._is_evaluating = False

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Record the call of `root`, without the size arithmetic that only served branches."""
        recorded = super().trace(root, concrete_args)
        recorded.eliminate_dead_code(lambda node: node not in self._unneeded_if_unused)
        # A graph that remembers this tracer could not be traced again: there is no example then.
        graph = fx.Graph()
        graph.output(graph.graph_copy(recorded, {})).meta["module_path"] = ""
        return graph

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Call forward with one proxy per placeholder and the constants as they are."""
        call = BoundArguments(self._call.signature, OrderedDict(self._call.arguments))
        for name in self._placeholders:
            call.arguments[name] = self.create_proxy("placeholder", name, (), {})

        def forward(root: nn.Module) -> Any:
            return self._read_output(root_fn(root, *call.args, **call.kwargs))

        return forward, [self.root]

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *extra: Any,
        **options: Any,
    ) -> Any:
        """Evaluate the operation on the example, and record it unless its answer is fixed."""
        value = self._evaluate(kind, target, _values(args), _values(kwargs))
        if isinstance(value, _FIXED_TYPES):
            return value
        node = super().create_proxy(kind, target, args, kwargs, *extra, **options).node
        if kind.startswith("call_") and not isinstance(value, Tensor):
            self._unneeded_if_unused.add(node)
        return ConcolicProxy(node, self, value)

    def create_arg(self, a: Any) -> Any:
        """Keep a proxy from being taken for the tensor that its class says it is."""
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, float):
            return float(a)  # numpy's subclass would be written into the code as "np.float64(...)"
        return super().create_arg(a)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        """Note which module the node belongs to."""
        node = super().create_node(kind, *args, **kwargs)
        callers = [path for path, _ in self.module_stack.values()]
        if kind == "call_module":
            callers.pop()
        node.meta["module_path"] = callers[-1] if callers else ""
        return node

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a module for its value while evaluating, else trace it."""
        if self._is_evaluating:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Give modules their own parameters while evaluating, else proxies of them."""
        if self._is_evaluating:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def _evaluate(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "placeholder":
            return self._call.arguments[target]
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        if kind.startswith("call_") and name in _READS_TENSOR_VALUES:
            raise _data_dependent(name, "python control flow")
        self._is_evaluating = True
        try:
            return self._run(kind, target, args, kwargs)
        finally:
            self._is_evaluating = False

    def _run(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "get_attr":
            return _attribute(self.root, target)
        if kind == "call_module":
            return self.root.get_submodule(target)(*args, **kwargs)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)


def _values(arguments: Any) -> Any:
    return map_aggregate(arguments, lambda a: a.value if isinstance(a, ConcolicProxy) else a)


def _attribute(root: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(root.get_submodule(owner), name)


def _data_dependent(name: str, use: str) -> TraceError:
    return TraceError(
        f"The model uses the values of the tensor {name!r} as {use}, so its graph would hold only "
        "for the example inputs. Express that branch with tensor operations (torch.where), or "
        "move it out of forward."
    )
