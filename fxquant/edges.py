"""Where tensors between layers are rounded: the quantizers on the edges of the prepared graph."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

from .estimators import Estimator
from .graph import called_module, unused_name
from .layers import QATConv2d, QATLayer
from .qconfig import EDGE_OPERATORS, MOVES_VALUES, OperandFakeQuantize
from .spec import BackendSpec


def place_edges(prepared: fx.GraphModule, profile: BackendSpec) -> None:
    """Keep the edge quantizers that integer operators need, drop the rest, and name them after their producer.

    torch.ao observes every output. A layer quantizes its own input, so an edge matters only where it carries the
    result or an operand of an addition, multiplication or concatenation, directly or through operators that share
    their quantizer between input and output (poolings, shape operators); and, where the backend's convolutions give
    codes alone, at the result of one that float operators read. Where a layer adds a residual itself, what it has just
    computed goes without.
    """
    modules = dict(prepared.named_modules(remove_duplicate=False))

    def edge_of(node: fx.Node) -> Estimator | None:
        module = called_module(node, modules)
        return module if isinstance(module, Estimator) else None

    kept: set[fx.Node] = set()
    edges = [node for node in prepared.graph.nodes if edge_of(node) is not None]
    for node in reversed(edges):
        if not _carries_activations(node.args[0]) or _decides_a_divisor(node, modules):
            continue
        if _is_sum(node.args[0]) or any(_is_arithmetic(user) for user in node.users):
            kept.add(node)
            continue
        if not profile.float_convolutions and _is_float_convolution(node, modules):
            kept.add(node)
            continue
        through = (onward for user in node.users for onward in user.users)
        if any(onward in kept and edge_of(onward) is edge_of(node) for onward in through):
            kept.add(node)

    if profile.adds_in_layer:
        kept -= _unrounded_addends(prepared, kept, modules)

    names: dict[int, str] = {}
    for node in edges:
        if node not in kept:
            node.replace_all_uses_with(node.args[0])
            prepared.graph.erase_node(node)
            continue
        edge = edge_of(node)
        if id(edge) not in names:
            names[id(edge)] = unused_name(prepared, f"{node.args[0].name}_edge")
            prepared.add_submodule(names[id(edge)], edge)
        node.target = names[id(edge)]
    # torch.ao registers a shared quantizer under several names; keep the one that the graph calls.
    for name in [name for name, m in prepared._modules.items() if isinstance(m, Estimator)]:
        if name not in names.values():
            delattr(prepared, name)
    prepared.graph.lint()
    prepared.recompile()


def share_grids(prepared: fx.GraphModule) -> None:
    """Where a layer reads an edge of its own width, the two quantizers become one: the second would round again.

    One that is called several times has one input quantizer, so all calls have to read the same edge.
    """
    modules = dict(prepared.named_modules(remove_duplicate=False))
    read: dict[QATLayer, set[nn.Module | None]] = {}
    for node in prepared.graph.nodes:
        layer = called_module(node, modules)
        if isinstance(layer, QATLayer) and layer.input_fake_quant is not None:
            read.setdefault(layer, set()).add(called_module(node.args[0], modules))
    for layer, sources in read.items():
        edge = next(iter(sources))
        if len(sources) == 1 and isinstance(edge, Estimator) and layer.input_fake_quant.bits == edge.bits:
            layer.input_fake_quant, layer.input_is_quantized = edge, True


def place_operand_edges(prepared: fx.GraphModule, bits: int) -> None:
    """Put both operands of every product of activations (attention's two) on a grid of ``bits``.

    An edge goes where the operand was computed, above what only moves or scales its values, so that one quantizer after
    a projection serves queries, keys and values, and they are moved as integers. A tensor that is on a grid already
    stays as it is, and so does a product that a division depends on.
    """
    modules = dict(prepared.named_modules(remove_duplicate=False))
    products = [node for node in prepared.graph.nodes if _is_product(node)]
    edges: dict[fx.Node, fx.Node] = {}
    for product in products:
        if _decides_a_divisor(product, modules):
            continue
        for operand in product.args[:2]:
            reader, source = product, operand
            while _moves_or_scales(source, modules):
                reader, source = source, source.args[0]
            if isinstance(called_module(source, modules), Estimator):
                continue
            if source not in edges:
                name = unused_name(prepared, f"{source.name}_edge")
                modules[name] = OperandFakeQuantize(bits)
                prepared.add_submodule(name, modules[name])
                with prepared.graph.inserting_after(source):
                    edges[source] = prepared.graph.call_module(name, (source,))
            reader.replace_input_with(source, edges[source])
    prepared.graph.lint()
    prepared.recompile()


PRODUCTS = frozenset({operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm", "__matmul__"})
_PARTS = frozenset({operator.getitem, torch.unbind, torch.chunk, torch.split, "unbind", "chunk", "split", "select"})
_SCALINGS = frozenset({operator.mul, torch.mul, operator.truediv, torch.div})


def _is_product(node: fx.Node) -> bool:
    operands = node.args[:2] if node.target in PRODUCTS else ()
    return len(operands) == 2 and all(isinstance(o, fx.Node) and _carries_activations(o) for o in operands)


def _moves_or_scales(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node's values are those of its first argument, elsewhere, or times a number."""
    target = type(modules[node.target]) if node.op == "call_module" else node.target
    if node.op == "placeholder" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    return target in MOVES_VALUES | _PARTS or (target in _SCALINGS and isinstance(node.args[1], (int, float)))


def _unrounded_addends(prepared: fx.GraphModule, kept: set[fx.Node], modules: dict[str, nn.Module]) -> set[fx.Node]:
    """Of each addition of two edges, the one whose layer can add the other itself; the later of the two if both can."""
    position = {node: index for index, node in enumerate(prepared.graph.nodes)}
    found = set()
    for node in prepared.graph.nodes:
        operands = node.args if node.op == "call_function" and node.target in (operator.add, torch.add) else ()
        if len(operands) != 2 or node.kwargs or not all(operand in kept for operand in operands):
            continue
        for operand in sorted(operands, key=position.get, reverse=True):
            producer = operand.args[0]
            layer = called_module(producer, modules)
            private = len(operand.users) == len(producer.users) == 1 and operands[0] is not operands[1]
            if private and isinstance(layer, QATLayer) and not layer.relu:
                found.add(operand)
                break
    return found


def _is_float_convolution(edge: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether an edge follows a convolution whose result an operator computes with that is no layer.

    What only moves values does not count: runtimes round before it what is to be rounded after it.
    """

    if not isinstance(called_module(edge.args[0], modules), QATConv2d):
        return False

    def only_moved(node: fx.Node) -> bool:
        for user in node.users:
            module = called_module(user, modules)
            moves = (
                isinstance(module, Estimator) or (type(module) if module is not None else user.target) in MOVES_VALUES
            )
            if not (user.op == "output" or isinstance(module, QATLayer) or (moves and only_moved(user))):
                return False
        return True

    return not only_moved(edge)


def _is_arithmetic(node: fx.Node) -> bool:
    """An operator that combines tensors which the input reaches; ``x * 0.5`` and ``x + position`` are float."""
    if node.op != "call_function" or node.target not in EDGE_OPERATORS:
        return False
    operands = [operand for operand in tree_flatten(node.args)[0] if isinstance(operand, fx.Node)]
    return len(operands) > 1 and all(_carries_activations(o) for o in operands)


def _carries_activations(node: fx.Node) -> bool:
    """Whether a node's tensor is floating and depends on the input, as capture saw it."""
    while "dtype" not in node.meta and node.op == "call_module" and len(node.args) == 1:
        node = node.args[0]  # through quantizers, which came after capture
    return node.meta.get("dependent", False) and node.meta["dtype"].is_floating_point


_DIVISIONS = {F.normalize, torch.rsqrt, torch.reciprocal, torch.log, "rsqrt", "reciprocal", "log"}


def _decides_a_divisor(edge: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether float operators carry an edge's tensor into a divisor (linear attention): what rounds to 0 there makes
    gradients of 1e15 and more."""
    seen, reached = set(), [edge]
    while reached:
        node = reached.pop()
        for user in node.users:
            divides = user.op == "call_function" and user.target in (operator.truediv, torch.div)
            if user.target in _DIVISIONS or (divides and len(user.args) > 1 and user.args[1] is node):
                return True
            stops = isinstance(called_module(user, modules), (QATLayer, Estimator))
            if user not in seen and not stops:
                seen.add(user)
                reached.append(user)
    return False


def _is_sum(node: fx.Node) -> bool:
    """An arithmetic operator, or the ReLU that follows one."""
    if _is_arithmetic(node):
        return True
    owner = node.graph.owning_module
    is_relu = (node.op == "call_function" and node.target in (F.relu, torch.relu)) or (
        node.op == "call_module" and isinstance(owner.get_submodule(node.target), nn.ReLU)
    )
    return is_relu and isinstance(node.args[0], fx.Node) and _is_arithmetic(node.args[0])
