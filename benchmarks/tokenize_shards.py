"""Tokenizing documents into shards against the bare encoder on the same texts, in turn.

    python benchmarks/tokenize_shards.py [--rounds 5] [--out results/tokenize_shards.json]

Texts: the standard library's sources. One tokenizer of 32,768 pieces (BPE, SentencePiece) is trained on them. Bare: the
library's own `encode` of batches of 4 MB with one thread a core, ids thrown away. Shards: `data.tokens.write_stream`, which
encodes the same batches, puts <bos> and <eos> around documents and writes compressed ArrayRecord files. Processor time
of the process and wall time, medians over the rounds.

Hardware: 2 CPU cores; three minutes.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from llmjax import config, recipe
from llmjax.data import tokens
from llmjax.data.documents import shard_files
from llmjax.data.tokenizer_files import load_tokenizer


def main() -> None:
    """Time both by turns and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        workdir = Path(scratch) / "run"
        c = config.load("configs/quickstart.py")
        with c.unlocked():
            c.tokenizer.vocab_size = 32_768
        recipe.run(c.lock(), workdir, ("prepare", "tokenizer"))
        tokenizer = load_tokenizer(workdir / "tokenizer")
        prepared = workdir / "prepare"
        texts = [t for source in shard_files(prepared / "train") for t in tokens.read_texts(prepared, "train", source)]
        size = sum(len(text.encode()) for text in texts)

        def bare() -> None:
            for batch, _ in tokens._batches(texts):
                tokenizer.processor.encode(batch, num_threads=-1)

        def shards() -> None:
            shutil.rmtree(workdir / "stream", ignore_errors=True)
            tokens.write_stream(texts, tokenizer, folder=workdir / "stream", record_tokens=4096)

        times: dict[str, list[tuple[float, float]]] = {"bare": [], "shards": []}
        for _ in range(args.rounds):
            for name, function in (("bare", bare), ("shards", shards)):
                times[name].append(measure(function))
    medians = {n: [statistics.median(t[k] for t in found) for k in (0, 1)] for n, found in times.items()}
    result = {
        "command": "python " + " ".join(sys.argv),
        "megabytes": size / 1e6,
        "megabytes_per_second": {name: size / 1e6 / wall for name, (wall, _) in medians.items()},
        "megabytes_per_cpu_second": {name: size / 1e6 / cpu for name, (_, cpu) in medians.items()},
        "ratio_wall": medians["bare"][0] / medians["shards"][0],
        "ratio_cpu": medians["bare"][1] / medians["shards"][1],
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(function: Callable[[], None]) -> tuple[float, float]:
    """Wall seconds and processor seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
