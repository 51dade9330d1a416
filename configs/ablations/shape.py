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
        "2 x 184": {"model.layers": 2, "model.width": 184},
        "8 x 88": {"model.layers": 8, "model.width": 88, "model.scan_unroll": 8},
        "16 x 64": {"model.layers": 16, "model.width": 64, "model.scan_unroll": 16},
    }
    return {"arms": arms, "seeds": 3}
