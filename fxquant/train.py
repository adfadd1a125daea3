"""What ``fxquant run`` does: float training, quantization-aware training, freeze, convert, lower, verify.

The only module that knows timm's models and optimizers, and accelerate.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx, nn

from . import checkpoint, cost
from .allocate import require_reachable
from .controller import Controller, param_groups
from .convert import convert, load_tensors
from .data import Data, Loader, open_data
from .errors import CheckpointError, FxQuantError, NonFiniteError, UnknownNameError
from .files import write_json
from .freeze import freeze, settle
from .loss import QATLoss
from .lower import lower, onnx, packed, require_engine
from .prepare import prepare
from .recipe import Recipe
from .report import layer_rows
from .schedule import Schedule, cosine, linear
from .spec import get_backend
from .verify import VerifyReport, verify


class Progress(Protocol):
    """What a run tells whoever watches it."""

    def start(self, stage: str, steps: int, done: int = 0) -> None:
        """A stage of that many steps begins, ``done`` of them already taken."""

    def step(self, values: dict[str, float]) -> None:
        """A step was taken; what to show beside the bar."""

    def prepared(self, model: fx.GraphModule) -> None:
        """The model is prepared: who got which bits can be shown before training."""


class Silent:
    """Tells nobody."""

    def start(self, stage: str, steps: int, done: int = 0) -> None:
        pass

    def step(self, values: dict[str, float]) -> None:
        pass

    def prepared(self, model: fx.GraphModule) -> None:
        pass


@dataclass
class RunOutcome:
    """What a run leaves in memory beside its files."""

    result: dict[str, Any]
    report: VerifyReport
    model: fx.GraphModule
    reference: fx.GraphModule
    lowered: dict[str, fx.GraphModule | onnx.OnnxModel | onnx.OpenVinoModel] = field(default_factory=dict)


def run(recipe: Recipe, output: Path, *, resume: bool = False, progress: Progress | None = None) -> RunOutcome:
    """Carry out a recipe and leave its files in ``output``; see :func:`fxquant.checkpoint.claim_output`.

    Writes ``recipe.json``, ``checkpoint.pt`` after every epoch, ``model.fxq`` and ``result.json``. A run
    that was cut and is resumed ends with the same integers, bit for bit, on a CPU.

    Raises:
        FxQuantError: for anything a user can mend. Parity is in the outcome's report, for the caller to judge.
    """
    checkpoint.claim_output(output, resume)
    state = checkpoint.checkpoint_for(output, recipe) if resume else None
    return _Run(recipe, output, progress or Silent()).execute(state)


class _Run:
    def __init__(self, recipe: Recipe, output: Path, progress: Progress):
        from accelerate import Accelerator

        self.recipe, self.output, self.progress = recipe, output, progress
        self.started = time.perf_counter()
        self.accelerator = Accelerator()
        if self.accelerator.num_processes > 1:
            raise FxQuantError(
                f"fxquant run was started in {self.accelerator.num_processes} processes; it trains in one. Start it "
                "without accelerate launch, or with --num_processes 1"
            )
        self.data = self._rehearse()
        _seed_everything(recipe.seed)
        self.float_model = build_model(recipe).to(self.accelerator.device)

    def execute(self, state: dict | None) -> RunOutcome:
        recipe = self.recipe
        write_json(self.output / checkpoint.RECIPE, recipe.model_dump(mode="json", by_alias=True))
        stage = state["stage"] if state else "float"
        if state:
            self.started -= state["seconds"]
        if stage == "float":
            self._train_float(state)
            state = None
        else:
            self.float_model.load_state_dict(state["float_model"])
        self.float_model.eval()
        float_accuracy = _accuracy(*predictions(self.float_model, self.data.test()))

        # The quantized training starts from its own seed, so that a resumed run and a whole one agree.
        _seed_everything(recipe.seed)
        plain = self.data.plain()  # for calibration, BatchNorm and the check of kernels alike
        model = prepare(
            self.float_model,
            recipe.built_rules(),
            calibration=plain,
            backend=recipe.quantization.backend,
            residual_bits=recipe.quantization.residual_bits,
        )
        self.progress.prepared(model)
        history = self._train_quantized(model, state)
        budget = recipe.built_budget()
        settle(model, budget, calibration=None if recipe.train.reestimate_batch_norm else ())
        model.cpu()  # integer kernels and the exactness of sums are a matter of the CPU
        simulated, labels = predictions(model, self.data.test())
        freeze(model, budget, calibration=())  # BatchNorm has been re-estimated
        reference = convert(model)
        packed.save(reference, self.output / checkpoint.PACKED_MODEL, notes={"recipe": recipe.to_json()})
        lowered = {b: lower_to(reference, b, self.output / checkpoint.ONNX_MODEL) for b in recipe.quantization.lower}
        report = verify(model, reference, self.data.test(), lowered=lowered)
        result = self._result(model, report, float_accuracy, history)
        result["simulated"] = {
            "accuracy": _accuracy(simulated, labels),
            "argmax_agreement": _accuracy(simulated, predictions(model, self.data.test())[0]),
        }
        write_json(self.output / checkpoint.RESULT, result)
        return RunOutcome(result, report, model, reference, lowered)

    def _rehearse(self) -> Data:
        """Whatever can be wrong with the recipe comes out here, before anything is trained or written."""
        float_model, data = _model_and_data(self.recipe)
        model = _prepared_without_data(self.recipe, float_model, data)
        require_reachable(model, self.recipe.built_budget())
        for name in (self.recipe.float_training.optimizer, self.recipe.train.optimizer):
            make_optimizer(param_groups(model, 1e-3), name)
        for backend in self.recipe.quantization.lower:
            if get_backend(backend).reads_onnx:
                onnx.require_packages("onnx", "onnxscript", backend)
            else:
                require_engine(backend)
        with torch.no_grad():
            outputs = float_model.eval()(data.example).shape[-1]
        if data.classes not in (None, outputs):
            raise FxQuantError(
                f"the data set {self.recipe.data.name!r} has {data.classes} classes, the model {outputs} outputs, so "
                f"labels would not mean what they mean to the model; set model.options.num_classes = {data.classes}"
            )
        return data

    # ---- stages ------------------------------------------------------------------------------------------

    def _train_float(self, state: dict | None) -> None:
        section = self.recipe.float_training
        loader = self.data.train(self.recipe.seed)
        groups = param_groups(self.float_model, section.lr, weight_decay=section.weight_decay)
        criterion = nn.CrossEntropyLoss()

        def loss_of(model, images, labels):
            loss = criterion(model(images), labels)
            return loss, {"loss": loss}

        self._loop(
            "float",
            self.float_model,
            groups,
            section.optimizer,
            section.epochs,
            _warmup_cosine(section.epochs * len(loader), 0.05),
            loader,
            loss_of,
            state,
            dict,
            lambda: None,
        )

    def _train_quantized(self, model: fx.GraphModule, state: dict | None) -> list[dict]:
        recipe, section = self.recipe, self.recipe.train
        loader = self.data.train(self.recipe.seed)
        total = section.epochs * len(loader)
        budget = recipe.built_budget()
        criterion = QATLoss(
            nn.CrossEntropyLoss(),
            budget,
            teacher=self.float_model,
            distillation=section.distillation,
            task_weight=section.task_weight,
            distillation_weight=section.distillation_weight,
            budget_weight=section.budget_weight,
        ).to(self.accelerator.device)
        groups = param_groups(model, section.lr, quantizer_lr=section.quantizer_lr, weight_decay=section.weight_decay)
        held = None if section.freeze_batch_norm is None else round(section.freeze_batch_norm * total)
        controller = Controller(model, total, budget=budget, finetune=section.finetune, freeze_batch_norm=held)
        layers, costs = cost.qat_layers(model), model.meta["fxquant"].costs
        history: list[dict] = list(state["history"]) if state else []

        def loss_of(model, images, labels):
            parts = criterion(model, images, labels)
            shown = {k: v for k, v in parts._asdict().items() if k == "total" or bool(v != 0)}
            with torch.no_grad():
                shown["W bits"] = cost.mean_weight_bits(layers, costs)
                shown["A bits"] = cost.mean_activation_bits(layers, costs)
            return parts.total, shown

        def extra_state():
            return {
                "float_model": self.float_model.state_dict(),
                "controller": controller.state_dict(),
                "criterion": criterion.state_dict(),
                "history": history,
            }

        if state:
            criterion.load_state_dict(state["criterion"])
            controller.load_state_dict(state["controller"])
        self._loop(
            "quantized",
            model,
            groups,
            section.optimizer,
            section.epochs,
            _warmup_cosine(total, section.warmup),
            loader,
            loss_of,
            state,
            extra_state,
            controller.step,
            history,
        )
        return history

    def _loop(
        self,
        stage: str,
        model: nn.Module,
        groups: list[dict],
        optimizer_name: str,
        epochs: int,
        schedule: Schedule,
        loader: Loader,
        loss_of: Callable,
        state: dict | None,
        extra_state: Callable[[], dict],
        after_step: Callable[[], None],
        history: list[dict] | None = None,
    ) -> None:
        """Epochs of one stage, a checkpoint after each."""
        optimizer = make_optimizer(groups, optimizer_name)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        first = 0
        if state:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            _restore_random(state["random"])
            first = state["epochs_done"]
        wrapped, optimizer = self.accelerator.prepare(model, optimizer)
        device = self.accelerator.device
        self.progress.start(stage, epochs * len(loader), first * len(loader))
        for epoch in range(first, epochs):
            loader.epoch = epoch
            wrapped.train()
            for images, labels in loader:
                loss, shown = loss_of(wrapped, images.to(device), labels.to(device))
                if not torch.isfinite(loss):
                    raise NonFiniteError(_diverged(model, stage, epoch, images.to(device)))
                optimizer.zero_grad()
                self.accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                after_step()
                shown = {name: float(value.detach()) for name, value in shown.items()}
                self.progress.step(shown)
            if history is not None:
                history.append({"epoch": epoch + 1, **shown})
            checkpoint.save_checkpoint(
                self.output,
                self.recipe,
                {
                    "stage": stage,
                    "epochs_done": epoch + 1,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scheduler": scheduler.state_dict(),
                    "random": _random_state(),
                    "seconds": time.perf_counter() - self.started,
                    **extra_state(),
                },
            )

    # ---- result ------------------------------------------------------------------------------------------

    def _result(
        self, model: fx.GraphModule, report: VerifyReport, float_accuracy: float, history: list[dict]
    ) -> dict[str, Any]:
        layers, costs = cost.qat_layers(model), model.meta["fxquant"].costs
        recipe = self.recipe
        return {
            "recipe": recipe.name,
            "recipe_digest": recipe.digest(),
            "model": recipe.model.name,
            "estimator": recipe.quantization.estimator,
            "seed": recipe.seed,
            "images": report.images,
            "float_accuracy": float_accuracy,
            "fake_quant_accuracy": report.fake_quant_accuracy,
            "reference_accuracy": report.reference_accuracy,
            "lowered": {
                backend: {
                    "accuracy": parity.accuracy,
                    "argmax_agreement": parity.argmax_agreement,
                    "logits_equal": parity.logits_equal,
                    "max_code_difference": parity.max_code_difference,
                    "worst_layer": parity.worst_layer,
                }
                for backend, parity in report.lowered.items()
            },
            "mean_weight_bits": float(cost.mean_weight_bits(layers, costs)),
            "mean_activation_bits": float(cost.mean_activation_bits(layers, costs)),
            "bops": float(cost.bops(layers, costs)),
            "weights_bytes": {
                "float": cost.float_bytes(self.float_model),
                "ideal": cost.ideal_weight_bytes(model),
            },
            "parity": {"reference_equals_fake_quant": report.reference_equals_fake_quant},
            "layers": layer_rows(model),
            "history": history,
            "seconds": time.perf_counter() - self.started,
            "torch": torch.__version__,
        }


def lower_to(
    reference: fx.GraphModule,
    backend: str,
    onnx_file: Path,
    *,
    threads: int | None = None,
    weight_only_linear: bool = False,
) -> fx.GraphModule | onnx.OnnxModel | onnx.OpenVinoModel:
    """The reference on a backend: lowered, or in a runtime that reads ``onnx_file``, which is written then.

    Args:
        threads: a runtime's own, its choice when None; torch's kernels follow ``torch.set_num_threads``.
        weight_only_linear: of :func:`fxquant.export_onnx`; where no file is written it says nothing.
    """
    if not get_backend(backend).reads_onnx:
        return lower(reference, backend)
    onnx.export_onnx(reference, onnx_file, weight_only_linear=weight_only_linear)
    return onnx.RUNTIMES[backend](onnx_file, threads)


def build_model(recipe: Recipe) -> nn.Module:
    """The float timm model of a recipe.

    Raises:
        UnknownNameError: for a name that timm does not have, with the nearest.
        FxQuantError: for options it does not take, or weights that cannot be loaded.
    """
    from . import timm

    names = timm.list_models()
    if recipe.model.name.split(".")[0] not in names:
        raise UnknownNameError("timm model", recipe.model.name, names)
    section = recipe.model
    pretrained = section.pretrained and section.checkpoint is None
    loads = pretrained or "checkpoint_path" in section.options
    try:
        model = timm.create_model(section.name, pretrained=pretrained, **section.options)
    except Exception as error:  # whatever the model's own code makes of its arguments
        reason = _in_short(error)
        if loads and not isinstance(error, (TypeError, ValueError, AssertionError)):
            raise FxQuantError(
                f"the weights of {section.name} cannot be loaded ({reason}). Pretrained ones come over the "
                "network once, where there are any; weights in a file are taken with model.checkpoint = FILE"
            ) from error
        raise FxQuantError(f"timm cannot build {section.name} with {section.options} ({reason})") from error
    if section.checkpoint is not None:
        _load_weights(model, section.name, Path(section.checkpoint).expanduser())
    return model


def _load_weights(model: nn.Module, name: str, path: Path) -> None:
    """Load a file of weights strictly, without running anything that may be in it."""
    from . import timm

    if not path.is_file():
        raise FxQuantError(f"model.checkpoint = {str(path)!r} is no file; give one with the weights of {name}")
    try:
        timm.load_checkpoint(model, str(path), strict=True, weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file makes the readers stumble over
        raise FxQuantError(
            f"the weights of {name} cannot be loaded from model.checkpoint = {str(path)!r} ({_in_short(error)}). "
            "It takes a state dict of the same model, written by torch.save or safetensors"
        ) from error


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def make_optimizer(groups: list[dict], name: str) -> torch.optim.Optimizer:
    """timm's optimizer of that name over parameter groups that carry their own lr and weight_decay."""
    from . import timm

    try:
        return timm.create_optimizer_v2(groups, opt=name, lr=groups[0]["lr"], weight_decay=0.0)
    except (ValueError, AssertionError) as error:
        raise FxQuantError(f"optimizer {name!r} was asked for, which timm does not make: {error}") from None


