"""The contract of every estimator, and the learned step that most of them share."""

from __future__ import annotations

import math
import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import grid, ranges
from .._torch_ao import FakeQuantizeBase
from ..distributed import mean_gradient
from ..errors import SpecError
from ..schedule import Schedule
from .functions import BinaryFunction, ClampFunction, StraightThroughFunction

Bits = int | tuple[int, int]

SMALLEST_RANGE = torch.finfo(torch.float32).tiny * 2**16  # at 16 bits, with which GDNSQ may start, 1/s is finite


def check_width(bits: Bits, what: str = "bits") -> Bits:
    """A whole width from 1 to 8, or a pair (lowest, highest) of such for a width that is learned."""
    if not isinstance(bits, (tuple, list)):
        return grid.check_bits(bits, what)
    low, high = check_interval(bits, what)
    if low == high:
        raise SpecError(f"{what}={bits!r} was asked for; the lowest width must be below the highest")
    return low, high


def check_interval(bits: tuple[int, int], what: str = "bits") -> tuple[int, int]:
    """A pair (lowest, highest) of whole widths from 1 to 8, which may be equal."""
    if not isinstance(bits, (tuple, list)) or len(bits) != 2:
        raise SpecError(f"{what}={bits!r} was asked for; an interval of widths is a pair (lowest, highest)")
    low, high = (grid.check_bits(b, what) for b in bits)
    if low > high:
        raise SpecError(f"{what}={bits!r} was asked for; the lowest width must be below the highest")
    return low, high


def rounded_up(width: float, bits: Bits) -> int:
    """The whole width that a learned one becomes, inside of what its rule allows; a millionth above one is rounding."""
    lowest, highest = bits if isinstance(bits, tuple) else (bits, bits)
    return min(max(math.ceil(width - 1e-6), lowest), highest)


def at_least_zero(value: float, what: str) -> float:
    """``value`` as a float, if it is a finite number that is not negative.

    Raises:
        SpecError: otherwise.
    """
    if not 0 <= value <= sys.float_info.max:
        raise SpecError(f"{what}={value!r} was asked for; it must be at least 0 and finite")
    return float(value)


