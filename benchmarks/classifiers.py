"""The value of the preparation's scores: quality and toxicity classifiers, the n-gram model, the word lists.

    python benchmarks/classifiers.py --texts ../shared/data --out results/classifiers.json

Textbook-like text (the standard library's documentation, encyclopedia, speeches, science news) against messy text
(chat, forum posts, change logs, message catalogues), from the folder given and from this machine. Missing sources are
left out and named. Every document is about 1,500 characters of a file. Held-out documents come from the sources of the
training documents, which makes the figures too good. So the quality classifier is also trained without one source of
each kind, and measured on those two.

Toxicity has no hand-made labels here. Three weak labels stand in: the rejected answer of a pair against the chosen one
(both about unpleasant questions: hard), rude chat against forum and encyclopedia (mostly a difference of kind: easy),
and chat with a word of the lists against chat without, those words taken out (what surrounds them).
"""

import ast
import functools
import gzip
import hashlib
import json
import re
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import make_parser, speed, write
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score

from llmjax.prepare import bias
from llmjax.prepare.learn import classifier, lexicons, ngram
from llmjax.prepare.steps.scores import toxic_words

SIZE = 1500  # characters of a document
LARGEST = 250_000  # characters of a source, so that none outweighs the others; --scale multiplies it
WANTED = ("topics", "docstrings", "encyclopedia", "speeches", "science")
MESSY = ("chat", "forum", "changelogs", "catalogues")
LEFT_OUT = (  # trained without these two, measured on them
    ("encyclopedia", "forum"),
    ("speeches", "chat"),
    ("topics", "changelogs"),
    ("science", "catalogues"),
    ("science", "chat"),
    ("encyclopedia", "changelogs"),
)


def _cut(text: str, most: int) -> list[str]:
    """Documents of about SIZE characters that end at the end of a line, `most` characters of them in all."""
    documents, lines, size = [], [], 0
    for line in text[:most].splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= SIZE:
            documents.append("".join(lines).strip())
            lines, size = [], 0
    return [document for document in documents if document]


def _plain_wikitext(text: str) -> str:
    """WikiText-2 is tokenized; left as it is, its " @-@ " alone would tell it from anything."""
    text = re.sub(r" @(.)@ ", r"\1", text).replace("<unk>", "unknown")
    return re.sub(r" ([,.;:!?)'%])", r"\1", re.sub(r"([($]) ", r"\1", text)).replace(" n't", "n't")


def _docstrings(most: int) -> Iterator[str]:
    """Of the standard library's modules, read and not imported, until there are `most` characters."""
    size = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                docstring = ast.get_docstring(node) or ""
                size += len(docstring)
                yield docstring
        if size >= most:
            return


def _files(pattern: str, folders: Sequence[Path], most: int) -> str:
    """Files of a pattern, the first 20,000 characters of each, in the order of the hashes of their names."""
    found = [path for folder in folders if folder.is_dir() for path in folder.glob(pattern) if path.is_file()]
    found.sort(key=lambda path: hashlib.blake2b("/".join(path.parts[-3:]).encode(), digest_size=8).digest())
    parts, size = [], 0
    for path in found:
        if size >= most:
            break
        try:
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        except (OSError, EOFError):  # a file that cannot be read is not part of the corpus
            continue
        parts.append(raw.decode(errors="replace")[:20_000])
        size += len(parts[-1])
    return "\n".join(parts)


def sources(texts: Path, *, most: int) -> dict[str, list[str]]:
    """The documents of each source, at most `most` characters a source; a source that is not there is empty."""
    from pydoc_data.topics import topics

    def read(name: str) -> str:
        path = texts / "text" / name
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    packages = [Path(folder) for folder in sys.path if folder.endswith("site-packages")]
    found = {
        "topics": "\n\n".join(topics.values()),
        "docstrings": "\n\n".join(_docstrings(most)),
        "encyclopedia": _plain_wikitext(read("wikitext2-train.txt")),
        "speeches": read("state-of-the-union.txt"),
        "science": read("abc-science.txt"),
        "chat": read("webtext-overheard.txt"),
        "forum": read("webtext-firefox.txt"),
        "changelogs": _files("*/[Cc]hange[Ll]og*", [Path("/usr/share/doc")], most),
        "catalogues": _files("**/*.po", packages, most),
    }
    return {name: _cut(text, most) for name, text in found.items()}


def _all(found: dict[str, list[str]], names: Sequence[str]) -> list[str]:
    return [document for name in names for document in found[name]]


