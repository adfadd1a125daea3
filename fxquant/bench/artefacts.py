"""The files that contenders share: made once, each in a process of its own, so that workers only load."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch

from ..convert import convert
from ..errors import SpecError, UnknownNameError
from ..freeze import freeze
from ..lower import packed
from ..lower.onnx import export_program, require_packages
from ..prepare import prepare, prepared_info
from ..spec import Rule
from ..synthetic import random_images, settled
from ..train import load_run
from . import peers
from .job import FLOAT, FLOAT_ONNX, IMAGES, Job

RUN = "run.fxq"
"""The packed file of a finished run, as its workers find it."""


def of_model(name: str, image_size: int | None, folder: Path, **settings) -> Job:
    """A job on a timm model with random weights, at its own input size where none is given.

    Raises:
        UnknownNameError: for a name that timm does not have, with the nearest.
        SpecError: for a size that the model cannot have.
    """
    from .. import timm

    names = timm.list_models()
    if name.split(".")[0] not in names:
        raise UnknownNameError("timm model", name, names)
    if image_size is not None and image_size < 1:
        raise SpecError(f"--image-size {image_size} was asked for; it is a side in pixels, at least 1")
    cfg = timm.create_model(name, pretrained=False).default_cfg
    channels, *own = cfg["input_size"]
    options = {}
    if image_size is not None and [image_size] * 2 != own:
        if cfg.get("fixed_input_size"):  # transformers, whose position embedding has one entry a patch
            options["img_size"] = image_size
        own = [image_size, image_size]
    return Job(name, (channels, *own), str(folder), options, **settings)


def of_run(source: Path, folder: Path, **settings) -> tuple[Job, str]:
    """A job on a finished run's integers, and the run's name. Its float model has the architecture, not the weights.

    Raises:
        CheckpointError: where ``source`` is no finished run.
    """
    loaded = load_run(source)
    section = loaded.recipe.model
    options = {key: value for key, value in section.options.items() if key != "checkpoint_path"}
    shape = prepared_info(loaded.reference).input_shape
    job = Job(section.name, tuple(shape), str(folder), options, **settings)
    packed.save(loaded.reference, job.file(RUN))
    return job, loaded.recipe.name


def build(name: str, job: Job) -> None:
    """Make one shared file, in this process.

    Raises:
        FxQuantError: where it cannot be made.
    """
    if name == FLOAT:
        _build_float(job)
    elif name == FLOAT_ONNX:
        _build_float_onnx(job)
    elif name in peers.BUILDERS:
        peers.BUILDERS[name](job)
    else:
        _build_reference(name, job)


def reference_file(bits: int, backend: str) -> str:
    """The name of the packed file of a random model, prepared for a backend."""
    return f"w{bits}.{backend}.fxq"


def _build_float(job: Job) -> None:
    torch.manual_seed(job.seed)
    channels, height, width = job.input_shape
    if height != width:
        raise SpecError(f"{job.model} takes images of {height}x{width}; only square ones are measured")
    images = random_images(height, channels=channels)
    model = settled(job.blank_model(), images)
    safetensors.torch.save_file({"images": images}, job.file(IMAGES))
    state = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, job.file(FLOAT))


def _build_float_onnx(job: Job) -> None:
    require_packages("onnx", "onnxscript")
    export_program(job.float_model(), job.batch(2), job.file(FLOAT_ONNX), job.model)


def _build_reference(name: str, job: Job) -> None:
    """A random model at one width, its first and last layer at 8 bits, as integers prepared for a backend."""
    width, backend, _ = name.split(".")
    bits, images = int(width.removeprefix("w")), job.images()
    rules = [Rule("first|last", 8, 8), Rule("*", bits, bits)]
    prepared = prepare(job.float_model(), rules, calibration=[images], backend=backend)
    freeze(prepared, calibration=())  # latency needs no better BatchNorm than the float model's
    packed.save(convert(prepared), job.file(name))
