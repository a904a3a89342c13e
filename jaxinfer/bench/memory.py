"""The most memory that this process has had at once."""

import ctypes
import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_rss_mb() -> float:
    """Peak resident memory in megabytes of 2^20 bytes, since the start or the last `reset_peak`."""
    if _STATUS.is_file():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 1024)


def reset_peak() -> bool:
    """Counts the peak from now on; False where the system can't."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def release() -> None:
    """Gives back what was freed: building an engine leaves hundreds of megabytes with glibc."""
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if _has(library, "malloc_trim"):  # other C libraries have none
            library.malloc_trim(0)


def _has(library: ctypes.CDLL, name: str) -> bool:
    try:
        library[name]
    except AttributeError:
        return False
    return True
