"""Depth against width, at equal parameters of the blocks.

    llmjax sweep --config configs/ablations/shape.py

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
        "1 x 384": {"model.layers": 1, "model.width": 384, "model.heads": 8},
        "2 x 272": {"model.layers": 2, "model.width": 272},
        "8 x 136": {"model.layers": 8, "model.width": 136, "model.scan_unroll": 8},
        "16 x 96": {"model.layers": 16, "model.width": 96, "model.scan_unroll": 16},
    }
    return {"arms": arms, "seeds": 3}
