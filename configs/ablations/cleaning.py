"""Steps of the preparation. An arm whose steps reject held-out modules is measured on fewer of them.

    llmjax sweep --config configs/ablations/cleaning.py

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
        "no steps": {"prepare.steps": ()},
        "near duplicates": {"prepare.steps": ("exact", "near")},
        "repeated passages": {"prepare.steps": ("exact", "substring")},
    }
    return {"arms": arms, "seeds": 3}
