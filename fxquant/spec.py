"""What a user asks for, as frozen dataclasses that validate themselves: rules, budgets, backends."""

from __future__ import annotations

import fnmatch
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import RuleError, SpecError, UnknownNameError, did_you_mean
from .estimators import Bits, check_width, get_estimator
from .estimators.base import Estimator
from .ranges import METHODS

_POSITIONS = "first", "last"
RESIDUAL_BITS = 8
"""Width of what flows between layers (residual sums, concatenations), unless a rule says otherwise."""


@dataclass(frozen=True)
class Rule:
    """How the layers whose name matches are quantized. Of several rules, the first that matches wins.

    Args:
        pattern: layer names, as globs separated by ``|`` (``"conv1|layer*.conv2"``), or ``re:`` and a regular
            expression that must match the whole name. ``first`` and ``last`` as an alternative mean the first
            and the last quantizable layer of the graph.
        weight_bits: whole width 1-8, (lowest, highest) for a learned width, or ``None`` to keep the layer float.
        activation_bits: the same for the tensor that enters the layer; ``None`` exactly when weight_bits is.
        estimator: name of the gradient estimator.
        per_channel: one scale per output channel of the weight (default), or one for the whole weight.
        init: range initialisation: ``mse``, ``minmax`` or ``percentile``.
        options: the estimator's own options, by name.

    Raises:
        SpecError, UnknownNameError: at construction, for anything that cannot be honoured.
    """

    pattern: str
    weight_bits: Bits | None = 8
    activation_bits: Bits | None = 8
    estimator: str = "lsq"
    per_channel: bool = True
    init: str = "mse"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if (self.weight_bits is None) != (self.activation_bits is None):
            raise SpecError(
                f"rule {self.pattern!r}: weight_bits={self.weight_bits!r} with activation_bits="
                f"{self.activation_bits!r}; integer kernels need both, a float layer neither (None and None)"
            )
        if self.weight_bits is not None:
            object.__setattr__(self, "weight_bits", check_width(self.weight_bits, "weight_bits"))
            object.__setattr__(self, "activation_bits", check_width(self.activation_bits, "activation_bits"))
        if self.init not in METHODS:
            raise UnknownNameError("range initialisation", self.init, METHODS)
        check_options(self.estimator, self.options)
        for bits in (self.weight_bits, self.activation_bits):
            try:
                get_estimator(self.estimator)(8 if bits is None else bits, **self.options)
            except TypeError as error:
                raise SpecError(
                    f"rule {self.pattern!r}: the options {dict(self.options)} do not fit the estimator "
                    f"{self.estimator!r} ({error})"
                ) from None
        if self.pattern.startswith("re:"):
            try:
                re.compile(self.pattern[3:])
            except (re.error, OverflowError, RecursionError) as error:
                raise SpecError(f"rule {self.pattern!r}: not a regular expression ({error})") from None

    @property
    def keeps_float(self) -> bool:
        return self.weight_bits is None

    def matches(self, layer: str, positions: Sequence[str] = ()) -> bool:
        """Whether the rule is for the layer of that name; ``positions`` may hold ``first`` and ``last``."""
        return any(_matches(part, layer, positions) for part in self.alternatives())

    def alternatives(self) -> list[str]:
        """The globs of the pattern; a regular expression is one."""
        return [self.pattern] if self.pattern.startswith("re:") else self.pattern.split("|")


def exactly(layer: str) -> str:
    """A pattern that matches the layer of that name and no other, also where it is a position or has a glob in it."""
    special = layer in _POSITIONS or layer.startswith("re:") or any(character in layer for character in "*?[|")
    return f"re:{re.escape(layer)}" if special else layer


def _matches(part: str, layer: str, positions: Sequence[str]) -> bool:
    if part.startswith("re:"):
        return re.fullmatch(part[3:], layer) is not None
    return part in positions or fnmatch.fnmatchcase(layer, part)


def resolve_rules(rules: list[Rule], layers: list[str]) -> dict[str, Rule | None]:
    """Which rule each layer gets: the first that matches, or ``None`` (float) where none does.

    Raises:
        RuleError: where a rule matches no layer at all, with the nearest layer names.
    """
    positions: dict[str, tuple[str, ...]] = {}
    for position, layer in zip(_POSITIONS, (layers[0], layers[-1]), strict=True) if layers else ():
        positions[layer] = (*positions.get(layer, ()), position)
    resolved = {
        layer: next((rule for rule in rules if rule.matches(layer, positions.get(layer, ()))), None) for layer in layers
    }
    for rule in rules:
        for part in rule.alternatives():
            if not any(_matches(part, layer, positions.get(layer, ())) for layer in layers):
                of = "" if part == rule.pattern else f" of the rule {rule.pattern!r}"
                raise RuleError(
                    f"rule {part!r}{of} matches no quantizable layer (Conv2d or Linear) of this model; "
                    + did_you_mean(part, layers)
                )
    return resolved


