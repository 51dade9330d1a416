"""Near-duplicates and repeated runs in a corpus with known truth, beside datatrove, datasketch, rensa and daft.

    python benchmarks/dedup.py --megabytes 200 --peers datatrove,datasketch,rensa,daft --peer-python PEER/bin/python \
        --out results/dedup.json

The corpus is real text of this machine (sources and documentation, cut at line ends) in which are planted: exact copies;
copies with other punctuation; near copies at a measured Jaccard similarity; the same of made-up Chinese; pairs that look
alike but are not; chains A-B-C with A unlike C; documents from one template; heavy clusters; passages of 60 tokens. The
similarity is measured here with Python's own regular expressions and sets, not with the code under test.

Every tool runs in a process of its own, which reports its CPU seconds (children included) and peak memory. The peers want
an interpreter with `datatrove datasketch rensa daft "xxhash<4" spacy tokenizers pyarrow scipy`. `--suffix-array N`
compares the repeated runs in N MB with prefix doubling (Manber and Myers 1993), exact and without hashes.
"""

import argparse
import glob
import json
import os
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from common import cpu_seconds, make_parser, write
from dedup_peers import (
    BANDS,
    ROWS,
    SHINGLE,
    THRESHOLD,
    TOKEN,
    WORD,
    normalised,
    run_daft,
    run_datasketch,
    run_datatrove,
    run_rensa,
    similarity,
)

PLAIN = re.compile(
    r"[\n\t\x20-\x7e\u00a1-\u00ac\u00ae-\u02ff\u0370-\u0482\u2010-\u2027\u3001\u3002\u3041-\u30ff\u4e00-\u9fff]*\Z"
)
if TYPE_CHECKING:
    import pyarrow as pa

RUN = 50  # tokens of a repeated run
CLASSES = {"near .95": 0.95, "near .85": 0.85, "near .7": 0.72, "near .5": 0.5}  # .72: to lie above the threshold


def real_text(megabytes: float, rng: random.Random) -> Iterator[str]:
    """Documents of 1 to 8 KB from files of this machine, each file once by its content."""
    folders = [
        sysconfig.get_paths()["stdlib"],
        sysconfig.get_paths()["purelib"],
        "/usr/share/doc",
        "/usr/share/perl",
        "/usr/lib",
    ]
    seen, total = set(), 0
    for folder in folders:
        for path in sorted(glob.glob(f"{folder}/**/*", recursive=True)):
            if not path.endswith((".py", ".md", ".rst", ".txt", ".html", ".pl", ".pm", ".json", ".tcl", "README")):
                continue
            try:
                text = Path(path).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if hash(text) in seen or len(text) > 2_000_000:
                continue
            seen.add(hash(text))
            lines: list[str] = []
            size, goal = 0, rng.randint(1000, 8000)
            for line in [*text.splitlines(True), None]:
                if line is None or size > goal:
                    if size > 500:
                        yield "".join(lines)
                        total += size
                    lines, size, goal = [], 0, rng.randint(1000, 8000)
                if line is not None:
                    lines.append(line)
                    size += len(line)
            if total > megabytes * 1e6:
                return
    raise SystemExit(f"this machine has only {total / 1e6:.0f} MB of text in {', '.join(folders)}")


def edited(
    text: str, goal: float, vocabulary: Sequence[str], rng: random.Random, part: tuple[float, float] = (0, 1)
) -> str:
    """The text with as many words replaced, far apart, as bring the similarity to the goal: each costs five shingles.

    `part` is the stretch of the text within which words are replaced, the goal being that of this stretch alone.
    """
    words = list(WORD.finditer(text))
    words = words[int(part[0] * len(words)) : int(part[1] * len(words))]
    changes = max(1, round((len(words) - SHINGLE + 1) * (1 - goal) / (1 + goal) / SHINGLE))
    pieces, at, step = [], 0, len(words) / changes
    for i in range(changes):
        word = words[int(i * step + rng.random() * max(0, step - SHINGLE))]
        pieces += [text[at : word.start()], rng.choice(vocabulary)]
        at = word.end()
    return "".join([*pieces, text[at:]])


