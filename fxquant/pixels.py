"""CIFAR-10 from disk, decoded once into bytes that stay in memory, and augmented a batch at a time.

Reading and augmenting images one by one costs more than training a network of 41 million MACs on them. So the whole set
is decoded once (180 MB), and a batch is cropped, flipped and normalised with a few operators on tensors.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from .distributed import Share
from .errors import EmptyDataError, FxQuantError, SpecError
from .files import write_bytes

SIZE = 32  # height and width
_BINARY = "cifar-10-batches-bin"
_RECORD = 1 + 3 * SIZE * SIZE  # a label, then the red, green and blue plane
_PARTS = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
_FORMAT = "fxquant-pixels-1"


class Pixels(NamedTuple):
    """Images as bytes [N, 3, 32, 32] uint8, their labels [N] int64, and the names of the classes."""

    images: Tensor
    labels: Tensor
    classes: list[str]


@dataclass(frozen=True)
class Augmentation:
    """What training does to an image: cut out after ``shift`` black pixels on every side, and mirrored or not."""

    shift: int = 0
    flip: bool = False


class PixelBatches:
    """Batches of normalised images: shuffled and augmented anew each epoch when it trains, in order otherwise.

    The order of an epoch, and what is done to an image in it, depend on ``seed``, the epoch's number and the image's
    place in ``pixels`` alone: a resumed run sees what an uninterrupted one would have seen, and what happens to an
    image depends neither on ``batch_size`` nor on which others are chosen.

    Args:
        pixels: all images.
        chosen: [n] int64, places in ``pixels`` of those to show.
        batch_size: images a batch; a last, smaller batch is dropped in training unless it is the only one.
        mean, std: of each channel, for pixels between 0 and 1.
        seed: ``None`` for evaluation, in the order of ``chosen`` and without augmentation.
        augmentation: of training.
    """

    def __init__(
        self,
        pixels: Pixels,
        chosen: Tensor,
        batch_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int | None = None,
        augmentation: Augmentation = Augmentation(),
    ):
        if not len(chosen):
            raise EmptyDataError("a loader was asked for over no images")
        if batch_size < 1:
            raise SpecError(f"batch_size={batch_size!r} was asked for; it must be at least 1")
        self.pixels, self.chosen, self.batch_size = pixels, chosen, batch_size
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))
        self.seed, self.augmentation, self.epoch = seed, augmentation, 0
        self.share = Share()

    def __len__(self) -> int:
        whole, rest = divmod(len(self.chosen), self.batch_size)
        return max(whole, 1) if self.seed is not None else whole + bool(rest)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels, _ = self.pixels
        if self.seed is None:
            for batch in self.share.of_all(self.chosen).split(self.batch_size):
                yield self._normalised(images[batch]), labels[batch]
            return
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        # Drawn for every image there is, so that an image's draw is its own.
        down, right = torch.randint(0, 2 * self.augmentation.shift + 1, (2, len(images)), generator=generator)
        mirrored = torch.randint(0, 2, (len(images),), generator=generator).bool() & self.augmentation.flip
        order = self.chosen[torch.randperm(len(self.chosen), generator=generator)]
        for batch in map(self.share.of_batch, order.split(self.batch_size)[: len(self)]):
            moved = _cut(images[batch], self.augmentation.shift, down[batch], right[batch], mirrored[batch])
            yield self._normalised(moved), labels[batch]

    def _normalised(self, images: Tensor) -> Tensor:
        """As torchvision's ToTensor and Normalize do it, operation for operation."""
        return images.float().div_(255).sub_(self.mean).div_(self.std)


def _cut(images: Tensor, shift: int, down: Tensor, right: Tensor, mirrored: Tensor) -> Tensor:
    """Windows of the images with a black margin of ``shift``, ``down`` and ``right`` [N] pixels in, maybe mirrored."""
    n, channels, height, width = images.shape
    padded = F.pad(images, [shift] * 4)
    rows = down[:, None] + torch.arange(height)
    columns = torch.arange(width).expand(n, width)
    columns = right[:, None] + torch.where(mirrored[:, None], width - 1 - columns, columns)
    places = (rows * (width + 2 * shift))[:, :, None] + columns[:, None, :]
    places = places.reshape(n, 1, height * width).expand(n, channels, height * width)
    return padded.flatten(2).gather(2, places).view_as(images)


def kept_for_validation(labels: Tensor, wanted: int, seed: int) -> Tensor:
    """[N] bool: ``wanted`` images drawn at random by ``seed``, as many of one class as of another, give or take one.

    Raises:
        SpecError: where none would be left to train on.
    """
    if not 0 <= wanted < len(labels):
        raise SpecError(f"{wanted} images were asked for validation, of {len(labels)} to train on; leave some of them")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    place_in_class = torch.empty_like(order)
    for label in labels.unique():
        of_class = order[labels[order] == label]
        place_in_class[of_class] = torch.arange(len(of_class))
    kept = torch.zeros(len(labels), dtype=torch.bool)
    kept[order[place_in_class[order].argsort(stable=True)[:wanted]]] = True
    return kept


