"""What a run leaves behind, and that a run that was cut ends as one that was not."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fxquant.timm
from fxquant import checkpoint
from fxquant.errors import (
    CheckpointError,
    ConstantTensorError,
    DivergenceError,
    FxQuantError,
    OutputFolderError,
    RuleError,
    SpecError,
)
from fxquant.files import write_json
from fxquant.lower import packed
from fxquant.recipe import load_recipe
from fxquant.synthetic import random_images, settled
from fxquant.train import Silent, build_model, load_run, run
from fxquant.train.build import model_and_data, prepared_with, prepared_without_data
from fxquant.verify import verify

from .conftest import RECIPES

SHORT = ["float.epochs=2", "train.epochs=4", "train.finetune=0.5", "quantization.lower=['x86']", "data.batch_size=256"]


class Cut(Silent):
    """Interrupts a stage after so many steps."""

    def __init__(self, stage, steps):
        self.cut_stage, self.left, self.stage = stage, steps, None

    def start(self, stage, steps, done=0):
        self.stage = stage

    def step(self, values):
        if self.stage == self.cut_stage:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt


class Steps(Silent):
    """Keeps what each step showed, by stage."""

    def __init__(self):
        self.shown: dict[str, list[dict[str, float]]] = {}

    def start(self, stage, steps, done=0):
        self.now = self.shown.setdefault(stage, [])

    def step(self, values):
        self.now.append(values)


class Intruder(Silent):
    """Wants the folder at every step, and breaks off the run in the end."""

    def __init__(self, folder):
        self.folder, self.refused = folder, 0

    def step(self, values):
        with pytest.raises(OutputFolderError, match="another run is in progress"), checkpoint.occupied(self.folder):
            pass
        self.refused += 1
        if self.refused == 12:
            raise KeyboardInterrupt


def test_a_run_holds_its_folder_until_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_PATIENCE", 0)
    intruder = Intruder(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        run(load_recipe(RECIPES / "digits_w4a4_lsq.toml", SHORT), tmp_path / "run", progress=intruder)
    with checkpoint.occupied(tmp_path / "run"):
        pass


def test_history_holds_the_mean_over_each_epoch(tmp_path):
    progress = Steps()
    result = run(load_recipe(RECIPES / "digits_w2a2_gdnsq.toml", SHORT), tmp_path / "run", progress=progress).result
    steps, history = progress.shown["quantized"], result["history"]
    each = len(steps) // len(history)
    assert each > 1
    for number, entry in enumerate(history):
        shown = steps[number * each : (number + 1) * each]
        assert entry.pop("epoch") == number + 1
        assert entry.keys() == {name for values in shown for name in values}
        for name, mean in entry.items():
            assert mean == pytest.approx(sum(values.get(name, 0) for values in shown) / each)


@pytest.mark.parametrize("parts", [1, 2])
def test_history_holds_what_the_schedules_said(parts, tmp_path):
    recipe = load_recipe(RECIPES / "digits_w4a4_pege.toml", [*SHORT, f"train.accumulate={parts}"])
    history = run(recipe, tmp_path).result["history"]
    assert 0 < history[0]["replaced"] < history[-1]["replaced"] == pytest.approx(1.0)
    assert all(entry["estimator"] > 0 for entry in history)


@pytest.mark.parametrize("name", ["digits_mixed4_nipq", "digits_w2a2_gdnsq", "digits_w4a4_pege"])
def test_resume_ends_with_the_same_integers(name, tmp_path):
    recipe = load_recipe(RECIPES / f"{name}.toml", SHORT)
    whole = run(recipe, tmp_path / "whole")
    # 4 steps an epoch: cut in float, in the first quantized epochs, and after widths have become whole.
    for stage, steps in (("float", 6), ("quantized", 6), ("quantized", 5)):
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "cut", resume=(tmp_path / "cut").exists(), progress=Cut(stage, steps))
    resumed = run(recipe, tmp_path / "cut", resume=True)
    for name, tensor in whole.reference.state_dict().items():
        assert torch.equal(tensor, resumed.reference.state_dict()[name]), name
    drop = lambda result: {k: v for k, v in result.items() if k != "seconds"}  # noqa: E731
    assert drop(whole.result) == drop(resumed.result)


def test_a_run_cut_before_its_first_checkpoint_resumes(tmp_path):
    recipe = load_recipe(RECIPES / "digits_w4a4_nipq.toml", SHORT)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path, progress=Cut("float", 1))
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.json"]
    with pytest.raises(CheckpointError, match="begun with another recipe"):
        run(load_recipe(RECIPES / "digits_w4a4_nipq.toml", SHORT, seed=4), tmp_path, resume=True)
    assert run(recipe, tmp_path, resume=True).report.reference_equals_fake_quant


def test_the_simulated_model_is_the_one_that_ships(digits_run):
    """Evaluated in float, before scales are frozen, it chooses what the integers choose."""
    outcome, _ = digits_run
    assert outcome.result["simulated"]["argmax_agreement"] == 100
    assert outcome.result["simulated"]["accuracy"] == outcome.result["reference_accuracy"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.options.num_classes=5", r"has 10 classes, the model 5 outputs, so labels"),
        ("model.options.num_classes=many", r"timm cannot build test_resnet with .*'many'"),
    ],
)
def test_a_model_that_does_not_fit_shows_before_training(tmp_path, override, message):
    recipe = load_recipe(RECIPES / "digits_w4a4_nipq.toml", [override])
    with pytest.raises(FxQuantError, match=message):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_integer_model_reads_back_bit_for_bit(digits_run):
    outcome, folder = digits_run
    loaded = load_run(folder)
    for name, tensor in outcome.reference.state_dict().items():
        assert torch.equal(tensor, loaded.reference.state_dict()[name]), name
    report = verify(None, loaded.reference, loaded.data.test())
    assert report.reference_accuracy == outcome.result["reference_accuracy"]


def test_checkpoint_of_a_finished_run_gives_the_same_integers(digits_run):
    outcome, folder = digits_run
    loaded = load_run(folder / checkpoint.CHECKPOINT)
    for name, tensor in outcome.reference.state_dict().items():
        assert torch.equal(tensor, loaded.reference.state_dict()[name]), name


def test_checkpoint_of_an_unfinished_run_is_refused(tmp_path):
    recipe = load_recipe(RECIPES / "digits_w4a4_nipq.toml", SHORT)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path, progress=Cut("quantized", 6))
    with pytest.raises(CheckpointError, match=r"has done 1 of 4 quantized epochs; finish it .*--resume"):
        load_run(tmp_path / checkpoint.CHECKPOINT)


def test_digits_run_is_exact_and_learned(digits_run):
    outcome, _ = digits_run
    assert outcome.report.reference_equals_fake_quant
    assert outcome.result["reference_accuracy"] == outcome.result["fake_quant_accuracy"]
    assert outcome.result["reference_accuracy"] > 90
    outcome.report.raise_on_failure()


def test_learned_widths_move_and_end_inside_the_budget(tmp_path):
    recipe = load_recipe(RECIPES / "digits_mixed4_nipq.toml", ["float.epochs=2", "train.epochs=6"])
    result = run(recipe, tmp_path / "run").result
    widths = [layer[kind] for layer in result["layers"] for kind in ("weight_bits", "activation_bits")]
    assert all(width == int(width) and 2 <= width <= 8 for width in widths)
    assert len(set(widths)) >= 3, "widths of 32 quantizers ended alike"
    # One bit of the largest layer is 0.44 of the mean: the rest of a budget that whole widths may leave unused.
    assert 4 - 0.44 <= result["mean_weight_bits"] <= 4
    assert 4 - 0.44 <= result["mean_activation_bits"] <= 4


def test_diverging_training_says_where(tmp_path):
    recipe = load_recipe(RECIPES / "digits_w4a4_nipq.toml", ["float.epochs=1", "float.lr=1e30"])
    with pytest.raises(DivergenceError, match=r"epoch 1 of float training, step 2, the loss is NaN .*Lower float\.lr"):
        run(recipe, tmp_path / "run")


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "foreign":
        content = b"not a model at all"
    elif how == "empty":
        content = b""
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["truncated", "foreign", "empty"])
@pytest.mark.parametrize("file", [checkpoint.CHECKPOINT, checkpoint.PACKED_MODEL])
def test_damaged_files_are_refused(digits_run, tmp_path, how, file):
    path = tmp_path / file
    path.write_bytes((digits_run[1] / file).read_bytes())
    damage(path, how)
    read = checkpoint.load_checkpoint if file == checkpoint.CHECKPOINT else packed.read_notes
    with pytest.raises(CheckpointError, match=r"is damaged, or no (checkpoint|packed file)"):
        read(path)


def test_foreign_but_sound_files_are_refused(tmp_path):
    torch.save({"model": torch.ones(2)}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"no checkpoint of fxquant \(format None"):
        checkpoint.load_checkpoint(tmp_path / "checkpoint.pt")
    import safetensors.torch

    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "model.fxq")
    with pytest.raises(CheckpointError, match=r"is no packed file \(format None"):
        load_run(tmp_path)


def test_pickles_with_code_are_not_run(tmp_path):
    class Boom:
        def __reduce__(self):
            return (pytest.fail, ("code in a checkpoint was run",))

    torch.save({"format": "fxquant-checkpoint-1", "x": Boom()}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="damaged, or no checkpoint"):
        checkpoint.load_checkpoint(tmp_path / "checkpoint.pt")


def test_a_packed_model_of_another_architecture_or_without_a_recipe_is_refused(digits_run, tmp_path):
    outcome, folder = digits_run
    recipe = checkpoint.stored_recipe(packed.read_notes(folder / "model.fxq")["recipe"], folder)
    for notes, words in (
        ({"recipe": recipe.to_json().replace("test_resnet", "test_efficientnet")}, "does not fit this EfficientNet"),
        ({}, "was not left by fxquant run"),
        ({"recipe": "{}"}, "the recipe stored in .* cannot be read"),
    ):
        packed.save(outcome.reference, tmp_path / "model.fxq", notes=notes)
        with pytest.raises(CheckpointError, match=words):
            load_run(tmp_path)


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OutputFolderError, match="No space left on device"):
        write_json(path, {"a": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    assert path.read_text() == '{\n  "a": 1\n}\n'


def test_a_wrong_rule_shows_before_anything_is_trained_or_written(tmp_path):
    recipe = load_recipe(RECIPES / "digits_w4a4_nipq.toml", ["rules=[{pattern='layer9*', bits=4}]"])

    class Watch(Silent):
        def start(self, stage, steps, done=0):
            pytest.fail("training began")

    with pytest.raises(RuleError, match=r"rule 'layer9\*' matches no quantizable layer .*did you mean 'layer"):
        run(recipe, tmp_path / "run", progress=Watch())
    assert not (tmp_path / "run").exists()


def test_output_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputFolderError, match="cannot be used for output"):
        checkpoint.claim_output(tmp_path / "file", resume=False)


# ---- images on disk --------------------------------------------------------------------------------------

IMAGES = [
    "model.pretrained=false", "model.options={num_classes=3}", "data.workers=0", "data.batch_size=4",
    "data.image_size=32", "train.epochs=2", "quantization.lower=['x86']",
]  # fmt: skip


def on_images(folder, name, *overrides):
    return load_recipe(RECIPES / f"{name}.toml", [*IMAGES, f"data.dir='{folder}'", *overrides])


@pytest.mark.parametrize("batch_norm", [[], ["train.freeze_batch_norm=0.5", "train.reestimate_batch_norm=false"]])
def test_a_timm_model_on_an_image_folder_trains_resumes_and_is_read_back(image_folder, tmp_path, batch_norm):
    recipe = on_images(image_folder, "resnet18_imagenet_mixed4_nipq", "model.name=test_resnet", *batch_norm)
    whole = run(recipe, tmp_path / "whole")
    assert whole.report.reference_equals_fake_quant
    assert whole.result["images"] == 6
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "cut", progress=Cut("quantized", 4))
    resumed = run(recipe, tmp_path / "cut", resume=True)
    loaded = [load_run(tmp_path / "whole" / name).reference for name in ("model.fxq", "checkpoint.pt")]
    for name, tensor in whole.reference.state_dict().items():
        for other in (resumed.reference, *loaded):
            assert torch.equal(tensor, other.state_dict()[name]), name


def test_batch_norm_is_left_alone_where_the_recipe_says_so(image_folder, tmp_path):
    """Held from the start and not re-estimated: it ends as it began."""
    held = ["train.freeze_batch_norm=0", "train.reestimate_batch_norm=false"]
    for options, same in ((held, True), (held[:1], False), (held[1:], False)):
        recipe = on_images(image_folder, "resnet18_imagenet_w8a8_lsq", "model.name=test_resnet", *options)
        model = run(recipe, tmp_path / f"{len(options)}{options[0]}").model
        means = [m.running_mean.abs().max() for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert bool(max(means) == 0) is same  # an untrained model's are zero


def test_weights_come_from_a_file_or_it_is_said_that_they_cannot_be_loaded(image_folder, tmp_path):
    model = fxquant.timm.create_model("test_resnet", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    (tmp_path / "broken.pth").write_bytes(b"no weights")

    def built(file):
        options = f"model.options={{num_classes=3, checkpoint_path='{tmp_path / file}'}}"
        return build_model(on_images(image_folder, "resnet18_imagenet_w8a8_lsq", "model.name=test_resnet", options))

    assert torch.equal(built("weights.pth").fc.weight, model.fc.weight)
    for file in ("missing.pth", "broken.pth"):
        with pytest.raises(FxQuantError, match=r"weights of test_resnet cannot be loaded .*model\.checkpoint = FILE"):
            built(file)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["model.options.in_chans=3"],
            r"test_resnet does not take images of shape \[1, 16, 16\] \(RuntimeError: Given",
        ),
        (["model.options.features_only=true"], r"test_resnet with model.options = .* returns list; training takes one"),
        (
            ["model.options.global_pool=''", "model.options.num_classes=0"],
            r"returns \[1, 96, 1, 1\]; training takes one",
        ),
        (
            ["data.batch_size=1"],
            r"cannot be trained with optimizer 'adamw' on 1 images \(ValueError: Expected more than",
        ),
        (["float.optimizer=adahessian"], r"cannot be trained with optimizer 'adahessian' on 2 images"),
    ],
)
@pytest.mark.parametrize("quantizes", [True, False])
def test_what_a_model_cannot_do_comes_out_before_anything_is_written(overrides, words, quantizes, tmp_path):
    if quantizes and "model" in overrides[0]:
        words = "differs|cannot|returns|does not take|Given"  # of prepare, which tries the model first
    recipe = "digits_w4a4_lsq.toml" if quantizes else "base/digits.toml"
    text = (RECIPES / recipe).read_text()
    path = tmp_path / "recipe.toml"
    path.write_text(f'extends = "{RECIPES / recipe}"\n' if quantizes else text[: text.index("[train]")])
    with pytest.raises(FxQuantError, match=words):
        run(load_recipe(path, overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_classifier_that_begins_at_zero_is_prepared_for_the_weights_to_come():
    """As timm's mixers are built: a constant has no range, and is refused where it is what there is to quantize."""
    recipe = load_recipe(RECIPES / "digits_w4a4_lsq.toml")
    _, data = model_and_data(recipe)
    model = fxquant.timm.create_model("test_resnet", num_classes=10, in_chans=1)
    torch.nn.init.zeros_(model.fc.weight)
    prepared = prepared_without_data(recipe, model, recipe.built_rules(), data)
    assert prepared.get_submodule("fc").weight.abs().max() > 0
    torch.nn.init.zeros_(model.fc.weight)
    with pytest.raises(ConstantTensorError, match="'fc'"):
        prepared_with(recipe, model, recipe.built_rules(), data.plain())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_checkpoint_takes_the_place_of_pretrained_weights(suffix, tmp_path):
    model, path = fxquant.timm.create_model("resnet20"), tmp_path / f"weights{suffix}"
    save_file(model.state_dict(), path) if suffix == ".safetensors" else torch.save(model.state_dict(), path)
    built = build_model(load_recipe(RECIPES / "resnet20_cifar10_w4a4_lsq.toml", [f"model.checkpoint='{path}'"]))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in built.state_dict().items())


