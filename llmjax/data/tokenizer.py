"""Tokenizers: those trained here, which give back exactly the text they were given, and those of imported models.

Those trained here are SentencePiece BPE, unigram and char, and plain bytes (`tokenizer_training.py`). Normalisation,
dummy prefixes and collapsed spaces are switched off. Unknown characters become bytes, and so does U+2581, SentencePiece's
sign for a space. Decoding joins `piece_bytes`, the bytes that each id stands for, and does not use SentencePiece.

Imported tokenizers (`hf_tokenizer.py`) give the ids that their model was trained on. Some change the text: BERT's
lower-cases it and has no id for spaces, Llama 2's writes a space in front, and a character without a piece or bytes
becomes <unk>. `exact` says whether decoding gives the text back.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import sentencepiece

from llmjax import storage
from llmjax.data.written import Run, Written, runs
from llmjax.errors import UserError

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")  # ids 0, 1, 2, 3 of every tokenizer
FIRST_BYTE_ID = len(SPECIALS)
SPACE_SIGN = "\u2581"  # what SentencePiece writes for a space
MODEL_FILE, BYTE_FILE = "tokenizer.model", "tokenizer.json"
# Pieces that join a newline with the indentation after it: BPE itself never joins a space to what stands before it.
# On Python sources this saves 2% of the tokens and encodes faster.
INDENTS = ["\n" + SPACE_SIGN * spaces for spaces in (4, 8, 12, 16, 20, 24)]
BYTE_MODEL = json.dumps({"kind": "byte", "specials": SPECIALS}).encode() + b"\n"
# One text with everything that SentencePiece changes in one setting or another.
PROBE = " a  b\n\n    c\td \r\n\u2581\u2581 e\u0301 \u00e9 \ufb01 \uff21 \U0001f600 \x00 <bos> <0x41> "


class Segment(NamedTuple):
    """A part of a text."""

    text: str
    control: bool  # a control token, to be encoded as its id
    generated: bool  # in a chat: the model is to learn to write it ({% generation %})


class Backend(Protocol):
    """The encoder and decoder of an imported tokenizer."""

    def encode_batch(self, texts: Sequence[str], *, parse: bool, threads: int) -> list[list[int]]:
        """The ids of each text; with `parse`, control tokens that are written in a text become their ids."""

    def encode_segments(self, segments: Sequence[Segment]) -> list[int]:
        """The ids of one text, in which only those segments are control tokens that say so."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special ones."""


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back. Special ids come out of `encode` only when they are asked for, whatever the text says.

    Imported tokenizers may lack any of the special ids (None), use one for several purposes (GPT-2 has one for the
    beginning and the end of a document, SmolLM2 pads with its end), and have ids with holes between them. Code uses
    `start_id`, `end_id` and `eos_ids`. Lengths and segments say where padding is; an id never does.
    """

    kind: str  # "sentencepiece", "byte", or of an imported one "huggingface" or "none"
    vocab_size: int  # one more than the largest id
    piece_bytes: tuple[bytes, ...] = field(repr=False)  # the bytes each id stands for, b"" for special ids
    model: bytes = field(repr=False)  # the file that `save` writes
    processor: sentencepiece.SentencePieceProcessor | None = None
    pad_id: int | None = 0
    bos_id: int | None = 1
    eos_id: int | None = 2
    unk_id: int | None = 3
    mask_id: int | None = None
    sep_id: int | None = None
    cls_id: int | None = None
    more_eos_ids: tuple[
        int, ...
    ] = ()  # besides eos_id, ids at which a generated text ends (a chat model's end of turn)
    prefix_ids: tuple[int, ...] = (1,)  # what the model expects before a text that it reads
    suffix_ids: tuple[int, ...] = ()  # and after it: BERT's [SEP], T5's </s>
    unsampled_ids: tuple[int, ...] = (0, 1, 3)  # never generated
    special_ids: Mapping[str, int] = field(
        default_factory=lambda: dict(zip(SPECIALS, range(4), strict=True)), repr=False
    )
    mark_ids: Mapping[str, int] = field(default_factory=dict, repr=False)  # control tokens that texts show, <think>
    exact: bool = True  # whether decode(encode(text)) == text for every text
    chat_template: str = field(default="", repr=False)  # Jinja, as in Hugging Face's tokenizer_config.json
    tool_template: str = field(default="", repr=False)  # in its place where there are tools, if a model has two
    backend: Backend | None = field(default=None, repr=False)
    name: str = ""  # of the file that `save` writes; empty: by the kind
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)  # what else `save` writes

    @property
    def fingerprint(self) -> str:
        """A hash of the tokenizer's file: equal for tokenizers that give equal ids."""
        return hashlib.blake2b(self.model + self.files.get("added_tokens.json", b""), digest_size=16).hexdigest()

    @cached_property
    def control_ids(self) -> Mapping[str, int]:
        """The tokens that no text of a stranger may become: special ones, and the marks of turns, tools, thoughts."""
        return {**self.special_ids, **self.mark_ids}

    @property
    def named_tokens(self) -> dict[str, str]:
        """The texts of the named ids that there are, by name: "bos", "eos", "pad", "unk", "sep", "cls", "mask"."""
        texts = {i: text for text, i in self.control_ids.items()}
        ids = {name: getattr(self, f"{name}_id") for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")}
        return {name: texts[i] for name, i in ids.items() if i in texts}

    @property
    def start_id(self) -> int:
        """What documents begin with: <bos>, else [CLS], else <eos>, so that their first token is predicted too."""
        return self._first_of(self.bos_id, self.cls_id, self.eos_id, self.sep_id)

    @property
    def end_id(self) -> int:
        """What documents end with: <eos>, else [SEP], else what they begin with. It may be the same as `start_id`."""
        return self._first_of(self.eos_id, self.sep_id, self.bos_id, self.cls_id)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids at which a generated text ends."""
        return (() if self.eos_id is None else (self.eos_id,)) + self.more_eos_ids

    def _first_of(self, *ids: int | None) -> int:
        for i in ids:
            if i is not None:
                return i
        raise UserError(
            "the tokenizer has no id that could part documents: give it a bos_token or an eos_token in "
            "tokenizer/tokenizer_config.json"
        )

    def encode(self, text: str, *, specials: str = "text") -> list[int]:
        """The ids of a text, without what `prefix_ids` and `suffix_ids` put around it.

        Args:
            specials: what becomes of control tokens that are written in the text, such as "<|im_end|>": "text" encodes
                them like any other characters; "parse" gives their ids, and of a chat's text (`chat_text`) only those
                that the template wrote.

        Raises UserError for a lone surrogate, which is no character.
        """
        return self.encode_batch([text], threads=1, specials=specials)[0]

    def encode_batch(self, texts: Sequence[str], *, threads: int = -1, specials: str = "text") -> list[list[int]]:
        """The ids of each text, as `encode` gives them, with this many threads (-1: one a core)."""
        if specials not in ("text", "parse"):
            raise UserError(f"specials={specials!r} is not known: give 'text' or 'parse'")
        for text in texts:
            check_characters(text)
        if specials == "parse" and (self.backend is None or any(isinstance(text, Written) for text in texts)):
            return [self._encode_segments(self.segments(text)) for text in texts]
        texts = [str.__str__(text) for text in texts]
        if self.backend is not None:
            return self.backend.encode_batch(texts, parse=specials == "parse", threads=threads)
        if self.processor is None:
            return [[byte + FIRST_BYTE_ID for byte in text.encode()] for text in texts]
        if not any(SPACE_SIGN in text for text in texts):
            return self.processor.encode(list(texts), num_threads=threads)
        parts = [text.split(SPACE_SIGN) for text in texts]
        ids = iter(self.processor.encode([part for row in parts for part in row], num_threads=threads))
        return [self._join([next(ids) for _ in row]) for row in parts]

    def _encode_segments(self, segments: Sequence[Segment]) -> list[int]:
        if self.backend is not None:
            return self.backend.encode_segments(segments)
        return encode_between(segments, self.control_ids, self.encode)

    def segments(self, text: str) -> list[Segment]:
        """The parts of a text, none empty: control tokens, and what is between them.

        In a chat's text (`chat_text`) those that the template wrote are control tokens, in any other text every one.
        """
        found: list[Segment] = []
        for run in runs(text) if isinstance(text, Written) else [Run(text, by_template=True, generated=False)]:
            parts = self._control_pattern.split(run.text) if run.by_template else [run.text]
            for i, part in enumerate(parts):
                made = Segment(part, control=i % 2 == 1, generated=run.generated)
                if found and not made.control and found[-1][1:] == made[1:]:
                    found[-1] = made._replace(text=found[-1].text + part)
                elif part:
                    found.append(made)
        return found

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        return any_of(self.control_ids)

    def _join(self, parts: Sequence[list[int]]) -> list[int]:
        sign = [self.piece_bytes.index(bytes([byte])) for byte in SPACE_SIGN.encode()]
        joined = list(parts[0])
        for part in parts[1:]:
            joined += sign + part
        return joined

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special ids are left out and bytes that are no UTF-8 become U+FFFD."""
        if self.backend is not None:
            return self.backend.decode(ids)
        return b"".join(self.piece_bytes[i] for i in ids).decode("utf-8", "replace")

    def save(self, folder: Path) -> Path:
        """Write the tokenizer's file, tokenizer.model or tokenizer.json, and what belongs to it; return its path."""
        file = folder / (self.name or (BYTE_FILE if self.processor is None else MODEL_FILE))
        storage.write_bytes(file, self.model)
        for name, data in self.files.items():
            storage.write_bytes(folder / name, data)
        return file


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds the longest of the texts, as its only group; nothing, if there are none."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def encode_between(
    segments: Sequence[Segment], ids: Mapping[str, int], encode: Callable[[str], list[int]]
) -> list[int]:
    """The ids of control tokens, and of the texts between them, each of which `encode` gets whole."""
    found: list[int] = []
    for control, group in itertools.groupby(segments, key=lambda segment: segment.control):
        texts = [segment.text for segment in group]
        found += [ids[text] for text in texts] if control else encode("".join(texts))
    return found


