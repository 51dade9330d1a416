"""RNN, LSTM, a Griffin hybrid, Mamba-2 and a Transformer at equal parameters and tokens: what each learns and how fast it
decodes.

    python benchmarks/recurrent.py --train wikitext2-train.txt --valid wikitext2-valid.txt [--out results/recurrent.json]

WikiText-2 as plain text; both files are one document. All arms have the width, the tokenizer, the batches and the
number of tokens of the Transformer, and its number of parameters: one setting of each arm (the last column of ARMS)
follows from it. Each arm's learning rate is the best of --rates in a run of a sixth of the steps, by the bits per byte
of the first quarter of the validation text in overlapping windows. The report is of the other three quarters.
Everything goes through `llmjax train`.

Decoding is the time of a step of one row whose cache has room for, and already holds, 1k, 8k or 32k tokens. Neither
the content of the cache nor the training changes this time, so the cache is not filled. --decoding measures it alone,
on untrained models, and adds it to the file of an earlier run.
"""

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import make_parser, write

from llmjax import config
from llmjax.infer.language_model import LanguageModel, load
from llmjax.infer.unstacked import unstack, unstacked_module
from llmjax.model import transformer
from llmjax.model.cache import Cache, init_cache
from llmjax.model.count import param_count
from llmjax.start import HUGE_PAGES

# What each arm changes in the Transformer's settings, and the setting that evens out the parameters, in steps of so many.
ARMS: dict[str, tuple[dict[str, Any], str, int]] = {
    "transformer": ({}, "mlp_width", 8),
    "rnn": ({"pattern": ("rnn",), "position": "none"}, "mlp_width", 8),
    "lstm": ({"pattern": ("lstm",), "position": "none"}, "mlp_width", 8),
    # Griffin's shape: recurrences 4/3 as wide as the model, one key and value head, a window shorter than the rows.
    "griffin": (
        {"pattern": ("rglru", "rglru", "local"), "window": 128, "kv_heads": 1, "recurrent.width": 256},
        "mlp_width",
        8,
    ),
    # As published: no MLP, so nearly twice the layers; inner width 2 D in heads of 64.
    "mamba2": (
        {"pattern": ("mamba2",), "position": "none", "mlp": "none", "layers": 11, "recurrent.heads": 6},
        "recurrent.state_size",
        4,
    ),
}
CONTEXTS = (1024, 8192, 32768)
TIMED = 32  # tokens decoded between two looks at the clock


def settings(args: argparse.Namespace) -> config.ConfigDict:
    """The Transformer's run."""
    c = config.base()
    c.name = "transformer"
    c.data.sources = (str(args.train.resolve()),)
    c.data.holdout_percent = 0.0
    c.tokenizer.vocab_size = c.model.vocab_size = 4096
    m = c.model
    m.layers, m.width, m.heads = 6, 192, 4
    m.scan_unroll = 6
    m.recurrent.chunk = 32  # 15% faster than 64 on CPU
    c.optimizer.clip_norm = 1.0
    c.schedule.warmup, c.schedule.final = "5%", 0.1
    c.train.batch_size, c.train.sequence_length = 8, 256
    c.train.duration = f"{args.steps} steps"
    c.train.eval_every = "0 steps"
    c.checkpoint.every = "100%"
    return c


def arm_settings(args: argparse.Namespace, name: str, target: int) -> config.ConfigDict:
    """An arm's run, with the number of parameters nearest to the target. The number grows evenly with what is solved for."""
    changes, key, multiple = ARMS[name]
    c = settings(args)
    c.name = name
    for place, value in changes.items():
        config.set_key(c, f"model.{place}", value)

    def count(value: int) -> int:
        config.set_key(c, f"model.{key}", value)
        return param_count(c.model)

    if target:
        low, high = count(4 * multiple), count(8 * multiple)
        value = 4 * multiple + (target - low) * 4 * multiple / (high - low)
        difference = abs(count(max(round(value / multiple), 1) * multiple) / target - 1)
        if difference > 0.02:
            raise SystemExit(f"{name} cannot be made as large as the Transformer: {100 * difference:.1f}% off")
    config.check(c)
    return c


