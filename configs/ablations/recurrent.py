"""What mixes tokens: attention, recurrent mixers, and hybrids of both; the control is convolutions and attention in turn.

    llmjax sweep --config configs/ablations/recurrent.py

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
        "attention": {"model.pattern": ("global",)},
        "rnn": {"model.pattern": ("rnn",)},
        "lstm": {"model.pattern": ("lstm",)},
        "rglru": {"model.pattern": ("rglru",)},
        "mamba2": {"model.pattern": ("mamba2",)},
        "rglru and attention": {"model.pattern": ("rglru", "rglru", "rglru", "global")},
        "mamba2 and attention": {"model.pattern": ("mamba2", "mamba2", "mamba2", "global")},
        "local attention": {"model.pattern": ("local",), "model.window": 64},
    }
    return {"arms": arms, "seeds": 3}
