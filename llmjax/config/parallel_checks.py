"""Which settings of `parallel` go together, with each other and with the model; sizes are checked when devices are known."""

import re

from ml_collections import ConfigDict

from llmjax.errors import UserError


def check_parallel(c: ConfigDict) -> None:
    """Raise UserError for settings of `parallel` that are out of range or contradict others."""
    p, m = c.parallel, c.model

    def refuse(condition: bool, message: str) -> None:
        if condition:
            raise UserError(message)

    def divided(axis: str) -> bool:
        size = re.search(rf"\b{axis}=(-?\d+)", p.mesh)
        return size is not None and size[1] != "1"

    refuse(
        p.rounds > 1 and not divided("pipeline"),
        f"parallel.rounds={p.rounds} are turns through the stages of a pipeline, and parallel.mesh={p.mesh!r} has none: "
        "set it to 1, or give the mesh the axis pipeline",
    )
    refuse(
        divided("pipeline") and m.norm == "batch",
        "model.norm=batch takes statistics over all rows of a micro-batch, and a pipeline sends its parts through one "
        "after another: choose another norm, or a mesh without the axis pipeline",
    )
    refuse(
        divided("pipeline") and c.objective.recurrence > 1,
        f"objective.recurrence={c.objective.recurrence} hands what every layer made of one part of a row to the next, which a "
        "pipeline does not: set it to 1, or use a mesh without the axis pipeline",
    )
    refuse(
        divided("context") and p.context == "ring" and m.attention_dropout > 0,
        "parallel.context=ring never has the weights of attention that model.attention_dropout acts on: set it to 0, or "
        "parallel.context=gather",
    )
    refuse(
        p.sequence and not divided("tensor"),
        f"parallel.sequence divides positions over tensor, which parallel.mesh={p.mesh!r} does not have: set it to False",
    )
