"""ONNX: the reference graph as one file of QuantizeLinear and DequantizeLinear, for onnxruntime and OpenVINO.

What runtimes fuse into integer kernels, and what they compute wrongly or slowly, decides the form:

* zero-points are explicit inputs, activations uint8;
* an activation below 8 bits is clipped as uint8, between Quantize and Dequantize: a float Clip there does not fuse;
* weights of 3 and 4 bits are INT4 initializers, cast to INT8 before their DequantizeLinear: runtimes fold the cast, and
  the file has the true size;
* weights of 1 and 2 bits are bytes, each looked up (Gather) as the 8 or 4 codes it holds: runtimes fold that too.
  ONNX's own INT2 is there only when asked for: OpenVINO does not read it;
* biases are int32 at the scale of the sums;
* what a layer that stays float reads of integers is dequantized by plain arithmetic: between a DequantizeLinear and a
  QuantizeLinear, onnxruntime makes the weights of a float layer 8-bit integers of its own.

onnxruntime requantizes by one float32 multiplier, ``s_x * s_w / s_y``, where the reference multiplies by ``s_x * s_w``
and then by ``1 / s_y``; :mod:`fxquant.ties` has moved the scales to where the two agree.

OpenVINO loses track of a Linear's scales where a reduction or an index drops a dimension, so that these keep theirs. It
drops the QuantizeLinear between a convolution and an addition when it fuses the two. A network with residual
sums has to be prepared for it (``backend="openvino"``), so that there is none to drop.
"""

from __future__ import annotations

import copy
import importlib.util
import operator
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .. import grid
from ..errors import FxQuantError, SpecError, UnknownNameError, in_short
from ..files import write_bytes
from ..graph import called_module
from ..integer import Dequantize, IntegerConv2d, IntegerLinear, Quantize, Rescale, integer_layers
from ..prepare import prepared_info

OPSET, OPSET_INT2 = 21, 25
TWO_BIT_FORMS = ("bytes", "int2")
_FLOAT_PRODUCTS = {
    *(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear),
    *(operator.matmul, torch.matmul, torch.addmm, torch.mm, "matmul", "addmm", "mm"),
}  # as functions and methods: what may become a Conv, ConvTranspose or Gemm with weights in float
BLOCKS = (128, 64, 32, 16)
"""How many inputs of a weight-only Linear may share a scale: what onnxruntime's kernel takes, fewest scales first."""


def export_onnx(
    reference: fx.GraphModule, path: str | Path, *, two_bit: str = "bytes", weight_only_linear: bool = False
) -> None:
    """Write a reference graph as ONNX, opset 21, checked, with a dynamic batch; whole or not at all.

    The graph has one input, ``images`` [N, C, H, W] float32, and one output, ``logits``.

    Args:
        reference: from :func:`fxquant.convert` or :func:`fxquant.load`; not modified.
        path: by custom with the suffix ``.onnx``.
        two_bit: how weights of 1 and 2 bits are stored: as ``bytes`` of 8 and 4 codes, which onnxruntime and OpenVINO
            read; or both as ONNX's ``int2``, at opset 25 where there are any, which of the two only onnxruntime reads.
        weight_only_linear: write each Linear whose weights fit 4 bits, and whose inputs are whole blocks of 16, as a
            float product with INT4 weights, which onnxruntime computes from the narrow weights (MatMulNBits): half the
            memory, at the error of float sums, and slower than integers where the CPU has instructions for these.
            Inputs are still rounded to the trained codes.

    Raises:
        UnknownNameError: another ``two_bit``.
        SpecError: for a model that is no reference graph, or ``weight_only_linear`` without such a Linear.
        FxQuantError: where onnx or onnxscript is not installed or too old, or torch cannot export a float operator of
            the model.
        OutputFolderError: where it cannot be written.
    """
    if two_bit not in TWO_BIT_FORMS:
        raise UnknownNameError("two_bit", two_bit, TWO_BIT_FORMS)
    info = prepared_info(reference)
    require_packages("onnx", "onnxscript")
    import onnx

    if two_bit == "int2" and not hasattr(onnx.TensorProto, "INT2"):
        raise FxQuantError(f"two_bit='int2' needs a newer onnx than {onnx.__version__}; upgrade it, or take 'bytes'")
    if not integer_layers(reference):
        raise SpecError(
            f"export_onnx was given a {type(reference).__name__} without integer layers; give it what "
            "fxquant.convert returns"
        )
    if weight_only_linear and not any(map(_fits_weight_only, reference.modules())):
        raise SpecError(
            "weight_only_linear was asked for, but no Linear of this model has both weights of up to 4 bits and a "
            f"multiple of {BLOCKS[-1]} inputs; leave it out"
        )
    example = torch.randn(2, *info.input_shape, generator=torch.Generator().manual_seed(0))
    program = export_program(_symbolic(reference, weight_only_linear), example)
    model = program.model_proto
    _fit_windows(model)
    _keep_dimensions(model)
    _narrow_weights(model, two_bit)
    onnx.checker.check_model(model, full_check=True)
    content = model.SerializeToString()
    write_bytes(Path(path), content)


