"""Tokenizers of imported models: a `tokenizer.json` of Hugging Face's `tokenizers`, or the SentencePiece model of old ones.

They lie in a folder with what Hugging Face keeps beside them: tokenizer_config.json (which strings are <bos>, <eos>, ...
and the chat template) and generation_config.json (the ids at which generation ends, often several).
"""

import dataclasses
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from jinja2 import TemplateSyntaxError

from llmjax import storage
from llmjax.data.hf_backends import Added, JsonBackend, PiecesBackend
from llmjax.data.templates import compiled
from llmjax.data.tokenizer import PROBE, SPACE_SIGN, Segment, Tokenizer, sentencepiece_bytes
from llmjax.errors import UserError

SENTENCEPIECE_FILES = ("spiece.model", "sentencepiece.bpe.model")
CONFIG_FILE, MAP_FILE, ADDED_FILE = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
GENERATION_FILE, TEMPLATE_FILE = "generation_config.json", "chat_template.jinja"
FILES = (CONFIG_FILE, MAP_FILE, ADDED_FILE, GENERATION_FILE, TEMPLATE_FILE)  # what is kept beside the tokenizer
NAMES = ("bos", "eos", "pad", "unk", "mask", "sep", "cls")
# What the tokens are called when nothing says so; only counted when the vocabulary has them as special tokens.
USUAL = {
    "pad": ("<pad>", "[PAD]"),
    "unk": ("<unk>", "[UNK]"),
    "mask": ("<mask>", "[MASK]"),
    "sep": ("[SEP]",),
    "cls": ("[CLS]",),
}
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
NAMED = re.compile(r"<.+>|\[.+\]")  # but not a "!" that is only the padding
MARK = re.compile("<[|\uff5c].*[|\uff5c]>", re.DOTALL)  # nobody writes such a token for its characters


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
    beside = read_beside(file.parent)
    ids = vocabulary if isinstance(vocabulary, dict) else {piece: i for i, (piece, _) in enumerate(vocabulary)}
    in_file = description.get("added_tokens") or []
    known = ids.keys() | {token["content"] for token in in_file}
    more = [token for token in added_beside(beside) if token["content"] not in known]
    description = {**description, "added_tokens": [*in_file, *more]} if more else description
    ids = {**ids, **{token["content"]: token["id"] for token in (*in_file, *more)}}
    if not ids:
        raise UserError("its vocabulary is empty: get the file again")
    added = {token.content: token for token in map(_added_of(beside), (*in_file, *more))}
    specials = {token.content: token.id for token in added.values() if token.special}
    found = special_ids(beside, ids, specials)
    if found["unk"] is None:
        found["unk"] = ids.get(description["model"].get("unk_token"), description["model"].get("unk_id"))
    for text, i in ids.items():  # what has a name is special, whether the file flags it or not
        if i in found.values() and (text in added or NAMED.fullmatch(text)):
            added[text] = dataclasses.replace(added.get(text, Added(text, i)), special=True, control=True)
    pieces = _piece_bytes(description, ids, added)
    joins = [part["type"] for part in _parts(description.get("decoder"))] == ["ByteLevel"]
    backend = JsonBackend(
        json.dumps(description) if more else model.decode(),
        description,
        added.values(),
        piece_bytes=pieces if joins else None,
    )
    if moved := [token["content"] for token in more if backend.id_of(token["content"]) != token["id"]]:
        raise UserError(f"{ADDED_FILE} gives {moved[0]!r} an id that does not follow the vocabulary of {file.name}")
    # In a text these two are ordinary characters in every vocabulary.
    prefix, suffix = backend.template_around("a b")
    return _marked_exact(
        Tokenizer(
            kind="huggingface",
            vocab_size=max(ids.values()) + 1,
            piece_bytes=pieces,
            model=model,
            prefix_ids=prefix,
            suffix_ids=suffix,
            backend=backend,
            name=file.name,
            **_shared(beside, found, added.values()),
        ),
        added.values(),
    )


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
    own = {processor.id_to_piece(i): i for i in range(size)}
    more = [token for token in added_beside(beside) if token["content"] not in own]
    added = {piece: Added(piece, i) for piece, i in own.items() if processor.is_control(i)}
    added |= {token.content: token for token in map(_added_of(beside), more)}
    if "extra_ids" in config and not more:  # T5: from the last to the first
        count = int(config["extra_ids"])
        names = [f"<extra_id_{count - 1 - i}>" for i in range(count)]
        added |= {name: Added(name, size + i) for i, name in enumerate(names)}
    pieces = list(sentencepiece_bytes(processor))
    pieces += [b""] * (max([size - 1, *(token.id for token in added.values())]) + 1 - size)
    for token in added.values():
        pieces[token.id] = b"" if token.special else token.content.encode()
    specials = {token.content: token.id for token in added.values() if token.special}
    found = special_ids(beside, own | {token.content: token.id for token in added.values()}, specials)
    for name, i in (("bos", processor.bos_id()), ("eos", processor.eos_id()), ("unk", processor.unk_id())):
        if found[name] is None and i >= 0 and f"{name}_token" not in config:
            found[name] = i
    is_llama = "Llama" in str(config.get("tokenizer_class"))
    adds_bos = config.get("add_bos_token", is_llama)
    adds_eos = config.get("add_eos_token", "T5" in str(config.get("tokenizer_class")))
    return _marked_exact(
        Tokenizer(
            kind="huggingface",
            vocab_size=len(pieces),
            piece_bytes=tuple(pieces),
            model=model,
            prefix_ids=(found["bos"],) if adds_bos and found["bos"] is not None else (),
            suffix_ids=(found["eos"],) if adds_eos and found["eos"] is not None else (),
            # Llama's, but for its first versions, puts a space before the whole text alone, as transformers 5 does.
            backend=PiecesBackend(processor, added.values(), space_behind=not is_llama or config.get("legacy") is True),
            name=file.name,
            **_shared(beside, found, added.values()),
        ),
        added.values(),
    )


