"""The share of general text in continued pretraining: the quickstart's model goes on with Python's regression tests.

    llmjax run --config configs/quickstart.py
    llmjax sweep --config configs/ablations/replay.py

The first command trains the model of `train.init_from`. The general text is the standard library, from which that model
comes. The arms compare bits per byte of held-out text of both sources, up to 300 kB of each; the results of a run also
have `bits_per_byte/general` (what the model keeps) and `bits_per_byte/domain` (what it learns). The study has a control
and a folder of its own. Python's regression tests must be installed; some distributions package them apart.

Three paired seeds, about a minute of two cores a run. Not run yet: `python benchmarks/ablations.py --only replay` runs
it and writes results/ablations.json.
"""

from typing import Any

from llmjax.config import ConfigDict, ablation_run, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """The control: no replay."""
    parse_arg(arg)
    c = ablation_run()
    c.name = "ablations-replay"
    c.data.sources = ("stdlib", "stdlib-tests")
    c.data.replay = ("stdlib",)
    c.data.replay_percent = 0.0
    c.train.init_from = "runs/quickstart"
    c.train.eval_first = True
    return c


def get_sweep(arg: str = "") -> dict[str, Any]:
    """The arms."""
    arms = {f"{percent}%": {"data.replay_percent": float(percent)} for percent in (0, 1, 5, 10, 25, 50)}
    return {"arms": arms, "seeds": 3}
