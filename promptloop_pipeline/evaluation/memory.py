"""How much memory a run needs at its peak."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INTERVAL = 0.02  # seconds between two looks at what keeps no peak of its own

Memory = dict[str, dict[str, int]]


class Meter:
    """Peaks of memory while it is open, in laps. `found`, at the end, and each lap: device -> {"peak": bytes, "rise": bytes above
    what was held at the start (of the lap)}.

    "cuda:0", ...: what torch has allocated (`torch.cuda.max_memory_allocated`; its counters are reset at each lap, so meters do not
    nest). The driver's own share and the allocator's reserve come on top.
    "mps": `torch.mps.current_allocated_memory`, looked at every 20 ms, as Metal keeps no peak.
    "process": the resident memory of the whole process, libraries and all, looked at every 20 ms by a thread, which may miss what
    is freed at once. Where the kernel's own high-water mark (`getrusage`) rises meanwhile, that is taken: it misses nothing, but knows
    only records of the process's life, which is why it cannot serve alone: an arm after a larger one would show no rise. What an
    allocator keeps for itself after a free stays resident, so the rise of a second run is lower than that of a first one.
    """

    def __init__(self) -> None:
        self.found: Memory = {}
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="promptloop-memory", daemon=True)

    def __enter__(self) -> Meter:
        self._begin()
        self._first = dict(self._start)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watcher.join()
        self.lap()

    def lap(self) -> Memory:
        """The peaks since the last one, or since the beginning."""
        with self._lock:
            self._look()
            if (new := _high_water()) > self._record:
                self._highest["process"] = max(self._highest["process"], new)
            peaks = self._highest | _cuda(peak=True)
            lap = {name: {"peak": peak, "rise": peak - self._start.get(name, 0)} for name, peak in peaks.items()}
            for name, peak in peaks.items():
                most = max(peak, self.found.get(name, {}).get("peak", 0))
                self.found[name] = {"peak": most, "rise": most - self._first.get(name, 0)}
            self._begin()
        return lap

    def _begin(self) -> None:
        self._record, self._start = _high_water(), _now() | _cuda(peak=False)
        self._highest = _now()

    def _look(self) -> None:
        for name, value in _now().items():
            self._highest[name] = max(self._highest.get(name, 0), value)

    def _watch(self) -> None:
        while not self._ended.wait(INTERVAL):
            with self._lock:
                self._look()


@contextmanager
def peak_memory() -> Iterator[Memory]:
    """Yields a dict that is filled at the end; see `Meter`."""
    found: Memory = {}
    meter = Meter()
    try:
        with meter:
            yield found
    finally:
        found |= meter.found


def _cuda(peak: bool) -> dict[str, int]:
    """What each GPU's allocator held at its peak, or holds now; the latter begins a new peak."""
    import torch

    if not torch.cuda.is_initialized():
        return {}
    devices = range(torch.cuda.device_count())
    if peak:
        return {f"cuda:{d}": torch.cuda.max_memory_allocated(d) for d in devices}
    for d in devices:
        torch.cuda.reset_peak_memory_stats(d)
    return {f"cuda:{d}": torch.cuda.memory_allocated(d) for d in devices}


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
