"""Images of every value, layout and type through lowered models: what the reference gives, or an error by name."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fxquant as fq
from fxquant.errors import SpecError
from fxquant.lower.onnx import RUNTIMES
from tests.models import TinyResidual, settle
from tests.test_inductor import lacking as no_compiler

from . import cases
from .test_tensors import LAYOUTS, tensors

ENGINES = torch.backends.quantized.supported_engines
BACKENDS = ["packed", "x86", "onednn", "fbgemm", "qnnpack", "inductor", *RUNTIMES]


@pytest.fixture(scope="module")
def lowered(tmp_path_factory) -> Callable[[str], tuple]:
    """By backend: reference, and what is called with images."""

    @functools.cache
    def build(backend: str):
        torch.manual_seed(0)
        x = torch.randn(16, 3, 8, 8)
        model = settle(TinyResidual(), x)
        path = tmp_path_factory.mktemp(backend) / "model"
        profile = "x86" if backend == "packed" else backend
        prepared = fq.prepare(model, [fq.Rule("*", 4, 4)], calibration=[x], backend=profile)
        fq.freeze(prepared)
        reference = fq.convert(prepared)
        if backend == "packed":
            fq.save(reference, path)
            return reference, fq.load(path, model)
        if backend in RUNTIMES:
            for package in ("onnxscript", backend):
                pytest.importorskip(package, reason="the extra fxquant[onnx] or [openvino] is not installed")
            fq.export_onnx(reference, path)
            return reference, RUNTIMES[backend](path, threads=1)
        if backend == "inductor" and no_compiler:
            pytest.skip(no_compiler)
        if backend != "inductor" and backend not in ENGINES:
            pytest.skip(f"this torch has no engine {backend}")
        return reference, fq.lower(reference, backend, calibration=[x])

    return build


SHAPES = st.tuples(st.sampled_from([2, 3]), *map(st.just, (3, 8, 8)))


@pytest.mark.parametrize("backend", BACKENDS)
@cases(25)
@given(
    images=tensors(shapes=SHAPES),
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    infinite=st.booleans(),
)
def test_images_of_any_value_layout_and_type(lowered, backend, images, layout, dtype, infinite):
    reference, model = lowered(backend)
    images = LAYOUTS[layout](images.to(dtype))
    if infinite:
        images = images.clone()
        images[0, 0, 0], images[0, 1, 0] = math.inf, -math.inf
    with torch.no_grad():
        want, got = reference(images.float().contiguous()), model(images)
        assert torch.equal(reference(images), want)
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    agree(got, want)


def agree(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_images_give_no_logits(lowered, backend):
    reference, model = lowered(backend)
    none = torch.empty(0, 3, 8, 8)
    with torch.no_grad():
        model(torch.zeros(2, 3, 8, 8))
        assert reference(none).shape == (0, 5)
        assert model(none).shape == (0, 5)


@pytest.mark.parametrize("backend", ["inductor", *RUNTIMES])
@pytest.mark.parametrize("shape", [(2, 3, 7, 8), (2, 1, 8, 8), (3, 8, 8), ()], ids=str)
def test_images_of_another_shape_are_refused_by_name(lowered, backend, shape):
    """By what is made for one; the others are modules of torch, and say what torch says."""
    _, model = lowered(backend)
    with pytest.raises(SpecError, match=re.escape(str(shape)) + r" .* \[N, 3, 8, 8\]"):
        model(torch.randn(shape))