class Estimator(FakeQuantizeBase):
    """Quantizes and dequantizes a tensor, and says how gradients pass through.

    What every estimator keeps to:

    * ``forward`` in eval is ``dequantize(quantize(x))`` on the grid of :mod:`fxquant.grid`: idempotent, codes
      inside ``[quant_min, quant_max]``, with the very scale and zero-point of :meth:`calculate_qparams`.
    * Every Parameter exists with its final shape after ``__init__``; ranges are set in place by the first data
      seen (or by :meth:`start_calibration` ... :meth:`finish_calibration`).
    * All state is in ``state_dict``: parameters, whole width, flags. Strings and options come from the recipe.

    Args:
        bits: whole width 1-8, or (lowest, highest) for a width that is learned (where the estimator can).
        scheme: ``symmetric`` (weights), ``one_sided``, ``affine``, or ``auto``: one-sided when the calibration
            data are non-negative, else affine.
        channels: number of scales; 1 quantizes the tensor as a whole.
        axis: the channel axis where ``channels > 1``.
        per_channel: on the quantizer of a weight in a QConfig: whether the layer shall give it one scale per
            output channel (through ``channels`` and ``axis``, once it knows their number).
        init: range initialisation, ``mse``, ``minmax`` or ``percentile``.
        percentile: share of values, in per cent, inside the range for ``init="percentile"``.
        layer_input: on the quantizer that torch.ao places on an edge: constructor of the one that the layer
            places on its own input (see :mod:`fxquant.qconfig`).
        factory_kwargs: accepted because torch.ao passes it; must be empty or carry only ``device``.

    Raises:
        SpecError: for a width, scheme or option that cannot be honoured.
    """

    name: ClassVar[str]
    can_learn_width: ClassVar[bool] = False
    learns_zero_point: ClassVar[bool] = True
    regularizes_batches: ClassVar[bool] = False  # whether regularizer() is of what the last forward saw

    def __init__(
        self,
        bits: Bits = 8,
        *,
        scheme: str = "auto",
        channels: int = 1,
        axis: int | None = None,
        per_channel: bool = False,
        init: str = "mse",
        percentile: float = 99.99,
        layer_input: Callable[[], Estimator] | None = None,
        factory_kwargs: dict | None = None,
    ):
        super().__init__()
        self.bits = check_width(bits)
        if isinstance(self.bits, tuple) and not self.can_learn_width:
            raise SpecError(
                f"bits={bits!r} asks the estimator {self.name!r} to learn its width, which it cannot; "
                "give one whole number, or use 'nipq' or 'gdnsq'"
            )
        if scheme not in (*grid.SCHEMES, "auto"):
            raise SpecError(f"scheme={scheme!r} was asked for; known: {', '.join(grid.SCHEMES)}, auto")
        if init not in ranges.METHODS:
            raise SpecError(f"init={init!r} was asked for; known: {', '.join(ranges.METHODS)}")
        if not 0 < percentile <= 100:
            raise SpecError(f"percentile={percentile!r} was asked for; it must be above 0 and at most 100")
        if channels > 1 and axis is None:
            raise SpecError(f"channels={channels} was asked for without the axis they lie along")
        self.scheme, self.channels, self.init, self.percentile = scheme, channels, init, percentile
        self.per_channel = per_channel
        self.axis = axis if channels > 1 else None
        self.layer_input = layer_input
        self.where = "a quantizer"  # the tensor's name in messages; prepare() sets it
        self.output_is_kept = False  # whether nothing writes over an output, which backward reads; prepare() sees to it
        self.may_refit = False  # whether an eval forward sees training data (freeze sets it)
        self._observer: ranges.RangeObserver | None = None
        self._calibrating = False
        self._holds_range = False

        device = (factory_kwargs or {}).get("device")
        flag = torch.zeros(1, dtype=torch.uint8, device=device)
        self.register_buffer("initialized", flag.clone())
        self.register_buffer("one_sided", flag + (scheme == "one_sided"))
        self.register_buffer("width", torch.full((1,), float(self._first_whole_width()), device=device))
        self.register_buffer("width_fixed", flag + (not isinstance(self.bits, tuple)))
        # Set where the width changes in training: the next tensor seen sets the range of the new grid.
        self.register_buffer("refit", flag.clone())
        self.register_buffer("frozen", flag.clone())
        self.register_buffer("frozen_scale", torch.ones(channels, device=device))
        self.register_buffer("frozen_zero_point", torch.zeros(channels, device=device))
        self._device = device
        if scheme in ("auto", "affine"):
            # The zero-point as a share of the grid: z = round(fraction * levels) contains 0 by construction
            # and survives a change of width. Unused (no gradient) once the range proves one-sided.
            self.zero_fraction = nn.Parameter(torch.zeros(channels, device=device))
        else:
            self.zero_fraction = None
        self._read_flags()

    # ---- what a subclass defines -------------------------------------------------------------------------

    @abstractmethod
    def scale(self) -> Tensor:
        """The step of the grid, [channels], with the gradients of what is learned."""

    @abstractmethod
    def train_forward(self, x: Tensor) -> Tensor:
        """The forward of training mode, with the estimator's own gradient."""

    @abstractmethod
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Take over a measured range, each [channels], with low <= 0 <= high."""

    def bit_width(self) -> Tensor:
        """Width in bits, [1] or [channels]; with gradient where it is learned. The one definition of it."""
        return self.width

    def schedules(self, total_steps: int) -> dict[str, Schedule]:
        """Attributes that :class:`fxquant.Controller` sets at every step, as functions of the step."""
        return {}

    @classmethod
    def regularizer(cls, estimators: Sequence[Estimator], task_loss: Tensor) -> Tensor | None:
        """What the estimators of this class in a model add to the training objective, if anything.

        Args:
            estimators: all those of this class whose ranges are set.
            task_loss: running mean of the task loss, detached, for terms that scale with it.
        """
        return None

    # ---- width, range and qparams ------------------------------------------------------------------------

    def _first_whole_width(self) -> int:
        return self.bits if isinstance(self.bits, int) else self.bits[1]

    @property
    def scales_gradients(self) -> bool:
        """Whether the gradient to x is no linear function of that to the output, so that the mean of several is not
        that of their mean."""
        return False

    @property
    def learns_width(self) -> bool:
        """Whether the width is still a learned quantity."""
        return not self._width_fixed

    @property
    def settled(self) -> bool:
        """Whether :meth:`fix_width` has nothing left to do: the width is whole and training rounds truly."""
        return not self.learns_width

    @property
    def whole_bits(self) -> int:
        """The whole width that quantization uses at this moment."""
        return self._bits

    @property
    def grid_scheme(self) -> str:
        """``scheme`` with ``auto`` resolved by what was observed."""
        if self.scheme == "auto":
            return "one_sided" if self._one_sided else "affine"
        return self.scheme

    @property
    def binary(self) -> bool:
        return grid.is_binary(self.whole_bits, self.grid_scheme)

    @property
    def quant_min(self) -> int:
        return grid.bounds(self.whole_bits, self.grid_scheme)[0]

    @property
    def quant_max(self) -> int:
        return grid.bounds(self.whole_bits, self.grid_scheme)[1]

    def zero_point(self, levels: Tensor | float | None = None) -> Tensor:
        """Integer zero-point as a float tensor [channels]; straight-through gradient to ``zero_fraction``.

        ``levels`` is the number of steps of the grid, ``quant_max - quant_min`` when not given.
        """
        if self._frozen:
            return self.frozen_zero_point
        if self.zero_fraction is None or self.grid_scheme != "affine":
            return self.frozen_zero_point  # zeros: the grid is symmetric or one-sided
        levels = self.quant_max - self.quant_min if levels is None else levels
        return grid.round_straight_through(self._zero_share() * levels)

    def _zero_share(self) -> Tensor:
        """``zero_fraction`` in [0, 1]; one that has left it gets the gradients that bring it back."""
        return ClampFunction.apply(self.zero_fraction, 0.0, 1.0)

    def step(self) -> Tensor:
        """The step that forward uses, [channels]: the frozen one bit for bit, else :meth:`scale`."""
        return self.frozen_scale if self._frozen else self.scale()

    def calculate_qparams(self, **kwargs) -> tuple[Tensor, Tensor]:
        """Scale (float32 [channels]) and zero-point (int32 [channels]), exactly those that forward uses."""
        with torch.no_grad():
            return self.step().detach().clone(), self.zero_point().to(torch.int32)

    def fix_width(self, bits: int) -> None:
        """From now on quantize at ``bits`` whole bits, without noise; the range stays and may go on learning."""
        bits = grid.check_bits(bits)
        with torch.no_grad():
            low, high = self.range()
            self.width.fill_(bits)
            self.width_fixed.fill_(1)
            self._read_flags()
            self.set_range(low, high)

    def change_width(self, bits: int) -> None:
        """In training, go on at ``bits`` whole bits; noise stays as it is, and the next tensor seen sets the range."""
        self.width.fill_(grid.check_bits(bits))
        self.refit.fill_(1)
        self._read_flags()

    def hold_range(self) -> None:
        """Let calibration alone set the range: nothing of this quantizer is learned."""
        self._holds_range = True
        self.requires_grad_(False)

    def range(self) -> tuple[Tensor, Tensor]:
        """Lower and upper end of what the grid represents, each [channels]."""
        step, zero = self.step(), self.zero_point()
        return (self.quant_min - zero) * step, (self.quant_max - zero) * step

    def freeze(self) -> None:
        """Fix the width if need be, then fix scale and zero-point for good: what converts, bit for bit."""
        self.require_initialized()
        if self._frozen:
            return
        if self.learns_width:
            self.fix_width(rounded_up(float(self.bit_width().detach().max()), self.bits))
        with torch.no_grad():
            self.frozen_scale.copy_(self.scale())
            self.frozen_zero_point.copy_(self.zero_point())
        self.frozen.fill_(1)
        self.refit.zero_()
        self._read_flags()

    def fold(self, scale: Tensor) -> None:
        """Take over the frozen scale that folding BatchNorm gave the layer's output channels, [O] along axis 0."""
        self.channels, self.axis = scale.numel(), 0
        self.frozen_scale = scale.clone()
        self.frozen_zero_point = torch.zeros_like(scale)

    # ---- forward -----------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.frozen_scale.dtype)  # quantizers stay in float32 under autocast
        if not x.numel() and self._initialized and not self._calibrating:
            return x.clone()  # an empty batch has nothing to round, and nothing to learn from
        if self._refit and (self.training or self.may_refit):
            self.refit.zero_()
            self.initialize_from(x)
        if self._observe and (self._calibrating or not self._initialized):
            self._take_in(x)
            if self._calibrating:
                return x
        if not self._fake_quantize:
            return x
        self.require_initialized()
        if self.training and not self._frozen:
            out = self.train_forward(x)
            if self.scales_gradients and self.scheme == "symmetric":
                out = mean_gradient(out)  # of a weight; an activation's is of this process's images alone
            return out if self.output_is_kept else out.clone()
        return self.eval_forward(x)

    def eval_forward(self, x: Tensor) -> Tensor:
        step, zero = self._viewed(self.step(), x), self._viewed(self.zero_point(), x)
        return grid.dequantize(self._quantize(x, step, zero), step, zero)

    def codes(self, x: Tensor) -> Tensor:
        """The integers that ``x`` becomes, carried in its floating dtype."""
        with torch.no_grad():
            return self._quantize(x, self._viewed(self.step(), x), self._viewed(self.zero_point(), x))

    def distance_from_grid(self, x: Tensor) -> Tensor:
        """``clamp(x) - Q(x)``, elementwise: how far from what it rounds to, 0 beyond the range; gradient to x alone."""
        with torch.no_grad():
            rounded = self.eval_forward(x)
            low, high = (self._viewed(end, x) for end in self.range())
        return torch.clamp(x, low, high) - rounded

    def _quantize(self, x: Tensor, step: Tensor, zero: Tensor) -> Tensor:
        return grid.quantize(x, step, zero, self.quant_min, self.quant_max, self.binary)

    def _viewed(self, parameter: Tensor, x: Tensor) -> Tensor:
        return grid.channel_view(parameter, x.ndim, self.axis)

    def _shift(self, x: Tensor, levels: Tensor | float | None = None) -> Tensor | None:
        """:meth:`zero_point`, shaped against ``x``; None on a grid whose zero-point is 0."""
        return self._viewed(self.zero_point(levels), x) if self.grid_scheme == "affine" else None

    # ---- calibration -------------------------------------------------------------------------------------

    def start_calibration(self) -> None:
        """Until :meth:`finish_calibration`, let tensors through unchanged and record their range."""
        self._observer, self._calibrating = ranges.RangeObserver(), True
        self.enable_observer()

    def finish_calibration(self) -> None:
        """Set the range from what was recorded."""
        observer, self._observer, self._calibrating = self._observer, None, False
        if observer is not None and not observer.empty:
            self._initialize(observer)

    def pool_calibration(self) -> None:
        """In :func:`fxquant.distributed.whole_batch`, take in what the other processes recorded."""
        if self._observer is not None and self.scheme != "symmetric":  # weights are the same in all of them
            self._observer.pool()

    def initialize_from(self, tensor: Tensor) -> None:
        """Set the range from one tensor: how a weight quantizer starts, without data."""
        self.start_calibration()
        self._take_in(tensor.detach())
        self.pool_calibration()
        self.finish_calibration()

    def require_initialized(self) -> None:
        if not self._initialized:
            raise SpecError(
                f"{self.where}: no range has been set yet. Run a calibration batch through the prepared model "
                "with observers enabled before training, freezing or converting it"
            )

    def _take_in(self, x: Tensor) -> None:
        if not self._calibrating:
            self.initialize_from(x)
            return
        self._observer.update(x, self.axis, self.where)

    def _initialize(self, observer: ranges.RangeObserver) -> None:
        with torch.no_grad():
            if self.scheme == "auto":
                self.one_sided.fill_(bool(observer.low.min() >= 0))
                self._read_flags()
            self.set_range(*observer.range(self.init, self.whole_bits, self.grid_scheme, self.percentile))
            self.initialized.fill_(1)
        self._read_flags()

    def _safe_width(self, low: Tensor, high: Tensor) -> Tensor:
        """Width of the range; 1 where nothing but zeros was seen (a dead channel, a zero-initialised branch)."""
        width = high if self.grid_scheme == "symmetric" else high - low
        return torch.where(width > SMALLEST_RANGE, width, 1.0)

    def _set_zero_fraction(self, low: Tensor, high: Tensor) -> None:
        if self.zero_fraction is not None:
            fraction = -low / self._safe_width(low, high) if self.grid_scheme == "affine" else low * 0
            self.zero_fraction.copy_(fraction.clamp(0, 1))

    # ---- what torch.ao reads -----------------------------------------------------------------------------

    is_dynamic = False
    eps = torch.finfo(torch.float32).tiny

    @property
    def dtype(self) -> torch.dtype:
        return torch.qint8 if self.scheme == "symmetric" else torch.quint8

    @property
    def qscheme(self) -> torch.qscheme:
        if self.axis is None:
            return torch.per_tensor_symmetric if self.scheme == "symmetric" else torch.per_tensor_affine
        return torch.per_channel_symmetric if self.scheme == "symmetric" else torch.per_channel_affine

    @property
    def ch_axis(self) -> int:
        return -1 if self.axis is None else self.axis

    @property
    def is_per_channel(self) -> bool:
        return self.axis is not None

    @property
    def activation_post_process(self) -> Estimator:
        return self

    def enable_fake_quant(self, enabled: bool = True) -> None:
        super().enable_fake_quant(enabled)
        self._read_flags()

    def enable_observer(self, enabled: bool = True) -> None:
        super().enable_observer(enabled)
        self._read_flags()

    # ---- state -------------------------------------------------------------------------------------------

    def _read_flags(self) -> None:
        # Python mirrors of the flag buffers: reading a tensor in forward would synchronise with a GPU.
        self._initialized = bool(self.initialized)
        self._one_sided = bool(self.one_sided)
        self._bits = int(self.width)
        self._width_fixed = bool(self.width_fixed)
        self._refit = bool(self.refit)
        self._frozen = bool(self.frozen)
        self._fake_quantize = bool(self.fake_quant_enabled)
        self._observe = bool(self.observer_enabled)
        if self.zero_fraction is not None and self.learns_zero_point:
            learned = not (self._one_sided or self._holds_range)  # the zero-point of a one-sided range is 0
            self.zero_fraction.requires_grad_(learned)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._read_flags()

    def extra_repr(self) -> str:
        return f"{self.name}, bits={self.bits}, scheme={self.grid_scheme}, channels={self.channels}"


