"""``fxquant bench step``: what a training step costs, in time and memory, beside the float model's and torch.ao's.

* ``job`` - one model, one batch, and what is measured on it.
* ``steps`` - a contender as a step to call.
* ``worker``, ``__main__`` - the process of one contender, so that peak memory is its own.
* ``rounds`` - bursts in shuffled, interleaved order; ``result`` - medians, ratios, JSON and table.
"""

from .job import FLOAT, PEERS, StepJob, StepSettings, contenders
from .result import StepEntry, StepResult
from .rounds import measure

__all__ = ["FLOAT", "PEERS", "StepEntry", "StepJob", "StepResult", "StepSettings", "contenders", "measure"]
