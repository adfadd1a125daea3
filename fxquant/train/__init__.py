"""What ``fxquant run`` does: float training, quantization-aware training, freeze, convert, lower, verify.

The only package that knows timm's models and optimizers, and accelerate.

* ``build`` - a recipe's model, data and optimizer.
* ``loop`` - epochs of one stage, a checkpoint after each; ``guard`` stops it, or rolls it back, where a loss diverges,
  and ``divergence`` says where it did.
* ``keeper`` - which weights ship: the last, the best, or their ``average``.
* ``precision`` - what layers are computed in on this device.
* ``evaluate`` - predictions and accuracy.
* ``allocation`` - widths that a recipe has chosen before it trains, and the rules that a checkpoint keeps of them.
* ``processes`` - those that train together, and what they do together.
* ``runner`` - the stages one after the other; ``progress`` is what it tells whoever watches.
* ``load`` - a finished run read back; ``source`` - a recipe or a run opened for analysis; ``target`` - the reference on
  a backend.
"""

from .allocation import allocate_for
from .build import build_model, statistics_images
from .evaluate import accuracy_of
from .load import LoadedRun, load_run
from .progress import Progress, Silent
from .runner import RunOutcome, run
from .source import Source, open_source
from .target import lower_to

__all__ = [
    "LoadedRun",
    "Progress",
    "RunOutcome",
    "Silent",
    "Source",
    "accuracy_of",
    "allocate_for",
    "build_model",
    "load_run",
    "lower_to",
    "open_source",
    "run",
    "statistics_images",
]
