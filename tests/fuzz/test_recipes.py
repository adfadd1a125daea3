"""Recipes at random: one loads and builds, or the error says in which key and why."""

from __future__ import annotations

import contextlib
import copy
import datetime
import itertools
import json
import warnings
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import BaseModel

from fxquant import cli
from fxquant.data import CIFAR10, DATASETS, expanded
from fxquant.errors import FxQuantError
from fxquant.estimators import ESTIMATORS
from fxquant.recipe import Recipe, RecipeError, load_recipe, parse_recipe
from fxquant.spec import BACKENDS
from fxquant.train.guard import Guard
from fxquant.train.processes import Processes
from fxquant.train.progress import Silent
from fxquant.train.runner import _Run

from . import cases, toml

BASE = {
    "name": "x",
    "model": {"name": "test_resnet", "pretrained": False, "options": {"num_classes": 10, "in_chans": 1}},
    "data": {"name": "digits", "batch_size": 32},
    "float": {"epochs": 1, "lr": 0.01},
    "quantization": {"estimator": "nipq", "backend": "x86", "options": {}},
    "rules": [{"pattern": "first|last", "bits": 8}, {"pattern": "*", "bits": [2, 8]}],
    "budget": {"mean_weight_bits": 4},
    "allocation": {"sensitivity": "capacity"},
    "train": {"epochs": 1},
}


def keys(model: type[BaseModel] = Recipe, above: tuple = ()) -> list[tuple]:
    """Where a recipe may hold a value: every section and every key of it, of lists the first item's."""
    found = []
    for name, field in model.model_fields.items():
        path = (*above, field.alias or name)
        found.append(path)
        annotations = (field.annotation, *get_args(field.annotation))
        for annotation in annotations:
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                inner = (*path, 0) if path[-1] == "rules" else path
                found += keys(annotation, inner)
    return found


OPTIONS = sorted({n for c in ESTIMATORS.values() for n in c.__init__.__annotations__ if n not in ("bits", "return")})
KEYS = [
    *keys(),
    *[(*where, "options", o) for o in (*OPTIONS, "percentile") for where in (("quantization",), ("rules", 1))],
]

