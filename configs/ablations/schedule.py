"""The learning rate over time.

    llmjax sweep --config configs/ablations/schedule.py

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
        "constant": {"schedule.name": "constant"},
        "step": {"schedule.name": "step"},
        "exponential": {"schedule.name": "exponential", "schedule.final": 0.1},
        "cosine": {"schedule.name": "cosine"},
        "inverse_sqrt": {"schedule.name": "inverse_sqrt"},
        "wsd": {"schedule.name": "wsd"},
        "no warm-up": {"schedule.warmup": "0%"},
        "warm-up 10%": {"schedule.warmup": "10%"},
    }
    return {"arms": arms, "seeds": 3}
