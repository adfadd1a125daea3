"""Capture of a module's forward as an FX graph, by running it on real values.

Where ``torch.fx.symbolic_trace`` sees placeholders without values, every proxy here carries what it stands for, on
two batches of different sizes at once. So shapes are numbers, ``len``, iteration and unpacking work, and a
dimension that differs between the two runs is known to depend on the batch: it becomes a node of the graph, while
all others are baked. In-place operations become pure ones whose result the proxy stands for from then on.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

# What Python may ask of a tensor without a node of the graph.
_QUERIES = {
    "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "element_size", "get_device",
    "is_floating_point", "is_complex", "storage_offset", "type",
}  # fmt: skip
_ATTRIBUTES = {
    "dtype", "device", "ndim", "layout", "is_cuda", "is_mps", "is_quantized", "is_sparse", "is_nested", "names",
    "itemsize",
}  # fmt: skip
# What gives Python a value, or decides by values.
_READS = {"item", "tolist", "numpy", "__bool__", "__len__", "equal", "allclose", "is_nonzero"}
_VIEWS = {"T", "mT", "H", "data", "real", "imag"}


class DataDependent(Exception):
    """Python asked for the value of a tensor that depends on the input."""


class _NoArguments(tuple):
    """The ``*args`` of a forward that is given none; a class of its own, which fx does not take apart."""


class _NoKeywords(dict):
    """The ``**kwargs`` of a forward that is given none."""


class BatchInt(int):
    """An int that depends on the batch size: a node of the graph, and its value on either batch."""

    node: fx.Node
    values: tuple[int, int]
    tracer: Capture

    @classmethod
    def make(cls, tracer: Capture, node: fx.Node, values: tuple[int, int]) -> BatchInt:
        out = cls(values[0])
        out.tracer, out.node, out.values = tracer, node, values
        return out

    def __fx_create_arg__(self, tracer: fx.Tracer) -> fx.Node:
        return self.node

    def __reduce__(self):
        return int, (int(self),)


def _arithmetic(function: Callable) -> tuple[Callable, Callable]:
    def forward(self: BatchInt, other: Any):
        return self.tracer.integer(function, self, other)

    def reflected(self: BatchInt, other: Any):
        return self.tracer.integer(function, other, self)

    return forward, reflected


# Functions of our own, so that torch.ao does not take arithmetic on sizes for quantizable arithmetic on tensors.
def size_add(a: int, b: int) -> int:
    """a + b, on sizes."""
    return a + b


def size_sub(a: int, b: int) -> int:
    """a - b, on sizes."""
    return a - b


def size_mul(a: int, b: int) -> int:
    """a * b, on sizes."""
    return a * b


def size_floordiv(a: int, b: int) -> int:
    """a // b, on sizes."""
    return a // b


def size_mod(a: int, b: int) -> int:
    """a % b, on sizes."""
    return a % b


def size_pow(a: int, b: int) -> int:
    """a ** b, on sizes."""
    return a**b


_ON_TENSORS = {
    size_add: operator.add,
    size_sub: operator.sub,
    size_mul: operator.mul,
    size_floordiv: operator.floordiv,
    size_mod: operator.mod,
    size_pow: operator.pow,
}
for _function, _operator in _ON_TENSORS.items():
    _forward, _reflected = _arithmetic(_function)
    setattr(BatchInt, f"__{_operator.__name__}__", _forward)
    setattr(BatchInt, f"__r{_operator.__name__}__", _reflected)
BatchInt.__neg__ = lambda self: self * -1


def assign(x: Tensor, index: Any, value: Any) -> Tensor:
    """``x[index] = value``, as a function: a copy of ``x`` with the assignment made."""
    x = x.clone()
    x[index] = value
    return x


class ValueProxy(fx.Proxy):
    """A proxy that knows what it stands for on either batch, and whether that depends on the input."""

    def __init__(self, node: fx.Node, tracer: Capture, values: tuple[Any, Any], dependent: bool):
        super().__init__(node, tracer)
        self.values, self.dependent = values, dependent

    def __getattr__(self, name: str):
        if name == "shape":
            return self.tracer.sizes(self)
        if name in _ATTRIBUTES:
            return getattr(self.values[0], name)
        if name == "requires_grad":
            return False
        if name in _VIEWS:
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        if name.startswith("__"):
            raise AttributeError(name)
        return Attribute(self, name)

    def _known(self) -> Any:
        if self.dependent:
            raise DataDependent(f"the value of {self.node} decides what happens next")
        return self.values[0]

    def __bool__(self) -> bool:
        return bool(self._known())

    def __int__(self) -> int:
        return int(self._known())

    def __index__(self) -> int:
        return int(self._known())

    def __float__(self) -> float:
        return float(self._known())

    def __len__(self) -> int:
        first, other = map(len, self.values)
        if first != other:
            raise DataDependent("the number of images is asked for as a plain number; write x.shape[0] for len(x)")
        return first

    def __iter__(self) -> Iterator:
        return iter([self[i] for i in range(len(self))])

    def __contains__(self, other: Any) -> bool:
        return other in self._known()

    def __setitem__(self, index: Any, value: Any) -> None:
        self.become(self.tracer.create_proxy("call_function", assign, (self, index, value), {}))

    def become(self, other: ValueProxy) -> ValueProxy:
        """Stand for ``other`` from now on: what an in-place operation does to its operand."""
        self.node, self.values, self.dependent = other.node, other.values, other.dependent
        return self

    def __hash__(self) -> int:
        return id(self)


