"""A contender as something to call: :func:`open_contender`, in its worker's process."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..lower import operators, packed
from ..lower.onnx import OnnxModel
from ..spec import get_backend
from ..train import lower_to
from . import peers
from .contender import Contender
from .job import Job

Call = Callable[[], Any]


@dataclass
class Opened:
    """A contender, ready.

    Attributes:
        bind: takes images [N, C, H, W], returns a call on them, and a note on how it runs at that batch size.
        size: bytes of what would be shipped.
        note: what a reader has to know.
    """

    bind: Callable[[Tensor], tuple[Call, str]]
    size: int
    note: str = ""


def open_contender(contender: Contender, job: Job) -> Opened:
    """Load, lower or compile a contender from the shared files."""
    return OPENERS[contender.kind](contender, job)


def backend_model(reference: fx.GraphModule, backend: str, images: Tensor, written: Path, threads: int):
    """A callable on image batches: a reference graph on any backend, its kernels checked on ``images``.

    ``written`` is where the file goes of a backend that reads one.
    """
    if backend in torch.backends.quantized.supported_engines:
        torch.backends.quantized.engine = backend
    reference.meta["fxquant"].calibration = [images]
    return lower_to(reference, backend, written, threads=threads)


def _open_ours(contender: Contender, job: Job) -> Opened:
    packed_file = job.file(contender.file)
    written = packed_file.with_suffix(f".{contender.backend}.onnx")
    reference = packed.load(packed_file, job.blank_model())
    if get_backend(contender.backend).reads_onnx:
        model = backend_model(reference, contender.backend, job.images(), written, job.threads)
        return Opened(_calls(model), written.stat().st_size)

    def bind(images: Tensor) -> tuple[Call, str]:
        """Lowered anew: torch's onednn kernels cache what they prepare for the first shape they see, and no other."""
        model = backend_model(reference, contender.backend, images, written, job.threads)
        stayed = [layer for layer in operators(model) if layer.kernel == "reference"]
        return lambda: model(images), f"{len(stayed)} operators stay on the reference" if stayed else ""

    return Opened(bind, packed_file.stat().st_size)


def _open_eager(contender: Contender, job: Job) -> Opened:
    model = job.float_model()

    def bind(images: Tensor) -> tuple[Call, str]:
        """In the memory format that is faster at this batch size."""
        formats = {}
        for name in ("contiguous_format", "channels_last"):
            layout = getattr(torch, name)
            form, batch = job.float_model().to(memory_format=layout), images.to(memory_format=layout)
            call = lambda form=form, batch=batch: form(batch)  # noqa: E731
            formats[name] = _quickest(call), call
        name = min(formats, key=lambda key: formats[key][0])
        return formats[name][1], name

    return Opened(bind, _state_bytes(model))


def _open_onnx(contender: Contender, job: Job) -> Opened:
    file = job.file(contender.file)
    return Opened(_calls(OnnxModel(file, job.threads)), file.stat().st_size)


def _open_openvino(contender: Contender, job: Job) -> Opened:
    """Compiled for each batch size: a shape that is known is what openvino is fastest with."""
    import openvino

    core, file = openvino.Core(), job.file(contender.file)
    settings = {"INFERENCE_NUM_THREADS": job.threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}

    def bind(images: Tensor) -> tuple[Call, str]:
        model = core.read_model(str(file))
        model.reshape(list(images.shape))
        request, array = core.compile_model(model, "CPU", settings).create_infer_request(), images.numpy()
        return lambda: request.infer({0: array}), ""

    weights = file.with_suffix(".bin") if file.suffix == ".xml" else None
    return Opened(bind, file.stat().st_size + (weights.stat().st_size if weights else 0), "float parts in fp32")


def _open_torch_ao(contender: Contender, job: Job) -> Opened:
    torch.backends.quantized.engine = "x86"

    def bind(images: Tensor) -> tuple[Call, str]:
        """Converted anew for each batch size, for the same reason as ours."""
        model = peers.torch_ao(job)
        return lambda: model(images), ""

    return Opened(bind, _state_bytes(peers.torch_ao(job)))


OPENERS: dict[str, Callable[[Contender, Job], Opened]] = {
    "eager": _open_eager,
    "onnx": _open_onnx,
    "openvino": _open_openvino,
    "ours": _open_ours,
    "torch.ao": _open_torch_ao,
}
"""How each kind of contender is opened."""


def _calls(model: Callable[[Tensor], Any]) -> Callable[[Tensor], tuple[Call, str]]:
    return lambda images: (lambda: model(images), "")


def _quickest(call: Call, times: int = 3) -> float:
    """Seconds of the quickest of some calls, after one to warm up."""
    call()
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def _state_bytes(model: nn.Module) -> int:
    """Bytes of a model's state as ``torch.save`` writes it."""
    content = io.BytesIO()
    torch.save(model.state_dict(), content)
    return content.tell()
