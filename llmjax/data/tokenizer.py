"""Tokenizers: SentencePiece BPE, unigram and char, and bytes; every one gives back exactly the text it was given.

What SentencePiece would change or lose is switched off (normalisation, dummy prefixes, collapsed spaces), what it
does not know becomes bytes, and U+2581, its own sign for a space, is passed around it as bytes. Decoding joins
`piece_bytes`, the bytes that each id stands for, so nothing that SentencePiece does when it decodes matters.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")  # ids 0, 1, 2, 3 of every tokenizer
FIRST_BYTE_ID = len(SPECIALS)
SPACE_SIGN = "\u2581"  # what SentencePiece writes for a space
MODEL_FILE, BYTE_FILE = "tokenizer.model", "tokenizer.json"
CHUNK_CHARACTERS = 1000  # SentencePiece skips training sentences of more than 4,192 bytes
# Pieces that join a newline with the indentation after it: BPE itself never joins a space to what stands before it.
# On Python sources this saves 2% of the tokens and encodes faster.
INDENTS = ["\n" + SPACE_SIGN * spaces for spaces in (4, 8, 12, 16, 20, 24)]
# Fixed, not the number of cores: unigram training sums floats per thread, so the result depends on it.
TRAIN_THREADS = 2
BYTE_MODEL = json.dumps({"kind": "byte", "specials": SPECIALS}).encode() + b"\n"
# One text with everything that SentencePiece changes in one setting or another.
PROBE = " a  b\n\n    c\td \r\n\u2581\u2581 e\u0301 \u00e9 \ufb01 \uff21 \U0001f600 \x00 <bos> <0x41> "


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back. Special ids never come out of `encode`, whatever the text says."""

    kind: str  # "sentencepiece" or "byte"
    vocab_size: int
    piece_bytes: tuple[bytes, ...] = field(repr=False)  # the bytes each id stands for, b"" for special ids
    model: bytes = field(repr=False)  # the file that `save` writes
    processor: sentencepiece.SentencePieceProcessor | None = None  # None: bytes
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    unk_id: int = 3

    @property
    def fingerprint(self) -> str:
        """A hash of the tokenizer's file: equal for tokenizers that give equal ids."""
        return hashlib.blake2b(self.model, digest_size=16).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special ids. Raises ValueError for a lone surrogate, which is no character."""
        return self.encode_batch([text], threads=1)[0]

    def encode_batch(self, texts: Sequence[str], *, threads: int = -1) -> list[list[int]]:
        """The ids of each text, as `encode` gives them, with this many threads (-1: one a core)."""
        for text in texts:
            _check_characters(text)
        if self.processor is None:
            return [[byte + FIRST_BYTE_ID for byte in text.encode()] for text in texts]
        if not any(SPACE_SIGN in text for text in texts):
            return self.processor.encode(list(texts), num_threads=threads)
        parts = [text.split(SPACE_SIGN) for text in texts]
        ids = iter(self.processor.encode([part for row in parts for part in row], num_threads=threads))
        return [self._join([next(ids) for _ in row]) for row in parts]

    def _join(self, parts: Sequence[list[int]]) -> list[int]:
        sign = [self.piece_bytes.index(bytes([byte])) for byte in SPACE_SIGN.encode()]
        joined = list(parts[0])
        for part in parts[1:]:
            joined += sign + part
        return joined

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special ids are left out and bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.piece_bytes[i] for i in ids).decode("utf-8", "replace")

    def save(self, folder: Path) -> Path:
        """Write tokenizer.model (SentencePiece) or tokenizer.json (bytes) and return its path."""
        file = folder / (BYTE_FILE if self.processor is None else MODEL_FILE)
        file.write_bytes(self.model)
        return file


def byte_tokenizer() -> Tokenizer:
    """The 256 bytes and the special ids."""
    pieces = (b"",) * len(SPECIALS) + tuple(bytes([byte]) for byte in range(256))
    return Tokenizer(kind="byte", vocab_size=len(pieces), piece_bytes=pieces, model=BYTE_MODEL)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a file, or of a folder that holds tokenizer.model or tokenizer.json.

    Raises:
        ValueError: if there is none, or for a SentencePiece model that has other special ids than ours, has no bytes
            to fall back on, or does not give a text back exactly.
    """
    path = Path(path)
    files = [path / BYTE_FILE, path / MODEL_FILE] if path.is_dir() else [path]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ValueError(
            f"there is no tokenizer at {path}: run `llmjax tokenizer` first, or set tokenizer.path to a SentencePiece "
            ".model file"
        )
    model = file.read_bytes()
    if file.suffix == ".json":
        if model != BYTE_MODEL:
            raise ValueError(f"{file} does not describe the byte tokenizer; remove it and run `llmjax tokenizer` again")
        return byte_tokenizer()
    try:
        return from_model(model)
    except ValueError as error:
        raise ValueError(f"{file} cannot be used: {error}") from error


