"""Compiled loops over the UTF-8 bytes of Arrow arrays; everything here is about bytes, hashes and positions, not policy.

The compiled code is cached beside the modules (or in the user's cache folder where that cannot be written), so that
only the first process ever pays for compiling. Numba notices a changed module, but not a changed function that another
module's kernel has inlined: after editing `words.py`, remove the `__pycache__` of this folder.
"""

from collections.abc import Callable
from typing import Any

from llmjax.errors import UserError

try:
    import numba
except ImportError as error:
    raise UserError("preparing text needs numba and pyarrow: pip install 'llmjax[data]'") from error


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile at first call, without the interpreter's lock, and keep the compiled code where a folder can be written."""
    try:
        return numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # numba found no folder for the cache: a read-only installation without a home folder
        return numba.njit(nogil=True, error_model="numpy")(function)
