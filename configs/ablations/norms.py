"""Norms and their place; batch norm among them.

    llmjax sweep --config configs/ablations/norms.py

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
        "layer": {"model.norm": "layer"},
        "batch": {"model.norm": "batch"},
        "none": {"model.norm": "none"},
        "post": {"model.norm_place": "post"},
        "sandwich": {"model.norm_place": "sandwich"},
        "after": {"model.norm_place": "after"},
        "not of queries and keys": {"model.qk_norm": False},
        "no final norm": {"model.final_norm": False},
    }
    return {"arms": arms, "seeds": 3}
