"""Time and memory of a call, as the benchmarks take them."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path


def seconds(function: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def added_peak(function: Callable[[], object], rehearse: bool = True) -> int:
    """Bytes by which the resident memory rises at most while `function` runs (Linux).

    Args:
        function: what is measured.
        rehearse: call it once before, so that what is allocated once and for all does not count.
    """
    if rehearse:
        function()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the recorded peak back to the present size
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
