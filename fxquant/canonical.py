"""Rewrites that make a float model quantizable without changing what it computes.

Each pass is a small function on a copy of the user's model. Those on modules run before capture; those on the graph
run after it, where ``node.meta["shape"]`` is the shape on the example.
"""

from __future__ import annotations

import operator

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# ---- on modules, before capture --------------------------------------------------------------------------


def open_fused_attention(model: nn.Module) -> None:
    """``fused_attn`` off: matmul, softmax, matmul instead of one opaque call (timm's ViT, Swin and their kin)."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


def plain_linear(model: nn.Module) -> None:
    """Subclasses of Linear that compute the same become ``nn.Linear`` (``timm.layers.Linear``: classifier heads)."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            x = torch.randn(2, module.in_features).to(module.weight)
            with torch.no_grad():
                same = torch.equal(module(x), F.linear(x, module.weight, module.bias))
            if same:
                module.__class__ = nn.Linear


def is_leaf(module: nn.Module) -> bool:
    """Modules that capture keeps as one call because a pass below takes them apart."""
    return isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d))


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
        for part in (getattr(module, "drop", None), module.act):
            if part is None or isinstance(part, nn.Identity):
                continue
            if hasattr(part, "inplace"):
                part.inplace = False  # it overwrote BatchNorm's result, which may be a node that others read now
            name = _fresh(traced, f"{node.target}_act")
            traced.add_submodule(name, part)
            with traced.graph.inserting_after(after):
                call = traced.graph.call_module(name, (after,))
            call.meta.update(node.meta)
            after.replace_all_uses_with(call, delete_user_cb=lambda user, call=call: user is not call)
            after = call


def static_convolutions(traced: fx.GraphModule) -> None:
    """Convolutions that compute their padding or their weight at every call, to plain Conv2d for the example's size.

    TensorFlow's SAME padding (``tf_*``, ``mixnet``) becomes a number, or a pad before the convolution where it is
    lopsided; a standardised weight (``nfnet``, ``nf_*``, ``resnetv2``) is computed once.
    """
    calls: dict[nn.Conv2d, list[fx.Node]] = {}
    for node in traced.graph.nodes:
        if isinstance(module := _module(traced, node), nn.Conv2d):
            calls.setdefault(module, []).append(node)
    for module, nodes in calls.items():
        if type(module) is nn.Conv2d and not isinstance(module.padding, str) and module.padding_mode == "zeros":
            continue
        shapes = [node.all_input_nodes[0].meta.get("shape") for node in nodes]
        forms = [_static(module, shape) if shape is not None else None for shape in shapes]
        if None in forms or len({(conv.padding, pad) for conv, pad in forms}) > 1:
            continue  # called on sizes that it pads differently
        conv, pad = forms[0]
        _replace(traced, nodes[0].target, conv.train(module.training))
        for node in nodes if any(pad) else ():
            with traced.graph.inserting_before(node):
                (x,) = node.all_input_nodes
                padded = traced.graph.call_function(F.pad, (x, list(pad)))
            padded.meta["dtype"] = x.meta.get("dtype")
            node.replace_input_with(x, padded)


def _static(module: nn.Conv2d, shape: torch.Size) -> tuple[nn.Conv2d, tuple[int, ...]] | None:
    """The plain convolution that ``module`` is on inputs of ``shape``, and what to pad before; None if it is none."""
    x = torch.randn(shape).to(module.weight)
    with torch.no_grad(), _ConvWatch() as watch:
        want = module(x)
    if len(watch.calls) != 1:
        return None
    inner, weight, bias, stride, padding, dilation, groups = watch.calls[0]
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:], strict=True)]
        before = [t // 2 for t in total]
        pad = (before[1], total[1] - before[1], before[0], total[0] - before[0])
    else:
        extra = [inner.shape[2] - x.shape[2], inner.shape[3] - x.shape[3]]
        before = [e // 2 for e in extra]
        pad = (before[1] + padding[1], extra[1] - before[1] + padding[1],
               before[0] + padding[0], extra[0] - before[0] + padding[0])  # fmt: skip
    if min(pad) < 0:
        return None
    conv = nn.Conv2d(
        module.in_channels, weight.shape[0], weight.shape[2:], stride, 0, dilation, groups, bias is not None,
        device="meta",
    )  # fmt: skip
    conv.weight = module.weight if weight is module.weight else nn.Parameter(weight.detach().clone())
    conv.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach().clone())
    even = pad[0] == pad[1] and pad[2] == pad[3]
    if even:
        conv.padding, pad = (pad[2], pad[0]), (0, 0, 0, 0)
    with torch.no_grad():
        for trial in (x, 2 * torch.randn(shape).to(x) + 1):  # a weight made from the input fits one input alone
            want, got = module(trial), conv(F.pad(trial, pad) if any(pad) else trial)
            if got.shape != want.shape or not torch.allclose(got, want, rtol=1e-4, atol=1e-5):
                return None
    return conv, pad


class _ConvWatch(TorchFunctionMode):
    """Notes the operands of every 2-D convolution computed within."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.conv2d, torch.conv2d):
            self.calls.append(_conv_operands(*args, **(kwargs or {})))
        return function(*args, **(kwargs or {}))


def _conv_operands(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> tuple:
    def pair(value):
        if isinstance(value, str):
            return value
        return (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))

    return input, weight, bias, pair(stride), pair(padding), pair(dilation), groups


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


MODULE_PASSES = (open_fused_attention, plain_linear)
GRAPH_PASSES = (name_arithmetic_alike, split_batch_norm_act, remove_identities, static_convolutions, name_relu6)


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
