"""llmjax: the whole life cycle of a large language model in JAX, from raw text to a model you talk to."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llmjax.startup import xla
from llmjax.version import __version__

__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from llmjax.infer.language_model import LanguageModel
    from llmjax.startup.cache import Cache

xla.configure()


def load(
    path: str | Path,
    *,
    step: int | None = None,
    mesh: str = "",
    cache: "Cache | None" = None,
    adapters: Mapping[str, str | Path] | None = None,
) -> "LanguageModel":
    """Read the model of a run or a checkpoint: `llmjax.infer.language_model.load`, which is imported only now."""
    from llmjax.startup import timings

    with timings.phase("import the library"):
        from llmjax.infer import language_model

    return language_model.load(path, step=step, mesh=mesh, cache=cache, adapters=adapters)
