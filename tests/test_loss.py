"""QATLoss: every part against its formula, and their sum."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxquant
from fxquant import Budget, QATLoss, Rule, cost
from fxquant.estimators import PEGE, Estimator
from fxquant.loss import jeffreys, oscillation, soft_cross_entropy
from tests.models import TinyResidual

from .estimators import rederived


@pytest.fixture
def images():
    return torch.randn(4, 3, 16, 16)


LABELS = torch.arange(4)


def prepared(images, estimator="nipq", bits=(2, 8), **options):
    rules = [Rule("*", bits, bits, estimator=estimator, options=options)]
    return fxquant.prepare(TinyResidual(), rules, calibration=[images]).train()


# ---- distillation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.1, 3.0, 30.0])
def test_divergences(size):
    """Against float64 formulas, and against torch's kl_div in both directions."""
    student, teacher = (size * torch.randn(16, 10) for _ in range(2))
    s, t = student.double(), teacher.double()
    torch.testing.assert_close(jeffreys(student, teacher).double(), rederived.jeffreys(s, t), rtol=1e-5, atol=1e-6)
    soft = soft_cross_entropy(student, teacher).double()
    torch.testing.assert_close(soft, rederived.soft_cross_entropy(s, t), rtol=1e-5, atol=1e-6)
    s, t = s.log_softmax(-1), t.log_softmax(-1)
    forward = F.kl_div(s, t, reduction="batchmean", log_target=True)
    backward = F.kl_div(t, s, reduction="batchmean", log_target=True)
    torch.testing.assert_close(jeffreys(student, teacher).double(), forward + backward, rtol=1e-5, atol=1e-6)
    entropy = -(t.exp() * t).sum(-1).mean()
    torch.testing.assert_close(soft - entropy, forward, rtol=1e-5, atol=1e-5)


def test_divergence_of_equals():
    logits = torch.randn(5, 7)
    assert jeffreys(logits, logits).item() == 0
    assert jeffreys(logits + 3, logits).item() == pytest.approx(0, abs=1e-6)  # softmax does not see the shift


def test_divergences_of_certain_logits():
    """Logits so far apart that probabilities underflow leave values and gradients finite."""
    student = torch.tensor([[200.0, -200.0]], requires_grad=True)
    teacher = torch.tensor([[-200.0, 200.0]])
    for divergence, value in ((jeffreys, 800.0), (soft_cross_entropy, 400.0)):
        (gradient,) = torch.autograd.grad(out := divergence(student, teacher), student)
        assert out.item() == pytest.approx(value)
        assert torch.isfinite(gradient).all()


# ---- the sum ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distillation", ["soft_cross_entropy", "jeffreys"])
def test_parts_sum_to_the_total(images, distillation):
    model, teacher = prepared(images, "pege", 3), TinyResidual()
    weights = {"task_weight": 0.5, "distillation_weight": 3.0, "budget_weight": 7.0, "dampening_weight": 0.25}
    budget = Budget(mean_weight_bits=2.5)
    loss = QATLoss(F.cross_entropy, budget, teacher=teacher, distillation=distillation, **weights)
    twin = copy.deepcopy(model)  # a forward in training mode moves BatchNorm's statistics
    parts = loss(model, images, LABELS)
    expected = 0.5 * parts.task + 3.0 * parts.distillation + 7.0 * parts.budget + parts.estimator
    expected = expected + 0.25 * parts.dampening
    torch.testing.assert_close(parts.total, expected)
    assert min(parts) > 0
    assert parts.budget.item() == pytest.approx(0.125)  # smooth_l1 of half a bit
    with torch.no_grad():
        logits, wanted = twin(images), teacher.eval()(images)
    assert parts.task.item() == pytest.approx(F.cross_entropy(logits, LABELS).item(), rel=1e-5)
    divergence = getattr(rederived, distillation)(logits.double(), wanted.double())
    assert parts.distillation.item() == pytest.approx(divergence.item(), rel=1e-4)