def export_program(model: nn.Module, example: Tensor, path: Path | None = None, what: str = "this model"):
    """torch's ONNX program of a model from ``images`` to ``logits``, with a dynamic batch; also written to ``path``.

    Args:
        what: names the model in the message of a failure.

    Raises:
        FxQuantError: where torch cannot export an operator of the model.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's exporter, about its own inside
            return torch.onnx.export(
                model,
                (example,),
                path,
                input_names=["images"],
                output_names=["logits"],
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # whatever an operator that ONNX has no form for makes of the exporter
        raise FxQuantError(f"torch cannot export {what} to ONNX: {in_short(error)}") from error


class OnnxModel:
    """An ONNX file in onnxruntime, on the CPU: call it with images, get logits.

    Args:
        path: what :func:`export_onnx` wrote.
        threads: of one operator; onnxruntime's own choice when None.

    Raises:
        FxQuantError: where onnxruntime is not installed, or does not take the file.
    """

    def __init__(self, path: str | Path, threads: int | None = None):
        require_packages("onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Its default for products with 4-bit weights rounds activations to 8 bits of its own.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no common public base
            raise FxQuantError(f"onnxruntime does not take {path}: {in_short(error)}") from error
        self._shape = self.session.get_inputs()[0].shape[1:]

    def __call__(self, images: Tensor) -> Tensor:
        array = _array(images, self._shape)
        try:
            (logits,) = self.session.run(["logits"], {"images": array})
        except Exception as error:
            raise _not_run("onnxruntime", error) from error
        return torch.from_numpy(logits)


class OpenVinoModel:
    """An ONNX file in OpenVINO, on the CPU: call it with images, get logits.

    Args:
        path: what :func:`export_onnx` wrote, its ``two_bit`` left at ``bytes``.
        threads: of one inference; OpenVINO's own choice when None.

    Raises:
        FxQuantError: where OpenVINO is not installed, or does not take the file.
    """

    def __init__(self, path: str | Path, threads: int | None = None):
        require_packages("openvino")
        import openvino

        # Its own choices would be bf16 for what is float, and activations of 8 bits before 4-bit weights.
        config = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
        if threads is not None:
            config["INFERENCE_NUM_THREADS"] = threads
        core = openvino.Core()
        try:
            self.compiled = core.compile_model(core.read_model(str(path)), "CPU", config)
        except RuntimeError as error:
            raise FxQuantError(f"OpenVINO does not take {path}: {in_short(error)}") from error
        self._shape = [d.get_length() for d in list(self.compiled.input(0).partial_shape)[1:]]

    def __call__(self, images: Tensor) -> Tensor:
        array = _array(images, self._shape)
        try:
            if not len(array):  # of no images it gives what it gave the time before
                return torch.from_numpy(self.compiled([np.zeros((1, *array.shape[1:]), array.dtype)])["logits"][:0])
            return torch.from_numpy(self.compiled([array])["logits"])
        except RuntimeError as error:
            raise _not_run("OpenVINO", error) from error


def _array(images: Tensor, shape: list) -> np.ndarray:
    """Images as a file takes them whose input is [N, *shape]."""
    if not images.is_floating_point() or list(images.shape[1:]) != shape:
        raise SpecError(
            f"images of shape {tuple(images.shape)} and type {images.dtype} were given; the file takes floats [N, "
            f"{', '.join(map(str, shape))}]. Export again from a model calibrated on images of another size"
        )
    return images.detach().to("cpu", torch.float32).numpy()


def _not_run(runtime: str, error: Exception) -> FxQuantError:
    return FxQuantError(f"{runtime} cannot run the model ({in_short(error)}); lower it to another backend, such as x86")


RUNTIMES = {"onnxruntime": OnnxModel, "openvino": OpenVinoModel}
"""What reads the file, by the backend's name, which is also that of its package."""


