"""Whether two cores share a cache just now.

A virtual machine's cores move about its host: two that shared a last-level cache a second ago may be far apart now, and
what one of them writes reaches the other several times more slowly. Threads that divide every operation of a small
network between them then gain little; two independent programs notice nothing.
"""

from __future__ import annotations

import os
import threading
from time import perf_counter_ns

import numpy as np

KIB, TIMES = 512, 40  # fits the private caches of one core
APART = 2.5  # 1.3 to 1.9 were measured where a cache is shared, 3.3 to 4.5 where none is
PATIENCE = 1.0  # seconds


def handover() -> float | None:
    """How many times as long a core takes to read what the other has just written as to read it again.

    None unless there are exactly two usable cores, to which threads can be bound: where there are more, a model's
    threads need not run on those that would be asked about. Takes about 10 ms.
    """
    if not hasattr(os, "sched_setaffinity") or len(cores := sorted(os.sched_getaffinity(0))) != 2:
        return None
    shared = np.zeros(KIB * 256, np.float32)
    empty, full = threading.Semaphore(0), threading.Semaphore(0)
    taken: list[tuple[int, int]] = []

    def write() -> None:
        if not _bound(cores[0]):
            return
        for _ in range(TIMES):
            if not empty.acquire(timeout=PATIENCE):
                return
            np.add(shared, 1, out=shared)
            full.release()

    def read() -> None:
        if not _bound(cores[1]):
            return
        for _ in range(TIMES):
            empty.release()
            if not full.acquire(timeout=PATIENCE):
                return
            start = perf_counter_ns()
            shared.max()
            middle = perf_counter_ns()
            shared.max()
            taken.append((middle - start, perf_counter_ns() - middle))

    threads = [threading.Thread(target=one) for one in (write, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(taken) < TIMES:
        return None
    first, again = np.median(np.array(taken), 0)
    return float(first / again)


def _bound(core: int) -> bool:
    """Bind the calling thread to ``core``; False where that is not allowed."""
    try:
        os.sched_setaffinity(threading.get_native_id(), [core])
    except OSError:
        return False
    return True


def apart() -> bool | None:
    """Whether the two usable cores share no cache; None where that cannot be told."""
    found = handover()
    return None if found is None else found > APART
