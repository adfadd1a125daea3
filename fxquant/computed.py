"""Layers whose weight is a function of their parameters, as in networks with standardised weights.

:func:`fxquant.canonical.name_layers` makes them; :class:`fxquant.layers.QATConv2d` and ``QATLinear`` quantize what
:func:`effective_weight` gives, so that the parameters keep their names and go on being trained.
"""

from __future__ import annotations

from torch import Tensor, fx, nn
from torch.nn import functional as F


class _Computed(nn.Module):
    """Mixin: ``formula`` takes the attributes named ``operands``, in this order, and gives the weight."""

    formula: fx.GraphModule
    operands: tuple[str, ...]

    def set_formula(self, formula: fx.GraphModule, operands: dict[str, nn.Parameter | Tensor]) -> None:
        """Compute the weight by ``formula`` from ``operands``; one of them is ``weight``, of the same shape."""
        self.formula, self.operands = formula, tuple(operands)
        for name, value in operands.items():
            if isinstance(value, nn.Parameter):
                setattr(self, name, value)
            else:
                self.register_buffer(name, value)


class ComputedConv2d(_Computed, nn.Conv2d):
    """Conv2d [N, C, H, W] with a computed weight."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, effective_weight(self), self.bias)


class ComputedLinear(_Computed, nn.Linear):
    """Linear [..., C] with a computed weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, effective_weight(self), self.bias)


def effective_weight(layer: nn.Module) -> Tensor:
    """What ``layer`` multiplies its input with: its ``weight``, or what its formula makes of it (same shape)."""
    formula = getattr(layer, "formula", None)
    return layer.weight if formula is None else formula(*(getattr(layer, name) for name in layer.operands))


def adopt_formula(layer: nn.Module, source: nn.Module) -> None:
    """Give ``layer`` the formula of ``source`` and the parameters it takes, if ``source`` has one."""
    if isinstance(source, _Computed):
        _Computed.set_formula(layer, source.formula, {name: getattr(source, name) for name in source.operands})