def require_packages(*names: str) -> None:
    """Raises :class:`FxQuantError` where a package that ONNX needs is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        extra = "openvino" if "openvino" in names else "onnx"
        raise FxQuantError(f"ONNX needs {' and '.join(missing)}, not installed here: pip install 'fxquant[{extra}]'")


# ---- the reference graph in ONNX's operators --------------------------------------------------------------


def _symbolic(reference: fx.GraphModule, weight_only_linear: bool) -> fx.GraphModule:
    """A copy of the reference graph whose integer operators write themselves as ONNX's."""
    model = copy.deepcopy(reference)
    modules = dict(model.named_modules())
    calls = [node for node in model.graph.nodes if node.op == "call_module"]
    layers = [node.all_input_nodes[0] for node in calls if isinstance(modules[node.target], Rescale)]
    weight_only = {layer for layer in layers if weight_only_linear and _fits_weight_only(modules[layer.target])}
    forms: dict[fx.Node, nn.Module] = {}
    for node in calls:
        module = modules[node.target]
        if isinstance(module, Quantize):
            (source,) = node.all_input_nodes
            rescale = called_module(source, modules)
            cut = isinstance(rescale, Rescale) and _quantized_next(source, modules)
            form = _FloatCodes if weight_only.issuperset(node.users) else _Quantize
            forms[node] = form(module, rescale.ceiling if cut else None)
        elif isinstance(module, Dequantize):
            forms[node] = _Dequantize(module.scale, module.zero_point)
            floats = [user for user in node.users if _reaches_float_layer(user, modules)]
            if floats:
                with model.graph.inserting_after(node):
                    apart = model.graph.call_module(node.target, node.args)
                for user in floats:
                    user.replace_input_with(node, apart)
                forms[apart] = _DequantizeInFloat(module.scale, module.zero_point)
        elif isinstance(module, Rescale):
            (layer,) = node.all_input_nodes
            (codes,) = layer.all_input_nodes
            entry = modules[codes.target]
            form = _WeightOnlyLinear if layer in weight_only else _Layer
            forms[layer] = form(modules[layer.target], entry, module)
            if layer in weight_only and not isinstance(forms[codes], _FloatCodes):
                forms[layer] = nn.Sequential(_Dequantize(entry.scale, entry.zero_point), forms[layer])
            forms[node] = _Activate(module.relu, None if _quantized_next(node, modules) else module.ceiling)
    for node, form in forms.items():  # a form a call: a module that is called twice need not be followed by the same
        node.target = f"{node.name}_onnx"
        model.add_submodule(node.target, form)
    for module in model.modules():
        if type(module) is nn.Conv2d and _is_padded_pixel(module):
            weight, module.padding = _widen(module)
            module.weight, module.kernel_size = nn.Parameter(weight, requires_grad=False), (3, 1)
    model.graph.eliminate_dead_code()
    model.delete_all_unused_submodules()
    model.recompile()
    return model.eval()


def _reaches_float_layer(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a value that a node reads gets to a layer with float weights before it is quantized."""
    seen, left = set(), [node]
    while left:
        user = left.pop()
        module = called_module(user, modules)
        if user in seen or isinstance(module, Quantize):
            continue
        seen.add(user)
        weights = () if module is None else (*module.parameters(), *module.buffers())
        if user.target in _FLOAT_PRODUCTS or any(w.ndim > 1 and w.is_floating_point() for w in weights):
            return True
        left.extend(user.users)
    return False


def _quantized_next(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether nothing but a Quantize reads a value, so that its codes can be clipped in the place of it.

    Behind a float Clip onnxruntime fuses a layer only where the Clip does not reach into the 8-bit grid.
    """
    return len(node.users) == 1 and isinstance(modules.get(next(iter(node.users)).target), Quantize)


def _op(name: str, inputs: tuple[Tensor, ...], dtype: torch.dtype, like: Tensor, **attributes: int) -> Tensor:
    """The result of one ONNX operator; of the shape of ``like``."""
    return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=like.shape, version=OPSET)


