"""L1 and L2 penalties in the loss, in place of weight decay.

    llmjax sweep --config configs/ablations/penalties.py

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
        "no decay": {"optimizer.weight_decay": 0.0},
        "l1 1e-6": {"optimizer.weight_decay": 0.0, "objective.l1": 1e-6},
        "l1 1e-5": {"optimizer.weight_decay": 0.0, "objective.l1": 1e-5},
        "l2 1e-5": {"optimizer.weight_decay": 0.0, "objective.l2": 1e-5},
        "l2 1e-4": {"optimizer.weight_decay": 0.0, "objective.l2": 1e-4},
    }
    return {"arms": arms, "seeds": 3}