def no_tokenizer(vocab_size: int) -> Tokenizer:
    """In the place of a tokenizer where a model has none: ids can be given to the model, text cannot."""

    class Missing:
        def encode_batch(self, texts: Sequence[str], *, parse: bool, threads: int) -> list[list[int]]:
            if texts:
                raise UserError("this model has no tokenizer: give it token ids, or import it with --tokenizer")
            return []

        def encode_segments(self, segments: Sequence[Segment]) -> list[int]:
            return self.encode_batch([segment.text for segment in segments], parse=True, threads=1)[0]

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
            beside[name] = json.loads(storage.read_text(path)) if path.is_file() else {}
        except ValueError as error:
            raise UserError(f"{path} is no JSON ({error}): get the file again") from error
        if not isinstance(beside[name], dict):
            raise UserError(f"{path} is no object but {type(beside[name]).__name__}: get the file again")
    template = folder / TEMPLATE_FILE
    beside[TEMPLATE_FILE] = storage.read_text(template) if template.is_file() else ""
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
            content = says[0].get("content") if isinstance(says[0], dict) else says[0]
            found[name] = ids.get(content) if content is not None else None
            if content is not None and found[name] is None:
                warnings.warn(
                    f"{name}_token is {content!r} in {CONFIG_FILE} or {MAP_FILE}, which is no token of the vocabulary, "
                    f"so there is none: give it an id in {ADDED_FILE}, or take it out",
                    stacklevel=2,
                )
        elif generation := _ids(generation, f"{name}_token_id"):
            found[name] = generation[0]
        else:
            found[name] = next((ids[usual] for usual in USUAL.get(name, ()) if usual in specials), None)
    return found


def _ids(given: Any, name: str) -> list[int]:
    """One id or several of generation_config.json. Some files say that there is none by -1."""
    ids = [] if given is None else given if isinstance(given, list) else [given]
    if wrong := [i for i in ids if isinstance(i, bool) or not isinstance(i, int)]:
        raise UserError(f"{GENERATION_FILE} or config.json has {name}={wrong[0]!r}, which is no id: give whole numbers")
    return [i for i in ids if i >= 0]