@torch.no_grad()
def predictions(model: nn.Module, batches: Loader) -> tuple[Tensor, Tensor]:
    """The argmax of each image, and its label, [N] each."""
    device = next(model.parameters()).device
    pairs = [(model(images.to(device)).argmax(-1).cpu(), labels) for images, labels in batches]
    return tuple(torch.cat(part) for part in zip(*pairs, strict=True))


def _accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Per cent of images whose argmax is their label."""
    return 100 * float((predicted == labels).double().mean())


@dataclass
class LoadedRun:
    """An integer model read back from disk, with the data it is checked on."""

    recipe: Recipe
    reference: fx.GraphModule
    data: Data


def load_run(path: Path) -> LoadedRun:
    """The reference graph of a finished run: from its folder, its ``model.fxq`` or its ``checkpoint.pt``.

    Raises:
        CheckpointError: where the file is missing, damaged, foreign, unfinished, or does not fit its own recipe.
    """
    path = path / checkpoint.PACKED_MODEL if path.is_dir() else path
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give the folder of a finished run, or a file of it")
    if path.suffix == Path(checkpoint.CHECKPOINT).suffix:
        return _from_checkpoint(path)
    notes = packed.read_notes(path)
    if "recipe" not in notes:
        raise CheckpointError(
            f"{path} was not left by fxquant run, so nothing tells its model and data; load it with fxquant.load"
        )
    recipe = checkpoint.stored_recipe(notes["recipe"], path)
    float_model, data = _model_and_data(recipe)
    reference = packed.load(path, float_model)
    return _loaded(recipe, reference, data)


def _from_checkpoint(path: Path) -> LoadedRun:
    content = checkpoint.load_checkpoint(path)
    recipe = checkpoint.stored_recipe(content["recipe"], path)
    done = content["epochs_done"] if content["stage"] == "quantized" else 0
    if done < recipe.train.epochs:
        raise CheckpointError(
            f"the run of {path} has done {done} of {recipe.train.epochs} quantized epochs; finish it with "
            "fxquant run ... --resume"
        )
    float_model, data = _model_and_data(recipe)
    model = _prepared_without_data(recipe, float_model, data)
    load_tensors(model, content["model"], f"{path} does not fit the model of its own recipe ({recipe.model.name})")
    freeze(model, recipe.built_budget(), calibration=data.plain() if recipe.train.reestimate_batch_norm else ())
    return _loaded(recipe, convert(model), data)


def _loaded(recipe: Recipe, reference: fx.GraphModule, data: Data) -> LoadedRun:
    reference.meta["fxquant"].calibration = data.plain()
    return LoadedRun(recipe, reference, data)


def _model_and_data(recipe: Recipe) -> tuple[nn.Module, Data]:
    """A recipe's model, without pretrained weights, and its data set, transformed as that model wants it."""
    from . import timm

    bare = {key: value for key, value in recipe.model.options.items() if key != "checkpoint_path"}
    section = recipe.model.model_copy(update={"pretrained": False, "checkpoint": None, "options": bare})
    model = build_model(recipe.model_copy(update={"model": section}))
    return model, open_data(**recipe.data.model_dump(), config=timm.resolve_model_data_config(model))


