"""Recipes: TOML files that say a whole run. ``extends`` merges, ``--set`` overrides, all errors come at once."""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
    field_validator,
    model_validator,
)

from .data import CIFAR10, DATASETS, check_name
from .errors import FxQuantError, SpecError, UnknownNameError, did_you_mean
from .estimators import check_interval
from .grid import check_bits
from .hardware import has_vnni
from .loss import DISTILLATIONS
from .pixels import SIZE
from .schedule import require_in_time
from .sensitivity import METHODS
from .spec import Budget, Rule, check_options, get_backend


class RecipeError(FxQuantError, ValueError):
    """A recipe that cannot be read or says something that makes no sense; lists all problems at once."""


_LARGEST = 2**32 - 1
"""Of any whole number: numpy takes no larger seed, and nothing else comes near."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _countable(cls, value: Any) -> Any:
        if isinstance(value, int) and value > _LARGEST:
            raise SpecError(f"whole numbers go up to {_LARGEST}")
        return value


def _one_of(what: str, names: Collection[str]) -> AfterValidator:
    """Of a field that takes one of these names."""

    def known(name: str) -> str:
        if name not in names:
            raise UnknownNameError(what, name, names)
        return name

    return AfterValidator(known)


class ModelSection(_Section):
    """``[model]``: what timm builds."""

    name: str
    pretrained: bool = True
    checkpoint: str | None = Field(None, description="file of float weights (.pt, .safetensors), for pretrained ones")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of timm.create_model")

    @model_validator(mode="after")
    def _one_file(self) -> ModelSection:
        if self.checkpoint is not None and "checkpoint_path" in self.options:
            raise SpecError("model.checkpoint and model.options.checkpoint_path both name a file; keep the first")
        return self


_WITHOUT_EFFECT = {
    "memory": ("dir", "splits", "augmentation", "plain_batches", "test_images", "flip", "validation", "cache"),
    CIFAR10: ("splits", "augmentation"),
    "disk": ("shift", "flip", "validation", "cache"),
}


_LARGEST_IN_MEMORY = 512


class DataSection(_Section):
    """``[data]``: what it trains on; see :class:`fxquant.data.TimmData`."""

    name: str = Field("folder", description="digits, cifar10, folder, or what timm reads: hfds/..., tfds/...")
    dir: str | None = Field(None, description="folder that holds it, for all but digits")
    image_size: int | None = Field(None, gt=0, description="the model's own when not given")
    batch_size: int = Field(64, gt=0, description="images a step, of all processes and accumulated parts together")
    shift: int = Field(0, ge=0, description="digits, cifar10: pixels by which training images are moved at random")
    flip: bool = Field(False, description="cifar10: whether training images are mirrored at random")
    validation: int = Field(0, ge=0, description="cifar10: training images kept from training, evenly by class")
    cache: str | None = Field(None, description="cifar10: folder that keeps decoded images for the next run")
    workers: int = Field(4, ge=0, description="processes that read images, beside each that trains")
    splits: tuple[str, str] = Field(("train", "validation"), description="the part to train on, the part held out")
    augmentation: dict[str, Any] = Field(default_factory=dict, description="arguments of timm's create_transform")
    plain_batches: int = Field(64, gt=0, description="training batches for calibration (as they are) and BatchNorm")
    test_images: int | None = Field(None, gt=0, description="held-out images to use; all when not given")

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        return check_name(name)

    @model_validator(mode="after")
    def _nothing_ignored(self) -> DataSection:
        kind = "memory" if self.name in DATASETS else CIFAR10 if self.name == CIFAR10 else "disk"
        if kind == "memory" and max(self.image_size or 0, self.shift) > _LARGEST_IN_MEMORY:
            raise SpecError(
                f"data.image_size={self.image_size}, data.shift={self.shift} were asked for; the data set "
                f"{self.name!r} is in memory, at {_LARGEST_IN_MEMORY} pixels a side at most"
            )
        for key in _WITHOUT_EFFECT[kind]:
            if getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True):
                where = {"memory": "is in memory", "disk": "is read from disk"}.get(kind, "is read whole")
                raise SpecError(f"data.{key} does nothing for the data set {self.name!r}, which {where}; leave it out")
        if kind == CIFAR10 and self.shift > SIZE:
            raise SpecError(f"data.shift={self.shift} was asked for; images of cifar10 have {SIZE} pixels a side")
        if kind == CIFAR10 and self.image_size not in (None, SIZE):
            raise SpecError(f"data.image_size={self.image_size} was asked for; the images of cifar10 stay at {SIZE}")
        return self


class _Training(_Section):
    """What training in float and quantized have in common."""

    optimizer: str = "adamw"
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps over which lr rises from 0")
    autocast: Literal["float32", "bfloat16"] = Field("float32", description="of layers; quantizers stay in float32")
    channels_last: bool = Field(False, description="whether images and convolutions lie channels last in memory")
    average: float = Field(0.0, ge=0, lt=1, description="decay of the weights' average, which ships; 0 keeps none")
    select: Literal["last", "best"] = Field("last", description="epoch that ships; the best one on data.validation")
    accumulate: int = Field(
        1,
        gt=0,
        description="parts in which a process computes its images of a step; BatchNorm, EWGS and PEGE see one each",
    )
    sync_batch_norm: bool = Field(True, description="whether BatchNorm's statistics are of the images of all processes")

    @property
    def memory_format(self) -> torch.memory_format:
        """How images and the weights of convolutions lie in memory."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


