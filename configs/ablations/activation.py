"""The activation of the MLP.

    llmjax sweep --config configs/ablations/activation.py

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
        "gelu": {"model.activation": "gelu"},
        "relu": {"model.activation": "relu"},
        "relu2": {"model.activation": "relu2"},
        "silu": {"model.activation": "silu"},
        "geglu": {"model.activation": "geglu"},
        "reglu": {"model.activation": "reglu"},
    }
    return {"arms": arms, "seeds": 3}