def test_a_checkpoint_that_cannot_be_taken_is_said(tmp_path):
    class Code:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"state_dict": Code()}, tmp_path / "code.pt")
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    torch.save(fxquant.timm.create_model("test_resnet").state_dict(), tmp_path / "other.pt")
    weights = fxquant.timm.create_model("resnet20").state_dict()
    torch.save({name: tensor for name, tensor in weights.items() if name != "linear.bias"}, tmp_path / "less.pt")
    found = {
        "code": "weights_only", "broken": "written by torch.save", "other": "conv1.weight", "less": "linear.bias",
        "none": "is no file; give one with the weights of resnet20",
    }  # fmt: skip
    for name, words in found.items():
        recipe = load_recipe(RECIPES / "resnet20_cifar10_w4a4_lsq.toml", [f"model.checkpoint='{tmp_path}/{name}.pt'"])
        with pytest.raises(FxQuantError, match=rf"model\.checkpoint = .*{words}"):
            build_model(recipe)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(FxQuantError, match=r"weights of resnet20 cannot be loaded .*model\.checkpoint = FILE"):
        build_model(load_recipe(RECIPES / "resnet20_cifar10_w4a4_lsq.toml"))


def test_resnet20_resumes_exactly_and_is_read_back_without_its_checkpoint(tmp_path):
    """With crops and mirrored images; folder, cache and the weights it began with may lie elsewhere by then, or not."""
    drawn = np.random.default_rng(0)
    for part, each in (("train", 6), ("test", 2)):
        for label in "abc":
            (tmp_path / "images" / part / label).mkdir(parents=True)
            for index in range(each):
                pixels = drawn.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / part / label / f"{index}.png")
    weights = tmp_path / "weights.pt"
    torch.save(fxquant.timm.create_model("resnet20", num_classes=3).state_dict(), weights)
    overrides = ["model.options.num_classes=3", f"model.checkpoint='{weights}'", f"data.dir='{tmp_path / 'images'}'"]
    overrides += ["data.batch_size=4", "data.plain_batches=2", "data.validation=3", "train.epochs=2"]
    overrides += ["quantization.lower=[]", "train.select=best", "train.average=0.9"]
    path = RECIPES / "resnet20_cifar10_w4a4_pege.toml"
    whole = run(load_recipe(path, overrides), tmp_path / "whole")
    assert whole.report.reference_equals_fake_quant
    assert len(whole.result["layers"]) == 20
    with pytest.raises(KeyboardInterrupt):
        run(load_recipe(path, overrides), tmp_path / "cut", progress=Cut("quantized", 4))
    weights.unlink()
    cached = [*overrides, f"data.cache='{tmp_path / 'cache'}'", "model.checkpoint='elsewhere.pt'"]
    with pytest.raises(CheckpointError, match=r"differs in train\.lr \([^)]*\)\. "):
        run(load_recipe(path, [*cached, "train.lr=1e-5"]), tmp_path / "cut", resume=True)
    resumed = run(load_recipe(path, cached), tmp_path / "cut", resume=True)
    assert all(torch.equal(t, resumed.reference.state_dict()[n]) for n, t in whole.reference.state_dict().items())
    loaded = load_run(tmp_path / "whole").reference.state_dict()
    assert all(torch.equal(t, loaded[n]) for n, t in whole.reference.state_dict().items())


