"""Capture on real values: the graph is the module, at any batch size; what depends on data is told, not baked."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import timm.layers
import torch
from torch import nn
from torch.nn import functional as F

import fxquant as fq
from fxquant.capture import Capture, DataDependent
from fxquant.errors import TraceError
from fxquant.trace import OPAQUE, trace
from tests.models import TinyMobile, TinyResidual, settle

BATCHES = (1, 2, 3, 4, 5, 7)  # more than a graph is captured on


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 4, 6, 6)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.5))

    def forward(self, x, *, power=1, shift=None):
        y = x * self.factor**power
        return y if shift is None else y + shift


class Fn(nn.Module):
    """A forward under test, with parameters, buffers and submodules for it to use. Input [N, 4, 6, 6]."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(4, 1, 1))
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.register_buffer("offset", torch.randn(1, 4, 1, 1))
        self.register_buffer("index", torch.tensor([2, 0, 1]))
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("count", torch.tensor(3))
        self.constant = torch.arange(4.0)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.linear = nn.Linear(6, 6)
        self.scale = Scale()
        self.act = nn.ReLU(inplace=True)
        self.layers = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Tanh()])

    def forward(self, x):
        return self.function(self, x)


def same_everywhere(module: nn.Module) -> torch.fx.GraphModule:
    """Capture, and compare on batches of all sizes, bit for bit."""
    module = module.eval()
    traced = trace(module, (images(),))
    assert traced.meta[OPAQUE] == {}
    for count in BATCHES:
        x = images(count)
        with torch.no_grad():
            want, got = module(x.clone()), traced(x.clone())
        assert got.dtype == want.dtype
        assert torch.equal(got, want), f"on a batch of {count}"
    return traced


# ---- sizes -----------------------------------------------------------------------------------------------


