"""Whether this machine has a TPU or a GPU, found out by its device files, before JAX starts."""

from pathlib import Path

DEVICE_FILES = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd")  # of TPUs, and of GPUs of two makers


def present() -> bool:
    """Whether there is a TPU or a GPU."""
    return any(any(Path("/dev").glob(name)) for name in DEVICE_FILES)
