"""The sequence length, at equal tokens a step.

    llmjax sweep --config configs/ablations/length.py

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
        "64": {"train.sequence_length": 64, "train.batch_size": 32},
        "128": {"train.sequence_length": 128, "train.batch_size": 16},
        "512": {"train.sequence_length": 512, "train.batch_size": 4},
        "1024": {"train.sequence_length": 1024, "train.batch_size": 2},
    }
    return {"arms": arms, "seeds": 3}