def _speed(score: Callable[[list[str]], Any], documents: list[str]) -> float:
    """MB of UTF-8 a second of this process's CPU time, the best of 3."""
    return speed(lambda: score(documents), sum(len(d.encode()) for d in documents), repeats=3)


def measure_quality(found: dict[str, list[str]]) -> dict[str, Any]:
    """The quality classifier on held-out documents and on sources it has not seen."""

    def labelled(wanted: Sequence[str], messy: Sequence[str]) -> tuple[list[str], list[int]]:
        yes, no = _all(found, wanted), _all(found, messy)
        return yes + no, [1] * len(yes) + [0] * len(no)

    texts, labels = labelled(WANTED, MESSY)
    began = time.process_time()
    model = classifier.train(texts, labels)
    results = {"train_cpu_seconds": time.process_time() - began, **model.metrics}
    results["mb_per_cpu_second"] = _speed(lambda documents: classifier.score(model, documents), texts[::4])
    results["left_out"] = []
    for out in LEFT_OUT:
        rest = [[name for name in names if name not in out] for names in (WANTED, MESSY)]
        fewest = min(len(_all(found, names)) for names in rest)
        if not all(found[name] for name in out) or fewest < classifier.FEWEST:
            continue
        narrow = classifier.train(*labelled(*rest))
        texts, labels = labelled(out[:1], out[1:])
        measured = classifier.measures(classifier.score(narrow, texts), np.array(labels))
        row = {
            "sources": " against ".join(out),
            **{k: measured[k] for k in ("documents", "auroc", "calibration_error")},
        }
        row["auroc held out of sources trained on"] = narrow.metrics["auroc"]
        results["left_out"].append(row)
    return results


def _answers(path: Path) -> Iterator[tuple[str, str, int]]:
    """(last answer, conversation, 1 if it was the rejected one)."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        for label, name in ((0, "chosen"), (1, "rejected")):
            answer = row[name].rsplit("\n\nAssistant:", 1)[-1].strip()
            if answer:
                yield answer, str(number), label


def _chat_about_words(found: list[str]) -> tuple[list[str], list[int]]:
    """Chat in lines of at least 200 characters, with the words of the list taken out, and whether there was one."""
    lexicon = lexicons.load("en")
    lines: list[str] = [""]
    for line in "\n".join(found).splitlines():
        lines[-1] += line + "\n"
        if len(lines[-1]) >= 200:
            lines.append("")
    texts, labels = [], []
    for line in lines:
        labels.append(int(bool(toxic_words(lexicon, line)[0])))
        texts.append(re.sub(r"[\w@$*!]+", lambda m: "" if lexicons.find(lexicon, m.group())[0] else m.group(), line))
    return texts, labels


def measure_toxicity(found: dict[str, list[str]], texts: Path) -> dict[str, Any]:
    """The three weak labels of the module's docstring, and what the word lists alone say of them."""
    results: dict[str, Any] = {}
    lexicon = lexicons.load("en")

    def add(name: str, documents: list[str], labels: list[int], groups: list[str] | None = None) -> None:
        if min(labels.count(0), labels.count(1)) < classifier.FEWEST:
            results[name] = {"left_out": "too few documents of a class"}
            return
        metrics = classifier.train(documents, labels, groups=groups).metrics
        shares = np.array([toxic_words(lexicon, document)[1] for document in documents])
        results[name] = {
            key: metrics[key]
            for key in ("documents", "positive", "auroc", "f1", "calibration_error", "calibration_error_before")
        }
        results[name]["word_lists_auroc"] = float(roc_auc_score(labels, shares))

    path = texts / "posttrain" / "hh_harmless.jsonl"
    if path.exists():
        answers, groups, labels = zip(*_answers(path), strict=True)
        add("rejected against chosen answers", list(answers), list(labels), list(groups))
    if found["chat"]:
        calm = found["forum"] + found["encyclopedia"]
        add("rude chat against forum, encyclopedia", found["chat"] + calm, [1] * len(found["chat"]) + [0] * len(calm))
        add("around words of the lists, in chat", *_chat_about_words(found["chat"]))
    shares = {
        name: np.array([toxic_words(lexicon, document)[1] for document in documents])
        for name, documents in found.items()
        if documents
    }
    results["documents above 2% of words on the lists"] = {k: float(np.mean(v > 0.02)) for k, v in shares.items()}
    everything = _all(found, (*WANTED, *MESSY))
    results["word_lists_mb_per_cpu_second"] = _speed(
        lambda documents: [toxic_words(lexicon, document) for document in documents], everything[::4]
    )
    return results


