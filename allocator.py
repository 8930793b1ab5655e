"""Memory that is used again: freed tensors' on a CPU, and segments that grow on CUDA.

A training step frees and makes again the same hundreds of megabytes. By default the C library of
Linux returns large blocks to the system, which hands out zeroed pages anew: on two CPU cores up to
a tenth of the time of a step goes there.
"""

import ctypes
import os
import sys

import torch

# malloc.h of glibc
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory():
    """Makes malloc keep what is freed, for the rest of this process. Returns whether it could."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc: macOS, Windows, musl
        return False
    if sys.platform != "linux":
        return False
    # 32 MiB, the highest threshold there is. Larger blocks still come from the system: in one heap
    # with all the others they leave holes that are never filled (for WikiText-2, 40% more memory).
    settings = {M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 2**26}
    return all(mallopt(name, value) == 1 for name, value in settings.items())


def use_expandable_segments():
    """Has CUDA's allocator grow its segments, so that random window lengths do not fragment them.

    The public way is a variable of the environment, which has to be set before torch is imported;
    what it says goes before.
    """
    if any(f"PYTORCH_{kind}ALLOC_CONF" in os.environ for kind in ("", "CUDA_", "HIP_")):
        return
    configure = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # newer torch's
    if configure is None:
        configure = getattr(torch._C, "_cuda_cudaCachingAllocator_set_allocator_settings", None)
    if configure is not None:
        configure("expandable_segments:True")
