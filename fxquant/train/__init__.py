"""What ``fxquant run`` does: float training, quantization-aware training, freeze, convert, lower, verify.

The only package that knows timm's models and optimizers, and accelerate.

* ``build`` - a recipe's model, data and optimizer.
* ``loop`` - epochs of one stage, a checkpoint after each; ``divergence`` says where a loss stopped being a number.
* ``evaluate`` - predictions and accuracy.
* ``runner`` - the stages one after the other; ``progress`` is what it tells whoever watches.
* ``load`` - a finished run read back; ``target`` - the reference on a backend.
"""

from .build import build_model
from .load import LoadedRun, load_run
from .progress import Progress, Silent
from .runner import RunOutcome, run
from .target import lower_to

__all__ = ["LoadedRun", "Progress", "RunOutcome", "Silent", "build_model", "load_run", "lower_to", "run"]
