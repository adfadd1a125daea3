"""How fast and how large every backend's model is, beside float eager and onnxruntime fp32 in the same run.

* ``contender`` - what is measured: float, each backend fed by us, and with ``peers`` other quantizers.
* ``job`` - one model at one size, and the files that its contenders share; ``artefacts`` makes them.
* ``runners``, ``peers`` - a contender as something to call.
* ``worker``, ``processes`` - one process a contender, asked over a pipe; asleep between bursts.
* ``rounds`` - bursts in shuffled, interleaved order; ``result`` - medians, ratios and JSON.
* ``table``, ``plot`` - for people. ``machine`` - what it was measured on.
"""

from .artefacts import of_model, of_run
from .contender import Contender, contenders
from .result import Entry, Result, Spread, spread
from .rounds import Settings, measure, order

__all__ = [
    "Contender",
    "Entry",
    "Result",
    "Settings",
    "Spread",
    "contenders",
    "measure",
    "of_model",
    "of_run",
    "order",
    "spread",
]