class _Quantize(nn.Module):
    def __init__(self, entry: Quantize, ceiling: float | None):
        super().__init__()
        lowest, highest = entry.quant_min, entry.highest_below(ceiling)
        self.register_buffer("scale", entry.scale.clone())
        self.register_buffer("zero_point", entry.zero_point.to(torch.uint8))
        self.register_buffer("lowest", torch.tensor(lowest, dtype=torch.uint8))
        self.register_buffer("highest", torch.tensor(highest, dtype=torch.uint8))
        self.narrow = (lowest, highest) != (0, 255)

    def forward(self, x: Tensor) -> Tensor:
        codes = _op("QuantizeLinear", (x, self.scale, self.zero_point), torch.uint8, x)
        return _op("Clip", (codes, self.lowest, self.highest), torch.uint8, x) if self.narrow else codes


class _Dequantize(nn.Module):
    def __init__(self, scale: Tensor, zero_point: Tensor):
        super().__init__()
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero_point", zero_point.to(torch.uint8))

    def forward(self, codes: Tensor) -> Tensor:
        return _op("DequantizeLinear", (codes, self.scale, self.zero_point), torch.float32, codes)


class _DequantizeInFloat(_Dequantize):
    """The same real numbers, in operators that onnxruntime does not take for the edge of an integer layer."""

    def forward(self, codes: Tensor) -> Tensor:
        return (codes.to(torch.float32) - self.zero_point.to(torch.float32)) * self.scale


class _Layer(nn.Module):
    """Codes to the float sums of an integer layer; runtimes fuse it with the quantization after it."""

    def __init__(self, layer: IntegerConv2d | IntegerLinear, entry: Quantize, rescale: Rescale):
        super().__init__()
        self.entry = _Dequantize(entry.scale, entry.zero_point)
        if isinstance(layer, IntegerConv2d):
            weight, padding = _widen(layer) if _is_padded_pixel(layer) else (layer.weight, layer.padding)
            self.geometry = (layer.stride, padding, layer.dilation, layer.groups)
        else:
            weight, self.geometry = layer.weight, None
        self.register_buffer("weight", weight.clone())
        scale = rescale.scale.to(torch.float64) / entry.scale.to(torch.float64)
        self.register_buffer("weight_scale", scale.to(torch.float32))
        self.register_buffer("weight_zero", torch.zeros_like(rescale.scale, dtype=torch.int8))
        self.register_buffer("bias", layer.bias.clone())
        self.register_buffer("bias_scale", rescale.scale.clone())
        self.register_buffer("bias_zero", torch.zeros_like(layer.bias))

    def forward(self, codes: Tensor) -> Tensor:
        x = self.entry(codes)
        weight = (self.weight, self.weight_scale, self.weight_zero)
        weight = _op("DequantizeLinear", weight, torch.float32, self.weight, axis=0)
        bias = _op("DequantizeLinear", (self.bias, self.bias_scale, self.bias_zero), torch.float32, self.bias, axis=0)
        return F.conv2d(x, weight, bias, *self.geometry) if self.geometry else F.linear(x, weight, bias)


def _is_padded_pixel(layer: IntegerConv2d | nn.Conv2d) -> bool:
    """Whether a convolution has a window of one pixel and padding: OpenVINO moves strides, its own and those of such
    convolutions after it, before that padding."""
    return tuple(layer.weight.shape[2:]) == (1, 1) and any(layer.padding)


def _widen(layer: IntegerConv2d | nn.Conv2d) -> tuple[Tensor, tuple[int, int]]:
    """(weight, padding) of the same convolution with a window of 3x1 pixels, zero but for the middle."""
    rows, columns = layer.padding
    return F.pad(layer.weight.detach(), (0, 0, 1, 1)), (rows + layer.dilation[0], columns)


def _fits_weight_only(layer: nn.Module) -> bool:
    if not isinstance(layer, IntegerLinear) or layer.weight.shape[1] % BLOCKS[-1]:
        return False
    return grid.symmetric_bits(layer.weight) <= 4


