"""What backward computes anew is what forward gave: the same gradients, less memory."""

from __future__ import annotations

import contextlib
import copy
import gc

import pytest
import torch
from torch import nn

import fxquant as fq
from fxquant import layers
from fxquant.estimators import ESTIMATORS
from fxquant.estimators.recompute import Recomputed, recomputing

IMAGES = torch.randn(4, 3, 8, 8)


class Net(nn.Module):
    """A convolution behind BatchNorm and one, a linear layer on three dimensions. Input [N, 3, H, W]."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn, self.conv = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.conv(torch.relu(self.bn(self.stem(x)))).flatten(2).transpose(1, 2)).mean(1)


def prepared(estimator: str, bits) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    model = fq.prepare(Net(), [fq.Rule("*", bits, bits, estimator)], calibration=[IMAGES]).train()
    fq.Controller(model, 10).step()
    return model


def gradients(model: nn.Module, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Of a step of a copy: BatchNorm's statistics stay."""
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        fq.QATLoss(nn.CrossEntropyLoss())(model, IMAGES, torch.arange(4)).total.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


WIDTHS = [(name, bits) for name in ESTIMATORS for bits in (1, 4)] + [("nipq", (2, 6)), ("gdnsq", (2, 6))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("estimator", "bits"), WIDTHS)
def test_gradients_are_those_of_what_was_kept(estimator, bits, dtype, monkeypatch):
    model = prepared(estimator, bits)
    anew = gradients(model, dtype)
    monkeypatch.setattr(layers, "recomputing", lambda *pairs: contextlib.nullcontext())
    kept = gradients(model, dtype)
    assert anew
    assert all(torch.equal(a, b) for a, b in zip(anew, kept, strict=True))


def saved_elements(model: nn.Module) -> int:
    """Elements of all storages that autograd keeps, parameters left out."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = model(IMAGES)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    del kept
    return sum(size for pointer, size in sizes.items() if pointer not in own)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_quantized_input_or_weight_is_kept(estimator, monkeypatch):
    model = prepared(estimator, 4)
    anew = saved_elements(model)
    monkeypatch.setattr(layers, "recomputing", lambda *pairs: contextlib.nullcontext())
    inputs = 4 * (3 * 8 * 8 + 8 * 6 * 6 + 8 * 4 * 4)
    weights = 8 * 3 * 9 + 8 * 8 * 9 + 5 * 8
    assert saved_elements(model) - anew >= inputs + weights


def test_nothing_stays_in_memory_after_backward():
    loss = prepared("pege", 4)(IMAGES).square().sum()
    loss.backward()
    outputs = [o for o in gc.get_objects() if type(o) is Recomputed]
    assert len(outputs) >= 6
    assert all(output._value is None for output in outputs)
    assert loss.grad_fn is not None  # the graph, which has them, is still there


def test_backward_twice_gives_the_same():
    model = prepared("nipq", 4)
    loss = model(IMAGES).square().sum()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    loss.backward()
    again = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_what_no_quantizer_gave_is_kept():
    x = torch.randn(3, requires_grad=True)
    with recomputing((x * 2, x)):
        out = x.exp()
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad, x.detach().exp())
