"""The near-duplicate tools that `dedup.py` measures beside ours, and the definitions that the comparison shares.

All use 14 x 8 hash functions and runs of five words. Each returns, for every document, the document that is kept in
its place. They run under an interpreter that has the peers; llmjax need not be there.
"""

import glob
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

WORD = re.compile(r"[\u3041-\u30ff\u4e00-\u9fff]|[^\W\u3041-\u30ff\u4e00-\u9fff]+")
DIGIT = re.compile(r"\d")
TOKEN = re.compile(rf"{WORD.pattern}|\S")
BANDS, ROWS, SHINGLE, THRESHOLD = 14, 8, 5, 0.7


def normalised(text: str) -> list[str]:
    return WORD.findall(DIGIT.sub("0", text.lower()))


def shingle_set(text: str) -> set[tuple[str, ...]]:
    words = normalised(text)
    return {tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))} if words else set()


def similarity(a: str, b: str) -> float:
    one, two = shingle_set(a), shingle_set(b)
    return len(one & two) / max(1, len(one | two))


def unions(number: int, groups: Iterable[Sequence[int] | np.ndarray]) -> np.ndarray:
    """Connected components of groups: the smallest member of each stays."""
    parent = list(range(number))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for group in groups:
        for other in group[1:]:
            a, b = sorted((root(int(group[0])), root(int(other))))
            parent[b] = a
    return np.array([root(i) for i in range(number)])


def run_datasketch(texts: "pa.LargeStringArray", folder: Path) -> np.ndarray:
    import xxhash
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
    template = MinHash(num_perm=BANDS * ROWS, hashfunc=lambda b: xxhash.xxh32_intdigest(b))
    groups = []
    for i, text in enumerate(texts.to_pylist()):
        sketch = template.copy()
        sketch.update_batch([" ".join(shingle).encode() for shingle in shingle_set(text)])
        groups.append([i, *index.query(sketch)])
        index.insert(i, sketch)
    return unions(len(texts), groups)


def run_rensa(texts: "pa.LargeStringArray", folder: Path) -> np.ndarray:
    from rensa import RMinHash, RMinHashLSH

    index = RMinHashLSH(threshold=THRESHOLD, num_perm=BANDS * ROWS, num_bands=BANDS)
    groups = []
    for i, text in enumerate(texts.to_pylist()):
        sketch = RMinHash(num_perm=BANDS * ROWS, seed=42)
        words = normalised(text)
        sketch.update([" ".join(words[j : j + SHINGLE]) for j in range(max(1, len(words) - SHINGLE + 1))])
        groups.append([i, *index.query(sketch)])
        index.insert(i, sketch)
    return unions(len(texts), groups)


def run_daft(texts: "pa.LargeStringArray", folder: Path) -> np.ndarray:
    import daft
    import pyarrow as pa

    frame = daft.from_arrow(pa.table({"text": texts}))
    plain = daft.col("text").normalize(remove_punct=True, lowercase=True, nfd_unicode=True, white_space=True)
    hashes = plain.minhash(num_hashes=BANDS * ROWS, ngram_size=SHINGLE, hash_function="xxhash")
    column = frame.select(hashes.alias("m")).to_arrow()["m"].combine_chunks()
    signatures = column.flatten().to_numpy().reshape(len(texts), BANDS * ROWS)
    groups = []
    for band in range(BANDS):
        rows = np.ascontiguousarray(signatures[:, band * ROWS : (band + 1) * ROWS])
        _, inverse = np.unique(rows.view(f"V{rows.itemsize * ROWS}").reshape(-1), return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        groups += [g for g in np.split(order, np.flatnonzero(np.diff(inverse[order])) + 1) if len(g) > 1]
    return unions(len(texts), groups)


def run_datatrove(texts: "pa.LargeStringArray", folder: Path) -> np.ndarray:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import minhash
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.hashing import HashConfig

    (folder / "in").mkdir()
    with (folder / "in" / "0.jsonl").open("w") as out:
        for i, text in enumerate(texts.to_pylist()):
            out.write(json.dumps({"text": text, "id": str(i)}) + "\n")
    settings = minhash.MinhashConfig(
        n_grams=SHINGLE, num_buckets=BANDS, hashes_per_bucket=ROWS, hash_config=HashConfig(precision=64)
    )
    read = JsonlReader(str(folder / "in"))
    places = [str(folder / name) for name in ("signatures", "buckets", "clusters", "out", "removed")]
    clusters = minhash.MinhashDedupCluster(places[1], places[2], config=settings, save_cluster_id=True)
    filtered = minhash.MinhashDedupFilter(
        places[2], exclusion_writer=JsonlWriter(places[4], compression=None), load_cluster_ids=True
    )
    for steps, tasks in (
        ([read, minhash.MinhashDedupSignature(places[0], config=settings)], 1),
        ([minhash.MinhashDedupBuckets(places[0], places[1], config=settings)], BANDS),
        ([clusters], 1),
        ([read, filtered, JsonlWriter(places[3], compression=None)], 1),
    ):
        LocalPipelineExecutor(
            steps, tasks=tasks, workers=1, logging_dir=str(folder / f"log{len(os.listdir(folder))}")
        ).run()
    of, kept = np.arange(len(texts)), {}
    for place, is_kept in ((places[3], True), (places[4], False)):
        for path in glob.glob(f"{place}/*.jsonl"):
            for line in Path(path).read_text().splitlines():
                row = json.loads(line)
                cluster = row["metadata"].get("minhash_cluster_id", -1)
                if is_kept and cluster != -1:
                    kept[cluster] = int(row["id"])
                elif not is_kept:
                    of[int(row["id"])] = kept.get(cluster, -1)
    return of