def test_a_part_of_the_model_may_be_called_module(images):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.head = nn.Linear(4, 5)

        def forward(self, x):
            return self.head(self.module(x))

    model = fxquant.prepare(Wrapped(), [Rule("*", (2, 6), (2, 6), "nipq")], calibration=[images])
    loss = QATLoss(F.cross_entropy, Budget(mean_weight_bits=2.5))
    assert loss(model, images, LABELS).budget > 0


def test_parts_that_are_not_asked_for_are_zero(images):
    parts = QATLoss(F.cross_entropy)(prepared(images, "lsq", 4), images, LABELS)
    assert (parts.distillation.item(), parts.budget.item(), parts.estimator.item()) == (0, 0, 0)
    assert parts.dampening.item() == 0
    assert torch.equal(parts.total, parts.task)


def test_discretization_error_is_a_part(images):
    """PEGE's term: the mean over all quantized tensors of its own error, and gone from the next step's."""
    model = prepared(images, "pege", 3, weight=0.25)
    loss = QATLoss(F.cross_entropy)
    model.eval()(images)  # statistics as they are, so that two forwards see the same
    for module in model.modules():
        if isinstance(module, Estimator):
            module.train()
    parts = loss(model, images, LABELS)
    layers = cost.qat_layers(model).values()
    weights = [m.weight_fake_quant.discretization_error(m.weight) for m in layers]
    inputs = {}
    handles = [
        m.input_fake_quant.register_forward_hook(lambda q, args, out: inputs.update({q: args[0]})) for m in layers
    ]
    again = loss(model, images, LABELS)
    for handle in handles:
        handle.remove()
    inputs = [q.discretization_error(x) for q, x in inputs.items()]
    assert len(weights) == len(inputs) == 5
    for part in (parts, again):
        assert part.estimator.item() == pytest.approx(0.25 * torch.stack(weights + inputs).mean().item(), rel=1e-4)


def test_gdnsq_penalty_is_a_part(images):
    """Times the running mean of the task loss, which is the first loss at first; zero before the temperature rises."""
    model = prepared(images, "gdnsq", 4)
    loss = QATLoss(F.cross_entropy)
    assert loss(model, images, LABELS).estimator.item() == 0
    for layer in cost.qat_layers(model).values():
        layer.weight_fake_quant.temperature = layer.input_fake_quant.temperature = 2.0
    parts = loss(model, images, LABELS)
    # Ten bits each, target four: hinge 6 + 1e-3 for weights and for activations.
    assert parts.estimator.item() == pytest.approx(2.0 * loss.mean_task_loss.item() * 2 * (6 + 1e-3), rel=1e-3)


def test_running_mean_of_the_task_loss(images):
    """A plain mean over the first steps."""
    values = iter([4.0, 2.0, 9.0])
    loss = QATLoss(lambda logits, labels: logits.sum() * 0 + next(values), task_weight=2.0)
    model, means = prepared(images, "lsq", 4), []
    for _ in range(3):
        loss(model, images, LABELS)
        means.append(loss.mean_task_loss.item())
    assert means == pytest.approx([8.0, 6.0, 10.0])
    assert set(loss.state_dict()) == {"mean_task_loss", "steps"}


# ---- the teacher -----------------------------------------------------------------------------------------


def test_teacher_is_no_part_of_the_objective(images):
    """No gradient, no parameter, no state, and the user's model stays as it is: mode, weights, statistics."""
    teacher = TinyResidual().train()
    before = copy.deepcopy(teacher.state_dict())
    loss = QATLoss(nn.CrossEntropyLoss(), teacher=teacher)
    loss.train()
    assert teacher.training
    assert all(p.requires_grad for p in teacher.parameters())
    loss(prepared(images), images, LABELS).total.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert not list(loss.parameters())
    assert not [key for key in loss.state_dict() if "weight" in key]
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_teacher_is_not_asked_at_weight_zero(images):
    class Unasked(nn.Module):
        def forward(self, x):
            raise AssertionError("the teacher was run")

    loss = QATLoss(F.cross_entropy, teacher=Unasked(), distillation_weight=0.0)
    assert loss(prepared(images), images, LABELS).distillation.item() == 0


