"""Data sets a recipe can name: in memory (scikit-learn's digits, CIFAR-10), or anything that timm reads, from disk.

Every loader is an iterable of (images [N, C, H, W] float32, labels [N] int64) whose order and augmentation depend on
its seed and on its ``epoch`` alone, so that a resumed run sees what an uninterrupted one would have seen. (Streams,
such as webdataset's, shuffle by themselves, by the same two; their images depend on the number of workers as well.)
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, get_worker_info

from .distributed import Share, process_count
from .errors import DataWorkerError, EmptyDataError, FxQuantError, SpecError, UnknownNameError
from .pixels import Augmentation, PixelBatches, kept_for_validation, read_cifar10

_SPLIT_SEED = 0  # the held-out images are the same whatever the seed of a run
_PLAIN_SEED = 1  # and so are those that calibrate
_EVAL_BATCH = 64  # a CPU allocates the larger tensors of 256 anew each time, which made verify() half as slow again
_FOLDERS = ("folder", "torch/folder", "torch/image_folder")
_OWN_ARGUMENTS = {
    "input_size",
    "is_training",
    "mean",
    "std",
    "separate",
    "use_prefetcher",
    "tf_preprocessing",
    "normalize",
}


class Loader(Protocol):
    """Batches of one pass; ``epoch`` is set before each pass that trains.

    ``share`` is what of it this process reads: a part of every batch where it trains, else a part of all images.
    """

    epoch: int
    share: Share

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


class Data(Protocol):
    """What a run asks of a data set.

    Attributes:
        example: [1, C, H, W], to trace a model with.
        classes: how many there are; None where the data set does not tell.
    """

    example: Tensor
    classes: int | None

    def train(self, seed: int) -> Loader:
        """Training images, shuffled and augmented anew each epoch."""

    def plain(self) -> Loader:
        """Training images as they are, in a fixed random order: for calibration and BatchNorm."""

    def validation(self) -> Loader | None:
        """Images kept from training, in order, to choose by; ``None`` where none are."""

    def test(self) -> Loader:
        """Held-out images, in order."""


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
        self.share = Share()

    def __len__(self) -> int:
        whole, rest = divmod(len(self.images), self.batch_size)
        return max(whole, 1) if self.seed is not None else whole + bool(rest)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.seed is None:
            mine = self.share.of_all(self.images), self.share.of_all(self.labels)
            yield from zip(*(part.split(self.batch_size) for part in mine), strict=True)
            return
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(len(self.images), generator=generator)
        for batch in order.split(self.batch_size)[: len(self)]:
            shifts = torch.zeros(2, len(batch), dtype=torch.int64)
            if self.shift:
                shifts = torch.randint(0, 2 * self.shift + 1, (2, len(batch)), generator=generator)
            mine = self.share.of_batch(batch)
            yield self._shifted(self.images[mine], *map(self.share.of_batch, shifts)), self.labels[mine]

    def _shifted(self, images: Tensor, dy: Tensor, dx: Tensor) -> Tensor:
        if not self.shift:
            return images
        n, c, h, w = images.shape
        padded = F.pad(images, [self.shift] * 4, mode="replicate")
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
"""Data sets held in memory, by name."""

CIFAR10 = "cifar10"
"""The data set of :class:`CifarData`, by name."""

TIMM_PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")
"""What timm's ``create_dataset`` reads besides folders: ``torch/cifar10``, ``hfds/...`` and so on."""


def load_data(name: str, image_size: int) -> ImageData:
    """The in-memory data set of that name.

    Raises:
        UnknownNameError: with the nearest names.
    """
    if name not in DATASETS:
        raise UnknownNameError("data set", name, DATASETS)
    return DATASETS[name](image_size)


def check_name(name: str) -> str:
    """``name`` itself, if it is of a data set that can be opened.

    Raises:
        UnknownNameError: with the nearest names.
    """
    prefix, slash, rest = name.partition("/")
    own = (*DATASETS, CIFAR10, "folder")
    if name not in own and not (slash and rest and prefix in TIMM_PREFIXES):
        raise UnknownNameError("data set", name, [*own, *(f"{p}/..." for p in TIMM_PREFIXES)])
    return name


