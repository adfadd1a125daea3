"""What becomes of any timm model: each taken through every stage in a process of its own, one CSV row a model.

* ``row`` - the row, the stages, the CSV file and the summary.
* ``spending`` - time and memory of the stages.
* ``probe`` - what is counted on any graph.
* ``ours``, ``plain`` - the way through fxquant, and through torch.ao as it comes, for comparison.

``python -m fxquant.coverage NAME SIZE BITS WAY`` does one model and prints its row as JSON.
"""

from .processes import WAYS, cover, read_models
from .row import Row, summary

__all__ = ["WAYS", "Row", "cover", "read_models", "summary"]