def test_pretrained_weights_that_cannot_be_had_are_said_so(image_folder, monkeypatch):
    def offline(*arguments, **options):
        raise FileNotFoundError("cannot find the requested files in the local cache")

    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    recipe = on_images(image_folder, "resnet18_imagenet_w8a8_lsq", "model.name=test_resnet", "model.pretrained=true")
    with pytest.raises(FxQuantError, match=r"weights of test_resnet cannot be loaded .*in the local cache"):
        build_model(recipe)


def test_a_finished_run_is_read_back_without_the_weights_it_began_with(image_folder, tmp_path):
    weights = tmp_path / "weights.pth"
    torch.save(fxquant.timm.create_model("test_resnet", num_classes=3).state_dict(), weights)
    options = f"model.options={{num_classes=3, checkpoint_path='{weights}'}}"
    recipe = on_images(image_folder, "resnet18_imagenet_w8a8_lsq", "model.name=test_resnet", options, "train.epochs=1")
    outcome = run(recipe, tmp_path / "run")
    weights.unlink()
    for file in ("model.fxq", "checkpoint.pt"):
        loaded = load_run(tmp_path / "run" / file).reference.state_dict()
        assert all(torch.equal(t, loaded[n]) for n, t in outcome.reference.state_dict().items())


def test_a_run_may_be_resumed_from_elsewhere_with_other_workers(image_folder, tmp_path):
    name, options = "resnet18_imagenet_w8a8_lsq", ["model.name=test_resnet", "train.epochs=2"]
    with pytest.raises(KeyboardInterrupt):
        run(on_images(image_folder, name, *options), tmp_path / "run", progress=Cut("quantized", 4))
    moved = tmp_path / "moved"
    shutil.copytree(image_folder, moved)
    resumed = run(on_images(moved, name, *options, "data.workers=1"), tmp_path / "run", resume=True)
    whole = run(on_images(image_folder, name, *options), tmp_path / "whole")
    assert resumed.result["layers"] == whole.result["layers"]
    assert all(torch.equal(t, resumed.reference.state_dict()[n]) for n, t in whole.reference.state_dict().items())


