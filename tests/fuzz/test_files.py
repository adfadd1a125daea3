"""Files of a run, damaged at random: refused by name, never taken for another model, never run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fxquant as fq
from fxquant import checkpoint
from fxquant.errors import CheckpointError
from fxquant.recipe import parse_recipe
from tests.models import TinyResidual, settle

from . import cases

RECIPE = parse_recipe(
    {
        "name": "x", "model": {"name": "test_resnet", "pretrained": False}, "data": {"name": "digits"},
        "train": {"epochs": 1}, "rules": [{"pattern": "*", "bits": 4}],
    },
    "x",
)  # fmt: skip


@st.composite
def damage(draw) -> list[tuple]:
    """Changes to make, one after another; places are shares of the file."""
    place = st.floats(0, 1, exclude_max=True)
    kinds = st.one_of(
        st.tuples(st.just("flip"), place, st.integers(0, 7)),
        st.tuples(st.just("cut"), place, st.just(None)),
        st.tuples(st.just("drop"), place, st.integers(1, 64)),
        st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=16)),
        st.tuples(st.just("zero"), place, st.integers(1, 64)),
        st.tuples(st.just("swap"), place, place),
    )
    return draw(st.lists(kinds, min_size=1, max_size=3))


def damaged(content: bytes, changes: list[tuple]) -> bytes:
    out = bytearray(content)
    for kind, place, what in changes:
        at = int(place * len(out))
        if kind == "flip" and out:
            out[at] ^= 1 << what
        elif kind == "cut":
            del out[at:]
        elif kind == "drop":
            del out[at : at + what]
        elif kind == "insert":
            out[at:at] = what
        elif kind == "zero":
            out[at : at + what] = bytes(len(out[at : at + what]))
        elif kind == "swap" and out:
            other = int(what * len(out))
            out[at : at + 1], out[other : other + 1] = out[other : other + 1], out[at : at + 1]
    return bytes(out)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    model = fq.prepare(settle(TinyResidual(), x), [fq.Rule("*", 4, 4)], calibration=[x])
    fq.freeze(model)
    file = tmp_path_factory.mktemp("packed") / "x.fxq"
    fq.save(fq.convert(model), file, notes={"recipe": RECIPE.to_json()})
    return file.read_bytes(), fq.load(file, TinyResidual()).state_dict()


@cases(60)
@given(damage())
def test_a_packed_file_is_refused_or_the_same_model(tmp_path, packed, changes):
    content, tensors = packed
    (tmp_path / "x.fxq").write_bytes(damaged(content, changes))
    try:
        loaded = fq.load(tmp_path / "x.fxq", TinyResidual()).state_dict()
    except CheckpointError:
        return
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


STATE = {
    "stage": "quantized", "epochs_done": 1, "seconds": 1.5,
    "model": {"weight": torch.linspace(-1, 1, 300), "bias": torch.ones(3)},
    "history": [{"epoch": 1, "loss": 0.5}], "random": {"torch": torch.arange(64, dtype=torch.uint8), "cuda": []},
}  # fmt: skip


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return a == b


@cases(150)
@given(damage())
def test_a_checkpoint_is_refused_or_the_same(tmp_path, changes):
    checkpoint.save_checkpoint(tmp_path, RECIPE, STATE)
    path = tmp_path / checkpoint.CHECKPOINT
    whole = checkpoint.load_checkpoint(path)
    path.write_bytes(damaged(path.read_bytes(), changes))
    try:
        loaded = checkpoint.load_checkpoint(path)
    except CheckpointError as error:
        message = str(error)
        assert str(path) in message
        return
    assert same(whole, loaded)


def test_a_flipped_bit_of_a_tensor_is_found(tmp_path):
    """torch.load reads the CRC-32 that torch.save wrote beside each tensor, and does not compare it."""
    checkpoint.save_checkpoint(tmp_path, RECIPE, STATE)
    path = tmp_path / checkpoint.CHECKPOINT
    content = bytearray(path.read_bytes())
    content[content.index(STATE["model"]["weight"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    assert "model" in torch.load(path, weights_only=True)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt is damaged.*checksum"):
        checkpoint.load_checkpoint(path)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[]", b"null", b"3", b"{}", b"[" * 100_000, b'{"a": NaN', b"9" * 5000]
)
def test_json_of_a_run_that_is_none(tmp_path, content):
    (tmp_path / checkpoint.RECIPE).write_bytes(content)
    (tmp_path / checkpoint.RESULT).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"result\.json"):
        checkpoint.read_result(tmp_path)
    with pytest.raises(CheckpointError, match=r"recipe\.json"):
        checkpoint.holds_run_of(tmp_path, RECIPE)
    with pytest.raises(CheckpointError, match=r"recipe\.json"):
        checkpoint.checkpoint_for(tmp_path, RECIPE)


@cases(60)
@given(damage())
def test_a_recipe_of_a_run_is_compared_or_refused(tmp_path, changes):
    (tmp_path / checkpoint.RECIPE).write_bytes(damaged(RECIPE.to_json().encode(), changes))
    for ask in (checkpoint.holds_run_of, checkpoint.checkpoint_for):
        try:
            ask(tmp_path, RECIPE)
        except CheckpointError as error:
            message = str(error)
            assert str(tmp_path) in message
