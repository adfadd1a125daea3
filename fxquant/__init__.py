"""fxquant: quantization-aware training at 1 to 8 bits, shipped as the same integers it trained.

The way through, in order:

* ``Rule``, ``Budget`` - which layers get which widths and estimator; what the whole must keep to.
* ``prepare``, ``calibrate`` - a float model to one that trains quantized.
* ``analyze`` - capacity of every quantized tensor, and the minimum cut: where the network is narrowest.
* ``allocate`` - whole widths for every layer, within a budget, that cost the model least.
* ``param_groups``, ``QATLoss``, ``Controller`` - what your own training loop needs.
* ``compiled_quantizers`` - around that loop, quantizers as compiled kernels.
* ``freeze`` - whole widths inside the budget, BatchNorm re-estimated, scales fixed.
* ``convert`` - the reference integer graph, equal to the frozen model bit for bit.
* ``lower`` - torch's integer kernels, each checked against the reference.
* ``save``, ``load`` - the reference graph in a packed file, weights at their own 1 to 8 bits.
* ``export_onnx``, ``OnnxModel``, ``OpenVinoModel`` - one ONNX file of the same integers, and the runtimes on it.
* ``verify`` - all of these compared on held-out images.
* ``get_qat_qconfig``, ``get_qat_qconfig_mapping``, ``get_backend_config`` - for torch.ao's own ``prepare_qat_fx``.
* ``FxQuantError`` - base of every error that fxquant raises on purpose.
"""

from .allocate import allocate
from .analyze import analyze
from .controller import Controller, param_groups
from .convert import convert
from .errors import FxQuantError
from .estimators.passes import compiled_quantizers
from .freeze import freeze
from .loss import QATLoss
from .lower import lower
from .lower.onnx import OnnxModel, OpenVinoModel, export_onnx
from .lower.packed import load, save
from .prepare import calibrate, prepare
from .qconfig import get_backend_config, get_qat_qconfig, get_qat_qconfig_mapping
from .spec import Budget, Rule
from .verify import verify

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Controller",
    "FxQuantError",
    "OnnxModel",
    "OpenVinoModel",
    "QATLoss",
    "Rule",
    "allocate",
    "analyze",
    "calibrate",
    "compiled_quantizers",
    "convert",
    "export_onnx",
    "freeze",
    "get_backend_config",
    "get_qat_qconfig",
    "get_qat_qconfig_mapping",
    "load",
    "lower",
    "param_groups",
    "prepare",
    "save",
    "verify",
]
