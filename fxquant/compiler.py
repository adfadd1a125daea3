"""torch's compiler, Inductor: whether it can be used here, and what it says to users of its own code."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from .errors import SpecError


def require_compiler(asked: str) -> None:
    """Check that programs can be compiled for a CPU.

    Args:
        asked: what was asked for, as the message begins.

    Raises:
        SpecError: where Inductor finds no C++ compiler.
    """
    from torch._inductor import cpp_builder, exc  # seconds to import

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise SpecError(
            f"{asked}, whose programs are compiled, and no C++ compiler was found: install g++ or clang++, or name one "
            "in the environment variable CXX"
        ) from None


@contextlib.contextmanager
def own_warnings_silenced() -> Iterator[None]:
    """Within it, torch's compiler does not tell users what it thinks of its own code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="To copy construct from a tensor", module=r"torch\._inductor")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")
        yield