words = st.sampled_from(
    [
        *ESTIMATORS, *BACKENDS, *DATASETS, CIFAR10, "folder", "float", "mse", "minmax", "first|last", "re:.*", "re:(",
        "re:a{99999999999}", "*", "[", "layer1*", "capacity", "fisher", "adamw", "best", "cosine", "jeffreys",
    ]
)  # fmt: skip
numbers = st.one_of(
    st.integers(-2, 10), st.integers(), st.sampled_from([2**31, 2**32, 2**63, 2**64, 10**400, -(10**400)]),
    st.floats(), st.floats(-1, 9), st.sampled_from([0.0, -0.0, 1e308, 5e-324]),
)  # fmt: skip
# TOML writes no surrogates.
texts = st.one_of(words, st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
dates = st.one_of(st.dates(datetime.date(1, 1, 1)), st.times(), st.datetimes())
scalars = st.one_of(numbers, texts, st.booleans(), dates)
values = st.recursive(
    scalars, lambda v: st.one_of(st.lists(v, max_size=3), st.dictionaries(texts, v, max_size=3)), max_leaves=6
)
bits = st.one_of(st.integers(1, 8), st.lists(st.integers(0, 9), min_size=1, max_size=3), numbers)


def put(recipe: Any, path: tuple, value: Any) -> None:
    """Set a value, making the sections above it; nothing where the recipe holds something else there already."""
    for step, following in itertools.pairwise(path):
        if isinstance(step, int):
            if not isinstance(recipe, list) or len(recipe) <= step:
                return
            recipe = recipe[step]
        elif isinstance(recipe, dict):
            recipe = recipe.setdefault(step, [{}] if isinstance(following, int) else {})
        else:
            return
    if isinstance(recipe, dict):
        recipe[path[-1]] = value


@st.composite
def changes(draw) -> tuple[tuple, Any]:
    """A key, or one that does not exist beside it, and a value for it."""
    path = draw(st.sampled_from(KEYS))
    if draw(st.integers(0, 9)) == 0:
        path = (*path[:-1], draw(texts))
    return path, draw(bits if "bits" in str(path[-1]) else values)


@st.composite
def recipes(draw) -> dict[str, Any]:
    """A sound recipe with some of its values replaced, added or taken away."""
    recipe = copy.deepcopy(BASE)
    for section in draw(st.sets(st.sampled_from(["rules", "budget", "allocation", "train", "float"]), max_size=2)):
        if draw(st.booleans()):
            del recipe[section]
    for path, value in draw(st.lists(changes(), min_size=1, max_size=4)):
        put(recipe, path, value)
    return recipe


def attempt(path: Path, *overrides: str) -> tuple[Recipe | None, str]:
    """The recipe of a file, or None and what the refusal says."""
    try:
        return load_recipe(path, list(overrides)), ""
    except RecipeError as error:
        return None, str(error)


def written(folder: Path, values: dict[str, Any], name: str = "x.toml") -> Path:
    (folder / name).write_text(toml.dumps(values), encoding="utf-8")
    return folder / name


@pytest.fixture(autouse=True)
def _regular_expressions_may_warn():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # Python's, on "re:[[" and the like
        yield


# ---- loading ---------------------------------------------------------------------------------------------


@cases(60)
@given(recipes())
def test_a_recipe_loads_and_says_the_same_again_or_is_refused(tmp_path, values):
    path = written(tmp_path, values)
    recipe, refusal = attempt(path)
    if recipe is None:
        assert str(path) in refusal
        return
    again = parse_recipe(json.loads(recipe.to_json()), "again")
    assert again.to_json() == recipe.to_json()
    assert len(recipe.built_rules()) == len(recipe.rules)
    assert bool(recipe.built_budget()) == any(vars(recipe.budget).values())


@cases(60)
@given(changes())
def test_one_wrong_value_is_named(tmp_path, change):
    """The message names the key that was changed, or the section it is in."""
    values, (path, value) = copy.deepcopy(BASE), change
    put(values, path, value)
    recipe, refusal = attempt(written(tmp_path, values))
    if recipe is None:
        named = [str(step) for step in path if isinstance(step, str)]
        # A quantization may be refused by what a rule makes of it.
        assert any(name in refusal or repr(name) in refusal for name in [*named, "rules.1"]), refusal


@cases(60)
@given(
    st.one_of(st.text(max_size=60), st.binary(max_size=60), st.text(st.sampled_from("[]{}=.\"'\n,#a1-_ "), max_size=40))
)
def test_text_at_random_is_refused_by_name(tmp_path, text):
    path = tmp_path / "x.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    recipe, refusal = attempt(path)
    assert recipe is None
    assert str(path) in refusal


NAMES = st.sampled_from(["a.toml", "b.toml", "c.toml", "none.toml", ".", "..", "", "a\0b", 300 * "x"])


@cases(40)
@given(st.lists(st.one_of(NAMES, texts), max_size=3), st.one_of(st.lists(NAMES, max_size=2), NAMES, values), changes())
def test_what_a_recipe_extends_is_read_or_named(tmp_path, first, second, change):
    """Whatever is wrong, the message tells the file, or which one asks for it."""
    base = copy.deepcopy(BASE)
    put(base, *change)
    written(tmp_path, {"extends": second}, "b.toml")
    written(tmp_path, base, "c.toml")
    recipe, refusal = attempt(written(tmp_path, {"extends": first, "data": {"batch_size": 3}}, "a.toml"))
    assert recipe is not None or any(f"{name}.toml" in refusal for name in "abc")


settings_ = st.tuples(st.sampled_from(KEYS), values).map(lambda c: f"{'.'.join(map(str, c[0]))}={toml.value(c[1])}")


@cases(60)
@given(st.one_of(settings_, st.text(max_size=30)))
def test_an_override_is_taken_or_refused(tmp_path, override):
    path = written(tmp_path, BASE)
    recipe, refusal = attempt(path, override)
    assert recipe is not None or str(path) in refusal or "--set" in refusal


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed = " + 5000 * "9", "not valid TOML"),
        ("x = " + 5000 * "[" + 5000 * "]", "nested more than 50 deep"),
        ("model.options" + 5000 * ".x" + " = 1", "nested more than 50 deep"),
    ],
)  # fmt: skip
def test_texts_that_pythons_reader_stumbles_over(tmp_path, text, words):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(RecipeError, match=rf"x\.toml: .*{words}"):
        load_recipe(tmp_path / "x.toml")
    if text.startswith("model"):
        with pytest.raises(RecipeError, match=rf"x\.toml: .*{words}"):
            load_recipe(written(tmp_path, BASE), [text])


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("seed",), 2**32, r"seed: whole numbers go up to 4294967295 \(found 4294967296\)"),
        (("train", "epochs"), 10**400, "train.epochs: whole numbers go up to"),
        (("train", "lr"), float("inf"), "train.lr: Input should be a finite number"),
        (("budget", "bops"), float("inf"), "budget.bops: Input should be a finite number"),
        (("train", "start_bits"), 10**400, "train.start_bits: .*(whole numbers|widths are whole)"),
        (("rules", 1, "bits"), 10**400, "rules.1.*(whole numbers|widths are whole)"),
        (("rules", 1, "bits"), 9, "rules.1: weight_bits=9 was asked for"),
        (("rules", 1, "pattern"), "re:a{99999999999}", "rules.1: .*not a regular expression"),
        (("rules", 1, "pattern"), "re:" + 5000 * "(", "rules.1: .*not a regular expression"),
        (("data", "image_size"), 2**31, "data.image_size=2147483648.* at 512 pixels a side at most"),
        (("data", "shift"), 10**6, "data.shift=1000000 .* at 512 pixels a side at most"),
        (("allocation", "weight_bits"), [9, 9], "allocation.weight_bits: bits=9 was asked for"),
        (("extends",), "a\0b", "no file can have this name"),
    ],
)  # fmt: skip
def test_values_that_no_run_can_take(tmp_path, path, value, words):
    values = copy.deepcopy(BASE)
    put(values, path, value)
    with pytest.raises(RecipeError, match=words):
        load_recipe(written(tmp_path, values))


