"""One batch in several processes: what a model measures on a batch is measured on the parts of all of them.

Each process has a copy of the model and a part of every batch; DistributedDataParallel averages the gradients. What is
left is what a model *measures* in forward: BatchNorm's statistics, ranges of quantizers, the running mean of the loss.
Inside of :func:`whole_batch` those are of all parts together, and the same in every process, bit for bit, as each
computes them from the same gathered numbers. In one process, and outside of that context, nothing here does anything.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .errors import SpecError

_split: ContextVar[bool] = ContextVar("batches are split over processes", default=False)


@dataclass(frozen=True)
class Share:
    """What one of ``count`` processes reads of a data set: the part ``index``, from 0, of as many."""

    index: int = 0
    count: int = 1

    def of_batch(self, batch: Sequence) -> Sequence:
        """Its part of a batch to train on; all parts are equally large, so that the mean of their means is the batch's.

        Raises:
            SpecError: a batch that cannot be split evenly.
        """
        return even_parts(batch, self.count, "processes")[self.index]

    def of_all(self, items: Sequence) -> Sequence:
        """Its part of what is read once and in order: parts follow one another, their sizes differ by one at most."""
        ends = [part * len(items) // self.count for part in (self.index, self.index + 1)]
        return items[slice(*ends)]


def even_parts(batch: Sequence, count: int, what: str) -> list[Sequence]:
    """``count`` parts of a batch, of one size; ``what`` they are for.

    Raises:
        SpecError: a batch of another number of images than a multiple.
    """
    size, rest = divmod(len(batch), count)
    if rest or not size:
        raise SpecError(
            f"a batch of {len(batch)} images cannot be split evenly over {count} {what}; set data.batch_size to a "
            f"multiple of {count} that is at most the number of training images"
        )
    return [batch[part * size : (part + 1) * size] for part in range(count)]


@contextlib.contextmanager
def whole_batch(*, batch_norm: bool = True) -> Iterator[None]:
    """Inside, every process runs its part of the same batches, and what a model measures is of the whole ones.

    All processes must enter and do the same: inside, they wait for one another.

    * Ranges that quantizers set from activations are those of all parts.
    * BatchNorm in training normalises by the mean and variance of all parts (unless ``batch_norm=False``: by its own
      part's then, as DistributedDataParallel does by itself).
    * :class:`fxquant.QATLoss` follows the mean loss of all parts.
    * A gradient that an estimator scales by its own size (EWGS, PEGE) is the mean of all parts first, for weights.
    * :func:`fxquant.calibrate` and :func:`fxquant.freeze` deal out the batches that they are given.
    """
    if process_count() == 1:
        yield
        return
    before = _split.set(True)
    try:
        with _SynchronisedBatchNorm() if batch_norm else contextlib.nullcontext():
            yield
    finally:
        _split.reset(before)


def process_count() -> int:
    """How many processes work together: 1 where no process group is."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def position() -> tuple[int, int]:
    """Number of this process and of all that have a part of the batch: 0 and 1 outside of :func:`whole_batch`."""
    return (dist.get_rank(), dist.get_world_size()) if _split.get() else (0, 1)


def part_of(batch: Tensor) -> Tensor:
    """This process's part of a batch [N, ...]; all of it where there are fewer images than processes."""
    index, count = position()
    return batch if len(batch) < count else batch.tensor_split(count)[index]


def gathered(values: Tensor) -> list[Tensor]:
    """``values`` [n, ...] of every process, in order; n may differ."""
    if not _split.get():
        return [values]
    sizes = [int(size) for size in torch.cat(_all_gather(torch.tensor([len(values)], device=values.device)))]
    padded = values.new_zeros(max(sizes), *values.shape[1:])
    padded[: len(values)] = values
    return [part[:size] for part, size in zip(_all_gather(padded), sizes, strict=True)]


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of a tensor over processes, of one shape in all of them; without gradient."""
    if not _split.get():
        return values
    return torch.stack(_all_gather(values.detach())).mean(0)


def mean_gradient(x: Tensor) -> Tensor:
    """``x`` itself; in backward its gradient becomes the mean over processes, here and not at the parameters alone."""
    return _MeanGradient.apply(x) if _split.get() else x


class _MeanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        mean = grad / dist.get_world_size()
        dist.all_reduce(mean)
        return mean


def _all_gather(values: Tensor) -> list[Tensor]:
    out = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(out, values.contiguous())
    return out


# ---- BatchNorm -------------------------------------------------------------------------------------------


_SIGNATURE = inspect.signature(F.batch_norm)


class _SynchronisedBatchNorm(TorchFunctionMode):
    """Inside, ``F.batch_norm`` in training takes the statistics of all processes, whichever module calls it.

    torch's SyncBatchNorm does without CPUs, and takes the place of modules that tracing and fusing know by their type.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.batch_norm:
            bound = _SIGNATURE.bind(*args, **(kwargs or {}))
            bound.apply_defaults()
            if bound.arguments.pop("training"):
                return _batch_norm(**bound.arguments)
        return func(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """``F.batch_norm(..., training=True)`` of [N, C, ...] with the statistics of all processes."""
    out, mean, variance, count = _BatchNormFunction.apply(input, weight, bias, eps)
    if running_mean is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), momentum)
    return out