class TensorData:
    """An in-memory data set, as a run asks for it.

    Args:
        images: the tensors.
        batch_size, shift: see :class:`Batches`.
    """

    def __init__(self, images: ImageData, batch_size: int, shift: int):
        self.images, self.batch_size, self.shift = images, batch_size, shift
        self.example = images.train_images[:1]
        self.classes = int(images.train_labels.max()) + 1

    def train(self, seed: int) -> Batches:
        images = self.images
        return Batches(images.train_images, images.train_labels, self.batch_size, seed=seed, shift=self.shift)

    def plain(self) -> Batches:
        images = self.images
        order = torch.randperm(len(images.train_images), generator=torch.Generator().manual_seed(_PLAIN_SEED))
        return Batches(images.train_images[order], images.train_labels[order], self.batch_size)

    def validation(self) -> None:
        return None

    def test(self) -> Batches:
        return Batches(self.images.test_images, self.images.test_labels, _EVAL_BATCH)


class CifarData:
    """CIFAR-10, decoded once and kept in memory as bytes; see :mod:`fxquant.pixels`.

    Args:
        root: folder in one of the forms of :func:`fxquant.pixels.read_cifar10`.
        config: mean and std as of ``timm.data.resolve_model_data_config``.
        batch_size: images a batch.
        augmentation: of training.
        validation: how many training images are kept from training, evenly by class; which, no seed changes.
        plain_batches: how many batches calibrate and re-estimate BatchNorm.
        test_images: how many held-out images are used; all when None.
        cache: folder that keeps decoded images for the next run, if any.

    Raises:
        FxQuantError: as :func:`fxquant.pixels.read_cifar10` does, and for a model of grey images.
    """

    def __init__(
        self,
        root: Path,
        config: Mapping[str, Any],
        *,
        batch_size: int,
        augmentation: Augmentation,
        validation: int,
        plain_batches: int,
        test_images: int | None,
        cache: Path | None,
    ):
        if config["input_size"][0] != 3:
            raise FxQuantError(
                f"CIFAR-10's images have three channels, the model takes {config['input_size'][0]}; set "
                "model.options.in_chans = 3"
            )
        self.batch_size, self.augmentation, self.plain_batches = batch_size, augmentation, plain_batches
        self.normalisation = {"mean": tuple(config["mean"]), "std": tuple(config["std"])}
        parts = read_cifar10(root, cache)
        self.train_pixels, self.test_pixels = parts["train"], parts["test"]
        kept = kept_for_validation(self.train_pixels.labels, validation, _SPLIT_SEED)
        self.trained, self.kept = (~kept).nonzero().flatten(), kept.nonzero().flatten()
        tested = len(self.test_pixels.labels)
        self.tested = torch.arange(tested)
        if test_images is not None:
            self.tested = torch.randperm(tested, generator=torch.Generator().manual_seed(_SPLIT_SEED))[:test_images]
        self.classes = len(self.train_pixels.classes)
        ((self.example, _),) = PixelBatches(self.train_pixels, self.trained[:1], 1, **self.normalisation)

    def train(self, seed: int) -> PixelBatches:
        return PixelBatches(
            self.train_pixels,
            self.trained,
            self.batch_size,
            **self.normalisation,
            seed=seed,
            augmentation=self.augmentation,
        )

    def plain(self) -> PixelBatches:
        order = torch.randperm(len(self.trained), generator=torch.Generator().manual_seed(_PLAIN_SEED))
        chosen = self.trained[order[: self.plain_batches * self.batch_size]]
        return PixelBatches(self.train_pixels, chosen, self.batch_size, **self.normalisation)

    def validation(self) -> PixelBatches | None:
        if not len(self.kept):
            return None
        return PixelBatches(self.train_pixels, self.kept, _EVAL_BATCH, **self.normalisation)

    def test(self) -> PixelBatches:
        return PixelBatches(self.test_pixels, self.tested, _EVAL_BATCH, **self.normalisation)


