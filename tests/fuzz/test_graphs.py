"""Models at random: what trains is what converts, bit for bit, what a file keeps, and what kernels compute."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import fxquant as fq
from fxquant.errors import FxQuantError
from fxquant.lower import native
from fxquant.lower.native import REFERENCE, Recorder
from fxquant.spec import BACKENDS
from tests.test_inductor import needs_compiler

from . import cases
from .graphs import CLASSES, nets, rules

NATIVE = [n for n in ("x86", "onednn", "fbgemm", "qnnpack") if n in torch.backends.quantized.supported_engines]


@pytest.fixture(autouse=True)
def _widths_may_be_reduced():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="layer .* becomes .* at most|kept in float, as one call")
        yield


@st.composite
def trained(draw, backends=tuple(BACKENDS)):
    """(float model, frozen model, reference, images) after one step of training; None where prepare refuses it."""
    net, images = draw(nets())
    asked = draw(rules(net))
    backend, residual_bits = draw(st.sampled_from(sorted(backends))), draw(st.sampled_from([8, 8, 8, 4, 2, 1]))
    try:
        model = fq.prepare(net, asked, calibration=[images], backend=backend, residual_bits=residual_bits)
    except FxQuantError as error:
        event(type(error).__name__)
        return None
    model.train()
    optimizer = torch.optim.SGD(fq.param_groups(model, lr=1e-2))
    loss = fq.QATLoss(F.cross_entropy)(model, images, torch.arange(len(images)) % CLASSES).total
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    optimizer.step()
    fq.freeze(model)
    return net, model, fq.convert(model), images


def others(net: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Images that calibration has not seen: new ones, larger ones, none but zeros, of another layout, one alone."""
    new = torch.randn(7, *images.shape[1:])
    found = [images, new, 5 * new, torch.zeros_like(new), new.contiguous(memory_format=torch.channels_last)]
    return found if needs_a_batch(net) else [*found, new[:1]]


def needs_a_batch(net: nn.Module) -> bool:
    """Whether an image's result depends on the others: torch refuses to normalise one pixel by itself."""
    return any(isinstance(m, nn.BatchNorm2d) and m.running_mean is None for m in net.modules())


@cases(15)
@given(trained())
def test_what_trains_is_what_converts_and_what_a_file_keeps(tmp_path, case):
    if case is None:
        return
    net, frozen, reference, images = case
    report = fq.verify(frozen, reference, others(net, images))
    assert report.different_tensors == {}
    assert report.reference_equals_fake_quant
    with torch.no_grad():
        for x in others(net, images):
            want = frozen(x)
            assert torch.isfinite(want).all()
            assert torch.equal(reference(x), want)
        if not needs_a_batch(net):  # an image gets the same result alone
            assert torch.equal(torch.cat([reference(one[None]) for one in images]), reference(images))
    fq.save(reference, tmp_path / "x.fxq")
    again = fq.load(tmp_path / "x.fxq", net)
    with torch.no_grad():
        for x in others(net, images):
            assert torch.equal(again(x), reference(x))


@cases(10)
@given(trained(NATIVE))
def test_kernels_compute_the_reference(case):
    """Each kernel, given the reference's own codes of images it was not checked on."""
    if case is None:
        return
    net, _, reference, images = case
    lowered = fq.lower(reference)
    backend = lowered.meta["fxquant_backend"]
    for x in others(net, images):
        with torch.no_grad(), native._kernels(backend):
            recorder = Recorder(reference)
            recorder.run(x)
            for node in lowered.graph.nodes:
                if REFERENCE not in node.meta:
                    continue
                inputs = [recorder.values[a.meta.get(REFERENCE, a.name)].clone() for a in node.args]
                kernel, want = lowered.get_submodule(node.target), recorder.values[node.meta[REFERENCE]]
                off = (kernel(*inputs).double() - want.double()).abs()
                if want.dtype == torch.uint8:
                    assert off.max() <= 1, (node.name, kernel.kernel)
                    assert int((off > 0).sum()) <= max(2, 0.01 * off.numel()), (node.name, kernel.kernel)
                else:
                    # Of the same integer sums, but for what float32 rounds of the largest.
                    rounding = 2**-22 * (want.double() / kernel.unit).abs().max()
                    assert (off / kernel.unit).max() < 1e-2 + rounding, (node.name, kernel.kernel)


@cases(15)
@given(trained(["onnxruntime"]))
def test_onnxruntime_computes_the_reference(tmp_path, case):
    """The file, on images it was not checked on. Integers are exact; float operators between them may round in another
    order, which an image feels where a number lies at a tie: one of a batch, or half of one behind a float layer."""
    pytest.importorskip("onnxscript", reason="the extra fxquant[onnx] is not installed")
    pytest.importorskip("onnxruntime", reason="the extra fxquant[onnx] is not installed")
    if case is None or is_noise(case[0], case[3]):
        return
    net, _, reference, images = case
    fq.export_onnx(reference, tmp_path / "x.onnx")
    try:
        model = fq.OnnxModel(tmp_path / "x.onnx")
    except FxQuantError as error:  # onnxruntime refuses the file: it merges a Pad into a pooling that cannot have it
        event(type(error).__name__)
        return
    stays_float = any(isinstance(m, (nn.Conv2d, nn.Linear)) for m in reference.modules())
    for x in others(net, images):
        assert images_that_differ(model, reference, x) <= (len(x) // 2 if stays_float else min(1, len(x) - 1))


@pytest.mark.filterwarnings("ignore:Inductor of torch .* put .* layers on integer kernels")
@needs_compiler
@cases(3)
@given(trained(["inductor"]))
def test_inductor_computes_the_reference(case):
    """The compiled program, on images it was not checked on. Sums are of floats, which an image feels at a tie."""
    if case is None or is_noise(case[0], case[3]):
        return
    net, _, reference, images = case
    torch._dynamo.reset()
    model = fq.lower(reference, "inductor", calibration=[images])
    for x in others(net, images)[:3]:
        assert images_that_differ(model, reference, x) <= 1


def images_that_differ(model, reference, x: torch.Tensor) -> int:
    """By more than what float32 rounds of logits."""
    with torch.no_grad():
        want = reference(x)
        rounding = 1e-5 * (want - want.mean()).abs().max() + 1e-6 * want.abs().max()
        return int(((model(x) - want).abs() > rounding).any(-1).sum())


def is_noise(net: nn.Module, images: torch.Tensor) -> bool:
    """Whether a float model's outputs are what rounding left of a sum that is zero, such as the mean of what
    InstanceNorm gave: every runtime has its own."""
    with torch.no_grad():
        exact = copy.deepcopy(net).double()(images.double())
        return bool((net(images) - exact).abs().max() > 1e-3 * exact.abs().max())
