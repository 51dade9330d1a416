"""The batch size, at equal tokens.

    llmjax sweep --config configs/ablations/batch.py

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
        "4": {"train.batch_size": 4, "train.duration": "280 steps"},
        "16": {"train.batch_size": 16, "train.duration": "70 steps"},
        "32": {"train.batch_size": 32, "train.duration": "35 steps"},
    }
    return {"arms": arms, "seeds": 3}
