"""The packed file: the same integers, at their own width; and nothing but a clear error from a bad one."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxquant as fq
from fxquant import grid
from fxquant.errors import CheckpointError, OutputFolderError, SpecError
from fxquant.integer import IntegerConv2d, IntegerLinear
from fxquant.lower import packed
from tests.models import TinyMobile, TinyResidual, settle


def reference(bits=4, model=TinyResidual, estimator="lsq"):
    x = torch.randn(4, 3, 16, 16)
    prepared = fq.prepare(settle(model(), x), [fq.Rule("*", bits, 4, estimator)], calibration=[x])
    fq.freeze(prepared)
    return fq.convert(prepared)


# ---- bits ------------------------------------------------------------------------------------------------


@given(st.integers(1, 8), st.lists(st.integers(0, 5), max_size=4), st.randoms(use_true_random=False))
def test_packing_is_undone_by_unpacking(bits, shape, random):
    low, high = grid.bounds(bits, "symmetric")
    allowed = [-1, 1] if bits == 1 else range(low, high + 1)
    codes = torch.tensor(random.choices(allowed, k=math.prod(shape)), dtype=torch.int8).reshape(shape)
    stream = grid.pack(codes, bits)
    assert stream.dtype == torch.uint8
    assert stream.shape == (math.ceil(codes.numel() * bits / 8),)
    assert torch.equal(grid.unpack(stream, bits, tuple(shape)), codes)
    assert grid.symmetric_bits(codes) <= bits


def test_the_stream_is_as_documented():
    """The distance from the lowest code, lowest bit first; 1 bit: 0 for -1."""
    assert grid.pack(torch.tensor([-7, 7, 0]), 4).tolist() == [0 + (14 << 4), 7]
    assert grid.pack(torch.tensor([1, -1, -1, 1]), 1).tolist() == [0b1001]
    assert grid.pack(torch.tensor([-3, 3, 1]), 3).tolist() == [0 | 6 << 3 | (4 << 6 & 255), 4 >> 2]


@pytest.mark.parametrize(
    ("codes", "bits"), [([-1, 1], 1), ([0, 1], 2), ([0, 0], 2), ([-1, 0], 2), ([3], 3), ([-7], 4), ([8], 5), ([127], 8)]
)
def test_the_smallest_width_that_holds_codes(codes, bits):
    codes = torch.tensor(codes, dtype=torch.int8)
    assert grid.symmetric_bits(codes) == bits
    assert torch.equal(grid.unpack(grid.pack(codes, bits), bits, tuple(codes.shape)), codes)
    if bits > 1:
        with pytest.raises(SpecError, match=f"do not fit {bits - 1} bits"):
            grid.pack(codes, bits - 1)


def test_a_stream_that_is_none_is_refused():
    with pytest.raises(SpecError, match=r"\(3,\) bytes of torch.uint8 are no 5 codes of 4 bits".replace("3", "2")):
        grid.unpack(torch.zeros(2, dtype=torch.uint8), 4, (5,))
    with pytest.raises(SpecError, match="code 8 is not on the grid of 4 bits"):
        grid.unpack(torch.tensor([0xFF], dtype=torch.uint8), 4, (2,))


# ---- files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["lsq", "gdnsq", "nipq"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_what_was_saved_is_loaded_bit_for_bit(bits, estimator, tmp_path):
    before = reference(bits, estimator=estimator)
    fq.save(before, tmp_path / "x.fxq")
    model = TinyResidual()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = fq.load(tmp_path / "x.fxq", model)
    assert {n: t.dtype for n, t in after.state_dict().items()} == {n: t.dtype for n, t in before.state_dict().items()}
    assert all(torch.equal(t, before.state_dict()[n]) for n, t in after.state_dict().items())
    x = torch.randn(5, 3, 16, 16)
    assert torch.equal(after(x), before(x))
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())
    assert fq.lower(after, calibration=[x])(x).shape == before(x).shape


def test_relu6_float_layers_learned_widths_and_other_residuals_come_back(tmp_path):
    x = torch.randn(4, 3, 16, 16)
    layers = [n for n, m in TinyMobile().named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    rules = [fq.Rule(layers[1], None, None), fq.Rule(layers[2], 3, 5), fq.Rule("*", (2, 8), (3, 8), "nipq")]
    prepared = fq.prepare(settle(TinyMobile(), x), rules, calibration=[x], residual_bits=6, backend="onednn")
    fq.freeze(prepared)
    before = fq.convert(prepared)
    fq.save(before, tmp_path / "x.fxq")
    after = fq.load(tmp_path / "x.fxq", TinyMobile())
    assert torch.equal(after(x), before(x))
    info = after.meta["fxquant"]
    assert (info.backend, info.residual_bits, info.input_shape) == ("onednn", 6, (3, 16, 16))
    asked = before.meta["fxquant"].rules
    assert {n: dataclasses.replace(r, pattern="") for n, r in info.rules.items()} == {
        n: dataclasses.replace(r, pattern="") for n, r in asked.items()
    }


def test_a_file_is_read_on_another_cpu_with_its_own_widths(without_vnni, tmp_path):
    x = torch.randn(4, 3, 16, 16)
    prepared = fq.prepare(settle(TinyResidual(), x), [fq.Rule("*", 8, 8)], calibration=[x], vnni=True)
    fq.freeze(prepared)
    before = fq.convert(prepared)
    fq.save(before, tmp_path / "x.fxq")
    after = fq.load(tmp_path / "x.fxq", TinyResidual())  # without a warning of widths that become less
    assert torch.equal(after(x), before(x))
    assert {rule.weight_bits for rule in after.meta["fxquant"].rules.values()} == {8}


class NamedAsPositions(nn.Module):
    """Its layer ``last`` is not the last, nor ``first`` the first."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.last = (nn.Conv2d(i, 4, 3) for i in (3, 4, 4))
        self.out = nn.Linear(4, 5)

    def forward(self, x):
        return self.out(self.last(self.first(self.stem(x)).relu()).mean((2, 3)))


