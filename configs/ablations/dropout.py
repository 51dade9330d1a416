"""Dropout, and layers that are skipped.

    llmjax sweep --config configs/ablations/dropout.py

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
        "0.1": {"model.dropout": 0.1},
        "0.2": {"model.dropout": 0.2},
        "embedding 0.1": {"model.embedding_dropout": 0.1},
        "attention 0.1": {"model.attention_dropout": 0.1},
        "layers 0.1": {"model.layer_drop": 0.1},
    }
    return {"arms": arms, "seeds": 3}