def _prepared_without_data(recipe: Recipe, model: nn.Module, data: Data) -> fx.GraphModule:
    """A recipe's prepared model with the right structure and no ranges yet, to load a file into."""
    return prepare(
        model,
        recipe.built_rules(),
        example_inputs=(data.example,),
        backend=recipe.quantization.backend,
        residual_bits=recipe.quantization.residual_bits,
    )


def _warmup_cosine(steps: int, warmup: float) -> Schedule:
    rise = max(round(warmup * steps), 1)
    up, down = linear(1 / rise, 1.0, rise), cosine(1.0, 0.0, max(steps - rise, 1), rise)
    return lambda step: up(step) if step < rise else down(step)


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _random_state() -> dict[str, Any]:
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def _restore_random(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


@torch.no_grad()
def _diverged(model: nn.Module, stage: str, epoch: int, images: Tensor) -> str:
    """The message for a loss that is no number: the first module whose output is not finite."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            where = f"{name!r} holds NaN or infinity"
            break
    else:
        where = f"activations overflow, first in {_first_overflow(model, images)!r}"
    return (
        f"the loss is NaN or infinite in epoch {epoch + 1} of {stage} training: {where}. Lower train.lr or "
        "train.quantizer_lr; the last checkpoint is of the epoch before"
    )


def _first_overflow(model: nn.Module, images: Tensor) -> str:
    found: list[str] = []

    def watch(name: str) -> Iterator:
        def hook(module, args, out):
            if isinstance(out, Tensor) and not found and not torch.isfinite(out).all():
                found.append(name)

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if not list(m.children())]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the loss itself"
