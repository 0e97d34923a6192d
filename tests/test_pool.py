"""pytest tests/test_pool.py: the thread pool runs every part of every job once, however its threads are scheduled."""
from __future__ import annotations

import ctypes
import time
from collections import Counter

import pytest

from sbedge.runtime.native.library import load_native

lib = load_native()
if lib is None:
    pytest.skip("libsbedge is not built here", allow_module_level=True)

WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)


@pytest.fixture(params=[1, 2, 3, 8])
def pool(request):
    pool = lib.pool_new(request.param)
    assert lib.pool_threads(pool) == request.param
    yield pool
    lib.pool_free(pool)


def test_every_part_runs_once_and_all_are_done_on_return(pool):
    for job in range(300):
        parts, seen = job % 7 + 1, []

        @WORK
        def work(argument, part, count, seen=seen, parts=parts, job=job):
            assert (argument or 0, count) == (job, parts)
            if part == job % 3:
                time.sleep(0.0003)      # longer than a thread spins: those that wait go to sleep
            seen.append(part)

        lib.pool_run(pool, ctypes.cast(work, ctypes.c_void_p), job, parts)
        assert Counter(seen) == Counter(range(parts))
        if job % 50 == 0:
            time.sleep(0.002)           # the workers sleep when the next job comes


def test_nothing_to_do_is_no_job(pool):
    lib.pool_run(pool, None, None, 0)


def test_a_pool_that_never_worked_stops_at_once():
    for threads in (1, 4):
        lib.pool_free(lib.pool_new(threads))