class FloatSection(_Training):
    """``[float]``: training in float before quantization; ``epochs = 0`` takes the model as it comes."""

    epochs: int = Field(0, ge=0)


class TrainSection(_Training):
    """``[train]``: quantization-aware training."""

    epochs: int = Field(gt=0)
    quantizer_lr: float | None = Field(None, gt=0)
    compile: bool = Field(False, description="whether quantizers run compiled: faster steps, up to a minute to begin")
    schedule: Literal["cosine", "hold"] = Field(
        "cosine", description="of lr: falling from the warm-up on, or held until widths are whole and falling then"
    )
    start_bits: int | None = Field(None, description="width at which quantizers of a lower, fixed one begin")
    squeeze: float = Field(0.5, gt=0, le=1, description="share of the steps over which they come down to their own")
    finetune: float = Field(0.25, ge=0, lt=1, description="share of the steps at whole widths, without noise")
    freeze_batch_norm: float | None = Field(
        None, ge=0, le=1, description="share of the steps after which BatchNorm's statistics stay as they are"
    )
    reestimate_batch_norm: bool = Field(True, description="whether freezing re-estimates BatchNorm's statistics")
    distillation: Annotated[str, _one_of("distillation", DISTILLATIONS)] = "soft_cross_entropy"
    task_weight: float = Field(1.0, ge=0)
    distillation_weight: float = Field(1.0, ge=0)
    budget_weight: float = Field(1.0, ge=0)
    dampening: float = Field(0.0, ge=0, description="weight of oscillation at the end, to which it rises from 0")

    @field_validator("start_bits")
    @classmethod
    def _whole(cls, bits: int | None) -> int | None:
        return None if bits is None else check_bits(bits, "start_bits")

    @model_validator(mode="after")
    def _in_time(self) -> TrainSection:
        if self.start_bits is not None:
            require_in_time(self.squeeze, self.finetune)
        return self


class RuleSection(_Section):
    """``[[rules]]``: one :class:`fxquant.Rule`; the first that matches a layer wins."""

    pattern: str
    bits: StrictInt | tuple[StrictInt, StrictInt] | Literal["float"] | None = Field(
        None, description="weights and activations alike; 'float' leaves the layer as it is"
    )
    weight_bits: StrictInt | tuple[StrictInt, StrictInt] | None = None
    activation_bits: StrictInt | tuple[StrictInt, StrictInt] | None = None
    estimator: str | None = Field(None, description="that of [quantization] when not given")
    per_channel: bool = True
    init: str = "mse"
    options: dict[str, Any] | None = Field(None, description="those of [quantization] when not given")


