"""Rewrites that make a float model quantizable without changing what it computes.

Each pass is a small function on a copy of the user's model. Those on modules run before capture; those on the graph
run after it, where ``node.meta["shape"]`` is the shape on the example.
"""

from __future__ import annotations

import operator

import torch
from torch import fx, nn
from torch.nn import functional as F

from .computed import ComputedConv2d, ComputedLinear

# ---- on modules, before capture --------------------------------------------------------------------------


def open_fused_attention(model: nn.Module) -> None:
    """``fused_attn`` off: matmul, softmax, matmul instead of one opaque call (timm's ViT, Swin and their kin)."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


def is_leaf(module: nn.Module) -> bool | None:
    """Whether capture keeps a module as one call because a pass below takes it apart; None where it may decide.

    Convolutions and linear layers that compute something of their own (padding, a weight) are captured from within;
    :func:`name_layers` puts a plain layer in the place of their inner function.
    """
    if isinstance(module, nn.BatchNorm2d):
        return True
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        own = type(module) not in (nn.Conv2d, nn.Linear) or "weight" not in module._parameters
        return not own and getattr(module, "padding_mode", "zeros") == "zeros"
    return None


# ---- on the graph, after capture -------------------------------------------------------------------------

_FUNCTIONS = {torch.add: operator.add, torch.mul: operator.mul}
_METHODS = {"add": operator.add, "mul": operator.mul}


def name_arithmetic_alike(traced: fx.GraphModule) -> None:
    """``x.add(y)``, ``torch.add(x, y)`` to ``x + y``; ``x.relu()``, ``torch.relu`` to ``F.relu``: torch.ao knows
    one spelling of each (Res2Net, ShuffleNet-like models)."""
    for node in traced.graph.nodes:
        if node.op == "call_method" and node.target in _METHODS and len(node.args) == 2 and not node.kwargs:
            node.op, node.target = "call_function", _METHODS[node.target]
        elif node.op == "call_function" and node.target in _FUNCTIONS and len(node.args) == 2 and not node.kwargs:
            node.target = _FUNCTIONS[node.target]
        elif node.op == "call_method" and node.target == "relu":
            node.op, node.target = "call_function", F.relu
        elif node.op == "call_function" and node.target is torch.relu:
            node.target = F.relu


def remove_identities(traced: fx.GraphModule) -> None:
    """Drop Identity and Dropout(0) calls (timm's ``drop_block``, ``aa``): they stand between BatchNorm and ReLU and
    would keep the two from being fused into the convolution."""
    for node in list(traced.graph.nodes):
        module = _module(traced, node)
        if isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0):
            node.replace_all_uses_with(node.all_input_nodes[0])
            traced.graph.erase_node(node)


def split_batch_norm_act(traced: fx.GraphModule) -> None:
    """``BatchNormAct2d`` (most of timm's mobile and efficient nets) to a BatchNorm2d of the same name and parameters
    and the activation after it; traced through, it would bake ``training=True``."""
    called = {node: _module(traced, node) for node in traced.graph.nodes}  # a module may be called more than once
    for node, module in called.items():
        if not isinstance(module, nn.BatchNorm2d) or type(module) is nn.BatchNorm2d or not hasattr(module, "act"):
            continue
        plain = nn.BatchNorm2d(
            module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats, device="meta"
        )
        plain.weight, plain.bias = module.weight, module.bias
        for name, buffer in module.named_buffers(recurse=False):
            setattr(plain, name, buffer)
        _replace(traced, node.target, plain.train(module.training))
        after = node
        for name, part in (("drop", getattr(module, "drop", None)), ("act", module.act)):
            if part is None or isinstance(part, nn.Identity):
                continue
            if hasattr(part, "inplace"):
                part.inplace = False  # it overwrote BatchNorm's result, which may be a node that others read now
            setattr(plain, name, part)  # under its own name: it may have parameters
            with traced.graph.inserting_after(after):
                call = traced.graph.call_module(f"{node.target}.{name}", (after,))
            call.meta.update(node.meta)
            after.replace_all_uses_with(call, delete_user_cb=lambda user, call=call: user is not call)
            after = call


def name_layers(traced: fx.GraphModule) -> None:
    """Convolutions and linear layers that are called as functions become modules, under the name of their weight.

    So do the insides of layers that pad or compute their weight themselves: TensorFlow's SAME padding (``tf_*``,
    ``mixnet``), standardised weights (``nfnet``, ``nf_*``, BiT ``resnetv2``), classifier heads (timm's Linear), query,
    key and value with a composed bias (BEiT, EVA, Swin v2). A weight that depends on the input (CondConv) stays.
    """
    geometries: dict[str, tuple] = {}
    called = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    for node in list(traced.graph.nodes):
        function = _LAYER_FUNCTIONS.get(node.target) if node.op == "call_function" else None
        if function is None:
            continue
        x, weight, bias, *geometry = function(*node.args, **node.kwargs)
        found = _weight_of(traced, weight)
        if found is None or found[0] in called or not x.meta.get("dependent", False):
            continue
        owner, steps = found
        own_bias = bias if bias is not None and bias.target == f"{owner}.bias" else None
        key = (*geometry, own_bias is not None, weight if len(steps) > 1 else None)
        if geometries.setdefault(owner, key) != key:
            continue  # the same weight with another stride, bias or formula: that call stays a function
        module = traced.get_submodule(owner)
        if type(module) is nn.Module:  # what capture leaves of a module that it looked into
            used = {step.target.rpartition(".")[2] for step in steps if step.op == "get_attr"}
            if {name for name, _ in (*module.named_parameters(), *module.named_buffers())} - used - {"bias"}:
                continue  # something else reads the other parameters under their names
            if "bias" in dict(module.named_parameters()) and own_bias is None:
                continue
            _replace(traced, owner, _layer(traced, owner, steps, own_bias is not None, *geometry))
        with traced.graph.inserting_before(node):
            call = traced.graph.call_module(owner, (x,))
            call.meta.update(node.meta)
            out = call
            if bias is not own_bias:
                view = bias if len(geometry) == 0 else traced.graph.call_method("reshape", (bias, -1, 1, 1))
                view.meta.setdefault("dependent", bias.meta.get("dependent", False))
                out = traced.graph.call_function(operator.add, (call, view))
                out.meta.update(node.meta)
        node.replace_all_uses_with(out)
        traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code()


def _conv_operands(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> tuple:
    def pair(value):
        if isinstance(value, str):
            return value
        return (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))

    return input, weight, bias, pair(stride), pair(padding), pair(dilation), groups


def _linear_operands(input, weight, bias=None) -> tuple:
    return input, weight, bias


_LAYER_FUNCTIONS = {F.conv2d: _conv_operands, torch.conv2d: _conv_operands, F.linear: _linear_operands}


def _weight_of(traced: fx.GraphModule, weight: fx.Node) -> tuple[str, list[fx.Node]] | None:
    """The module whose ``weight`` a layer multiplies with, and the nodes that make something of it, in order.

    None where the weight depends on the input, or on parameters of several modules, or has another shape.
    """
    seen, waiting = set(), [weight]
    while waiting:
        node = waiting.pop()
        if node.op not in ("get_attr", "call_function", "call_method"):
            return None
        if node not in seen:
            seen.add(node)
            waiting.extend(node.all_input_nodes)
    paths = {node.target.rpartition(".")[::2] for node in seen if node.op == "get_attr"}
    owners = {owner for owner, _ in paths}
    if len(owners) != 1 or "" in owners:
        return None
    (owner,) = owners
    module = traced.get_submodule(owner)
    original = getattr(module, "weight", None)
    if (owner, "weight") not in paths or not isinstance(original, nn.Parameter) or list(module.children()):
        return None
    if original.shape != weight.meta.get("shape"):
        return None
    return owner, [node for node in traced.graph.nodes if node in seen]


def functions_left(traced: fx.GraphModule) -> dict[str, str]:
    """Convolutions and linear layers that :func:`name_layers` had to leave functions, with the reason."""
    return {
        node.name: f"{node.target.__name__} in {node.name!r}: its weight is computed from the input, is no parameter "
        "of one module, or is used with two geometries"
        for node in traced.graph.nodes
        if node.op == "call_function" and node.target in _LAYER_FUNCTIONS and node.meta.get("dependent", False)
    }


def _layer(traced: fx.GraphModule, owner: str, steps: list[fx.Node], bias: bool, *geometry) -> nn.Module:
    """The plain layer, or the one with a computed weight, that has the parameters of ``owner``."""
    old = traced.get_submodule(owner)
    computed = len(steps) > 1
    if geometry:
        stride, padding, dilation, groups = geometry
        out, inputs, *kernel = old.weight.shape
        kind = ComputedConv2d if computed else nn.Conv2d
        layer = kind(inputs * groups, out, kernel, stride, padding, dilation, groups, bias, device="meta")
    else:
        kind = ComputedLinear if computed else nn.Linear
        layer = kind(*reversed(old.weight.shape), bias=bias, device="meta")
    layer.weight = old.weight
    if bias:
        layer.bias = old.bias
    if computed:
        formula, copied, operands = fx.Graph(), {}, {}
        for node in steps:
            if node.op == "get_attr":
                name = node.target.rpartition(".")[2]
                if name not in operands:
                    operands[name] = getattr(old, name)
                    copied[node] = formula.placeholder(name)
                else:
                    copied[node] = next(c for n, c in copied.items() if n.target == node.target)
            else:
                copied[node] = formula.node_copy(node, copied.__getitem__)
        formula.output(copied[steps[-1]])
        layer.set_formula(fx.GraphModule(nn.Module(), formula, "WeightFormula"), operands)
    return layer.train(traced.training)


def number_padding(traced: fx.GraphModule) -> None:
    """Padding by name to numbers, ``"valid"`` and ``"same"`` (ConvMixer); or to a pad before the convolution where
    ``"same"`` is lopsided."""
    for module, nodes in _convolutions(traced).items():
        if not isinstance(module.padding, str):
            continue
        same = module.padding == "same"
        total = [d * (k - 1) if same else 0 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        module.padding = (0, 0)
        for node in nodes if any(total) else ():
            with traced.graph.inserting_before(node):
                (x,) = node.all_input_nodes
                pad = [total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2]
                padded = traced.graph.call_function(F.pad, (x, pad))
            padded.meta.update(dtype=x.meta.get("dtype"), dependent=x.meta.get("dependent", False))
            node.replace_input_with(x, padded)


def fold_padding(traced: fx.GraphModule) -> None:
    """A zero pad, the same on opposite sides, into the convolution after it (SAME padding, ``F.pad`` by hand)."""
    for module, nodes in _convolutions(traced).items():
        pads = [_even_pad(traced, node.all_input_nodes[0]) for node in nodes]
        if None in pads or len(set(pads)) > 1 or isinstance(module.padding, str):
            continue
        module.padding = tuple(own + extra for own, extra in zip(module.padding, pads[0], strict=True))
        for node in nodes:
            (padded,) = node.all_input_nodes
            node.replace_input_with(padded, padded.all_input_nodes[0])
    traced.graph.eliminate_dead_code()


def _even_pad(traced: fx.GraphModule, node: fx.Node) -> tuple[int, int] | None:
    """By how much a node pads above and below, left and right; None if it does something else."""
    module = _module(traced, node)
    if type(module) is nn.ZeroPad2d:
        pad = module.padding
    elif node.op == "call_function" and node.target is F.pad:
        _, pad, mode, value = _pad_operands(*node.args, **node.kwargs)
        if mode != "constant" or value not in (None, 0):
            return None
    else:
        return None
    if len(pad) not in (2, 4) or not all(type(p) is int and p >= 0 for p in pad):
        return None
    left, right, top, bottom = (*pad, 0, 0)[:4]
    return (top, left) if left == right and top == bottom else None


def _pad_operands(input, pad, mode="constant", value=None) -> tuple:
    return input, pad, mode, value


def _convolutions(traced: fx.GraphModule) -> dict[nn.Conv2d, list[fx.Node]]:
    """Convolutions by their calls, in graph order."""
    calls: dict[nn.Conv2d, list[fx.Node]] = {}
    for node in traced.graph.nodes:
        if isinstance(module := _module(traced, node), nn.Conv2d):
            calls.setdefault(module, []).append(node)
    return calls


def name_relu6(traced: fx.GraphModule) -> None:
    """``F.relu6``, ``F.hardtanh(x, 0, 6)`` and ``nn.Hardtanh(0, 6)`` to ``nn.ReLU6``, which is fused (MobileNets)."""
    for node in list(traced.graph.nodes):
        module = _module(traced, node)
        hardtanh = type(module) is nn.Hardtanh and (module.min_val, module.max_val) == (0, 6)
        function = node.op == "call_function" and (
            node.target is F.relu6 or (node.target is F.hardtanh and _bounds(*node.args, **node.kwargs) == (0, 6))
        )
        if hardtanh or function:
            name = _fresh(traced, f"{node.name}_relu6")
            traced.add_submodule(name, nn.ReLU6())
            with traced.graph.inserting_after(node):
                call = traced.graph.call_module(name, tuple(node.all_input_nodes))
            call.meta.update(node.meta)
            node.replace_all_uses_with(call)
            traced.graph.erase_node(node)


def _bounds(input, min_val=-1.0, max_val=1.0, inplace=False) -> tuple[float, float]:
    return min_val, max_val


MODULE_PASSES = (open_fused_attention,)
GRAPH_PASSES = (
    name_arithmetic_alike, split_batch_norm_act, remove_identities, name_layers, number_padding, fold_padding,
    name_relu6,
)  # fmt: skip


def _module(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return traced.get_submodule(node.target) if node.op == "call_module" else None


def _replace(traced: fx.GraphModule, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(traced.get_submodule(parent), leaf, module)


def _fresh(traced: fx.GraphModule, name: str) -> str:
    taken = dict(traced.named_modules())
    while name in taken:
        name += "_"
    return name
