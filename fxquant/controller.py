"""Controller: which phase training is in, and the schedule values of that step."""

from __future__ import annotations

from torch import nn

from .cost import quantizer_parameters
from .errors import CheckpointError, SpecError
from .estimators import Estimator, estimators_of
from .freeze import hold_batch_norm
from .grid import check_bits
from .schedule import require_in_time, staircase
from .spec import Budget
from .widths import fix_widths, require_reachable


class Controller:
    """Takes a prepared model through its phases; call :meth:`step` after every optimizer step.

    * ``train``: estimators follow their schedules (PEGE's curriculum, GDNSQ's temperature), and
      NIPQ trains with noise.
      With ``start_bits``, widths that a rule fixes below it come down to it one bit at a time.
    * ``finetune``, the last ``finetune`` share of the steps: learned widths have become whole, inside the budget,
      and noise is off; weights and ranges go on learning what will ship.

    Args:
        model: from :func:`fxquant.prepare` (or torch.ao's own prepare with our qconfigs).
        total_steps: optimizer steps of the whole training.
        budget: what the whole widths must keep to. Without one, widths that are learned within an interval go on
            learning until :func:`fxquant.freeze`. A budget needs a model from :func:`fxquant.prepare`.
        finetune: share of the steps, in [0, 1).
        freeze_batch_norm: steps after which BatchNorm's running statistics stay as they are, and normalise in training
            too (gamma and beta train on); they train throughout when not given.
        start_bits: whole width at which quantizers with a lower one begin (gradual quantization); at each change the
            next tensor sets the range anew. Their own from the start when not given. Widths that are learned are not
            touched, nor those that GDNSQ squeezes itself.
        squeeze: share of the steps over which they come down, each width for as long as another.

    Raises:
        SpecError: for steps or a share that make no sense, or a budget below the lowest widths of the rules.
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        *,
        budget: Budget | None = None,
        finetune: float = 0.25,
        freeze_batch_norm: int | None = None,
        start_bits: int | None = None,
        squeeze: float = 0.5,
    ):
        if total_steps < 1:
            raise SpecError(f"total_steps={total_steps!r} was asked for; training takes at least one step")
        if not 0 <= finetune < 1:
            raise SpecError(f"finetune={finetune!r} was asked for; it is a share of the steps, from 0 to below 1")
        if freeze_batch_norm is not None and freeze_batch_norm < 0:
            raise SpecError(f"freeze_batch_norm={freeze_batch_norm!r} was asked for; it is a number of steps")
        if start_bits is not None:
            require_in_time(squeeze, finetune)
        require_reachable(model, budget)
        self.model, self.total_steps, self.budget = model, total_steps, budget
        self.freeze_batch_norm = freeze_batch_norm
        self.finetune_begins = round((1 - finetune) * total_steps)
        self.steps_done = 0
        self._schedules = [
            (estimator, name, schedule)
            for estimator in estimators_of(model)
            for name, schedule in estimator.schedules(self.finetune_begins).items()
        ]
        down = min(squeeze * total_steps, self.finetune_begins, total_steps - 1)  # a step at least for the last
        self._widths = [
            (estimator, staircase(check_bits(start_bits, "start_bits"), estimator.bits, down))
            for estimator in estimators_of(model)
            if start_bits is not None and _comes_down(estimator, start_bits)
        ]
        self.width_changes = 0  # how often widths were changed here: weights mean something else afterwards
        self._settled = False
        self._holds: bool | None = None  # of BatchNorm: what another Controller left is not known
        self._apply()

    @property
    def phase(self) -> str:
        """``train`` or ``finetune``."""
        return "finetune" if self.steps_done >= self.finetune_begins else "train"

    @property
    def final(self) -> bool:
        """Whether every width is the one that ships, without noise, and the next step sets no range anew: what is
        measured now is what ships."""
        estimators = estimators_of(self.model)
        whole = [e.whole_bits == e.bits for e in estimators if isinstance(e.bits, int)]
        return all(e.settled and not e.refit for e in estimators) and all(whole)

    @property
    def scheduled(self) -> dict[str, float]:
        """What the estimators' schedules say at this step (PEGE's ``replaced``, GDNSQ's ``temperature``), by name; the
        mean over the estimators that follow one."""
        values: dict[str, list[float]] = {}
        for estimator, name, _ in self._schedules:
            values.setdefault(name, []).append(getattr(estimator, name))
        return {name: sum(of_each) / len(of_each) for name, of_each in values.items()}

    def step(self) -> None:
        """One optimizer step was taken."""
        self.steps_done += 1
        self._apply()

    def _apply(self) -> None:
        for estimator, name, schedule in self._schedules:
            setattr(estimator, name, schedule(self.steps_done))
        changed = False
        for estimator, width in self._widths:
            if estimator.whole_bits != (bits := width(self.steps_done)):
                estimator.change_width(bits)
                changed = True
        hold = self.freeze_batch_norm is not None and self.steps_done >= self.freeze_batch_norm
        if hold != self._holds:
            hold_batch_norm(self.model, hold)
            self._holds = hold
        if self.phase == "finetune" and not self._settled:
            open_ones = [e for e in estimators_of(self.model) if not e.settled]
            fix_widths(self.model, self.budget, keep_learning=not self.budget)
            self._settled, changed = True, changed or any(e.settled for e in open_ones)
        self.width_changes += changed

    def state_dict(self) -> dict:
        """What :meth:`load_state_dict` needs to go on: plain numbers. Widths are part of the model's own state."""
        return {"steps_done": self.steps_done, "total_steps": self.total_steps, "settled": self._settled}

    def load_state_dict(self, state: dict) -> None:
        """Go on where ``state`` was taken; the model's own state is loaded apart from this.

        Raises:
            CheckpointError: where the state is of a training of another length.
        """
        if state["total_steps"] != self.total_steps:
            raise CheckpointError(
                f"the checkpoint is of a training of {state['total_steps']} steps, this one has {self.total_steps}; "
                "resume with the same epochs, batch size and data"
            )
        self.steps_done, self._settled = state["steps_done"], state["settled"]
        self._apply()


def _comes_down(estimator: Estimator, start_bits: int) -> bool:
    return isinstance(estimator.bits, int) and estimator.bits < start_bits and not estimator.learns_width


def param_groups(
    model: nn.Module, lr: float, *, quantizer_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict]:
    """Parameter groups for any optimizer: weights, norms and biases, quantizers.

    Args:
        model: a prepared model.
        lr: learning rate of weights, norms and biases.
        quantizer_lr: learning rate of steps, ranges, zero-points and widths; ``lr`` when not given.
        weight_decay: for weights alone. Decay would pull a quantizer's logarithms and a norm's scale to 0.
    """
    quantizers = [p for p in quantizer_parameters(model) if p.requires_grad]
    known = {id(p) for p in quantizer_parameters(model)}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [
        {
            "name": "weights",
            "params": [p for p in others if p.ndim > 1],
            "lr": lr,
            "weight_decay": weight_decay,
        },
        {"name": "norms", "params": [p for p in others if p.ndim <= 1], "lr": lr, "weight_decay": 0.0},
        {
            "name": "quantizers",
            "params": quantizers,
            "lr": lr if quantizer_lr is None else quantizer_lr,
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]