def byte_tokenizer() -> Tokenizer:
    """The 256 bytes and the special ids."""
    pieces = (b"",) * len(SPECIALS) + tuple(bytes([byte]) for byte in range(256))
    return Tokenizer(kind="byte", vocab_size=len(pieces), piece_bytes=pieces, model=BYTE_MODEL)


def from_model(model: bytes) -> Tokenizer:
    """A tokenizer from the bytes of a SentencePiece model. Raises UserError if it is not compatible."""
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
        size = processor.vocab_size()
    except RuntimeError as error:
        raise UserError("it is not a SentencePiece model (is the file complete?)") from error
    found = [processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id()]
    if found != [0, 1, 2, 3]:
        raise UserError(
            f"its special ids pad, bos, eos, unk are {', '.join(map(str, found))} where llmjax needs 0, 1, 2, 3: "
            "train it with --pad_id=0 --bos_id=1 --eos_id=2 --unk_id=3, or leave tokenizer.path empty to train one here"
        )
    pieces = sentencepiece_bytes(processor)
    if missing := 256 - len({piece for i, piece in enumerate(pieces) if processor.is_byte(i)}):
        raise UserError(f"{missing} of the 256 bytes have no piece: train it with --byte_fallback=true")
    tokenizer = Tokenizer(kind="sentencepiece", vocab_size=size, piece_bytes=pieces, model=model, processor=processor)
    if tokenizer.decode(tokenizer.encode(PROBE)) != PROBE:
        raise UserError(
            "it changes the text it encodes: train it with --normalization_rule_name=identity --add_dummy_prefix=false "
            "--remove_extra_whitespaces=false"
        )
    return tokenizer


def check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text has a lone surrogate, U+{ord(text[error.start]):04X}, at character {error.start}: it is half "
            "of a character and has no UTF-8; read the file with errors='replace' or remove it"
        ) from error


def sentencepiece_bytes(processor: sentencepiece.SentencePieceProcessor) -> tuple[bytes, ...]:
    """The bytes that each id of a SentencePiece model stands for, b"" for control pieces and <unk>."""

    def of(i: int) -> bytes:
        piece = processor.id_to_piece(i)
        if processor.is_byte(i):
            return bytes([int(piece[3:5], 16)])
        if processor.is_control(i) or processor.is_unknown(i):
            return b""
        return piece.replace(SPACE_SIGN, " ").encode()

    return tuple(of(i) for i in range(processor.vocab_size()))