def added_beside(beside: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tokens that the files beside a tokenizer add to it, by id, as tokenizer.json would describe them."""
    try:
        found = {
            token["content"]: {"id": int(i), "special": False, **token}
            for i, token in (beside[CONFIG_FILE].get("added_tokens_decoder") or {}).items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{CONFIG_FILE} has an added_tokens_decoder that is not ids with tokens ({error.__class__.__name__}: {error})"
        ) from error
    named = [beside[file].get(f"{name}_token") for file in (CONFIG_FILE, MAP_FILE) for name in NAMES]
    for file in (CONFIG_FILE, MAP_FILE):
        for more in ("additional_special_tokens", "extra_special_tokens"):  # the second of transformers 5
            listed = beside[file].get(more) or []
            named += listed.values() if isinstance(listed, dict) else listed
    special = {token["content"] if isinstance(token, dict) else token for token in named}
    for content, i in beside[ADDED_FILE].items():
        if not isinstance(i, int) or i < 0:
            raise UserError(f"{ADDED_FILE} gives {content!r} the id {i!r}: ids are numbers from 0 on")
        found.setdefault(content, {"id": i, "content": content, "special": content in special})
    return [{**dict.fromkeys(FLAGS, False), **token} for token in sorted(found.values(), key=lambda one: one["id"])]


def _added_of(beside: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Added]:
    template = "\0".join(_templates(beside))
    literals = "\0".join(_literals(template) for template in _templates(beside))

    def make(token: Mapping[str, Any]) -> Added:
        content, special = token["content"], bool(token.get("special"))
        # A template may well hold white space that is a token: Gemma's are runs of line feeds.
        mark = content.strip() and (content in template or content in literals or MARK.fullmatch(content.strip()))
        flags = {flag: bool(token.get(flag)) for flag in FLAGS}
        return Added(content, token["id"], special=special, control=special or bool(mark), **flags)

    return make


def _literals(template: str) -> str:
    """What a template may write: "\\u2502" in its source stands for another character. Nothing of one that is broken,
    which says so when it is used."""
    try:
        return "\0".join(compiled(template).literals)
    except TemplateSyntaxError:
        return ""


def _templates(beside: Mapping[str, Any]) -> tuple[str, str]:
    """The chat template, and the one where there are tools if it is another."""
    template = beside[TEMPLATE_FILE] or beside[CONFIG_FILE].get("chat_template") or ""
    if isinstance(template, list) and all(isinstance(one, dict) for one in template):
        template = {one.get("name"): one.get("template") for one in template}
    by_name = template if isinstance(template, dict) else {"default": template}
    if wrong := [text for text in by_name.values() if not isinstance(text, str)]:
        raise UserError(f"{CONFIG_FILE} has a chat_template of {wrong[0]!r}: give a text, or several with names")
    return by_name.get("default", ""), by_name.get("tool_use", "")


def _shared(beside: Mapping[str, Any], found: Mapping[str, int | None], added: Iterable[Added]) -> dict[str, Any]:
    """The fields of a Tokenizer that come from the files beside it and from the tokens that were added."""
    ends = _ids(beside[GENERATION_FILE].get("eos_token_id"), "eos_token_id")
    files = {
        name: (json.dumps(beside[name], indent=2, ensure_ascii=False) + "\n").encode()
        for name in FILES[:-1]
        if beside[name]
    }
    if beside[TEMPLATE_FILE]:
        files[TEMPLATE_FILE] = beside[TEMPLATE_FILE].encode()
    template, tool_template = _templates(beside)
    controls = [token for token in added if token.control]
    return {
        **{f"{name}_id": i for name, i in found.items()},
        "more_eos_ids": tuple(i for i in dict.fromkeys(ends) if i != found["eos"]),
        "unsampled_ids": (),
        "special_ids": {token.content: token.id for token in controls if token.special},
        "mark_ids": {token.content: token.id for token in controls if not token.special},
        "chat_template": template,
        "tool_template": tool_template,
        "files": files,
    }


def _marked_exact(tokenizer: Tokenizer, added: Iterable[Added]) -> Tokenizer:
    probe = PROBE + "".join(f" {token.content} {token.content}" for token in added if not token.special)
    return dataclasses.replace(tokenizer, exact=tokenizer.decode(tokenizer.encode(probe)) == probe)


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level BPE (GPT-2): itself if visible, else one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _piece_bytes(
    description: Mapping[str, Any], ids: Mapping[str, int], added: Mapping[str, Added]
) -> tuple[bytes, ...]:
    """The bytes of every id, after what the decoder of the file does to single pieces; b"" for special ids and holes.

    What was added to byte-level BPE is not written in its alphabet: "caf\u00e9" stands for itself.
    """
    decoders = list(_parts(description.get("decoder")))
    kinds = {part["type"] for part in decoders}
    alphabet = byte_alphabet() if "ByteLevel" in kinds else {}
    # What is not of the alphabet becomes a character that Latin-1 lacks.
    latin = defaultdict(lambda: 0x100, {ord(character): byte for character, byte in alphabet.items()})
    spaced = any(part["type"] == "Metaspace" or part.get("content") == " " for part in decoders)
    prefix = next((part["prefix"] for part in decoders if part["type"] == "WordPiece"), None)
    suffix = next((part["suffix"] for part in decoders if part["type"] == "BPEDecoder"), None)

    def of(piece: str) -> bytes:
        if alphabet:
            if piece in added:
                return piece.encode()
            try:
                return piece.translate(latin).encode("latin-1")
            except UnicodeEncodeError:
                return piece.encode()
        if "ByteFallback" in kinds and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        if prefix is not None:
            return piece.removeprefix(prefix).encode() if piece.startswith(prefix) else f" {piece}".encode()
        if suffix is not None:
            return f"{piece.removesuffix(suffix)} ".encode() if piece.endswith(suffix) else piece.encode()
        return (piece.replace(SPACE_SIGN, " ") if spaced else piece).encode()

    pieces = [b""] * (max(ids.values()) + 1)
    for piece, i in ids.items():
        if piece not in added or not added[piece].special:
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
