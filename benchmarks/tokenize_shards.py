"""Tokenizing documents into shards against the bare encoder on the same texts, in turn.

    python benchmarks/tokenize_shards.py [--rounds 5] [--out results/tokenize_shards.json]

The texts are the standard library's sources. One tokenizer of 32,768 pieces (BPE, SentencePiece) is trained on them.
Bare: SentencePiece's own `encode` of batches of 4 MB with one thread a core; the ids are thrown away. Shards:
`data.tokens.write_stream`, which encodes the same batches, puts <bos> and <eos> around documents and writes compressed
ArrayRecord files. Reports medians of CPU time and wall time over the rounds.

Hardware: 2 CPU cores; three minutes.
"""

import json
import shutil
import statistics
import tempfile
from pathlib import Path

from common import make_parser, timed, write

from llmjax import config, recipe
from llmjax.data import tokens
from llmjax.data.documents import read_texts, shard_files
from llmjax.data.tokenizer_files import load_tokenizer


def main() -> None:
    """Time both by turns and print the ratio."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        workdir = Path(scratch) / "run"
        c = config.load("configs/quickstart.py")
        with c.unlocked():
            c.tokenizer.vocab_size = 32_768
        recipe.run(c.lock(), workdir, ("prepare", "tokenizer"))
        tokenizer = load_tokenizer(workdir / "tokenizer")
        prepared = workdir / "prepare"
        texts = [t for source in shard_files(prepared / "train") for t in read_texts(prepared, "train", source)]
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
                times[name].append(timed(function))
    medians = {n: [statistics.median(t[k] for t in found) for k in (0, 1)] for n, found in times.items()}
    result = {
        "megabytes": size / 1e6,
        "megabytes_per_second": {name: size / 1e6 / wall for name, (wall, _) in medians.items()},
        "megabytes_per_cpu_second": {name: size / 1e6 / cpu for name, (_, cpu) in medians.items()},
        "ratio_wall": medians["bare"][0] / medians["shards"][0],
        "ratio_cpu": medians["bare"][1] / medians["shards"][1],
    }
    print(json.dumps(result, indent=1))
    write(result, args.out)


if __name__ == "__main__":
    main()
