"""Memory and speed of importing and exporting a large model.

    python benchmarks/import_memory.py [--gigabytes 2] [--out results/import_memory.json]

Makes a Llama-shaped model of that size in a temporary folder (shards of safetensors, random bfloat16), then imports
and exports it, each in a process of its own. Reports the largest resident size of the process, above that of a process
that has only imported the same modules and traced the model. The exported tensors must be the made ones. Takes two
minutes and three times the model's size of disk.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from common import make_parser, peak_bytes, write

from llmjax.interop.families import FAMILIES
from llmjax.interop.matching import Shapes
from llmjax.interop.tensors import Tensor, Writer, open_folder, shard_names, write_index

SHARD_BYTES = 500_000_000
WIDTH, MLP_WIDTH, VOCABULARY = 2048, 8192, 32_000


def make_model(folder: Path, gigabytes: float) -> dict[str, Any]:
    """A model folder of about this size, and what is in it."""
    layer = 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * MLP_WIDTH)
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * WIDTH) / layer))
    theirs = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": MLP_WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(theirs))
    family, shapes, dtype = FAMILIES["llama"], Shapes(), np.dtype(ml_dtypes.bfloat16)
    shards: list[dict[str, Tensor]] = [{}]
    for row in family.rows(family.read_config(theirs)):
        for name, shape in zip(row.theirs, shapes.of(row), strict=True):
            if sum(tensor.nbytes for tensor in shards[-1].values()) > SHARD_BYTES:
                shards.append({})
            shards[-1][name] = Tensor(dtype, shape)
    rng = np.random.default_rng(0)
    for name, shard in zip(shard_names(len(shards)), shards, strict=True):
        writer = Writer(folder / name, shard)
        for tensor, about in shard.items():
            # Random significands around 1: as hard to compress as real weights.
            bits = rng.integers(0x3F00, 0x3FFF, about.shape, np.uint16) ^ (
                rng.integers(0, 2, about.shape, np.uint16) << 15
            )
            writer.write(tensor, bits.view(dtype))
        writer.close()
    write_index(folder, shards)
    sizes = [tensor.nbytes for shard in shards for tensor in shard.values()]
    return {"layers": layers, "bytes": sum(sizes), "largest_tensor_bytes": max(sizes), "shards": len(shards)}


def measure(work: str, *paths: Path) -> dict[str, float]:
    """Run `work` in a process of its own: seconds, and the peak of its resident memory above the baseline, in bytes."""
    command = [sys.executable, __file__, "--work", work, *map(str, paths)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def work(name: str, source: Path, target: Path) -> None:
    """The measured process: everything but the weights first, then what is measured."""
    from llmjax.interop.read import import_model, parameters_of
    from llmjax.interop.write import export_model

    theirs = json.loads((source / "config.json").read_text())
    parameters_of(FAMILIES["llama"].read_config(theirs) if name == "import" else _model_of(theirs))
    baseline = _resident()
    peak, done = baseline, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _resident())

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.perf_counter()
    if name == "import":
        import_model(source, target, tokenizer="none")
    else:
        export_model(source, target, shard_bytes=SHARD_BYTES)
    seconds = time.perf_counter() - began
    done.set()
    thread.join()
    # The kernel's own peak counts too, in case the watch was too slow for it.
    peak = max(peak, peak_bytes())
    print(
        json.dumps(
            {"seconds": round(seconds, 1), "baseline_bytes": baseline, "peak_above_baseline_bytes": peak - baseline}
        )
    )


def _model_of(config: dict[str, Any]) -> Any:
    from llmjax.config import from_json

    return from_json(json.dumps(config)).model


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = make_parser(__doc__, out=Path("results/import_memory.json"))
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work[0], Path(args.work[1]), Path(args.work[2]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results: dict[str, Any] = {"model": make_model(folder / "made", args.gigabytes)}
        results["import"] = measure("import", folder / "made", folder / "run")
        results["export"] = measure("export", folder / "run", folder / "exported")
        made, exported = open_folder(folder / "made"), open_folder(folder / "exported")
        results["exported_is_what_was_made"] = made.tensors.keys() == exported.tensors.keys() and all(
            np.array_equal(made.read(tensor).view(np.uint16), exported.read(tensor).view(np.uint16))
            for tensor in made.tensors
        )
    print(json.dumps(results, indent=1))
    write(results, args.out)


if __name__ == "__main__":
    main()