def check_options(estimator: str, options: Mapping[str, Any]) -> None:
    """Raises where ``options`` names one that the estimator does not have."""
    own = inspect.signature(get_estimator(estimator).__init__).parameters
    known = [n for n in own if n not in ("self", "bits", "options")]
    known += [n for n in inspect.signature(Estimator.__init__).parameters if n in ("percentile",)]
    for name in options:
        if name not in known:
            raise UnknownNameError(f"option of the estimator {estimator!r}", name, known)


@dataclass(frozen=True)
class Budget:
    """Upper bounds that the whole widths must keep to. A field that is ``None`` does not bind.

    Args:
        mean_weight_bits: mean over all quantized weights, by number of elements.
        mean_activation_bits: mean over all quantized layer inputs, by number of elements per image.
        bops: bit operations per image, the sum over layers of MACs x weight bits x activation bits.
        weight_bytes: bytes of all parameters as they ship (:func:`fxquant.cost.ideal_weight_bytes`).
    """

    mean_weight_bits: float | None = None
    mean_activation_bits: float | None = None
    bops: float | None = None
    weight_bytes: float | None = None

    def __post_init__(self):
        for name, value in vars(self).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < math.inf):
                raise SpecError(f"budget {name}={value!r} was asked for; it must be above 0 and finite")

    def __bool__(self) -> bool:
        return any(value is not None for value in vars(self).values())


def check_count(value: int, what: str) -> int:
    """``value``, if it is a whole number from 1.

    Raises:
        SpecError: otherwise.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SpecError(f"{what}={value!r} was asked for; it must be a whole number from 1")
    return value


@dataclass(frozen=True)
class BackendSpec:
    """The profile of what can run the integers: it shapes the graph that trains, so that it is the one deployed.

    Args:
        name: torch's name of a quantized engine, or of a runtime that reads a file.
        agreement: the least share of images, in per cent, on which the lowered model's argmax must be that of the
            reference for :func:`fxquant.verify` to accept it.
        reads_onnx: whether it is a runtime that reads what :func:`fxquant.export_onnx` writes.
        compiles: whether it is torch's compiler, which takes the exported program.
        adds_in_layer: whether the kernel of a layer adds a residual before it rounds. Then the layer's result goes
            into the addition as it is; elsewhere both operands lie on the 8-bit grid.
        float_convolutions: whether its integer convolutions can give a float result. Else what float operators read of
            one lies on the 8-bit grid, as the convolution itself would run in float.
        multiplies_activations: whether it multiplies two tensors of activations (attention) on integers. Then both lie
            on the 8-bit grid; elsewhere the product is float.
        depthwise_bits: widest activations that its depthwise convolutions compute rightly with 8-bit weights.
        saturates_without_vnni: whether, on an x86 CPU without VNNI instructions, its kernels add pairs of products in
            16 bits, which 8-bit weights overflow.
    """

    name: str
    agreement: float
    reads_onnx: bool = False
    compiles: bool = False
    adds_in_layer: bool = False
    float_convolutions: bool = True
    multiplies_activations: bool = False
    depthwise_bits: int = 8
    saturates_without_vnni: bool = True


BACKENDS: dict[str, BackendSpec] = {
    spec.name: spec
    for spec in (
        BackendSpec("x86", agreement=99.9, adds_in_layer=True),
        BackendSpec("onednn", agreement=99.9, adds_in_layer=True),
        BackendSpec("inductor", agreement=99.9, compiles=True, adds_in_layer=True),  # with onednn's kernels
        # Its 3x3 depthwise kernel adds in 16 bits whatever the CPU: up to 200 codes off at full 8 bits.
        BackendSpec("fbgemm", agreement=99.9, float_convolutions=False, depthwise_bits=7),
        # qnnpack rounds a requantized value up or down by one code in 0.1-0.3 % of outputs even at 8 bits.
        BackendSpec("qnnpack", agreement=98.0, float_convolutions=False, saturates_without_vnni=False),
        BackendSpec("onnxruntime", agreement=99.9, reads_onnx=True, float_convolutions=False),
        BackendSpec("openvino", agreement=99.9, reads_onnx=True, adds_in_layer=True, multiplies_activations=True),
    )
}


def get_backend(name: str) -> BackendSpec:
    """The backend of that name.

    Raises:
        UnknownNameError: with the nearest names.
    """
    try:
        return BACKENDS[name]
    except KeyError:
        raise UnknownNameError("backend", name, BACKENDS) from None
