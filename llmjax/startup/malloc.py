"""The memory of malloc: what is freed is kept for the next step, or given back. Both do nothing without glibc."""

import ctypes


def keep_freed() -> None:
    """Have glibc keep what is freed, before JAX's threads start.

    XLA on CPU allocates the work space of every step anew. If it is given back each time, its pages are mapped and zeroed
    again. Large pieces are kept in one arena only, and the threads of a small model would wait for its lock.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
    for parameter, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):  # -1: never
        libc.mallopt(parameter, value)


def give_back_freed() -> None:
    """Give back what is free: after compilation, hundreds of MB that LLVM has used and glibc would keep."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