def test_unknown_distillation():
    with pytest.raises(fxquant.FxQuantError, match=r"unknown distillation 'jefreys': did you mean 'jeffreys'\?"):
        QATLoss(F.cross_entropy, distillation="jefreys")


# ---- the budget ------------------------------------------------------------------------------------------

MEASURES = {
    "mean_weight_bits": cost.mean_weight_bits,
    "mean_activation_bits": cost.mean_activation_bits,
    "bops": cost.bops,
    "weight_bytes": cost.weight_bytes,
}


def widths_moved(model):
    """Which of (weights', inputs') widths have a gradient, over all layers."""
    layers = cost.qat_layers(model).values()
    return [
        {bool(getattr(m, kind).raw_width.grad is not None and getattr(m, kind).raw_width.grad.any()) for m in layers}
        for kind in ("weight_fake_quant", "input_fake_quant")
    ]


@pytest.mark.parametrize(
    ("name", "moves"),
    [
        ("mean_weight_bits", [{True}, {False}]),
        ("mean_activation_bits", [{False}, {True}]),
        ("bops", [{True}, {True}]),
        ("weight_bytes", [{True}, {False}]),
    ],
)
@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_budget_pulls_the_widths(images, name, moves, factor):
    """Up to a target above, down to one below; zero exactly at the target, and one small step nearer after a step."""
    model = prepared(images)
    layers, costs = cost.qat_layers(model), model.meta["fxquant"].costs
    base = cost.unpacked_bytes(model) if name == "weight_bytes" else 0

    def now():
        return float((MEASURES[name](layers, costs) + base).detach())

    start = now()
    at_target = QATLoss(F.cross_entropy, Budget(**{name: start}))
    assert at_target.budget_penalty(model).item() == 0
    penalty = QATLoss(F.cross_entropy, Budget(**{name: factor * start})).budget_penalty(model)
    unit = factor * start / 100 if name in ("bops", "weight_bytes") else 1.0
    off = abs(1 - factor) * start / unit
    assert penalty.item() == pytest.approx(off**2 / 2 if off < 1 else off - 0.5, rel=1e-3)
    penalty.backward()
    assert widths_moved(model) == moves
    raw = [p for n, p in model.named_parameters() if n.endswith("raw_width")]
    torch.optim.SGD(raw, lr=0.01).step()
    assert (now() > start) == (factor > 1)
    assert now() != start


def test_budgets_add_up(images):
    model = prepared(images)
    single = [Budget(mean_weight_bits=3.0), Budget(mean_activation_bits=4.0), Budget(bops=1e5)]
    penalties = [QATLoss(F.cross_entropy, budget).budget_penalty(model).item() for budget in single]
    together = QATLoss(F.cross_entropy, Budget(mean_weight_bits=3.0, mean_activation_bits=4.0, bops=1e5))
    assert together.budget_penalty(model).item() == pytest.approx(sum(penalties))
    assert min(penalties) > 0


def test_budget_against_hand_made_sums(images):
    """The measures themselves, from the layers' sizes."""
    model = prepared(images)
    layers = cost.qat_layers(model)
    for index, layer in enumerate(layers.values()):
        with torch.no_grad():
            layer.weight_fake_quant.raw_width.fill_(0.3 * index - 0.5)
            layer.input_fake_quant.raw_width.fill_(0.5 - 0.2 * index)
    # For one 16 x 16 image: (macs, weights, inputs) of each layer.
    sizes = {
        "stem": (16 * 16 * 8 * 27, 8 * 27, 3 * 256),
        "conv1": (4 * 4 * 16 * 72, 16 * 72, 8 * 64),
        "conv2": (4 * 4 * 16 * 144, 16 * 144, 16 * 16),
        "shortcut": (4 * 4 * 16 * 8, 16 * 8, 8 * 64),
        "head": (16 * 5, 16 * 5, 16),
    }
    assert set(layers) == set(sizes)
    w = {n: float(m.weight_fake_quant.bit_width().detach()) for n, m in layers.items()}
    a = {n: float(m.input_fake_quant.bit_width().detach()) for n, m in layers.items()}
    assert len(set(w.values()) | set(a.values())) > 5
    expected = {
        "mean_weight_bits": sum(w[n] * s[1] for n, s in sizes.items()) / sum(s[1] for s in sizes.values()),
        "mean_activation_bits": sum(a[n] * s[2] for n, s in sizes.items()) / sum(s[2] for s in sizes.values()),
        "bops": sum(w[n] * a[n] * s[0] for n, s in sizes.items()),
        "weight_bytes": sum(w[n] * s[1] for n, s in sizes.items()) / 8,
    }
    costs = model.meta["fxquant"].costs
    for name, measure in MEASURES.items():
        assert float(measure(layers, costs).detach()) == pytest.approx(expected[name], rel=1e-5)


