"""Time and memory of what runs in this process: CPU time or device events, resident memory or the allocator's count."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class CpuMeter:
    """CPU time of the process on one thread, wall time on several; memory as the system counts it.

    Memory is what is resident beyond what was when the meter was made; 0 on a system without ``/proc``.
    """

    def __init__(self, threads: int):
        self._clock = time.process_time if threads == 1 else time.perf_counter
        self._base = _resident("VmRSS")

    def milliseconds(self, call: Callable[[], object], times: int) -> float:
        """Of one call, over so many."""
        begun = self._clock()
        for _ in range(times):
            call()
        return 1000 * (self._clock() - begun) / times

    def reset_peak(self) -> None:
        """Forget what building took: garbage is collected, and freed pages go back to the system."""
        gc.collect()
        if _RESET.exists():
            ctypes.CDLL(None).malloc_trim(0)
            _RESET.write_text("5", encoding="ascii")  # Linux: VmHWM starts again at what is resident

    def peak(self) -> int:
        """Bytes at the highest point since :meth:`reset_peak`."""
        return max(_resident("VmHWM") - self._base, 0)


def _resident(field: str) -> int:
    """Bytes, from the process's status."""
    if not _STATUS.exists():
        return 0
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


class CudaMeter:
    """Time between device events, bytes from torch's allocator."""

    def __init__(self, device: torch.device):
        self._device = device

    def milliseconds(self, call: Callable[[], object], times: int) -> float:
        """Of one call, over so many."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / times

    def reset_peak(self) -> None:
        """Forget what building took."""
        gc.collect()
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        """Bytes at the highest point since :meth:`reset_peak`."""
        return torch.cuda.max_memory_allocated(self._device)


def meter(device: str, threads: int) -> CpuMeter | CudaMeter:
    """The meter of a device."""
    return CpuMeter(threads) if device == "cpu" else CudaMeter(torch.device(device))
