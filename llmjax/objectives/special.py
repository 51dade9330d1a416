"""Special ids of the objectives: <mask>, <sep>, the markers of fill-in-the-middle and the sentinels of span corruption.

They come after the tokenizer's own ids, in rows that pad the embedding, and always in the same order: a model keeps their
meaning when its training goes on with another objective. If an imported tokenizer has some of them, those are used,
because its model knows them.
"""

from dataclasses import dataclass, field

import numpy as np
from ml_collections import ConfigDict

from llmjax.config.objective_checks import SENTINELS
from llmjax.data.tokenizer import Tokenizer

NAMES = ("mask", "sep", "prefix", "suffix", "middle", *(f"sentinel_{i}" for i in range(SENTINELS)))
NEEDS = {"masked": NAMES[:1], "translation": NAMES[:1], "unilm": NAMES[:2], "infill": NAMES[2:5], "span": NAMES[5:]}
MARKERS = ("<fim_{}>", "<|fim_{}|>")  # what imported tokenizers call "prefix", "suffix" and "middle"
WORD_BREAKS = (b" ", b"\n", b"\t", b"\r")


@dataclass(frozen=True)
class Special:
    """The special ids of an objective, and which other ids are text."""

    size: int  # rows that the embedding must have: one more than the largest id in use
    start: int  # of a document
    end: int
    decoder_start: int  # what a decoder reads first: <bos>, or <pad> in T5
    mask: int
    sep: int
    prefix: int
    suffix: int
    middle: int
    sentinels: np.ndarray = field(repr=False)  # int32, in the order of their use
    ordinary: np.ndarray = field(repr=False)  # the ids that stand for text, int32
    is_text: np.ndarray = field(repr=False)  # bool by id: stands for text; only these are ever corrupted
    starts_word: np.ndarray = field(repr=False)  # bool by id: the piece begins with a space or a newline
    tokenizer: Tokenizer = field(repr=False)


def special_ids(c: ConfigDict, tokenizer: Tokenizer) -> Special:
    """The special ids of an objective (`c` are the settings under `objective`) with a tokenizer."""
    own = {"mask": tokenizer.mask_id, "sep": tokenizer.sep_id}
    own |= {f"sentinel_{i}": tokenizer.special_ids.get(f"<extra_id_{i}>") for i in range(SENTINELS)}
    for name in ("prefix", "suffix", "middle"):
        found = (tokenizer.special_ids.get(marker.format(name)) for marker in MARKERS)
        own[name] = next((i for i in found if i is not None), None)
    ids: dict[str, int] = {}
    for place, name in enumerate(NAMES):
        known = own[name]
        ids[name] = tokenizer.vocab_size + place if known is None else known
    pieces = tokenizer.piece_bytes
    is_text = np.zeros(tokenizer.vocab_size + len(NAMES), bool)
    is_text[: len(pieces)] = [bool(piece) for piece in pieces]
    starts_word = np.zeros_like(is_text)
    starts_word[: len(pieces)] = [piece.startswith(WORD_BREAKS) for piece in pieces]
    starts = (tokenizer.bos_id, tokenizer.pad_id, tokenizer.start_id)
    return Special(
        size=max([tokenizer.vocab_size, *(ids[name] + 1 for name in NEEDS.get(c.name, ()))]),
        start=tokenizer.start_id,
        end=tokenizer.end_id,
        decoder_start=next(i for i in starts if i is not None),
        mask=ids["mask"],
        sep=ids["sep"],
        prefix=ids["prefix"],
        suffix=ids["suffix"],
        middle=ids["middle"],
        sentinels=np.array([ids[f"sentinel_{i}"] for i in range(SENTINELS)], np.int32),
        ordinary=np.flatnonzero(is_text).astype(np.int32),
        is_text=is_text,
        starts_word=starts_word,
        tokenizer=tokenizer,
    )
