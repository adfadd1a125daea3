"""Several processes train as one does. Two processes on CPUs (gloo); GPUs (nccl) are not tested here."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from fxquant.checkpoint import load_checkpoint
from fxquant.data import Batches
from fxquant.distributed import Share, even_parts
from fxquant.errors import FxQuantError, SpecError
from fxquant.pixels import PixelBatches, Pixels
from fxquant.recipe import RecipeError, load_recipe
from fxquant.train import run
from fxquant.train.processes import Processes

from .conftest import RECIPES, ROOT
from .distributed_job import EXACT, RANDOM, RUN, SHORT, trained

LAUNCH = [  # what `accelerate launch` runs; its other commands import timm, which may need help to be imported
    sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2",
    "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", "-m",
]  # fmt: skip


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200", "TERM": "dumb"}


def launched(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*LAUNCH, *map(str, arguments)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


def on_their_own(*arguments: str) -> list[subprocess.Popen]:
    """Two processes that nobody watches: a launcher ends the others of a run as soon as it sees one gone."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", *map(str, arguments)],
            cwd=ROOT,
            env=ENVIRONMENT
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
            | {"RANK": str(index), "LOCAL_RANK": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes had in the end, and their folder."""
    folder = tmp_path_factory.mktemp("two")
    done = launched("tests.distributed_job", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{index}.pt", weights_only=True) for index in range(2)], folder


@pytest.mark.parametrize("estimator", EXACT)
def test_two_processes_train_as_one_does(two, estimator, tmp_path):
    """Weights, ranges, BatchNorm's statistics and the running loss after 50 steps at the same global batch."""
    (first, _), _ = two
    alone = trained(Processes(), tmp_path, estimator, EXACT[estimator])
    assert alone.keys() == first["exact"][estimator].keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(first["exact"][estimator][name], tensor, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize(("kind", "estimator"), [*(("exact", e) for e in EXACT), *(("random", e) for e in RANDOM)])
def test_both_processes_hold_the_same_bits(two, kind, estimator):
    (first, second), _ = two
    for name, tensor in first[kind][estimator].items():
        assert torch.equal(tensor, second[kind][estimator][name]), name


def test_processes_draw_for_themselves_and_train_otherwise_than_one(two, tmp_path):
    """So that the equality of those that do not draw is no matter of nothing being trained at all."""
    (first, _), _ = two
    alone = trained(Processes(), tmp_path, "nipq", {}, epochs=2, dtype=torch.float32)
    assert not torch.equal(alone["head.weight"], first["random"]["nipq"]["head.weight"])


@pytest.mark.parametrize("estimator", ["ste", "lsq", "gdnsq"])
def test_accumulated_parts_train_as_one_batch(estimator, tmp_path):
    """With BatchNorm's statistics held: a part has its own. EWGS and PEGE scale each part's gradient by its size."""
    one, two = (
        trained(Processes(), tmp_path, estimator, EXACT[estimator], epochs=2, accumulate=parts, hold_batch_norm=True)
        for parts in (1, 2)
    )
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-9, msg=name)


def test_a_full_disk_of_the_first_process_ends_both_and_the_run_resumes_exactly(two):
    (first, second), folder = two
    assert first["cut"] == "no space left on the device"
    assert second["cut"] == "process 0 of 2: no space left on the device"
    whole, cut = (load_checkpoint(folder / name / "checkpoint.pt") for name in ("whole", "cut"))
    assert len(whole["random"]) == 2
    assert not torch.equal(whole["random"][0]["torch"], whole["random"][1]["torch"])
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, cut["model"][name]), name
    results = [json.loads((folder / name / "result.json").read_text()) for name in ("whole", "cut")]
    assert {**results[0], "seconds": 0} == {**results[1], "seconds": 0}


def test_what_one_process_sees_diverge_all_take_back(two):
    """A weight spoilt in the second process: the first tells of the layer, though it has seen nothing."""
    (first, second), folder = two
    words = "in epoch 2 of quantized training, step 8, the loss is NaN or infinite: 'layer2.0.conv1.weight' holds NaN"
    assert first["rolled back"].startswith(words)
    assert second["rolled back"] == ""
    (rollback,) = json.loads((folder / "rolled" / "result.json").read_text())["rollbacks"]
    assert (rollback["stage"], rollback["epoch"], rollback["step"]) == ("quantized", 2, 8)


def test_only_the_first_process_writes_and_has_an_outcome(two):
    (first, second), folder = two
    assert (first["outcomes"], second["outcomes"]) == ([True, True], [False, False])
    assert not list((folder / "whole").glob(".*"))


