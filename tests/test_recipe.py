"""Recipes: extends, overrides, and errors that name every problem with the nearest known word."""

import tomllib

import pytest

from fxquant.recipe import RecipeError, load_recipe, parse_recipe

from .conftest import RECIPES

ALL = sorted(RECIPES.glob("*.toml"))


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    if recipe.quantizes:
        assert (recipe.allocation.sensitivity if recipe.allocation else recipe.quantization.estimator) in path.stem


def test_the_recipes_of_the_front_page_are_there():
    names = {path.stem for path in ALL}
    assert {f"digits_w4a4_{e}" for e in ("pege", "gdnsq", "nipq")} <= names
    assert {"digits_w2a2_gdnsq", "digits_mixed4_nipq"} <= names


@pytest.mark.parametrize(
    "model",
    [
        "resnet18", "resnet50", "mobilenetv2_100", "mobilenetv3_small_100", "efficientnet_lite0", "efficientnet_b0",
        "regnety_008", "repvgg_a0", "convnext_atto", "vit_tiny_patch16_224", "deit_tiny_patch16_224",
        "swin_tiny_patch4_window7_224",
    ],
)  # fmt: skip
@pytest.mark.parametrize("widths", ["w8a8_lsq", "w4a4_pege", "mixed4_nipq"])
def test_recipes_of_pretrained_models(model, widths):
    recipe = load_recipe(RECIPES / f"{model}_imagenet_{widths}.toml")
    assert (recipe.model.name, recipe.model.pretrained, recipe.data.name) == (model, True, "folder")
    rules, budget = recipe.built_rules(), recipe.built_budget()
    assert rules[-1].weight_bits == rules[-1].activation_bits == {"w8": 8, "w4": 4, "mi": (2, 8)}[widths[:2]]
    assert budget.mean_weight_bits == (4 if "mixed" in widths else None)


@pytest.mark.parametrize(
    "override", ["data.dir='x'", "data.splits=['a', 'b']", "data.augmentation={hflip=0}", "data.test_images=5"]
)
def test_what_does_nothing_for_a_data_set_is_refused(override):
    key = override.split("=")[0]
    with pytest.raises(RecipeError, match=f"{key} does nothing for the data set 'digits', which is in memory"):
        load_recipe(RECIPES / "digits_w4a4_pege.toml", [override])
    with pytest.raises(RecipeError, match=r"data\.shift does nothing for the data set 'folder'"):
        load_recipe(RECIPES / "resnet18_imagenet_w4a4_pege.toml", ["data.shift=1"])


@pytest.mark.parametrize("override", ["data.splits=['a', 'b']", "data.augmentation={hflip=0}"])
def test_what_does_nothing_for_cifar10_is_refused(override):
    with pytest.raises(RecipeError, match=r"data\.\w+ does nothing for the data set 'cifar10', which is read whole"):
        load_recipe(RECIPES / "resnet20_cifar10_w4a4_lsq.toml", [override])
    with pytest.raises(RecipeError, match=r"data\.image_size=64 was asked for; the images of cifar10 stay at 32"):
        load_recipe(RECIPES / "resnet20_cifar10_w4a4_lsq.toml", ["data.image_size=64"])


@pytest.mark.parametrize("override", ["data.flip=true", "data.validation=5", "data.cache='x'"])
@pytest.mark.parametrize("name", ["digits_w4a4_pege", "resnet18_imagenet_w4a4_pege"])
def test_what_cifar10_alone_takes_is_refused_elsewhere(name, override):
    with pytest.raises(RecipeError, match=r"data\.\w+ does nothing for the data set '(digits|folder)'"):
        load_recipe(RECIPES / f"{name}.toml", [override])


WIDTHS = ["w8a8", "w4a4", "w3a3", "w2a2", "w1a8", "w1a1"]


@pytest.mark.parametrize("estimator", ["pege", "gdnsq", "nipq", "lsq", "ste", "ewgs"])
@pytest.mark.parametrize(("weights", "activations"), [(4, 4), (3, 3), (2, 2), (1, 1), (1, 8)])
def test_recipes_of_resnet20(estimator, weights, activations):
    path = RECIPES / f"resnet20_cifar10_w{weights}a{activations}_{estimator}.toml"
    recipe = load_recipe(path, ["data.dir=images", "model.checkpoint=weights.pt", "data.validation=5000"])
    assert (recipe.model.name, recipe.model.checkpoint) == ("resnet20", "weights.pt")
    assert (recipe.data.name, recipe.data.shift, recipe.data.flip, recipe.data.validation) == ("cifar10", 4, True, 5000)
    rules = recipe.built_rules()
    assert (rules[0].weight_bits, rules[0].activation_bits) == (8, 8)
    assert (rules[-1].weight_bits, rules[-1].activation_bits) == (weights, activations)
    assert {rule.estimator for rule in rules} == {estimator}


