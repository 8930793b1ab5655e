"""Memory that is given back to this process, not to the system, when a tensor is freed.

A training step frees and makes again the same hundreds of megabytes. By default the C library of
Linux returns each large block to the system, which hands out zeroed pages anew: on two CPU cores a
tenth to a sixth of the time of a step goes there.
"""

import ctypes
import sys

# malloc.h of glibc
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory():
    """Makes malloc keep what is freed, for the rest of this process. Returns whether it could."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc: macOS, Windows, musl
        return False
    if sys.platform != "linux":
        return False
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 2**26}
    return all(mallopt(name, value) == 1 for name, value in settings.items())
