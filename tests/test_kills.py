"""A run that is killed (SIGKILL) at any moment and resumed ends with the same files as one that was not."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fxquant import checkpoint

from .conftest import RECIPES, ROOT

# Learned widths that become whole half-way, an average that ships, two stages: all that a checkpoint has to hold.
RECIPE = RECIPES / "digits_mixed4_nipq.toml"
PIECES = ["train.finetune=0.5", "train.average=0.9", "quantization.lower=['x86']"]
QUICK = [*PIECES, "float.epochs=1", "train.epochs=2", "data.batch_size=512"]
WHOLE = [*PIECES, "float.epochs=2", "train.epochs=4"]


def command(folder: Path, overrides: list[str], *start: str) -> list[str]:
    pairs = [word for override in overrides for word in ("--set", override)]
    return [sys.executable, *(start or ("-m", "fxquant")), "run", str(RECIPE), "--resume", "--output", folder, *pairs]


def begin(arguments: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(folder: Path, overrides: list[str]) -> float:
    """Resume a run until it is done; the seconds it took."""
    started = time.monotonic()
    process = begin(command(folder, overrides))
    _, complaint = process.communicate()
    assert process.returncode == 0, complaint
    return time.monotonic() - started


def kill(folder: Path, overrides: list[str], after: float) -> bool:
    """Start or resume a run and kill it after so many seconds; False where it was done before."""
    process = begin(command(folder, overrides))
    try:
        _, complaint = process.communicate(timeout=after)
        assert process.returncode == 0, complaint
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True


def left(folder: Path) -> str:
    """What a killed run left, in words."""
    if (folder / checkpoint.PACKED_MODEL).exists():
        return "model.fxq written"
    return checkpoint.left_in(folder).split("holds ")[-1] if folder.exists() else "nothing"


def files_of(folder: Path) -> tuple[bytes, dict]:
    """The integer model, byte for byte, and the result but for the time it took."""
    result = json.loads((folder / checkpoint.RESULT).read_text())
    del result["seconds"]
    return (folder / checkpoint.PACKED_MODEL).read_bytes(), result


@pytest.mark.parametrize(("runs", "overrides"), [(1, QUICK), pytest.param(50, WHOLE, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed(runs, overrides, tmp_path):
    """Every run is killed at a moment of its own, spread over the whole duration, every third one once more."""
    drawn, whole = random.Random(0), tmp_path / "whole"
    seconds = finish(whole, overrides)
    expected, kills = files_of(whole), 0
    for index in range(runs):
        folder, moment = tmp_path / str(index), (index + drawn.random()) / runs * seconds
        while not kill(folder, overrides, moment):  # it was quicker than the first; once more, from the beginning
            folder, moment = folder.with_name(folder.name + "-"), drawn.random() * moment
        again, found = drawn.random() * seconds, left(folder)
        twice = index % 3 == 0 and kill(folder, overrides, again)
        kills += 1 + twice
        finish(folder, overrides)
        assert files_of(folder) == expected, f"killed after {moment:.1f} s"
        assert not list(folder.glob("*.partial")) + list(folder.glob(".*"))
        second = f", again after {again:.1f} s" if twice else ""
        print(f"run {index + 1}: killed after {moment:.1f} of {seconds:.1f} s ({found}){second}: identical", flush=True)
    print(f"{kills} kills, {runs} runs, {runs} identical final models")


IN_THE_MIDST = """
import os, signal, sys
name, count, real = sys.argv.pop(1), int(sys.argv.pop(1)), os.fsync

def fsync(descriptor):
    global count
    if name in os.readlink(f"/proc/self/fd/{descriptor}"):
        count -= 1
        if not count:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    real(descriptor)

os.fsync = fsync
from fxquant.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds the file that is being written under /proc")
def test_killed_in_the_midst_of_writing_each_file(tmp_path):
    """The same run, killed with half a file written, again and again; the last file is the result."""
    finish(tmp_path / "whole", QUICK)
    folder = tmp_path / "cut"
    places = [("recipe.json", 1), ("checkpoint.pt", 1), ("checkpoint.pt", 2), ("capacity.json", 1)]
    for name, count in [*places, ("checkpoint.pt", 1), ("model.fxq", 1), ("result.json", 1)]:
        process = begin(command(folder, QUICK, "-c", IN_THE_MIDST, name, str(count)))
        _, complaint = process.communicate()
        assert process.returncode == -9, complaint
        assert [path.name.startswith(f".{name}.") for path in folder.glob(".*")] == [True]
    finish(folder, QUICK)
    assert files_of(folder) == files_of(tmp_path / "whole")
    assert not list(folder.glob(".*"))