class LearnedStep(Estimator):
    """An estimator whose step is a Parameter, kept as ``log2_scale``.

    The logarithm keeps the step positive and makes one learning rate fit layers of any magnitude.
    """

    def __init__(self, bits: Bits = 8, **options):
        super().__init__(bits, **options)
        self.log2_scale = nn.Parameter(torch.zeros(self.channels, device=self._device))

    def scale(self) -> Tensor:
        return torch.exp2(self.log2_scale)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        steps = self.quant_max if self.grid_scheme == "symmetric" else self.quant_max - self.quant_min
        self.log2_scale.copy_(torch.log2(self._safe_width(low, high) / steps))
        self._set_zero_fraction(low, high)

    def straight_through(self, x: Tensor, delta: float = 0.0, gradient_scale: float = 1.0) -> Tensor:
        """Quantize with the gradients of :class:`fxquant.estimators.functions.StraightThroughFunction`."""
        scale = self._viewed(self.scale(), x)
        if self.binary:
            return BinaryFunction.apply(x, scale, delta, gradient_scale)
        zero = self._shift(x)
        return StraightThroughFunction.apply(x, scale, zero, self.quant_min, self.quant_max, delta, gradient_scale)

    def step_gradient_scale(self, x: Tensor) -> float:
        """LSQ's ``1 / sqrt(n * qmax)``, n the elements that share one step (arXiv 1902.08153, section 2.2).

        n counts a weight's elements per scale, an activation's per image.
        """
        images = x.shape[0] if x.ndim else 1
        elements = x.numel() // (self.channels if self.scheme == "symmetric" else max(images, 1))
        return float((max(elements, 1) * self.quant_max) ** -0.5)
