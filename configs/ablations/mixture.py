"""Shares of two sources: the standard library, and its regression tests. Bits per byte of the library compare them.

    llmjax sweep --config configs/ablations/mixture.py

All arms read both sources with one tokenizer, so the study has a control and a folder of its own. The tests of a held-out
module are held out with it. Python's regression tests must be installed; some distributions package them apart.

Three paired seeds, about a minute of two cores a run. Not run yet: `python benchmarks/ablations.py --only mixture` runs
it and writes results/ablations.json.
"""

from typing import Any

from llmjax.config import ConfigDict, ablation_run, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """The control: each source weighs its size."""
    parse_arg(arg)
    c = ablation_run()
    c.name = "ablations-mixture"
    c.data.sources = ("stdlib", "stdlib-tests")
    return c


def get_sweep(arg: str = "") -> dict[str, Any]:
    """The arms."""
    arms = {
        "by size": {},
        "by the root of the size": {"data.mixture_temperature": 0.5},
        "alike": {"data.mixture_temperature": 0.0},
        "library": {"data.mixture": ("0%: stdlib=1",)},
        "library 90%": {"data.mixture": ("0%: stdlib=9 stdlib-tests=1",)},
        "tests": {"data.mixture": ("0%: stdlib-tests=1",)},
        "alike, then library": {"data.mixture": ("0%: stdlib=1 stdlib-tests=1", "80%: stdlib=1")},
    }
    return {"arms": arms, "seeds": 3, "metric": "bits_per_byte/stdlib"}