class TimmData:
    """A data set that timm reads and transforms as the model was trained, streamed from disk.

    Args:
        name: ``folder`` (one subfolder a class in ``DIR/train`` and ``DIR/validation``, or tar files of these names),
            or a name of timm's ``create_dataset`` with its prefix, such as ``torch/cifar10``.
        root: the folder.
        config: mean, std, interpolation, crop_pct and input_size as of ``timm.data.resolve_model_data_config``.
        image_size: height and width; the model's own when None.
        batch_size: images a batch; in training a last, smaller one is dropped unless it is the only one.
        workers: processes that read images; 0 reads in this one. The images do not depend on it.
        splits: names of the training and the held-out part.
        augmentation: keyword arguments of ``timm.data.create_transform`` in training.
        plain_batches: how many batches calibrate and re-estimate BatchNorm; of a stream, its first ones.
        test_images: how many held-out images are used; all when None.

    Raises:
        FxQuantError: a folder or split that is not there, is empty, or has other classes than the training part.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        config: Mapping[str, Any],
        *,
        image_size: int | None,
        batch_size: int,
        workers: int,
        splits: tuple[str, str],
        augmentation: Mapping[str, Any],
        plain_batches: int,
        test_images: int | None,
    ):
        self.name, self.root, self.batch_size, self.workers = name, root, batch_size, workers
        self.plain_batches, self.test_images = plain_batches, test_images
        self.channels = config["input_size"][0]
        size = image_size or config["input_size"][-1]
        common = {"input_size": (self.channels, size, size), "interpolation": config["interpolation"]}
        for key in ("mean", "std"):  # timm gives three for grey images as well
            values = tuple(config[key])
            common[key] = values if len(values) == self.channels else (float(np.mean(values)),) * self.channels
        evaluated = common | {key: config[key] for key in ("crop_pct", "crop_mode") if key in config}
        self.plain_set = self._dataset(splits[0], evaluated, is_training=False)
        if taken := _OWN_ARGUMENTS & set(augmentation):
            raise FxQuantError(
                f"data.augmentation sets {sorted(taken)}, which follow from the model and the other keys"
            )
        self._make_train_set = lambda seed: self._dataset(
            splits[0], {**common, **augmentation}, is_training=True, seed=seed
        )
        self.train_set = self._make_train_set(0)
        if isinstance(self.train_set, IterableDataset) and process_count() > 1:
            raise FxQuantError(
                f"the data set {name!r} is a stream, of which {process_count()} processes cannot read even parts; "
                "train in one process, or unpack it into a folder (data.name = 'folder')"
            )
        self.test_set = self._dataset(splits[1], evaluated, is_training=False)
        self.example = torch.randn(1, self.channels, size, size, generator=torch.Generator().manual_seed(0))
        trained, tested = (self._class_names(d) for d in (self.train_set, self.test_set))
        if trained != tested:
            alone = sorted({*(trained or ())} ^ {*(tested or ())})[:5]
            raise FxQuantError(
                f"the classes of {splits[0]!r} and {splits[1]!r} in {root} differ: {alone} are in one of them alone, "
                "so labels would not mean the same"
            )
        self.classes = len(trained) if trained is not None else None

    def train(self, seed: int) -> Loader:
        streams = isinstance(self.train_set, IterableDataset)  # these shuffle by themselves
        dataset = self._make_train_set(seed) if streams else self.train_set
        return _Streamed(dataset, self.batch_size, self.workers, seed=seed)

    def plain(self) -> Loader:
        wanted = self.plain_batches * self.batch_size
        return _Streamed(_some(self.plain_set, wanted, _PLAIN_SEED), self.batch_size, self.workers, wanted)

    def validation(self) -> None:
        return None

    def test(self) -> Loader:
        wanted = self.test_images
        chosen = self.test_set if wanted is None else _some(self.test_set, wanted, _SPLIT_SEED)
        return _Streamed(chosen, self.batch_size, self.workers, wanted)

    def _dataset(self, split: str, transform: dict[str, Any], *, is_training: bool, seed: int = 0) -> Dataset:
        from . import timm

        mode = "L" if self.channels == 1 else "RGB"
        folder = self.name in _FOLDERS
        root = _split_root(self.root, split) if folder else self.root
        try:
            dataset = timm.create_dataset(
                "" if self.name == "folder" else self.name,
                root=str(root),
                split=split,
                search_split=not folder,
                is_training=is_training,
                batch_size=self.batch_size,
                seed=seed,
            )
            empty = not isinstance(dataset, IterableDataset) and not len(dataset)
        except (RuntimeError, OSError, ImportError, AssertionError, TypeError, ValueError) as error:
            raise FxQuantError(f"timm cannot open {self.name!r} in {root}, split {split!r}: {error!r}") from error
        try:
            dataset.transform = _Converted(mode, timm.create_transform(**transform, is_training=is_training))
            with _drawing_from(split):  # values that it cannot use come out at the first image
                dataset.transform(Image.new("RGB", transform["input_size"][:0:-1]))
        except Exception as error:
            given = {key: value for key, value in transform.items() if key not in _OWN_ARGUMENTS}
            raise FxQuantError(
                f"timm cannot transform images by {given}, which data.augmentation is a part of: {error!r}"
            ) from error
        if empty:
            raise EmptyDataError(f"{root} holds no image; it has one subfolder a class, with images in it")
        return dataset

    @staticmethod
    def _class_names(dataset: Dataset) -> list[str] | None:
        home = getattr(dataset, "reader", dataset)
        named = getattr(home, "class_to_idx", None) or getattr(home, "class_name_to_idx", None)  # folder, tar
        return sorted(named, key=named.get) if named else None


def expanded(path: str, key: str) -> Path:
    """A path of a recipe, ``~`` and ``~user`` replaced.

    Raises:
        FxQuantError: where there is no such user; ``key`` is the recipe's.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise FxQuantError(f"{key} = {path!r}: {error}") from None


def open_data(
    *,
    name: str,
    dir: str | None,
    image_size: int | None,
    shift: int,
    config: Mapping[str, Any],
    flip: bool = False,
    validation: int = 0,
    cache: str | None = None,
    **options,
) -> Data:
    """The data set of a recipe's ``[data]`` section.

    Args:
        name, image_size: see :class:`TimmData`, :data:`CIFAR10` and :data:`DATASETS`.
        dir: folder of a data set that is read from disk.
        shift: see :class:`Batches` and :class:`fxquant.pixels.Augmentation`; for data in memory.
        config: how the model wants its images (timm's data config).
        flip, validation, cache: see :class:`CifarData`.
        options: the other arguments of :class:`TimmData`.

    Raises:
        FxQuantError: with what is missing.
    """
    if check_name(name) in DATASETS:
        return TensorData(load_data(name, image_size or config["input_size"][-1]), options["batch_size"], shift)
    if dir is None:
        raise FxQuantError(f"the data set {name!r} is read from disk, but data.dir is not set; --set data.dir=FOLDER")
    root = expanded(dir, "data.dir")
    if not root.is_dir():
        raise FxQuantError(f"data.dir = {dir!r} is not a folder; give the one that holds the data set {name!r}")
    if name == CIFAR10:
        return CifarData(
            root,
            config,
            batch_size=options["batch_size"],
            augmentation=Augmentation(shift, flip),
            validation=validation,
            plain_batches=options["plain_batches"],
            test_images=options["test_images"],
            cache=None if cache is None else expanded(cache, "data.cache"),
        )
    return TimmData(name, root, config, image_size=image_size, **options)


