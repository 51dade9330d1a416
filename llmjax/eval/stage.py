"""The eval stage: perplexity and bits per byte on the held-out documents, beside a compressor, and benchmarks."""

import dataclasses
import functools
import lzma
import math
import time
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from llmjax import human, storage
from llmjax.data import replay
from llmjax.data.batches import heldout_batches
from llmjax.data.documents import read_texts
from llmjax.data.tokens import Index, load_index, read_stream
from llmjax.errors import UserError
from llmjax.eval import tasks
from llmjax.infer.language_model import LanguageModel, load
from llmjax.infer.score import split_documents
from llmjax.objectives import OBJECTIVES, corruption
from llmjax.parallel.mesh import row_ways
from llmjax.progress import counter
from llmjax.startup.cache import cache_of
from llmjax.train.heldout import make_heldout
from llmjax.train.score import Score, total_score


def xz_bytes(data: bytes) -> int:
    """Bytes that `xz -9e` needs for `data`."""
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def check(c: ConfigDict, workdir: Path | None, *, fresh: bool) -> None:
    """Raise UserError for benchmarks that cannot run, and for a run without held-out text."""
    if c.eval.tasks:
        tasks.check(c, allow_code_execution=False)
    if workdir is not None and not (workdir / "tokenizer" / "tokens").is_dir():
        raise UserError(
            f"{workdir} has no held-out text, as imported models have none: give `llmjax eval` benchmarks by --tasks"
        )


def run(c: ConfigDict, workdir: Path) -> dict[str, float | int | str]:
    """Measure perplexity, bits per byte and bits per character of each source's held-out documents, xz, and `eval.tasks`.

    For a model that does not predict text from left to right: the loss and accuracy of what its objective predicts, with
    a fixed choice of what is hidden.

    Raises:
        UserError: if the model or the tokenizer cannot be read.
    """
    began = time.perf_counter()
    model = load(workdir, mesh=c.infer.mesh, cache=cache_of(c))
    index = load_index(workdir / "tokenizer" / "tokens")
    if not index.splits["heldout"]:
        print(
            "nothing was held out, so there is nothing to measure: see data.holdout_percent and data.holdout_tail_percent"
        )
        return {"bytes": 0, **_tasks(c, model, workdir)}
    if not OBJECTIVES[model.config.objective.name].reads_left_to_right:
        return {**_by_objective(c, model, index), "seconds": time.perf_counter() - began}
    results: dict[str, float | int | str] = {}
    scores: dict[str, Score] = {}
    characters: dict[str, int] = {}
    compressed, raw = 0, 0
    for source in index.splits["heldout"]:
        stream = read_stream(index.folder, "heldout", source)
        documents = list(split_documents(stream, start_id=index.start_id, end_id=index.end_id))
        texts = [text.encode() for text in read_texts(workdir / "prepare", "heldout", source)]
        if c.eval.max_bytes:
            total = np.cumsum([len(text) for text in texts])
            keep = max(int(np.searchsorted(total, c.eval.max_bytes, side="right")), 1)
            documents, texts = documents[:keep], texts[:keep]
        shown = counter(f"scoring {source}", " tokens")
        part = model.score(
            documents,
            stride=c.eval.stride,
            batch_size=c.eval.batch_size,
            sequence_length=c.eval.sequence_length,
            languages=[index.language_numbers[name] for name in index.splits["heldout"][source]["languages"]],
            on_tokens=shown and functools.partial(shown, total=sum(len(d) - 1 for d in documents)),
        )
        text = b"".join(texts)
        if not model.tokenizer.exact:
            part = dataclasses.replace(part, bytes=len(text))
        assert part.bytes == len(text), (part.bytes, len(text))
        scores[source], characters[source] = part, sum(len(data.decode()) for data in texts)
        results |= {f"{name}/{source}": value for name, value in _numbers(part, characters[source]).items()}
        line = f"{source}: {part.bits_per_byte:.4f} bits per byte, perplexity {part.perplexity:.2f} a token, {human.size(part.bytes)}"
        if c.eval.xz:
            size = xz_bytes(text)
            compressed, raw = compressed + size, raw + len(text)
            results[f"xz_bits_per_byte/{source}"] = 8 * size / max(len(text), 1)
            line += f"; xz -9e needs {8 * size / max(len(text), 1):.4f}"
        print(line)
    for group, names in replay.groups(c, scores).items():
        part = total_score(scores[name] for name in names)
        numbers = _numbers(part, sum(characters[name] for name in names))
        results |= {f"{name}/{group}": value for name, value in numbers.items()}
        print(f"{group}: {part.bits_per_byte:.4f} bits per byte, perplexity {part.perplexity:.2f} a token")
    head = {**_numbers(total_score(scores.values()), sum(characters.values())), "checkpoint_step": model.step}
    if c.eval.xz:
        head["xz_bits_per_byte"] = 8 * compressed / max(raw, 1)
    return {**head, **results, **_tasks(c, model, workdir), "seconds": time.perf_counter() - began}


def show(workdir: Path) -> None:
    """Print the results of a run's eval stage."""
    results = storage.read_json(workdir / "eval" / "results.json", mend="delete it, and `llmjax eval` runs again")
    for name, value in results.items():
        print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")


def _tasks(c: ConfigDict, model: LanguageModel, workdir: Path) -> dict[str, float]:
    """The scores of `eval.tasks`; programs run only by the command's own --allow-code-execution."""
    return tasks.run(c, model, workdir) if c.eval.tasks else {}


def _by_objective(c: ConfigDict, model: LanguageModel, index: Index) -> dict[str, float | int | str]:
    """Loss and accuracy of what the model's objective predicts in held-out text, at most `eval.max_bytes` a source."""
    settings = model.config.copy_and_resolve_references()
    ways = row_ways(model.mesh)
    with settings.unlocked():
        settings.train.batch_size, settings.train.micro_batches = -(-c.eval.batch_size // ways) * ways, 1
    entries = index.splits["heldout"].values()
    shares = [c.eval.max_bytes / max(entry["text_bytes"], 1) if c.eval.max_bytes else 1.0 for entry in entries]
    tokens = max(min(share, 1.0) * entry["tokens"] for share, entry in zip(shares, entries, strict=True))
    batches = heldout_batches(
        settings,
        index.folder,
        count=max(1, math.ceil(tokens / (settings.train.batch_size * settings.train.sequence_length))),
        corruption=corruption(settings, model.tokenizer),
    )
    piece_sizes = np.array([len(piece) for piece in model.tokenizer.piece_bytes])
    measure = make_heldout(settings, model.module, batches, piece_sizes, model.mesh, model.params)
    measured = measure(model.params)
    results = {name.removeprefix("heldout_"): value for name, value in measured.items()}
    for source in ("", *(f"/{source}" for source in batches)):
        print(
            f"{source[1:] or 'all'}: loss {results[f'loss{source}']:.4f} and accuracy {results[f'accuracy{source}']:.2%} "
            f"of what objective.name={settings.objective.name} predicts"
        )
    return {**results, "objective": settings.objective.name, "checkpoint_step": model.step}


def _numbers(score: Score, characters: int) -> dict[str, float | int | str]:
    return {
        "bits_per_byte": score.bits_per_byte,
        "bits_per_character": score.nats / math.log(2) / max(characters, 1),
        "perplexity": score.perplexity,
        "loss": score.loss,
        "tokens": score.tokens,
        "bytes": score.bytes,
    }
