"""timm's kinds of network through every stage, BatchNorm and ReLU6 in their layers, edges where sums are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import fxquant as fq
import fxquant.timm
from fxquant.layers import QATConv2d, QATLayer
from fxquant.lower import native
from fxquant.lower.kernels import OnednnLayer
from fxquant.lower.native import REFERENCE, Recorder
from fxquant.qconfig import EdgeFakeQuantize
from fxquant.trace import trace
from tests.models import settle

W4A4 = (fq.Rule("first|last", 8, 8), fq.Rule("*", 4, 4))
X86 = pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="this torch has no x86 engine")

# One of a kind, with the size of its images.
MODELS = {
    "test_resnet": 96,  # BatchNorm, max pooling, residual sums
    "test_byobnet": 96,  # BatchNormAct2d, squeeze and excitation, several kinds of block
    "test_efficientnet": 96,  # depthwise convolutions, SiLU
    "test_nfnet": 96,  # standardised weights, no normalisation
    "test_convnext": 96,  # LayerNorm, GELU, Linear on maps
    "test_mambaout": 96,  # channels last, gates made by split
    "test_vit": 160,  # attention, class token, position parameters
    "test_vit_relpos": 160,  # relative positions from an MLP
    "test_coatnet": 160,  # convolutions and attention on maps
}


def trained_looking(name: str, images: torch.Tensor) -> nn.Module:
    """A random network none of whose branches is switched off, as zero initialisations do."""
    model = fxquant.timm.create_model(name, num_classes=10, pretrained=False)
    for parameter in model.parameters():
        if parameter.numel() > 1 and parameter.min() == parameter.max():
            nn.init.normal_(parameter, 0.5, 0.2)
        elif parameter.numel() == 1:
            nn.init.constant_(parameter, 0.5)
    return settle(model, images)


def batch_norms_behind(graph: fx.GraphModule) -> list[str]:
    """BatchNorm2d modules whose input is the result of a convolution that nothing else reads."""
    modules = dict(graph.named_modules())
    found = []
    for node in graph.graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], nn.BatchNorm2d):
            producer = node.args[0]
            convolution = producer.op == "call_module" and isinstance(modules[producer.target], nn.Conv2d)
            if convolution and len(producer.users) == 1:
                found.append(node.target)
    return found


def recorded(graph: fx.GraphModule, x: torch.Tensor) -> dict[str, torch.Tensor]:
    recorder = Recorder(graph)
    with torch.no_grad():
        recorder.run(x)
    return recorder.values


def edges(model: fx.GraphModule) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, EdgeFakeQuantize)}


@X86
@pytest.mark.parametrize("name", MODELS)
def test_a_timm_model_goes_through_every_stage(name, with_vnni):
    x = torch.randn(4, 3, MODELS[name], MODELS[name])
    model = trained_looking(name, x)
    layers = [n for n, m in trace(model, (x,)).named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    prepared = fq.prepare(model, W4A4, calibration=[x]).train()
    assert prepared.meta["fxquant"].opaque == {}
    quantized = {n: m for n, m in prepared.named_modules() if isinstance(m, QATLayer)}
    assert sorted(quantized) == sorted(layers)
    widths = [m.weight_fake_quant.whole_bits for m in quantized.values()]
    assert sorted(widths) == [4] * (len(widths) - 2) + [8, 8]

    optimizer = torch.optim.SGD(prepared.parameters(), 1e-3)
    loss = F.cross_entropy(prepared(x), torch.arange(4))
    loss.backward()
    assert loss.isfinite()
    missing = [n for n, p in prepared.named_parameters() if p.requires_grad and p.grad is None]
    infinite = [n for n, p in prepared.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    assert (missing, infinite) == ([], [])
    optimizer.step()

    fq.freeze(prepared)
    reference = fq.convert(prepared)
    new = torch.randn(3, *x.shape[1:])
    report = fq.verify(prepared, reference, [x, new])
    assert report.reference_equals_fake_quant, report.different_tensors
    lowered = fq.lower(reference, "x86")
    assert all(entry.max_code_difference <= 1 for entry in lowered.meta["fxquant_lowered"] if not entry.reason)
    assert sum(entry.kernel != "reference" for entry in lowered.meta["fxquant_lowered"]) >= len(layers)
    with native._kernels("x86"), torch.no_grad():
        want, got = reference(new), lowered(new)
    assert got.shape == (3, 10)
    assert got.isfinite().all()
    assert (got - want).abs().max() <= 0.2 * want.abs().max()


@pytest.mark.parametrize("name", ["test_resnet", "test_byobnet", "test_efficientnet", "test_coatnet"])
def test_every_batch_norm_behind_a_convolution_is_inside_its_layer(name):
    x = torch.randn(2, 3, MODELS[name], MODELS[name])
    model = trained_looking(name, x)
    expected = batch_norms_behind(trace(model, (x,)))
    prepared = fq.prepare(model, W4A4, example_inputs=(x,))
    fused = [m for m in prepared.modules() if isinstance(m, QATConv2d) and m.bn is not None]
    assert batch_norms_behind(prepared) == []
    assert len(fused) == len(expected) > 3
    # What is left stands behind something else: a pooling or a sum.
    total = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    left = sum(type(m) is nn.BatchNorm2d for n, m in prepared.named_modules() if not n.endswith(".bn"))
    assert len(fused) + left == total
    assert left == (2 if name == "test_coatnet" else 0)


# ---- ReLU6 -----------------------------------------------------------------------------------------------


class Relu6Net(nn.Module):
    """conv-bn-relu6, depthwise-bn-relu6, conv-relu6, linear; activations far beyond 6. Input [N, 3, H, W]."""

    def __init__(self, relu6):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.pointwise, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)
        self.relu6 = relu6

    def forward(self, x):
        x = self.relu6(self.bn(self.stem(x)))
        x = self.relu6(self.bn1(self.depthwise(x)))
        return self.head(self.relu6(self.pointwise(x)).mean((2, 3)))


RELU6 = {
    "nn.ReLU6": nn.ReLU6(),
    "nn.ReLU6 in place": nn.ReLU6(inplace=True),
    "nn.Hardtanh": nn.Hardtanh(0, 6),
    "F.relu6": F.relu6,
    "F.hardtanh": lambda x: F.hardtanh(x, 0.0, 6.0),
}
CUT = ("stem", "depthwise", "pointwise")


def relu6_net(relu6, x: torch.Tensor) -> nn.Module:
    model = settle(Relu6Net(relu6), x)
    with torch.no_grad():
        for bn in (model.bn, model.bn1):
            bn.weight.mul_(4)
            bn.bias.add_(2)
        model.pointwise.weight.mul_(6)
    return model


@pytest.mark.parametrize("spelling", RELU6)
def test_relu6_is_the_ceiling_of_the_layer_before_it(spelling):
    x = torch.randn(8, 3, 12, 12)
    model = relu6_net(RELU6[spelling], x)
    prepared = fq.prepare(copy.deepcopy(model), [fq.Rule("*", 8, 8)], calibration=[x])
    found = {n: (m.ceiling, m.relu) for n, m in prepared.named_modules() if isinstance(m, QATLayer)}
    assert found == {**dict.fromkeys(CUT, (6.0, True)), "head": (None, False)}
    assert not any(isinstance(m, (nn.ReLU6, nn.Hardtanh)) for m in prepared.modules())
    with torch.no_grad():
        want, got = model(x), prepared.eval()(x)
    assert (want - got).abs().max() < 0.05 * want.abs().max()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("frozen", [False, True])
def test_no_activation_exceeds_6_and_the_reference_is_exact(bits, frozen):
    x = torch.randn(8, 3, 12, 12)
    prepared = fq.prepare(relu6_net(nn.ReLU6(), x), [fq.Rule("*", bits, bits)], calibration=[x]).train(not frozen)
    if frozen:
        fq.freeze(prepared)
        reference = fq.convert(prepared)
        assert fq.verify(prepared, reference, [x, 9 * x]).reference_equals_fake_quant
        assert [reference.get_submodule(f"{name}_rescale").ceiling for name in CUT] == [6.0] * 3
        graphs = {"": prepared, "_rescale": reference}
    else:
        graphs = {"": prepared}
    for suffix, graph in graphs.items():
        values = recorded(graph, 9 * x)
        assert {float(values[name + suffix].max()) for name in CUT} == {6.0}
        assert all(values[name + suffix].min() == 0 for name in CUT)


@X86
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("init", ["mse", "minmax"])
def test_lowered_relu6_is_within_one_code_and_below_the_code_of_6(bits, init):
    x = torch.randn(8, 3, 12, 12)
    prepared = fq.prepare(relu6_net(nn.ReLU6(), x), [fq.Rule("*", bits, bits, init=init)], calibration=[x])
    with torch.no_grad():
        for name in ("depthwise", "pointwise"):  # ranges beyond 6, so that it is the ceiling that cuts
            prepared.get_submodule(name).input_fake_quant.log2_scale.add_(0.6)
    fq.freeze(prepared)
    reference = fq.convert(prepared)
    lowered = fq.lower(reference, "onednn")  # which x86 is where there are VNNI instructions
    assert not any(entry.kernel == "reference" for entry in lowered.meta["fxquant_lowered"])
    new = 3 * torch.randn(8, 3, 12, 12)
    want = recorded(reference, new)
    checked = 0
    with native._kernels("onednn"), torch.no_grad():
        for node in (n for n in lowered.graph.nodes if REFERENCE in n.meta):
            name = node.meta[REFERENCE]
            if want[name].dtype != torch.uint8 or not isinstance(lowered.get_submodule(node.target), OnednnLayer):
                continue
            inputs = [want[argument.meta.get(REFERENCE, argument.name)] for argument in node.args]
            got = lowered.get_submodule(node.target)(*inputs)
            assert (got.int() - want[name].int()).abs().max() <= 1
            exit_ = reference.get_submodule(name)
            highest = exit_(torch.tensor([6.0]))
            assert highest < exit_.quant_max
            assert got.max() == want[name].max() == highest
            checked += 1
    assert checked == 2


# ---- edges -----------------------------------------------------------------------------------------------


class Between(nn.Module):
    """Two convolutions with an operation between them."""

    def __init__(self, operation):
        super().__init__()
        self.operation = operation
        self.first, self.side, self.last = (nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1))
        self.bias = nn.Parameter(torch.randn(4, 1, 1))
        self.register_buffer("offset", torch.randn(1, 4, 1, 1))

    def forward(self, x):
        return self.last(self.operation(self, self.first(x), x)).mean((2, 3))


FLOAT = {
    "x * 0.5": lambda m, y, x: y * 0.5,
    "0.5 * x": lambda m, y, x: 0.5 * y,
    "x + 1": lambda m, y, x: y + 1,
    "torch.mul by a number": lambda m, y, x: torch.mul(y, 0.5),
    "x.add(1)": lambda m, y, x: y.add(1),
    "relu(x + 1)": lambda m, y, x: F.relu(y + 1),
    "x * 0.5, pooled": lambda m, y, x: F.max_pool2d(y * 0.5, 2),
    "x + parameter": lambda m, y, x: y + m.bias,
    "parameter * x": lambda m, y, x: m.bias * y,
    "x + function of a parameter": lambda m, y, x: y + F.softplus(m.bias) * 2,
    "x + buffer": lambda m, y, x: y + m.offset,
    "x + expanded buffer": lambda m, y, x: y + m.offset.expand(y.shape[0], -1, *y.shape[2:]),
    "x * its batch size": lambda m, y, x: y * y.shape[0],
    "concatenation of one": lambda m, y, x: torch.cat([y], 1),
    "nothing": lambda m, y, x: y,
}
EDGES = {
    "x + y": (lambda m, y, x: y + m.side(x), {"first_edge", "side_edge", "add_edge"}),
    "x * y": (lambda m, y, x: y * m.side(x), {"first_edge", "side_edge", "mul_edge"}),
    "relu(x + y)": (lambda m, y, x: F.relu(y + m.side(x)), {"first_edge", "side_edge", "relu_edge"}),
    "x.add(y)": (lambda m, y, x: y.add(m.side(x)), {"first_edge", "side_edge", "add_edge"}),
    "x += y": (lambda m, y, x: y.add_(m.side(x)), {"first_edge", "side_edge", "add_edge"}),
    "x + x": (lambda m, y, x: y + y, {"first_edge", "add_edge"}),
    "x * sigmoid(x)": (lambda m, y, x: y * y.sigmoid(), {"first_edge", "sigmoid_edge", "mul_edge"}),
    "concatenation": (lambda m, y, x: torch.cat([y[:, :2], m.side(x)[:, 2:]], 1), {"getitem_edge"}),
    "x * 0.5 + y": (lambda m, y, x: y * 0.5 + m.side(x), {"mul_edge", "side_edge", "add_edge"}),
}


@pytest.mark.parametrize("name", FLOAT)
def test_arithmetic_with_constants_and_parameters_gets_no_edge(name):
    x = torch.randn(4, 3, 8, 8)
    model = Between(FLOAT[name])
    prepared = fq.prepare(model, [fq.Rule("*", 8, 8)], calibration=[x]).eval()
    assert edges(prepared) == set()
    fq.freeze(prepared)
    assert fq.verify(prepared, fq.convert(prepared), [x]).reference_equals_fake_quant


@pytest.mark.parametrize("name", EDGES)
def test_arithmetic_of_activations_gets_edges(name):
    operation, expected = EDGES[name]
    x = torch.randn(4, 3, 8, 8)
    prepared = fq.prepare(Between(operation), [fq.Rule("*", 4, 4)], calibration=[x], backend="onnxruntime").eval()
    # onnxruntime's convolutions give codes alone: a mean reads the last, and here and there a float operator another
    read_in_float = {"concatenation": {"first_edge", "side_edge"}, "x * 0.5 + y": {"first_edge"}}.get(name, set())
    assert edges(prepared) == expected | read_in_float | {"last_edge"}
    assert {prepared.get_submodule(n).whole_bits for n in expected} == {8}
    fq.freeze(prepared)
    assert fq.verify(prepared, fq.convert(prepared), [x]).reference_equals_fake_quant