class QuantizationSection(_Section):
    """``[quantization]``: what holds for all rules."""

    estimator: str = "lsq"
    options: dict[str, Any] = Field(default_factory=dict, description="the estimator's own options")
    backend: str = "x86"
    residual_bits: int = Field(8, ge=1, le=8)
    vnni: bool = Field(
        default_factory=lambda: has_vnni(),  # looked up when called: tests stand in for another CPU
        description="whether the CPU it is for has VNNI (x86 without: 7-bit weights); that of the one at hand",
    )
    lower: list[str] = Field(default_factory=lambda: ["x86", "onednn"], description="backends to lower to")

    @field_validator("backend")
    @classmethod
    def _known(cls, name: str) -> str:
        return get_backend(name).name

    @field_validator("lower")
    @classmethod
    def _all_known(cls, names: list[str]) -> list[str]:
        return [get_backend(name).name for name in names]

    @property
    def prepare_options(self) -> dict[str, Any]:
        """Arguments of :func:`fxquant.prepare` that say what the graph is for."""
        return {"backend": self.backend, "residual_bits": self.residual_bits, "vnni": self.vnni}

    @model_validator(mode="after")
    def _options_known(self) -> QuantizationSection:
        check_options(self.estimator, self.options)
        return self


class BudgetSection(_Section):
    """``[budget]``: bounds on the whole widths (:class:`fxquant.Budget`)."""

    mean_weight_bits: float | None = Field(None, gt=0)
    mean_activation_bits: float | None = Field(None, gt=0)
    bops: float | None = Field(None, gt=0)
    weight_bytes: float | None = Field(None, gt=0)


class AllocationSection(_Section):
    """``[allocation]``: widths chosen by :func:`fxquant.allocate` before training, in place of those of the rules."""

    sensitivity: Annotated[str, _one_of("sensitivity", METHODS)] = "fisher"
    weight_bits: tuple[int, int] = Field((2, 8), description="lowest and highest candidate")
    activation_bits: tuple[int, int] = (2, 8)
    fixed: str | None = Field("first|last", description="pattern of layers that keep their rule's widths; empty: none")
    tied: list[list[str]] = Field(default_factory=list, description="<layer>.weight and <layer>.input of equal width")
    tie_readers: bool = Field(True, description="whether layers that read one tensor get the same input width")
    batches: int = Field(4, gt=0, description="plain training batches to measure on")
    seconds: float = Field(10.0, gt=0, description="for the solver")

    @field_validator("weight_bits", "activation_bits")
    @classmethod
    def _in_order(cls, bits: tuple[int, int]) -> tuple[int, int]:
        return check_interval(bits)


class DivergenceSection(_Section):
    """``[divergence]``: what is done where a loss is NaN or infinite, or explodes; in both stages."""

    action: Literal["stop", "rollback"] = Field(
        "stop", description="rollback: go on from the last checkpoint at lower learning rates"
    )
    lr_factor: float = Field(0.5, gt=0, le=1, description="of the learning rates, at each rollback, to the stage's end")
    max_rollbacks: int = Field(3, ge=1, description="of a stage; then it stops")
    loss_factor: float | None = Field(
        None, gt=1, description="times the lowest mean loss of an epoch: more explodes; if not given, nothing does"
    )
    patience: int = Field(20, ge=1, description="steps in a row above it that are taken for an explosion")