def llmjax_run(verb: str, c: config.ConfigDict, workdir: Path) -> None:
    """`llmjax VERB` in a process of its own."""
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "given.json").write_text(config.to_json(c))
    command = [
        sys.executable,
        "-m",
        "llmjax",
        verb,
        "--config",
        str(workdir / "given.json"),
        "--workdir",
        str(workdir),
    ]
    done = subprocess.run(command, env={**os.environ, **HUGE_PAGES}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def train(c: config.ConfigDict, prepared: Path, workdir: Path) -> LanguageModel:
    """Train on the prepared tokens; the trained model."""
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(prepared, workdir)
    llmjax_run("train", c, workdir)
    return load(workdir)


def bits_per_byte(model: LanguageModel, text: str) -> float:
    """Of the text as one document, in windows of the training length that overlap by half."""
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(text), model.tokenizer.eos_id]
    return model.score([np.array(ids, np.int32)]).bits_per_byte


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(module: Any, params: Any, cache: Cache, token_B: jax.Array, start: jax.Array) -> tuple[jax.Array, Cache]:
    """TIMED greedy tokens from position `start` on."""

    def one(i: jax.Array, carry: tuple[jax.Array, Cache]) -> tuple[jax.Array, Cache]:
        token_B, cache = carry
        positions_BL = jnp.broadcast_to(start + i, (token_B.shape[0], 1))
        logits_BLV, cache = module.apply({"params": params}, token_B[:, None], positions_BL=positions_BL, cache=cache)
        return jnp.argmax(logits_BLV[:, 0], -1).astype(jnp.int32), cache

    return jax.lax.fori_loop(0, TIMED, one, (token_B, cache))


def decoding(module: transformer.Transformer, params: Any, context: int, rounds: int) -> dict[str, float]:
    """Tokens a second of one row with so many tokens behind it, and what the row's cache takes."""
    cache = init_cache(module.c, batch=1, length=context + TIMED)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache["layers"]))
    # As the engine decodes: each layer with arrays of its own, which are written in place.
    module = unstacked_module(module)
    cache, params = {**cache, "layers": unstack(module.c, cache["layers"])}, unstack(module.c, params)
    token_B, times = jnp.zeros(1, jnp.int32), []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        token_B, cache = jax.block_until_ready(decode(module, params, cache, token_B, jnp.int32(context)))
        times.append((time.perf_counter() - began) / TIMED)
    seconds = statistics.median(times[1:])  # the first compiles
    return {"ms_per_token": 1e3 * seconds, "tokens_per_second": 1 / seconds, "cache_megabytes": size / 1e6}


def run_arm(
    args: argparse.Namespace, c: config.ConfigDict, prepared: Path, workdir: Path, texts: Sequence[str]
) -> dict[str, Any]:
    """Choose the rate by the first text, train, and measure on the second."""
    tried = {}
    for rate in args.rates if len(args.rates) > 1 else ():
        c.optimizer.learning_rate, c.train.duration = rate, f"{max(args.steps // 6, 1)} steps"
        tried[rate] = bits_per_byte(train(c, prepared, workdir), texts[0])
        print(
            f"  {c.name}: learning rate {rate:g}: {tried[rate]:.4f} bits per byte after {c.train.duration}", flush=True
        )
    c.optimizer.learning_rate = min(tried, key=tried.__getitem__) if tried else args.rates[0]
    c.train.duration = f"{args.steps} steps"
    model = train(c, prepared, workdir)
    results = json.loads((workdir / "train" / "results.json").read_text())
    return {
        "parameters": results["parameters"],
        "tokens": results["tokens"],
        "settings": {key: config.flatten(c.to_dict())[f"model.{key}"] for key in (*ARMS[c.name][0], ARMS[c.name][1])},
        "learning_rate": c.optimizer.learning_rate,
        "rates_tried": {f"{rate:g}": value for rate, value in tried.items()},
        "bits_per_byte": bits_per_byte(model, texts[1]),
        "train_seconds": results["train_seconds"],
        "train_tokens_per_second": results["tokens_per_second"],
        "decoding": {str(n): decoding(model.module, model.params, n, args.rounds) for n in args.contexts},
    }