def make_corpus(megabytes: float, seed: int) -> tuple[list[str], list[tuple[int, int, str, float]], list[str]]:
    """Documents in a shuffled order; planted pairs (earlier, later, class, similarity); passages planted twice."""
    rng = random.Random(seed)
    base = list(real_text(megabytes, rng))
    rng.shuffle(base)
    long = [text for text in base if 120 <= len(normalised(text)) <= 800]
    vocabulary = sorted({word for text in base[:300] for word in WORD.findall(text) if word.isalpha()})
    han = [chr(c) for c in range(0x4E00, 0x4E00 + 2500)]
    number = max(40, int(megabytes * 6))
    documents, pairs, passages = list(base), [], []

    def plant(original: int, text: str, name: str) -> int:
        documents.append(text)
        pairs.append((original, len(documents) - 1, name, similarity(documents[original], text)))
        return len(documents) - 1

    positions = {id(text): i for i, text in enumerate(base)}
    picks = iter(rng.sample(long, min(len(long), number * 14)))

    def pick() -> tuple[int, str]:
        text = next(picks)
        return positions[id(text)], text

    for _ in range(number):
        plant(*pick(), "exact")
        at, text = pick()
        plant(at, text.translate({ord("."): " \u2026", ord('"'): "\u201d", ord(","): "\uff0c"}).upper(), "punctuation")
        for name, goal in CLASSES.items():
            at, text = pick()
            plant(at, edited(text, goal, vocabulary, rng), name)
        documents.append("".join(rng.choice(han) for _ in range(rng.randint(150, 500))))
        plant(len(documents) - 1, edited(documents[-1], 0.85, han, rng), "chinese .85")
        at, text = pick()
        words = WORD.findall(text)
        rng.shuffle(words)
        plant(at, " ".join(words), "look-alike: other order")
        at, text = pick()
        head = WORD.findall(text)[:100]
        plant(at, " ".join(head + rng.choices(vocabulary, k=300)), "look-alike: same head")
    for _ in range(number // 2):  # A-B-C: the same similarity from each to the next, edits in different halves
        at, text = pick()
        middle = plant(at, edited(text, 0.58, vocabulary, rng, (0, 0.5)), "chain A-B")
        last = plant(middle, edited(documents[middle], 0.58, vocabulary, rng, (0.5, 1)), "chain B-C")
        pairs.append((at, last, "chain A-C", similarity(text, documents[last])))
    template = rng.choices(vocabulary, k=250)
    for i in range(number):
        documents.append(" ".join(template + rng.choices(vocabulary, k=200)))
        if i:
            pairs.append((len(documents) - 2, len(documents) - 1, "template", similarity(*documents[-2:])))
    for size in (number * 2, number * 2):  # heavy clusters
        first, text = pick()
        for _ in range(size):
            words = WORD.findall(text)
            words[rng.randrange(len(words))] = rng.choice(vocabulary)
            plant(first, " ".join(words), "heavy")
    planted = {i for pair in pairs for i in pair[:2]}
    free = [i for i in range(len(base)) if i not in planted]  # a passage would change the similarity of a planted pair
    for _ in range(number):
        passage = " ".join(rng.choices(vocabulary, k=60))
        passages.append(passage)
        for place in rng.sample(free, 2):
            lines = documents[place].split("\n")
            lines.insert(rng.randint(0, len(lines)), passage)
            documents[place] = "\n".join(lines)
    order = list(range(len(documents)))
    rng.shuffle(order)
    where = {old: new for new, old in enumerate(order)}
    moved = [(min(where[a], where[b]), max(where[a], where[b]), name, known) for a, b, name, known in pairs]
    return [documents[i] for i in order], moved, passages


def ours(texts: "pa.LargeStringArray", folder: Path) -> np.ndarray:
    """For every document the one that stays in its place. The groupings are DuckDB's, as in the pipeline."""
    import duckdb
    import pyarrow as pa

    from llmjax.prepare.dedup import near, text_hashes

    database = duckdb.connect(str(folder / "near.duckdb"))
    database.execute("SET memory_limit='1GB'; SET threads=1; SET preserve_insertion_order=false")
    database.execute("CREATE TABLE keys (key UBIGINT, rank BIGINT)")
    for start in range(0, len(texts), 4096):
        keys_NB, words_N = text_hashes.near_keys(texts.slice(start, 4096), bands=BANDS, rows=ROWS, words=SHINGLE)
        rows = np.flatnonzero(words_N)
        part = pa.table({"key": keys_NB[rows].reshape(-1), "rank": np.repeat(rows + start, BANDS)})
        database.register("part", part)
        database.execute("INSERT INTO keys SELECT * FROM part")
    edges = database.sql(near.PAIRS_OF_BANDS).to_arrow_table()
    a, b = edges["center"].to_numpy(), edges["member"].to_numpy()
    ordinals = np.unique(np.concatenate([a, b]))
    sets = near.shingles(texts.take(pa.array(ordinals)), words=SHINGLE)
    jaccard = near.jaccard_of_pairs(a, b, ordinals, sets)
    for _ in range(2):
        table = near.components(a, b, jaccard, threshold=THRESHOLD)
        more_a, more_b = near.open_pairs(a, b, jaccard, table, threshold=THRESHOLD)
        if not len(more_a):
            break
        more = near.jaccard_of_pairs(more_a, more_b, ordinals, sets)
        a, b, jaccard = (np.concatenate(x) for x in ((a, more_a), (b, more_b), (jaccard, more)))
    table = near.components(a, b, jaccard, threshold=THRESHOLD)
    of = np.arange(len(texts))
    of[table["ordinal"].to_numpy()] = table["of"].to_numpy()
    return of


def our_runs(texts: "pa.LargeStringArray", folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Row and first token of every window of RUN tokens that has an equal one earlier."""
    import duckdb
    import pyarrow as pa

    from llmjax.prepare.dedup import text_hashes

    database = duckdb.connect(str(folder / "runs.duckdb"))
    database.execute("SET memory_limit='1GB'; SET threads=1; SET preserve_insertion_order=false")
    database.execute("CREATE TABLE anchors (hash UBIGINT); CREATE TABLE windows (hash UBIGINT, place BIGINT)")
    for start in range(0, len(texts), 4096):
        _, _, hashes = text_hashes.anchors(texts.slice(start, 4096), tokens=RUN)
        database.register("part", pa.table({"hash": hashes}))
        database.execute("INSERT INTO anchors SELECT * FROM part")
    found = database.sql("SELECT hash FROM anchors GROUP BY hash HAVING count(*) > 1 ORDER BY hash").to_arrow_table()
    repeated = found["hash"].to_numpy()
    for start in range(0, len(texts), 4096):
        rows, starts, keys = text_hashes.window_keys(texts.slice(start, 4096), tokens=RUN, repeated=repeated)
        database.register("part", pa.table({"hash": keys, "place": (rows + start << 32) + starts}))
        database.execute("INSERT INTO windows SELECT * FROM part")
    first = "SELECT hash, min(place) AS first FROM windows GROUP BY hash HAVING count(*) > 1"
    later = database.sql(f"SELECT place FROM windows JOIN ({first}) USING (hash) WHERE place != first ORDER BY place")
    places = later.to_arrow_table()["place"].to_numpy()
    return places >> 32, places & 0xFFFFFFFF


def compile_kernels(texts: "pa.LargeStringArray", folder: Path) -> np.ndarray:
    """Fills the cache of compiled code, which every later process of this machine finds."""
    our_runs(texts.slice(0, 100), folder)
    return ours(texts.slice(0, 100), folder)


def prefix_doubling(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The same without hashes: equal ranks of 32 tokens, at the window's beginning and at its end, are equal windows."""
    ids: dict[str, int] = {}
    tokens, rows, starts = [], [], []
    for number, text in enumerate(texts):
        found = [ids.setdefault(token, len(ids)) for token in TOKEN.findall(text)]
        tokens.append(np.array(found, np.int64))
        rows.append(np.full(len(found), number))
        starts.append(np.arange(len(found)))
    rank, row, start = np.concatenate(tokens), np.concatenate(rows), np.concatenate(starts)
    for shift in (1, 2, 4, 8, 16, RUN - 32):
        after = np.full(len(rank), 0)
        after[:-shift] = rank[shift:] + 1
        _, rank = np.unique(rank * (rank.max() + 2) + after, return_inverse=True)
    lengths = np.bincount(row, minlength=len(texts))
    inside = np.flatnonzero(start + RUN <= lengths[row])
    _, first, inverse = np.unique(rank[inside], return_index=True, return_inverse=True)
    later = inside[first[inverse] != np.arange(len(inside))]
    return row[later], start[later]


WORKERS: dict[str, Callable] = {
    "compile": compile_kernels,
    "llmjax": ours,
    "datasketch": run_datasketch,
    "rensa": run_rensa,
    "daft": run_daft,
    "datatrove": run_datatrove,
}


def work(name: str, folder: Path) -> None:
    """One tool in this process: writes what it decided and what it cost, reading the corpus not counted."""
    import pyarrow.parquet as pq

    texts = pq.read_table(folder / "corpus.parquet")["text"].combine_chunks()
    own = folder / f"{name}.work"
    own.mkdir()
    wall, cpu = time.perf_counter(), cpu_seconds()
    result = our_runs(texts, own) if name == "runs" else (WORKERS[name](texts, own),)
    cost = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": cpu_seconds() - cpu}
    status = Path("/proc/self/status").read_text()  # resource's figure includes what the parent had before exec
    peak = int(re.findall(r"VmHWM:\s+(\d+)", status)[0])
    np.savez(folder / f"{name}.npz", *result)
    (folder / f"{name}.json").write_text(json.dumps({**cost, "peak_megabytes": peak / 1024}))


def run_worker(name: str, folder: Path, python: str) -> dict[str, float] | None:
    command = [python, __file__, "--worker", name, "--folder", str(folder)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]) if python == sys.executable else "",
    }
    if python == sys.executable:  # libraries installed without their bytecode would be compiled again in every process
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        environment["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        print(f"{name} failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return json.loads((folder / f"{name}.json").read_text())


def judge(of: np.ndarray, texts: Sequence[str], pairs: Sequence[tuple[int, int, str, float]], verifies: bool) -> dict:
    """Recall by class beside the theory of the bands, and the similarity of what was removed to what stays for it."""
    classes: dict[str, list[tuple[float, bool, bool]]] = {}
    for a, b, name, known in pairs:
        classes.setdefault(name, []).append((known, of[a] != a or of[b] != b, of[a] == b or of[b] == a))
    by_class = {}
    for name, found in classes.items():
        expected = [(1 - (1 - j**ROWS) ** BANDS) * (j >= THRESHOLD or not verifies) for j, _, _ in found]
        by_class[name] = {
            "pairs": len(found),
            "similarity": float(np.mean([j for j, _, _ in found])),
            "one_removed": float(np.mean([hit for _, hit, _ in found])),
            "one_for_the_other": float(np.mean([direct for _, _, direct in found])),
            "theory": float(np.mean(expected)),
        }
    removed = np.flatnonzero(of != np.arange(len(of)))
    near = np.array([similarity(texts[i], texts[of[i]]) if of[i] >= 0 else 0.0 for i in removed.tolist()])
    return {
        "removed": len(removed),
        "precision": float(np.mean(near >= THRESHOLD)) if len(near) else None,
        "below_half": int(np.sum(near < 0.5)),
        "classes": by_class,
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peers", default="", help="comma-separated: datatrove, datasketch, rensa, daft")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument(
        "--suffix-array", type=float, default=0, help="MB of the corpus to compare with prefix doubling"
    )
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, Path(options.folder))
        return

    import pyarrow as pa
    import pyarrow.parquet as pq

    texts, pairs, passages = make_corpus(options.megabytes, options.seed)
    size = sum(len(text.encode()) for text in texts) / 1e6
    report: dict = {"megabytes": size, "documents": len(texts), "seed": options.seed, "tools": {}}
    print(f"{size:.1f} MB, {len(texts)} documents, {len(pairs)} planted pairs")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pq.write_table(pa.table({"text": pa.array(texts, pa.large_string())}), folder / "corpus.parquet")
        run_worker("compile", folder, sys.executable)
        for tool in ["llmjax", *filter(None, options.peers.split(","))]:
            if (cost := run_worker(tool, folder, sys.executable if tool == "llmjax" else options.peer_python)) is None:
                continue
            found = judge(np.load(folder / f"{tool}.npz")["arr_0"], texts, pairs, verifies=tool == "llmjax")
            report["tools"][tool] = {**cost, "megabytes_per_cpu_second": size / cost["cpu_seconds"], **found}
            show(tool, report["tools"][tool])
        if (cost := run_worker("runs", folder, sys.executable)) is not None:
            found = np.load(folder / "runs.npz")
            report["runs"] = {
                **cost,
                "megabytes_per_cpu_second": size / cost["cpu_seconds"],
                "windows": len(found["arr_0"]),
            }
            report["runs"]["passages_found"] = passages_found(texts, passages, found["arr_0"], found["arr_1"])
            print("runs of 50 tokens", json.dumps(report["runs"]))
    if options.suffix_array:
        report["suffix_array"] = compare_runs(texts, options.suffix_array)
        print("against prefix doubling", json.dumps(report["suffix_array"]))
    write(report, options.out)


