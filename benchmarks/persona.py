"""Personas of the Federalist's authors: their style, the author that Burrows' Delta finds, and the questions that they
decline.

    python benchmarks/persona.py --base runs/smollm2 --papers ../shared/data/apps/authorship/federalist.jsonl.gz --work /tmp/personas --out results/persona.json

Every fourth paper of an author is held out. Rows, each below three minutes of two cores with a model of 135M parameters and
kept in WORK/rows.jsonl, so that the same command goes on; `--only NAME` measures one:

    train NAME      a persona of Hamilton, of Madison, and of 2,000 words of Hamilton as the control (`llmjax persona`)
    bits NAME       bits per byte of held-out blocks of 1,000 words of both authors, by the base and by the persona
    delta real      the author that Burrows' Delta chooses for held-out blocks, with Jay as a third: the ceiling
    delta NAME      the same for blocks that the base (the floor) and the personas write
    delta base+NAME the same for the base behind five excerpts of the persona's papers: what training has to beat
    decline NAME    the share of questions declined: of sentences of held-out papers, of the other author's, and of other subjects

The result also has, for each persona, the bits per byte that it gains over the base on its own author and on the other one, by
block. The difference of both gains measures the style, apart from the period and the subject.
"""

import gzip
import json
import math
import re
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import cpu_seconds, llmjax, make_parser, write

AUTHORS = ("HAMILTON", "MADISON")
PERSONAS = {"hamilton": "HAMILTON", "madison": "MADISON", "small": "HAMILTON"}
SMALL, BLOCK = 2000, 1000  # words of the control; of a block
HELD_OUT = 4  # one paper in so many
MOST_BLOCKS = 6  # of an author, whose bits are measured, evenly from all that are held out
WINDOW = 1536  # tokens: a block fits
EXCERPTS, EXCERPT = 5, 100  # in front of what the base writes; words of each
WRITERS = 8  # texts that are written at a time
# Of the training. The rates are those of `llmjax persona`; batches are small, because a step of 1,024 tokens takes 8 seconds of a core.
TRAINING = (
    "train.batch_size=2", "train.sequence_length=512", "train.eval_every=100%", "train.eval_first=false",
    "data.holdout_tail_percent=2.0",
)  # fmt: skip
OPENING = "To the People of the State of New York:\n\n"
SIGNS = {"<S>": ". ", "<p>": ".\n\n", "<c>": ", ", "<d>": " - ", "<l>": "\n", "<Q>": '"'}
RIGHTS = {
    "who": "the authors of The Federalist", "texts": "The Federalist, 1787 and 1788", "basis": "public domain",
    "evidence": "published in 1788; the file is CC0", "stated_by": "benchmarks/persona.py",
}  # fmt: skip


def read(path: Path) -> dict[str, dict[str, list[str]]]:
    """author -> "train" and "heldout" -> papers, with their marks as punctuation."""
    found: dict[str, dict[str, list[str]]] = {}
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    for row in rows:
        text = row["text"]
        for mark, sign in SIGNS.items():
            text = text.replace(mark, sign)
        text = re.sub(r" +([.,])", r"\1", re.sub(r"<[^>]*>", " ", text))
        text = re.sub(r"[ \t]+", " ", text.replace("To the People of the State of New York", ""))
        own = found.setdefault(row["author"], {"train": [], "heldout": []})
        number = len(own["train"]) + len(own["heldout"])
        own["heldout" if number % HELD_OUT == HELD_OUT - 1 else "train"].append(text)
    return found


def training(papers: Mapping[str, Mapping[str, list[str]]], name: str) -> list[str]:
    """The papers that a persona is made of."""
    own = papers[PERSONAS[name]]["train"]
    return [" ".join(" ".join(own).split(" ")[:SMALL])] if name == "small" else own


def train(
    papers: Mapping[str, Mapping[str, list[str]]], name: str, base: Path, work: Path, duration: str
) -> dict[str, Any]:
    """Make a persona by the command."""
    texts = work / f"texts-{name}"
    texts.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(training(papers, name)):
        (texts / f"{number:02}.txt").write_text(text, encoding="utf-8")
    (work / "rights.json").write_text(json.dumps(RIGHTS))
    before = cpu_seconds()
    words = [
        "persona", "--texts", texts, "--name", name.title(), "--rights", work / "rights.json", "--base", base, "--to", work / name,
        *(word for one in (f"train.duration={duration}", *TRAINING) for word in ("--set", one)),
    ]  # fmt: skip
    llmjax(*words)
    kept = json.loads((work / name / "persona.json").read_text())
    return {
        "words": kept["style"]["words"], "threshold": kept["threshold"], "facts": len(kept["facts"]),
        "sentence_words": kept["style"]["sentence_words"], "cpu_seconds": round(cpu_seconds() - before, 1),
    }  # fmt: skip


