"""verify(): prepared against reference against lowered, on real images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from .convert import SOURCE
from .errors import EmptyDataError, ParityError, SpecError
from .lower.native import REFERENCE, Recorder, _kernels
from .lower.onnx import OnnxModel, OpenVinoModel
from .spec import get_backend


@dataclass
class LoweredParity:
    """How a lowered model compares with the reference.

    Attributes:
        argmax_agreement: per cent of images with the same argmax.
        logits_equal: per cent of logits that are the reference's, bit for bit.
        max_code_difference: largest difference of any integer activation, errors of earlier layers included; None for a
            runtime that shows its logits only.
        worst_layer: where that is.
        accuracy: per cent, if labels were given.
    """

    argmax_agreement: float
    logits_equal: float
    max_code_difference: int | None
    worst_layer: str
    accuracy: float | None


@dataclass
class VerifyReport:
    """How far a frozen model, its reference and its lowered forms agree, and how accurate each is.

    Attributes:
        images: how many were compared.
        reference_equals_fake_quant: whether every tensor of the reference graph equals the frozen model's, bit for
            bit, on every image.
        different_tensors: the reference nodes that differ, with the largest difference.
        fake_quant_accuracy, reference_accuracy: per cent, if labels were given.
        lowered: one entry a backend.
        predicted: the class each model gives each image, [images] int64 (and each position, [images, ...]), by
            ``"frozen"``, ``"reference"``, backend.
    """

    images: int = 0
    reference_equals_fake_quant: bool = True
    different_tensors: dict[str, float] = field(default_factory=dict)
    fake_quant_accuracy: float | None = None
    reference_accuracy: float | None = None
    lowered: dict[str, LoweredParity] = field(default_factory=dict)
    predicted: dict[str, Tensor] = field(default_factory=dict)

    def raise_on_failure(self) -> None:
        """Raises :class:`ParityError` where a model does not compute what was trained, saying which and how far."""
        if not self.reference_equals_fake_quant:
            where = "in its output alone"
            if self.different_tensors:
                name, difference = max(self.different_tensors.items(), key=lambda item: item[1])
                where = f"in {len(self.different_tensors)} tensors, worst at {name!r} by {difference:.3g}"
            raise ParityError(
                f"the reference graph differs from the frozen model {where}; this is a defect of fxquant, please "
                "report the model"
            )
        for backend, parity in self.lowered.items():
            bound = get_backend(backend).agreement
            if parity.argmax_agreement < bound:
                worst = f"; worst layer {parity.worst_layer!r}, off by {parity.max_code_difference} codes"
                worst = "" if parity.max_code_difference is None else worst
                raise ParityError(
                    f"lowered to {backend}, {parity.argmax_agreement:.2f} % of {self.images} images keep the "
                    f"reference's argmax, {bound} % was asked for{worst}. Lower to another backend"
                )


@torch.no_grad()
def verify(
    frozen: fx.GraphModule | None,
    reference: fx.GraphModule,
    batches: Iterable,
    *,
    lowered: dict[str, fx.GraphModule | OnnxModel | OpenVinoModel] | None = None,
) -> VerifyReport:
    """Compare, on every image of ``batches``, the frozen model with its reference, and that with lowered models.

    Args:
        frozen: the model that trained, frozen; ``None`` compares the reference with lowered models only.
        reference: its :func:`fxquant.convert`.
        batches: image tensors, or (images, labels) tuples for accuracies. Logits and labels are as
            ``nn.CrossEntropyLoss`` takes them: [N, C] and [N], or [N, C, ...] and [N, ...], a class for each position.
        lowered: models from :func:`fxquant.lower`, or :class:`fxquant.OnnxModel` or ``OpenVinoModel``, by backend.

    Raises:
        EmptyDataError: where there is no batch.
        SpecError: for labels of another shape.
    """
    report = VerifyReport()
    lowered = lowered or {}
    tally = {name: _Tally() for name in ("frozen", "reference", *lowered)}
    worst = {name: (0 if isinstance(model, fx.GraphModule) else None, "") for name, model in lowered.items()}
    for batch in batches:
        images, labels = batch[:2] if isinstance(batch, (tuple, list)) else (batch, None)
        report.images += len(images)
        expected = Recorder(reference)
        want = expected.run(images)
        tally["reference"].add(want, want, labels)
        if frozen is not None:
            actual = Recorder(frozen)
            tally["frozen"].add(actual.run(images), want, labels)
            for node in reference.graph.nodes:
                source = node.meta.get(SOURCE)
                ours, theirs = expected.values.get(node.name), actual.values.get(source)
                if ours is None or theirs is None or torch.equal(ours, theirs):
                    continue
                gap = float((ours.double() - theirs.double()).abs().max())
                report.different_tensors[node.name] = max(gap, report.different_tensors.get(node.name, 0.0))
        for backend, model in lowered.items():
            if not isinstance(model, fx.GraphModule):
                tally[backend].add(model(images), want, labels)
                continue
            got = Recorder(model)
            with _kernels(backend):
                tally[backend].add(got.run(images), want, labels)
            for node in model.graph.nodes:
                codes = got.values.get(node.name)
                if codes is None or codes.dtype != torch.uint8:
                    continue
                name = node.meta.get(REFERENCE, node.name)
                off = int((codes.int() - expected.values[name].int()).abs().max())
                if off > worst[backend][0]:
                    worst[backend] = off, name
    if not report.images:
        raise EmptyDataError("verify was given no batch; pass a loader with held-out images")
    report.reference_equals_fake_quant = not report.different_tensors and (
        frozen is None or tally["frozen"].agreement == 100
    )
    report.predicted = {name: torch.cat(counts.choices) for name, counts in tally.items() if counts.choices}
    report.fake_quant_accuracy = tally["frozen"].accuracy
    report.reference_accuracy = tally["reference"].accuracy
    for backend in lowered:
        counts = tally[backend]
        report.lowered[backend] = LoweredParity(counts.agreement, counts.equal, *worst[backend], counts.accuracy)
    return report


class _Tally:
    """Argmaxes, counts of those that are right and that agree, and of equal logits."""

    def __init__(self):
        self.choices: list[Tensor] = []
        self.images = self.right = self.agreeing = self.labelled = self.logits = self.same = 0

    def add(self, logits: Tensor, reference: Tensor, labels: Tensor | None) -> None:
        if logits.ndim < 2:
            raise SpecError(f"verify compares scores of classes, [N, C]; the model returned {list(logits.shape)}")
        choice = logits.argmax(1)
        self.choices.append(choice)
        self.images += choice.numel()
        self.logits += logits.numel()
        self.same += int((logits == reference).sum())
        self.agreeing += int((choice == reference.argmax(1)).sum())
        if labels is not None:
            if labels.shape != choice.shape:
                raise SpecError(
                    f"labels of shape {list(labels.shape)} were given for logits of shape {list(logits.shape)}, which "
                    f"have classes along dimension 1; give labels of shape {list(choice.shape)}, or images alone"
                )
            self.labelled += labels.numel()
            self.right += int((choice == labels).sum())

    @property
    def agreement(self) -> float:
        return 100.0 * self.agreeing / max(self.images, 1)

    @property
    def equal(self) -> float:
        return 100.0 * self.same / max(self.logits, 1)

    @property
    def accuracy(self) -> float | None:
        return 100.0 * self.right / self.labelled if self.labelled else None
