"""Rewrites that make a float model quantizable without changing what it computes.

Each pass is a small function on a copy of the user's model. Those on modules run before capture; those on the graph
run after it, where ``node.meta["shape"]`` is the shape on the example.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F

from .computed import ComputedConv2d, ComputedLinear
from .graph import unused_name
from .layers import QATConv2d, QATLinear
from .modes import DROPOUTS, DROPS

# ---- on modules, before capture --------------------------------------------------------------------------


def open_fused_attention(model: nn.Module) -> None:
    """``fused_attn`` off: matmul, softmax, matmul instead of one opaque call (timm's ViT, Swin and their kin)."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


def is_leaf(module: nn.Module) -> bool | None:
    """Whether capture keeps a module as one call because a pass below takes it apart; None where it may decide.

    Convolutions and linear layers that compute something of their own (padding, a weight) are captured from within;
    :func:`name_layers` puts a plain layer in the place of their inner function. So is whatever has forward hooks, what
    they do with it becoming nodes: a fused layer would lose them.
    """
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
        return False
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


def name_dropout(traced: fx.GraphModule) -> None:
    """``F.dropout(x, p, self.training)`` to ``nn.Dropout(p)`` (timm's ``drop_rate``), which goes on dropping in
    training; capture, made in eval mode, has baked ``training=False`` into the function. One that never drops goes."""
    for node in list(traced.graph.nodes):
        if node.op != "call_function" or node.target not in DROPOUTS:
            continue
        if p := node.meta.get(DROPS, 0.0):
            _call_instead(traced, node, f"{node.name}_module", DROPOUTS[node.target](p).train(traced.training))
        else:
            node.replace_all_uses_with(node.all_input_nodes[0])
            traced.graph.erase_node(node)


def remove_identities(traced: fx.GraphModule) -> None:
    """Drop Identity and Dropout(0) calls (timm's ``drop_block``, ``aa``): they stand between BatchNorm and ReLU and
    would keep the two from being fused into the convolution."""
    for node in list(traced.graph.nodes):
        module = _module(traced, node)
        if isinstance(module, nn.Identity) or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p == 0):
            node.replace_all_uses_with(node.all_input_nodes[0])
            traced.graph.erase_node(node)


def split_batch_norm_act(traced: fx.GraphModule) -> None:
    """``BatchNormAct2d`` (most of timm's mobile and efficient nets) to a BatchNorm2d of the same name and parameters
    and the activation after it; traced through, it would bake ``training=True``."""
    called = {node: _module(traced, node) for node in traced.graph.nodes}  # a module may be called more than once
    for node, module in called.items():
        if not isinstance(module, nn.BatchNorm2d) or type(module) is nn.BatchNorm2d:
            continue
        if "act" not in module._modules or getattr(module, "drop", None) is not module._modules.get("drop"):
            continue  # not timm's, whose activation is a module
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


class BatchStatisticsNorm2d(nn.BatchNorm2d):
    """BatchNorm2d without running statistics. It cannot be folded, and is no BatchNorm2d to what fuses layers."""


def keep_batch_statistics(traced: fx.GraphModule) -> None:
    """A BatchNorm2d that normalises by each batch, in eval as well, to one that stays a call of its own."""
    for node in traced.graph.nodes:
        module = _module(traced, node)
        if type(module) is nn.BatchNorm2d and module.running_mean is None:
            apart = BatchStatisticsNorm2d(
                module.num_features, module.eps, affine=False, track_running_stats=False, device="meta"
            )
            apart.affine, apart.weight, apart.bias = module.affine, module.weight, module.bias
            for name, child in module.named_children():  # capture keeps its activation below it
                apart.add_module(name, child)
            _replace(traced, node.target, apart.train(module.training))


def positional_input(traced: fx.GraphModule) -> None:
    """``layer(input=x)`` to ``layer(x)``: the layers that replace these take one positional tensor."""
    for node in traced.graph.nodes:
        module = _module(traced, node)
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)) and list(node.kwargs) == ["input"]:
            node.args, node.kwargs = (node.kwargs["input"],), {}


def name_layers(traced: fx.GraphModule) -> None:
    """Convolutions and linear layers that are called as functions become modules, under the name of their weight.

    So do the insides of layers that pad or compute their weight themselves: TensorFlow's SAME padding (``tf_*``,
    ``mixnet``), standardised weights (``nfnet``, ``nf_*``, BiT ``resnetv2``), classifier heads (timm's Linear), query,
    key and value with a composed bias (BEiT, EVA, Swin v2). All calls of a weight become calls of one layer, or none
    does: what cannot (CondConv's weights depend on the input) stays a function, with the reason in ``node.meta``.
    """
    calls: dict[str, list[_Call]] = {}
    for node in traced.graph.nodes:
        if node.op == "call_function" and node.target in _LAYER_FUNCTIONS:
            try:
                call = _Call.of(traced, node)
                calls.setdefault(call.owner, []).append(call)
            except _StaysFunction as reason:
                node.meta[_REASON] = str(reason)
    for owner, group in calls.items():
        try:
            _require_alone(traced, owner, group)
        except _StaysFunction as reason:
            for call in group:
                call.node.meta[_REASON] = str(reason)
            continue
        _replace(traced, owner, group[0].layer(traced))
        for call in group:
            call.become_module(traced)
    traced.graph.eliminate_dead_code()


