"""How much memory a run needs at its peak."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INTERVAL = 0.02  # seconds between two looks at what keeps no peak of its own

Memory = dict[str, dict[str, int]]


@contextmanager
def peak_memory() -> Iterator[Memory]:
    """Yields a dict that is filled at the end: device -> {"peak": bytes, "rise": bytes above what was held at the start}.

    "cuda:0", ...: what torch has allocated (`torch.cuda.max_memory_allocated`; its counters are reset at the start, so blocks do not
    nest). The driver's own share and the allocator's reserve come on top.
    "mps": `torch.mps.current_allocated_memory`, looked at every 20 ms, as Metal keeps no peak.
    "process": the resident memory of the whole process, libraries and all, looked at every 20 ms by a thread, which may miss what
    is freed at once. Where the kernel's own high-water mark (`getrusage`) rises meanwhile, that is taken: it misses nothing, but knows
    only records of the process's life, which is why it cannot serve alone: an arm after a larger one would show no rise. What an
    allocator keeps for itself after a free stays resident, so the rise of a second run is lower than that of a first one.
    """
    import torch

    found: Memory = {}
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else range(0)
    at_start = {d: torch.cuda.memory_allocated(d) for d in cuda}
    for d in cuda:
        torch.cuda.reset_peak_memory_stats(d)
    record = _high_water()
    start = _now()
    highest = dict(start)
    ended = threading.Event()

    def look() -> None:
        for name, value in _now().items():
            highest[name] = max(highest.get(name, 0), value)

    def watch() -> None:
        while not ended.wait(INTERVAL):
            look()

    watcher = threading.Thread(target=watch, name="promptloop-memory", daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()
        look()
        if (new := _high_water()) > record:
            highest["process"] = max(highest["process"], new)
        found |= {name: {"peak": peak, "rise": peak - start.get(name, 0)} for name, peak in highest.items()}
        for d in range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ():
            peak = torch.cuda.max_memory_allocated(d)
            found[f"cuda:{d}"] = {"peak": peak, "rise": peak - at_start.get(d, 0)}


def _now() -> dict[str, int]:
    import psutil
    import torch

    mps: Any = {"mps": torch.mps.current_allocated_memory()} if torch.backends.mps.is_available() else {}
    return {"process": psutil.Process().memory_info().rss, **mps}


def _high_water() -> int:
    """Bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
