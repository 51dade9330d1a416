"""lm-evaluation-harness on the same exported weights: its own Hugging Face backend against our adapter and our own
runner.

    python benchmarks/harness.py --data ../shared/data/eval --text ../shared/data/text/wikitext2-train.txt
        --valid ../shared/data/text/wikitext2-valid.txt [--model gpt2 llama] [--steps 1 200] [--width 128] [--limit N]
        [--length 2048] [--out results/harness.json]

Trains a tiny model of each shape for --steps steps (1: as good as random) and exports it. The folder goes to the
harness's HFLM (torch, float32, batches of 16) and, imported again, to `llmjax.eval.harness` and `llmjax.eval.native`.
All run in one process, HFLM and ours by turns. Where MMLU's dev split is missing, the first five questions of each
subject take its place. The script compares every log-likelihood, every metric, rolling log-likelihoods and generated
texts. It compares the perplexity of the valid text, in windows of 512 tokens that advance by 256, with a plain PyTorch
loop. It times what the harness asks of the model (tokenization included), ours with and without compilation. The
second model of a shape finds the programs of the first, so its first time is not cold. Needs llmjax[eval,hf], torch
and transformers. About 10 minutes a model on 2 cores.
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import make_parser, write

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}

import numpy as np

import llmjax
from llmjax import config, recipe
from llmjax.eval import harness, native
from llmjax.interop.read import import_model
from llmjax.interop.write import export_model

TASKS = ("arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc1", "truthfulqa_mc2")
TOLERANCE = 1e-4


def train(shape: str, text: Path, folder: Path, *, steps: int, length: int, width: int) -> Path:
    """A run of a model of four layers with heads of 32."""
    c = config.base()
    c.name = f"{shape}-{steps}"
    c.data.sources, c.data.min_bytes, c.data.holdout_percent = (str(text),), 1, 0.0
    c.tokenizer.vocab_size = 4096
    c.model.layers, c.model.width, c.model.heads, c.model.max_length = 4, width, width // 32, length
    if shape == "gpt2":
        c.model.activation, c.model.norm, c.model.position = "gelu_tanh", "layer", "learned"
        c.model.bias = ("qkv", "out", "mlp", "norm")
    else:
        c.model.kv_heads, c.model.tie_embeddings = 2, False
    c.train.duration, c.train.batch_size, c.train.sequence_length = f"{steps} steps", 8, 128
    c.train.eval_every, c.checkpoint.every = "0 steps", "100%"
    c.schedule.warmup = "0 steps"
    config.check(c)
    recipe.run(c.lock(), folder, ("prepare", "tokenizer", "train"))
    return folder


def with_dev_split(data: Path, folder: Path) -> Path:
    """The data with the first five questions of each MMLU subject as its dev split, which the published data set has."""
    folder.mkdir()
    for path in data.glob("*.jsonl"):
        if path.name != "mmlu_test.jsonl" or (data / "mmlu_dev.jsonl").is_file():
            (folder / path.name).symlink_to(path.resolve())
    if not (folder / "mmlu_test.jsonl").exists():
        by_subject: dict[str, list[str]] = {}
        for line in (data / "mmlu_test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True):
            by_subject.setdefault(json.loads(line)["subject"], []).append(line)
        (folder / "mmlu_dev.jsonl").write_text("".join(line for rows in by_subject.values() for line in rows[:5]))
        (folder / "mmlu_test.jsonl").write_text("".join(line for rows in by_subject.values() for line in rows[5:]))
    return folder


def timed(model: Any, names: tuple[str, ...]) -> dict[str, float]:
    """Count the seconds that a model of the harness spends in its methods."""
    spent = dict.fromkeys(names, 0.0)

    def watch(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*arguments, **more)
            finally:
                spent[name] += time.perf_counter() - began

        return call

    for name in names:
        setattr(model, name, watch(name, getattr(model, name)))
    return spent


def torch_loss(model: Any, ids: list[int], *, length: int, stride: int) -> float:
    """Nats a token of a document by a plain loop: windows of `length`, each scoring its last `stride` tokens."""
    import torch

    nats, done, count = 0.0, 0, len(ids) - 1
    while done < count:
        stop = min(done + (stride if done else length), count)
        start = max(stop - length, 0)
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:stop]])).logits[0].double()
        targets = torch.tensor(ids[start + 1 : stop + 1])
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        nats, done = nats + float(losses[done - start :].sum()), stop
    return nats / count


def compare(shape: str, steps: int, args: argparse.Namespace) -> dict[str, Any]:
    """One model: differences and times."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    methods = ("loglikelihood", "loglikelihood_rolling", "generate_until")
    with tempfile.TemporaryDirectory() as folder:
        data = with_dev_split(args.data, Path(folder) / "data")
        run = train(shape, args.text, Path(folder) / "run", steps=steps, length=args.length, width=args.width)
        export_model(run, Path(folder) / "exported")
        import_model(Path(folder) / "exported", Path(folder) / "imported")
        model = llmjax.load(Path(folder) / "imported")
        ours = harness.make_model(model)
        theirs = HFLM(pretrained=f"{folder}/exported", device="cpu", dtype="float32", batch_size=args.batch)
        seconds, found = {}, {}
        for name, backend in (("ours cold", ours), ("theirs", theirs), ("ours warm", ours)):
            spent = timed(backend, methods)
            found[name] = harness.evaluate(backend, TASKS, [data], limit=args.limit)
            seconds[name] = round(spent["loglikelihood"], 2)
        began = time.perf_counter()
        own = native.evaluate(model, TASKS, [data], limit=args.limit)
        seconds["native, all of it"] = round(time.perf_counter() - began, 2)
        differences, relative, identical, same_choice = [], [], True, True
        for task in TASKS:
            a, b = found["ours warm"][task], found["theirs"][task]
            for name in b.metrics:
                identical &= abs(a.metrics[name].value - b.metrics[name].value) < (
                    1e-6 if task == "truthfulqa_mc2" else 1e-12
                )
            for x, y in zip(a.items, b.items, strict=True):
                left, right = np.array(x["log_likelihoods"]), np.array(y["log_likelihoods"])
                differences += np.abs(left - right).tolist()
                relative += (np.abs(left - right) / np.abs(right)).tolist()
            same_choice &= all(own[task].metrics[n].value == a.metrics[n].value for n in own[task].metrics)
        texts = args.text.read_text(encoding="utf-8")[: 4 * args.rolling].strip()
        pieces = [texts[i : i + args.rolling] for i in range(0, len(texts), args.rolling)]
        rolling = [Instance("loglikelihood_rolling", {}, (piece,), 0) for piece in pieces]
        sums = [np.array(x.loglikelihood_rolling(rolling, disable_tqdm=True)) for x in (ours, theirs)]
        settings = {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False}
        asked = [Instance("generate_until", {}, (piece[:200], settings), 0) for piece in pieces]
        written = [x.generate_until(asked, disable_tqdm=True) for x in (ours, theirs)]
        held_out = args.valid.read_text(encoding="utf-8")
        ids = [model.tokenizer.start_id, *model.tokenizer.encode(held_out), model.tokenizer.end_id]
        windows = {"length": min(args.length, 512), "stride": 256}
        loss = model.score([np.array(ids, np.int32)], sequence_length=windows["length"], stride=256).loss
        other = torch_loss(theirs.model, ids, **windows)
    result = {
        "shape": shape,
        "steps": steps,
        "width": args.width,
        "requests": len(differences),
        "largest_difference": max(differences),
        "largest_relative_difference": max(relative),
        "within_1e-4": max(differences) <= TOLERANCE,
        "metrics_identical": bool(identical),
        "native_equals_adapter": bool(same_choice),
        "rolling_largest_difference": float(np.abs(sums[0] - sums[1]).max()),
        "rolling_largest_relative": float((np.abs(sums[0] - sums[1]) / np.abs(sums[1])).max()),
        "perplexity": {"tokens": len(ids) - 1, "ours": float(np.exp(loss)), "torch loop": float(np.exp(other))},
        "texts_equal": f"{sum(a == b for a, b in zip(*written, strict=True))} of {len(pieces)}",
        "seconds": seconds,
        "ratio_cold": round(seconds["theirs"] / seconds["ours cold"], 2),
        "ratio_warm": round(seconds["theirs"] / seconds["ours warm"], 2),
        "scores": {t: {n: round(e.value, 6) for n, e in s.metrics.items()} for t, s in found["ours warm"].items()},
    }
    print(json.dumps(result, indent=1), flush=True)
    return result


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder with the questions")
    parser.add_argument("--text", type=Path, required=True, help="what the models are trained on, and rolling texts")
    parser.add_argument("--valid", type=Path, required=True, help="the text whose perplexity is compared")
    parser.add_argument("--model", nargs="+", default=["gpt2", "llama"], choices=("gpt2", "llama"))
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 200], help="of training, a model for each")
    parser.add_argument("--width", type=int, default=128, help="of the models, a multiple of 64")
    parser.add_argument(
        "--limit", type=int, default=0, help="questions of each task (of each subject of MMLU) at most; 0: all"
    )
    parser.add_argument("--length", type=int, default=2048, help="tokens that the models read")
    parser.add_argument("--batch", type=int, default=16, help="rows of a batch of the harness's backend")
    parser.add_argument("--rolling", type=int, default=4000, help="characters of each of four rolling texts")
    args = parser.parse_args()
    rows = []
    for shape, steps in itertools.product(args.model, args.steps):
        rows.append(compare(shape, steps, args))
        write({"limit": args.limit, "models": rows}, args.out)


if __name__ == "__main__":
    main()
