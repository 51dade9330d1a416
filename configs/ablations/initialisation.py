"""How parameters start.

    llmjax sweep --config configs/ablations/initialisation.py

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
        "xavier": {"model.init": "xavier"},
        "lecun": {"model.init": "lecun"},
        "orthogonal": {"model.init": "orthogonal"},
        "mup": {"model.init": "mup"},
        "std 0.005": {"model.init_std": 0.005},
        "std 0.06": {"model.init_std": 0.06},
    }
    return {"arms": arms, "seeds": 3}
