"""freeze(): whole widths inside the budget, BatchNorm re-estimated, every scale fixed for good."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn

from . import cost
from .distributed import part_of
from .errors import SpecError, in_short
from .estimators import Estimator, estimators_of
from .layers import QATLayer
from .prepare import _images, prepared_info
from .spec import Budget
from .ties import avoid_ties
from .widths import fix_widths


def freeze(
    model: nn.Module, budget: Budget | None = None, *, calibration: Iterable | None = None
) -> dict[str, tuple[int, int]]:
    """Turn a trained, prepared model into the one that converts: in place, and for good.

    First :func:`settle`, then scales and zero-points are fixed, where :func:`~fxquant.ties.avoid_ties` finds that
    every runtime rounds alike. Afterwards every layer computes on integers, in eval
    and in train mode alike, and :func:`fxquant.convert` is exact.

    Args:
        model: from :func:`fxquant.prepare`.
        budget: what the whole widths must keep to.
        calibration: batches for BatchNorm; those given to ``prepare`` when not given here. Without either, or with
            an empty tuple, BatchNorm keeps its running statistics. Ranges that are to be set anew take the first one,
            with an empty tuple that of ``prepare``.

    Returns:
        (weight bits, activation bits) of each quantized layer, by name.

    Raises:
        SpecError: for a model that prepare() did not make, a budget that no widths in reach can meet, or ranges that
            are to be set anew and no images to do so.
    """
    widths = settle(model, budget, calibration=calibration)
    freeze_scales(model)
    avoid_ties(model)
    return widths


def freeze_scales(model: nn.Module) -> None:
    """The part of :func:`freeze` after :func:`settle`: every scale and zero-point fixed as it is."""
    for module in model.modules():
        if isinstance(module, (QATLayer, Estimator)):
            module.freeze()


def settle(
    model: nn.Module, budget: Budget | None = None, *, calibration: Iterable | None = None
) -> dict[str, tuple[int, int]]:
    """The part of :func:`freeze` before scales are fixed: whole widths inside the budget, noise off, BatchNorm
    re-estimated under true rounding. The model still computes in float, on quantized values; it ends in eval mode."""
    info = prepared_info(model)
    estimators = estimators_of(model)
    for estimator in estimators:
        estimator.require_initialized()
    widths = fix_widths(model, budget)
    data = info.calibration if calibration is None else calibration
    data = None if data == () else data
    if not all(layer.frozen for layer in cost.qat_layers(model).values()):
        for estimator in estimators:
            estimator.may_refit = True  # these are training data
        try:
            if data is not None:
                reestimate_batch_norm(model, data)
            if any(estimator.refit for estimator in estimators):  # nothing was there to re-estimate
                _set_pending_ranges(model, info.calibration if data is None else data)
        finally:
            for estimator in estimators:
                estimator.may_refit = False
    model.eval()
    return widths


@torch.no_grad()
def _set_pending_ranges(model: nn.Module, batches: Iterable | None) -> None:
    """Show quantizers whose range is to be set anew, as that of a width that has just become whole, a batch."""
    if batches is None:
        raise SpecError(
            "the widths have just become whole, and their ranges are set anew from the next images, of which there are "
            "none: pass calibration=loader to freeze() or prepare(), or let fxquant.Controller fine-tune"
        )
    device = next(model.parameters()).device
    model.eval()
    model(part_of(next(iter(_images(batches)))).to(device))


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable) -> None:
    """Replace BatchNorm's running statistics by the mean over ``batches``, quantizers rounding as in eval.

    A last batch smaller than the first is left out: it would weigh as much as a whole one.
    """
    norms = [norm for norm in batch_norms(model) if norm.running_mean is not None]
    if not norms:
        return
    if any(layer.frozen for layer in cost.qat_layers(model).values()):
        raise SpecError("BatchNorm of a frozen model is folded away and cannot be re-estimated")
    training, momenta = model.training, [norm.momentum for norm in norms]
    device = next(model.parameters()).device
    before = [copy.deepcopy(norm.state_dict()) for norm in norms]
    held = [getattr(norm, "statistics_held", False) for norm in norms]
    model.eval()
    for norm in norms:
        if not (norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()):
            norm.reset_running_stats()
        norm.num_batches_tracked.zero_()  # the first batch replaces what is there, by which layers round their bias
        norm.momentum = None  # cumulative mean
        norm.statistics_held = False
        norm.train()
    try:
        whole = None
        for images in _images(batches):
            whole = whole or len(images)
            if len(images) >= whole:
                model(part_of(images).to(device))
    except BaseException as error:
        for norm, state in zip(norms, before, strict=True):
            norm.load_state_dict(state)
        if isinstance(error, ValueError) and whole == 1:  # torch's, of the variance of one value
            raise SpecError(
                f"BatchNorm cannot be re-estimated from batches of one image ({in_short(error)}); give larger ones, or "
                "calibration=() to leave its statistics as they are"
            ) from error
        raise
    finally:
        model.train(training)
        for norm, momentum, hold in zip(norms, momenta, held, strict=True):
            norm.momentum, norm.statistics_held = momentum, hold


def hold_batch_norm(model: nn.Module, hold: bool = True) -> None:
    """Keep BatchNorm's running statistics as they are and normalise by them in training too; gamma and beta train on.
    With ``hold=False``, let them train again from the next ``model.train()`` on.

    It survives ``model.train()``. :func:`freeze` still re-estimates the statistics, unless told not to.
    """
    for norm in batch_norms(model):
        if hold and _stay_in_eval not in norm._forward_pre_hooks.values():
            norm.register_forward_pre_hook(_stay_in_eval)
        norm.statistics_held = hold


def _stay_in_eval(norm: nn.Module, args: tuple) -> None:
    if norm.statistics_held:
        norm.eval()


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """BatchNorm of any dimension, those inside of layers too."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
