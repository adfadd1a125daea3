"""One model, in this process; its row as JSON on the last line."""

import json
import sys
import warnings
from dataclasses import asdict

from .processes import cover_model

warnings.filterwarnings("ignore", category=UserWarning)
warnings.filterwarnings("ignore", category=DeprecationWarning)
name, size, bits, way = sys.argv[1:]
print(json.dumps(asdict(cover_model(name, int(size), int(bits), way))))