class _FloatCodes(nn.Module):
    """The real numbers that the codes of ``x`` stand for, in float: narrow weights do not fuse after a Dequantize."""

    def __init__(self, entry: Quantize, ceiling: float | None):
        super().__init__()
        self.register_buffer("scale", entry.scale.clone())
        self.register_buffer("reciprocal", 1.0 / entry.scale)
        zero = int(entry.zero_point)
        self.lowest, self.highest = float(entry.quant_min - zero), float(entry.highest_below(ceiling) - zero)

    def forward(self, x: Tensor) -> Tensor:
        return torch.round(x * self.reciprocal).clamp(self.lowest, self.highest) * self.scale


class _WeightOnlyLinear(nn.Module):
    """Real numbers times integer weights, which stay [inputs, outputs] of INT4 in the file, plus a real bias."""

    def __init__(self, layer: IntegerLinear, entry: Quantize, rescale: Rescale):
        super().__init__()
        self.register_buffer("weight", layer.weight.t().contiguous())
        self.block = next(block for block in BLOCKS if layer.weight.shape[1] % block == 0)
        scale = (rescale.scale.to(torch.float64) / entry.scale.to(torch.float64)).to(torch.float32)
        rows = layer.weight.shape[1] // self.block
        self.register_buffer("weight_scale", scale.expand(rows, layer.weight.shape[0]).contiguous())
        # Subtracted: onnxruntime makes a Gemm of a product and an addition, and that does not always keep the weights.
        self.register_buffer("negative_bias", -(layer.bias.to(torch.float32) * rescale.scale))

    def forward(self, x: Tensor) -> Tensor:
        operands = (self.weight, self.weight_scale)
        weight = _op("DequantizeLinear", operands, torch.float32, self.weight, axis=0, block_size=self.block)
        shape = (*x.shape[:-1], weight.shape[-1])
        product = torch.onnx.ops.symbolic("MatMul", (x, weight), dtype=torch.float32, shape=shape, version=OPSET)
        return product - self.negative_bias


class _Activate(nn.Module):
    def __init__(self, relu: bool, ceiling: float | None):
        super().__init__()
        self.relu, self.ceiling = relu, ceiling

    def forward(self, x: Tensor) -> Tensor:
        if not self.relu:
            return x
        return F.relu(x) if self.ceiling is None else F.hardtanh(x, 0.0, self.ceiling)  # clamp(0, 6) fails to export


def _fit_windows(model) -> None:
    """Average poolings whose window exceeds the image (ceil_mode) get one that fits; OpenVINO takes no other.

    The mean is over what lies inside the image, so it stays what it was.
    """
    shapes = {v.name: v.type.tensor_type.shape.dim for v in model.graph.value_info}
    for node in model.graph.node:
        if node.op_type != "AveragePool" or node.input[0] not in shapes:
            continue
        options = {attribute.name: attribute for attribute in node.attribute}
        counts_padding = "count_include_pad" in options and options["count_include_pad"].i
        if counts_padding or ("pads" in options and any(options["pads"].ints)):
            continue
        sizes = [dim.dim_value for dim in shapes[node.input[0]][2:]]
        kernel = options["kernel_shape"].ints
        kernel[:] = [min(width, size) if size else width for width, size in zip(kernel, sizes, strict=True)]


