"""CIFAR-10 in memory: reading its forms, the cache, and augmentation on whole batches."""

import random
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from fxquant import pixels as module
from fxquant.data import open_data
from fxquant.errors import EmptyDataError, FxQuantError, SpecError
from fxquant.pixels import Augmentation, PixelBatches, Pixels, kept_for_validation, read_cifar10
from fxquant.timm import create_model, resolve_model_data_config
from tests.test_data import passes, same

CLASSES = ["cat", "dog", "ship"]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """21 images to train on and 9 to test, as JPEG, one subfolder a class."""
    root, drawn = tmp_path_factory.mktemp("cifar"), np.random.default_rng(0)
    for part, each in (("train", 7), ("test", 3)):
        for label in CLASSES:
            (root / part / label).mkdir(parents=True)
            for index in range(each):
                image = Image.fromarray(drawn.integers(0, 256, (32, 32, 3), dtype=np.uint8))
                image.save(root / part / label / f"{index:04d}.jpg")
    return root


@pytest.fixture(scope="module")
def tars(tree, tmp_path_factory):
    root = tmp_path_factory.mktemp("tars")
    for part in ("train", "test"):
        with tarfile.open(root / f"{part}.tar", "w") as tar:
            tar.add(tree / part, arcname=".")
    return root


def opened(root, **options):
    options = {
        "image_size": None, "batch_size": 4, "workers": 0, "splits": ("train", "validation"), "augmentation": {},
        "plain_batches": 2, "test_images": None, "shift": 4, "flip": True, "validation": 0, "cache": None,
        "config": resolve_model_data_config(create_model("resnet20")),
    } | options  # fmt: skip
    return open_data(name="cifar10", dir=str(root), **options)