def test_a_model_with_other_classes_than_the_data_is_refused(image_folder, tmp_path):
    recipe = on_images(image_folder, "resnet18_imagenet_w8a8_lsq", "model.options={}")
    with pytest.raises(FxQuantError, match=r"3 classes, the model 1000 outputs.*set model\.options\.num_classes = 3"):
        run(recipe, tmp_path / "run")


@pytest.mark.parametrize("options", ["{act_layer='nope'}", "{global_pool='nope'}", "{nonesuch=1}"])
def test_options_that_the_model_does_not_take_are_said(options):
    recipe = load_recipe(RECIPES / "digits_w4a4_lsq.toml", [f"model.options={options}"])
    with pytest.raises(FxQuantError, match="timm cannot build test_resnet with"):
        build_model(recipe)


def test_a_budget_out_of_reach_is_refused_before_anything_is_written(tmp_path):
    recipe = load_recipe(RECIPES / "digits_mixed4_nipq.toml", ["budget.mean_weight_bits=1.5"])
    with pytest.raises(SpecError, match=r"lowest widths that the rules allow .* take 2"):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("tied", "message"),
    [
        ("[['layer1.0.conv1.weight', 'layer9.weight']]", r"tensor to tie 'layer9\.weight'"),
        ("[['conv1.0.weight', 'layer1.0.conv1.weight']]", "the ties at once"),
    ],
)
def test_ties_that_cannot_be_kept_are_refused_before_anything_is_written(tied, message, tmp_path):
    recipe = load_recipe(
        RECIPES / "digits_mixed4_fisher.toml", [f"allocation.tied={tied}", "allocation.weight_bits=[2, 4]"]
    )
    with pytest.raises(FxQuantError, match=message):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_recipe_on_images_says_what_is_missing(tmp_path):
    recipe = load_recipe(RECIPES / "resnet18_imagenet_w8a8_lsq.toml", ["model.pretrained=false"])
    with pytest.raises(FxQuantError, match=r"data\.dir is not set"):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


