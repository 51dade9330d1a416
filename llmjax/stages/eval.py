"""The eval stage: how well a run's model predicts the held-out documents, and a compressor beside it."""

import lzma
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from llmjax import human
from llmjax.api import load
from llmjax.data.documents import read_documents
from llmjax.data.score import Score, total_score
from llmjax.data.tokens import load_index, read_stream
from llmjax.eval.bits_per_byte import split_documents


def xz_bytes(data: bytes) -> int:
    """Bytes that `xz -9e` needs for `data`."""
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def run(c: ConfigDict, workdir: Path) -> dict[str, float | int | str]:
    """The eval stage: perplexity and bits per byte of the held-out documents of each source, and xz beside them.

    Raises:
        ValueError: when the model or the tokenizer cannot be read.
    """
    began = time.perf_counter()
    model = load(workdir)
    index = load_index(workdir / "tokenizer" / "tokens")
    if not index.splits["heldout"]:
        print(
            "nothing was held out, so there is nothing to measure: see data.holdout_percent and data.holdout_tail_percent"
        )
        return {"bytes": 0}
    results: dict[str, float | int | str] = {}
    scores, compressed, raw = [], 0, 0
    for source in index.splits["heldout"]:
        documents = list(split_documents(read_stream(index.folder, "heldout", source)))
        texts = [d.text.encode() for d in read_documents(workdir / "prepare" / "heldout", source=source)]
        if c.eval.max_bytes:
            total = np.cumsum([len(text) for text in texts])
            keep = max(int(np.searchsorted(total, c.eval.max_bytes, side="right")), 1)
            documents, texts = documents[:keep], texts[:keep]
        part = model.score(
            documents,
            stride=c.eval.stride,
            batch_size=c.eval.batch_size,
            sequence_length=c.eval.sequence_length,
            on_tokens=_progress(source, sum(len(d) - 1 for d in documents)),
        )
        text = b"".join(texts)
        assert part.bytes == len(text), (part.bytes, len(text))
        scores.append(part)
        results |= {f"{name}/{source}": value for name, value in _numbers(part).items()}
        line = f"{source}: {part.bits_per_byte:.4f} bits per byte, perplexity {part.perplexity:.2f} a token, {human.size(part.bytes)}"
        if c.eval.xz:
            size = xz_bytes(text)
            compressed, raw = compressed + size, raw + len(text)
            results[f"xz_bits_per_byte/{source}"] = 8 * size / max(len(text), 1)
            line += f"; xz -9e needs {8 * size / max(len(text), 1):.4f}"
        print(line)
    whole = total_score(scores)
    head = {**_numbers(whole), "checkpoint_step": model.step}
    if c.eval.xz:
        head["xz_bits_per_byte"] = 8 * compressed / max(raw, 1)
    return {**head, **results, "seconds": time.perf_counter() - began}


def _numbers(score: Score) -> dict[str, float | int | str]:
    return {
        "bits_per_byte": score.bits_per_byte,
        "perplexity": score.perplexity,
        "loss": score.loss,
        "tokens": score.tokens,
        "bytes": score.bytes,
    }


def _progress(label: str, total: int) -> Callable[[int], None] | None:
    if not sys.stderr.isatty():
        return None

    def show(done: int) -> None:
        sys.stderr.write(f"\rscoring {label}: {done:,} of {total:,} tokens" + ("\r\x1b[K" if done >= total else ""))
        sys.stderr.flush()

    return show
