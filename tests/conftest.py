"""For all tests."""

import os

# Tests start processes that import torch; where its bytecode may not be kept, each of them compiles it for five seconds.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