_REASON = "fxquant_stays_function"


class _StaysFunction(Exception):
    """Why a layer that is called as a function cannot become a module."""


@dataclass
class _Call:
    """One call of a convolution or linear layer as a function.

    Attributes:
        owner: name of the module whose ``weight`` it multiplies with.
        steps: the nodes that make the weight from parameters of ``owner``, in order; the last one is the weight.
        bias: a node, whose value is not ``owner``'s own bias, or None.
        has_bias: whether it adds ``owner``'s own bias.
        geometry: stride, padding, dilation and groups of a convolution; nothing for a linear layer.
    """

    node: fx.Node
    x: fx.Node
    owner: str
    steps: list[fx.Node]
    bias: fx.Node | None
    has_bias: bool
    geometry: tuple

    @classmethod
    def of(cls, traced: fx.GraphModule, node: fx.Node) -> _Call:
        x, weight, bias, *geometry = _LAYER_FUNCTIONS[node.target](*node.args, **node.kwargs)
        if not isinstance(x, fx.Node) or not x.meta.get("dependent", False):
            raise _StaysFunction("its input is a constant")
        rank = 4 if geometry else 2
        if len(weight.meta.get("shape", ())) != rank:
            raise _StaysFunction(f"its weight has not {rank} dimensions")
        if len(x.meta["shape"]) < 2 or (geometry and len(x.meta["shape"]) != 4):
            raise _StaysFunction("its input is no batch")
        owner, steps = _weight_of(traced, weight)
        own = bias is not None and bias.target == f"{owner}.bias"
        return cls(node, x, owner, steps, None if own else bias, own, tuple(geometry))

    def key(self, known: dict[str, int]) -> tuple:
        """Equal for two calls that one layer can compute. ``known`` numbers the expressions met so far."""
        numbers: dict[fx.Node, int] = {}
        for step in self.steps:
            operands = fx.map_arg((step.args, step.kwargs), numbers.__getitem__)
            numbers[step] = known.setdefault(f"{step.op} {step.target} {operands}", len(known))
        return self.geometry, self.has_bias, numbers[self.steps[-1]]

    def layer(self, traced: fx.GraphModule) -> nn.Module:
        """The plain layer, or the one with a computed weight, that has the parameters of the owner."""
        old = traced.get_submodule(self.owner)
        computed = len(self.steps) > 1
        if self.geometry:
            stride, padding, dilation, groups = self.geometry
            out, inputs, *kernel = old.weight.shape
            kind = ComputedConv2d if computed else nn.Conv2d
            layer = kind(inputs * groups, out, kernel, stride, padding, dilation, groups, self.has_bias, device="meta")
        else:
            kind = ComputedLinear if computed else nn.Linear
            layer = kind(*reversed(old.weight.shape), bias=self.has_bias, device="meta")
        layer.weight = old.weight
        if self.has_bias:
            layer.bias = old.bias
        if computed:
            self._set_formula(layer, old)
        return layer.train(traced.training)

    def _set_formula(self, layer: nn.Module, old: nn.Module) -> None:
        formula, copied, inputs, operands = fx.Graph(), {}, {}, {}
        for step in self.steps:
            if step.op == "get_attr":
                name = step.target.rpartition(".")[2]
                if name not in inputs:
                    operands[name], inputs[name] = getattr(old, name), formula.placeholder(name)
                copied[step] = inputs[name]
            else:
                copied[step] = formula.node_copy(step, copied.__getitem__)
        formula.output(copied[self.steps[-1]])
        layer.set_formula(fx.GraphModule(nn.Module(), formula, "WeightFormula"), operands)

    def become_module(self, traced: fx.GraphModule) -> None:
        """Put a call of the layer, and the addition of a bias that is not its own, in the function's place."""
        with traced.graph.inserting_before(self.node):
            out = traced.graph.call_module(self.owner, (self.x,))
            out.meta.update(self.node.meta)
            if self.bias is not None:
                bias = self.bias
                if self.geometry:
                    bias = traced.graph.call_method("reshape", (bias, -1, 1, 1))
                    bias.meta.update({**self.bias.meta, "shape": (*self.bias.meta["shape"], 1, 1)})
                out = traced.graph.call_function(operator.add, (out, bias))
                out.meta.update(self.node.meta)
        self.node.replace_all_uses_with(out)
        traced.graph.erase_node(self.node)


