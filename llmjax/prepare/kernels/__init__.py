"""Compiled loops over the UTF-8 bytes of Arrow arrays.

The compiled code is cached beside the modules, or in the user's cache folder if that cannot be written, so only the first
process compiles. Numba notices a changed module, but not a changed function that another module's kernel has inlined:
after a change of `words.py`, remove the `__pycache__` of this folder.
"""

from collections.abc import Callable
from typing import Any

from llmjax.errors import UserError

try:
    import numba
except ImportError as error:
    raise UserError("preparing text needs numba and pyarrow: pip install 'llmjax[data]'") from error


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile at the first call, to run without the interpreter's lock, and cache the code if a folder can be written."""
    try:
        return numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # numba found no folder for the cache: a read-only installation without a home folder
        return numba.njit(nogil=True, error_model="numpy")(function)