def table(arms: dict[str, dict[str, Any]], contexts: Sequence[int]) -> str:
    """The results as a Markdown table."""
    heads = [f"tokens/s at {n // 1024}k" for n in contexts] + [f"cache at {n // 1024}k" for n in contexts]
    lines = ["| arm | parameters | bits per byte | training tokens/s | " + " | ".join(heads) + " |"]
    lines.append("|---" * (4 + len(heads)) + "|")
    for name, arm in arms.items():
        at = [arm["decoding"][str(n)] for n in contexts]
        cells = [f"{x['tokens_per_second']:,.0f}" for x in at] + [f"{x['cache_megabytes']:.2f} MB" for x in at]
        head = [name, f"{arm['parameters']:,}", f"{arm['bits_per_byte']:.4f}", f"{arm['train_tokens_per_second']:,.0f}"]
        lines.append("| " + " | ".join([*head, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the arms one after another and print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--train", type=Path, required=True, metavar="FILE.txt")
    parser.add_argument("--valid", type=Path, required=True, metavar="FILE.txt")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS))
    parser.add_argument("--steps", type=int, default=320, help="of 8 rows of 256 tokens (default: 320)")
    parser.add_argument(
        "--rates", nargs="+", type=float, default=(1e-3, 3e-3, 1e-2), help="learning rates to choose from"
    )
    parser.add_argument(
        "--contexts", nargs="+", type=int, default=CONTEXTS, help="tokens behind the one that is decoded"
    )
    parser.add_argument("--rounds", type=int, default=9, help=f"of {TIMED} decoded tokens, of which the median counts")
    parser.add_argument("--decoding", action="store_true", help="measure decoding alone, again; see above")
    parser.add_argument("--valid-bytes", type=int, default=0, help="score at most this much of the validation text")
    args = parser.parse_args()

    target = param_count(arm_settings(args, "transformer", 0).model)
    runs = {name: arm_settings(args, name, 0 if name == "transformer" else target) for name in args.arms}
    for name, c in runs.items():
        count, key = param_count(c.model), ARMS[name][1]
        solved = (
            f"model.{key}={config.flatten(c.to_dict())[f'model.{key}']}" if name != "transformer" else "the measure"
        )
        print(f"{name:12} {count:>10,} parameters, {100 * (count / target - 1):+.2f}% ({solved})", flush=True)

    if args.decoding:
        whole = json.loads(args.out.read_text())
        for name, c in runs.items():
            module = transformer.build(c.model)
            params = jax.jit(functools.partial(transformer.init_params, module))(jax.random.key(0))
            whole["arms"][name]["decoding"] = {str(n): decoding(module, params, n, args.rounds) for n in args.contexts}
        print("\n" + table(whole["arms"], args.contexts))
        whole.setdefault("training", {key: whole[key] for key in ("command", "machine") if key in whole})
        write(whole, args.out)
        return
    text = args.valid.read_text(encoding="utf-8")
    if args.valid_bytes:
        text = text.encode()[: args.valid_bytes].decode(errors="ignore")
    quarter = text.index("\n", len(text) // 4) + 1
    texts = text[:quarter], text[quarter:]
    arms = {}
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared"
        first = settings(args)
        for stage in ("prepare", "tokenizer"):
            llmjax_run(stage, first, prepared)
        for name, c in runs.items():
            arms[name] = run_arm(args, c, prepared, Path(folder) / name, texts)
            print(
                f"  {name}: {arms[name]['bits_per_byte']:.4f} bits per byte, trained {arms[name]['train_seconds']:.0f} s",
                flush=True,
            )
    print("\n" + table(arms, args.contexts))
    write({"arms": arms}, args.out)


if __name__ == "__main__":
    main()
