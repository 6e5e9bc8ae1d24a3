"""For all tests: how they are shown, and which are begun ahead."""

import contextlib
import inspect
import os
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

# Tests start processes that import torch; where its bytecode may not be kept, each compiles it for five seconds.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# The same form of attention in every run; tests/test_one_query.py tries them all.
os.environ.setdefault("LLM_ATTENTION", "rows")

AHEAD: dict[str, Future] = {}  # id of a test -> its run in a thread


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config) -> None:
    """Dots and one thread, unless more is asked for."""
    if config.option.verbose == 0:  # in addopts, -q would take one -v back
        config.option.verbose = -1
    # On models this small threads only wait for one another: ten times as long while tests run ahead on the other
    # processor. The slow tests' models are large.
    if config.option.markexpr == "not slow":
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    """Begin the tests that are marked `ahead` in a thread, one after the other.

    They wait for processes of their own, which take a second each to import torch; meanwhile other tests run.
    """
    if session.config.option.collectonly:
        return (yield)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
        try:
            for number, item in enumerate(session.items):
                if item.get_closest_marker("ahead"):
                    AHEAD[item.nodeid] = pool.submit(run, item, Path(folder, str(number)))
            return (yield)
        finally:
            pool.shutdown(cancel_futures=True)


def run(item: pytest.Function, tmp_path: Path) -> None:
    """With its parameters and tmp_path. Fixtures belong to the main thread: instead, `ahead(name=make)` has
    make(tmp_path), a context."""
    tmp_path.mkdir()
    given = dict(item.callspec.params) if hasattr(item, "callspec") else {}
    if "tmp_path" in inspect.signature(item.obj).parameters:
        given["tmp_path"] = tmp_path
    with contextlib.ExitStack() as stack:
        for name, make in item.get_closest_marker("ahead").kwargs.items():
            given[name] = stack.enter_context(make(tmp_path))
        item.obj(**given)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem) -> bool | None:
    """Of a test that was begun ahead: wait for its end, and fail where it failed."""
    begun = AHEAD.get(pyfuncitem.nodeid)
    if begun is None or begun.cancel():  # not begun yet: run it here
        return None
    begun.result()
    return True


@pytest.fixture(scope="module", autouse=True)
def shared_models_stay_as_they_are():
    yield
    if cases := sys.modules.get("tests.cases"):  # which imports torch: only where a test has wanted it
        assert cases.changed_models() == [], "models of tests/cases.py are shared: load one that is changed by itself"
