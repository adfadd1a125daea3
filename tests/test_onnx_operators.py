"""Operators of the ONNX file against the float64 interpreter: onnxruntime's codes, one requantization at a time."""

from __future__ import annotations

import ast
import operator
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F

import fxquant as fq
from fxquant.integer import IntegerConv2d, IntegerLinear, Quantize
from tests.interpreter import Run, interpret

onnx = pytest.importorskip("onnx", reason="the extra fxquant[onnx] is not installed")
pytest.importorskip("onnxscript", reason="the extra fxquant[onnx] is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra fxquant[onnx] is not installed")


def tie_allowance(unrounded: np.ndarray, zero_point: int) -> float:
    """How near a tie, in codes, float32 may round an image to the other side: onnxruntime divides by the scale where
    the reference multiplies by its reciprocal. Everything after that is on grids whose scales are away from ties."""
    return 4 * 2.0**-24 * float(np.abs(unrounded - zero_point).max())


# ---- onnxruntime's codes -------------------------------------------------------------------------------------


def quantize_nodes(reference: fx.GraphModule) -> list[fx.Node]:
    modules = dict(reference.named_modules())
    return [n for n in reference.graph.nodes if n.op == "call_module" and isinstance(modules[n.target], Quantize)]


def code_tensors(model) -> dict[str, list[str]]:
    """The uint8 tensors that QuantizeLinear, and Clip where there is one, leave, by the module that wrote them."""
    found = defaultdict(list)
    clips = {n.input[0]: n.output[0] for n in model.graph.node if n.op_type == "Clip"}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            scopes = {p.key: p.value for p in node.metadata_props}["pkg.torch.onnx.name_scopes"]
            module = next(scope for scope in ast.literal_eval(scopes) if scope).split("@")[0]
            found[module].append(clips.get(node.output[0], node.output[0]))
    return found


def codes_in_onnxruntime(reference: fx.GraphModule, images: torch.Tensor, path) -> Run:
    """The codes of every Quantize as the runtime computes them, with all its fusions."""
    fq.export_onnx(reference, path)
    model = onnx.load(path)
    tensors = code_tensors(model)
    names = [name for module in tensors.values() for name in module]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.UINT8, None) for n in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    logits, *codes = session.run(["logits", *names], {"images": images.numpy()})
    # Outputs that were added for the test must not have kept the runtime from fusing.
    assert torch.equal(torch.from_numpy(logits), fq.OnnxModel(path, threads=1)(images))

    arrays, run = dict(zip(names, codes, strict=True)), Run(output=logits)
    modules, same = dict(reference.named_modules()), {}
    for node in quantize_nodes(reference):
        entry = modules[node.target]
        key = node.args[0], float(entry.scale), int(entry.zero_point), tuple(entry.bounds.tolist())
        if key not in same:  # the exporter merges what quantizes one tensor twice in the same way
            same[key] = arrays[tensors[f"{node.name}_onnx"].pop(0)].astype(np.int64)
        run.values[node.name] = same[key]
    assert not any(tensors.values()), "a QuantizeLinear of the file is none of the reference's"
    return run


def assert_codes_are_exact(reference: fx.GraphModule, images: torch.Tensor, path) -> None:
    """Each code is the exact value, of the codes that went in, rounded; of images, but for those at a tie of two."""
    theirs = codes_in_onnxruntime(reference, images, path)
    exact = interpret(reference, images, deployed=theirs)
    modules = dict(reference.named_modules())
    ties = total = 0
    for node in quantize_nodes(reference):
        entry, unrounded = modules[node.target], exact.unrounded[node.name]
        zero, low, high = int(entry.zero_point), *entry.bounds.tolist()
        got, want = theirs.values[node.name], np.clip(np.rint(unrounded - zero) + zero, low, high)
        assert (got >= low).all()
        assert (got <= high).all()
        off = got != want
        distance = np.abs(unrounded[off] - np.floor(unrounded[off]) - 0.5)
        if node.args[0].op != "placeholder":
            assert not off.any(), f"{node.name}: {int(off.sum())} codes differ, {distance.min()} codes from a tie"
        assert (np.abs(got - want)[off] == 1).all(), node.name
        assert (distance <= tie_allowance(unrounded, zero)).all(), f"{node.name}: {distance.max()} codes from a tie"
        ties, total = ties + int(off.sum()), total + off.size
    note(f"{ties} of {total} codes differ, each at a tie")