def _in_place(function: Callable) -> Callable:
    def augmented(self: ValueProxy, other: Any) -> ValueProxy:
        return self.become(self.tracer.create_proxy("call_function", function, (self, other), {}))

    return augmented


for _function in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_"):
    setattr(ValueProxy, f"__i{_function.rstrip('_')}__", _in_place(getattr(operator, _function)))


class Capture(fx.Tracer):
    """Traces a module on two example batches; see the module's docstring.

    Args:
        examples: the arguments of forward, for either batch.
        opaque: names of submodules to be kept as single calls.
        is_leaf: whether a module is kept as a single call; None leaves it to torch.fx, which keeps all of torch.nn.
    """

    def __init__(
        self,
        examples: tuple[tuple[Tensor, ...], tuple[Tensor, ...]],
        opaque: frozenset[str] = frozenset(),
        is_leaf: Callable[[nn.Module], bool | None] = lambda module: None,
    ):
        super().__init__()
        self.proxy_buffer_attributes = True
        self.examples, self.opaque, self.asked_leaf = examples, opaque, is_leaf
        self.current = ""
        self._placeholders = 0
        self._in_place: set[nn.Module] = set()
        self._running = False

    def trace(self, root: nn.Module, concrete_args=None) -> fx.Graph:
        with torch.no_grad(), _FactoryMode(self):
            return super().trace(root, concrete_args)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if name in self.opaque:
            return True
        asked = self.asked_leaf(module)
        return super().is_leaf_module(module, name) if asked is None else asked

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        return attr_val if self._running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, module, forward, args, kwargs):
        if self._running:
            return forward(*args, **kwargs)
        before, self.current = self.current, self.path_of_module(module)
        out = super().call_module(module, forward, args, kwargs)
        self.current = before  # left as it is on error: that is where it happened
        return out

    # ---- values ------------------------------------------------------------------------------------------

    def create_proxy(self, kind, target, args, kwargs, name=None, type_expr=None, proxy_factory_fn=None):
        if kind == "placeholder":
            index, self._placeholders = self._placeholders, self._placeholders + 1
            if target.startswith("*"):  # *args, **kwargs: none are given
                return _NoKeywords() if target.startswith("**") else _NoArguments()
            node = self.create_node(kind, target, self.create_arg(args), {}, name, type_expr)
            if index >= len(self.examples[0]):
                return args[0] if args else None
            values = tuple(batch[index] for batch in self.examples)
            describe(node, values[0], True)
            return ValueProxy(node, self, values, True)
        if kind == "call_method":
            subject = args[0]
            casts = target == "type" and len(args) + len(kwargs) > 1
            if target in _QUERIES and isinstance(subject, ValueProxy) and not casts:
                return self._query(target, subject, args[1:], kwargs)
            if target.endswith("_") and not target.endswith("__"):
                pure = self._pure(target.rstrip("_"), subject, args[1:], kwargs)
                return subject.become(pure)
        if kind == "call_function":
            pure = _pure_function(target)
            if pure is not None or kwargs.get("inplace") is True:
                kwargs = {name: value for name, value in kwargs.items() if name != "inplace"}
                return args[0].become(self.create_proxy(kind, pure or target, args, kwargs))
        if kind == "call_module":
            module = self.root.get_submodule(target)
            if getattr(module, "inplace", False) is True:
                module.inplace = False  # the module is the tracer's own copy
                self._in_place.add(module)
        if _name(target) in _READS:
            for operand in tree_flatten((args, kwargs))[0]:
                if isinstance(operand, ValueProxy):
                    operand._known()
        args_, kwargs_ = self.create_arg(args), self.create_arg(kwargs)
        values = tuple(self._run(kind, target, args, kwargs, batch) for batch in (0, 1))
        node = self.create_node(kind, target, args_, kwargs_, name, type_expr)
        operands, _ = tree_flatten((args, kwargs))
        dependent = kind == "call_module" or any(getattr(o, "dependent", False) for o in operands)
        describe(node, values[0], dependent)
        out = self._wrap(node, values, dependent)
        if kind == "call_module" and module in self._in_place:
            return (*args, *kwargs.values())[0].become(out)
        return out

    def _pure(self, method, subject, args, kwargs):
        if method in ("copy",):
            return self.create_proxy("call_method", "expand_as", (args[0], subject), {})
        if method in ("fill", "zero"):
            value = args[0] if method == "fill" else 0
            return self.create_proxy("call_function", torch.full_like, (subject, value), {})
        return self.create_proxy("call_method", method, (subject, *args), kwargs)

    def _wrap(self, node: fx.Node, values: tuple, dependent: bool):
        first = values[0]
        if isinstance(first, Tensor) or first is None:
            return ValueProxy(node, self, values, dependent)
        if isinstance(first, (tuple, list)):
            items = []
            for index in range(len(first)):
                item = self.create_node("call_function", operator.getitem, (node, index), {})
                parts = tuple(v[index] for v in values)
                describe(item, parts[0], dependent)
                items.append(self._wrap(item, parts, dependent))
            if type(first).__module__ == "torch.return_types":
                return type(first)(items)
            return tuple(items) if isinstance(first, tuple) else items
        if isinstance(first, int) and not isinstance(first, bool) and values[0] != values[1]:
            return BatchInt.make(self, node, values)
        if values[0] != values[1]:
            raise DataDependent(f"{node.target} gives another {type(first).__name__} on another batch")
        return first

    def _run(self, kind, target, args, kwargs, batch: int):
        def concrete(value):
            return value.values[batch] if isinstance(value, (ValueProxy, BatchInt)) else value

        leaf = lambda v: isinstance(v, (ValueProxy, BatchInt))  # noqa: E731
        args, kwargs = tree_map(concrete, (args, kwargs), is_leaf=leaf)
        args = tuple(_unslice(a, batch) for a in args)
        self._running = True
        try:
            return self._execute(kind, target, args, kwargs)
        finally:
            self._running = False

    def _execute(self, kind, target, args, kwargs):
        with torch._C.DisableTorchFunction():
            if kind == "get_attr":
                return operator.attrgetter(target)(self.root)
            if kind == "call_module":
                return self.root.get_submodule(target)(*args, **kwargs)
            if kind == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            return target(*args, **kwargs)

    def sizes(self, proxy: ValueProxy) -> tuple[int, ...]:
        """The shape of a proxy: plain ints, and :class:`BatchInt` where it depends on the batch."""
        out = []
        for dimension, pair in enumerate(zip(*(v.shape for v in proxy.values), strict=True)):
            if pair[0] == pair[1]:
                out.append(pair[0])
            else:
                node = self.create_node("call_method", "size", (proxy.node, dimension), {})
                out.append(BatchInt.make(self, node, pair))
        return tuple(out)

    def _query(self, name, subject, args, kwargs):
        if name == "size":
            sizes = self.sizes(subject)
            return sizes[args[0]] if args else sizes[kwargs["dim"]] if kwargs else sizes
        values = tuple(getattr(v, name)(*args, **kwargs) for v in subject.values)
        if isinstance(values[0], int) and not isinstance(values[0], bool) and values[0] != values[1]:
            node = self.create_node("call_method", name, (subject.node, *args), kwargs)
            return BatchInt.make(self, node, values)
        return values[0]

    def integer(self, function: Callable, a: Any, b: Any):
        """Arithmetic of sizes: a node even where both examples agree, as B // 2 does for 2 and 3."""
        if isinstance(a, ValueProxy) or isinstance(b, ValueProxy):
            return self.create_proxy("call_function", _ON_TENSORS[function], (a, b), {})
        if isinstance(a, float) or isinstance(b, float):
            return function(*(int(v) if isinstance(v, BatchInt) else v for v in (a, b)))
        values = tuple(function(*(v.values[k] if isinstance(v, BatchInt) else v for v in (a, b))) for k in (0, 1))
        node = self.create_node("call_function", function, self.create_arg((a, b)), {})
        return BatchInt.make(self, node, values)

    def to_bool(self, obj):
        return bool(obj)

    def iter(self, obj):
        return iter(obj)


