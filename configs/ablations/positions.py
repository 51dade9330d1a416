"""How the model knows positions.

    llmjax sweep --config configs/ablations/positions.py

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
        "none": {"model.position": "none"},
        "learned": {"model.position": "learned"},
        "sinusoidal": {"model.position": "sinusoidal"},
        "alibi": {"model.position": "alibi"},
        "t5": {"model.position": "t5"},
        "half rotary": {"model.rotary_fraction": 0.5},
        "rotary base 1000": {"model.rotary_base": 1000.0},
    }
    return {"arms": arms, "seeds": 3}