def test_accumulated_gradients(images):
    """Two forwards before one backward: the running mean, which the first one's graph used, may move on."""
    model, loss = prepared(images, "gdnsq", 4), QATLoss(F.cross_entropy)
    for layer in cost.qat_layers(model).values():
        layer.weight_fake_quant.temperature = 1.0
    total = loss(model, images, LABELS).total + loss(model, images, LABELS).total
    total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_frozen_estimators_add_nothing(images):
    model = prepared(images, "pege", 3)
    loss = QATLoss(F.cross_entropy)
    assert loss(model, images, LABELS).estimator.item() > 0
    fxquant.freeze(model)
    assert loss(model, images, LABELS).estimator.item() == 0
    assert any(isinstance(m, PEGE) for m in model.modules())


# ---- oscillation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_oscillation_draws_weights_to_their_grid_points(images, bits):
    """The value against its definition in float64; the gradient is to weights alone, and descent ends on the grid."""
    model = prepared(images, "lsq", bits)
    layers = cost.qat_layers(model).values()
    expected = 0.0
    for layer in layers:
        scale, _ = layer.weight_fake_quant.calculate_qparams()
        scale = scale.double().reshape(-1, *[1] * (layer.weight.ndim - 1))
        top = max(2 ** (bits - 1) - 1, 1)
        w = layer.weight.detach().double()
        nearest = torch.where(w >= 0, 1.0, -1.0) if bits == 1 else (w / scale).round().clamp(-top, top)
        expected += (nearest * scale - w.clamp(-top * scale, top * scale)).square().sum().item()
    term = oscillation(model)
    assert term.item() == pytest.approx(expected, rel=1e-4)
    term.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())} <= {
        name for name, p in model.named_parameters() if name.endswith(".weight") and p.ndim > 1
    }
    weights = [layer.weight for layer in layers]
    optimizer = torch.optim.SGD(weights, lr=0.5)  # half the distance squared: one step leads there
    optimizer.step()
    assert oscillation(model).item() < 1e-6 * max(expected, 1)


def test_widths_that_are_still_learned_do_not_oscillate(images):
    assert oscillation(prepared(images, "nipq", (2, 8))).item() == 0
    assert oscillation(prepared(images, "nipq", 2)).item() == 0  # noise takes the place of rounding
    model = prepared(images, "lsq", 2)
    fxquant.freeze(model)
    assert oscillation(model).item() == 0


# ---- autocast --------------------------------------------------------------------------------------------


def test_under_autocast_quantizers_and_losses_stay_in_float32(images):
    model, teacher = prepared(images, "lsq", 4), TinyResidual()
    quantized, computed = set(), set()
    for layer in cost.qat_layers(model).values():
        for quantizer in (layer.input_fake_quant, layer.weight_fake_quant):
            quantizer.register_forward_hook(lambda module, args, out: quantized.add(out.dtype))
        compute = layer._compute
        layer._compute = lambda *args, compute=compute: (out := compute(*args), computed.add(out.dtype))[0]
    criterion = QATLoss(F.cross_entropy, teacher=teacher)
    plain = criterion(copy.deepcopy(model), images, LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        parts = criterion(model, images, LABELS)
    assert (quantized, computed) == ({torch.float32}, {torch.float32, torch.bfloat16})
    assert {part.dtype for part in parts} == {torch.float32}
    assert parts.total.item() == pytest.approx(plain.total.item(), rel=0.05)
    parts.total.backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
