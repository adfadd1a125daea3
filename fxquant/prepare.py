"""prepare(): a float model to one that trains on the integers it will ship."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from . import cost
from ._torch_ao import QConfigMapping, deprecations_silenced, prepare_captured
from .computed import effective_weight
from .distributed import part_of
from .edges import place_edges, place_operand_edges, share_grids
from .errors import ConstantTensorError, EmptyDataError, NonFiniteError, SpecError, TraceError, named
from .estimators import Bits, Estimator, estimators_of
from .graph import called_module
from .grid import check_bits
from .hardware import has_vnni
from .layers import QATLayer
from .qconfig import QUANTIZABLE, edge_qconfig, get_backend_config, get_qat_qconfig
from .spec import RESIDUAL_BITS, Rule, get_backend, resolve_rules
from .trace import DIFFERENCE, OPAQUE, TRAINS_OTHERWISE, trace

# A squeeze needs the penalty of QATLoss, which plain torch.ao use does not have: only prepare() starts one.
_GRADUAL = {"gdnsq": {"initial_bits": 10.0}}


@dataclass
class PreparedInfo:
    """What prepare() decided, kept at ``model.meta["fxquant"]`` for freeze, convert, lower and the tables.

    Attributes:
        backend: name of the backend the graph was built for.
        rules: the rule each quantizable layer got, by name; ``None`` stays float.
        opaque: submodules that could not be captured, and layers called as functions whose weight is no parameter;
            all stay float; with the reason.
        capture_difference: of the captured graph from the model, relative to its largest output.
        costs: sizes of each quantized layer for one image.
        residual_bits: width of the tensors between layers.
        input_shape: [C, H, W] of the image it was traced with.
        vnni: whether the CPU that the graph is for multiplies 8-bit integers without intermediate saturation.
        calibration: the loader given to prepare(), which freeze() re-estimates BatchNorm from.
    """

    backend: str
    rules: dict[str, Rule | None]
    opaque: dict[str, str] = field(default_factory=dict)
    capture_difference: float = 0.0
    costs: dict[str, cost.LayerCost] = field(default_factory=dict)
    calibration: Iterable | None = None
    residual_bits: int = RESIDUAL_BITS
    input_shape: tuple[int, ...] = ()
    vnni: bool = True

    def widest(self, layer: nn.Module, weight_bits: int) -> dict[str, int]:
        """The widths of :func:`engine_limits` for a layer, with the backend and the CPU that the graph is for."""
        return engine_limits(layer, self.backend, weight_bits, vnni=self.vnni)[0]

    def __deepcopy__(self, memo: dict) -> PreparedInfo:
        """A copy of a model shares its loader: data are not part of it."""
        return dataclasses.replace(self, rules=dict(self.rules), opaque=dict(self.opaque), costs=dict(self.costs))


def prepared_info(model: nn.Module) -> PreparedInfo:
    """The record that prepare() left on a model.

    Raises:
        SpecError: for a model that :func:`prepare` did not make.
    """
    info = getattr(model, "meta", {}).get("fxquant")
    if info is None:
        raise SpecError(
            f"this {type(model).__name__} was not made by fxquant.prepare; a model prepared with torch.ao's own "
            "prepare_qat_fx converts with torch.ao's own convert_fx"
        )
    return info


def prepare(
    model: nn.Module,
    rules: Sequence[Rule],
    *,
    calibration: Iterable | None = None,
    example_inputs: tuple[Tensor, ...] | None = None,
    backend: str = "x86",
    residual_bits: int = RESIDUAL_BITS,
    vnni: bool | None = None,
) -> fx.GraphModule:
    """Trace ``model``, give every layer the quantizers its rule asks for, and set their ranges.

    The model itself is not modified. All Parameters exist when this returns. Layers compute on low-bit inputs;
    residual sums and concatenations are carried at ``residual_bits``. Where a layer reads the images themselves at 8
    bits, their range is what calibration set, and is not learned.

    Args:
        model: float model that takes image batches [N, C, H, W] and returns one tensor.
        rules: which layers get what; the first that matches a layer wins; layers without one stay float.
        calibration: iterable of batches (a tensor, or a tuple whose first item is one), from which activation
            ranges are set. ``None`` leaves them to be set by :func:`calibrate`, or by a checkpoint.
        example_inputs: arguments of one forward; taken from ``calibration`` when not given.
        backend: integer backend the trained graph is for; its profile (:class:`fxquant.spec.BackendSpec`) decides
            where tensors are rounded, and widths that its kernels would compute wrongly are reduced, with a warning.
        residual_bits: width of the tensors between layers.
        vnni: whether the CPU that the trained graph is for has VNNI instructions; an x86 CPU without them takes weights
            of 7 bits. None: as the CPU at hand.

    Raises:
        UnknownNameError: unknown backend.
        SpecError: no rule, no layer, nothing to trace with, or parameters of another type than torch's default.
        RuleError: a rule that matches no layer.
        TraceError: a model that cannot be captured (a submodule that cannot stays float, as one call), or a layer that
            is called more than once and whose calls would fuse with different things.
        EmptyDataError: a calibration iterable without a batch.
        NonFiniteError, ConstantTensorError: weights or activations that have no range, with the layer.
    """
    get_backend(backend)
    check_bits(residual_bits, "residual_bits")
    if isinstance(rules, Rule):
        rules = [rules]
    if calibration is not None and iter(calibration) is calibration:
        calibration = list(calibration)  # it can be read but once, and freeze will need it again
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    if not rules:
        raise SpecError("no rule was given, so no layer would be quantized; Rule('*', 4, 4) quantizes all of them")
    if example_inputs is None:
        if calibration is None:
            raise SpecError("prepare needs calibration data or example_inputs to trace the model with")
        example_inputs = (next(_images(calibration)),)
    _require_default_dtype(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    example_inputs = tuple(argument.to(device) for argument in example_inputs)
    traced = trace(model, example_inputs)
    layers = _quantizable_layers(traced)
    if not layers:
        raise SpecError(f"{type(model).__name__} has no Conv2d or Linear layer to quantize")
    vnni = has_vnni() if vnni is None else vnni
    resolved = _within_engine(resolve_rules(list(rules), list(layers)), layers, backend, vnni)
    for name, rule in resolved.items():
        if rule is not None and not rule.keeps_float:
            _check_weight(name, effective_weight(layers[name]))

    mapping = QConfigMapping().set_global(edge_qconfig(residual_bits))
    for name, rule in resolved.items():
        mapping.set_module_name(name, _qconfig_of(rule, residual_bits))
    for name, module in traced.named_modules():  # of nn.MultiheadAttention, of a submodule that is one call
        if isinstance(module, (nn.Conv2d, nn.Linear)) and name not in layers:
            mapping.set_module_name(name, None)
    opaque = traced.meta[OPAQUE]
    for name, reason in opaque.items():
        mapping.set_module_name(name, None)
        warnings.warn(f"kept in float, as one call: {reason}", stacklevel=2)
    if otherwise := traced.meta[TRAINS_OTHERWISE]:
        modules = named("module", [name or type(model).__name__ for name in otherwise])
        warnings.warn(
            f"{modules}: what is computed in training alone (stochastic depth, noise, a second head) is off in the "
            "prepared graph, in training too: a graph is captured in eval mode",
            stacklevel=2,
        )
    few = tuple(argument[:2] for argument in example_inputs)
    with torch.no_grad():
        captured = traced.eval()(*(argument.clone() for argument in few))
    repeated = _called_more_than_once(traced)
    with deprecations_silenced():
        config = get_backend_config(backend, captured=True)
        prepared = prepare_captured(traced.train(), mapping, example_inputs, config)
    profile = get_backend(backend)
    place_edges(prepared, profile)
    share_grids(prepared)
    if profile.multiplies_activations:
        place_operand_edges(prepared, residual_bits)
    _hold_image_ranges(prepared)
    for name, module in prepared.named_modules():
        if isinstance(module, Estimator):
            module.where, module.output_is_kept = name, True  # what is captured writes over nothing
    info = PreparedInfo(backend, resolved, opaque, traced.meta[DIFFERENCE], calibration=calibration)
    info.residual_bits, info.input_shape, info.vnni = residual_bits, tuple(example_inputs[0].shape[1:]), vnni
    prepared.meta["fxquant"] = info
    if calibration is not None:
        calibrate(prepared, calibration)
    # Sizes are read off a float forward: quantizers may not have ranges yet.
    with _quantizers_bypassed(prepared):
        info.costs = cost.measure_costs(prepared, example_inputs)
        _require_same(prepared, few, captured, repeated)
    return prepared.train(model.training)


def _called_more_than_once(traced: fx.GraphModule) -> list[str]:
    modules = dict(traced.named_modules(remove_duplicate=False))
    called = [node.target for node in traced.graph.nodes if isinstance(called_module(node, modules), QUANTIZABLE)]
    return sorted({name for name in called if called.count(name) > 1})


@torch.no_grad()
def _require_same(prepared: fx.GraphModule, images: tuple[Tensor, ...], captured: Tensor, repeated: list[str]) -> None:
    """Raises :class:`TraceError` where the prepared graph, not quantizing, computes something else than the captured.

    torch.ao fuses a layer with the normalisation and the activation behind one of its calls, for all of them.
    """
    found = prepared.eval()(*images)
    if torch.allclose(found, captured, rtol=1e-4, atol=1e-5, equal_nan=True):
        return
    what = "fusing layers with what follows them changed what the model computes"
    if repeated:
        what = (
            f"{named('layer', repeated)} called more than once, with different normalisations or activations behind "
            "the calls, which fusing gives to all of them alike; give each call a layer of its own"
        )
    raise TraceError(f"{what} (by up to {(found - captured).abs().max():.3g} before anything is quantized)")


def spread_constant_weights(model: nn.Module) -> None:
    """Random values, in place, for weights that are one number (classifiers that begin at 0), which prepare refuses:
    for a model whose structure is all that matters, or whose weights come later."""
    with torch.random.fork_rng(), torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.min() == parameter.max():
                parameter.normal_()


def calibrate(model: nn.Module, batches: Iterable, max_batches: int = 16) -> None:
    """Set the ranges of all activation quantizers from up to ``max_batches`` batches, in float.

    Raises:
        EmptyDataError, NonFiniteError, ConstantTensorError: with the layer's name.
    """
    activations, weights = _estimators_by_kind(model)
    training = model.training
    model.eval()
    for estimator in weights:
        estimator.disable_fake_quant()
    for estimator in activations:
        estimator.start_calibration()
    try:
        device = next(model.parameters()).device
        with torch.no_grad():
            for index, images in enumerate(_images(batches)):
                if index == max_batches:
                    break
                model(part_of(images).to(device))
        for estimator in activations:
            estimator.pool_calibration()
        for name, layer in cost.qat_layers(model).items():
            observer = layer.input_fake_quant._observer
            if observer.empty:
                raise EmptyDataError(f"layer {name!r} was never reached by the calibration data")
            observer.require_varying(f"the input of layer {name!r}")
    finally:
        for estimator in activations:
            estimator.finish_calibration()
        for estimator in weights:
            estimator.enable_fake_quant()
        model.train(training)


def _estimators_by_kind(model: nn.Module) -> tuple[list[Estimator], list[Estimator]]:
    """(activation quantizers, weight quantizers)."""
    weights = [m.weight_fake_quant for m in model.modules() if isinstance(m, QATLayer)]
    known = {id(w) for w in weights}
    return [e for e in estimators_of(model) if id(e) not in known], weights


class _quantizers_bypassed:
    """Context: all fake quantization off, flags restored at the end."""

    def __init__(self, model: nn.Module):
        self.estimators = estimators_of(model)

    def __enter__(self):
        self.before = [(e._fake_quantize, e._observe) for e in self.estimators]
        for estimator in self.estimators:
            estimator.disable_fake_quant()
            estimator.disable_observer()

    def __exit__(self, *exc):
        for estimator, (fake_quantize, observe) in zip(self.estimators, self.before, strict=True):
            estimator.enable_fake_quant(fake_quantize)
            estimator.enable_observer(observe)


def _images(batches: Iterable) -> Iterator[Tensor]:
    """The image tensor of each batch.

    Raises:
        EmptyDataError: where there is no batch at all.
    """
    empty = True
    for batch in batches:
        empty = False
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        if not isinstance(images, Tensor) or not len(images):
            found = f"a {type(images).__name__}" if not isinstance(images, Tensor) else "an empty tensor"
            raise EmptyDataError(
                f"a batch of the calibration data is {found}; batches are image tensors, or tuples that begin with one"
            )
        yield images
    if empty:
        raise EmptyDataError(
            "the calibration data yielded no batch; pass a loader (not an exhausted iterator) with at least one, "
            "and mind drop_last when the data set is smaller than the batch"
        )


def _require_default_dtype(model: nn.Module) -> None:
    dtype = torch.get_default_dtype()
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            raise SpecError(
                f"{name!r} is {parameter.dtype}, while quantizers compute in torch's default, {dtype}; call "
                f"model.to({dtype}) first. To train in 16 bits, train under torch.autocast"
            )


def _quantizable_layers(traced: fx.GraphModule) -> dict[str, nn.Module]:
    """Conv2d and Linear modules that the graph calls, by name, in graph order."""
    modules = dict(traced.named_modules())
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    return {name: modules[name] for name in called if type(modules[name]) in QUANTIZABLE}


def _check_weight(name: str, weight: Tensor) -> None:
    if not torch.isfinite(weight).all():
        raise NonFiniteError(
            f"the weight of layer {name!r} holds {int((~torch.isfinite(weight)).sum())} NaN or infinite values; "
            "load a sound checkpoint"
        )
    if weight.numel() > 1 and weight.min() == weight.max():
        raise ConstantTensorError(
            f"the weight of layer {name!r} is {weight.flatten()[0].item():g} everywhere, so there is no range to "
            "quantize; load trained weights, or keep the layer float with Rule(name, None, None)"
        )


def _qconfig_of(rule: Rule | None, residual_bits: int):
    if rule is None or rule.keeps_float:
        return None
    return get_qat_qconfig(
        rule.estimator,
        rule.weight_bits,
        rule.activation_bits,
        per_channel=rule.per_channel,
        init=rule.init,
        residual_bits=residual_bits,
        options={**_GRADUAL.get(rule.estimator, {}), **rule.options},
    )


def engine_limits(layer: nn.Module, backend: str, weight_bits: int, *, vnni: bool) -> tuple[dict[str, int], str]:
    """Widest weight and activation that a backend's kernels compute rightly for a layer, and why it is not 8 bits.

    Args:
        weight_bits: that the weight is to have: some kernels overflow only where both operands are wide.
        vnni: as in :func:`prepare`.
    """
    profile = get_backend(backend)
    widest = {"weight_bits": 8, "activation_bits": 8}
    reason = ""
    if profile.saturates_without_vnni and not vnni:
        widest["weight_bits"], reason = 7, "without VNNI instructions sums of two products saturate at 16 bits"
    depthwise = getattr(layer, "groups", 1) > 1 and layer.groups == layer.in_channels
    if depthwise and weight_bits == widest["weight_bits"] == 8 > profile.depthwise_bits:
        widest["activation_bits"] = profile.depthwise_bits
        reason = f"{backend}'s depthwise kernels saturate at 16 bits"
    return widest, reason


def _within_engine(
    rules: dict[str, Rule | None], layers: dict[str, nn.Module], backend: str, vnni: bool
) -> dict[str, Rule | None]:
    """The rules, reduced where the kernels of the profile would overflow; with one warning for each reason."""
    found: dict[tuple[str, str], list[str]] = {}
    within = dict(rules)
    for name, rule in rules.items():
        if rule is None or rule.keeps_float:
            continue
        widest, reason = engine_limits(layers[name], backend, _highest(rule.weight_bits), vnni=vnni)
        for field_name, bits in widest.items():
            asked = getattr(rule, field_name)
            if _highest(asked) > bits:
                found.setdefault((f"{field_name}={asked} becomes {bits} at most", reason), []).append(name)
                reduced = bits if isinstance(asked, int) or asked[0] >= bits else (asked[0], bits)
                within[name] = dataclasses.replace(within[name], **{field_name: reduced})
    for (change, reason), names in found.items():
        warnings.warn(f"{named('layer', names)}: {change}: {reason}", stacklevel=3)
    return within


def _highest(bits: Bits) -> int:
    return bits if isinstance(bits, int) else bits[1]


def _hold_image_ranges(prepared: fx.GraphModule) -> None:
    """Where a layer reads the network's input at 8 bits, calibration alone sets the range.

    What training could change there is how 256 levels lie on images that stay as they are. To learn it, backward would
    have to compute the gradient of the images, an eighth of a training step of resnet18.
    """
    modules = dict(prepared.named_modules())
    for node in prepared.graph.find_nodes(op="placeholder"):
        for user in node.users:
            layer = called_module(user, modules)
            if isinstance(layer, QATLayer) and layer.input_fake_quant is not None and layer.input_fake_quant.bits == 8:
                layer.input_fake_quant.hold_range()