@pytest.mark.parametrize(
    ("estimator", "option", "value"),
    [
        ("pege", "delta", float("inf")), ("pege", "weight", 10**400), ("pege", "kappa", float("inf")),
        ("ewgs", "delta", float("nan")), ("gdnsq", "temperature", float("inf")), ("gdnsq", "noise_gradient", "no"),
    ],
)  # fmt: skip
def test_options_that_no_estimator_can_take(tmp_path, estimator, option, value):
    values = {**BASE, "quantization": {"estimator": estimator, "options": {option: value}}}
    values["rules"] = [{"pattern": "*", "bits": 4}]
    with pytest.raises(RecipeError, match=rf"rules\.0: {option}=.* was asked for"):
        load_recipe(written(tmp_path, values))


def test_a_home_that_nobody_has_is_named():
    with pytest.raises(FxQuantError, match=r"data\.dir = '~no such user/x'"):
        expanded("~no such user/x", "data.dir")


# ---- building --------------------------------------------------------------------------------------------


widths = st.one_of(st.integers(1, 8), st.tuples(st.integers(1, 4), st.integers(5, 8)))
shares = st.floats(0.01, 0.4)
PLAUSIBLE = {
    ("data", "batch_size"): st.integers(1, 2000),
    ("data", "image_size"): st.integers(1, 48),
    ("data", "shift"): st.integers(0, 9),
    ("model", "name"): st.sampled_from(["test_resnet", "test_vit", "test_efficientnet", "resnet20", "resnet2"]),
    ("model", "options"): st.dictionaries(
        st.sampled_from(["num_classes", "in_chans", "drop_rate", "img_size", "width"]), st.integers(0, 10)
    ),
    ("quantization", "estimator"): st.sampled_from(sorted(ESTIMATORS)),
    ("quantization", "backend"): st.sampled_from(sorted(BACKENDS)),
    ("quantization", "residual_bits"): st.integers(1, 8),
    ("quantization", "options", "percentile"): st.floats(1, 100),
    ("rules", 0, "pattern"): st.sampled_from(["first", "*", "conv*", "re:.*conv.", "re:(a|b)", "nothing", "last|fc"]),
    ("rules", 1, "bits"): widths,
    ("rules", 1, "init"): st.sampled_from(["mse", "minmax", "percentile"]),
    ("budget", "mean_weight_bits"): st.floats(0.5, 9),
    ("budget", "mean_activation_bits"): st.floats(0.5, 9),
    ("budget", "bops"): st.floats(1e3, 1e12),
    ("budget", "weight_bytes"): st.floats(1e3, 1e9),
    ("allocation", "weight_bits"): widths,
    ("allocation", "fixed"): st.sampled_from(["first", "*", "none", "re:.*", "re:("]),
    ("train", "optimizer"): st.sampled_from(["sgd", "adamw", "radam", "lion", "sdg"]),
    ("train", "start_bits"): st.integers(1, 8),
    ("train", "finetune"): shares,
    ("train", "squeeze"): shares,
}


@cases(2)
@given(st.fixed_dictionaries({}, optional=PLAUSIBLE))
def test_a_recipe_that_loads_is_rehearsed_or_refused(tmp_path, changed):
    """All that comes before training: model, data, widths and their budget, optimizers, backends."""
    values = copy.deepcopy(BASE)
    for path, value in changed.items():
        put(values, path, value)
    recipe, _ = attempt(written(tmp_path, values))
    assume(recipe is not None)
    with contextlib.suppress(FxQuantError):
        _Run(recipe, tmp_path / "out", Processes(), Silent(), Guard(recipe.divergence), 0.0, None)
    assert not (tmp_path / "out").exists()


# ---- the command line ------------------------------------------------------------------------------------


@cases(15)
@given(st.lists(st.one_of(recipes(), st.just(BASE)), min_size=1, max_size=3))
def test_validate_ends_with_a_status_and_a_message(tmp_path, monkeypatch, capsys, several):
    files = [written(tmp_path, values, f"{index}.toml") for index, values in enumerate(several)]
    sound = [attempt(file)[0] is not None for file in files]
    monkeypatch.setattr("sys.argv", ["fxquant", "validate", *map(str, files)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as status:
        cli.main()
    said = capsys.readouterr()
    assert (status.value.code or 0) == (0 if all(sound) else 2)
    assert "Traceback" not in said.out + said.err
    assert ("error:" in said.err) == (not all(sound))