def show(tool: str, result: dict) -> None:
    numbers = {k: v for k, v in result.items() if k != "classes"}
    print(f"\n{tool}: " + ", ".join(f"{k} {v:.4g}" for k, v in numbers.items() if v is not None))
    for name, row in result["classes"].items():
        shares = f"one removed {row['one_removed']:.4f}, for the other {row['one_for_the_other']:.4f}, theory {row['theory']:.4f}"
        print(f"  {name:26} {row['pairs']:6d} pairs  J {row['similarity']:.3f}  {shares}")


def passages_found(texts: Sequence[str], passages: Sequence[str], rows: np.ndarray, starts: np.ndarray) -> float:
    """The share of passages whose later copy lies in repeated windows from its first to its last token."""
    covered: dict[int, set[int]] = {}
    for row, start in zip(rows.tolist(), starts.tolist(), strict=True):
        covered.setdefault(row, set()).add(start)
    found = 0
    for passage in passages:
        holders = [row for row, text in enumerate(texts) if passage in text]
        length = len(TOKEN.findall(passage))
        for row in holders[1:2]:
            first = len(TOKEN.findall(texts[row][: texts[row].index(passage)]))
            found += all(first + i in covered.get(row, ()) for i in range(length - RUN + 1))
    return found / len(passages)


def compare_runs(texts: Sequence[str], megabytes: float) -> dict[str, float]:
    """Windows found by both ways in the documents whose characters both ways divide alike."""
    import pyarrow as pa

    chosen, size = [], 0
    for text in texts:
        if PLAIN.match(text) and size < megabytes * 1e6:
            chosen.append(text)
            size += len(text.encode())
    begin = time.perf_counter()
    expected = set(zip(*(x.tolist() for x in prefix_doubling(chosen)), strict=True))
    seconds = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        found = set(
            zip(*(x.tolist() for x in our_runs(pa.array(chosen, pa.large_string()), Path(folder))), strict=True)
        )
        own = time.perf_counter() - begin
    return {
        "megabytes": size / 1e6,
        "windows": len(expected),
        "missing": len(expected - found),
        "additional": len(found - expected),
        "seconds": own,
        "reference_seconds": seconds,
    }


if __name__ == "__main__":
    main()
