"""The shape of the package: imports point one way, torch.ao has one seam, importing is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fxquant

PACKAGE = Path(fxquant.__file__).parent

# Data flows down this list; a module may import only from lines above its own. CONTRIBUTING.md explains each.
ORDER = [
    "errors", "files", "compiler", "hardware", "schedule", "graph", "grid", "distributed", "ranges", "_torch_ao",
    "estimators", "spec", "integer", "computed", "layers", "layers_torch_ao", "qconfig", "capture", "modes",
    "canonical", "trace", "cost", "edges", "prepare", "budget", "widths", "capacity", "mincut", "sensitivity",
    "integer_program", "allocate", "analyze", "dynamics", "ties", "freeze", "cut_check", "convert", "controller",
    "loss", "lower", "verify", "report", "svg", "models", "timm", "synthetic", "pixels", "data", "recipe",
    "checkpoint", "run_report", "html", "meter", "coverage", "train", "bench", "interruption", "cli",
]  # fmt: skip


def unit(path: Path) -> str:
    """The line of ORDER that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def internal_imports(path: Path) -> set[str]:
    """Units of fxquant that a file imports, anywhere in it."""
    depth = len(path.relative_to(PACKAGE).parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            found.update(names)
        elif isinstance(node, ast.ImportFrom) and 0 < node.level < depth:
            found.add(unit(path))
    return found


def files() -> list[Path]:
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p.name not in ("__main__.py",) and p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    own = ORDER.index(unit(path))
    upward = [name for name in internal_imports(path) if ORDER.index(name) > own]
    assert not upward, f"{path.name} imports {upward}, which come after it"


def test_the_order_is_complete():
    assert {unit(path) for path in files()} == set(ORDER)


def test_only_the_seam_imports_torch_ao():
    for path in files():
        if path.name == "_torch_ao.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith("torch.ao") for name in names), path


def test_importing_fxquant_is_light():
    heavy = ("timm", "torchvision", "sklearn", "accelerate", "pydantic", "typer", "rich", "scipy")
    code = f"import sys, fxquant; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_api():
    assert fxquant.__all__ == sorted(fxquant.__all__)
    assert set(fxquant.__all__) == {
        "Budget", "Controller", "FxQuantError", "OnnxModel", "OpenVinoModel", "QATLoss", "Rule", "allocate", "analyze",
        "calibrate", "compiled_quantizers", "convert", "export_onnx", "freeze",
        "get_backend_config", "get_qat_qconfig",
        "get_qat_qconfig_mapping", "load", "lower", "param_groups", "prepare", "save", "verify",
    }  # fmt: skip
    for name in fxquant.__all__:
        assert getattr(fxquant, name).__doc__, name
        assert name in fxquant.__doc__, f"{name} is missing from the front door's docstring"