def windows(m, x):
    """Swin's partition into windows of 3 x 3, and back."""
    b, c, h, w = x.shape
    x = x.permute(0, 2, 3, 1).view(b, h // 3, 3, w // 3, 3, c)
    x = x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 9, c)
    x = x + x.softmax(1)
    images = x.shape[0] // (h * w // 3 // 3)
    x = x.view(images, h // 3, w // 3, 3, 3, -1).permute(0, 1, 3, 2, 4, 5).contiguous()
    return x.view(b, h, w, -1)


def window_mask(m, x):
    """A mask that is made of constants alone, in loops over slices."""
    mask = torch.zeros(1, 1, *x.shape[-2:])
    parts = (slice(0, -3), slice(-3, None))
    for count, (h, w) in enumerate(itertools.product(parts, parts)):
        mask[:, :, h, w] = count
    return x + mask


def attention(m, x):
    b, c, h, w = x.shape
    q, k, v = x.flatten(2).reshape(b, 2, c // 2, h * w).repeat(1, 1, 3, 1).chunk(3, 2)
    out = (q.transpose(-2, -1) @ k).softmax(-1) @ v.mT
    return out.transpose(1, 2).reshape(b, h * w, c)


def with_token(m, x):
    b, *_ = x.shape
    return torch.cat([m.token.expand(b, -1, -1), x.flatten(2).transpose(1, 2)], dim=1)


def unpack_rest(m, x):
    b, *rest = x.shape
    return x.reshape(b, math.prod(rest))


SIZES = {
    "view": lambda m, x: x.view(x.shape[0], -1),
    "view of size()": lambda m, x: x.view(x.size(0), x.size(1), x.size()[2] * x.size(dim=3)),
    "reshape to a tuple": lambda m, x: x.reshape((x.shape[0], 2, 2, -1)),
    "shape unpacked": unpack_rest,
    "shape sliced": lambda m, x: x.reshape(*x.shape[:2], -1),
    "shape joined": lambda m, x: x.reshape(x.shape[:1] + x[0].flatten(1).shape),
    "expand": lambda m, x: x.mean((2, 3)) + m.offset.flatten().expand(x.shape[0], -1),
    "expand_as": lambda m, x: x + m.offset.expand_as(x),
    "repeat": lambda m, x: x + m.offset.repeat(x.shape[0], 1, 1, 1),
    "zeros": lambda m, x: x + torch.zeros(x.shape[0], 4, 1, 1),
    "ones of a shape": lambda m, x: x + torch.ones(x.shape) + torch.full((x.shape[0], 1, 1, 1), 2.0),
    "new_zeros": lambda m, x: torch.cat([x, x.new_zeros(x.shape[0], 1, 6, 6)], 1),
    "zeros_like": lambda m, x: x + torch.ones_like(x),
    "arange": lambda m, x: x + torch.arange(x.shape[0], device=x.device).view(-1, 1, 1, 1),
    "arange with keywords": lambda m, x: x + torch.arange(start=0, end=x.shape[0], step=1).view(-1, 1, 1, 1),
    "index by arange": lambda m, x: x[torch.arange(x.shape[0]), 0],
    "product": lambda m, x: x.reshape(x.shape[0] * x.shape[1], 6, 6),
    "product, reflected": lambda m, x: x.reshape(4 * x.shape[0], -1),
    "product of all": lambda m, x: x.reshape(math.prod(x.shape)),
    "sum": lambda m, x: torch.cat([x, x])[1 : x.shape[0] + 1],
    "sum, reflected": lambda m, x: torch.cat([x, x])[: 1 + x.shape[0]],
    "sum over all": lambda m, x: x * sum(x.shape),
    "difference": lambda m, x: torch.cat([x, x])[x.shape[0] - 1 :],
    "difference, reflected": lambda m, x: x.repeat(10, 1, 1, 1)[10 - x.shape[0] :],
    "quotient": lambda m, x: x.reshape(x.shape[0] * 4 // 2, -1),
    "remainder": lambda m, x: x + x.shape[0] % 2,
    "remainder, reflected": lambda m, x: x + 7 % x.shape[0],
    "B * tensor": lambda m, x: x.shape[0] * x + x * x.shape[0],
    "tensor / B": lambda m, x: x / x.shape[0],
    "numel": lambda m, x: x.reshape(x.numel() // 36, 36),
    "one image of the batch": lambda m, x: x[x.shape[0] - 1],
    "slice to half": lambda m, x: x[: (x.shape[0] + 1) // 2],
    "interpolate": lambda m, x: F.interpolate(x, size=[2 * s for s in x.shape[-2:]]),
    "negative": lambda m, x: torch.cat([x, x + 1])[-x.shape[0] :],
    "rounded up": lambda m, x: x[: -(-x.shape[0] // 2)],
    "power": lambda m, x: x * x.shape[0] ** 2,
    "half of the images": lambda m, x: x[: x.shape[0] // 2 + 1].flatten(1),
    "shape of half of the images": lambda m, x: (lambda y: y.view(y.shape[0], 4, 36))(x[: x.shape[0] // 2]),
    "window partition and merge": windows,
    "window mask of constants": window_mask,
    "attention": attention,
    "class token": with_token,
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_follow_the_batch(name):
    same_everywhere(Fn(SIZES[name]))


@pytest.mark.parametrize("name", ["view", "zeros", "arange", "product", "slice to half", "class token"])
def test_a_batch_size_is_a_node_and_no_number(name):
    """It is read in the graph, and what is read is used."""
    traced = same_everywhere(Fn(SIZES[name]))
    reads = [n for n in traced.graph.nodes if n.op == "call_method" and n.target == "size" and n.args[1] == 0]
    assert reads
    assert all(n.users for n in reads)


# ---- unpacking, loops ------------------------------------------------------------------------------------


def loop_over_channels(m, x):
    total = torch.zeros_like(x[:, 0])
    for channel in range(x.shape[1]):
        total = total + x[:, channel] * channel
    return total


def loop_over_layers(m, x):
    for index, layer in enumerate(m.layers):
        x = layer(x) * (len(m.layers) - index)
    return x


def unpack_split(m, x):
    a, b = x.split([1, 3], dim=1)
    c, d = x.split(3, 3)
    return a + b.sum(1, keepdim=True) + torch.cat([d, c], 3)


def unpack_topk(m, x):
    values, indices = x.flatten(1).topk(3, dim=1)
    return values + indices


UNPACKING = {
    "chunk": lambda m, x: (lambda a, b: a - b)(*x.chunk(2, 1)),
    "chunk of the batch": lambda m, x: x.repeat(2, 1, 1, 1).chunk(2)[1],
    "split": unpack_split,
    "unbind": lambda m, x: (lambda a, b, c, d: a * b + c * d)(*x.unbind(1)),
    "unbind, indexed": lambda m, x: x.unbind(1)[2],
    "topk": unpack_topk,
    "topk by name": lambda m, x: x.topk(2, dim=1).values + x.topk(2, dim=1).indices,
    "max": lambda m, x: x.max(1)[0] + torch.max(x, dim=1)[1],
    "max by name": lambda m, x: x.max(dim=1).values,
    "len of a dimension": lambda m, x: x * len(x[0]) + len(x.shape),
    "len of a result": lambda m, x: x[:, : len(x.chunk(2, 1))],
    "iteration": lambda m, x: sum(row * k for k, row in enumerate(x.transpose(0, 1))),
    "loop over channels": loop_over_channels,
    "loop over layers": loop_over_layers,
    "loop over a parameter": lambda m, x: sum(x * w for w in m.weight),
    "zip": lambda m, x: torch.stack([a * b for a, b in zip(x.unbind(1), m.weight.unbind(0), strict=True)]),
    "meshgrid": lambda m, x: x + torch.stack(torch.meshgrid(m.constant, m.constant, indexing="ij")).sum(),
}


@pytest.mark.parametrize("name", UNPACKING)
def test_results_unpack_and_dimensions_iterate(name):
    same_everywhere(Fn(UNPACKING[name]))


# ---- in place --------------------------------------------------------------------------------------------


def statement(operate):
    """``operate`` on ``y``, whose own value after that is what counts, with ``z``, which must not change."""

    def forward(m, x):
        y = m.conv(x)
        z = y * 1
        operate(m, y)
        return torch.cat([y, z, y + z], 1)

    return forward


def augmented(operator):
    def operate(m, y):
        before = y
        y = operator(y, m.offset.abs() + 0.5)
        assert y is before

    return statement(operate)


def assign_channel(m, y):
    y[:, 0] = m.constant[1]


def assign_channel_of_input(m, y):
    y[:, 1] = y[:, 0] + 1


def assign_masked(m, y):
    y[y > 0.3] = 0.25


def add_to_channel(m, y):
    y[:, 1:3] += 2


def assign_images(m, y):
    y[: y.shape[0] // 2 + 1] = 0


def in_alias(m, y):
    other = y
    other += 1


def shared_twice(m, x):
    a, b = m.conv(x), m.conv(-x)
    m.act(a)
    m.act(b)
    return a + 2 * b


def on_the_input(m, x):
    return x.sub_(0.5).div_(0.25) * 2


def added_to_the_input(m, x):
    x += 1
    return x * 2


def assigned_to_the_input(m, x):
    x[:, 0] = 3
    return x * 2


IN_PLACE = {
    "iadd": augmented(lambda y, v: y.__iadd__(v)),
    "isub": augmented(lambda y, v: y.__isub__(v)),
    "imul": augmented(lambda y, v: y.__imul__(v)),
    "itruediv": augmented(lambda y, v: y.__itruediv__(v)),
    "ifloordiv": augmented(lambda y, v: y.__ifloordiv__(v)),
    "imod": augmented(lambda y, v: y.__imod__(v)),
    "alias": statement(in_alias),
    "mul_": statement(lambda m, y: y.mul_(3)),
    "add_ with alpha": statement(lambda m, y: y.add_(m.offset, alpha=2)),
    "chained": statement(lambda m, y: y.mul_(3).add_(1).relu_()),
    "clamp_": statement(lambda m, y: y.clamp_(-0.2, 0.2)),
    "sigmoid_": statement(lambda m, y: y.sigmoid_()),
    "zero_": statement(lambda m, y: y.zero_()),
    "fill_": statement(lambda m, y: y.fill_(2)),
    "copy_": statement(lambda m, y: y.copy_(y.mean((2, 3), keepdim=True))),
    "masked_fill_": statement(lambda m, y: y.masked_fill_(y < 0, 7.0)),
    "x[:, 0] = v": statement(assign_channel),
    "x[:, 1] = f(x)": statement(assign_channel_of_input),
    "x[x > 0] = v": statement(assign_masked),
    "x[:, 1:3] += v": statement(add_to_channel),
    "x[:B] = v": statement(assign_images),
    "F.relu inplace": statement(lambda m, y: F.relu(y, inplace=True)),
    "F.relu positional": statement(lambda m, y: F.relu(y, True)),
    "F.relu by keyword": statement(lambda m, y: F.relu(input=y, inplace=True)),
    "F.silu inplace": statement(lambda m, y: F.silu(y, inplace=True)),
    "F.hardtanh inplace": statement(lambda m, y: F.hardtanh(y, 0.0, 6.0, inplace=True)),
    "nn.ReLU inplace": statement(lambda m, y: m.act(y)),
    "nn.ReLU inplace, called twice": shared_twice,
    "torch.relu_": statement(lambda m, y: torch.relu_(y)),
    "F.leaky_relu_": statement(lambda m, y: F.leaky_relu_(y, 0.1)),
    "F.hardtanh_": statement(lambda m, y: F.hardtanh_(y)),
    "F.elu_": statement(lambda m, y: F.elu_(y)),
    "on the input": on_the_input,
    "+= on the input": added_to_the_input,
    "x[:, 0] = v on the input": assigned_to_the_input,
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_what_happens_in_place_is_seen_by_all_that_read_later(name):
    same_everywhere(Fn(IN_PLACE[name]))


def test_no_operation_in_place_is_left_in_the_graph():
    """Nothing that a quantizer would stand before or behind is overwritten."""
    for name, function in IN_PLACE.items():
        traced = trace(Fn(function), (images(),))
        called = [n.target if isinstance(n.target, str) else n.target.__name__ for n in traced.graph.nodes]
        assert not any(c.endswith("_") or c in ("iadd", "isub", "imul", "setitem") for c in called), name
        assert not any(n.kwargs.get("inplace") for n in traced.graph.nodes)
        assert not any(m.inplace for m in traced.modules() if isinstance(m, nn.ReLU))


@pytest.mark.parametrize(
    "relu",
    [
        lambda y: F.relu(y, inplace=True),
        lambda y: F.relu(y, True),
        lambda y: y.relu_(),
        torch.relu_,
        nn.ReLU(inplace=True),
    ],
)
def test_a_quantized_model_keeps_what_a_relu_in_place_meant(relu):
    class Reused(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu = nn.Conv2d(4, 4, 3), relu

        def forward(self, x):
            y = self.conv(x)
            z = self.relu(y)
            return y + z  # twice the ReLU, because y was overwritten

    x = images(8)
    model = Reused()
    prepared = fq.prepare(model, [fq.Rule("*", 8, 8)], calibration=[x]).eval()
    with torch.no_grad():
        want, got = model(x), prepared(x)
    assert want.min() == 0
    assert (want - got).abs().max() < 0.05 * want.max()


# ---- parameters, buffers, queries, calls -----------------------------------------------------------------


def by_dtype(m, x):
    if x.is_floating_point() and x.dtype == torch.float32 and not x.is_cuda and x.device.type == "cpu":
        return x.to(m.weight.dtype) + torch.zeros(1, dtype=x.dtype, device=x.device)
    return -x


def by_buffer(m, x):
    for _ in range(int(m.count)):
        x = x + 1
    return x * m.count.item() if m.flag else -x


def by_shape(m, x):
    if x.shape[1] == 4 and x.ndim == 4 and x.shape[-1] % 2 == 0:
        x = x[..., ::2]
    return x if x.dim() == 3 else x.flatten(2)


REST = {
    "parameter": lambda m, x: x * m.weight + m.offset,
    "parameter, converted": lambda m, x: x * F.softplus(m.weight).to(x.dtype),
    "weights of a layer": lambda m, x: F.conv2d(x, m.conv.weight * 0.5, m.conv.bias),
    "buffer as an index": lambda m, x: x[:, m.index],
    "constant tensor": lambda m, x: x + m.constant.expand(x.shape[0], -1)[:, :, None, None],
    "new tensor": lambda m, x: x * torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device).view(1, -1, 1, 1),
    "buffers decide": by_buffer,
    "shapes decide": by_shape,
    "dtype and device": by_dtype,
    "type": lambda m, x: x.type(torch.float64),
    "type of another": lambda m, x: x.type(m.weight.dtype).type_as(m.offset),
    "T": lambda m, x: x.mean((2, 3)).T @ x.mean((2, 3)),
    "mT": lambda m, x: m.linear(x.mT),
    "keywords": lambda m, x: torch.mean(input=m.scale(x, power=2, shift=m.offset), dim=(2, 3), keepdim=True),
    "module by keyword": lambda m, x: m.conv(input=x),
    "a module twice": lambda m, x: m.scale(m.conv(m.scale(m.conv(x), power=3))),
    "einsum": lambda m, x: torch.einsum("bchw,cij->bhw", x, m.weight),
    "where": lambda m, x: torch.where(x > 0, x, m.weight),
    "None": lambda m, x: m.scale(x, shift=None)[:, None, ..., 0],
}


@pytest.mark.parametrize("name", REST)
def test_what_else_a_forward_does(name):
    same_everywhere(Fn(REST[name]))


def test_parameters_and_buffers_are_read_when_the_graph_runs():
    module = Fn(REST["parameter"])
    traced = same_everywhere(module)
    x = images()
    with torch.no_grad():
        module.weight.mul_(2)
        module.offset.add_(1)
    traced.load_state_dict({name: module.state_dict()[name] for name in traced.state_dict()})
    assert torch.equal(traced(x), module(x))
    traced(x).sum().backward()
    assert torch.allclose(traced.weight.grad, x.sum((0, 2, 3)).view(4, 1, 1), atol=1e-4)


@pytest.mark.parametrize("kept", ["argument", "arguments", "options"])
def test_arguments_that_the_example_does_not_give_keep_their_defaults(kept):
    class Optional(Fn):
        def forward(self, x, factor=3.0, mask=None):
            return x * factor if mask is None else mask

    class Arguments(Fn):
        def forward(self, x, *more):
            return self.conv(x, *more)

    class Options(Fn):
        def forward(self, x, **options):
            return self.conv(x, **options)

    same_everywhere({"argument": Optional, "arguments": Arguments, "options": Options}[kept](None))


def test_two_inputs():
    class Pair(nn.Module):
        def forward(self, x, y):
            return x.view(x.shape[0], -1) + y.view(y.size(0), -1)

    traced = trace(Pair(), (images(), images()))
    for count in BATCHES:
        x, y = images(count), images(count)
        assert torch.equal(traced(x, y), Pair()(x, y))


# ---- what depends on data --------------------------------------------------------------------------------


def python_branch(m, x):
    return x if x.mean() > 0 else -x


DEPENDENT = {
    "if": python_branch,
    "and": lambda m, x: x * 2 if x.ndim == 4 and (x > 9).any() else x,
    "while": lambda m, x: next(x * k for k in range(9) if (x * k).sum() < 1e9),
    "item": lambda m, x: x * x.max().item(),
    "int": lambda m, x: x[:, : 1 + int(x.max() > 99)],
    "float": lambda m, x: x * float(x.max()),
    "index": lambda m, x: x * [1, 2][(x.max() > 99).long()],
    "range": lambda m, x: sum(x * k for k in range(x.argmax() * 0 + 2)),
    "tolist": lambda m, x: x * x.mean((0, 2, 3)).tolist()[0],
    "in": lambda m, x: x if 7.0 in x else -x,
    "buffer and input": lambda m, x: x if (m.offset + x).sum() > 0 else -x,
    "numpy": lambda m, x: x * float(x.detach().numpy().max()),
    "torch.equal": lambda m, x: x if torch.equal(x, x.abs()) else -x,
    "torch.allclose": lambda m, x: x if torch.allclose(x, x.abs()) else -x,
    "torch.is_nonzero": lambda m, x: x if torch.is_nonzero((x.sum() > 1e9).long()) else -x,
    "x.equal": lambda m, x: x if x.equal(x.abs()) else -x,
}


@pytest.mark.parametrize("name", DEPENDENT)
def test_a_value_that_decides_is_an_error_of_capture(name):
    with pytest.raises(DataDependent):
        Capture(((images(2),), (images(3),))).trace(Fn(DEPENDENT[name]).eval())


@pytest.mark.parametrize("name", DEPENDENT)
def test_a_submodule_whose_values_decide_stays_one_call(name):
    inner = Fn(DEPENDENT[name])
    model = nn.Sequential(nn.Conv2d(4, 4, 1), inner, nn.Tanh()).eval()
    traced = trace(model, (images(),))
    assert list(traced.meta[OPAQUE]) == ["1"]
    assert f"at {__file__}:" in traced.meta[OPAQUE]["1"]
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0", "1", "2"]
    with torch.no_grad():
        for x in (images(1), images(5), images(5).abs(), images(5) - 9):
            assert torch.equal(traced(x), model(x))


def test_only_the_innermost_submodule_becomes_opaque():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.inner = nn.Conv2d(4, 4, 1), Fn(python_branch)

        def forward(self, x):
            return self.inner(self.conv(x)) + self.inner(x)

    traced = trace(nn.Sequential(Outer(), Outer()), (images(),))
    assert list(traced.meta[OPAQUE]) == ["0.inner", "1.inner"]
    called = [n.target for n in traced.graph.nodes if n.op == "call_module"]
    assert called == ["0.conv", "0.inner", "0.inner", "1.conv", "1.inner", "1.inner"]


def alias_of_a_view(m, x):
    y = m.conv(x)
    y[:, 0].add_(1)
    return y


REFUSED = {
    "a loop over the images": lambda m, x: torch.stack([image * 2 for image in x]),
    "a range over the images": lambda m, x: torch.stack([x[k] for k in range(x.shape[0])]),
    "len of the batch": lambda m, x: x.view(len(x), 4, 36),
    "a float of the batch": lambda m, x: x * (1 / x.shape[0]),
    "int of a float of the batch": lambda m, x: x.reshape(int(x.shape[0] * x.shape[1] / 2), -1),
    "random numbers": lambda m, x: x + torch.rand(x.shape[0], 1, 1, 1),
    "in place on a view": alias_of_a_view,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_graph_cannot_say_is_refused_and_not_miscaptured(name):
    with pytest.raises(TraceError):
        trace(Fn(REFUSED[name]), (images(),))


# ---- what is left as it was ------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> tuple:
    modules = [(name, type(m), sorted(vars(m)), m.training, getattr(m, "inplace", None)) for name, m in
               model.named_modules()]  # fmt: skip
    return repr(model), modules, [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def rewritten() -> nn.Module:
    """What passes try on random numbers."""
    conv = timm.layers.Conv2dSame(3, 4, 3, stride=2)
    return nn.Sequential(conv, nn.ReLU(True), nn.Flatten(), timm.layers.Linear(256, 3))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", [TinyResidual, TinyMobile, rewritten])
@pytest.mark.parametrize("work", ["trace", "lsq", "nipq"])
def test_the_module_the_examples_and_the_random_numbers_stay_as_they_are(build, training, work):
    x = torch.randn(4, 3, 16, 16)
    model = settle(build(), x).train(training)
    state, before, data = copy.deepcopy(model.state_dict()), snapshot(model), x.clone()
    identities = [id(t) for t in (*model.parameters(), *model.buffers())]
    numbers = torch.get_rng_state()
    if work == "trace":
        trace(model, (x,))
    else:
        fq.prepare(model, [fq.Rule("*", 4, 4, work)], calibration=[x])
    assert torch.equal(torch.get_rng_state(), numbers)
    assert torch.equal(x, data)
    assert snapshot(model) == before
    assert [id(t) for t in (*model.parameters(), *model.buffers())] == identities
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["on the input", "+= on the input", "x[:, 0] = v on the input"])
def test_an_input_that_the_module_overwrites_is_left_alone_by_capture_and_graph(name):
    x = images()
    before = x.clone()
    traced = trace(Fn(IN_PLACE[name]), (x,))
    assert torch.equal(x, before)
    traced(x)
    assert torch.equal(x, before)
