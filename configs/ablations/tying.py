"""One matrix for embeddings and output head, or two.

    llmjax sweep --config configs/ablations/tying.py

Three paired seeds against the quickstart's settings, about a minute of two cores a run. Not run yet:
`python benchmarks/ablations.py` runs the whole shelf and writes results/ablations.json.
"""

from typing import Any

from llmjax.config import ConfigDict, ablation_run, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """The control."""
    parse_arg(arg)
    return ablation_run()


def get_sweep(arg: str = "") -> dict[str, Any]:
    """The arms."""
    arms = {
        "control": {},
        "untied": {"model.tie_embeddings": False},
        "untied, head with bias": {"model.tie_embeddings": False, "model.bias": ("head",)},
    }
    return {"arms": arms, "seeds": 3}
