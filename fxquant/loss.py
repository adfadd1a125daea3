"""QATLoss: task, distillation, budget and the estimators' own terms, as named parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from . import cost
from .computed import effective_weight
from .distributed import mean_over_processes
from .errors import UnknownNameError
from .estimators import Estimator, estimators_of
from .prepare import prepared_info
from .spec import Budget
from .trace import copy_of


def soft_cross_entropy(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy against the teacher's distribution, mean over the batch [N, classes] (NIPQ's distillation)."""
    return -(teacher_logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def jeffreys(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Jeffreys divergence ``KL(p|q) + KL(q|p)``, mean over the batch [N, classes] (GDNSQ's task loss).

    Equals ``sum((p - q)·(log p - log q))``.
    """
    log_p, log_q = teacher_logits.log_softmax(-1), logits.log_softmax(-1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).mean()


DISTILLATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "soft_cross_entropy": soft_cross_entropy,
    "jeffreys": jeffreys,
}


def oscillation(model: nn.Module) -> Tensor:
    """How far weights lie from the grid points they round to, ``sum((Q(w) - clamp(w))²)`` over all quantized weights.

    A weight between two points that pull its gradient to and fro is drawn to the one it is at (Nagel et al., ICML 2022,
    arXiv 2203.11086, equation 6). The gradient is to w alone, and none to one beyond the range. Widths that are
    still being learned have no points to be drawn to, and add nothing.
    """
    terms = []
    for layer in cost.qat_layers(model).values():
        quantizer = layer.weight_fake_quant
        if quantizer.settled and not quantizer._frozen:
            weight = effective_weight(layer)
            terms.append(quantizer.distance_from_grid(weight).square().sum())
    return torch.stack(terms).sum() if terms else torch.zeros((), device=next(model.parameters()).device)


class LossParts(NamedTuple):
    """The objective and what it is the sum of, each a scalar tensor."""

    task: Tensor
    distillation: Tensor
    budget: Tensor
    estimator: Tensor
    dampening: Tensor
    total: Tensor


class QATLoss(nn.Module):
    """The training objective of a prepared model.

    ``total = task_weight·task + distillation_weight·distillation + budget_weight·budget + estimator
    + dampening_weight·dampening``. Under autocast the parts are computed in float32.

    A step may be made of several calls (gradient accumulation), each with its ``share`` of the step's images. Each
    returns its share of the parts, the last one those that are of the model alone (budget, widths, dampening) as well:
    sums over the calls are what one call with all images would return, and so are gradients. In
    :func:`fxquant.distributed.whole_batch`, the running mean of the loss is of the images of all processes.

    Args:
        task: loss of (logits, labels), such as ``nn.CrossEntropyLoss()``.
        budget: what learned widths are pulled towards; ``sum(smooth_l1(cost, target))`` over its bounds, BOPs and
            bytes in units of a hundredth of the target. The bound itself is kept by :func:`fxquant.freeze`.
        teacher: float model for distillation, of which a copy in eval mode is kept.
        distillation: ``soft_cross_entropy`` or ``jeffreys``.
        task_weight, distillation_weight, budget_weight: weights of the parts.
        dampening_weight: of :func:`oscillation`; an attribute that may be changed between steps.

    Raises:
        UnknownNameError: an unknown distillation.
    """

    def __init__(
        self,
        task: Callable[[Tensor, Tensor], Tensor],
        budget: Budget | None = None,
        *,
        teacher: nn.Module | None = None,
        distillation: str = "soft_cross_entropy",
        task_weight: float = 1.0,
        distillation_weight: float = 1.0,
        budget_weight: float = 1.0,
        dampening_weight: float = 0.0,
    ):
        super().__init__()
        if distillation not in DISTILLATIONS:
            raise UnknownNameError("distillation", distillation, DISTILLATIONS)
        self.task, self.budget = task, budget or Budget()
        self.distillation = DISTILLATIONS[distillation]
        self.task_weight, self.distillation_weight = task_weight, distillation_weight
        self.budget_weight, self.dampening_weight = budget_weight, dampening_weight
        # Not a submodule: its weights belong neither to the optimizer nor to the checkpoint.
        self._teacher = (None if teacher is None else copy_of(teacher).eval().requires_grad_(False),)
        self.register_buffer("mean_task_loss", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._begun: tuple[float, Tensor | float] = (0.0, 0.0)  # share of a step that is done, and its loss

    def forward(self, model: nn.Module, images: Tensor, labels: Tensor, share: float = 1.0) -> LossParts:
        """Run ``model`` on ``images`` [N, C, H, W] and return the parts of the objective.

        Args:
            model: from :func:`fxquant.prepare`, or that in DistributedDataParallel.
            images, labels: a batch, or a part of one.
            share: how much of a step the part is, 1 for all.
        """
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        logits = _precise(model(images))
        zero = logits.new_zeros(())
        task = share * self.task(logits, labels)
        distillation = zero
        teacher = self._teacher[0]
        if teacher is not None and self.distillation_weight:
            with torch.no_grad():
                teacher_logits = _precise(teacher(images))
            distillation = share * self.distillation(logits, teacher_logits)
        main = self.task_weight * task + self.distillation_weight * distillation
        complete = self._track(main.detach(), share)
        budget = self.budget_penalty(inner) if self.budget and complete else zero
        estimator = self.estimator_terms(inner, zero, share, complete)
        dampening = oscillation(inner) if self.dampening_weight and complete else zero
        total = main + self.budget_weight * budget + estimator + self.dampening_weight * dampening
        return LossParts(task, distillation, budget, estimator, dampening, total)

    def budget_penalty(self, model: nn.Module) -> Tensor:
        """``smooth_l1`` distance of the (differentiable) costs from the budget, a scalar."""
        info, layers = prepared_info(model), cost.qat_layers(model)

        def weight_bytes(layers, costs):
            return cost.weight_bytes(layers, costs) + cost.unpacked_bytes(model)

        parts = []
        for name, measure, unit in (
            ("mean_weight_bits", cost.mean_weight_bits, 1.0),
            ("mean_activation_bits", cost.mean_activation_bits, 1.0),
            ("bops", cost.bops, None),
            ("weight_bytes", weight_bytes, None),
        ):
            target = getattr(self.budget, name)
            if target is not None:
                unit = unit or target / 100
                now = measure(layers, info.costs) / unit
                parts.append(F.smooth_l1_loss(now, torch.full_like(now, target / unit)))
        return torch.stack(parts).sum()

    def estimator_terms(self, model: nn.Module, zero: Tensor, share: float = 1.0, complete: bool = True) -> Tensor:
        """Sum of the regularizers of all kinds of estimators in the model, a scalar; those of the model alone where a
        step is ``complete``."""
        kinds: dict[type[Estimator], list[Estimator]] = {}
        for estimator in estimators_of(model):
            if estimator._initialized and not estimator._frozen:
                kinds.setdefault(type(estimator), []).append(estimator)
        total = zero
        for kind, members in kinds.items():
            if complete or kind.regularizes_batches:
                term = kind.regularizer(members, self.mean_task_loss.clone())
                if term is not None:
                    total = total + (share * term if kind.regularizes_batches else term)
        return total

    def _track(self, loss: Tensor, share: float) -> bool:
        """Take in a share of a step's loss; whether that completes the step."""
        done, before = self._begun
        if done + share < 1 - 1e-6:
            self._begun = done + share, before + loss
            return False
        loss, self._begun = mean_over_processes(before + loss), (0.0, 0.0)
        self.steps += 1
        momentum = 1 / self.steps.clamp(max=100)
        self.mean_task_loss.lerp_(loss.to(self.mean_task_loss.dtype), momentum.to(self.mean_task_loss.dtype))
        return True


def _precise(logits: Tensor) -> Tensor:
    """In float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
