"""README is run, not trusted: its Python blocks in order, its commands against CI and the command line."""

import re
import shlex
import tomllib

from typer.testing import CliRunner

from fxquant.cli import app
from fxquant.recipe import parse_recipe

from .conftest import RECIPES, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_blocks_run_in_order(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["report"].reference_equals_fake_quant
    assert namespace["onnx"].argmax_agreement >= 99
    assert "torch.uint8 torch.int8 torch.int32" in capsys.readouterr().out
    assert any("Quantized" in type(m).__name__ or "Native" in type(m).__name__ for m in namespace["native"].modules())


def test_ci_runs_the_commands_of_readme():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    commands = [block.strip() for block in blocks("bash")]
    for command in commands[:2]:
        assert command in ci
    assert commands[0].endswith("fxquant run recipes/digits_w4a4_nipq.toml")
    assert commands[1].endswith("&& pytest")


def test_commands_named_in_readme_exist():
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    known |= {group.name for group in app.registered_groups}
    listed = {line.split()[1] for block in blocks("text") for line in block.splitlines() if line.startswith("fxquant")}
    assert listed == known


def test_options_named_in_readme_exist():
    for block in blocks("text"):
        for line in filter(None, block.splitlines()):
            _, command, *rest = shlex.split(line)
            options = re.findall(r"--\w+", line)
            measured = [rest[0] if rest[0].isalpha() else "latency"] if command == "bench" else []
            asked = [command, *measured, "--help"]
            help_text = CliRunner().invoke(app, asked, env={"COLUMNS": "200", "TERM": "dumb"}).output
            assert all(option in help_text for option in options), line


def test_toml_blocks_are_a_recipe():
    values = tomllib.loads("".join(blocks("toml")))
    base = tomllib.loads((RECIPES / values.pop("extends")).read_text(encoding="utf-8"))
    recipe = parse_recipe({"name": "readme", **base, **values}, "README.md")
    assert recipe.built_rules()[0].weight_bits == (2, 8)
    assert recipe.divergence.action == "rollback"


def test_recipes_named_in_readme_exist():
    for name in re.findall(r"recipes/([\w/]+\.toml)", README):
        assert (RECIPES / name).exists(), name