def reference_of(model: nn.Module, images: torch.Tensor, bits: int, residual_bits: int) -> fx.GraphModule:
    rules = [fq.Rule("*", bits, bits)]
    prepared = fq.prepare(model.eval(), rules, calibration=[images], residual_bits=residual_bits, backend="onnxruntime")
    fq.freeze(prepared)
    return fq.convert(prepared)


# ---- convolutions and linear layers --------------------------------------------------------------------------

CHANNELS, SIZE = 8, 12


@st.composite
def convolutions(draw) -> nn.Conv2d:
    """8 channels to 8, at least one pixel of 12 x 12 left after three of them."""
    kernel, dilation = draw(st.sampled_from([1, 2, 3, (1, 3), (5, 3)])), draw(st.sampled_from([1, 2]))
    height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    padding = tuple(draw(st.integers((k - 1) * dilation // 2, k // 2 * dilation)) for k in (height, width))
    groups, bias = draw(st.sampled_from([1, 2, CHANNELS])), draw(st.booleans())
    stride = draw(st.sampled_from([1, 1, 2, (2, 1)]))
    return nn.Conv2d(CHANNELS, CHANNELS, kernel, stride, padding, dilation, groups, bias)


class Layers(nn.Module):
    """A chain of convolutions and two linear layers, each with or without a ReLU after it."""

    def __init__(self, convolutions: list[nn.Conv2d], relus: list[bool]):
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.convolutions, self.relus = nn.ModuleList(convolutions), relus
        shape = torch.zeros(1, CHANNELS, SIZE, SIZE)
        for layer in convolutions:
            shape = layer(shape)
        self.hidden, self.head = nn.Linear(shape.numel(), 16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        for layer, relu in zip(self.convolutions, self.relus, strict=True):
            x = layer(F.relu(x) if relu else x)
        return self.head(self.hidden(x.flatten(1)))


@settings(max_examples=10)
@given(
    bits=st.integers(2, 8),
    layers=st.lists(convolutions(), min_size=3, max_size=3),
    relus=st.lists(st.booleans(), min_size=3, max_size=3),
    seed=st.integers(0, 2**16),
)
def test_convolutions_and_linear_layers(bits, layers, relus, seed, tmp_path_factory):
    torch.manual_seed(seed)
    for layer in layers:
        layer.reset_parameters()
    images = torch.randn(24, 3, SIZE, SIZE)
    reference = reference_of(Layers(layers, relus), images[:8], bits, 8)
    kinds = [type(m) for m in reference.modules()]
    assert (kinds.count(IntegerConv2d), kinds.count(IntegerLinear)) == (4, 2)
    assert_codes_are_exact(reference, images, tmp_path_factory.mktemp("onnx") / "model.onnx")


# ---- operators on edges --------------------------------------------------------------------------------------


class Edges(nn.Module):
    """A sum, a product, a concatenation, a max pooling and two average poolings, on codes of an edge each."""

    def __init__(self, pool: nn.Module, average: nn.Module, relu: bool, product_first: bool):
        super().__init__()
        self.stem, self.left = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.right, self.third = nn.Conv2d(CHANNELS, CHANNELS, 1), nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.pool, self.average, self.relu = pool, average, relu
        self.combine = (operator.mul, operator.add) if product_first else (operator.add, operator.mul)
        self.mix, self.last = nn.Conv2d(2 * CHANNELS, CHANNELS, 1), nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.head = nn.Linear(CHANNELS, 5)

    def forward(self, x):
        x = self.stem(x)
        y = self.combine[0](x, self.left(x))
        y = F.relu(y) if self.relu else y
        z = self.combine[1](self.right(y), self.third(y))
        x = self.last(self.average(self.mix(self.pool(torch.cat([y, z], 1)))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


@settings(max_examples=10)
@given(
    bits=st.integers(2, 8),
    residual_bits=st.integers(2, 8),
    pool=st.sampled_from([(2, 2, 0), (3, 2, 1), (3, 1, 1)]),
    average=st.sampled_from([(2, 2), (3, 1), (2, 1), (1, 1)]),
    relu=st.booleans(),
    product_first=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_operators_on_edges(bits, residual_bits, pool, average, relu, product_first, seed, tmp_path_factory):
    torch.manual_seed(seed)
    images = torch.randn(24, 3, SIZE, SIZE)
    model = Edges(nn.MaxPool2d(*pool), nn.AvgPool2d(*average), relu, product_first)
    reference = reference_of(model, images[:8], bits, residual_bits)
    targets = {node.target for node in reference.graph.nodes}
    assert {operator.add, operator.mul, torch.cat, F.adaptive_avg_pool2d} <= targets
    assert_codes_are_exact(reference, images, tmp_path_factory.mktemp("onnx") / "model.onnx")
