"""A recipe carried out: its stages one after the other, and the files they leave."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .. import checkpoint, cost
from ..allocate import require_allocatable
from ..analyze import analyze
from ..compiler import require_compiler
from ..controller import Controller, param_groups
from ..convert import convert
from ..data import Data, Loader, dead_workers_in_words
from ..distributed import even_parts, whole_batch
from ..dynamics import CapacityRecorder
from ..errors import FxQuantError, in_short
from ..estimators import estimators_of
from ..estimators.passes import compiled_quantizers
from ..files import write_bytes, write_json, write_text
from ..freeze import batch_norms, freeze, settle
from ..loss import QATLoss
from ..lower import LoweredLayer, onnx, operators, packed, require_backend
from ..recipe import FloatSection, Recipe, TrainSection
from ..report import layer_rows
from ..schedule import cosine
from ..verify import VerifyReport, verify
from ..widths import require_reachable
from .allocation import ChosenRules, allocate_for, rules_of
from .average import WeightAverage
from .build import (
    bare_model,
    build_model,
    make_optimizer,
    model_and_data,
    prepared_with,
    prepared_without_data,
    statistics_images,
)
from .divergence import NOWHERE
from .evaluate import accuracy, predictions
from .guard import Diverged, Guard
from .keeper import Keeper
from .loop import History, Loop, Stage, learning_rate
from .precision import computed_in
from .processes import Processes, seed_everything
from .progress import Progress, Silent
from .target import lower_to


@dataclass
class RunOutcome:
    """What a run leaves in memory beside its files; one that trains in float alone has its result only."""

    result: dict[str, Any]
    report: VerifyReport | None = None
    model: fx.GraphModule | None = None
    reference: fx.GraphModule | None = None
    lowered: dict[str, fx.GraphModule | onnx.OnnxModel | onnx.OpenVinoModel] = field(default_factory=dict)


@dead_workers_in_words()
def run(recipe: Recipe, output: Path, *, resume: bool = False, progress: Progress | None = None) -> RunOutcome | None:
    """Carry out a recipe and leave its files in ``output``; see :func:`fxquant.checkpoint.claim_output`.

    Writes ``recipe.json``, ``checkpoint.pt`` after every epoch, ``model.fxq`` and ``result.json``; a recipe without
    ``[train]`` leaves its float weights, ``float.safetensors``, in place of ``model.fxq``. A run that was cut and is
    resumed ends with the same weights and integers, bit for bit, on a CPU.

    In several processes (:mod:`fxquant.train.processes`) all call this; the first writes the files and tells
    ``progress``, and the others return ``None`` after the last epoch, while it converts and verifies. A run that is
    begun in the same folder meanwhile is refused.

    Raises:
        FxQuantError: for anything a user can mend. Parity is in the outcome's report, for the caller to judge.
    """
    processes = Processes()
    progress = progress if progress is not None and processes.is_first else Silent()
    guard = Guard(recipe.divergence)
    with processes.warnings_of_first(), contextlib.ExitStack() as until_the_end:
        state = processes.from_first(lambda: _claim(recipe, output, resume, until_the_end))
        started = time.perf_counter() - (state["seconds"] if state else 0.0)
        if resume and state is None:
            progress.note(f"{output} holds no checkpoint yet; starting from the beginning")
        while True:
            try:
                return _Run(recipe, output, processes, progress, guard, started, state).execute()
            except Diverged as diverged:
                # All diverge at one step, since losses are means over processes; not all need to have seen where.
                causes = processes.gather(diverged.cause)
                diverged.cause = next((cause for cause in causes if NOWHERE not in cause), causes[0])
                rollback = guard.roll_back(diverged)
            progress.note(rollback)
            # None before the first: from the beginning
            state = processes.from_first(lambda: checkpoint.checkpoint_for(output, recipe))


def _claim(recipe: Recipe, output: Path, resume: bool, until_the_end: contextlib.ExitStack) -> dict[str, Any] | None:
    until_the_end.enter_context(checkpoint.occupied(output))
    checkpoint.claim_output(output, resume)
    return checkpoint.checkpoint_for(output, recipe) if resume else None


class _Run:
    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        processes: Processes,
        progress: Progress,
        guard: Guard,
        started: float,
        state: dict[str, Any] | None,
    ):
        self.recipe, self.output, self.processes = recipe, output, processes
        self.progress, self.guard, self.started, self.state = progress, guard, started, state
        self.device = processes.accelerator.device
        self.float_history = History()
        with processes.together():
            self.data = self._rehearse()
            seed_everything(recipe.seed)
            # What is resumed has its weights from the checkpoint; where it began need not be there any more.
            self.float_model = (build_model if state is None else bare_model)(recipe).to(self.device)

    def execute(self) -> RunOutcome | None:
        recipe, state = self.recipe, self.state
        self._write(write_json, checkpoint.RECIPE, recipe.model_dump(mode="json", by_alias=True))
        stage = state["stage"] if state else "float"
        if stage == "float":
            self._train_float(state)
            state = None
        else:
            self.float_model.load_state_dict(state["float_model"])
        self.float_model.eval()
        with whole_batch():
            float_accuracy = accuracy(*predictions(self.float_model, self._shared(self.data.test())))
        if not recipe.quantizes:
            return self._leave_float(float_accuracy) if self.processes.is_first else None

        # The quantized training starts from its own seed, so that a resumed run and a whole one agree.
        seed_everything(recipe.seed)
        plain = self.data.plain()  # for calibration and the check of kernels alike
        rules = ChosenRules(rules_of(recipe, state))
        with whole_batch():
            model = prepared_with(recipe, self.float_model, rules.rules, plain)
        if recipe.allocation is not None and state is None:
            # Each process measures the same, that none waits long for another; the first one's widths are taken.
            allocation = allocate_for(recipe, model)
            table = allocation.to_toml(recipe.quantization.estimator, recipe.quantization.options)
            self._write(write_text, checkpoint.RULES, table)
            rules = ChosenRules(self.processes.from_first(lambda: allocation.rules))
            with whole_batch():
                model = prepared_with(recipe, self.float_model, rules.rules, plain)
        self.progress.prepared(model)
        with compiled_quantizers(recipe.train.compile):
            history = self._train_quantized(model, rules, state)
        budget = recipe.built_budget()
        with whole_batch():
            settle(model, budget, calibration=statistics_images(recipe, self.data))
        if not self.processes.is_first:
            return None  # what is left takes one process, and the others need not wait for it
        model.cpu()  # integer kernels and the exactness of sums are a matter of the CPU
        simulated, labels = predictions(model, self.data.test())
        freeze(model, budget, calibration=())  # BatchNorm has been re-estimated
        reference = convert(model)
        packed.save(reference, self.output / checkpoint.PACKED_MODEL, notes={"recipe": recipe.to_json()})
        lowered = {b: lower_to(reference, b, self.output / checkpoint.ONNX_MODEL) for b in recipe.quantization.lower}
        report = verify(model, reference, self.data.test(), lowered=lowered)
        became = {backend: operators(target) for backend, target in lowered.items()}
        result = self._result(model, report, float_accuracy, history, became)
        result["simulated"] = {
            "accuracy": accuracy(simulated, labels),
            "argmax_agreement": accuracy(simulated, report.predicted["frozen"]),
        }
        result |= self._footer(checkpoint.PACKED_MODEL)
        write_json(self.output / checkpoint.RESULT, result)
        return RunOutcome(result, report, model, reference, lowered)

    def _leave_float(self, float_accuracy: float) -> RunOutcome:
        weights = {name: tensor.cpu().contiguous() for name, tensor in self.float_model.state_dict().items()}
        write_bytes(self.output / checkpoint.FLOAT_MODEL, save(weights))
        result = self._header() | {"estimator": None, "float_accuracy": float_accuracy, "lowered": {}}
        result["history"] = self.float_history.epochs
        result |= self._footer(checkpoint.FLOAT_MODEL)
        write_json(self.output / checkpoint.RESULT, result)
        return RunOutcome(result)

    def _rehearse(self) -> Data:
        """Whatever can be wrong with the recipe comes out here, before anything is trained or written."""
        float_model, data = model_and_data(self.recipe)
        self._require_even_parts()
        make_optimizer(param_groups(float_model, 1e-3), self.recipe.float_training.optimizer)
        if self.recipe.quantizes:
            model = prepared_without_data(self.recipe, float_model, self.recipe.built_rules(), data)
            self._require_budget(model)
            make_optimizer(param_groups(model, 1e-3), self.recipe.train.optimizer)
            if self.recipe.train.compile:
                require_compiler("train.compile = true was asked for")
        for backend in self.recipe.quantization.lower if self.recipe.quantizes else ():
            require_backend(backend)
        outputs = self._outputs(float_model, data.example)
        if data.classes not in (None, outputs):
            raise FxQuantError(
                f"the data set {self.recipe.data.name!r} has {data.classes} classes, the model {outputs} outputs, so "
                f"labels would not mean what they mean to the model; set model.options.num_classes = {data.classes}"
            )
        for section in (self.recipe.float_training, self.recipe.train):
            if section is not None and section.epochs:
                self._rehearse_step(float_model, data.example, section)
        return data

    def _outputs(self, float_model: nn.Module, example: Tensor) -> int:
        """How many classes the model tells apart."""
        name, shape = self.recipe.model.name, list(example.shape[1:])
        try:
            with torch.no_grad():
                logits = float_model.eval()(example)
        except Exception as error:  # whatever the model's own code makes of an image
            raise FxQuantError(
                f"{name} does not take images of shape {shape} ({in_short(error)}); set data.image_size or "
                "model.options.in_chans to what it takes"
            ) from error
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise FxQuantError(
                f"{name} with model.options = {self.recipe.model.options} returns {found}; training takes one tensor "
                "with a score for each class, [images, classes]"
            )
        return logits.shape[1]

    def _rehearse_step(self, model: nn.Module, example: Tensor, section: FloatSection | TrainSection) -> None:
        """A step of a section's optimizer, on a part of a batch of one image or two, as small as the section's."""
        images = min(2, self.recipe.data.batch_size // (self.processes.count * section.accumulate))
        optimizer = make_optimizer(param_groups(model, 1e-3), section.optimizer)
        model.train(isinstance(section, FloatSection))  # a prepared model is captured in eval mode, and has but
        for norm in batch_norms(model):  # BatchNorm as in training
            norm.train()
        try:
            logits = model(example.expand(images, -1, -1, -1).contiguous(memory_format=section.memory_format))
            F.cross_entropy(logits, torch.zeros(images, dtype=torch.int64)).backward()
            optimizer.step()
        except Exception as error:  # of BatchNorm with one value a channel, of an optimizer that needs more than this
            raise FxQuantError(
                f"{self.recipe.model.name} cannot be trained with optimizer {section.optimizer!r} on {images} images "
                f"({in_short(error)}); take another optimizer, or a larger data.batch_size for its `accumulate`"
            ) from error

    def _require_even_parts(self) -> None:
        for section in (self.recipe.float_training, self.recipe.train):
            if section is not None:
                parts = self.processes.count * section.accumulate
                what = f"parts ({self.processes.count} processes, accumulate = {section.accumulate})"
                even_parts(range(self.recipe.data.batch_size), parts, what)

    def _require_budget(self, model: fx.GraphModule) -> None:
        budget, section = self.recipe.built_budget(), self.recipe.allocation
        if section is None:
            require_reachable(model, budget)
        else:
            require_allocatable(model, budget, **section.model_dump(exclude={"sensitivity", "batches"}))

    # ---- stages ------------------------------------------------------------------------------------------

    def _train_float(self, state: dict | None) -> None:
        section = self.recipe.float_training
        loader = self._shared(self.data.train(self.recipe.seed))
        criterion = nn.CrossEntropyLoss()

        def objective(model, images, labels, share):
            loss = share * criterion(model(images).float(), labels)
            return loss, {"loss": loss}

        keeper = self._keeper(section, self.float_model)
        stage = Stage(
            "float",
            self.float_model,
            param_groups(self.float_model, section.lr, weight_decay=section.weight_decay),
            section.optimizer,
            section.epochs,
            learning_rate(section.epochs * len(loader), section.warmup),
            loader,
            objective,
            keeper,
            section.accumulate,
            section.sync_batch_norm,
            memory_format=section.memory_format,
            autocast=self._computed_in(section),
            after_step=keeper.after_step,
            history=self.float_history,
        )
        self._loop().train(stage, state)

    def _train_quantized(self, model: fx.GraphModule, rules: ChosenRules, state: dict | None) -> History:
        recipe, section = self.recipe, self.recipe.train
        loader = self._shared(self.data.train(recipe.seed))
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
        ).to(self.device)
        dampening = cosine(0.0, section.dampening, total)
        held = None if section.freeze_batch_norm is None else round(section.freeze_batch_norm * total)
        controller = Controller(
            model,
            total,
            budget=budget,
            finetune=section.finetune,
            freeze_batch_norm=held,
            start_bits=section.start_bits,
            squeeze=section.squeeze,
        )
        keeper = self._keeper(section, model, lambda: controller.final)
        layers, costs = cost.qat_layers(model), model.meta["fxquant"].costs

        def objective(model, images, labels, share):
            criterion.dampening_weight = dampening(controller.steps_done)
            parts = criterion(model, images, labels, share)
            shown = parts._asdict()
            with torch.no_grad():
                shown["W bits"] = share * cost.mean_weight_bits(layers, costs)
                shown["A bits"] = share * cost.mean_activation_bits(layers, costs)
                for name, value in controller.scheduled.items():
                    shown[name] = parts.total.new_tensor(share * value)
            return parts.total, shown

        def after_step():
            changes = controller.width_changes
            controller.step()
            keeper.after_step(restart=controller.width_changes != changes)

        kept = {"float_model": self.float_model, "criterion": criterion, "controller": controller}
        if recipe.allocation is not None:
            kept["rules"] = rules
        recorder = CapacityRecorder(model, self.data.plain(), self.output, resumed=state is not None)

        def record(epoch):
            self.processes.only_first(lambda: recorder(epoch))

        if state is None:
            record(0)
        stage = Stage(
            "quantized",
            model,
            param_groups(model, section.lr, quantizer_lr=section.quantizer_lr, weight_decay=section.weight_decay),
            section.optimizer,
            section.epochs,
            learning_rate(total, section.warmup, 1 - section.finetune if section.schedule == "hold" else 0.0),
            loader,
            objective,
            keeper,
            section.accumulate,
            section.sync_batch_norm,
            # Those of a width that becomes whole, and zero-points where a new range proves one-sided.
            section.start_bits is not None or any(e.can_learn_width for e in estimators_of(model)),
            section.memory_format,
            self._computed_in(section),
            after_step,
            record,
            kept,
        )
        self._loop().train(stage, state)
        return stage.history

    def _keeper(
        self, section: FloatSection | TrainSection, model: nn.Module, final: Callable[[], bool] = lambda: True
    ) -> Keeper:
        average = WeightAverage(model, section.average) if section.average else None
        validation = self._shared(self.data.validation()) if section.select == "best" else None
        return Keeper(model, average, validation, final)

    def _computed_in(self, section: FloatSection | TrainSection) -> torch.dtype:
        dtype = computed_in(section.autocast, self.device)
        if dtype != getattr(torch, section.autocast):
            self.progress.note(
                f"autocast = {section.autocast!r} was asked for, which this {self.device.type} has no instructions "
                "for and would emulate, many times slower: training in float32"
            )
        return dtype

    def _loop(self) -> Loop:
        return Loop(self.recipe, self.output, self.processes, self.progress, self.started, self.guard)

    def _shared(self, loader: Loader) -> Loader:
        """A loader of this process's share alone."""
        loader.share = self.processes.share
        return loader

    def _write(self, write: Callable[[Path, Any], None], name: str, content: Any) -> None:
        """A file of the run's folder, by the first process."""
        self.processes.only_first(lambda: write(self.output / name, content))

    # ---- result ------------------------------------------------------------------------------------------

    def _result(
        self,
        model: fx.GraphModule,
        report: VerifyReport,
        float_accuracy: float,
        history: History,
        became: dict[str, list[LoweredLayer]],
    ) -> dict[str, Any]:
        layers, costs = cost.qat_layers(model), model.meta["fxquant"].costs
        return self._header() | {
            "estimator": self.recipe.quantization.estimator,
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
                    "operators": [dataclasses.asdict(operator) for operator in became[backend]],
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
            "capacity": analyze(model, self.data.plain(), max_batches=2).to_dict(),
            "history": history.epochs,
        }

    def _header(self) -> dict[str, Any]:
        recipe = self.recipe
        epochs = recipe.train.epochs if recipe.quantizes else 0
        sections = {"float": recipe.float_training} | ({"quantized": recipe.train} if recipe.quantizes else {})
        dtypes = {stage: computed_in(section.autocast, self.device) for stage, section in sections.items()}
        return {
            "recipe": recipe.name,
            "recipe_digest": recipe.digest(),
            "model": recipe.model.name,
            "data": recipe.data.name,
            "seed": recipe.seed,
            "epochs": {"float": recipe.float_training.epochs, "quantized": epochs},
            "computed_in": {stage: str(dtype).removeprefix("torch.") for stage, dtype in dtypes.items()},
        }

    def _footer(self, shipped: str) -> dict[str, Any]:
        return {
            "file_bytes": (self.output / shipped).stat().st_size,
            "rollbacks": self.guard.rollbacks,
            "seconds": time.perf_counter() - self.started,
            "torch": torch.__version__,
        }