def test_layers_named_as_positions_come_back(tmp_path):
    x = torch.randn(4, 3, 16, 16)
    rules = [fq.Rule("re:last", None, None), fq.Rule("re:first", 3, 3), fq.Rule("*", 6, 5)]
    model = fq.prepare(NamedAsPositions(), rules, calibration=[x])
    chosen = fq.allocate(model, fq.Budget(mean_weight_bits=5.5, mean_activation_bits=5), "capacity").rules
    again = fq.prepare(NamedAsPositions(), chosen, calibration=[x])
    assert again.meta["fxquant"].rules["last"].keeps_float
    assert not again.meta["fxquant"].rules["out"].keeps_float
    fq.freeze(model)
    fq.save(fq.convert(model), tmp_path / "a.fxq")
    assert torch.equal(fq.load(tmp_path / "a.fxq", NamedAsPositions())(x), fq.convert(model)(x))


def test_notes_are_kept(tmp_path):
    fq.save(reference(), tmp_path / "x.fxq", notes={"by": "whom\n", "ü": ""})
    assert packed.read_notes(tmp_path / "x.fxq") == {"by": "whom\n", "ü": ""}
    with pytest.raises(CheckpointError, match="checksum does not hold"):
        packed.read_notes(rewritten(tmp_path / "x.fxq", lambda m, d, t: m.update(notes="{}"), signed=False))
    with pytest.raises(CheckpointError, match="its notes make no sense"):
        packed.read_notes(rewritten(tmp_path / "x.fxq", lambda m, d, t: m.update(notes="[]")))


def test_equal_models_are_equal_files(tmp_path):
    model = reference()
    for index in range(8):
        packed.save(model, tmp_path / f"{index}.fxq", notes={"é": 'a "word"'})
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert packed.read_notes(tmp_path / "0.fxq") == {"é": 'a "word"'}


def test_a_model_whose_weights_start_at_zero_can_be_loaded_into(tmp_path):
    before = reference()
    fq.save(before, tmp_path / "x.fxq")
    model = TinyResidual()
    nn.init.zeros_(model.head.weight)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(fq.load(tmp_path / "x.fxq", model)(x), before(x))


def test_the_file_has_the_size_of_its_bits(tmp_path):
    """Weights at their width, 8 bytes an output channel, and what is left of names and numbers."""
    for bits in (1, 2, 4):
        before = reference(bits)
        fq.save(before, tmp_path / "x.fxq")
        layers = [m for m in before.modules() if isinstance(m, (IntegerConv2d, IntegerLinear))]
        weights = sum(math.ceil(layer.weight.numel() * bits / 8) for layer in layers)
        header = int.from_bytes((tmp_path / "x.fxq").read_bytes()[:8], "little")
        channels = 8 * sum(len(layer.bias) for layer in layers)
        rest = (tmp_path / "x.fxq").stat().st_size - header - weights - channels
        assert 0 < rest < 60 * len(layers)


def test_saving_over_a_file_that_cannot_be_written_keeps_it(tmp_path, monkeypatch):
    before = reference()
    fq.save(before, tmp_path / "x.fxq")
    content = (tmp_path / "x.fxq").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OutputFolderError, match="No space left"):
        fq.save(before, tmp_path / "x.fxq")
    assert [p.name for p in tmp_path.iterdir()] == ["x.fxq"]
    assert (tmp_path / "x.fxq").read_bytes() == content


def test_a_model_that_is_no_reference_graph_is_not_saved(tmp_path):
    x = torch.randn(4, 3, 16, 16)
    prepared = fq.prepare(TinyResidual(), [fq.Rule("*", 4, 4)], calibration=[x])
    for model in (prepared, TinyResidual()):
        with pytest.raises(SpecError):
            fq.save(model, tmp_path / "x.fxq")
    assert not list(tmp_path.iterdir())


# ---- bad files -------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    fq.save(reference(), tmp_path / "x.fxq")
    return tmp_path / "x.fxq"


