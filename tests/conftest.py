"""For all tests."""

import os

import pytest

# Tests start processes that import torch; where its bytecode may not be kept, each compiles it for five seconds.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config) -> None:
    """Dots, as with -q, unless more is asked for. In addopts, -q would take one -v back."""
    if config.option.verbose == 0:
        config.option.verbose = -1