def _keep_dimensions(model) -> None:
    """Reductions, and a Gather of one index, keep their dimensions, and a Squeeze after them drops these.

    OpenVINO takes the scales of a Linear past them as they are, and where a dimension is gone they meet another one.
    """
    from onnx import helper, numpy_helper

    constants = {initializer.name: initializer for initializer in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        options = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type.startswith("Reduce") and len(node.input) == 2 and "keepdims" in options:
            if options["keepdims"].i:
                continue
            options["keepdims"].i, axes = 1, node.input[1]
        elif node.op_type == "Gather" and node.input[1] in constants and not constants[node.input[1]].dims:
            name = node.output[0]
            index = numpy_helper.to_array(constants[node.input[1]]).reshape(1)
            axis = np.array([options["axis"].i if "axis" in options else 0])
            node.input[1], axes = f"{name}_index", f"{name}_axis"
            model.graph.initializer.append(numpy_helper.from_array(index, node.input[1]))
            model.graph.initializer.append(numpy_helper.from_array(axis, axes))
        else:
            continue
        (out,) = node.output
        node.output[0] = f"{out}_kept"
        nodes.append(helper.make_node("Squeeze", [node.output[0], axes], [out], f"{out}_squeeze"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _narrow_weights(model, two_bit: str) -> None:
    """Initializers of weights that 4 bits hold, from INT8 to what is as narrow, with nodes after it that widen it."""
    from onnx import TensorProto, numpy_helper

    graph = model.graph
    weights = {node.input[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    initializers, nodes = [], []
    for initializer in graph.initializer:
        if initializer.name not in weights or initializer.data_type != TensorProto.INT8:
            initializers.append(initializer)
            continue
        codes = torch.from_numpy(numpy_helper.to_array(initializer).copy())
        bits = grid.symmetric_bits(codes)
        if bits > 4:
            initializers.append(initializer)
            continue
        if any(attribute.name == "block_size" for attribute in weights[initializer.name].attribute):
            # These the runtime computes with as they are, and it knows no Cast between.
            narrow, widening = _in_a_narrow_type(initializer.name, codes, 4)
            weights[initializer.name].input[0], widening = narrow[0].name, []
        elif bits > 2 or two_bit == "int2":
            narrow, widening = _in_a_narrow_type(initializer.name, codes, 4 if bits > 2 else 2)
        else:
            narrow, widening = _in_bytes(initializer.name, codes, bits)
        initializers += [i for i in narrow if i.name not in {known.name for known in initializers}]
        nodes += widening
    if any(two_bit == "int2" and initializer.data_type == TensorProto.INT2 for initializer in initializers):
        _set_opset(model, OPSET_INT2)
    del graph.initializer[:]
    graph.initializer.extend(initializers)
    nodes.extend(graph.node)
    del graph.node[:]
    graph.node.extend(nodes)


def _in_a_narrow_type(name: str, codes: Tensor, bits: int):
    """(initializers, nodes) that give ``codes`` under ``name`` from ONNX's INT4 or INT2, in two's complement."""
    from onnx import TensorProto, helper

    narrow, each = f"{name}_int{bits}", 8 // bits
    digits = codes.numpy().reshape(-1).astype("uint8") & (2**bits - 1)
    digits = np.pad(digits, (0, -len(digits) % each)).reshape(-1, each)
    packed = np.bitwise_or.reduce(digits << (np.arange(each, dtype=np.uint8) * bits), axis=1)
    kind = getattr(TensorProto, f"INT{bits}")
    tensor = helper.make_tensor(narrow, kind, codes.shape, packed.tobytes(), raw=True)
    return [tensor], [helper.make_node("Cast", [narrow], [name], f"{name}_cast", to=TensorProto.INT8)]


def _in_bytes(name: str, codes: Tensor, bits: int):
    """(initializers, nodes) that give ``codes`` under ``name`` from the stream of :func:`grid.pack`, byte by byte."""
    from onnx import TensorProto, helper, numpy_helper

    low, _ = grid.bounds(bits, "symmetric")
    each = 8 // bits
    digits = (np.arange(256)[:, None] >> (np.arange(each) * bits)) & (2**bits - 1)
    constants = {
        f"codes_of_a_byte_{bits}": (digits * (2 if bits == 1 else 1) + low).astype(np.int8),  # [256, each]
        "flat": np.array([-1]),
        "start": np.array([0]),
        f"{name}_bytes": grid.pack(codes, bits).numpy(),
        f"{name}_count": np.array([codes.numel()]),
        f"{name}_shape": np.array(codes.shape),
    }
    table, flat, start, packed, count, shape = constants
    steps = (
        ("Cast", [packed], "indices", {"to": TensorProto.INT32}),
        ("Gather", [table, f"{name}_indices"], "gathered", {"axis": 0}),
        ("Reshape", [f"{name}_gathered", flat], "padded", {}),
        ("Slice", [f"{name}_padded", start, count], "sliced", {}),  # without the bits that fill the last byte
    )
    nodes = [
        helper.make_node(kind, inputs, [f"{name}_{out}"], f"{name}_{out}", **how) for kind, inputs, out, how in steps
    ]
    nodes.append(helper.make_node("Reshape", [f"{name}_sliced", shape], [name], f"{name}_reshape"))
    return [numpy_helper.from_array(array, key) for key, array in constants.items()], nodes


def _set_opset(model, version: int) -> None:
    """Between 21 and 25, ONNX's operators gained types and options, and changed nothing that was."""
    from onnx import helper

    for entry in model.opset_import:
        if entry.domain == "":
            entry.version = version
    model.ir_version = max(model.ir_version, helper.find_min_ir_version_for(model.opset_import))
