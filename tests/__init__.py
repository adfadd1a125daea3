"""Environment of the tests, set before torch and rich are imported, which read it once."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, a thread each
for _name in ("COLUMNS", "LINES"):  # pytest-xdist would have every table in 80 columns, whatever a test asks for
    os.environ.pop(_name, None)