def measure_ngrams(found: dict[str, list[str]], folder: Path) -> dict[str, Any]:
    """A model of 80% of the wanted documents: bits a byte of the rest and of the messy sources, speed, size."""
    train, rest = [], {}
    for name in WANTED:
        rest[name] = found[name][::5]
        train += [document for k, document in enumerate(found[name]) if k % 5]
    rest.update({name: found[name] for name in MESSY})
    results: dict[str, Any] = {}
    for min_count in (1, 2):
        began = time.process_time()
        model = ngram.train(train, min_count=min_count)
        seconds = time.process_time() - began
        path = folder / "ngram.npz"
        ngram.save(model, path)
        results[f"min_count {min_count}"] = {
            "train_mb_per_cpu_second": model.settings["bytes"] / 1e6 / seconds,
            "train_bytes": model.settings["bytes"],
            "file_bytes": path.stat().st_size,
            "bits_per_byte": {k: float(ngram.score(model, v).mean()) for k, v in rest.items() if v},
            "mb_per_cpu_second": {
                kind: _speed(functools.partial(ngram.score, model), _all(rest, names))
                for kind, names in (("wanted", WANTED), ("messy", MESSY))
            },
            "auroc_wanted_against_messy": float(
                roc_auc_score(
                    np.repeat([1, 0], [len(_all(rest, names)) for names in (WANTED, MESSY)]),
                    -ngram.score(model, _all(rest, (*WANTED, *MESSY))),
                )
            ),
        }
        path.unlink()
    return results


def run(texts: Path, *, scale: float, folder: Path) -> dict[str, Any]:
    """All measurements, as JSON-able figures."""
    began = time.perf_counter()
    found = sources(texts, most=int(LARGEST * scale))
    everything = _all(found, (*WANTED, *MESSY))
    results = {
        "documents": {name: len(documents) for name, documents in found.items()},
        "missing": [name for name, documents in found.items() if not documents],
        "quality": measure_quality(found),
        "toxicity": measure_toxicity(found, texts),
        "ngram": measure_ngrams(found, folder),
        "bias_mb_per_cpu_second": _speed(bias.count_texts, everything[::4]),
    }
    return {**results, "seconds": time.perf_counter() - began}


def _show(results: dict[str, Any]) -> None:
    console = Console(width=150)

    def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        grid = Table(title=title, title_justify="left")
        for k, column in enumerate(columns):
            grid.add_column(column, justify="right" if k else "left")
        for row in rows:
            grid.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
        console.print(grid)

    quality = results["quality"]
    names = ("documents", "auroc", "f1", "calibration_error_before", "calibration_error")
    table("quality classifier, held-out documents", names, [[quality[name] for name in names]])
    if rows := quality["left_out"]:
        table("quality classifier, sources it was not trained on", tuple(rows[0]), [list(row.values()) for row in rows])
    table("what a threshold keeps", tuple(quality["kept"][0]), [list(row.values()) for row in quality["kept"]])
    toxicity = [(k, v) for k, v in results["toxicity"].items() if isinstance(v, dict) and "auroc" in v]
    both = (*names, "word_lists_auroc")
    table("toxicity, weak labels", ("", *both), [[k, *(v[name] for name in both)] for k, v in toxicity])
    shares = results["toxicity"]["documents above 2% of words on the lists"]
    table("documents above 2% of words on the lists", tuple(shares), [list(shares.values())])
    for name, row in results["ngram"].items():
        table(f"n-gram model, {name}: bits a byte", tuple(row["bits_per_byte"]), [list(row["bits_per_byte"].values())])
        console.print({key: value for key, value in row.items() if key != "bits_per_byte"})
    console.print(
        f"MB per CPU-second: quality classifier {quality['mb_per_cpu_second']:.1f}, word lists "
        f"{results['toxicity']['word_lists_mb_per_cpu_second']:.1f}, bias {results['bias_mb_per_cpu_second']:.1f}; "
        f"missing sources: {', '.join(results['missing']) or 'none'}; {results['seconds']:.0f} s"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--texts", type=Path, default=Path("../shared/data"), help="a folder with text/ and posttrain/")
    parser.add_argument("--scale", type=float, default=1.0, help="times 250,000 characters of each source (default 1)")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            results = run(options.texts, scale=options.scale, folder=Path(folder))
    except ValueError as error:
        sys.exit(f"classifiers: {error}")
    _show(results)
    write(results, options.out)


if __name__ == "__main__":
    main()