def opened(base: Path, work: Path, name: str) -> Any:
    """The model of a persona, its adapters merged; "base": without."""
    from llmjax.infer.language_model import load

    if name == "base":
        return load(base)
    return load(base, adapters={name: work / name / "voice" / "texts"}).merged(name)


def bits(papers: Mapping[str, Mapping[str, list[str]]], name: str, base: Path, work: Path) -> dict[str, Any]:
    """author -> bits per byte of its held-out blocks."""
    from llmjax.persona import delta

    model, found = opened(base, work, name), dict[str, Any]()
    for author in AUTHORS:
        every = delta.blocks(papers[author]["heldout"], words=BLOCK)
        found[author] = [bits_of(model, block) for block in every[:: max(1, len(every) // MOST_BLOCKS)][:MOST_BLOCKS]]
    return found


def bits_of(model: Any, block: str) -> float:
    """Bits per byte of a text in one window."""
    tokenizer = model.tokenizer
    ids = np.array([tokenizer.start_id, *tokenizer.encode(block), tokenizer.end_id], np.int32)
    if len(ids) > WINDOW:
        raise ValueError(f"a block has {len(ids)} tokens: raise WINDOW")
    nats = model.score([ids], sequence_length=WINDOW, batch_size=1).nats
    return float(nats) / math.log(2) / len(block.encode())


def gained(rows: Mapping[str, Any]) -> dict[str, Any]:
    """persona -> bits per byte below the base's, on its own author, on the other one, and the difference, with standard errors."""
    found: dict[str, Any] = {}
    for name, own in PERSONAS.items():
        if "bits base" not in rows or f"bits {name}" not in rows:
            continue
        (other,) = (author for author in AUTHORS if author != own)
        both = {}
        for which, author in (("own", own), ("other", other)):
            each = [a - b for a, b in zip(rows["bits base"][author], rows[f"bits {name}"][author], strict=True)]
            both[which] = {"mean": statistics.fmean(each), "error": statistics.stdev(each) / len(each) ** 0.5}
        mean = both["own"]["mean"] - both["other"]["mean"]
        found[name] = {
            **both,
            "style": {"mean": mean, "error": math.hypot(both["own"]["error"], both["other"]["error"])},
        }
    return found


def known(papers: Mapping[str, Mapping[str, list[str]]]) -> Any:
    """The authors as Delta knows them, from blocks of their training papers."""
    from llmjax.persona import delta

    return delta.fit({author: delta.blocks(papers[author]["train"], words=BLOCK) for author in (*AUTHORS, "JAY")})


def chosen(attribution: Any, blocks: Sequence[str]) -> dict[str, Any]:
    """How many blocks go to each author, by both forms of Delta."""
    found: dict[str, Any] = {"blocks": len(blocks)}
    for kind in ("burrows", "cosine"):
        names = [attribution.author(block, kind=kind) for block in blocks]
        found[kind] = {author: names.count(author) for author in attribution.authors}
    return found


def delta_real(papers: Mapping[str, Mapping[str, list[str]]]) -> dict[str, Any]:
    """Delta's choice for held-out blocks of each author."""
    from llmjax.persona import delta

    made = known(papers)
    return {author: chosen(made, delta.blocks(papers[author]["heldout"], words=BLOCK)) for author in AUTHORS}


def delta_written(
    papers: Mapping[str, Mapping[str, list[str]]], name: str, base: Path, work: Path, count: int, *, excerpts: bool = False
) -> dict[str, Any]:  # fmt: skip
    """Delta's choice for blocks that a model writes. Texts are joined until there are so many blocks.

    Args:
        excerpts: the base writes, behind excerpts of what the persona is made of.
    """
    from llmjax.persona import delta

    model, texts, seed, opening = opened(base, work, "base" if excerpts else name), list[str](), 0, OPENING
    if excerpts:
        parts = delta.blocks(training(papers, name), words=EXCERPT)
        opening = "\n\n".join([*parts[:: len(parts) // EXCERPTS][:EXCERPTS], OPENING])
    while sum(len(text.split()) for text in texts) < count * BLOCK:
        made = model.generate([opening] * WRITERS, max_new_tokens=256, temperature=0.8, top_p=0.95, seed=seed)
        texts += [one.text for one in made]
        seed += WRITERS
        if seed > 20 * count * WRITERS:
            return {"blocks": 0, "reason": "the model ends its texts at once"}
    return {**chosen(known(papers), delta.blocks(texts, words=BLOCK)), "sample": texts[0][:400]}


def decline(papers: Mapping[str, Mapping[str, list[str]]], name: str) -> dict[str, Any]:
    """The share of questions below the threshold that a persona of these papers has, which no model decides."""
    from llmjax.persona import threshold
    from llmjax.retrieve.documents.ask import search
    from llmjax.retrieve.documents.index import Index

    texts = {f"{number:02}.txt": text for number, text in enumerate(training(papers, name))}
    asked = {"other subjects": list(threshold.OUTSIDE)}
    for author in AUTHORS:
        heldout = {str(number): text for number, text in enumerate(papers[author]["heldout"])}
        which = "held-out papers" if author == PERSONAS[name] else "the other author"
        asked[which] = [question for question, _ in threshold.made_of(heldout, seed=1)]
    with tempfile.TemporaryDirectory() as folder, Index(Path(folder)) as index:
        index.add_texts(texts.items())
        measured = threshold.measure(index, texts)
        found: dict[str, Any] = {"card": vars(measured)}
        for which, questions in asked.items():
            below = [index.coverage(one, search(index, one)) < measured.coverage for one in questions]
            found[which] = {"declined": statistics.fmean(below), "questions": len(below)}
    return found


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--base", type=Path, required=True, metavar="RUN", help="the model")
    parser.add_argument("--papers", type=Path, required=True, metavar="FILE", help="federalist.jsonl.gz")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="personas and rows are kept here")
    parser.add_argument("--duration", default="20 steps", help="of each training (default: 20 steps)")
    parser.add_argument("--blocks", type=int, default=2, metavar="N", help="blocks that each model writes (default: 2)")
    parser.add_argument("--only", metavar="ROW", help="measure this row alone")
    args = parser.parse_args()
    papers, work, base = read(args.papers), args.work.resolve(), args.base.resolve()
    work.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Callable[[], dict[str, Any]]] = {"delta real": lambda: delta_real(papers)}
    for name in PERSONAS:
        rows[f"train {name}"] = lambda name=name: train(papers, name, base, work, args.duration)  # type: ignore[misc]
    for name in ("base", *PERSONAS):
        rows[f"bits {name}"] = lambda name=name: bits(papers, name, base, work)  # type: ignore[misc]
        rows[f"delta {name}"] = lambda name=name: delta_written(papers, name, base, work, args.blocks)  # type: ignore[misc]
    for name in AUTHORS:
        small = name.lower()
        rows[f"delta base+{small}"] = lambda name=small: delta_written(
            papers, name, base, work, args.blocks, excerpts=True
        )  # type: ignore[misc]
    for name in PERSONAS:
        rows[f"decline {name}"] = lambda name=name: decline(papers, name)  # type: ignore[misc]
    if args.only and args.only not in rows:
        parser.error(f"--only: there are {', '.join(rows)}")
    file = work / "rows.jsonl"
    done = (
        {row["row"]: row["found"] for row in map(json.loads, file.read_text().splitlines())} if file.is_file() else {}
    )
    for row in [args.only] if args.only else rows:
        if row not in done:
            done[row] = rows[row]()
            with file.open("a", encoding="utf-8") as opened_file:
                opened_file.write(json.dumps({"row": row, "found": done[row]}) + "\n")
        print(f"{row}: {json.dumps({k: v for k, v in done[row].items() if k != 'sample'})[:400]}", flush=True)
    gains = gained(done)
    print(json.dumps(gains, indent=1))
    measured = {row: done[row] for row in rows if row in done}
    write(
        {"block_words": BLOCK, "duration": args.duration, "training": TRAINING, "gains": gains, "rows": measured},
        args.out,
    )


if __name__ == "__main__":
    main()
