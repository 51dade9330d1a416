"""Vocabulary and tokenizer. Bits per byte compare them.

    llmjax sweep --config configs/ablations/tokenizer.py

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
        "1024": {"tokenizer.vocab_size": 1024},
        "2048": {"tokenizer.vocab_size": 2048},
        "8192": {"tokenizer.vocab_size": 8192},
        "unigram": {"tokenizer.kind": "unigram"},
        "byte": {"tokenizer.kind": "byte"},
        "digits together": {"tokenizer.split_digits": False},
    }
    return {"arms": arms, "seeds": 3}
