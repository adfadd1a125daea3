"""A full disk, a folder without permission, a dead worker, a signal: a clear message, and a checkpoint that loads."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fxquant import checkpoint, cli
from fxquant.errors import (
    CheckpointError,
    DataWorkerError,
    DivergenceError,
    FxQuantError,
    OutputFolderError,
    WriteError,
)
from fxquant.files import is_partial, remove_partial, write_bytes, write_json
from fxquant.interruption import Terminated, terminable
from fxquant.lower import onnx, packed
from fxquant.recipe import load_recipe
from fxquant.train import Silent, run
from fxquant.train.processes import Processes

from .conftest import RECIPES
from .test_packed import reference
from .test_train import SHORT, Cut, on_images

# ---- one file --------------------------------------------------------------------------------------------


def fails_with(number):
    def call(*arguments):
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_write_that_fails_says_what_it_takes_and_leaves_the_file_before(call, number, tmp_path, monkeypatch):
    path = tmp_path / "model.fxq"
    write_bytes(path, b"before")
    monkeypatch.setattr(os, call, fails_with(number))
    words = (
        rf"model\.fxq cannot be written: {os.strerror(number)}. It takes 1,500 bytes, [\d,]+ are free in {tmp_path};"
    )
    with pytest.raises(WriteError, match=words):
        write_bytes(path, b"x" * 1500)
    assert [p.name for p in tmp_path.iterdir()] == ["model.fxq"]
    assert path.read_bytes() == b"before"


def test_an_interrupt_while_writing_leaves_the_file_before(tmp_path, monkeypatch):
    write_bytes(tmp_path / "a", b"before")

    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(tmp_path / "a", b"after")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": b"before"}


def test_a_full_disk(tmp_path):
    """A file system of 64 KiB, where this machine lets one be mounted."""
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], capture_output=True)
    except OSError:
        pytest.skip("there is no mount")
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    try:
        write_json(tmp_path / "result.json", {"a": 1})
        with pytest.raises(WriteError, match=r"No space left on device. It takes 100,000 bytes, 61,440 are free"):
            write_bytes(tmp_path / "checkpoint.pt", bytes(100_000))
        assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_folder_without_permission(tmp_path):
    folder = tmp_path / "run"
    write_json(folder / "result.json", {"a": 1})
    mode, user = folder.stat().st_mode, os.geteuid()
    folder.chmod(0o500)
    try:
        if user == 0:  # to whom permissions say nothing
            os.seteuid(65534)
        with pytest.raises(WriteError, match=r"result\.json cannot be written: Permission denied\. It takes 13 bytes"):
            write_json(folder / "result.json", {"a": 2})
    finally:
        os.seteuid(user)
        folder.chmod(mode)
    assert [p.read_text() for p in folder.iterdir()] == ['{\n  "a": 1\n}\n']


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_process_killed_at_either_side_of_the_move_leaves_a_whole_file(when, tmp_path):
    path, real = tmp_path / "a", os.replace
    write_bytes(path, b"before")
    if not (child := os.fork()):

        def killed(source, target):
            if when == "after":
                real(source, target)
            os.kill(os.getpid(), signal.SIGKILL)

        os.replace = killed
        write_bytes(path, b"after")
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert path.read_bytes() == when.encode()
    left = [p for p in tmp_path.iterdir() if is_partial(p)]
    assert len(left) == (when == "before")
    remove_partial(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_what_killed_processes_left_is_no_content_of_a_folder_and_goes(tmp_path):
    (tmp_path / ".checkpoint.pt.123.partial").write_bytes(b"half")
    checkpoint.claim_output(tmp_path, resume=False)
    assert not list(tmp_path.iterdir())
    (tmp_path / ".checkpoint.pt.123.partial").write_bytes(b"half")
    (tmp_path / "notes.partial").write_text("mine")
    with pytest.raises(OutputFolderError, match=r"is not empty \(it holds notes\.partial\)"):
        checkpoint.claim_output(tmp_path, resume=False)
    checkpoint.claim_output(tmp_path, resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.partial"]


def test_a_second_process_is_kept_out_of_a_folder_until_the_first_has_ended(tmp_path, monkeypatch):
    """It would have removed the files that the first was writing, and written its own over them."""
    code = f"""
