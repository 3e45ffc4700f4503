"""Python programs in processes of their own. Most of their time is imports, so parametrised tests start theirs ahead."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest


AT_ONCE = 2


def python(program: str, *args: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """Run ``program`` as ``python -c`` does."""
    result = subprocess.run(
        [sys.executable, "-c", program, *args],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    if check and result.returncode:
        raise AssertionError(result.stderr[-4000:])
    return result


@contextmanager
def started_ahead(request: pytest.FixtureRequest, test: str, run: Callable) -> Iterator[dict[tuple, Future]]:
    """Inside, ``run`` is called for every selected parameter set of ``test``, two at a time.

    Args:
        request: of a module's fixture.
        test: name of a parametrised test of the same module.
        run: takes the parameters of one test in their order.

    Returns:
        The parameters' values -> what becomes of the call.
    """
    selected = [item for item in request.session.items if item.path == request.path and item.originalname == test]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        calls = [tuple(item.callspec.params.values()) for item in selected]
        try:
            yield {call: pool.submit(run, *call) for call in calls}
        finally:
            pool.shutdown(cancel_futures=True)


def exit_code_of_fork(run: Callable[[], None]) -> int:
    """Run in a fork of this process, which has imported everything already; a signal's number is negative."""
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(240)
    assert process.exitcode is not None, "the fork did not end"
    return process.exitcode
