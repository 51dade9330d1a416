"""One dial, the depth, from which everything else follows: d2 for a laptop, d12 for a GPU, d32 for a pod.

    llmjax run --config configs/dial.py:d4
    llmjax run --config configs/dial.py:d12,tokens_per_parameter=20 --config.data.sources='["corpus/"]'
    python configs/dial.py d12                  the table of what follows, with formulas and sources

The idea of one dial with printed rules is nanochat's. This project has not fitted the rules itself. Each row of the
table says whether its source measured the rule, or whether it is assumed to hold for other data and sizes. Hardware
and time follow from the depth: d2 sees 18M tokens and fits a laptop, d12 sees 2.2B and wants a GPU. Only the first
steps were run here. `llmjax run` and `llmjax train` print the table too.
"""

import math
import sys
from typing import NamedTuple

from ml_collections import ConfigDict

from llmjax.config import base, parse_arg
from llmjax.errors import UserError


class Row(NamedTuple):
    """One derived setting: its config key, value, formula, source, and "measured" (there) or "assumed"."""

    key: str
    value: float | int | str
    formula: str
    source: str
    status: str


def derive(depth: int, *, tokens_per_parameter: float = 20.0) -> list[Row]:
    """The settings that follow from the depth, in the order in which they are derived."""
    width = 64 * depth
    heads = depth // 2 if depth % 2 == 0 else depth
    # Matrices of the layers (4 D^2 for attention, 8 D^2 for a gated MLP of 8/3 D) and the head.
    vocab = 32_768 if depth >= 8 else 4096
    parameters = 12 * depth * width**2 + vocab * width
    tokens = tokens_per_parameter * parameters
    length = 1024 if depth >= 8 else 256
    # The power law for the batch, through 0.5M tokens for a model trained on 10B.
    batch_tokens = 2 ** round(math.log2(524_288 * (tokens / 1e10) ** 0.383))
    batch = max(batch_tokens // length, 4)
    batch_tokens = batch * length
    rate = 0.02 * math.sqrt(batch_tokens / 524_288) * (768 / width) ** 0.5
    rate = min(max(rate, 0.002), 0.02)
    embedding_rate = 0.3 * rate * math.sqrt(768 / width)
    decay = min(0.1, 0.1 * math.sqrt(batch_tokens / 524_288) * (1e10 / tokens))
    steps = max(round(tokens / batch_tokens), 100)
    nanochat = "nanochat (Karpathy 2026)"
    return [
        Row("model.layers", depth, "depth", "the dial", "given"),
        Row("model.width", width, "64 x depth", nanochat, "measured there for d10 to d32"),
        Row(
            "model.heads",
            heads,
            "width / 128, or width / 64 when the depth is odd",
            nanochat,
            "measured there for d10 to d32",
        ),
        Row("tokenizer.vocab_size", vocab, "32768 from d8, 4096 below", nanochat, "measured from d12; assumed below"),
        Row("train.sequence_length", length, "1024 from d8, 256 below", "what fits the corpus", "assumed"),
        Row(
            "train.duration",
            f"{steps} steps",
            f"{tokens_per_parameter:g} tokens for each of {parameters:,} parameters (12 N D^2 + V D)",
            "Hoffmann et al. 2022, table A3",
            "measured there from 70M parameters; assumed below",
        ),
        Row(
            "train.batch_size",
            batch,
            "2^round(log2(524288 x (tokens / 10B)^0.383)) tokens",
            "exponent: Bergsma et al. 2025; anchor: Brown et al. 2020, table 2.1",
            "exponent measured there; anchor assumed",
        ),
        Row(
            "optimizer.muon_learning_rate",
            round(rate, 6),
            "0.02 x sqrt(batch tokens / 524288) x sqrt(768 / width), kept in 0.002 to 0.02",
            "0.02: Jordan et al. 2024; square root: Malladi et al. 2022",
            "assumed for other widths",
        ),
        Row(
            "optimizer.learning_rate",
            round(embedding_rate, 6),
            "0.3 x Muon's x sqrt(768 / width)",
            "Yang et al. 2022 (width)",
            "assumed",
        ),
        Row(
            "optimizer.weight_decay",
            round(decay, 6),
            "0.1 x sqrt(batch tokens / 524288) x (10B / tokens), at most 0.1",
            "constant averaging time: Wang & Aitchison 2024",
            "assumed",
        ),
        Row("schedule.decay", "40%", "the last 40% of the steps, linear", "Haegele et al. 2024 use 20%", "assumed"),
    ]


def get_config(arg: str = "") -> ConfigDict:
    """`dN` (default d4), and optionally `tokens_per_parameter=X`."""
    name, _, rest = arg.partition(",")
    depth, options = _parse(name, rest)
    c = base()
    c.name = f"dial-d{depth}"
    c.optimizer.name = "muon"
    c.schedule.name = "wsd"
    c.schedule.final = 0.0
    c.model.qk_norm = True
    for row in derive(depth, tokens_per_parameter=options.tokens_per_parameter):
        section, key = row.key.split(".")
        c[section][key] = row.value
    if depth >= 8:
        c.model.dtype = "bfloat16"
        c.parallel.mesh = "fsdp=-1"
    c.model.scan_unroll = depth if depth <= 8 else 1
    return c


def _parse(name: str, rest: str) -> tuple[int, ConfigDict]:
    name = name or "d4"
    if not (name[:1] == "d" and name[1:].isdigit() and 1 <= int(name[1:]) <= 200):
        raise UserError(f"config argument {name!r} is not a depth: write d1 to d200, such as configs/dial.py:d12")
    return int(name[1:]), parse_arg(rest, tokens_per_parameter=20.0)


def table(arg: str) -> str:
    """What follows from the dial, with formulas and sources, as text."""
    name, _, rest = arg.partition(",")
    depth, options = _parse(name, rest)
    rows = derive(depth, tokens_per_parameter=options.tokens_per_parameter)
    cells = [("setting", "value", "formula", "source", "status"), *((r[0], str(r[1]), *r[2:]) for r in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(5)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


if __name__ == "__main__":
    print(table(sys.argv[1] if len(sys.argv) > 1 else ""))