def read_cifar10(root: Path, cache: Path | None = None, parts: Sequence[str] = ("train", "test")) -> dict[str, Pixels]:
    """The parts of CIFAR-10 in a folder, in any of these forms.

    * ``train.tar`` and ``test.tar``, or folders ``train`` and ``test``: one subfolder a class, image files in it;
    * ``cifar-10-batches-bin``, the authors' binary version (or that folder itself).

    Args:
        root: the folder.
        cache: folder in which decoded images are kept for the next time; they are decoded anew where what they come
            from has changed since. ``None`` keeps none.
        parts: ``train``, ``test`` or both.

    Raises:
        FxQuantError: where a part is not there, is damaged, or is of other images than 32x32.
    """
    home = next((p for p in (root / _BINARY, root) if (p / _PARTS["test"][0]).is_file()), None)
    if home is not None:
        read = {part: _read_binary(home, _PARTS[part]) for part in parts}
    else:
        read = {part: _cached(_source(root, part), part, cache) for part in parts}
    named = [pixels.classes for pixels in read.values()]
    if named[0] != named[-1]:
        alone = sorted({*named[0]} ^ {*named[-1]})[:5]
        raise FxQuantError(
            f"the classes of 'train' and 'test' in {root} differ: {alone} are in one of them alone, so labels would "
            "not mean the same"
        )
    return read


def _source(root: Path, part: str) -> Path:
    for path in (root / f"{part}.tar", root / part):
        if path.exists():
            return path
    found = sorted(p.name for p in root.iterdir())
    hint = ""
    if "cifar-10-batches-py" in found or "data_batch_1" in found:
        hint = f". The Python version is pickled, and a pickle can run code; take the binary one ({_BINARY})"
    raise FxQuantError(
        f"{root} holds no CIFAR-10: neither {part}.tar, {part}/ nor {_BINARY}/, but {', '.join(found[:8]) or 'nothing'}"
        f"{hint}"
    )


def _read_binary(home: Path, files: list[str]) -> Pixels:
    records = []
    for path in (home / name for name in files):
        try:
            content = np.fromfile(path, dtype=np.uint8)
        except OSError as error:
            raise FxQuantError(f"{path} cannot be read: {error.strerror}; unpack CIFAR-10 anew") from None
        if not len(content) or len(content) % _RECORD:
            raise FxQuantError(
                f"{path} has {len(content)} bytes, which is no multiple of {_RECORD}; unpack CIFAR-10 anew"
            )
        records.append(content.reshape(-1, _RECORD))
    both = torch.from_numpy(np.concatenate(records))
    meta = home / "batches.meta.txt"
    classes = meta.read_text(encoding="utf-8").split() if meta.is_file() else [str(i) for i in range(10)]
    labels = both[:, 0].long()
    if int(labels.max()) >= len(classes):
        raise FxQuantError(f"{home} holds the label {int(labels.max())}, but names {len(classes)} classes")
    return Pixels(both[:, 1:].reshape(-1, 3, SIZE, SIZE).contiguous(), labels, classes)


def _decode(source: Path) -> Pixels:
    from . import timm

    try:
        reader = timm.create_dataset("", root=str(source)).reader
        images, labels = torch.empty(len(reader), 3, SIZE, SIZE, dtype=torch.uint8), torch.empty(len(reader)).long()
        for index in range(len(reader)):
            file, label = reader[index]
            with file, Image.open(file) as image:
                if image.size != (SIZE, SIZE):
                    raise FxQuantError(
                        f"{source}: {reader.filename(index)} has {image.width}x{image.height} pixels, CIFAR-10's "
                        f"images have {SIZE}x{SIZE}; data.name = 'folder' takes any size"
                    )
                images[index] = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
            labels[index] = label
    except (RuntimeError, OSError, tarfile.TarError) as error:  # PIL's are OSErrors
        raise FxQuantError(f"the images in {source} cannot be read: {error!r}") from error
    if not len(reader):
        raise EmptyDataError(f"{source} holds no image; it has one subfolder a class, with images in it")
    names = reader.class_name_to_idx if hasattr(reader, "class_name_to_idx") else reader.class_to_idx
    return Pixels(images, labels, sorted(names, key=names.get))


def _cached(source: Path, part: str, cache: Path | None) -> Pixels:
    if cache is None:
        return _decode(source)
    origin = _fingerprint(source)
    path = cache / f"cifar10-{part}-{origin[:16]}.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            if (notes.get("format"), notes.get("origin")) == (_FORMAT, origin):
                return Pixels(file.get_tensor("images"), file.get_tensor("labels"), json.loads(notes["classes"]))
    except (OSError, SafetensorError):  # none yet, or a damaged one: written anew
        pass
    pixels = _decode(source)
    notes = {"format": _FORMAT, "origin": origin, "classes": json.dumps(pixels.classes)}
    tensors = {"images": pixels.images, "labels": pixels.labels}
    write_bytes(path, save(tensors, notes))
    return pixels


def _fingerprint(source: Path) -> str:
    """A hash of a file's, or of all files' of a folder, names, sizes and times: what tells that they changed."""
    files = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.is_file())
    digest = hashlib.sha256(_FORMAT.encode())
    for path in files:
        stat = path.stat()
        digest.update(f"{path.relative_to(source.parent)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
