"""What other quantizers make of the same float model: torch.ao, onnxruntime's own, nncf. At their defaults."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import nn

from .. import _torch_ao as ao
from .job import FLOAT_ONNX, Job

ORT_QUANTIZED = "onnxruntime_quantizer.onnx"
NNCF_XML = "nncf.xml"


def torch_ao(job: Job) -> nn.Module:
    """``prepare_qat_fx`` and ``convert_fx`` with the default QConfigMapping of x86, 8 bits."""
    images = job.images()
    model = job.float_model().train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = ao.prepare_qat_fx(copy.deepcopy(model), ao.get_default_qat_qconfig_mapping("x86"), (images,))
        with torch.no_grad():
            prepared(images)  # its observers see what ours see
        return ao.convert_fx(prepared.eval().apply(ao.disable_observer))


def _quantize_by_onnxruntime(job: Job) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter([{"images": job.images().numpy()}])

        def get_next(self):
            return next(self.batches, None)

    ready = job.file("onnxruntime_quantizer.ready.onnx")
    quant_pre_process(str(job.file(FLOAT_ONNX)), str(ready), skip_symbolic_shape=True)
    quantize_static(
        str(ready),
        str(job.file(ORT_QUANTIZED)),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def _quantize_by_nncf(job: Job) -> None:
    import nncf
    import openvino

    model = openvino.Core().read_model(str(job.file(FLOAT_ONNX)))
    quantized = nncf.quantize(model, nncf.Dataset([job.images().numpy()]))
    openvino.save_model(quantized, str(job.file(NNCF_XML)), compress_to_fp16=False)


BUILDERS: dict[str, Callable[[Job], None]] = {
    ORT_QUANTIZED: _quantize_by_onnxruntime,
    NNCF_XML: _quantize_by_nncf,
}
"""What makes each shared file of a peer."""
