"""Rates that are tuned on a small model, for a large one. The guide is docs/transfer.md.

    llmjax sweep --config configs/transfer.py                                five rates of the small model
    llmjax sweep --config configs/transfer.py:bracket,rate=0.02              rate x batch around the best, 3 x 3
    llmjax sweep --config configs/transfer.py:bracket,rate=0.02,width=128    the same at twice the width
    llmjax run --config configs/transfer.py:rate=0.02,width=256,layers=8     the large model
    python configs/transfer.py rate=0.02,width=256,layers=8                  what the large model gets

The small model has width 64 and 2 layers, and trains on 0.6M tokens of this Python's standard library: about half a minute
of two cores. `width=` and `layers=` change the model, and with `init=completep` (the default) the rate stays: the table of
model/parametrization.py changes with them. `init=gpt2` is the control, whose best rate moves. Under Muon `rate` is that of
its matrices, and embeddings and vectors have half of it. `llmjax run` and `llmjax train` print the table too.
"""

import sys
from typing import Any

from llmjax.config import ConfigDict, base, parse_arg
from llmjax.model.parametrization import scales

WIDTH, LAYERS, HEAD = 64, 2, 16  # of the small model; the size of a head stays
RATES = (0.0025, 0.005, 0.01, 0.02, 0.04)
# One parameter of each kind.
KINDS = (
    "embedding", "layers/attention_norm/scale", "layers/attention/query/kernel", "layers/attention/out/kernel",
    "layers/mlp/up/kernel", "layers/mlp/down/kernel", "final_norm/scale", "head/kernel",
)  # fmt: skip


def arguments(arg: str) -> ConfigDict:
    """The arguments of this file: rates or bracket, and sizes, rate, batch, optimizer and scheme."""
    return parse_arg(
        arg, choices=("rates", "bracket"), width=WIDTH, layers=LAYERS, rate=0.02, batch=16, optimizer="muon", init="completep"
    )  # fmt: skip


def get_config(arg: str = "") -> ConfigDict:
    """The model of `width` and `layers` at `rate`."""
    given = arguments(arg)
    c = base()
    c.name = f"transfer-{given.choice}-{given.optimizer}-{given.init}-{given.width}x{given.layers}"
    c.tokenizer.vocab_size = 1024
    c.model.width, c.model.layers = given.width, given.layers
    c.model.heads, c.model.mlp_width = given.width // HEAD, 3 * given.width
    c.model.tie_embeddings = False
    c.model.init, c.model.mup_base_width, c.model.mup_base_layers = given.init, WIDTH, LAYERS
    c.model.scan_unroll = given.layers
    c.optimizer.name = given.optimizer
    c.optimizer.learning_rate = given.rate / (2 if given.optimizer == "muon" else 1)
    c.optimizer.muon_learning_rate = given.rate
    c.schedule.name, c.schedule.final, c.schedule.warmup = "linear", 0.0, "5%"
    c.train.batch_size, c.train.sequence_length = given.batch, 128
    c.train.duration = "0.6M tokens"
    c.checkpoint.every = "100%"
    c.eval.max_bytes = 300_000
    c.eval.xz = False
    return c


def settings(optimizer: str, rate: float) -> dict[str, Any]:
    """What a rate changes."""
    if optimizer == "muon":
        return {"optimizer.muon_learning_rate": rate, "optimizer.learning_rate": rate / 2}
    return {"optimizer.learning_rate": rate}


def get_sweep(arg: str = "") -> dict[str, Any]:
    """`rates`: the five of RATES. `bracket`: half and twice the rate and the batch around those given, at equal tokens."""
    given = arguments(arg)
    if given.choice == "rates":
        return {
            "arms": {f"rate {rate:g}": settings(given.optimizer, rate) for rate in RATES},
            "control": "",
            "seeds": 1,
        }
    arms = {
        f"rate {given.rate * by:g}, batch {batch}": settings(given.optimizer, given.rate * by)
        | {"train.batch_size": batch}
        for by in (1.0, 0.5, 2.0)
        for batch in (given.batch, given.batch // 2, 2 * given.batch)
    }
    return {"arms": arms, "seeds": 1}


def table(arg: str) -> str:
    """What each kind of parameter gets, as text."""
    c = get_config(arg)
    cells: list[tuple[str, ...]] = [("parameter", "std", "multiplier", "optimizer", "rate", "decay", "epsilon")]
    for name in KINDS:
        muon = c.optimizer.name == "muon" and name.startswith("layers/") and name.endswith("kernel")
        rule = "muon" if muon else "adamw" if c.optimizer.name == "muon" else c.optimizer.name
        of = scales(c.model, name, optimizer=rule)
        peak = c.optimizer.muon_learning_rate if muon else c.optimizer.learning_rate
        decay = c.optimizer.weight_decay * of.decay if name.endswith(("kernel", "embedding")) else 0.0
        numbers = (peak * of.rate, decay, *(() if muon else (c.optimizer.epsilon * of.epsilon,)))
        cells.append(
            (name, f"x {of.std:.4g}", f"x {of.multiplier:.4g}", rule, *(f"{x:.4g}" for x in numbers), *("-",) * muon)
        )
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


if __name__ == "__main__":
    print(table(sys.argv[1] if len(sys.argv) > 1 else ""))