import pathlib, sys
from fxquant import checkpoint
with checkpoint.occupied(pathlib.Path({str(tmp_path)!r})):
    print("in", flush=True)
    sys.stdin.read()
"""
    first = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert first.stdout.readline() == b"in\n"
        half = tmp_path / ".checkpoint.pt.123.partial"
        half.write_bytes(b"half")
        monkeypatch.setattr(checkpoint, "_PATIENCE", 0)
        for folder in (tmp_path, tmp_path / "x" / ".."):
            with pytest.raises(OutputFolderError, match=r"another run is in progress in .*\(it holds .*\.lock\)"):
                run(load_recipe(RECIPE), folder, resume=True)
        assert [p.name for p in tmp_path.iterdir()] == [half.name]
        with checkpoint.occupied(tmp_path / "other"):
            pass
    finally:
        first.kill()
        first.wait()
    for _ in range(2):
        with checkpoint.occupied(tmp_path):
            pass


def test_a_folder_that_is_a_loop_of_links_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with (
        pytest.raises(OutputFolderError, match=r"loop cannot be used for output"),
        checkpoint.occupied(tmp_path / "loop"),
    ):
        pass


# ---- a run -----------------------------------------------------------------------------------------------

RECIPE = RECIPES / "digits_w4a4_nipq.toml"


class Limited(Cut):
    """Once so many steps of a stage were taken, files of this process may not grow beyond a size."""

    def __init__(self, stage, steps, size):
        super().__init__(stage, steps)
        self.size = size

    def step(self, values):
        try:
            super().step(values)
        except KeyboardInterrupt:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_and_the_run_goes_on(tmp_path):
    """The kernel itself refuses: no file may be larger than 1 MB."""
    recipe, before = load_recipe(RECIPE, [*SHORT, "train.epochs=2"]), resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = tmp_path / "cut"
    try:
        with pytest.raises(
            WriteError, match=r"checkpoint\.pt cannot be written: File too large. It takes [\d,]{9} bytes"
        ):
            run(recipe, folder, progress=Limited("quantized", 4, 1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(folder.glob(".*"))
    state = checkpoint.load_checkpoint(folder / checkpoint.CHECKPOINT)
    assert (state["stage"], state["epochs_done"]) == ("quantized", 1)
    assert checkpoint.left_in(folder) == f"{folder / 'checkpoint.pt'} holds epoch 1 of 2 of quantized training"
    assert run(recipe, folder, resume=True).report.reference_equals_fake_quant


@pytest.mark.parametrize("file", ["model.onnx", "model.fxq", "result.json"])
def test_of_each_file_that_cannot_be_written_its_name_is_said(file, tmp_path, monkeypatch):
    model, replace = reference(), os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: fails_with(errno.ENOSPC)() if b.name == file else replace(a, b))
    write = {
        "model.onnx": lambda path: onnx.export_onnx(model, path),
        "model.fxq": lambda path: packed.save(model, path),
        "result.json": lambda path: write_json(path, list(range(100))),
    }[file]
    with pytest.raises(WriteError, match=rf"{file} cannot be written: No space left on device. It takes [\d,]+ bytes"):
        write(tmp_path / file)
    assert not list(tmp_path.iterdir())


class Killer(Silent):
    """Kills the processes that read images in the second epoch of training, and waits for the consequence."""

    def start(self, stage, steps, done=0):
        self.left = steps // 2

    def step(self, values):
        self.left -= 1
        if self.left < 0:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)
            time.sleep(5)


def test_a_killed_process_that_reads_images_is_said_and_the_run_goes_on(image_folder, tmp_path):
    name, options = "resnet18_imagenet_w8a8_lsq", ["model.name=test_resnet", "train.epochs=2"]
    with pytest.raises(
        DataWorkerError, match=r"reads images is gone \(DataLoader worker \(pid.* Killed\).*Resume, with"
    ):
        run(on_images(image_folder, name, *options, "data.workers=1"), tmp_path / "cut", progress=Killer())
    assert checkpoint.load_checkpoint(tmp_path / "cut" / checkpoint.CHECKPOINT)["epochs_done"] == 1
    assert run(
        on_images(image_folder, name, *options), tmp_path / "cut", resume=True
    ).report.reference_equals_fake_quant


def test_a_checkpoint_is_complete(tmp_path):
    """Position, phase, best so far, generators: and all of it is plain values and tensors."""
    recipe = load_recipe(RECIPES / "digits_mixed4_nipq.toml", [*SHORT, "train.average=0.9"])
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path, progress=Cut("quantized", 9))
    state = checkpoint.load_checkpoint(tmp_path / checkpoint.CHECKPOINT)
    assert (state["stage"], state["epochs_done"], state["controller"]["steps_done"]) == ("quantized", 2, 8)
    assert state["scheduler"]["last_epoch"] == 8
    assert state["controller"]["settled"] is True
    assert {key for key in state["model"] if "fake_quant" in key}
    assert len(state["optimizer"]["state"]) == sum(len(group["params"]) for group in state["optimizer"]["param_groups"])
    assert state["keeper"].keys() == {"average", "kept", "epoch", "best"}
    assert state["keeper"]["epoch"] == 2
    assert [entry["epoch"] for entry in state["history"]["epochs"]] == [1, 2]
    assert [generators.keys() for generators in state["random"]] == [{"torch", "cuda", "python", "numpy"}]
    assert {"float_model", "criterion", "divergence", "recipe"} <= state.keys()


def test_every_generator_goes_on_where_it_was(tmp_path):
    def draw():
        return torch.rand(3).tolist(), random.random(), np.random.rand(), random.gauss(), np.random.randn()

    draw()  # a second value of a Gaussian pair lies ready in numpy's
    np.random.randn()
    processes = Processes()
    torch.save(processes.random_state(), tmp_path / "random.pt")
    expected = draw()
    draw()
    processes.restore_random(torch.load(tmp_path / "random.pt", weights_only=True), seed=0)
    assert draw() == expected


def test_a_run_killed_before_it_wrote_anything_begins_anew(tmp_path):
    class Told(Cut):
        notes = ()

        def note(self, text):
            self.notes = (*self.notes, text)

    recipe, told = load_recipe(RECIPE, SHORT), Told("float", 0)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "missing", tmp_path / "empty"):
        with pytest.raises(KeyboardInterrupt):
            run(recipe, folder, resume=True, progress=told)
        assert told.notes[-1] == f"{folder} holds no checkpoint yet; starting from the beginning"
        assert checkpoint.left_in(folder) == f"no epoch was finished, so {folder} holds no checkpoint yet"
    (tmp_path / "empty" / "recipe.json").rename(tmp_path / "empty" / "notes.txt")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        run(recipe, tmp_path / "empty", resume=True)


# ---- the command line ------------------------------------------------------------------------------------


def test_sigterm_raises_inside_and_nowhere_else():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), terminable():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted; no epoch was finished"),
        (Terminated(), 143, "terminated; no epoch was finished"),
        (WriteError("checkpoint.pt cannot be written"), 2, "no epoch was finished"),
        (DivergenceError("the loss"), 2, "no epoch was finished"),
        (DataWorkerError("a process"), 1, "no epoch was finished"),
        (FxQuantError("something else"), 2, "error: something else"),
    ],
)
def test_how_a_run_ends_is_said_with_the_command_that_goes_on(error, status, said, monkeypatch, capsys, tmp_path):
    def broken(*arguments, **options):
        raise error

    folder = tmp_path / "a folder"
    arguments = ["run", str(RECIPE), "--output", str(folder), "--set", "train.epochs=2"]
    monkeypatch.setattr("fxquant.train.run", broken)
    monkeypatch.setattr(sys, "argv", ["fxquant", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == status
    complaint = capsys.readouterr().err
    assert complaint.startswith(said)
    assert "Traceback" not in complaint
    rolls_back = " --set divergence.action=rollback" * isinstance(error, DivergenceError)
    goes_on = f"Go on with: fxquant run {RECIPE} --output '{folder}' --set train.epochs=2{rolls_back} --resume\n"
    assert (goes_on in complaint) is (type(error) is not FxQuantError)
    assert not Path(folder).exists()