def equal(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.classes == b.classes


# ---- reading -------------------------------------------------------------------------------------------------


def test_tars_and_folders_are_the_same(tree, tars):
    from_tree, from_tars = read_cifar10(tree), read_cifar10(tars)
    for part, count in (("train", 21), ("test", 9)):
        assert equal(from_tree[part], from_tars[part])
        images, labels, classes = from_tree[part]
        assert (images.shape, images.dtype) == ((count, 3, 32, 32), torch.uint8)
        assert labels.bincount().tolist() == [count // 3] * 3
        assert classes == CLASSES
    with Image.open(tree / "test" / "dog" / "0001.jpg") as image:
        assert np.array_equal(from_tree["test"].images[4].permute(1, 2, 0).numpy(), np.array(image))


def test_held_out_images_are_those_of_timm_bit_for_bit(tree, tars):
    """Its reader, its transform: what a recipe with data.name = 'folder' would evaluate on."""
    streamed = open_data(
        name="folder", dir=str(tree), image_size=None, shift=0, batch_size=4, workers=0, splits=("train", "test"),
        augmentation={}, plain_batches=1, test_images=None, config=resolve_model_data_config(create_model("resnet20")),
    )  # fmt: skip
    both = [[torch.cat(part) for part in zip(*data.test(), strict=True)] for data in (streamed, opened(tars))]
    assert torch.equal(both[0][0], both[1][0])
    assert torch.equal(both[0][1], both[1][1])


def binary(root, images, labels, counts=(3, 3, 3, 3, 3)):
    """The authors' binary version of images, all but the last in its five files to train on."""
    home = root / "cifar-10-batches-bin"
    home.mkdir()
    records = np.concatenate([labels.numpy().astype(np.uint8)[:, None], images.flatten(1).numpy()], axis=1)
    cuts = np.cumsum(counts)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    for name, part in zip(names, np.split(records, cuts), strict=True):
        (home / name).write_bytes(part.tobytes())
    (home / "batches.meta.txt").write_text("\n".join(CLASSES) + "\n\n")
    return home


def test_the_binary_version(tmp_path):
    images = torch.randint(0, 256, (19, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(19) % 3
    home = binary(tmp_path, images, labels)
    for root in (tmp_path, home):
        parts = read_cifar10(root)
        assert equal(parts["train"], Pixels(images[:15], labels[:15], CLASSES))
        assert equal(parts["test"], Pixels(images[15:], labels[15:], CLASSES))
    (home / "data_batch_3.bin").write_bytes(b"short")
    with pytest.raises(FxQuantError, match=r"data_batch_3\.bin has 5 bytes, which is no multiple of 3073"):
        read_cifar10(tmp_path)
    (home / "data_batch_3.bin").unlink()
    with pytest.raises(FxQuantError, match=r"data_batch_3\.bin cannot be read"):
        read_cifar10(tmp_path)


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    with pytest.raises(FxQuantError, match=r"holds no CIFAR-10: neither train\.tar, train/ nor .*, but nothing"):
        read_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(FxQuantError, match="a pickle can run code; take the binary one"):
        read_cifar10(tmp_path)
    (tmp_path / "train.tar").write_bytes(b"no tar")
    with pytest.raises(FxQuantError, match=r"the images in .*train\.tar cannot be read"):
        read_cifar10(tmp_path)
    (tmp_path / "train.tar").unlink()
    for part, classes in (("train", "abc"), ("test", "ab")):
        for label in classes:
            (tmp_path / part / label).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / part / label / "0.png")
    with pytest.raises(FxQuantError, match=r"classes of 'train' and 'test' .* \['c'\] are in one of them alone"):
        read_cifar10(tmp_path)
    Image.new("RGB", (40, 32)).save(tmp_path / "train" / "a" / "0.png")
    with pytest.raises(FxQuantError, match=r"0\.png has 40x32 pixels, CIFAR-10's images have 32x32"):
        read_cifar10(tmp_path)
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"no image")
    with pytest.raises(FxQuantError, match="cannot be read: UnidentifiedImageError"):
        read_cifar10(tmp_path)


def test_a_model_of_grey_images_is_refused(tars):
    config = resolve_model_data_config(create_model("resnet20")) | {"input_size": (1, 32, 32)}
    with pytest.raises(FxQuantError, match=r"three channels, the model takes 1; set model\.options\.in_chans = 3"):
        opened(tars, config=config)


def test_a_cache_is_written_used_and_given_up_when_images_change(tree, tmp_path, monkeypatch):
    root, cache = tmp_path / "images", tmp_path / "cache"
    for part in ("train", "test"):
        (root / part / "a").mkdir(parents=True)
        Image.new("RGB", (32, 32), "white").save(root / part / "a" / "0.png")
    fresh = read_cifar10(root, cache)
    assert sorted(p.suffix for p in cache.iterdir()) == [".safetensors"] * 2
    with monkeypatch.context() as patched:
        patched.setattr(module, "_decode", None)  # not called again
        again = read_cifar10(root, cache)
    assert all(equal(fresh[part], again[part]) for part in fresh)
    Image.new("RGB", (32, 32), "black").save(root / "train" / "a" / "1.png")
    assert len(read_cifar10(root, cache)["train"].images) == 2
    for path in cache.iterdir():
        path.write_bytes(b"damaged")
    assert equal(read_cifar10(root, cache)["test"], fresh["test"])


# ---- batches -------------------------------------------------------------------------------------------------


def batches(images, batch_size=4, chosen=None, **options):
    pixels = Pixels(images, torch.arange(len(images)), [])
    chosen = torch.arange(len(images)) if chosen is None else chosen
    return PixelBatches(pixels, chosen, batch_size, mean=MEAN, std=STD, **options)


def restored(images):
    """Bytes again."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return ((images * std + mean) * 255).round().to(torch.uint8)


def by_label(loader):
    return {
        int(label): restored(image) for images, labels in loader for image, label in zip(images, labels, strict=True)
    }


IMAGES = torch.randint(1, 256, (13, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_evaluation_is_in_order_whole_and_normalised():
    loader = batches(IMAGES)
    assert len(loader) == 4
    assert torch.cat([labels for _, labels in loader]).tolist() == list(range(13))
    images = torch.cat([images for images, _ in loader])
    assert images.dtype == torch.float32
    assert torch.equal(restored(images), IMAGES)
    assert torch.allclose(images[0, 1], (IMAGES[0, 1] / 255 - 0.4) / 0.25, atol=1e-6)


def test_augmentation_is_a_window_of_the_padded_image_maybe_mirrored():
    """All offsets occur, none lies outside; both orientations do."""
    image = IMAGES[:1]
    padded = torch.nn.functional.pad(image[0], [4] * 4)
    windows = {}
    for y in range(9):
        for x in range(9):
            window = padded[:, y : y + 32, x : x + 32]
            windows[window.numpy().tobytes()] = (y, x, False)
            windows[window.flip(2).contiguous().numpy().tobytes()] = (y, x, True)
    many = batches(image.expand(3000, 3, 32, 32), 250, seed=0, augmentation=Augmentation(4, True))
    seen = [windows[restored(x).numpy().tobytes()] for images, _ in many for x in images]
    assert {s[:2] for s in seen} == {(y, x) for y in range(9) for x in range(9)}
    assert 0.45 < sum(mirrored for *_, mirrored in seen) / len(seen) < 0.55


def test_without_augmentation_training_only_shuffles():
    loader = batches(IMAGES, seed=0)
    seen = by_label(loader)
    assert len(loader) == 3
    assert len(seen) == 12  # the rest is dropped
    assert all(torch.equal(image, IMAGES[label]) for label, image in seen.items())


def test_mirroring_alone_leaves_every_pixel():
    seen = by_label(batches(IMAGES, 13, seed=0, augmentation=Augmentation(0, True)))
    kinds = [(torch.equal(i, IMAGES[n]), torch.equal(i, IMAGES[n].flip(2))) for n, i in seen.items()]
    assert set(kinds) == {(True, False), (False, True)}


def test_order_and_augmentation_depend_on_seed_and_epoch_alone():
    make = lambda seed: batches(IMAGES, seed=seed, augmentation=Augmentation(4, True))  # noqa: E731
    whole = passes(make(3), 0, 1, 2)
    random.seed(9)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    (resumed,) = passes(make(3), 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(whole[2], resumed)
    assert not same(whole[0], whole[1])
    assert not same(whole[0], passes(make(4), 0)[0])


def test_what_happens_to_an_image_depends_on_neither_batch_size_nor_the_others():
    options = {"seed": 5, "augmentation": Augmentation(4, True)}
    one = by_label(batches(IMAGES, 13, **options))
    for other in (batches(IMAGES, 3, **options), batches(IMAGES, 2, torch.tensor([1, 5, 8, 12]), **options)):
        seen = by_label(other)
        assert len(seen) >= 4
        assert all(torch.equal(image, one[label]) for label, image in seen.items())


def test_bad_input():
    with pytest.raises(EmptyDataError, match="no images"):
        batches(IMAGES[:0])
    with pytest.raises(SpecError, match="batch_size=0 was asked for"):
        batches(IMAGES, 0)


# ---- as a run asks for it ------------------------------------------------------------------------------------


def test_parts_of_a_run(tars):
    data = opened(tars, validation=6, plain_batches=3)
    assert data.classes == 3
    assert data.example.shape == (1, 3, 32, 32)
    assert len(data.trained) == 15
    assert len(list(data.train(0))) == len(data.train(0)) == 3
    assert torch.cat([labels for _, labels in data.validation()]).bincount().tolist() == [2, 2, 2]
    assert same(*passes(data.plain(), 0, 1))
    assert [len(labels) for _, labels in data.plain()] == [4, 4, 4]
    assert torch.cat([labels for _, labels in data.test()]).tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert opened(tars).validation() is None
    few = opened(tars, test_images=4)
    assert same(*passes(few.test(), 0, 1))
    assert sum(len(labels) for _, labels in few.test()) == 4


def test_no_kept_image_is_trained_on(tars):
    data = opened(tars, validation=6)
    assert not set(data.trained.tolist()) & set(data.kept.tolist())
    assert set(data.trained.tolist()) | set(data.kept.tolist()) == set(range(21))


def test_validation_is_even_by_class_and_the_same_for_a_seed():
    labels = torch.arange(50).sort().values // 10  # as the files are: one class after another
    kept = kept_for_validation(labels, 12, 0)
    assert sorted(labels[kept].bincount().tolist()) == [2, 2, 2, 3, 3]
    assert torch.equal(kept, kept_for_validation(labels, 12, 0))
    assert not torch.equal(kept, kept_for_validation(labels, 12, 1))
    assert not kept_for_validation(labels, 0, 0).any()
    assert (kept & kept_for_validation(labels, 20, 0)).sum() == 12  # more images keep those that were kept
    with pytest.raises(SpecError, match="50 images were asked for validation, of 50 to train on"):
        kept_for_validation(labels, 50, 0)
