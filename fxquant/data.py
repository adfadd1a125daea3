"""Data sets a recipe can name, held in memory as tensors and augmented a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import EmptyDataError, FxQuantError, SpecError, UnknownNameError

_SPLIT_SEED = 0  # the held-out images are the same whatever the seed of a run


@dataclass(frozen=True)
class ImageData:
    """Images [N, C, H, W] float32, normalised, with labels [N] int64: a part to train on and a part held out."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Batches:
    """A loader over tensors; shuffled and shifted anew each epoch when it trains, in order otherwise.

    The order and the shifts of an epoch depend on ``seed`` and the epoch's number alone, so that a resumed run sees
    what an uninterrupted one would have seen.

    Args:
        images, labels: [N, C, H, W] and [N].
        batch_size: images a batch; a last, smaller batch is dropped in training unless it is the only one.
        shift: up to how many pixels images are moved in training, each way.
        seed: ``None`` for evaluation.
    """

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, *, seed: int | None = None, shift: int = 0):
        if not len(images):
            raise EmptyDataError("a loader was asked for over no images")
        if batch_size < 1:
            raise SpecError(f"batch_size={batch_size!r} was asked for; it must be at least 1")
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.seed, self.shift, self.epoch = seed, shift, 0

    def __len__(self) -> int:
        whole, rest = divmod(len(self.images), self.batch_size)
        return max(whole, 1) if self.seed is not None else whole + bool(rest)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.seed is None:
            yield from zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True)
            return
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(len(self.images), generator=generator)
        for batch in order.split(self.batch_size)[: len(self)]:
            yield self._shifted(self.images[batch], generator), self.labels[batch]

    def _shifted(self, images: Tensor, generator: torch.Generator) -> Tensor:
        if not self.shift:
            return images
        n, c, h, w = images.shape
        padded = F.pad(images, [self.shift] * 4, mode="replicate")
        dy, dx = torch.randint(0, 2 * self.shift + 1, (2, n), generator=generator)
        rows = (dy[:, None] + torch.arange(h))[:, None, :, None]
        columns = (dx[:, None] + torch.arange(w))[:, None, None, :]
        return padded[torch.arange(n)[:, None, None, None], torch.arange(c)[None, :, None, None], rows, columns]


def digits(image_size: int) -> ImageData:
    """scikit-learn's handwritten digits: 1,797 real 8x8 images in ten classes, inside of the package.

    Two thirds train, one third (599 images, stratified) is held out. Images are enlarged to ``image_size``.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise FxQuantError(
            "the data set 'digits' comes with scikit-learn, which is not installed: pip install 'fxquant[digits]'"
        ) from error
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=(image_size, image_size), mode="bilinear", align_corners=False)
    labels = torch.tensor(data.target, dtype=torch.int64)
    train, test = train_test_split(range(len(labels)), test_size=1 / 3, random_state=_SPLIT_SEED, stratify=data.target)
    mean, std = images[train].mean(), images[train].std()
    images = (images - mean) / std
    return ImageData(images[train], labels[train], images[test], labels[test])


DATASETS: dict[str, Callable[[int], ImageData]] = {"digits": digits}


def load_data(name: str, image_size: int) -> ImageData:
    """The data set of that name.

    Raises:
        UnknownNameError: with the nearest names.
    """
    if name not in DATASETS:
        raise UnknownNameError("data set", name, DATASETS)
    return DATASETS[name](image_size)