def test_widths_of_resnet20_differ_in_learning_rate_alone():
    rates = {}
    for width in WIDTHS:
        train = load_recipe(RECIPES / f"resnet20_cifar10_{width}_lsq.toml").train.model_dump()
        rates[width] = train.pop("lr")
        assert train == rates.setdefault("the rest", train)
    assert rates["w8a8"] == rates["w4a4"] < rates["w3a3"] < rates["w2a2"] == rates["w1a8"] == rates["w1a1"]


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_of_resnet20_differ_in_estimator_alone(width):
    """But for what GDNSQ and NIPQ need; and the float row trains as long, from the same weights, on the same images."""
    whole = load_recipe(RECIPES / "resnet20_cifar10_float.toml")
    first = load_recipe(RECIPES / f"resnet20_cifar10_{width}_lsq.toml")
    assert (whole.model, whole.data, whole.float_training.epochs) == (first.model, first.data, first.train.epochs)
    allowed = {"gdnsq": {"distillation", "finetune"}, "nipq": {"finetune"}}
    for path in RECIPES.glob(f"resnet20_cifar10_{width}_*.toml"):
        recipe = load_recipe(path)
        assert (recipe.model, recipe.data, recipe.float_training) == (first.model, first.data, first.float_training)
        ours, theirs = recipe.train.model_dump(), first.train.model_dump()
        differing = {key for key in ours if ours[key] != theirs[key]}
        assert differing <= allowed.get(recipe.quantization.estimator, set()), path.stem


