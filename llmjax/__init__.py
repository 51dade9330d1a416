"""llmjax: the whole life cycle of a large language model in JAX, from raw text to a model you talk to."""

from pathlib import Path
from typing import TYPE_CHECKING

from llmjax import xla

if TYPE_CHECKING:
    from llmjax.api import LanguageModel
    from llmjax.cache import Cache

__version__ = "0.2.0"

xla.configure()


def load(path: str | Path, *, step: int | None = None, mesh: str = "", cache: "Cache | None" = None) -> "LanguageModel":
    """Read the model of a run or a checkpoint; see `llmjax.api.load`. Nothing heavy is imported before this is called."""
    from llmjax import timings

    with timings.phase("import the library"):
        from llmjax import api

    return api.load(path, step=step, mesh=mesh, cache=cache)
