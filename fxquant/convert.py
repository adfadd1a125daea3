"""convert(): a frozen model to the reference integer graph, in explicit integer operators."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence

from torch import Tensor, fx, nn

from .errors import CheckpointError, NotFrozenError
from .estimators import Estimator
from .freeze import freeze_scales
from .graph import called_module
from .integer import Dequantize, Quantize
from .layers import QATLayer
from .prepare import prepare, prepared_info, spread_constant_weights
from .spec import Rule
from .trace import copy_of

SOURCE = "fxquant_source"
"""Key of a reference node's ``meta``: the name of the prepared graph's node that computes the same tensor."""


def convert(model: fx.GraphModule) -> fx.GraphModule:
    """The reference integer graph of a frozen model; the model itself is left as it is.

    Each layer becomes three nodes: :class:`~fxquant.integer.Quantize` (to uint8 at the layer's own width),
    :class:`~fxquant.integer.IntegerConv2d` or ``IntegerLinear`` (uint8 x int8 + int32 bias -> int32) and
    :class:`~fxquant.integer.Rescale` (to float32). Each edge becomes ``Quantize`` and ``Dequantize``. All else is
    float, as it was in training. The result equals the frozen model bit for bit.

    Raises:
        NotFrozenError: before :func:`fxquant.freeze`.
    """
    info = prepared_info(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    quantized = [m for m in modules.values() if isinstance(m, (QATLayer, Estimator))]
    if not all(m.frozen if isinstance(m, QATLayer) else m._frozen for m in quantized):
        raise NotFrozenError(
            "convert was asked for while quantizers still train; call fxquant.freeze(model, budget) first"
        )
    root = nn.Module()
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}

    flat_names: dict[tuple[str, str], str] = {}

    def flatten(name: str, part: str = "") -> str:
        """``name`` without dots, of a part of a layer with ``_part`` behind it; one that is taken gets underscores."""
        if (name, part) not in flat_names:
            flat, taken = name.replace(".", "_") + (part and f"_{part}"), set(flat_names.values())
            while flat in taken:
                flat += "_"
            flat_names[name, part] = flat
        return flat_names[name, part]

    def call(name: str, part: str, module: nn.Module, argument: fx.Node) -> fx.Node:
        flat = flatten(name, part)
        if not hasattr(root, flat):
            root.add_module(flat, module)
        return graph.create_node("call_module", flat, (argument,), name=flat)

    for node in model.graph.nodes:
        module = called_module(node, modules)
        if isinstance(module, QATLayer):
            form = copy.deepcopy(module.integer_form())
            entry = env[node.args[0]]
            # Those of the edge it reads, or its own.
            codes = entry.args[0] if module.input_is_quantized else call(node.target, "quantize", form.quantize, entry)
            sums = call(node.target, "integer", form.layer, codes)
            env[node] = call(node.target, "rescale", form.rescale, sums)
            env[node].meta[SOURCE] = node.name
        elif isinstance(module, Estimator):
            scale, zero = module.calculate_qparams()
            entry = Quantize(scale, zero, module.quant_min, module.quant_max)
            codes = call(node.target, "quantize", entry, env[node.args[0]])
            env[node] = call(node.target, "dequantize", Dequantize(scale, zero), codes)
            env[node].meta[SOURCE] = node.name
        elif module is not None:
            env[node] = graph.node_copy(node, env.__getitem__)
            env[node].target = flatten(node.target)
            env[node].meta[SOURCE] = node.name
            if not hasattr(root, env[node].target):
                root.add_module(env[node].target, copy.deepcopy(module))
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
            if node.op == "get_attr":
                env[node].target = flatten(node.target)
                if not hasattr(root, env[node].target):
                    root.register_buffer(env[node].target, operator.attrgetter(node.target)(model).detach().clone())
            env[node].meta[SOURCE] = node.name
    graph.lint()
    reference = fx.GraphModule(root, graph, f"{type(model).__name__}Reference")
    reference.meta["fxquant"] = copy.copy(info)
    return reference.eval().requires_grad_(False)


def blank_reference(
    model: nn.Module, rules: Sequence[Rule], example: Tensor, *, backend: str, residual_bits: int
) -> fx.GraphModule:
    """A reference graph with the structure that ``model`` gets by these arguments of prepare, to load tensors into.

    Its values mean nothing; those of ``model`` do not matter.
    """
    model = copy_of(model)
    spread_constant_weights(model)
    options = {"backend": backend, "residual_bits": residual_bits, "vnni": True}  # the rules' widths, on any CPU
    prepared = prepare(model, rules, example_inputs=(example,), **options)
    for module in prepared.modules():
        if isinstance(module, Estimator):
            module.initialized.fill_(1)  # shapes are all that matters
            module._read_flags()
    freeze_scales(prepared.eval())
    return convert(prepared)


def load_tensors(reference: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Put ``tensors`` into ``reference``, all of them, nothing else.

    Args:
        what: begins the message: ``"x.fxq does not fit the model"``.

    Raises:
        CheckpointError: names, shapes or dtypes that differ.
    """
    expected = reference.state_dict()
    wrong = [name for name in {*expected, *tensors} if name not in expected or name not in tensors]
    wrong += [name for name in expected if name in tensors and not _alike(expected[name], tensors[name])]
    if wrong:
        raise CheckpointError(
            f"{what}: {len(wrong)} tensors are missing, unexpected or of another shape or type, {sorted(wrong)[0]!r} "
            "among them"
        )
    reference.load_state_dict(tensors)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype
