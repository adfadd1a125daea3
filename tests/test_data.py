"""Data sets and the in-memory loader."""

import random
import shutil
import tarfile

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from fxquant.data import Batches, load_data, open_data
from fxquant.errors import EmptyDataError, FxQuantError, SpecError, UnknownNameError


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", 16)


def test_digits_split(digits):
    assert digits.train_images.shape == (1198, 1, 16, 16)
    assert digits.test_images.shape == (599, 1, 16, 16)
    assert digits.train_labels.bincount().min() >= 110  # stratified
    assert digits.test_labels.bincount().min() >= 55
    assert digits.train_images.mean().abs() < 1e-5
    assert (digits.train_images.std() - 1).abs() < 1e-5


def test_no_image_is_in_both_parts(digits):
    train = {image.numpy().tobytes() for image in digits.train_images}
    assert not train & {image.numpy().tobytes() for image in digits.test_images}


def test_epochs_differ_and_repeat(digits):
    loader = Batches(digits.train_images, digits.train_labels, 64, seed=0, shift=1)
    first = [labels for _, labels in loader]
    assert len(first) == len(loader) == 18
    again = [labels for _, labels in loader]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    loader.epoch = 1
    assert not all(torch.equal(a, b) for a, b in zip(first, loader_labels(loader), strict=True))


def loader_labels(loader):
    return [labels for _, labels in loader]


def test_evaluation_sees_every_image_in_order(digits):
    loader = Batches(digits.test_images, digits.test_labels, 256)
    assert torch.equal(torch.cat(loader_labels(loader)), digits.test_labels)
    assert len(loader) == 3


def test_shift_moves_whole_images():
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    loader = Batches(image, torch.zeros(1, dtype=torch.int64), 1, seed=0, shift=1)
    seen = set()
    for epoch in range(60):
        loader.epoch = epoch
        ((moved, _),) = loader
        seen.add(tuple(moved.flatten().tolist()))
    padded = torch.nn.functional.pad(image, [1] * 4, mode="replicate")
    windows = {tuple(padded[0, 0, y : y + 4, x : x + 4].flatten().tolist()) for y in range(3) for x in range(3)}
    assert seen == windows


def test_bad_input():
    with pytest.raises(UnknownNameError, match="unknown data set 'digit': did you mean 'digits'"):
        load_data("digit", 8)
    with pytest.raises(EmptyDataError, match="no images"):
        Batches(torch.zeros(0, 1, 2, 2), torch.zeros(0), 4)
    with pytest.raises(SpecError, match="batch_size=0 was asked for"):
        Batches(torch.zeros(1, 1, 2, 2), torch.zeros(1), 0)


# ---- images on disk ------------------------------------------------------------------------------------------

CONFIG = {
    "input_size": (3, 32, 32),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.2, 0.2),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
}


def opened(root, name="folder", config=CONFIG, **options):
    options = {
        "image_size": None, "batch_size": 4, "workers": 0, "splits": ("train", "validation"), "augmentation": {},
        "plain_batches": 2, "test_images": None, "shift": 0,
    } | options  # fmt: skip
    return open_data(name=name, dir=None if root is None else str(root), config=config, **options)


def passes(loader, *epochs):
    out = []
    for epoch in epochs:
        loader.epoch = epoch
        out.append([(images.clone(), labels) for images, labels in loader])
    return out


def same(a, b):
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True))


def test_a_folder_of_images(image_folder):
    data = opened(image_folder)
    assert data.classes == 3
    assert data.example.shape == (1, 3, 32, 32)
    train, test = list(data.train(0)), list(data.test())
    assert [len(labels) for _, labels in train] == [4, 4, 4]  # of 14: the rest is dropped
    assert sum(len(labels) for _, labels in test) == 6
    assert torch.cat([labels for _, labels in test]).tolist() == [0, 0, 1, 1, 2, 2]
    assert train[0][0].dtype == torch.float32
    assert train[0][1].dtype == torch.int64
    assert len(data.train(0)) == 3
    assert len(data.test()) == 2


def test_images_are_normalised_as_the_model_wants_them(tmp_path):
    """A white image at (1 - mean) / std, at the model's own size or the asked one."""
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("RGB", (40, 50), "white").save(tmp_path / split / "a" / "0.png")
    for size in (None, 24):
        ((images, _),) = opened(tmp_path, image_size=size).test()
        assert images.shape == (1, 3, size or 32, size or 32)
        assert torch.allclose(images[0, :, 3, 3], torch.tensor([2.5, 3.0, 3.5]), atol=1e-5)
    grey = opened(tmp_path, config=CONFIG | {"input_size": (1, 32, 32)})
    ((images, _),) = grey.test()
    assert images.shape == (1, 1, 32, 32)
    assert torch.allclose(images, torch.tensor(3.0), atol=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_augmentation_depend_on_seed_and_epoch_alone(image_folder, workers):
    """So a resumed run sees what an uninterrupted one would have seen, with any number of workers."""
    whole = passes(opened(image_folder).train(3), 0, 1, 2)
    random.seed(9)
    torch.manual_seed(9)
    (resumed,) = passes(opened(image_folder, workers=workers).train(3), 2)
    assert same(whole[2], resumed)
    assert not same(whole[0], whole[1])
    (other,) = passes(opened(image_folder).train(4), 0)
    assert not same(whole[0], other)


def test_reading_images_leaves_the_random_numbers_of_the_run_alone(image_folder):
    loader = opened(image_folder).train(0)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    list(loader)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_plain_batches_are_fixed_and_not_augmented(image_folder):
    data = opened(image_folder)
    first, again = passes(data.plain(), 0, 1)
    assert len(first) == len(data.plain()) == 2
    assert same(first, again)
    everything = torch.cat([images for images, _ in opened(image_folder, plain_batches=99).plain()])
    assert len(everything) == 14
    flat = {tuple(image.flatten().tolist()) for image in everything}
    assert {tuple(image.flatten().tolist()) for images, _ in first for image in images} < flat


def test_augmentation_takes_timms_options(image_folder):
    still = opened(image_folder, augmentation={"no_aug": True}).train(0)
    (first, second) = passes(still, 0, 1)
    key = lambda batches: sorted(tuple(i.flatten().tolist()) for images, _ in batches for i in images)  # noqa: E731
    assert len(set(key(first)) | set(key(second))) <= 14
    with pytest.raises(FxQuantError, match=r"timm cannot transform images by .*no_augs"):
        opened(image_folder, augmentation={"no_augs": True})


@pytest.mark.parametrize("value", [{"interpolation": "nearest-ish"}, {"ratio": [0, 0]}, {"color_jitter": "a"}])
def test_augmentation_that_no_image_can_be_given_is_said_before_the_first(image_folder, value):
    before = random.getstate(), torch.get_rng_state()
    with pytest.raises(
        FxQuantError, match=rf"timm cannot transform images by .*{next(iter(value))}.*data.augmentation"
    ):
        opened(image_folder, augmentation=value)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_held_out_images_are_cut_out_as_the_model_wants_them(tmp_path, mode):
    """Wide images, black on the left and white on the right; timm's own transform of that crop mode says how."""
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        image = Image.new("RGB", (80, 40), "white")
        image.paste("black", (0, 0, 30, 40))
        image.save(tmp_path / split / "a" / "0.png")
    config = CONFIG | {"crop_mode": mode}
    data = opened(tmp_path, config=config)
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    expected = timm.data.create_transform(**{key: config[key] for key in keys})(image)
    for loader in (data.test(), data.plain()):
        assert torch.equal(next(iter(loader))[0][0], expected)


def test_held_out_images_can_be_fewer(image_folder):
    data = opened(image_folder, test_images=4)
    first, again = passes(data.test(), 0, 5)
    assert same(first, again)
    assert sum(len(labels) for _, labels in first) == 4


def test_tar_files_and_torchvisions_data_sets(image_folder, tmp_path):
    for split in ("train", "test"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            tar.add(image_folder / ("validation" if split == "test" else split), arcname=".")
    tars, folder = opened(tmp_path, splits=("train", "test")), opened(image_folder)
    assert same(list(tars.test()), list(folder.test()))
    again = opened(image_folder, name="torch/image_folder")
    assert same(list(again.test()), list(folder.test()))


def test_the_held_out_part_is_never_the_test_part(image_folder, tmp_path):
    """Which has no labels, or none to be looked at, in many data sets."""
    for split in ("train", "val", "test"):
        shutil.copytree(image_folder / ("validation" if split != "train" else split), tmp_path / split)
    shutil.rmtree(tmp_path / "test" / "a")
    assert same(list(opened(tmp_path).test()), list(opened(image_folder).test()))
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(FxQuantError, match="has no 'validation'"):
        opened(tmp_path)


def test_tar_files_of_other_classes_are_refused(image_folder, tmp_path):
    for split, classes in (("train", "abc"), ("validation", "bc")):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for label in classes:
                tar.add(image_folder / split / label, arcname=label)
    with pytest.raises(FxQuantError, match=r"classes of 'train' and 'validation'.*\['a'\] are in one of them alone"):
        opened(tmp_path)


def test_an_image_folder_of_torchvision_needs_its_splits_too(image_folder):
    with pytest.raises(FxQuantError, match="has no 'train'"):
        opened(image_folder / "train", name="torch/image_folder")


def test_torchvisions_images_get_the_models_channels(image_folder):
    grey = CONFIG | {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.2,)}
    assert next(iter(opened(image_folder, name="torch/image_folder", config=grey).test()))[0].shape == (
        2 * 2,
        1,
        32,
        32,
    )


@pytest.mark.parametrize("key", ["separate", "use_prefetcher", "input_size", "mean"])
def test_augmentation_cannot_undo_what_the_model_needs(image_folder, key):
    with pytest.raises(FxQuantError, match=rf"data\.augmentation sets \['{key}'\]"):
        opened(image_folder, augmentation={key: True})


class Stream(torch.utils.data.IterableDataset):
    """As timm's streams: shuffled by (seed, epoch), transformed with whatever random numbers there are."""

    def __init__(self, seed, transform=None):
        self.seed, self.transform, self.epoch = seed, transform, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 11

    def __iter__(self):
        order = list(range(11))
        random.Random(self.seed * 10 + self.epoch).shuffle(order)
        for index in order:
            yield self.transform(Image.new("RGB", (32, 32), (20 * index, 0, 0))) + torch.rand(1), index


@pytest.mark.parametrize("workers", [0, 1])
def test_streams_depend_on_seed_and_epoch_too(tmp_path, monkeypatch, workers):
    monkeypatch.setattr("fxquant.timm.create_dataset", lambda name, seed=0, **_: Stream(seed))
    make = lambda: opened(tmp_path, name="wds/some", workers=workers)  # noqa: E731
    whole = passes(make().train(3), 0, 1)
    torch.manual_seed(5)
    (resumed,) = passes(make().train(3), 1)
    assert same(whole[1], resumed)
    assert not same(whole[0], whole[1])
    (other,) = passes(make().train(4), 0)
    assert [y.tolist() for _, y in other] != [y.tolist() for _, y in whole[0]]
    assert [len(y) for _, y in whole[0]] == [4, 4]
    assert sum(len(y) for _, y in make().test()) == 11
    assert sum(len(y) for _, y in make().plain()) == 8
    some = opened(tmp_path, name="wds/some", workers=workers, test_images=6).test()
    assert [(len(x), len(y)) for x, y in some] == [(4, 4), (2, 2)]


@pytest.mark.parametrize(
    ("spoil", "options", "words"),
    [
        (
            lambda root: None,
            {"splits": ("train", "tset")},
            r"has no 'tset' \(nor tset.tar\); it holds train, validation",
        ),
        (
            lambda root: shutil.rmtree(root / "validation"),
            {},
            r"has no 'validation'.*it holds train\. Set data\.splits",
        ),
        (lambda root: shutil.rmtree(root / "train" / "b"), {}, r"classes of 'train' and 'validation'.*'b'"),
        (lambda root: [p.unlink() for p in (root / "train").glob("*/*")], {}, "Found 0 images|holds no image"),
        (lambda root: shutil.rmtree(root), {}, r"data\.dir = .* is not a folder"),
        (
            lambda root: None,
            {"name": "torch/nonesuch"},
            r"timm cannot open 'torch/nonesuch'.*Unknown torchvision dataset",
        ),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(image_folder, tmp_path, spoil, options, words):
    root = tmp_path / "copy"
    shutil.copytree(image_folder, root)
    spoil(root)
    with pytest.raises(FxQuantError, match=words):
        opened(root, **options)


def test_a_data_set_on_disk_needs_a_folder_and_a_known_name():
    with pytest.raises(FxQuantError, match=r"data\.dir is not set; --set data\.dir=FOLDER"):
        opened(None)
    with pytest.raises(UnknownNameError, match="did you mean 'folder'"):
        opened(None, name="foldr")
    with pytest.raises(UnknownNameError):
        opened(None, name="torchy/cifar10")
