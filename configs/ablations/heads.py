"""Heads, and key and value heads.

    llmjax sweep --config configs/ablations/heads.py

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
        "1 head": {"model.heads": 1},
        "2 heads": {"model.heads": 2},
        "8 heads": {"model.heads": 8},
        "2 kv heads": {"model.kv_heads": 2},
        "1 kv head": {"model.kv_heads": 1},
    }
    return {"arms": arms, "seeds": 3}