def rewritten(path, change, *, signed: bool = True):
    """The file with ``change(metadata, description, tensors)`` made; with a checksum that holds, or the old one."""
    with safetensors.safe_open(str(path), "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    description = json.loads(metadata["model"])
    change(metadata, description, tensors)
    metadata["model"] = json.dumps(description, sort_keys=True)
    if signed:
        metadata["sha256"] = packed._checksum(metadata, tensors)
    path.write_bytes(safetensors.torch.save(tensors, metadata))
    return path


def test_any_flipped_bit_is_found(saved):
    content = saved.read_bytes()
    step = max(len(content) // 60, 1)
    for position in range(0, len(content), step):
        spoiled = bytearray(content)
        spoiled[position] ^= 1 << position % 8
        saved.write_bytes(spoiled)
        with pytest.raises(CheckpointError):
            fq.load(saved, TinyResidual())


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_found(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match="is damaged, or no packed file at all"):
        fq.load(saved, TinyResidual())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda m, d, t: m.update(version="1"),
            r"has version '1' of the format; this fxquant reads version '3'. Convert",
        ),
        (lambda m, d, t: m.pop("version"), r"has version None"),
        (lambda m, d, t: m.update(format="pickle"), r"is no packed file \(format 'pickle'"),
        (lambda m, d, t: d.pop("rules"), r"makes no sense \(KeyError\('rules'\)\)"),
        (lambda m, d, t: d.update(residual_bits=9), r"makes no sense .*residual_bits|makes no sense .*bits=9"),
        (lambda m, d, t: d.update(input_shape=[3, -16, 16]), r"makes no sense .*-16 is no size"),
        (lambda m, d, t: d.update(input_shape=[3, 2**19, 2**19]), r"makes no sense .*an image of"),
        (lambda m, d, t: d.update(input_shape="many"), r"makes no sense"),
        (lambda m, d, t: d.update(rules=[1, 2]), r"makes no sense"),
        (lambda m, d, t: d["rules"]["stem"].update(estimator="os.system"), r"unknown estimator 'os.system'"),
        (lambda m, d, t: d["rules"]["stem"].update(options={"x": 1}), r"makes no sense"),
        (lambda m, d, t: d["rules"].update(nonesuch=d["rules"]["stem"]), r"does not fit this TinyResidual: .*nonesuch"),
        (lambda m, d, t: d["rules"].pop("stem"), r"does not fit this TinyResidual"),
        (lambda m, d, t: d.update(backend="abacus"), r"does not fit this TinyResidual: unknown backend 'abacus'"),
        (lambda m, d, t: d["weights"]["stem_integer.weight"].update(bits=99), r"makes no sense"),
        (
            lambda m, d, t: d["weights"]["stem_integer.weight"].update(bits=3),
            r"'stem_integer.weight': .* are no 216 codes",
        ),
        (lambda m, d, t: d["weights"]["stem_integer.weight"].update(shape=[9]), r"has shape \[9\] in the file, \[8, 3"),
        (lambda m, d, t: t.pop("head_rescale.scale"), r"'head_rescale.scale' among them"),
        (lambda m, d, t: t.update(more=torch.ones(1)), r"'more' among them"),
        (
            lambda m, d, t: t.update({"head_integer.bias": t["head_integer.bias"].to(torch.int64)}),
            r"of another shape or type, 'head_integer.bias'",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said(saved, change, words):
    with pytest.raises(CheckpointError, match=words):
        fq.load(rewritten(saved, change), TinyResidual())


def test_a_changed_description_or_tensor_breaks_the_checksum(saved):
    content = saved.read_bytes()
    for change in (
        lambda m, d, t: d.update(residual_bits=7),
        lambda m, d, t: t["head_rescale.scale"].mul_(2),
        lambda m, d, t: t.update(renamed=t.pop("head_rescale.scale")),
    ):
        saved.write_bytes(content)
        with pytest.raises(CheckpointError, match="its checksum does not hold"):
            fq.load(rewritten(saved, change, signed=False), TinyResidual())


def test_another_architecture_a_missing_file_and_a_pickle_are_refused(saved, tmp_path):
    with pytest.raises(CheckpointError, match="does not fit this TinyMobile"):
        fq.load(saved, TinyMobile())
    with pytest.raises(CheckpointError, match=r"y\.fxq does not exist"):
        fq.load(tmp_path / "y.fxq", TinyResidual())

    class Hostile:
        def __reduce__(self):
            return (tmp_path / "run").touch, ()

    torch.save(Hostile(), tmp_path / "z.fxq")
    with pytest.raises(CheckpointError, match="no packed file at all"):
        fq.load(tmp_path / "z.fxq", TinyResidual())
    assert not (tmp_path / "run").exists()


def test_a_model_of_two_inputs_is_not_written(tmp_path):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x, y, *, flag=False):
            return self.conv(x + y).flatten(1)

    x = torch.randn(2, 3, 8, 8)
    prepared = fq.prepare(Both(), [fq.Rule("*", 4, 4)], example_inputs=(x, x))
    prepared(x, x)
    fq.freeze(prepared, calibration=())
    with pytest.raises(SpecError, match="save was given a model of 2 inputs"):
        fq.save(fq.convert(prepared), tmp_path / "model.fxq")
    assert not list(tmp_path.iterdir())