@contextlib.contextmanager
def dead_workers_in_words() -> Iterator[None]:
    """Whatever runs inside may lose a process that reads images; torch says so in the middle of anything.

    Raises:
        DataWorkerError: in the place of torch's RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        reason = str(error).strip().splitlines()[0].rstrip(" .")
        raise DataWorkerError(
            f"a process that reads images is gone ({reason}); often the memory was not enough. Resume, with fewer "
            "processes (--set data.workers=N; 0 reads in the main one) where it happens again"
        ) from error


_SYNONYMS = (("train", "training"), ("validation", "val", "valid", "eval", "evaluation"))  # never "test": it is another


def _split_root(root: Path, split: str) -> Path:
    """The subfolder or tar file of a split. timm would take ``root`` itself for both where there is none."""
    names = [split, *(name for name in next((s for s in _SYNONYMS if split in s), ()) if name != split)]
    for path in (root / f"{name}{suffix}" for name in names for suffix in ("", ".tar")):
        if path.exists():
            return path
    found = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
    raise FxQuantError(f"{root} has no {split!r} (nor {split}.tar); it holds {found}. Set data.splits to what is there")


def _some(dataset: Dataset, wanted: int, seed: int) -> Dataset:
    """``wanted`` images in a fixed random order; a stream is cut by its loader instead."""
    if isinstance(dataset, IterableDataset):
        return dataset
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return Subset(dataset, order[:wanted].tolist())


class _Streamed:
    """A loader over a torch data set; shuffled and augmented by (seed, epoch) when ``seed`` is given."""

    def __init__(
        self, dataset: Dataset, batch_size: int, workers: int, at_most: int | None = None, *, seed: int | None = None
    ):
        self.dataset, self.batch_size, self.workers, self.seed, self.epoch = dataset, batch_size, workers, seed, 0
        self.share = Share()
        self.images = len(dataset) if at_most is None else min(len(dataset), at_most)
        self.drop_last = seed is not None and self.images >= batch_size

    def __len__(self) -> int:
        return self.images // self.batch_size if self.drop_last else math.ceil(self.images / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed((self.seed or 0) * 100_003 + self.epoch)
        dataset = self.dataset
        if isinstance(dataset, IterableDataset):
            chosen = {"batch_size": self.batch_size, "drop_last": self.drop_last}
            if self.seed is not None:
                dataset = _SeededStream(dataset, self.seed, self.epoch)
        else:
            chosen = {"batch_sampler": self._chosen(generator)}
            if self.seed is not None:
                dataset = _Seeded(dataset, self.seed, self.epoch)
        batches = DataLoader(dataset, **chosen, num_workers=self.workers, generator=generator)
        left = self.images
        for _, (images, labels) in zip(range(len(self)), batches, strict=False):
            yield images[:left], torch.as_tensor(labels, dtype=torch.int64)[:left]  # a stream's last batch is whole
            left -= len(images)

    def _chosen(self, generator: torch.Generator) -> list[Sequence[int]]:
        """Which images of a data set that can be indexed this process reads, by batches."""
        if self.seed is None:
            return _in_batches(self.share.of_all(range(len(self.dataset))), self.batch_size)
        order = torch.randperm(len(self.dataset), generator=generator).tolist()
        return [self.share.of_batch(batch) for batch in _in_batches(order, self.batch_size)[: len(self)]]


def _in_batches(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    return [indices[begin : begin + size] for begin in range(0, len(indices), size)]


class _Seeded(Dataset):
    """Draws the augmentation of an image from (seed, epoch, index), whichever process reads it."""

    def __init__(self, dataset: Dataset, seed: int, epoch: int):
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        with _drawing_from(f"{self.seed} {self.epoch} {index}"):
            return self.dataset[index]


class _SeededStream(IterableDataset):
    """The same for a stream: draws from (seed, epoch, worker, place in the worker's stream)."""

    def __init__(self, dataset: IterableDataset, seed: int, epoch: int):
        self.dataset, self.seed, self.epoch = dataset, seed, epoch
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        name = f"{self.seed} {self.epoch} {worker.id if worker else 0}"
        with _drawing_from(name):
            items = iter(self.dataset)
        for place in itertools.count():
            with _drawing_from(f"{name} {place}"):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item


class _Converted:
    """A transform of images brought to a mode first: torchvision's data sets give what is in the file."""

    def __init__(self, mode: str, transform: Callable):
        self.mode, self.transform = mode, transform

    def __call__(self, image: Any) -> Tensor:
        return self.transform(image.convert(self.mode))


@contextlib.contextmanager
def _drawing_from(name: str) -> Iterator[None]:
    """Python's, numpy's and torch's CPU generator seeded by ``name``, and put back afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    drawn = random.Random(name).getrandbits(32)
    random.seed(drawn)
    np.random.seed(drawn)
    torch.default_generator.manual_seed(drawn)  # torch.manual_seed would reseed GPUs as well
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
