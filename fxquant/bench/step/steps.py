"""A contender as a step to call: forward, cross-entropy, backward, SGD with momentum.

All start from the same random weights and see the same batch. torch.ao gets the graph that fxquant captures, so that
it quantizes the same layers, with its BatchNorm fused, on models that it cannot trace by itself; at its own 8 bits, for
it has one width for all tensors, and residual sums of 4 bits make transformers diverge. Width does not change its time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ... import _torch_ao as ao
from ...controller import Controller, param_groups
from ...loss import QATLoss
from ...prepare import prepare
from ...spec import Rule
from ...synthetic import random_images, settled
from ...trace import trace
from ...train.layout import lay_out
from ..artefacts import of_model
from .job import AUTOCAST, FLOAT, FUSED, LEARNABLE, StepJob

Step = Callable[[], Tensor]
"""Takes one step and returns its loss, on the device."""

_STEPS, _DONE = 10_000, 2_500  # of the training that is measured: curriculum, penalty and noise are at work
_LEARNING_RATE = 1e-4
_CALIBRATION = 8  # images from which ranges are set


def build(name: str, job: StepJob) -> Step:
    """The step of one contender, its model built and its ranges set."""
    torch.manual_seed(job.seed)
    source = of_model(job.model, job.image_size or None, Path())
    images = random_images(source.input_shape[1], job.batch, source.input_shape[0])
    model = settled(source.blank_model(), images[:_CALIBRATION])
    with torch.no_grad():
        classes = model.eval()(images[:1]).shape[-1]
    labels = torch.randint(0, classes, (job.batch,)).to(job.device)
    trained = _MODELS.get(name, _ours)(name, model.train(), images[:_CALIBRATION], job).train().to(job.device)
    if job.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
        lay_out(trained, torch.channels_last)
    images = images.to(job.device)
    loss_of, after = _objective(name, trained)
    optimizer = torch.optim.SGD(param_groups(trained, lr=_LEARNING_RATE), lr=_LEARNING_RATE, momentum=0.9)

    def step() -> Tensor:
        with _autocast(job):
            loss = loss_of(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after()
        return loss.detach()

    return step


def _objective(name: str, model: nn.Module) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[], None]]:
    """The loss of a batch, and what follows each step: as ``fxquant run`` does it, without distillation."""
    task = nn.CrossEntropyLoss()
    if name in _MODELS:
        return lambda images, labels: task(model(images), labels), lambda: None
    controller = Controller(model, _STEPS)
    controller.load_state_dict({"steps_done": _DONE, "total_steps": _STEPS, "settled": False})
    criterion = QATLoss(task).to(next(model.parameters()).device)
    return lambda images, labels: criterion(model, images, labels).total, controller.step


def _ours(name: str, model: nn.Module, images: Tensor, job: StepJob) -> nn.Module:
    rules = [Rule("first|last", 8, 8, estimator=name), Rule("*", job.bits, job.bits, estimator=name)]
    return prepare(model, rules, calibration=[images])


def _float(name: str, model: nn.Module, images: Tensor, job: StepJob) -> nn.Module:
    return model


def _fused(name: str, model: nn.Module, images: Tensor, job: StepJob) -> nn.Module:
    """torch.ao's default for x86, whose observers go on observing."""
    return _prepared_by_torch_ao(model, ao.get_default_qat_qconfig_mapping("x86"), images)


def _learnable(name: str, model: nn.Module, images: Tensor, job: StepJob) -> nn.Module:
    """torch.ao's learned scales and zero-points; one a tensor, since a QConfig does not know a layer's channels."""
    activation = ao.LearnableFakeQuantize.with_args(
        observer=ao.MovingAverageMinMaxObserver, quant_min=0, quant_max=255, use_grad_scaling=True
    )
    weight = ao.LearnableFakeQuantize.with_args(
        observer=ao.MovingAverageMinMaxObserver,
        quant_min=-127,
        quant_max=127,
        dtype=torch.qint8,
        qscheme=torch.per_tensor_symmetric,
        use_grad_scaling=True,
    )
    prepared = _prepared_by_torch_ao(model, ao.QConfigMapping().set_global(ao.QConfig(activation, weight)), images)
    for module in prepared.modules():
        if isinstance(module, ao.LearnableFakeQuantize):
            module.enable_param_learning()
    return prepared


def _prepared_by_torch_ao(model: nn.Module, mapping: ao.QConfigMapping, images: Tensor) -> nn.Module:
    with ao.deprecations_silenced():
        prepared = ao.prepare_captured(trace(model, (images,)), mapping, (images,), ao.get_native_backend_config())
    with torch.no_grad():
        prepared.train()(images)  # its observers see what ours see
    return prepared


_MODELS: dict[str, Callable[[str, nn.Module, Tensor, StepJob], nn.Module]] = {
    FLOAT: _float,
    FUSED: _fused,
    LEARNABLE: _learnable,
}
"""What trains for each contender that is no estimator of ours."""


@contextlib.contextmanager
def _autocast(job: StepJob) -> Iterator[None]:
    if not job.autocast:
        yield
        return
    with torch.autocast(job.device.split(":")[0], dtype=AUTOCAST[job.autocast]):
        yield
