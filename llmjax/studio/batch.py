"""Tokens with what is learnt of them: the first batch of a training, rows of examples, streams of tokens."""

import codecs
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from llmjax import config
from llmjax.data.tokenizer import Tokenizer
from llmjax.data.tokenizer_files import load_tokenizer
from llmjax.errors import UserError
from llmjax.serve.refusals import Refusal
from llmjax.studio.watch import read_json

ROWS, TOKENS = 8, 1024  # of a batch that are shown
Piece = dict[str, Any]


@functools.lru_cache(maxsize=4)
def _tokenizer(folder: Path, _: float) -> Tokenizer:
    return load_tokenizer(folder)


def tokenizer_of(run: Path) -> Tokenizer:
    """The tokenizer of a run. Raises UserError if it has none."""
    folder = run / "tokenizer"
    if not folder.is_dir():
        raise UserError("the run has no tokenizer yet")
    return _tokenizer(folder, folder.stat().st_mtime)


def pieces(
    tokenizer: Tokenizer, ids: Sequence[int], learnt: Sequence[float] = (), targets: Sequence[int] = ()
) -> list[Piece]:
    """A dict for each token: its "text"; "learnt" and "control" if it is; "target" if it is to become another one.

    A character of several tokens is the text of its last one.
    """
    names = {i: name for name, i in tokenizer.control_ids.items()}
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def name(i: int) -> str:
        known = names.get(i) or (tokenizer.piece_bytes[i] if i < len(tokenizer.piece_bytes) else b"").decode(
            errors="replace"
        )
        return known or f"<{i}>"

    found: list[Piece] = []
    for place, i in enumerate(ids):
        control = i in names or i >= len(tokenizer.piece_bytes) or not tokenizer.piece_bytes[i]
        piece: Piece = {"text": name(i) if control else decoder.decode(tokenizer.piece_bytes[i])}
        if control:
            decoder.reset()
            piece["control"] = True
        if len(learnt) and learnt[place] > 0:
            piece["learnt"] = True
        if len(targets) and targets[place] != i:
            piece["target"] = name(targets[place])
        found.append(piece)
    return found


def first_batch(run: Path) -> dict[str, Any]:
    """The rows of the first batch of a run, as the training reads them: what is learnt is marked.

    Raises UserError when the data of the run is not there yet, and Refusal for batches that a model samples.
    """
    settings = read_json(run / "config.json")
    if not settings:
        raise UserError("the run has no config.json that can be read")
    c = config.from_json(json.dumps(settings)).lock()
    if c.objective.name == "policy":
        raise Refusal(400, "the model samples the batches of this run: look at its rounds", code="sampled")
    tokenizer = tokenizer_of(run)
    batch = _of_text(c, run, tokenizer) if c.data.format == "text" else _of_rows(c, run)
    rows = [
        _row({name: values[i] for name, values in batch.items()}, tokenizer)
        for i in range(min(ROWS, len(batch["tokens"])))
    ]
    return {"rows": rows, "shape": list(batch["tokens"].shape), "objective": c.objective.name}


def _of_text(c: ConfigDict, run: Path, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    from llmjax.data import ramp
    from llmjax.data.batches import TrainBatches, tokens_per_epoch
    from llmjax.data.tokens import load_index
    from llmjax.objectives import corruption
    from llmjax.train import budget, pretrain, setup

    c = pretrain.resolve(c, tokenizer)
    tokens, change = run / "tokenizer" / "tokens", corruption(c, tokenizer)
    sizes = ramp.batch_sizes(c.train, tokens_per_epoch=tokens_per_epoch(c, load_index(tokens), corruption=change))
    if budget.is_time(c):
        kept = budget.kept(c, run)
        total = kept.steps if kept else 0
    else:
        total = setup.steps_of(c, sizes)
    return TrainBatches(c, tokens, total_steps=total, corruption=change).batch(0)


def _of_rows(c: ConfigDict, run: Path) -> dict[str, np.ndarray]:
    from llmjax.post import batches, rows

    return batches.batches_of(batches.rows_of(rows.load(run, "train"), c), c)(0)


def _row(row: dict[str, np.ndarray], tokenizer: Tokenizer) -> dict[str, Any]:
    """A row of a batch: "parts", the pieces of each document or example in it.

    Where targets are the tokens that follow, what is marked are the targets with a weight; where they are not, such as
    for masked tokens, each token whose target has one.
    """
    tokens_L = row["tokens"][:TOKENS]
    segments_L = row["segments"][:TOKENS] if "segments" in row else np.ones(len(tokens_L), np.int32)
    targets_L, weights_L = row.get("targets"), row.get("weights")
    told: dict[str, Any] = {"tokens": int((segments_L > 0).sum()), "parts": []}
    if "source_tokens" in row:
        told["source"] = pieces(tokenizer, row["source_tokens"][:TOKENS].tolist())
    fits = targets_L is not None and weights_L is not None and len(targets_L) == len(weights_L) == len(row["tokens"])
    told["learnt"] = 0 if weights_L is None else int((weights_L > 0).sum())
    for place in _parts(segments_L):
        ids = tokens_L[place].tolist()
        if not fits:
            told["parts"].append(pieces(tokenizer, ids))
            continue
        assert targets_L is not None and weights_L is not None
        targets, weights = targets_L[place].tolist(), weights_L[place].tolist()
        if ids[1:] == targets[:-1]:
            more = 1 if weights[-1] else 0  # else the last target is the beginning of the next part
            told["parts"].append(pieces(tokenizer, ids + targets[len(ids) - 1 :][:more], [0.0, *weights]))
        else:
            told["parts"].append(pieces(tokenizer, ids, weights, targets))
    return told


def _parts(segments_L: np.ndarray) -> list[slice]:
    """The places of each segment that is no padding."""
    ends = [*(np.flatnonzero(np.diff(segments_L)) + 1).tolist(), len(segments_L)]
    return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False) if b > a and segments_L[a] > 0]
