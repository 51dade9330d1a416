"""Settings: the base with every key (`settings.py`), config files and the command line (`files.py`, `values.py`), and
the combinations that are refused (`checks.py`).

A config file is a Python file with `get_config(arg="")`. It starts from `base()`, changes some keys and returns the
result. Setting a key that is not in `base()` is an error that names the closest key. Library code never reads a key with
a default.
"""

from llmjax.config.chains import is_chain, load_chain, of_link, run_of
from llmjax.config.checks import CHOICES, check
from llmjax.config.files import derivation, load, override, sweep
from llmjax.config.model_checks import bounded_positions, head_size
from llmjax.config.runs import ablation_run, large_run, post_run, tiny_run
from llmjax.config.settings import base, comments
from llmjax.config.values import (
    ConfigDict,
    differences,
    duration,
    flatten,
    from_json,
    parse_arg,
    parse_duration,
    set_key,
    to_json,
)

__all__ = [
    "CHOICES",
    "ConfigDict",
    "ablation_run",
    "base",
    "bounded_positions",
    "check",
    "comments",
    "derivation",
    "differences",
    "duration",
    "flatten",
    "from_json",
    "head_size",
    "is_chain",
    "large_run",
    "load",
    "load_chain",
    "of_link",
    "override",
    "parse_arg",
    "parse_duration",
    "post_run",
    "run_of",
    "set_key",
    "sweep",
    "tiny_run",
    "to_json",
]