def describe(node: fx.Node, value: Any, dependent: bool) -> None:
    """Note on a node what it computes on the first example: ``shape``, ``dtype``, and whether the input matters."""
    if isinstance(value, Tensor):
        node.meta.update(shape=value.shape, dtype=value.dtype, dependent=dependent)


def _unslice(value: Any, batch: int) -> Any:
    """Concrete values inside of slices, which tree_map does not enter."""
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        return slice(*(p.values[batch] if isinstance(p, (ValueProxy, BatchInt)) else p for p in parts))
    if isinstance(value, tuple):
        return tuple(_unslice(v, batch) for v in value)
    return value


def _name(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def _pure_function(function: Any) -> Callable | None:
    """The pure form of ``torch.relu_``, ``F.elu_`` and their kind; None for functions of another kind."""
    name = _name(function)
    if not name.endswith("_") or name.endswith("__"):
        return None
    homes = (home for home in (torch, F, Tensor) if getattr(home, name, None) is function)
    return next((getattr(home, name[:-1], None) for home in homes), None)


class _FactoryMode(TorchFunctionMode):
    """``torch.zeros(B, ...)`` with a batch size in it becomes a node; it would be a constant otherwise."""

    def __init__(self, tracer: Capture):
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        operands, _ = tree_flatten((args, kwargs))
        proxies = any(isinstance(o, ValueProxy) for o in operands)
        if not proxies and any(isinstance(o, BatchInt) for o in operands):
            if torch.overrides.is_tensor_method_or_property(function):
                return self.tracer.create_proxy("call_method", function.__name__, args, kwargs)
            return self.tracer.create_proxy("call_function", function, args, kwargs)
        return function(*args, **kwargs)
