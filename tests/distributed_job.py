"""What ``test_distributed.py`` has several processes do: ``python -m tests.distributed_job FOLDER``, launched.

Every process leaves what it has in the end in ``FOLDER/<process>.pt``. ``... crash ARGUMENTS`` is ``fxquant
ARGUMENTS``, the second process of which is killed in its third step.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import torch
from torch import nn

import fxquant as fq
from fxquant import checkpoint
from fxquant.controller import Controller, param_groups
from fxquant.data import Batches
from fxquant.distributed import whole_batch
from fxquant.errors import FxQuantError, OutputFolderError
from fxquant.loss import QATLoss
from fxquant.recipe import DivergenceSection, load_recipe, parse_recipe
from fxquant.train import Silent, run
from fxquant.train.guard import Guard
from fxquant.train.keeper import Keeper
from fxquant.train.loop import Loop, Stage
from fxquant.train.processes import Processes, leave, seed_everything

from .conftest import RECIPES
from .models import TinyResidual
from .test_divergence import Notes

STEPS, BATCH = 10, 16  # an epoch
STEP_SPOILT = 7  # of four an epoch

# Estimators with the options that leave nothing to chance, and those that draw.
EXACT = {"ste": {}, "lsq": {}, "ewgs": {}, "pege": {"curriculum": 0.0}, "gdnsq": {"noise_gradient": False}}
RANDOM = {"pege": {}, "gdnsq": {}, "nipq": {}}

SHORT = ["float.epochs=1", "train.epochs=2", "quantization.lower=[]", "data.batch_size=256"]
RUN = RECIPES / "digits_mixed4_nipq.toml"

NO_RECIPE = parse_recipe(
    {"name": "tiny", "model": {"name": "none"}, "data": {"name": "digits"}, "float": {"epochs": 1}}, "here"
)


def trained(
    processes: Processes,
    folder: Path,
    estimator: str,
    options: dict,
    *,
    epochs: int = 5,
    dtype: torch.dtype = torch.float64,
    accumulate: int = 1,
    hold_batch_norm: bool = False,
) -> dict[str, torch.Tensor]:
    """State of a small model and its objective, as all processes together have trained it.

    In float64, because quantized training is chaotic: where a number lies within rounding of half a step, its code and
    what follows are decided by the order of a sum. For the same reason there is no max pooling: sums of products of
    codes are often equal, and rounding chooses which is the largest.
    """
    torch.set_default_dtype(dtype)
    try:
        return _trained(processes, folder, estimator, options, epochs, accumulate, hold_batch_norm)
    finally:
        torch.set_default_dtype(torch.float32)


def _trained(processes, folder, estimator, options, epochs, accumulate, hold_batch_norm):
    seed_everything(0)
    images, labels = torch.randn(BATCH * STEPS, 3, 12, 12), torch.randint(0, 5, (BATCH * STEPS,))
    images[:, 0] += labels[:, None, None]
    float_model = TinyResidual().train()
    float_model.pool = nn.AvgPool2d(2)
    with torch.no_grad():
        float_model(images)
    learns = estimator == "nipq"
    rules = [
        fq.Rule("first|last", 8, 8, estimator, options=options),
        fq.Rule("*", (2, 6) if learns else 4, (2, 6) if learns else 4, estimator, options=options),
    ]
    with whole_batch():
        model = fq.prepare(float_model.eval(), rules, calibration=Batches(images, labels, BATCH)).train()
    loader = Batches(images, labels, BATCH, seed=0)
    loader.share = processes.share
    budget = fq.Budget(mean_weight_bits=4) if learns else None
    controller = Controller(
        model,
        STEPS * epochs,
        budget=budget,
        finetune=0.0 if hold_batch_norm else 0.2,
        freeze_batch_norm=0 if hold_batch_norm else None,
    )
    criterion = QATLoss(nn.CrossEntropyLoss(), budget, teacher=float_model, dampening_weight=0.01)

    def objective(model, images, labels, share):
        parts = criterion(model, images, labels, share)
        return parts.total, parts._asdict()

    stage = Stage(
        "quantized",
        model,
        param_groups(model, 0.02, quantizer_lr=0.01),
        "sgd",
        epochs,
        lambda step: 1.0,
        loader,
        objective,
        Keeper(model),
        accumulate,
        parameters_retire=estimator in ("gdnsq", "nipq"),
        after_step=controller.step,
    )
    Loop(NO_RECIPE, folder, processes, Silent(), 0.0, Guard(DivergenceSection())).train(stage)
    return model.state_dict() | {f"criterion.{name}": value for name, value in criterion.state_dict().items()}


def message_of(recipe, folder: Path, **options) -> str:
    try:
        run(recipe, folder, **options)
    except FxQuantError as error:
        return str(error)
    return "nothing was wrong"


def cut_by_a_full_disk(processes: Processes, folder: Path) -> str:
    """A run whose third checkpoint cannot be written, by the process that writes; what each process says."""
    write, written = checkpoint.save_checkpoint, []

    def fails(*args):
        if len(written) == 2:
            raise OutputFolderError("no space left on the device")
        written.append(write(*args))

    checkpoint.save_checkpoint = fails
    try:
        return message_of(load_recipe(RUN, SHORT), folder)
    finally:
        checkpoint.save_checkpoint = write


def rolled_back(processes: Processes, folder: Path) -> str:
    """A run that goes back to its last checkpoint, since a weight of the second process is spoilt; what is told."""
    check, told = Guard.check, Notes()

    def spoiling(self, place, model, *rest):
        check(self, place, model, *rest)
        if not processes.is_first and place == ("quantized", 2, STEP_SPOILT) and not self.rollbacks:
            dict(model.named_parameters())["layer2.0.conv1.weight"].data.view(-1)[0] = math.nan

    Guard.check = spoiling
    try:
        run(load_recipe(RUN, [*SHORT, "divergence.action=rollback"]), folder, progress=told)
    finally:
        Guard.check = check
    return " ".join(told.notes)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    processes = Processes()
    out = {
        "exact": {name: trained(processes, folder, name, options) for name, options in EXACT.items()},
        "random": {
            name: trained(processes, folder, name, options, epochs=2, dtype=torch.float32)
            for name, options in RANDOM.items()
        },
        "uneven": message_of(load_recipe(RUN, [*SHORT, "data.batch_size=255"]), folder / "uneven"),
        "cut": cut_by_a_full_disk(processes, folder / "cut"),
        "rolled back": rolled_back(processes, folder / "rolled"),
    }
    out["outcomes"] = [
        run(load_recipe(RUN, SHORT), folder / name, resume=name == "cut") is not None for name in ("whole", "cut")
    ]
    torch.save(out, folder / f"{processes.share.index}.pt")
    leave()


def crash(arguments: list[str]) -> None:
    from fxquant import cli

    step, steps = Loop._step, []

    def killed(*args):
        if os.environ["RANK"] == "1" and len(steps) == 2:
            os._exit(9)
        steps.append(None)
        return step(*args)

    Loop._step = killed
    sys.argv = ["fxquant", *arguments]
    cli.main()


if __name__ == "__main__":
    if sys.argv[1] == "crash":
        crash(sys.argv[2:])
    else:
        main(Path(sys.argv[1]))
