"""The packed file: a reference graph at its true size, weights at their own 1 to 8 bits.

A ``.fxq`` file is a safetensors file. Its tensors are those of the reference graph under the same names, but that each
integer layer's ``weight`` is a stream of codes (:func:`fxquant.grid.pack`). Its metadata are text:

* ``format``: ``fxquant-packed``; ``version``: ``3``.
* ``model``: JSON of what :func:`fxquant.prepare` was told: ``backend``, ``residual_bits``, ``input_shape``, ``rules``,
  the rule of each layer by name (null for a float one); and ``weights``, the width and shape of each packed weight.
* ``notes``: JSON of texts of whoever saved it; ``fxquant run`` keeps the recipe there.
* ``sha256``: of both, and of every tensor in the order of names: name, dtype, shape, bytes.

Nothing in it is code, and nothing of it is used before the checksum and the layer names agree.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, fx, nn

from .. import grid
from ..convert import blank_reference, load_tensors
from ..errors import CheckpointError, FxQuantError, SpecError
from ..files import write_bytes
from ..integer import integer_layers
from ..prepare import prepared_info
from ..spec import Rule, exactly

FORMAT, VERSION = "fxquant-packed", "3"
_LARGEST_IMAGE = 2**26  # elements: a file must not make its reader allocate what it likes


def save(reference: fx.GraphModule, path: str | Path, *, notes: Mapping[str, str] | None = None) -> None:
    """Write a reference graph as a packed file, whole or not at all.

    Args:
        reference: from :func:`fxquant.convert`.
        path: by custom with the suffix ``.fxq``.
        notes: texts to keep in it, read back by :func:`read_notes`.

    Raises:
        SpecError: for a model that is no reference graph, or has several inputs.
        OutputFolderError: where it cannot be written.
    """
    info = prepared_info(reference)
    layers = integer_layers(reference)
    if not layers:
        raise SpecError(
            f"save was given a {type(reference).__name__} without integer layers; give it what fxquant.convert returns"
        )
    if (inputs := sum(bool(node.users) for node in reference.graph.find_nodes(op="placeholder"))) > 1:
        raise SpecError(f"save was given a model of {inputs} inputs; a .fxq file holds one that takes images alone")
    tensors, weights = dict(reference.state_dict()), {}
    for name, layer in layers.items():
        bits = grid.symmetric_bits(layer.weight)
        weights[f"{name}.weight"] = {"bits": bits, "shape": list(layer.weight.shape)}
        tensors[f"{name}.weight"] = grid.pack(layer.weight, bits)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    model = json.dumps(
        {
            "backend": info.backend,
            "residual_bits": info.residual_bits,
            "input_shape": list(info.input_shape),
            "rules": {name: rule and asdict(rule) for name, rule in info.rules.items()},
            "weights": weights,
        },
        sort_keys=True,
    )
    metadata = {"format": FORMAT, "version": VERSION, "model": model, "notes": json.dumps(dict(notes or {}))}
    metadata["sha256"] = _checksum(metadata, tensors)
    content = safetensors.torch.save({name: t.clone() for name, t in tensors.items()}, metadata)
    write_bytes(Path(path), _metadata_in_order(content))


def _metadata_in_order(content: bytes) -> bytes:
    """A safetensors file with its metadata in the order of their keys, so that equal models are equal files: the
    library's own order is another each time. The header is JSON after its length, 8 bytes, and padded to a multiple."""
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[begin:]


def load(path: str | Path, model: nn.Module) -> fx.GraphModule:
    """The reference graph in a packed file, bit for bit as it was saved.

    Args:
        path: what :func:`save` wrote.
        model: the float architecture, with any weights; not modified.

    Raises:
        CheckpointError: a file that is missing, damaged, of another kind or version, or of another architecture.
    """
    path = Path(path)
    metadata, tensors = _read(path)
    described = _described(path, metadata["model"])
    rules = list(described["rules"].values())
    example = torch.randn(1, *described["input_shape"], generator=torch.Generator().manual_seed(0))
    try:
        reference = blank_reference(
            model, rules, example, backend=described["backend"], residual_bits=described["residual_bits"]
        )
    except (FxQuantError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit this {type(model).__name__}: {error}") from error
    expected = reference.state_dict()
    for name, entry in described["weights"].items():
        if name not in expected or name not in tensors or tuple(entry["shape"]) != expected[name].shape:
            raise CheckpointError(
                f"{path} does not fit this {type(model).__name__}: {name!r} has shape {entry['shape']} in the file, "
                f"{list(expected[name].shape) if name in expected else 'no place'} in the model"
            )
        try:
            tensors[name] = grid.unpack(tensors[name], entry["bits"], expected[name].shape)
        except SpecError as error:
            raise CheckpointError(f"{path}, {name!r}: {error}") from None
    load_tensors(reference, tensors, f"{path} does not fit this {type(model).__name__}")
    return reference


def read_notes(path: str | Path) -> dict[str, str]:
    """The notes in a packed file.

    Raises:
        CheckpointError: a file that is missing, damaged, or of another kind or version.
    """
    metadata, _ = _read(Path(path))
    try:
        return {str(key): str(text) for key, text in json.loads(metadata["notes"]).items()}
    except (KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its notes make no sense ({error!r})") from None


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a packed file whose checksum holds."""
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; give a file that fxquant.save wrote") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged, or no packed file at all ({error}); save it anew") from None
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no packed file (format {metadata.get('format')!r}, not {FORMAT!r})")
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {metadata.get('version')!r} of the format; this fxquant reads version {VERSION!r}. "
            "Convert the trained model again, or read it with the fxquant that wrote it"
        )
    if metadata.get("sha256") != _checksum(metadata, tensors):
        raise CheckpointError(f"{path} is damaged: its checksum does not hold; get or save it anew")
    return metadata, tensors


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in ("model", "notes"):
        digest.update(f"{len(metadata.get(key, ''))} {metadata.get(key, '')}".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def _described(path: Path, text: str) -> dict[str, Any]:
    """The JSON of a packed file, every field of the type it should have."""
    try:
        found = json.loads(text)
        if math.prod(_size(size) for size in found["input_shape"]) > _LARGEST_IMAGE:
            raise ValueError(f"an image of {found['input_shape']}")
        return {
            "backend": str(found["backend"]),
            "residual_bits": grid.check_bits(found["residual_bits"]),
            "input_shape": [_size(size) for size in found["input_shape"]],
            "rules": {
                name: Rule(exactly(name), None, None)
                if rule is None
                else Rule(**_as_given(rule) | {"pattern": exactly(name)})
                for name, rule in found["rules"].items()
            },
            "weights": {
                str(name): {"bits": grid.check_bits(w["bits"]), "shape": [_size(size) for size in w["shape"]]}
                for name, w in found["weights"].items()
            },
        }
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: the description of its model makes no sense ({error!r})") from None


def _size(value: Any) -> int:
    if type(value) is not int or not 0 < value < 2**20:
        raise ValueError(f"{value!r} is no size")
    return value


def _as_given(rule: dict[str, Any]) -> dict[str, Any]:
    """A rule as :class:`Rule` takes it: JSON has lists for intervals."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in rule.items()}
