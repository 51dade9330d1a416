"""Tokenizers of imported models: a `tokenizer.json` of Hugging Face's `tokenizers`, or the SentencePiece model of old ones.

They lie in a folder with what Hugging Face keeps beside them: tokenizer_config.json (which strings are <bos>, <eos>, ...
and the chat template) and generation_config.json (the ids at which generation ends, often several).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece

from llmjax.data.tokenizer import PROBE, SPACE_SIGN, Tokenizer, parse_specials, sentencepiece_bytes
from llmjax.errors import UserError

SENTENCEPIECE_FILES = ("spiece.model", "sentencepiece.bpe.model")
CONFIG_FILE, MAP_FILE = "tokenizer_config.json", "special_tokens_map.json"
GENERATION_FILE, TEMPLATE_FILE = "generation_config.json", "chat_template.jinja"
FILES = (CONFIG_FILE, MAP_FILE, GENERATION_FILE, TEMPLATE_FILE)  # what is kept beside the tokenizer
NAMES = ("bos", "eos", "pad", "unk", "mask", "sep", "cls")
# What the tokens are called when nothing says so; only counted when the vocabulary has them as special tokens.
USUAL = {
    "pad": ("<pad>", "[PAD]"),
    "unk": ("<unk>", "[UNK]"),
    "mask": ("<mask>", "[MASK]"),
    "sep": ("[SEP]",),
    "cls": ("[CLS]",),
}
NEVER = -1e6  # the score of a Unigram piece that no text may give


class JsonBackend:
    """`tokenizers`' Tokenizer of one tokenizer.json, and a second one in which special tokens are mere text."""

    def __init__(self, file: bytes, description: Mapping[str, Any]) -> None:
        """`description`: what the file says."""
        self._file = file.decode()
        specials = {t["content"] for t in description.get("added_tokens") or () if t.get("special")}
        plain = _without_specials(description, specials)
        self._plain = _build(self._file if plain is description else json.dumps(plain))
        self._plain.encode_special_tokens = True

    @cached_property
    def _parsing(self) -> Any:
        """The tokenizer as it is in the file, made when first needed: it takes as much memory again."""
        return _build(self._file)

    def encode_batch(self, texts: Sequence[str], *, parse: bool, threads: int) -> list[list[int]]:
        tokenizer = self._parsing if parse else self._plain
        if threads == 1:
            return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        return [row.ids for row in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._plain.decode(list(map(int, ids)), skip_special_tokens=True)

    def template_around(self, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that the file's own template puts before and after a text."""
        bare = self._plain.encode(text, add_special_tokens=False).ids
        whole = self._plain.encode(text, add_special_tokens=True).ids
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return tuple(whole[:start]), tuple(whole[start + len(bare) :])
        return (), ()


class PiecesBackend:
    """A SentencePiece model that may normalise, with tokens added to it (T5's <extra_id_0> ...)."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, special_ids: Mapping[str, int]) -> None:
        self._processor, self._special_ids = processor, special_ids

    def encode_batch(self, texts: Sequence[str], *, parse: bool, threads: int) -> list[list[int]]:
        if parse:
            return [parse_specials(text, self._special_ids, self._processor.encode) for text in texts]
        return self._processor.encode(list(texts), num_threads=threads)

    def decode(self, ids: Sequence[int]) -> str:
        size, specials = self._processor.vocab_size(), set(self._special_ids.values())
        return self._processor.decode([i for i in map(int, ids) if i < size and i not in specials])


def load(file: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face tokenizer.json and of what lies beside it. Raises UserError if it cannot be used."""
    model = file.read_bytes()
    try:
        description = json.loads(model)
        vocabulary = description["model"]["vocab"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            "it describes neither the byte tokenizer nor a tokenizer of the `tokenizers` package "
            f"({error.__class__.__name__}: {error})"
        ) from error
    backend = JsonBackend(model, description)
    added = description.get("added_tokens") or []
    ids = vocabulary if isinstance(vocabulary, dict) else {piece: i for i, (piece, _) in enumerate(vocabulary)}
    ids = {**ids, **{token["content"]: token["id"] for token in added}}
    specials = {token["content"]: token["id"] for token in added if token.get("special")}
    # In a text these two are ordinary characters in every vocabulary.
    prefix, suffix = backend.template_around("a b")
    beside = read_beside(file.parent)
    found = special_ids(beside, ids, specials)
    if found["unk"] is None:
        found["unk"] = ids.get(description["model"].get("unk_token"), description["model"].get("unk_id"))
    tokenizer = Tokenizer(
        kind="huggingface",
        vocab_size=max(ids.values()) + 1,
        piece_bytes=_piece_bytes(description, ids, set(specials.values())),
        model=model,
        prefix_ids=prefix,
        suffix_ids=suffix,
        special_ids=specials,
        backend=backend,
        name=file.name,
        **_shared(beside, found),
    )
    return _marked_exact(tokenizer)


def load_sentencepiece(file: Path) -> Tokenizer:
    """The tokenizer of a SentencePiece model of an imported one. Raises UserError if it cannot be used."""
    processor = sentencepiece.SentencePieceProcessor()
    model = file.read_bytes()
    try:
        processor.LoadFromSerializedProto(model)
        size = processor.vocab_size()
    except RuntimeError as error:
        raise UserError("it is not a SentencePiece model (is the file complete?)") from error
    beside = read_beside(file.parent)
    config = beside[CONFIG_FILE]
    specials = {processor.id_to_piece(i): i for i in range(size) if processor.is_control(i)}
    pieces = list(sentencepiece_bytes(processor))
    for key, token in (config.get("added_tokens_decoder") or {}).items():
        if int(key) >= size:
            specials[token["content"]] = int(key)
    if "extra_ids" in config and not any(i >= size for i in specials.values()):  # T5: from the last to the first
        count = int(config["extra_ids"])
        specials |= {f"<extra_id_{count - 1 - i}>": size + i for i in range(count)}
    pieces += [b""] * (max([size - 1, *specials.values()]) + 1 - size)
    ids = {processor.id_to_piece(i): i for i in range(size)} | specials
    found = special_ids(beside, ids, specials)
    for name, own in (("bos", processor.bos_id()), ("eos", processor.eos_id()), ("unk", processor.unk_id())):
        if found[name] is None and own >= 0 and f"{name}_token" not in config:
            found[name] = own
    adds_bos = config.get("add_bos_token", "Llama" in str(config.get("tokenizer_class")))
    adds_eos = config.get("add_eos_token", "T5" in str(config.get("tokenizer_class")))
    tokenizer = Tokenizer(
        kind="huggingface",
        vocab_size=len(pieces),
        piece_bytes=tuple(pieces),
        model=model,
        prefix_ids=(found["bos"],) if adds_bos and found["bos"] is not None else (),
        suffix_ids=(found["eos"],) if adds_eos and found["eos"] is not None else (),
        special_ids=specials,
        backend=PiecesBackend(processor, specials),
        name=file.name,
        **_shared(beside, found),
    )
    return _marked_exact(tokenizer)


def no_tokenizer(vocab_size: int) -> Tokenizer:
    """In the place of a tokenizer where a model has none: ids can be given to the model, text cannot."""

    class Missing:
        def encode_batch(self, texts: Sequence[str], *, parse: bool, threads: int) -> list[list[int]]:
            if texts:
                raise UserError("this model has no tokenizer: give it token ids, or import it with --tokenizer")
            return []

        def decode(self, ids: Sequence[int]) -> str:
            return ""

    none = dict.fromkeys(("pad_id", "bos_id", "eos_id", "unk_id"))
    return Tokenizer(
        kind="none", vocab_size=vocab_size, piece_bytes=(b"",) * vocab_size, model=b"", exact=False, backend=Missing(),
        prefix_ids=(), unsampled_ids=(), special_ids={}, **none,  # type: ignore[arg-type]
    )  # fmt: skip


def read_beside(folder: Path) -> dict[str, Any]:
    """The JSON files beside a tokenizer, {} for those that are not there, and the chat template as text."""
    beside: dict[str, Any] = {}
    for name in FILES[:-1]:
        path = folder / name
        try:
            beside[name] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError as error:
            raise UserError(f"{path} is no JSON ({error}): get the file again") from error
    template = folder / TEMPLATE_FILE
    beside[TEMPLATE_FILE] = template.read_text(encoding="utf-8") if template.is_file() else ""
    return beside


def special_ids(beside: Mapping[str, Any], ids: Mapping[str, int], specials: Iterable[str]) -> dict[str, int | None]:
    """bos, eos, pad, unk, mask, sep, cls -> id or None, from what lies beside a tokenizer.

    tokenizer_config.json decides where it has a say, be it null; then special_tokens_map.json, then the ids of
    generation_config.json, then the usual names among the special tokens.
    """
    found: dict[str, int | None] = {}
    for name in NAMES:
        says = [beside[f][f"{name}_token"] for f in (CONFIG_FILE, MAP_FILE) if f"{name}_token" in beside[f]]
        generation = beside[GENERATION_FILE].get(f"{name}_token_id")
        if says:
            content = says[0]["content"] if isinstance(says[0], dict) else says[0]
            found[name] = ids.get(content) if content is not None else None
        elif generation is not None:
            found[name] = generation[0] if isinstance(generation, list) else generation
        else:
            found[name] = next((ids[usual] for usual in USUAL.get(name, ()) if usual in specials), None)
    return found


def _shared(beside: Mapping[str, Any], found: Mapping[str, int | None]) -> dict[str, Any]:
    """The fields of a Tokenizer that come from the files beside it."""
    ends = beside[GENERATION_FILE].get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    template = beside[TEMPLATE_FILE] or beside[CONFIG_FILE].get("chat_template") or ""
    if isinstance(template, list):  # several, by name
        template = next((t["template"] for t in template if t.get("name") == "default"), "")
    files = {
        name: (json.dumps(beside[name], indent=2, ensure_ascii=False) + "\n").encode()
        for name in FILES[:-1]
        if beside[name]
    }
    if beside[TEMPLATE_FILE]:
        files[TEMPLATE_FILE] = beside[TEMPLATE_FILE].encode()
    return {
        **{f"{name}_id": i for name, i in found.items()},
        "more_eos_ids": tuple(i for i in dict.fromkeys(ends) if i != found["eos"]),
        "unsampled_ids": (),
        "chat_template": template,
        "files": files,
    }


def _marked_exact(tokenizer: Tokenizer) -> Tokenizer:
    import dataclasses

    return dataclasses.replace(tokenizer, exact=tokenizer.decode(tokenizer.encode(PROBE)) == PROBE)


def _build(file: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError("reading it needs the package `tokenizers`: pip install 'llmjax[hf]'") from error
    try:
        tokenizer = tokenizers.Tokenizer.from_str(file)
    except Exception as error:  # the package raises plain Exceptions
        raise UserError(f"the `tokenizers` package does not understand it ({error}); a newer one may") from error
    # Some files carry what they were last used with (MiniLM's pads to 128).
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _without_specials(description: Mapping[str, Any], specials: set[str]) -> Mapping[str, Any]:
    """The same tokenizer, whose model never puts a special token together out of text.

    The vocabularies of converted SentencePiece models hold special tokens as pieces, which Unigram would choose and BPE
    would merge when a text has their characters.
    """
    model = description["model"]
    if model.get("type") == "Unigram" or isinstance(model["vocab"], list):
        unknown = model.get("unk_id")
        vocabulary = [
            [piece, NEVER if piece in specials and i != unknown else score]
            for i, (piece, score) in enumerate(model["vocab"])
        ]
        return {**description, "model": {**model, "vocab": vocabulary}}
    if merges := model.get("merges"):
        kept = [pair for pair in merges if _joined(pair) not in specials]
        if len(kept) == len(merges):
            return description
        return {**description, "model": {**model, "merges": kept}}
    return description


def _joined(pair: str | Sequence[str]) -> str:
    return pair.replace(" ", "", 1) if isinstance(pair, str) else "".join(pair)


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level BPE (GPT-2): itself if visible, else one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _piece_bytes(description: Mapping[str, Any], ids: Mapping[str, int], special: set[int]) -> tuple[bytes, ...]:
    """The bytes of every id, after what the decoder of the file does to single pieces; b"" for special ids and holes."""
    decoders = list(_parts(description.get("decoder")))
    kinds = {part["type"] for part in decoders}
    alphabet = byte_alphabet() if "ByteLevel" in kinds else {}
    spaced = any(part["type"] == "Metaspace" or part.get("content") == " " for part in decoders)
    prefix = next((part["prefix"] for part in decoders if part["type"] == "WordPiece"), None)
    suffix = next((part["suffix"] for part in decoders if part["type"] == "BPEDecoder"), None)

    def of(piece: str) -> bytes:
        if alphabet:
            known = all(character in alphabet for character in piece)
            return bytes(alphabet[character] for character in piece) if known else piece.encode()
        if "ByteFallback" in kinds and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        if prefix is not None:
            return piece.removeprefix(prefix).encode() if piece.startswith(prefix) else f" {piece}".encode()
        if suffix is not None:
            return f"{piece.removesuffix(suffix)} ".encode() if piece.endswith(suffix) else piece.encode()
        return (piece.replace(SPACE_SIGN, " ") if spaced else piece).encode()

    pieces = [b""] * (max(ids.values()) + 1)
    for piece, i in ids.items():
        if i not in special:
            pieces[i] = of(piece)
    return tuple(pieces)


def _parts(decoder: Mapping[str, Any] | None) -> Iterable[Mapping[str, Any]]:
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _parts(part)
    else:
        yield decoder
