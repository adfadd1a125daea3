"""What is measured, from the table of backends; and why one that is not here cannot be."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import FxQuantError
from ..grid import check_bits
from ..lower import require_backend
from ..spec import BACKENDS, BackendSpec, get_backend
from .artefacts import RUN, reference_file
from .job import FLOAT, FLOAT_ONNX
from .peers import NNCF_XML, ORT_QUANTIZED

EAGER = "eager fp32"
ORT = "onnxruntime fp32"
_ONNX = ("onnx", "onnxscript")
_PACKAGES = {"onnxruntime": (*_ONNX, "onnxruntime"), "openvino": (*_ONNX, "openvino")}


@dataclass(frozen=True)
class Contender:
    """One row.

    Attributes:
        name: of the row.
        kind: key of :data:`fxquant.bench.runners.OPENERS`.
        backend: key of :data:`fxquant.spec.BACKENDS`, for kind ``ours``.
        needs: shared files, in the order in which they are made.
        file: the shared file that it runs, of ``needs``.
        packages: what has to be installed.
        counterpart: for a peer, the backend that is the same runtime fed by us.
    """

    name: str
    kind: str
    backend: str = ""
    needs: tuple[str, ...] = (FLOAT,)
    file: str = FLOAT
    packages: tuple[str, ...] = ()
    counterpart: str = ""

    def absence(self) -> str:
        """Why it cannot run on this machine, with what to do; empty where nothing is known to be missing."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            return f"{' and '.join(missing)} not installed: pip install {' '.join(missing)}"
        if self.backend:
            try:
                require_backend(self.backend)
            except FxQuantError as error:
                return str(error)
        return ""


def contenders(
    bits: Sequence[int], backends: Sequence[str] | None = None, *, peers: bool = False, run: str = ""
) -> list[Contender]:
    """All rows of a bench: float, then each backend at each width, then peers, at 8 bits.

    Args:
        bits: widths of a random model, first and last layer 8 bits; not for a run.
        backends: keys of :data:`~fxquant.spec.BACKENDS`; all of them when None.
        peers: also what other quantizers make of the same float model.
        run: name of the finished run whose integers are measured.

    Raises:
        UnknownNameError, SpecError: for a backend or a width that does not exist.
    """
    chosen = [get_backend(name).name for name in (BACKENDS if backends is None else backends)]
    rows = [
        Contender(EAGER, "eager"),
        Contender(ORT, "onnx", needs=(FLOAT, FLOAT_ONNX), file=FLOAT_ONNX, packages=_PACKAGES["onnxruntime"]),
    ]
    for backend in chosen:
        packages = _PACKAGES.get(backend, ())
        if run:
            rows.append(Contender(label(backend, run), "ours", backend, (FLOAT, RUN), RUN, packages))
            continue
        for width in bits:
            file = reference_file(check_bits(width), profile(backend))
            rows.append(Contender(label(backend, width), "ours", backend, (FLOAT, file), file, packages))
    return rows + (_peers() if peers else [])


def profile(backend: str) -> str:
    """The backend whose prepared graph this one shares: the first that differs in nothing ``prepare`` could read."""
    alike = [name for name, spec in BACKENDS.items() if _preparation(spec) == _preparation(get_backend(backend))]
    return alike[0]


def _preparation(spec: BackendSpec) -> BackendSpec:
    return replace(spec, name="", agreement=0.0, reads_onnx=False, compiles=False)


def label(backend: str, widths: int | str) -> str:
    """The name of the row of a backend fed by us."""
    return f"{backend} W{widths}A{widths}" if isinstance(widths, int) else f"{backend} {widths}"


def _peers() -> list[Contender]:
    onnx, openvino = (FLOAT, FLOAT_ONNX), _PACKAGES["openvino"]
    return [
        Contender("torch.ao alone", "torch.ao", counterpart="x86"),
        Contender(
            "onnxruntime quantizer",
            "onnx",
            needs=(*onnx, ORT_QUANTIZED),
            file=ORT_QUANTIZED,
            packages=_PACKAGES["onnxruntime"],
            counterpart="onnxruntime",
        ),
        Contender("openvino fp32", "openvino", needs=onnx, file=FLOAT_ONNX, packages=openvino),
        Contender(
            "nncf",
            "openvino",
            needs=(*onnx, NNCF_XML),
            file=NNCF_XML,
            packages=(*openvino, "nncf"),
            counterpart="openvino",
        ),
    ]
