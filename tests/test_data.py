"""Data sets and the in-memory loader."""

import pytest
import torch

from fxquant.data import Batches, load_data
from fxquant.errors import EmptyDataError, SpecError, UnknownNameError


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