class _BatchNormFunction(torch.autograd.Function):
    """Output, and mean and (biased) variance [C] float64 of all processes, and how many values of a channel those are.

    Means and squares about them are combined as in Chan, Golub & LeVeque (1983), in float64: nothing cancels. In
    backward the two sums over a channel that BatchNorm's gradient has are over all processes too; gradients of gamma
    and beta are this process's, for DistributedDataParallel to average.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        own = x.to(_precision(x))
        variance, mean = torch.var_mean(own, _all_but_channels(x), correction=0)
        count = mean.new_full((1,), x.numel() // x.shape[1], dtype=torch.float64)
        means, variances, counts = torch.stack(_all_gather(torch.cat([mean, variance, count]))).tensor_split(
            [len(mean), 2 * len(mean)], 1
        )
        count = counts.sum()
        mean = (means * counts).sum(0) / count
        variance = ((variances + (means - mean).square()) * counts).sum(0) / count
        inverse = torch.rsqrt(variance + eps).to(own.dtype)
        scale = inverse if weight is None else inverse * weight
        shift = -mean.to(own.dtype) * scale if bias is None else bias - mean.to(own.dtype) * scale
        out = torch.addcmul(_per_channel(shift, x), own, _per_channel(scale, x)).to(x.dtype)
        ctx.save_for_backward(x, mean.to(own.dtype), inverse, scale, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return out, mean, variance, count

    @staticmethod
    def backward(ctx, grad, *_):
        x, mean, inverse, scale, count = ctx.saved_tensors
        grad = grad.to(_precision(x))
        normal = (x.to(grad.dtype) - _per_channel(mean, x)).mul_(_per_channel(inverse, x))
        sums = torch.stack([grad.sum(_all_but_channels(x)), (grad * normal).sum(_all_but_channels(x))])
        means = torch.stack(_all_gather(sums)).sum(0) / count.to(sums.dtype)
        grad_x = grad - _per_channel(means[0], x)
        grad_x = grad_x.sub_(normal.mul_(_per_channel(means[1], x))).mul_(_per_channel(scale, x)).to(x.dtype)
        to_weight, to_bias = ctx.needs_input_grad[1:3]
        return grad_x, sums[1] if to_weight else None, sums[0] if to_bias else None, None


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """[C] shaped against [N, C, ...]."""
    return values.reshape(-1, *[1] * (x.ndim - 2))


def _precision(x: Tensor) -> torch.dtype:
    """What is computed in: float32 for narrower types."""
    return torch.promote_types(x.dtype, torch.float32)
