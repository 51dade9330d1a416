"""Training of tokenizers: SentencePiece BPE, unigram and char, with every setting that changes text switched off."""

import io
import re
from collections.abc import Iterable, Iterator
from typing import Any

import sentencepiece

from llmjax.data.tokenizer import (
    FIRST_BYTE_ID,
    INDENTS,
    SPECIALS,
    Tokenizer,
    byte_tokenizer,
    check_characters,
    from_model,
)
from llmjax.errors import UserError

CHUNK_CHARACTERS = 1000  # SentencePiece skips training sentences of more than 4,192 bytes
# Fixed, not the number of cores: unigram training sums floats per thread, so the result depends on it.
TRAIN_THREADS = 2


def train_tokenizer(
    texts: Iterable[str],
    *,
    kind: str,
    vocab_size: int,
    split_digits: bool = True,
    text_bytes: int = 0,
    train_bytes: int = 0,
) -> Tokenizer:
    """Train a tokenizer; the same texts give the same tokenizer, byte for byte.

    Args:
        texts: documents; read once, one at a time.
        kind: "bpe" or "unigram" of `vocab_size` pieces, special ids and bytes included; "char" with a piece for every
            character that occurs, or "byte", which both derive their sizes.
        split_digits: never join digits into a piece.
        text_bytes, train_bytes: if both are given, train on this share of every text, `train_bytes / text_bytes`.

    Raises:
        UserError: for a vocabulary that is larger or smaller than the texts allow, with the size that works; for
            texts without a character; for a lone surrogate.
    """
    if kind == "byte":
        return byte_tokenizer()
    share = min(1.0, train_bytes / text_bytes) if text_bytes and train_bytes else 1.0
    chunks = _sample(_chunks(texts), share=share)
    settings: dict[str, Any] = {"vocab_size": vocab_size, "character_coverage": 0.9995, "user_defined_symbols": INDENTS}
    if kind == "char":
        # SentencePiece wants the size before it sees the text, which it then holds in memory as well.
        held = list(chunks)
        size = FIRST_BYTE_ID + 256 + len(set().union(*held))
        settings = {"vocab_size": size, "character_coverage": 1.0, "hard_vocab_limit": False}
        chunks = iter(held)
    return from_model(_train(chunks, kind=kind, split_digits=split_digits, **settings))


def _train(chunks: Iterator[str], *, kind: str, **settings: Any) -> bytes:
    first = next(chunks, None)
    if first is None:
        raise UserError("there is no text to train a tokenizer on: check data.sources and data.min_bytes")

    def sentences() -> Iterator[str]:
        yield first
        yield from chunks

    pad, bos, eos, unk = SPECIALS
    model = io.BytesIO()  # not a file, whose name SentencePiece would write into the model
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            model_type=kind,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indentation becomes few tokens
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece=pad,
            bos_piece=bos,
            eos_piece=eos,
            unk_piece=unk,
            num_threads=TRAIN_THREADS,
            shuffle_input_sentence=False,
            minloglevel=2,
            # Of fewer pieces than the special tokens SentencePiece says nothing that helps; these are too few anyway;
            # and of more than an int holds nothing either.
            **{**settings, "vocab_size": min(max(settings["vocab_size"], len(SPECIALS) + 1), 10**9)},
        )
    except (RuntimeError, OSError) as error:
        explained = _vocabulary_error(str(error), settings["vocab_size"])
        if explained is None:
            raise
        raise explained from error
    return model.getvalue()


def _vocabulary_error(message: str, vocab_size: int) -> UserError | None:
    if high := re.search(r"Vocabulary size too high.*?value <= (\d+)", message, re.DOTALL):
        return UserError(
            f"tokenizer.vocab_size={vocab_size} is too large: the corpus supports at most {high[1]} pieces; "
            f"set tokenizer.vocab_size={high[1]} or less, or add text"
        )
    if "sentences_.empty()" in message:
        return UserError("there is nothing but line feeds to train a tokenizer on: check data.sources")
    if small := re.search(r"Vocabulary size is smaller than required_chars\.? *\d+ vs (\d+)", message):
        return UserError(
            f"tokenizer.vocab_size={vocab_size} is too small: the characters, bytes and special tokens alone take "
            f"{small[1]}; set tokenizer.vocab_size={small[1]} or more"
        )
    return None


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    """Whole lines of each text, at most CHUNK_CHARACTERS together, without NUL, which SentencePiece refuses."""
    for text in texts:
        check_characters(text)
        chunk = ""
        for line in text.replace("\0", "").splitlines(keepends=True):
            for start in range(0, len(line), CHUNK_CHARACTERS):
                part = line[start : start + CHUNK_CHARACTERS]
                if chunk and len(chunk) + len(part) > CHUNK_CHARACTERS:
                    yield chunk
                    chunk = ""
                chunk += part
        if chunk:
            yield chunk


def _sample(chunks: Iterator[str], *, share: float) -> Iterator[str]:
    """This share of the characters, evenly spread."""
    credit = 0.5 * CHUNK_CHARACTERS
    for chunk in chunks:
        credit += share * len(chunk)
        if share >= 1 or credit >= len(chunk):
            credit -= len(chunk)
            yield chunk
