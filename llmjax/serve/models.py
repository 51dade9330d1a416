"""Runs as models that a server answers with, and their engines."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from llmjax.infer.command import engine_settings, request_settings
from llmjax.infer.engine import Engine
from llmjax.infer.language_model import load
from llmjax.objectives import OBJECTIVES
from llmjax.serve.server import LIKELIEST, Served
from llmjax.startup.cache import cache_of


def open_model(
    folder: Path, c: ConfigDict, *, name: str, own: ConfigDict | None = None, adapters: Mapping[str, Path] | None = None
) -> Served:
    """Load the model of a run or of a checkpoint.

    Args:
        c: the settings of the engine, under `infer`.
        own: the settings of requests that give none, under `generate`; None: those of the run.
        adapters: name -> folder of adapters of the model; see `server.with_adapters`.
    """
    model = load(folder, mesh=c.infer.mesh, cache=cache_of(c), adapters=adapters)
    writes = OBJECTIVES[model.config.objective.name].reads_left_to_right and not model.config.model.encoder_layers
    room = model.config.model.max_length
    settings = request_settings(own if own is not None else model.config)
    return Served(name, model, settings, min(c.infer.length or room, room), writes)


def engines(models: Sequence[Served], c: ConfigDict) -> Mapping[str, Engine]:
    """The engines of the models that write, by name, compiled."""
    found = {}
    for one in models:
        if one.writes and not one.parent:
            found[one.name] = one.model.engine(length=one.room, likeliest=LIKELIEST, **engine_settings(c))
            found[one.name].warm_up()
    return found