def test_one_process_resumes_what_two_began_and_the_other_way_round(two):
    _, folder = two
    (folder / "whole" / "result.json").unlink()
    assert run(load_recipe(RUN, SHORT), folder / "whole", resume=True).report.reference_equals_fake_quant


def test_uneven_parts_are_refused_before_anything_is_written(two):
    (first, second), folder = two
    words = "a batch of 255 images cannot be split evenly over 2 parts (2 processes, accumulate = 1); set data.batch_"
    assert first["uneven"].startswith(words)
    assert second["uneven"].startswith(words)
    assert not (folder / "uneven").exists()


def test_a_process_that_is_killed_ends_the_run_with_one_message(tmp_path):
    """From the command line; one process shows the bars."""
    arguments = ["run", RUN, "--output", tmp_path / "run", *(f"--set={override}" for override in SHORT)]
    processes = on_their_own("tests.distributed_job", "crash", *arguments)
    (_, said), (_, nothing) = (process.communicate(timeout=300) for process in processes)
    assert [process.returncode for process in processes] == [2, 9], said + nothing
    assert said.count("another process of this run is gone") == 1
    assert "Traceback" not in said
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["recipe.json"]


# ---- in one process --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, r"--mixed_precision bf16, but the recipe .* train.autocast=bfloat16"),
        ({"ACCELERATE_USE_FSDP": "true"}, r"--use_fsdp, .*; launch it with --multi_gpu alone"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, r"--dynamo_backend, but quantizers"),
        ({"WORLD_SIZE": "2"}, r"2 processes were launched, but accelerate was set up for 1"),
    ],
)
def test_what_a_launcher_asks_for_and_cannot_have_is_refused(monkeypatch, variables, words):
    Processes()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FxQuantError, match=words):
        Processes()


def test_accumulation_that_does_not_divide_a_batch_is_refused():
    with pytest.raises(RecipeError, match=r"train.accumulate = 3 splits every batch .* data.batch_size = 64"):
        load_recipe(RECIPES / "digits_w4a4_lsq.toml", ["train.accumulate=3"])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_shares_make_up_the_batches(count):
    images, labels = torch.randn(37, 1, 4, 4), torch.arange(37)
    pixels = Pixels(torch.randint(0, 256, (37, 3, 32, 32), dtype=torch.uint8), labels, ["a"])

    def loaders(share):
        normal = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
        for loader in (
            Batches(images, labels, 8, seed=1, shift=1),
            PixelBatches(pixels, labels, 8, **normal, seed=1),
            Batches(images, labels, 8),
            PixelBatches(pixels, labels, 8, **normal),
        ):
            loader.share = share
            yield loader

    shares = zip(*(loaders(Share(index, count)) for index in range(count)), strict=True)
    for whole, parts in zip(loaders(Share()), shares, strict=True):
        batches = list(whole)
        if whole.seed is not None:  # part by part
            for batch, *given in zip(batches, *parts, strict=True):
                for position in range(2):
                    assert torch.equal(batch[position], torch.cat([part[position] for part in given]))
        else:
            assert torch.equal(
                torch.cat([labels for _, labels in batches]), torch.cat([b[1] for part in parts for b in part])
            )


def test_even_parts_are_even():
    assert even_parts(range(6), 3, "parts") == [range(2), range(2, 4), range(4, 6)]
    for images in (7, 0):
        with pytest.raises(SpecError, match=f"a batch of {images} images cannot be split evenly over 3 parts"):
            even_parts(range(images), 3, "parts")


def test_batch_norm_over_processes_is_batch_norm(monkeypatch):
    """Output, gradients and running statistics, where all processes have the same images."""
    from fxquant import distributed

    monkeypatch.setattr(distributed, "_all_gather", lambda values: [values, values.clone()])
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    grad = torch.randn_like(x)
    found = []
    for several in (False, True):
        mean, variance = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        if several:
            out = distributed._batch_norm(x, mean, variance, weight, bias, 0.1, 1e-5)
        else:
            out = F.batch_norm(torch.cat([x, x]), mean, variance, weight, bias, True, 0.1, 1e-5)[:6]
            grad_both = torch.cat([grad, grad])
        gradients = (
            torch.autograd.grad(out, (x, weight, bias), grad)
            if several
            else torch.autograd.grad(
                F.batch_norm(torch.cat([x, x]), None, None, weight, bias, True, 0.1, 1e-5), (x, weight, bias), grad_both
            )
        )
        found.append((out, mean, variance, *gradients))
    (out, mean, variance, to_x, to_weight, to_bias), ours = found
    # Both copies of x contribute to its gradient there; gamma's and beta's are of one process here.
    for theirs, own in zip((out, mean, variance, to_x / 2, to_weight / 2, to_bias / 2), ours, strict=True):
        torch.testing.assert_close(own, theirs)
