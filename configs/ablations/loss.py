"""Terms of the loss.

    llmjax sweep --config configs/ablations/loss.py

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
        "label smoothing 0.1": {"objective.label_smoothing": 0.1},
        "z-loss 1e-4": {"objective.z_loss": 1e-4},
        "focal 1": {"objective.focal": 1.0},
        "two tokens ahead": {"objective.name": "multi_token", "model.ahead": 2},
    }
    return {"arms": arms, "seeds": 3}
