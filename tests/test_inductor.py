"""The compiled program: the reference's argmax, on kernels, at narrow widths too; what is wrong or missing is said."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxquant as fq
from fxquant.errors import FxQuantError, SpecError
from fxquant.integer import IntegerConv2d, Rescale
from fxquant.lower import inductor, kernels, operators
from tests.models import TinyResidual, settle
from tests.test_lower import corrupted, reference_of

OPS = "quantized_decomposed"

try:
    inductor.require_inductor()
    lacking = ""
except SpecError as error:
    lacking = str(error)

needs_compiler = pytest.mark.skipif(bool(lacking), reason=lacking)


def rescales(reference) -> set[str]:
    modules = dict(reference.named_modules())
    return {n.name for n in reference.graph.nodes if isinstance(modules.get(n.target), Rescale)}


@pytest.fixture(scope="module")
def narrow():
    torch.manual_seed(0)
    x = torch.randn(16, 3, 16, 16)
    return reference_of(settle(TinyResidual(), x), x, bits=3), x


@needs_compiler
def test_the_compiled_program_agrees_on_batches_of_any_size(narrow):
    reference, x = narrow
    model = fq.lower(reference, "inductor", calibration=[x[:1].double()])
    assert {entry.kernel.split(" + ")[0] for entry in operators(model) if entry.layer} == {
        "onednn.qconv_pointwise",
        "onednn.qlinear_pointwise",
    }
    test = [torch.randn(n, 3, 16, 16) for n in (64, 5, 1)]
    parity = fq.verify(None, reference, test, lowered={"inductor": model}).lowered["inductor"]
    assert parity.argmax_agreement == 100
    for given in (test[0].double(), test[0].to(memory_format=torch.channels_last)):
        torch.testing.assert_close(model(given), reference(test[0]), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(test[0]).dtype == torch.float32
    wide = 4 * torch.randn(32, 3, 16, 16)  # beyond the bounds of every grid
    torch.testing.assert_close(model(wide), reference(wide), rtol=1e-5, atol=1e-5)
    with pytest.raises(SpecError, match=r"\[N, 3, 16, 16\]"):
        model(torch.randn(2, 3, 8, 8))


class Gray(nn.Sequential):
    """Images of one channel; a convolution of padding around a single pixel. Input [N, 1, 6, 6]."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(6), nn.Conv2d(4, 3, 2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(12, 5),
        )  # fmt: skip


@needs_compiler
def test_layouts_that_inductor_mistakes_stay_on_the_reference():
    """It took contiguous for what is channels last, and stopped at the second size of a batch."""
    torch.manual_seed(0)
    x = torch.randn(8, 1, 6, 6)
    reference = reference_of(Gray().eval(), x)
    model = fq.lower(reference, "inductor", calibration=[x])
    layers = [entry for entry in operators(model) if entry.layer]
    assert [entry.kernel.split(".")[0] for entry in layers] == ["reference", "reference", "onednn"]
    assert "mistakes the layout" in layers[0].reason
    for count in (8, 5, 1, 9):
        images = torch.randn(count, 1, 6, 6)
        torch.testing.assert_close(model(images), reference(images), rtol=1e-5, atol=1e-5)


@needs_compiler
def test_what_the_compiler_stumbles_over_is_an_error_by_name(narrow, monkeypatch):
    reference, x = narrow
    model = fq.lower(reference, "inductor", calibration=[x])

    def stumble(_):
        raise AssertionError("expected stride 1==28\nat dim=1")

    monkeypatch.setattr(model, "_run", stumble)
    with pytest.raises(FxQuantError, match=r"run this model \(AssertionError: expected stride 1==28 at dim=1\)"):
        model(x)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_every_layer_becomes_a_pattern_clamped_to_its_width(bits):
    x = torch.randn(16, 3, 16, 16)
    reference = reference_of(settle(TinyResidual(), x), x, bits)
    graph, patterns = inductor.decompose(reference, rescales(reference))
    targets = [str(node.target) for node in graph.graph.nodes]
    assert (
        patterns.total() == len(rescales(reference)) == sum("aten.conv2d" in t or "aten.linear" in t for t in targets)
    )
    assert not any(isinstance(module, IntegerConv2d) for module in graph.modules())
    assert bits == 8 or any("hardtanh" in target for target in targets)
    for batch in (x, 4 * x):
        # In float, a sum may land on the other side of a tie, which moves one code; nothing else may differ.
        torch.testing.assert_close(graph(batch), reference(batch), rtol=0.05, atol=0.05 * float(reference(x).std()))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU])
def test_bounds_do_not_hang_on_the_quantizers_own(activation, bits):
    """Inductor's kernels drop quant_min and quant_max; with all of them at 0 and 255, codes still keep inside."""
    x = torch.randn(8, 3, 8, 8)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), activation(), nn.Conv2d(6, 6, 3), activation(), nn.Flatten(), nn.Linear(96, 4)
    )
    reference = reference_of(model, x, bits)
    graph, _ = inductor.decompose(reference, rescales(reference))
    images = graph.graph.find_nodes(op="placeholder")[0]
    narrow = 0
    for node in graph.graph.nodes:
        if "quantize_per_tensor" in str(node.target) and "dequantize" not in str(node.target):
            narrow += node.args[4] < 255
            if node.args[0] is not images:
                node.update_arg(4, 255)
    graph.recompile()
    assert narrow == 3
    wide = 4 * torch.randn(32, 3, 8, 8)
    torch.testing.assert_close(graph(wide), reference(wide), rtol=0.05, atol=0.05 * float(reference(x).std()))


def test_a_layer_that_onednn_computes_wrongly_stays_on_the_references_integers(narrow, monkeypatch):
    reference, x = narrow
    monkeypatch.setattr(kernels.OnednnLayer, "forward", corrupted(kernels.OnednnLayer.forward, 2))
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    model = fq.lower(reference, "inductor", calibration=[x])
    wrong = [entry for entry in operators(model) if entry.layer and "off by" in entry.reason]
    assert wrong
    assert {entry.kernel for entry in wrong} == {"reference"}
    assert model.patterns.total() == len(rescales(reference)) - len(wrong)


def test_patterns_that_the_compiler_does_not_find_are_said(narrow, monkeypatch):
    reference, x = narrow
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)  # finds none at all
    model = fq.lower(reference, "inductor", calibration=[x])
    with pytest.warns(UserWarning, match="put 0 of [41] (conv2d|linear) layers on integer kernels") as said:
        model(x)
    assert len(said) == 2


def test_a_machine_without_a_compiler_is_told_what_to_install(narrow, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    missing = torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with missing, pytest.raises(SpecError, match=r"no C\+\+ compiler was found: install g\+\+"):
        fq.lower(narrow[0], "inductor", calibration=[narrow[1]])
