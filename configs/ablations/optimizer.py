"""The optimizer. Rates are usual ones, not tuned for each.

    llmjax sweep --config configs/ablations/optimizer.py

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
        "adamw 0.003": {"optimizer.name": "adamw", "optimizer.learning_rate": 0.003},
        "adamw 0.01": {"optimizer.name": "adamw", "optimizer.learning_rate": 0.01},
        "lion 0.001": {"optimizer.name": "lion", "optimizer.learning_rate": 0.001},
        "adafactor 0.03": {"optimizer.name": "adafactor", "optimizer.learning_rate": 0.03},
        "sgd 1": {"optimizer.name": "sgd", "optimizer.learning_rate": 1.0},
    }
    return {"arms": arms, "seeds": 3}
