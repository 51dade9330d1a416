"""Weight decay.

    llmjax sweep --config configs/ablations/decay.py

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
        "0": {"optimizer.weight_decay": 0.0},
        "0.01": {"optimizer.weight_decay": 0.01},
        "0.3": {"optimizer.weight_decay": 0.3},
        "1": {"optimizer.weight_decay": 1.0},
    }
    return {"arms": arms, "seeds": 3}