class Recipe(_Section):
    """A whole run, resolved and checked. See the sections' classes for the keys."""

    name: str
    seed: int = Field(0, ge=0)
    model: ModelSection
    data: DataSection
    float_training: FloatSection = Field(default_factory=FloatSection, alias="float")
    quantization: QuantizationSection = Field(default_factory=QuantizationSection)
    rules: list[RuleSection] = Field(default_factory=list)
    budget: BudgetSection = Field(default_factory=BudgetSection)
    allocation: AllocationSection | None = Field(None, description="false: none, where an extended recipe has one")
    divergence: DivergenceSection = Field(default_factory=DivergenceSection)
    train: TrainSection | None = Field(None, description="left out, with the rules, where training is in float alone")

    @field_validator("allocation", mode="before")
    @classmethod
    def _taken_away(cls, section: Any) -> Any:
        return None if section is False else section

    @model_validator(mode="after")
    def _rules_hold(self) -> Recipe:
        self.built_rules()
        if bool(self.rules) != (self.train is not None):
            given, missing = ("[[rules]]", "[train]") if self.rules else ("[train]", "[[rules]]")
            raise SpecError(f"{given} without {missing}: a quantized training takes both, one in float alone neither")
        if self.train is None and not self.float_training.epochs:
            raise SpecError("nothing to do: give [train] and [[rules]], or float.epochs for a training in float alone")
        if self.allocation is not None and self.train is None:
            raise SpecError("[allocation] without [train]: it chooses widths for a quantized training")
        if self.allocation is not None and not self.built_budget():
            raise SpecError("[allocation] keeps to a budget; say which in [budget], such as mean_weight_bits = 4")
        sections = {"float": self.float_training, "train": self.train}
        for name, section in sections.items():
            if section is None:
                continue
            if section.select == "best" and not self.data.validation:
                raise SpecError(
                    f"{name}.select = 'best' chooses by images kept from training; set data.validation to how many"
                )
            if self.data.batch_size % section.accumulate:
                raise SpecError(
                    f"{name}.accumulate = {section.accumulate} splits every batch into as many parts, which "
                    f"data.batch_size = {self.data.batch_size} is no multiple of"
                )
        return self

    @property
    def quantizes(self) -> bool:
        """Whether it trains quantized, not in float alone."""
        return self.train is not None

    def built_rules(self) -> list[Rule]:
        """The rules as :class:`fxquant.Rule` objects."""
        built = []
        for index, rule in enumerate(self.rules):
            try:
                built.append(self._build(rule))
            except FxQuantError as error:
                raise SpecError(f"rules.{index}: {error}") from None
        return built

    def _build(self, section: RuleSection) -> Rule:
        if section.bits is not None and (section.weight_bits is not None or section.activation_bits is not None):
            raise SpecError(
                f"rule {section.pattern!r}: bits={section.bits!r} is for weights and activations alike; give it, or "
                "weight_bits and activation_bits"
            )
        if section.bits == "float":
            return Rule(section.pattern, None, None)
        if (section.bits, section.weight_bits, section.activation_bits) == (None, None, None):
            raise SpecError(
                f"rule {section.pattern!r} gives no width; set bits to a number, to [lowest, highest] or to 'float', "
                "or weight_bits and activation_bits"
            )
        estimator = section.estimator or self.quantization.estimator
        own_options = section.options
        if own_options is None:
            own_options = self.quantization.options if estimator == self.quantization.estimator else {}
        return Rule(
            section.pattern,
            section.weight_bits if section.weight_bits is not None else section.bits,
            section.activation_bits if section.activation_bits is not None else section.bits,
            estimator,
            section.per_channel,
            section.init,
            own_options,
        )

    def built_budget(self) -> Budget:
        """The budget as a :class:`fxquant.Budget`."""
        return Budget(**self.budget.model_dump())

    def to_json(self) -> str:
        """The resolved recipe, canonically: equal recipes give equal text."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), sort_keys=True, indent=2)

    def digest(self) -> str:
        """A short hash that two recipes share exactly when they say the same."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


def load_recipe(path: str | Path, overrides: list[str] | None = None, seed: int | None = None) -> Recipe:
    """Read a recipe, with what it extends, and check it.

    Args:
        path: TOML file. ``extends = "base/x.toml"`` (or a list) is read first, relative to the file; tables are
            merged key by key, anything else is replaced.
        overrides: ``"train.epochs=3"``; values are TOML, or strings where they are not.
        seed: replaces the recipe's.

    Raises:
        RecipeError: with every problem found, unknown keys with the nearest known ones.
    """
    path = Path(path)
    values = _read(path, ())
    values.setdefault("name", path.stem)
    for override in overrides or []:
        _override(values, override)
    if seed is not None:
        values["seed"] = seed
    return parse_recipe(values, str(path))


