"""Rewrites: the same numbers, the same names, the user's model untouched; and each does what it is there for."""

from __future__ import annotations

import copy
import math
import operator
import re

import pytest
import timm.layers
import torch
from torch import fx, nn
from torch.nn import functional as F

import fxquant
from fxquant import canonical
from fxquant.capture import Capture
from fxquant.layers import QATLayer
from fxquant.trace import trace


def images(size: tuple[int, int] = (9, 10)) -> torch.Tensor:
    return 4 * torch.randn(2, 3, *size)


class Fn(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(input=self.bn(input=self.conv(input=x)))


def randomised(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """No parameter or statistic as it was initialised."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    model.train()
    with torch.no_grad():
        for _ in range(5):
            model(x)
    return model.eval()


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers by name."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def captured(model: nn.Module, x: torch.Tensor) -> fx.GraphModule:
    """The bare capture, before the passes on the graph."""
    root = copy.deepcopy(model).eval()
    tracer = Capture(((x,), (torch.cat([x, x[:1]]),)), is_leaf=canonical.is_leaf)
    return fx.GraphModule(root, tracer.trace(root))


def after(rewrite, model: nn.Module, x: torch.Tensor) -> nn.Module:
    """``rewrite`` alone on a copy of ``model``; checks what holds for every pass."""
    model.eval()
    text, state = repr(model), {name: t.clone() for name, t in state_of(model).items()}
    with torch.no_grad():
        want = model(x)
    out = copy.deepcopy(model) if rewrite in canonical.MODULE_PASSES else captured(model, x)
    names = set(state_of(out))
    rewrite(out)
    if isinstance(out, fx.GraphModule):
        out.graph.lint()
        out.recompile()
    with torch.no_grad():
        assert (out.eval()(x) - want).abs().max() <= 1e-5 * want.abs().max()
    kept = state_of(out)
    assert set(kept) == names
    assert not any(t.is_meta for t in kept.values())
    assert repr(model) == text
    assert all(torch.equal(t, state[name]) for name, t in state_of(model).items())
    return out


def calls(graph: fx.GraphModule) -> list:
    """What the graph calls: types of modules, functions, names of methods."""
    return [
        type(graph.get_submodule(n.target)) if n.op == "call_module" else n.target
        for n in graph.graph.nodes
        if n.op.startswith("call")
    ]


def block(norm: nn.Module, channels: int = 4) -> nn.Module:
    return randomised(nn.Sequential(nn.Conv2d(3, channels, 3, bias=False), norm), images())


EXAMPLES = {
    canonical.open_fused_attention: lambda: nn.Sequential(nn.Flatten(2), timm.layers.Attention(90, 3)),
    canonical.name_arithmetic_alike: lambda: Fn(lambda x: torch.add(x, x.mul(x.relu()))),
    canonical.positional_input: lambda: ByKeyword(),
    canonical.split_batch_norm_act: lambda: block(timm.layers.BatchNormAct2d(4)),
    canonical.keep_batch_statistics: lambda: block(nn.BatchNorm2d(4, track_running_stats=False)),
    canonical.name_dropout: lambda: Fn(lambda x: F.dropout(x * 2, 0.5, False)),
    canonical.remove_identities: lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.ReLU(), nn.Dropout(0.0)),
    canonical.name_layers: lambda: nn.Sequential(nn.Flatten(), timm.layers.Linear(270, 4)),
    canonical.number_padding: lambda: nn.Sequential(nn.Conv2d(3, 4, 4, padding="same"), nn.ReLU()),
    canonical.fold_padding: lambda: nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(3, 4, 3)),
    canonical.name_relu6: lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardtanh(0, 6)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's, of the model itself
@pytest.mark.parametrize("rewrite", [*canonical.MODULE_PASSES, *canonical.GRAPH_PASSES], ids=lambda r: r.__name__)
def test_every_pass_keeps_numbers_names_and_the_model(rewrite):
    """And does something: an example of what it is for is not what it was."""
    model = EXAMPLES[rewrite]()
    out = after(rewrite, model, images())
    if rewrite is canonical.positional_input:
        assert not any(node.kwargs for node in out.graph.nodes)
    elif isinstance(out, fx.GraphModule):
        assert calls(out) != calls(captured(model, images()))
    else:
        before, now = ([(type(m), vars(m).get("fused_attn")) for m in n.modules()] for n in (model, out))
        assert before != now


# ---- on modules ------------------------------------------------------------------------------------------


def test_fused_attention_is_opened():
    model, x = timm.layers.Attention(12, 3), torch.randn(2, 5, 12)
    model.fused_attn = True
    assert not after(canonical.open_fused_attention, model, x).fused_attn
    assert model.fused_attn
    targets = calls(trace(model, (x,)))
    assert F.scaled_dot_product_attention not in targets
    assert targets.count(operator.matmul) == 2
    assert "softmax" in targets


# ---- spelling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "target"),
    [
        (lambda x: x.add(x * 2), operator.add),
        (lambda x: torch.add(x, x * 2), operator.add),
        (lambda x: x * 2 + x, operator.add),
        (lambda x: x.mul(x * 2), operator.mul),
        (lambda x: torch.mul(x, x * 2), operator.mul),
        (lambda x: torch.relu(x * 2), F.relu),
        (lambda x: (x * 2).relu(), F.relu),
        (lambda x: (x * 2).relu_(), F.relu),
        (lambda x: F.relu(x * 2, inplace=True), F.relu),
        (lambda x: torch.add(x * 2, x, alpha=3), torch.add),  # not what + says
        (lambda x: (x * 2).add(x, alpha=3), "add"),
    ],
)
def test_arithmetic_is_spelled_alike(function, target):
    assert calls(after(canonical.name_arithmetic_alike, Fn(function), images())) == [operator.mul, target]


RELU6 = {
    "F.relu6": F.relu6,
    "F.relu6 in place": lambda x: F.relu6(x, inplace=True),
    "F.hardtanh": lambda x: F.hardtanh(x, 0, 6),
    "F.hardtanh of floats": lambda x: F.hardtanh(x, 0.0, 6.0),
    "F.hardtanh by keyword": lambda x: F.hardtanh(x, min_val=0.0, max_val=6.0, inplace=True),
    "nn.ReLU6": nn.ReLU6(),
    "nn.ReLU6 in place": nn.ReLU6(inplace=True),
    "nn.Hardtanh": nn.Hardtanh(0, 6),
    "nn.Hardtanh in place": nn.Hardtanh(0.0, 6.0, inplace=True),
}
OTHERS = {
    "F.hardtanh(x)": F.hardtanh,
    "F.hardtanh(x, -6, 6)": lambda x: F.hardtanh(x, -6, 6),
    "F.hardtanh(x, 0, 1)": lambda x: F.hardtanh(x, 0.0, 1.0),
    "nn.Hardtanh()": nn.Hardtanh(),
    "nn.Hardtanh(0, 5)": nn.Hardtanh(0, 5),
}


@pytest.mark.parametrize("name", [*RELU6, *OTHERS])
def test_relu6_is_named_in_every_spelling_and_nothing_else_is(name):
    x, activation = images(), (RELU6 | OTHERS)[name]
    out = after(canonical.name_relu6, nn.Sequential(Fn(lambda x: x * 2), Fn(activation)), x)
    assert x.max() > 3  # so that the ceiling is met
    assert len(calls(out)) == 2
    assert (calls(out)[1] is nn.ReLU6) is (name in RELU6)


def test_several_relu6_get_names_of_their_own():
    out = after(canonical.name_relu6, Fn(lambda x: F.relu6(F.relu6(x) - F.relu6(-x))), images())
    targets = [n.target for n in out.graph.nodes if n.op == "call_module"]
    assert len(set(targets)) == 3


# ---- identities ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "gone"),
    [
        (nn.Identity(), True),
        (nn.Dropout(0.0), True),
        (nn.Dropout(0.3), False),
        (nn.Dropout2d(0.0), True),
        (nn.Dropout2d(0.3), False),
        (nn.ReLU(), False),
    ],
)
def test_only_what_does_nothing_is_removed(module, gone):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), module, nn.Tanh(), module)
    out = after(canonical.remove_identities, model, images())
    assert calls(out) == ([nn.Conv2d, nn.Tanh] if gone else [nn.Conv2d, type(module), nn.Tanh, type(module)])


def test_an_identity_called_by_keyword_or_with_the_input_is_removed_too():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.none, self.conv = nn.Identity(), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.none(input=self.conv(self.none(x)))

    assert calls(after(canonical.remove_identities, Model(), images())) == [nn.Conv2d]


# ---- BatchNorm with an activation ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [nn.ReLU]),
        ({"act_layer": nn.SiLU}, [nn.SiLU]),
        ({"apply_act": False}, []),
        ({"drop_layer": nn.Dropout}, [nn.Dropout, nn.ReLU]),
        ({"affine": False}, [nn.ReLU]),
        ({"track_running_stats": False}, [nn.ReLU]),
        ({"eps": 0.3, "momentum": 0.7}, [nn.ReLU]),
    ],
)
def test_batch_norm_act_is_split(arguments, expected):
    norm = timm.layers.BatchNormAct2d(4, **arguments)
    out = after(canonical.split_batch_norm_act, block(norm), images())
    assert calls(out) == [nn.Conv2d, nn.BatchNorm2d, *expected]
    plain = out.get_submodule("1")
    assert (plain.eps, plain.momentum, plain.affine) == (norm.eps, norm.momentum, norm.affine)
    assert plain.track_running_stats == norm.track_running_stats
    assert not any(getattr(m, "inplace", False) for m in out.modules())


@pytest.mark.parametrize("act", [F.relu, "relu"])
def test_a_batch_norm_whose_activation_is_no_module_stays_one_call(act):
    class Activated(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.act = act

        def forward(self, x):
            return getattr(F, act)(super().forward(x)) if isinstance(act, str) else self.act(super().forward(x))

    out = after(canonical.split_batch_norm_act, block(Activated(4)), images())
    assert calls(out) == [nn.Conv2d, Activated]


def test_an_activation_with_parameters_keeps_its_name_also_where_the_batch_norm_is_fused():
    model = block(timm.layers.BatchNormAct2d(4, act_layer=nn.PReLU))
    nn.init.constant_(model[1].act.weight, 0.1)
    x = images()
    traced = trace(model, (x,))
    assert set(state_of(traced)) == set(state_of(model))
    assert torch.allclose(traced(x), model(x), rtol=1e-5, atol=1e-5)
    prepared = fxquant.prepare(nn.Sequential(model, nn.Flatten()), [fxquant.Rule("*", 8, 8)], calibration=[x])
    assert torch.equal(prepared.get_parameter("0.1.act.weight"), model[1].act.weight)
    named = [name for name, _ in prepared.named_parameters(remove_duplicate=False) if name.endswith("act.weight")]
    assert named == ["0.1.act.weight"]


@pytest.mark.parametrize("zero", [False, True])
def test_a_split_batch_norm_follows_the_mode_and_updates_its_statistics(zero):
    model = block(timm.layers.BatchNormAct2d(4, momentum=0.3)).train()
    if zero:
        nn.init.zeros_(model[1].weight)
    traced = trace(model, (images(),))
    for training in (True, True, False):
        x = images()
        want, got = model.train(training)(x), traced.train(training)(x)
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(traced.get_buffer(f"1.{name}"), model.get_buffer(f"1.{name}")), name
    assert int(traced.get_buffer("1.num_batches_tracked")) == 7
    if zero:
        assert torch.equal(got.amax((0, 2, 3)), model[1].bias.clamp(min=0))


def test_a_batch_norm_act_that_is_called_twice_acts_twice():
    norm = timm.layers.BatchNormAct2d(3)
    model = randomised(nn.Sequential(norm, nn.Conv2d(3, 3, 1), norm), images())
    out = after(canonical.split_batch_norm_act, model, images())
    assert calls(out) == [nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.BatchNorm2d, nn.ReLU]


# ---- layers that are called as functions -----------------------------------------------------------------


class NamedLinear(nn.Linear):
    pass


class NamedConv(nn.Conv2d):
    pass


class CosineLinear(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.weight))


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Twofold(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) - super().forward(x.flip(-1))


class Squared(nn.Conv2d):
    def forward(self, x):
        return super().forward(x * x)


class Dynamic(nn.Conv2d):
    """Its weight depends on its input."""

    def forward(self, x):
        return F.conv2d(x, self.weight * (1 + x.std()), self.bias)


class TwoStrides(nn.Conv2d):
    """One weight, two geometries: no one layer is both."""

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, 2).mean((2, 3)) + F.conv2d(x, self.weight, self.bias).mean((2, 3))


class TwoFormulas(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight * 2) - F.conv2d(x, self.weight.abs())


class Half(nn.Conv2d):
    """Uses a part of its weight."""

    def forward(self, x):
        return F.conv2d(x, self.weight[:2])


class Composed(nn.Module):
    """Query, key and value from one weight, with a bias put together at every call, as in BEiT."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(10, 30, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.randn(10)) for _ in range(2))

    def forward(self, x):
        return F.linear(x, self.qkv.weight, torch.cat([self.q_bias, torch.zeros(10), self.v_bias]))


class ComposedConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 4, 3, bias=False), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return F.conv2d(x, weight=self.conv.weight, bias=self.scale * 2, stride=(1, 2))


class OwnBiasTwice(nn.Conv2d):
    """Something else reads its bias under its name."""

    def forward(self, x):
        return F.conv2d(x, self.weight) * self.bias.mean()


class Foreign(nn.Module):
    """Neither Conv2d nor Linear, with their parameters."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3, 2, 2)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return torch.conv2d(x, self.weight, self.bias, padding=1)


COMPUTED_CONV, COMPUTED_LINEAR = canonical.ComputedConv2d, canonical.ComputedLinear


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: timm.layers.Linear(10, 4), [nn.Linear]),
        (lambda: NamedLinear(10, 4, bias=False), [nn.Linear]),
        (lambda: CosineLinear(10, 4), [F.normalize, COMPUTED_LINEAR]),
        (lambda: NamedConv(3, 4, 3, stride=2, padding=(1, 0), dilation=2, bias=False), [nn.Conv2d]),
        (lambda: Doubled(3, 4, 3), [nn.Conv2d, operator.mul]),
        (lambda: Twofold(3, 4, 3), [nn.Conv2d, "flip", nn.Conv2d, operator.sub]),
        (lambda: Squared(3, 4, 3), [operator.mul, nn.Conv2d]),
        (lambda: Dynamic(3, 4, 3), ["std", operator.add, operator.mul, F.conv2d]),
        (lambda: TwoStrides(3, 4, 3), [F.conv2d, "mean", F.conv2d, "mean", operator.add]),
        (lambda: TwoFormulas(3, 4, 3), [operator.mul, F.conv2d, "abs", F.conv2d, operator.sub]),
        (lambda: Half(3, 4, 3), [operator.getitem, F.conv2d]),
        (Composed, [torch.cat, nn.Linear, operator.add]),
        (ComposedConv, [operator.mul, nn.Conv2d, "reshape", operator.add]),
        (lambda: OwnBiasTwice(3, 4, 3), [F.conv2d, "mean", operator.mul]),
        (Foreign, [nn.Conv2d]),
        (lambda: timm.layers.StdConv2d(3, 4, 3, bias=True), [COMPUTED_CONV]),
        (lambda: timm.layers.StdConv2dSame(3, 4, 3, stride=2), [F.pad, COMPUTED_CONV]),
        (lambda: timm.layers.ScaledStdConv2d(3, 4, 3, groups=1), [COMPUTED_CONV]),
        (lambda: timm.layers.ScaledStdConv2dSame(3, 4, 3, stride=2), [F.pad, COMPUTED_CONV]),
        (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), [F.pad, nn.Conv2d]),
        (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), [F.pad, nn.Conv2d]),
    ],
)
def test_functions_become_layers_under_the_name_of_their_weight(make, expected):
    """All names are kept, those of computed weights included; what depends on the input stays a function."""
    model = randomised(nn.Sequential(make()), images())
    out = after(canonical.name_layers, model, images())
    assert calls(out) == expected
    traced, x = trace(model, (images(),)), images()
    with torch.no_grad():
        assert torch.allclose(traced(x), model(x), rtol=1e-5, atol=1e-5)


class Shared(nn.Module):
    """A layer of its own kind called twice, activated in between."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(3, 5)

    def forward(self, x):
        return self.head(F.relu(self.layer(F.relu(self.layer(x)))).mean((2, 3)))


class TwoBiases(nn.Module):
    """One weight with its own bias, with another, and with none."""

    def __init__(self):
        super().__init__()
        self.conv, self.other, self.head = nn.Conv2d(3, 4, 3), nn.Parameter(torch.randn(4)), nn.Linear(4, 5)

    def forward(self, x):
        weight = self.conv.weight
        out = F.relu(F.conv2d(x, weight, self.other)) + F.conv2d(x, weight) + F.conv2d(x, weight, self.conv.bias)
        return self.head(out.mean((2, 3)))


class NameClash(nn.Module):
    """A function call whose node is named as a layer is."""

    def __init__(self):
        super().__init__()
        self.kernel, self.conv2d, self.fc = nn.Parameter(torch.randn(3, 3, 1, 1)), nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(F.relu(self.conv2d(F.conv2d(x, self.kernel))).mean((2, 3)))


class OwnWeightRead(nn.Module):
    """A parameter of a layer that is also read by name."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv, self.fc = nn.LayerNorm(10), nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.conv(x * self.norm.weight + self.norm(x)).mean((2, 3)) + self.fc.weight.sum())


class InputBias(nn.Module):
    """A bias that depends on the input."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, bias=False), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(F.conv2d(x, self.conv.weight, x.mean().expand(4)).mean((2, 3)))


class Gated(timm.layers.StdConv2d):
    """A name in the formula that layers use themselves."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.relu = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return F.conv2d(x, self.weight * self.relu, self.bias, padding=1)


@pytest.mark.filterwarnings("ignore:kept in float")
@pytest.mark.parametrize(
    ("model", "layers", "reason"),
    [
        (lambda: Shared(timm.layers.StdConv2d(3, 3, 3, padding=1)), {"layer", "head"}, None),
        (lambda: Shared(timm.layers.ScaledStdConv2d(3, 3, 3, padding=1)), {"layer", "head"}, None),
        (lambda: Shared(NamedConv(3, 3, 3, padding=1)), {"layer", "head"}, None),
        (TwoBiases, {"head"}, "its weight is used with two geometries, biases or formulas"),
        (NameClash, {"conv2d", "fc"}, "its weight is not made of the parameters of one submodule"),
        (OwnWeightRead, {"conv", "fc"}, None),
        (InputBias, {"conv", "fc"}, None),
        (lambda: Shared(Gated(3, 3, 3)), {"head"}, r"\['relu'\], which are names that layers use themselves"),
        (lambda: nn.Sequential(Dynamic(3, 3, 3), nn.Conv2d(3, 2, 1), nn.Flatten()), {"1"}, "computed from the input"),
        (
            lambda: nn.Sequential(Half(3, 4, 3, bias=False), nn.Conv2d(2, 2, 1), nn.Flatten()),
            {"1"},
            "another shape than 0.weight",
        ),
        (lambda: nn.Sequential(OwnBiasTwice(3, 3, 1), nn.Conv2d(3, 2, 1), nn.Flatten()), {"1"}, "'0.bias' is read by"),
    ],
)
def test_all_calls_of_a_weight_become_one_layer_or_it_is_said_why_not(model, layers, reason):
    """And what comes out of prepare, freeze and convert is exact, with every parameter in its place."""
    model, x = randomised(model(), images()), images()
    prepared = fxquant.prepare(model, [fxquant.Rule("*", 4, 4)], calibration=[x])
    assert {n for n, m in prepared.named_modules() if isinstance(m, QATLayer)} == layers
    reasons = " ".join(prepared.meta["fxquant"].opaque.values())
    assert (reason is None and not reasons) or re.search(reason, reasons)
    assert {n for n, _ in model.named_parameters()} <= {n for n, _ in prepared.named_parameters()}
    prepared.train()(x).square().mean().backward()
    trained = [p for p in prepared.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    fxquant.freeze(prepared)
    assert fxquant.verify(prepared, fxquant.convert(prepared), [x]).reference_equals_fake_quant


@pytest.mark.parametrize("kind", ["StdConv2d", "ScaledStdConv2d"])
def test_a_computed_weight_goes_on_being_computed_and_trained(kind):
    """The same gradients reach the same parameters, and a step changes the weight that is used."""
    model = randomised(nn.Sequential(getattr(timm.layers, kind)(3, 4, 3, bias=True)), images())
    traced, x = trace(model, (images(),)), images()
    assert list(traced.state_dict()) == list(model.state_dict())
    for step in range(2):
        for network in (model, traced):
            network.zero_grad()
            network(x).square().sum().backward()
        for name, parameter in model.named_parameters():
            other = traced.get_parameter(name)
            assert parameter.grad.abs().max() > 0
            assert torch.allclose(other.grad, parameter.grad, rtol=1e-4, atol=1e-4), (step, name)
            with torch.no_grad():
                parameter -= 0.01 * parameter.grad
                other.copy_(parameter)
    assert torch.allclose(traced(x), model(x), rtol=1e-5, atol=1e-5)


# ---- padding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (9, 9), (8, 9), (11, 6)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("groups", [1, 3])
def test_tensorflows_padding_becomes_a_number_or_a_pad(size, stride, kernel, groups):
    model = nn.Sequential(timm.layers.Conv2dSame(3, 6, kernel, stride=stride, groups=groups))
    out = trace(model, (images(size),))
    total = [max((math.ceil(s / stride) - 1) * stride + kernel - s, 0) for s in size]
    lopsided = any(t % 2 for t in total)
    assert calls(out) == ([F.pad, nn.Conv2d] if lopsided else [nn.Conv2d])
    conv = out.get_submodule("0")
    assert conv.padding == ((0, 0) if lopsided else (total[0] // 2, total[1] // 2))
    assert torch.equal(conv.weight, model[0].weight)
    if lopsided:
        (pad,) = [n for n in out.graph.nodes if n.target is F.pad]
        assert list(pad.args[1]) == [total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2]


@pytest.mark.parametrize("size", [(16, 16), (17, 17)])
def test_a_convolution_called_on_two_sizes_computes_the_same_on_both(size):
    """16 -> 8 pads one side at each call; 17 -> 9 pads both sides at each."""
    same = timm.layers.Conv2dSame(3, 3, 3, stride=2)
    other = nn.Sequential(same, nn.Conv2d(3, 3, 2), same)  # 16 -> 8 -> 7 -> 4: another padding each
    for model in (nn.Sequential(same, nn.ReLU(), same), other):
        assert F.conv2d not in calls(trace(model.eval(), (images(size),)))  # which checks against the model, too


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's, of the model itself
@pytest.mark.parametrize(
    ("arguments", "lopsided"),
    [
        ({"kernel_size": 3, "padding": "same"}, None),
        ({"kernel_size": 4, "padding": "same"}, True),
        ({"kernel_size": (1, 4), "padding": "same"}, True),
        ({"kernel_size": 4, "padding": "same", "dilation": 2}, False),
        ({"kernel_size": 3, "padding": "same", "groups": 3}, False),
        ({"kernel_size": 3, "padding": "valid", "stride": 2}, None),
    ],
)
def test_padding_by_name_becomes_a_number_or_a_pad(arguments, lopsided):
    model = nn.Sequential(nn.Conv2d(3, 6, **arguments))
    assert not isinstance(after(canonical.number_padding, model, images()).get_submodule("0").padding, str)
    traced = trace(model, (images(),))
    assert calls(traced) == ([F.pad, nn.Conv2d] if lopsided else [nn.Conv2d])


@pytest.mark.parametrize(
    ("pad", "folded"),
    [
        (nn.ZeroPad2d(2), (3, 3)),
        (nn.ZeroPad2d((2, 2, 0, 0)), (1, 3)),
        (nn.ZeroPad2d((2, 1, 0, 0)), None),
        (Fn(lambda x: F.pad(x, (1, 1))), (1, 2)),
        (Fn(lambda x: F.pad(x, (1, 1, 2, 2), "constant", 0.0)), (3, 2)),
        (Fn(lambda x: F.pad(x, (1, 1, 2, 2), value=None)), (3, 2)),
        (Fn(lambda x: F.pad(x, (1, 1, 2, 2), value=1.0)), None),
        (Fn(lambda x: F.pad(x, (1, 1, 2, 2), mode="reflect")), None),
        (Fn(lambda x: F.pad(x, (-1, -1, 2, 2))), None),
        (Fn(lambda x: F.pad(x, (0, 0, 0, 0))), (1, 1)),
        (nn.ReflectionPad2d(1), None),
    ],
)
def test_even_zero_padding_goes_into_the_convolution(pad, folded):
    out = after(canonical.fold_padding, nn.Sequential(pad, nn.Conv2d(3, 4, 3, padding=1)), images())
    assert len(calls(out)) == (1 if folded else 2)
    assert out.get_submodule("1").padding == (folded or (1, 1))


def test_padding_stays_where_the_convolution_is_also_called_without():
    conv = nn.Conv2d(3, 3, 3)
    model = nn.Sequential(nn.ZeroPad2d(2), conv, conv)
    assert len(calls(after(canonical.fold_padding, model, images()))) == 3


# ---- all of them together --------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Something for every pass."""

    def __init__(self):
        super().__init__()
        self.stem = timm.layers.Conv2dSame(3, 8, 3, stride=2, bias=False)
        self.bn = timm.layers.BatchNormAct2d(8, act_layer=nn.SiLU)
        self.drop = nn.Identity()
        self.conv = nn.Conv2d(8, 8, 5, padding="same")
        self.norm = nn.BatchNorm2d(8)
        self.attention = timm.layers.Attention(8, 2)
        self.head = timm.layers.Linear(8, 5)

    def forward(self, x):
        x = self.drop(self.bn(self.stem(x)))
        x = x.add(F.relu6(self.norm(self.conv(x)), inplace=True))
        x = torch.relu(self.attention(x.flatten(2).transpose(1, 2)))
        return self.head(x.mean(1))


@pytest.mark.parametrize("training", [True, False])
def test_all_passes_together_keep_numbers_and_names(training):
    x = images((10, 10))
    model = randomised(Mixed(), x).train(training)
    text, state = repr(model), {name: t.clone() for name, t in model.state_dict().items()}
    traced = trace(model, (x,))
    assert list(traced.state_dict()) == list(state)
    assert repr(model) == text
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    for count in (1, 4):
        y = 4 * torch.randn(count, 3, 10, 10)
        with torch.no_grad():
            want, got = model.eval()(y), traced.eval()(y)
        assert (want - got).abs().max() <= 1e-5 * want.abs().max()
    kinds = set(calls(traced))
    assert {nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.ReLU6, F.relu, F.pad} <= kinds
    assert not kinds & {timm.layers.Conv2dSame, timm.layers.BatchNormAct2d, timm.layers.Linear, nn.Identity}
    assert not kinds & {"add", torch.relu, F.relu6, F.scaled_dot_product_attention}


def test_running_all_passes_again_changes_nothing():
    traced = trace(randomised(Mixed(), images((10, 10))), (images((10, 10)),))
    before = [(n.op, str(n.target)) for n in traced.graph.nodes]
    for rewrite in (*canonical.MODULE_PASSES, *canonical.GRAPH_PASSES):
        rewrite(traced)
    assert before == [(n.op, str(n.target)) for n in traced.graph.nodes]
