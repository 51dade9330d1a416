"""The learning rates: of Muon's matrices, and of the rest.

    llmjax sweep --config configs/ablations/rate.py

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
        "muon 0.005": {"optimizer.muon_learning_rate": 0.005},
        "muon 0.01": {"optimizer.muon_learning_rate": 0.01},
        "muon 0.04": {"optimizer.muon_learning_rate": 0.04},
        "muon 0.08": {"optimizer.muon_learning_rate": 0.08},
        "rest 0.003": {"optimizer.learning_rate": 0.003},
        "rest 0.03": {"optimizer.learning_rate": 0.03},
    }
    return {"arms": arms, "seeds": 3}
