"""Experts against a dense MLP, whose width is an expert's.

    llmjax sweep --config configs/ablations/sparse.py

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
        "4 experts, 1 active": {"model.moe.experts": 4, "model.moe.active": 1, "model.moe.normalize": False},
        "4 experts, 2 active": {"model.moe.experts": 4, "model.moe.active": 2},
        "8 experts, 2 active": {"model.moe.experts": 8, "model.moe.active": 2},
        "4 experts, 1 active, 1 shared": {
            "model.moe.experts": 4,
            "model.moe.active": 1,
            "model.moe.shared": 1,
            "model.moe.normalize": False,
        },
    }
    return {"arms": arms, "seeds": 3}