@pytest.mark.parametrize("how", ["capacity", "fisher", "nipq", "gdnsq"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mixed_recipes_of_resnet20(how, bits):
    """Within what uniform widths spend: 443,008 MACs of the first and last layer at 8 by 8 bits, 40,108,032 between;
    1,072 weights of theirs, 267,264 between, 4 bytes for each of 1,396 parameters of BatchNorm and biases."""
    recipe = load_recipe(RECIPES / f"resnet20_cifar10_mixed{bits}_{how}.toml")
    assert recipe.budget.bops == 443_008 * 64 + 40_108_032 * bits**2
    assert recipe.budget.weight_bytes == 1_072 + 267_264 * bits // 8 + 4 * 1_396
    if how in ("nipq", "gdnsq"):
        assert recipe.allocation is None
        last, rule = recipe.built_rules()
        assert (last.pattern, last.weight_bits) == ("last", 8)
        assert (rule.weight_bits, rule.activation_bits) == ((bits, 8), (bits, 8))
    else:
        assert (recipe.allocation.sensitivity, recipe.allocation.fixed) == (how, "last")
        assert recipe.allocation.weight_bits == recipe.allocation.activation_bits == (bits, 8)


def test_widths_chosen_on_a_trained_model_change_nothing_else():
    chosen, other = (load_recipe(RECIPES / f"resnet20_cifar10_mixed3_fisher{how}.toml") for how in ("_trained_lsq", ""))
    assert chosen.allocation is None
    assert len(chosen.built_rules()) == 20
    assert min(min(rule.weight_bits, rule.activation_bits) for rule in chosen.built_rules()) == 3
    for section in ("model", "data", "float_training", "train", "budget", "quantization"):
        assert getattr(chosen, section) == getattr(other, section)


def test_an_allocation_says_what_it_needs(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(
        f'extends = "{RECIPES / "digits_w4a4_lsq.toml"}"\n[allocation]\nsensitivity = "fischer"\nfixd = "a"\n'
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert "unknown sensitivity 'fischer': did you mean 'fisher'" in str(caught.value)
    assert "unknown key 'allocation.fixd': did you mean 'fixed'" in str(caught.value)
    path.write_text(f'extends = "{RECIPES / "digits_w4a4_lsq.toml"}"\n[allocation]\nsensitivity = "fisher"\n')
    with pytest.raises(RecipeError, match=r"\[allocation\] keeps to a budget; say which in \[budget\]"):
        load_recipe(path)
    alone = {"model": {"name": "x"}, "data": {"name": "digits"}, "float": {"epochs": 1}, "allocation": {}}
    with pytest.raises(RecipeError, match=r"\[allocation\] without \[train\]"):
        parse_recipe({"name": "x", **alone}, "x")
    with pytest.raises(RecipeError, match="the lowest width must be below the highest"):
        load_recipe(path, ["budget.bops=1e6", "allocation.weight_bits=[4, 2]"])
    assert load_recipe(path, ["budget.bops=1e6", "allocation.weight_bits=[4, 4]"]).allocation.weight_bits == (4, 4)


def test_weights_are_named_once(tmp_path):
    overrides = ["model.checkpoint=a.pt", "model.options={checkpoint_path='b.pt'}"]
    with pytest.raises(RecipeError, match=r"model\.checkpoint and model\.options\.checkpoint_path both name a file"):
        load_recipe(write(tmp_path, MINIMAL), overrides)


@pytest.mark.parametrize("path", sorted((RECIPES / "ablation").glob("*.toml")), ids=lambda p: p.stem)
def test_an_ablation_differs_in_one_piece(path):
    recipe, parent = load_recipe(path), path.parent / tomllib.loads(path.read_text())["extends"]
    assert parent.parent.name == "ablation" or parent.stem == f"resnet20_cifar10_{'_'.join(path.stem.split('_')[:2])}"
    ours, theirs = recipe.model_dump(), load_recipe(parent).model_dump()
    sections = [key for key in ours if key != "name" and ours[key] != theirs[key]]
    assert sections in (["train"], ["rules"], ["quantization"], ["data"])
    changed = [f"{s}.{key}" for s in sections if s != "rules" for key in ours[s] if ours[s][key] != theirs[s][key]]
    together = ["train.squeeze", "train.start_bits"], ["train.finetune", "train.schedule"], []
    assert len(changed) == 1 or sorted(changed) in together
    if "quantization" in sections:
        before, after = (values["quantization"]["options"] for values in (theirs, ours))
        assert len({key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}) == 1


def test_rules_of_w4a4():
    first_and_last, rest = load_recipe(RECIPES / "digits_w4a4_pege.toml").built_rules()
    assert (first_and_last.pattern, first_and_last.weight_bits, first_and_last.activation_bits) == ("first|last", 8, 8)
    assert (rest.weight_bits, rest.activation_bits, rest.estimator) == (4, 4, "pege")


def test_extends_merges_tables_and_the_child_wins(tmp_path):
    (tmp_path / "base.toml").write_text(MINIMAL + "\n[float]\nepochs = 7\nlr = 0.5\n")
    (tmp_path / "child.toml").write_text('extends = "base.toml"\n[float]\nepochs = 1\n')
    recipe = load_recipe(tmp_path / "child.toml")
    assert (recipe.name, recipe.float_training.epochs, recipe.float_training.lr) == ("child", 1, 0.5)


def test_overrides_and_seed(tmp_path):
    path = write(tmp_path, MINIMAL)
    recipe = load_recipe(path, ["train.epochs=9", "model.name=resnet18", "quantization.lower=['x86']"], seed=5)
    assert (recipe.train.epochs, recipe.model.name, recipe.quantization.lower) == (9, "resnet18", ["x86"])
    assert recipe.seed == 5


def test_digest_tells_recipes_apart(tmp_path):
    path = write(tmp_path, MINIMAL)
    assert load_recipe(path).digest() == load_recipe(path).digest() != load_recipe(path, seed=1).digest()


def test_all_problems_are_listed_at_once(tmp_path):
    path = write(tmp_path, MINIMAL.replace("epochs = 1", "epochs = -1").replace("digits", "digit") + "epoch = 3\n")
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    text = str(error.value)
    assert "3 problem(s)" in text
    assert "unknown data set 'digit': did you mean 'digits'?" in text
    assert "unknown key 'train.epoch': did you mean 'epochs'?" in text
    assert "train.epochs" in text
    assert "greater than 0" in text
    assert "(found -1)" in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quantization.estimator=nipk", "unknown estimator 'nipk': did you mean 'nipq'"),
        ("quantization.backend=x68", "unknown backend 'x68': did you mean 'x86'"),
        ("quantization.lower=['onedn']", "unknown backend 'onedn': did you mean 'onednn'"),
        ("quantization.options.kapa=1", "unknown option of the estimator 'lsq' 'kapa'"),
        ("train.distillation=jefreys", "unknown distillation 'jefreys': did you mean 'jeffreys'"),
        ("data.imagesize=8", "unknown key 'data.imagesize': did you mean 'image_size'"),
        ("budjet.bops=3", "unknown key 'budjet': did you mean 'budget'"),
        ("rules=[{pattern='*', bits=9}]", "weight_bits=9 was asked for; widths are whole numbers of bits from 1 to 8"),
        ("rules=[{pattern='*', bits=0}]", "weight_bits=0 was asked for"),
        ("rules=[{pattern='*', bits=[2, 8]}]", "'lsq' to learn its width, which it cannot"),
        ("rules=[{pattern='*', bit=4}]", "unknown key 'rules.0.bit': did you mean 'bits'"),
        ("rules=[{pattern='re:(', bits=4}]", "not a regular expression"),
        ("rules=[{pattern='*', weight_bits=4}]", "activation_bits=None; integer kernels need both"),
        ("quantization.options.percentile=abc", "do not fit the estimator 'lsq'"),
        ("rules=[{pattern='*', bits=4, weight_bits=2}]", "bits=4 is for weights and activations alike"),
        ("extends=3", "unknown key 'extends'"),
        ("train", "give key=value"),
        ("seed.x=1", "'seed' is not a table"),
    ],
)
def test_bad_values_say_what_to_do(tmp_path, override, message):
    with pytest.raises(RecipeError) as error:
        load_recipe(write(tmp_path, MINIMAL), [override])
    assert message in str(error.value)


def test_missing_file_names_the_nearest():
    with pytest.raises(RecipeError, match=r"cannot be read .*did you mean digits_w4a4_nipq"):
        load_recipe(RECIPES / "digits_w4a4_nipk.toml")


def test_broken_toml_and_circles(tmp_path):
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_recipe(write(tmp_path, "= 3"))
    (tmp_path / "a.toml").write_text('extends = "b.toml"')
    (tmp_path / "b.toml").write_text('extends = "a.toml"')
    with pytest.raises(RecipeError, match="goes round in a circle"):
        load_recipe(tmp_path / "a.toml")


MINIMAL = """
seed = 0
[model]
name = "test_resnet"
[data]
name = "digits"
image_size = 16
[[rules]]
pattern = "*"
bits = 4
[train]
epochs = 1
"""


def write(folder, text):
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rules=[]", "[train] without [[rules]]: a quantized training takes both"),
        (
            'rules=[{pattern="*", estimator="lsq"}]',
            "rule '*' gives no width; set bits to a number, to [lowest,",
        ),
        ('rules=[{pattern="*", bits=true}]', "valid integer"),
        ("train.select=best", "train.select = 'best' chooses by images kept from training; set data.validation"),
        ("train.start_bits=9", "start_bits=9 was asked for"),
        ("train={epochs=1, start_bits=4, squeeze=0.9}", "widths come down before they are fine-tuned"),
        ("train.autocast=float16", "Input should be 'float32' or 'bfloat16'"),
    ],
)
def test_training_that_makes_no_sense(tmp_path, override, message):
    with pytest.raises(RecipeError) as error:
        load_recipe(write(tmp_path, MINIMAL), [override])
    assert message in str(error.value)


def test_a_training_in_float_alone(tmp_path):
    text = MINIMAL[: MINIMAL.index("[[rules]]")]
    assert not load_recipe(write(tmp_path, text), ["float.epochs=2"]).quantizes
    with pytest.raises(RecipeError, match=r"nothing to do: give \[train\] and \[\[rules\]\], or float.epochs"):
        load_recipe(write(tmp_path, text))


def test_a_recipe_is_for_the_cpu_at_hand_unless_it_says(without_vnni):
    here = load_recipe(RECIPES / "digits_w4a4_lsq.toml").quantization
    elsewhere = load_recipe(RECIPES / "digits_w4a4_lsq.toml", ["quantization.vnni=true"]).quantization
    assert (here.vnni, elsewhere.vnni) == (False, True)
    assert load_recipe(RECIPES / "resnet20_cifar10_w4a4_lsq.toml").quantization.vnni  # so that rows compare
