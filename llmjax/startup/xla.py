"""Flags that XLA needs before JAX starts; `import llmjax` sets them."""

import os
import sys
import warnings
from pathlib import Path

# From jaxlib 0.10.2 on, XLA hands reductions on the CPU to YNNPACK, together with the operations before them. Some results
# are silently wrong: the last row of a reduction (0.10.2; jax issue 39103), and sums of a product with a constant matrix,
# by thirty orders of magnitude (still in 0.12.0.1). Seven dimensions crash (0.10.2 and 0.11.0; jax issues 39257, 40412).
# tests/test_xla.py has one of each. Without reductions all are right, so products alone stay with YNNPACK.
# An unknown flag ends the process, so only versions that are known to have the flag get it.
FIRST, AFTER = (0, 10, 2), (0, 13)
FLAG, VALUE = "--xla_cpu_experimental_ynn_fusion_type", "-reduce"


def configure() -> None:
    """Add to XLA_FLAGS what this version of jaxlib needs to compute right. Flags of the user stay.

    Warns:
        RuntimeWarning: JAX has started already and no longer reads XLA_FLAGS.
    """
    try:
        from jaxlib.version import __version__ as version  # without jaxlib's libraries: `llmjax --help` stays fast
    except ImportError:
        return  # the import of jax says what is missing
    if not FIRST <= _numbers(version) < AFTER:
        return
    flags = _flags()
    if FLAG in flags:
        return
    os.environ["XLA_FLAGS"] = f"{flags} {FLAG}={VALUE}".strip()
    bridge = sys.modules.get("jax._src.xla_bridge")
    if bridge is not None and bridge.backends_are_initialized():
        warnings.warn(
            f"JAX started before llmjax was imported, and jaxlib {version} computes some sums on CPUs wrong: import "
            f"llmjax before the first computation, or start Python with XLA_FLAGS={FLAG}={VALUE} in its environment",
            RuntimeWarning,
            stacklevel=3,
        )


def _numbers(version: str) -> tuple[int, ...]:
    """'0.10.2' and '0.10.2.dev20260601' -> (0, 10, 2)."""
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def _flags() -> str:
    """The flags in XLA_FLAGS, or in the file that it names instead."""
    given = os.environ.get("XLA_FLAGS", "").strip()
    if not given or given.startswith("-"):
        return given
    path = Path(given)
    return path.read_text().strip() if path.is_file() else ""  # XLA passes over a file that is not there as well
