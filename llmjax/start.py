"""The installed command, before it imports anything that takes time."""

import importlib.util
import os
import sys
from typing import NoReturn

from llmjax.startup import accelerators
from llmjax.version import __version__

# glibc reads this at its start. Page faults of 4 KiB pages were a sixth of a step's time (benchmarks/nanogpt.py, medium).
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def platforms() -> dict[str, str]:
    """Keep JAX on the CPU where there is no TPU: with libtpu installed, for plans, it would ask the network for one."""
    if "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None:
        return {}
    return {} if accelerators.present() else {"JAX_PLATFORMS": "cpu"}


def script() -> NoReturn:
    """The installed command: `cli.main`, on Linux in a process whose malloc asks for huge pages."""
    if sys.argv[1:] == ["--version"]:
        print(f"llmjax {__version__}")
        sys.exit(0)
    os.environ.update(platforms())
    if sys.platform == "linux" and not HUGE_PAGES.keys() & os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | HUGE_PAGES)
    from llmjax.cli import main

    sys.exit(main())
