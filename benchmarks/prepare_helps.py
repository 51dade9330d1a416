"""Does preparation help? The same model and number of tokens on the raw corpus and on the prepared one, with several
seeds.

    python benchmarks/prepare_helps.py --texts DIR [--seeds 3] [--steps 200] [--out results/prepare_helps.json]

The corpus: articles and speeches (wikitext2-train, abc-science, abc-rural, state-of-the-union), each paragraph-sized
chunk a document, with what crawls carry: one document in a hundred 40 times (half of the copies with one word in 30
changed), a footer under each fifth, overheard chat and forum posts, and a fifth of the accents broken by a second
encoding. Raw: exactly this, min_bytes aside. Prepared: repair, exact, near, substring, lines and the rules of Gopher.
Measured, both with one tokenizer (trained on the raw corpus): bits per byte of 300 clean documents of the same sources
that are in neither arm, of WikiText-2's validation text, and the share of generated characters that lie in a passage of
50 characters or more that is verbatim in the raw corpus. Needs the extra [data].

Hardware: 2 CPU cores, 3 to 7 minutes for each of the six runs, beside other work.
"""

import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import make_parser, write
from rich.console import Console
from rich.table import Table

import llmjax
from llmjax import config, recipe

CLEAN = ("wikitext2-train", "abc-science", "abc-rural", "state-of-the-union")
NOISE = ("webtext-overheard", "webtext-firefox")
STEPS = ("repair", "exact", "near", "substring", "lines", "gopher_quality", "gopher_repetition")
FOOTER = "Click here to read more. All rights reserved. Share this page with your friends on our social networks."
WINDOW = 50  # characters


def main() -> None:
    """Train both arms for every seed and print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--texts", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        raw, heldout = make_corpus(args.texts)
        (folder / "raw.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in raw))
        valid = [t for t in chunks(args.texts / "wikitext2-valid.txt") if len(t) > 400][:300]
        measures = {"held-out": heldout, "wikitext2-valid": valid}
        tokenizer = ""
        for seed in range(args.seeds):
            for arm, steps in (("raw", ()), ("prepared", STEPS)):
                workdir = folder / f"{arm}-{seed}"
                recipe.run(settings(folder / "raw.jsonl", steps, seed, args.steps, tokenizer), workdir,
                           ("prepare", "tokenizer", "train"))  # fmt: skip
                tokenizer = tokenizer or str(workdir / "tokenizer")
                rows.append({"seed": seed, "arm": arm, **measure(workdir, measures, "\n".join(raw), seed)})
                print(rows[-1], flush=True)
    result = {"rows": rows, "difference": differences(rows)}
    show(result)
    write(result, args.out)


def chunks(file: Path) -> list[str]:
    """Documents of 400 to 1,600 characters, cut at line ends."""
    found, text = [], ""
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        text += line.strip() + "\n"
        if len(text) > 1200:
            found.append(text.strip()[:1600])
            text = ""
    return [text for text in found if len(text) >= 400]


def make_corpus(texts: Path) -> tuple[list[str], list[str]]:
    """The raw corpus, and clean documents of the same sources that are not in it."""
    draw = random.Random(0)
    clean = [text for name in CLEAN for text in chunks(texts / f"{name}.txt")]
    draw.shuffle(clean)
    heldout, clean = clean[:300], clean[300:]
    corpus = []
    for number, text in enumerate(clean):
        broken = text.encode().decode("latin-1") if number % 5 == 0 else text
        corpus.append(f"{broken}\n{FOOTER}" if number % 5 == 1 else broken)
        if number % 100 == 0:
            corpus += [text if copy % 2 else changed(text, draw) for copy in range(40)]
    corpus += [text for name in NOISE for text in chunks(texts / f"{name}.txt")]
    draw.shuffle(corpus)
    return corpus, heldout


def changed(text: str, draw: random.Random) -> str:
    """A text with one word in 30 replaced by another of its own."""
    words = text.split(" ")
    for place in range(draw.randrange(30), len(words), 30):
        words[place] = draw.choice(words)
    return " ".join(words)


def settings(source: Path, steps: tuple[str, ...], seed: int, train_steps: int, tokenizer: str) -> Any:
    """The config of a run: the quickstart's model and optimizer."""
    c = config.load("configs/quickstart.py")
    with c.unlocked():
        c.data.sources = (str(source),)
        c.data.holdout_percent = 0.0
        c.prepare.steps = steps
        c.tokenizer.path = tokenizer
        c.seed = seed
        c.train.duration = f"{train_steps} steps"
        c.train.batch_size = 16
        c.checkpoint.every = "100%"
    return c.lock()


def measure(workdir: Path, texts: dict[str, list[str]], corpus: str, seed: int) -> dict[str, float]:
    """Bits per byte of each set of texts, and the share of generated text that is verbatim in the corpus."""
    model = llmjax.load(workdir)
    found: dict[str, float] = {}
    for name, documents in texts.items():
        ids = [[model.tokenizer.start_id, *model.tokenizer.encode(text), model.tokenizer.end_id] for text in documents]
        found[name] = model.score([np.array(row, np.int32) for row in ids]).bits_per_byte
    prompts = [""] * 100
    made = model.generate(prompts, max_new_tokens=128, temperature=0.7, top_p=1.0, top_k=0, seed=seed)
    found["verbatim"] = verbatim_share([completion.text for completion in made], corpus)
    manifest = json.loads((workdir / "prepare/manifest.json").read_text())
    found["documents"] = manifest["total"]["train_documents"]
    found["megabytes"] = round(manifest["total"]["train_bytes"] / 1e6, 2)
    return found


def verbatim_share(made: list[str], corpus: str) -> float:
    """Share of characters that lie in a window of WINDOW characters that the corpus holds."""
    data = corpus.encode()
    inside = total = 0
    for text in made:
        covered = np.zeros(len(text), bool)
        for start in range(0, len(text) - WINDOW + 1, 5):
            if text[start : start + WINDOW].encode() in data:
                covered[start : start + WINDOW] = True
        inside, total = inside + int(covered.sum()), total + len(text)
    return inside / max(total, 1)


def differences(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Prepared minus raw, seed by seed: mean, and standard deviation over the seeds."""
    found = {}
    for name in ("held-out", "wikitext2-valid", "verbatim"):
        pairs: dict[int, dict[str, float]] = {}
        for row in rows:
            pairs.setdefault(row["seed"], {})[row["arm"]] = row[name]
        values = [pair["prepared"] - pair["raw"] for pair in pairs.values()]
        deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
        found[name] = {"mean": statistics.mean(values), "deviation": deviation}
    return found


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    table = Table("seed", "arm", "MB", "held-out bits/byte", "WikiText-2 bits/byte", "verbatim")
    for row in result["rows"]:
        table.add_row(
            str(row["seed"]), row["arm"], f"{row['megabytes']}", f"{row['held-out']:.4f}",
            f"{row['wikitext2-valid']:.4f}", f"{row['verbatim']:.2%}",
        )  # fmt: skip
    Console().print(table)
    for name, row in result["difference"].items():
        print(f"prepared - raw, {name}: {row['mean']:+.4f} (standard deviation over seeds {row['deviation']:.4f})")


if __name__ == "__main__":
    main()
