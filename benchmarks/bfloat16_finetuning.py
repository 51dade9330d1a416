"""Does a model that was imported in bfloat16 learn at fine-tuning rates as its float32 twin does?

    python benchmarks/bfloat16_finetuning.py [--out results/bfloat16_finetuning.json] [--workdir runs/bfloat16_finetuning]
    python benchmarks/bfloat16_finetuning.py --run RUN        (another model: a run, such as an import of bfloat16)

A small model learns Python from six packages of the standard library. It is exported and imported again, once as
bfloat16 and once as float32 with the same numbers. Then `train` with train.init_from trains both on another text,
Python's help topics, at 1e-5 without decay. The third arm is the earlier behaviour: parameters, Adam's state and the
additions of updates all in bfloat16, rounded to the nearest, on the same batches.

Hardware: 2 CPU cores, 3 minutes.
"""

import asyncio
import email
import http
import json
import logging
import shutil
import time
import unittest
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import make_parser, write

import llmjax
from llmjax import config, recipe
from llmjax.data.batches import TrainBatches, heldout_batches
from llmjax.interop.read import import_model
from llmjax.interop.write import export_model
from llmjax.objectives import OBJECTIVES
from llmjax.train.pretrain import make_heldout

PACKAGES = (asyncio, email, http, json, logging, unittest)
LENGTH, ROWS = 128, 16
POINTS = 10  # held-out measurements in a curve


def write_texts(folder: Path) -> tuple[str, str]:
    """Two folders of text files: code, and help topics."""
    for name in ("code", "topics"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        for path in sorted(Path(str(package.__file__)).parent.glob("*.py")):
            (folder / "code" / f"{package.__name__}-{path.stem}.txt").write_text(path.read_text(encoding="utf-8"))
    for name, text in topics.items():
        (folder / "topics" / f"{name}.txt").write_text(text)
    return str(folder / "code"), str(folder / "topics")


def settings(source: str, *, steps: int, rate: float) -> config.ConfigDict:
    """The config of a run, but for the model's shapes."""
    c = config.base()
    c.data.sources, c.data.holdout_percent = (source,), 15.0
    c.tokenizer.vocab_size = 1024
    c.optimizer.learning_rate, c.optimizer.weight_decay = rate, 0.0
    c.schedule.name, c.schedule.warmup = "constant", "0 steps"
    c.train.batch_size, c.train.sequence_length, c.train.duration = ROWS, LENGTH, f"{steps} steps"
    c.train.eval_every, c.checkpoint.every = f"{max(steps // POINTS, 1)} steps", "100%"
    return c


def pretrained(source: str, workdir: Path, *, steps: int) -> Path:
    """A small model, trained and exported: the folder that transformers would read."""
    c = settings(source, steps=steps, rate=3e-3)
    c.model.layers, c.model.width, c.model.heads = 3, 128, 4
    c.model.tie_embeddings = False
    config.check(c)
    recipe.run(c.lock(), workdir / "base", ("prepare", "tokenizer", "train"))
    export_model(workdir / "base", workdir / "exported")
    return workdir / "exported"


def finetuning(given: Path, source: str, *, steps: int, rate: float) -> config.ConfigDict:
    """The config by which a run is trained on another text; computes in float32, so that arms differ by storage alone."""
    c = settings(source, steps=steps, rate=rate)
    c.model = llmjax.load(given).config.model
    with c.unlocked():
        c.model.dtype = "float32"
        c.tokenizer.path, c.train.init_from = str(given / "tokenizer"), str(given)
    config.check(c)
    return c.lock()


def finetuned(c: config.ConfigDict, workdir: Path) -> dict[str, Any]:
    """The curves of `llmjax train`."""
    recipe.run(c, workdir, ("prepare", "tokenizer", "train"))
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    held = [(row["step"], row["heldout_loss"]) for row in rows if "heldout_loss" in row]
    return {"loss": [row["loss"] for row in rows], "heldout": held}


def all_in_bfloat16(c: config.ConfigDict, workdir: Path) -> dict[str, Any]:
    """The curves of a plain loop on the data of `workdir`, with every number that is kept in bfloat16."""
    model, total = llmjax.load(Path(c.train.init_from)), config.duration(c.train.duration, tokens_per_step=1)
    tokens = workdir / "tokenizer" / "tokens"
    heldout = heldout_batches(c, tokens, count=c.train.eval_batches, corruption=None)
    sizes = np.array([len(piece) for piece in model.tokenizer.piece_bytes])
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    measure = make_heldout(c, model.module, heldout, sizes, model.mesh, params)
    o = c.optimizer
    rule = optax.chain(
        optax.clip_by_global_norm(o.clip_norm),
        optax.scale_by_adam(b1=o.beta1, b2=o.beta2, eps=o.epsilon),
        optax.scale(-o.learning_rate),
    )

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            sums = OBJECTIVES["causal"](model.module, params, batch, None, c.objective)
            return sums.objective / sums.weight

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = rule.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses, held = rule.init(params), [], []
    every = config.duration(c.train.eval_every, tokens_per_step=1)
    batches = TrainBatches(c, tokens, total_steps=total, corruption=None)
    for k in range(1, total + 1):
        params, state, value = step(params, state, batches.batch(k - 1))
        losses.append(float(value))
        if k % every == 0 or k == total:
            held.append((k, measure(params)["heldout_loss"]))
    return {"loss": losses, "heldout": held}


def main() -> None:
    parser = make_parser(__doc__, out=Path("results/bfloat16_finetuning.json"))
    parser.add_argument("--run", type=Path, help="a run of a model in bfloat16 instead of one made here")
    parser.add_argument("--workdir", type=Path, default=Path("runs/bfloat16_finetuning"))
    parser.add_argument("--base-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=1e-5)
    args = parser.parse_args()
    began = time.perf_counter()
    shutil.rmtree(args.workdir, ignore_errors=True)
    code, text = write_texts(args.workdir / "texts")
    given = args.run
    if given is None:
        given = args.workdir / "bfloat16"
        import_model(pretrained(code, args.workdir, steps=args.base_steps), given, dtype="bfloat16")
    twin = args.workdir / "float32"
    export_model(given, args.workdir / "exported-bfloat16")
    import_model(args.workdir / "exported-bfloat16", twin, dtype="float32")

    arms = {}
    for name, start in (("bfloat16 import", given), ("float32 twin", twin)):
        c = finetuning(start, text, steps=args.steps, rate=args.rate)
        arms[name] = finetuned(c, args.workdir / "finetuned" / start.name)
        if start == given:
            arms["all in bfloat16"] = all_in_bfloat16(c, args.workdir / "finetuned" / start.name)
    a, b = (np.array(arms[name]["loss"]) for name in ("bfloat16 import", "float32 twin"))
    summary = {
        "largest difference of a training loss between import and twin": float(np.abs(a - b).max()),
        "held-out loss lowered by": {name: arm["heldout"][0][1] - arm["heldout"][-1][1] for name, arm in arms.items()},
    }
    print(json.dumps(summary, indent=1))
    results = {
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "summary": summary,
        "arms": arms,
    }
    write(results, args.out)


if __name__ == "__main__":
    main()