def _require_alone(traced: fx.GraphModule, owner: str, group: list[_Call]) -> None:
    """Raises :class:`_StaysFunction` unless one layer can take the owner's place for all that reads from it."""
    known: dict[str, int] = {}
    if len({call.key(known) for call in group}) > 1:
        raise _StaysFunction("its weight is used with two geometries, biases or formulas")
    module = traced.get_submodule(owner)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    if any(f"{owner}.".startswith(f"{name}.") or name.startswith(f"{owner}.") for name in called):
        raise _StaysFunction(f"{owner!r} holds, or belongs to, a module that is called as well")
    if type(module) is not nn.Module:  # capture leaves a bare one of what it looked into
        raise _StaysFunction(f"{owner!r} is a {type(module).__name__}")
    used = {step for call in group for step in call.steps}
    for node in traced.graph.nodes:
        if node.op == "get_attr" and node.target.startswith(f"{owner}.") and node not in used:
            own_bias = node.target == f"{owner}.bias" and group[0].has_bias
            if own_bias and set(node.users) <= {call.node for call in group}:
                continue
            raise _StaysFunction(f"{node.target!r} is read by something else as well")
    taken = {name for name in _names_read(used) if name not in ("weight", "bias") and hasattr(_LAYER_NAMES, name)}
    if taken:
        raise _StaysFunction(f"it computes its weight from {sorted(taken)}, which are names that layers use themselves")


class _LAYER_NAMES(QATConv2d, QATLinear):
    """What attributes a layer has already; never made."""

    formula = operands = bn = relu = ceiling = input_fake_quant = weight_fake_quant = None


def _names_read(steps: Iterable[fx.Node]) -> set[str]:
    return {step.target.rpartition(".")[2] for step in steps if step.op == "get_attr"}


def _conv_operands(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> tuple:
    def pair(value):
        if isinstance(value, str):
            return value
        return (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))

    return input, weight, bias, pair(stride), pair(padding), pair(dilation), groups


def _linear_operands(input, weight, bias=None) -> tuple:
    return input, weight, bias


_LAYER_FUNCTIONS = {F.conv2d: _conv_operands, torch.conv2d: _conv_operands, F.linear: _linear_operands}


def _weight_of(traced: fx.GraphModule, weight: fx.Node) -> tuple[str, list[fx.Node]]:
    """The module whose ``weight`` a layer multiplies with, and the nodes that make something of it, in order.

    Raises:
        _StaysFunction: where the weight depends on the input, or is not made of one module's parameters.
    """
    seen, waiting = set(), [weight]
    while waiting:
        node = waiting.pop()
        if node.op not in ("get_attr", "call_function", "call_method"):
            raise _StaysFunction("its weight is computed from the input, or by a module")
        if node not in seen:
            seen.add(node)
            waiting.extend(node.all_input_nodes)
    owners = {node.target.rpartition(".")[0] for node in seen if node.op == "get_attr"}
    if len(owners) != 1 or "" in owners:
        raise _StaysFunction("its weight is not made of the parameters of one submodule")
    (owner,) = owners
    original = getattr(traced.get_submodule(owner), "weight", None)
    if "weight" not in _names_read(seen) or not isinstance(original, nn.Parameter):
        raise _StaysFunction(f"its weight is no Parameter named 'weight' of {owner!r}")
    if original.shape != weight.meta.get("shape"):
        raise _StaysFunction(f"its weight has another shape than {owner}.weight")
    return owner, [node for node in traced.graph.nodes if node in seen]


def functions_left(traced: fx.GraphModule) -> dict[str, str]:
    """Convolutions and linear layers that :func:`name_layers` had to leave functions, with the reason.

    Their keys end in ``()``, which no module's name does.
    """
    return {
        f"{node.name}()": f"{node.target.__name__} at {node.name!r}: {node.meta[_REASON]}"
        for node in traced.graph.nodes
        if _REASON in node.meta and node.meta.get("dependent", False)
    }


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
            _call_instead(traced, node, f"{node.name}_relu6", nn.ReLU6())


def _bounds(input, min_val=-1.0, max_val=1.0, inplace=False) -> tuple[float, float]:
    return min_val, max_val


MODULE_PASSES = (open_fused_attention,)
GRAPH_PASSES = (
    name_arithmetic_alike, positional_input, split_batch_norm_act, keep_batch_statistics, name_dropout,
    remove_identities, name_layers, number_padding, fold_padding, name_relu6,
)  # fmt: skip


def _module(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return traced.get_submodule(node.target) if node.op == "call_module" else None


def _call_instead(traced: fx.GraphModule, node: fx.Node, name: str, module: nn.Module) -> None:
    """Put a call of a new module, of that name or near it, in a node's place."""
    name = unused_name(traced, name)
    traced.add_submodule(name, module)
    with traced.graph.inserting_after(node):
        call = traced.graph.call_module(name, tuple(node.all_input_nodes))
    call.meta.update(node.meta)
    node.replace_all_uses_with(call)
    traced.graph.erase_node(node)


def _replace(traced: fx.GraphModule, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(traced.get_submodule(parent), leaf, module)