def parse_recipe(values: dict[str, Any], where: str) -> Recipe:
    """Check the values of a recipe; ``where`` is its name in messages.

    Raises:
        RecipeError: with every problem found.
    """
    try:
        _require_shallow(values, _DEEPEST)
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from None
    try:
        return Recipe(**values)
    except ValidationError as error:
        problems = [_problem(e) for e in error.errors()]
    raise RecipeError(f"{where}: {len(problems)} problem(s)\n" + "\n".join(f"  - {p}" for p in problems)) from None


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    extended = f", which {above[-1].name} extends" if above else ""
    if "\0" in str(path):
        raise RecipeError(f"{str(path)!r}{extended}: no file can have this name")
    resolved = path.resolve()
    if resolved in above:
        raise RecipeError(f"{path}: 'extends' goes round in a circle: {' -> '.join(p.name for p in above)}")
    try:
        values = _toml(path.read_text(encoding="utf-8"))
    except OSError as error:
        near = difflib.get_close_matches(path.stem, [p.stem for p in path.parent.glob("*.toml")], 3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise RecipeError(f"{path}{extended}: cannot be read ({error.strerror}){hint}") from None
    except ValueError as error:
        raise RecipeError(f"{path}{extended}: not valid TOML ({error})") from None
    parents = values.pop("extends", [])
    if not isinstance(parents, (str, list)) or not all(isinstance(parent, str) for parent in parents):
        raise RecipeError(f"{path}: extends = {parents!r}; give a file name or a list of them")
    merged: dict[str, Any] = {}
    for parent in [parents] if isinstance(parents, str) else parents:
        merged = _merge(merged, _read(path.parent / parent, (*above, resolved)))
    merged.pop("name", None)
    return _merge(merged, values)


def _toml(text: str) -> dict[str, Any]:
    """The values of a TOML text.

    Raises:
        ValueError: where it is none, or holds what Python cannot take: a number of more than 4300 digits, values nested
            too deeply.
    """
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"values are nested more than {_DEEPEST} deep") from None
    _require_shallow(values, _DEEPEST)
    return values


_DEEPEST = 50


def _require_shallow(values: Any, levels: int) -> None:
    if isinstance(values, (list, dict)):
        if not levels:
            raise ValueError(f"values are nested more than {_DEEPEST} deep")
        for value in values.values() if isinstance(values, dict) else values:
            _require_shallow(value, levels - 1)


def _merge(under: dict, over: dict) -> dict:
    out = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merge(out[key], value) if both else value
    return out


def _override(values: dict, text: str) -> None:
    key, equals, raw = text.partition("=")
    if not equals:
        raise RecipeError(f"--set {text!r}: give key=value, such as train.epochs=3")
    try:
        value = _toml(f"value = {raw}")["value"]
    except ValueError:
        value = raw
    *tables, last = key.strip().split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise RecipeError(f"--set {text!r}: {table!r} is not a table of the recipe")
    values[last] = value


def _known_keys(location: tuple) -> list[str]:
    """The keys of the section in which an unknown one was found."""
    section: Any = Recipe
    for step in location[:-1]:
        if isinstance(step, int):
            continue
        fields = {f.alias or name: f for name, f in section.model_fields.items()}
        annotation = fields[step].annotation if step in fields else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if section is None:
            return []
    return sorted(f.alias or name for name, f in section.model_fields.items())


def _problem(error: dict) -> str:
    location = error["loc"]
    key = ".".join(str(step) for step in location)
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}: {did_you_mean(str(location[-1]), _known_keys(location))}"
    if error["type"] == "missing":
        return f"{key!r} is missing"
    message = error["msg"].removeprefix("Value error, ")
    seen = error.get("input")
    shown = f" (found {seen!r})" if isinstance(seen, (int, float, str, bool)) else ""
    return f"{key or 'recipe'}: {message}{shown}"