def from_model(model: bytes) -> Tokenizer:
    """A tokenizer from the bytes of a SentencePiece model. Raises ValueError if it is not compatible."""
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
        size = processor.vocab_size()
    except RuntimeError as error:
        raise ValueError("it is not a SentencePiece model (is the file complete?)") from error
    found = [processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id()]
    if found != [0, 1, 2, 3]:
        raise ValueError(
            f"its special ids pad, bos, eos, unk are {', '.join(map(str, found))} where llmjax needs 0, 1, 2, 3: "
            "train it with --pad_id=0 --bos_id=1 --eos_id=2 --unk_id=3, or leave tokenizer.path empty to train one here"
        )
    pieces = tuple(_bytes_of(processor, i) for i in range(size))
    if missing := 256 - len({piece for i, piece in enumerate(pieces) if processor.is_byte(i)}):
        raise ValueError(f"{missing} of the 256 bytes have no piece: train it with --byte_fallback=true")
    tokenizer = Tokenizer(kind="sentencepiece", vocab_size=size, piece_bytes=pieces, model=model, processor=processor)
    if tokenizer.decode(tokenizer.encode(PROBE)) != PROBE:
        raise ValueError(
            "it changes the text it encodes: train it with --normalization_rule_name=identity --add_dummy_prefix=false "
            "--remove_extra_whitespaces=false"
        )
    return tokenizer


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
        ValueError: for a vocabulary that is larger or smaller than the texts allow, with the size that works; for
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
        raise ValueError("there is no text to train a tokenizer on: check data.sources and data.min_bytes")

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
            **settings,
        )
    except (RuntimeError, OSError) as error:
        explained = _vocabulary_error(str(error), settings["vocab_size"])
        if explained is None:
            raise
        raise explained from error
    return model.getvalue()


def _vocabulary_error(message: str, vocab_size: int) -> ValueError | None:
    if high := re.search(r"Vocabulary size too high.*?value <= (\d+)", message, re.DOTALL):
        return ValueError(
            f"tokenizer.vocab_size={vocab_size} is too large: the corpus supports at most {high[1]} pieces; "
            f"set tokenizer.vocab_size={high[1]} or less, or add text"
        )
    if small := re.search(r"Vocabulary size is smaller than required_chars\.? *\d+ vs (\d+)", message):
        return ValueError(
            f"tokenizer.vocab_size={vocab_size} is too small: the characters, bytes and special tokens alone take "
            f"{small[1]}; set tokenizer.vocab_size={small[1]} or more"
        )
    return None


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    """Whole lines of each text, at most CHUNK_CHARACTERS together, without NUL, which SentencePiece refuses."""
    for text in texts:
        _check_characters(text)
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


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has a lone surrogate, U+{ord(text[error.start]):04X}, at character {error.start}: it is half "
            "of a character and has no UTF-8; read the file with errors='replace' or remove it"
        ) from error


def _bytes_of(processor: sentencepiece.SentencePieceProcessor, i: int) -> bytes:
    piece = processor.id_to_piece(i)
    if processor.is_byte(i):
        return bytes([int(piece[3:5], 16)])
    if processor.is_control(i) or processor.is_unknown(i):
        return b""
    return piece.replace(SPACE_SIGN, " ").encode()