IMAGENET = sorted(path.stem for path in RECIPES.glob("*_imagenet_*.toml"))


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGENET)
def test_a_recipe_for_imagenet_runs_a_short_epoch_on_generated_images(name, image_folder, tmp_path):
    """At the model's own size, from a file of weights in the place of pretrained ones, all else as in the recipe."""
    weights, overrides = tmp_path / "weights.pth", ["model.pretrained=false", "data.workers=0", "data.batch_size=4"]
    overrides += ["train.epochs=1", f"data.dir='{image_folder}'", "quantization.lower=['x86']"]
    model = load_recipe(RECIPES / f"{name}.toml").model.name
    size = fxquant.timm.resolve_model_data_config(fxquant.timm.create_model(model))["input_size"][-1]
    torch.save(settled(fxquant.timm.create_model(model, num_classes=3), random_images(size)).state_dict(), weights)
    overrides += ["model.options.num_classes=3", f"model.options.checkpoint_path='{weights}'"]
    recipe = load_recipe(RECIPES / f"{name}.toml", overrides)
    outcome = run(recipe, tmp_path / "run")
    assert outcome.report.reference_equals_fake_quant
    budget = recipe.built_budget()
    assert outcome.result["mean_weight_bits"] <= (budget.mean_weight_bits or 8)
    assert outcome.result["mean_activation_bits"] <= (budget.mean_activation_bits or 8)
    assert set(outcome.lowered) == {"x86"}
