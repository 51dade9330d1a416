"""A tokenizer.json put together from pieces: of a GGUF file's metadata, or of a SentencePiece model trained here."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llmjax.data.hf_tokenizer import CONFIG_FILE
from llmjax.data.tokenizer import BYTE_FILE, FIRST_BYTE_ID, INDENTS, SPACE_SIGN, SPECIALS, Tokenizer
from llmjax.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces, in GGUF as in SentencePiece

# How text is cut before byte-level BPE: what the vocabularies were made with, by llama.cpp's names for them. (What
# transformers 5 makes of a `smollm` file leaves digits to GPT-2's pattern, and so differs in "  1" and in fractions.)
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = "digits"  # every digit by itself, then GPT-2's pattern
CUTS: dict[str, str] = {
    "gpt-2": "",
    "smollm": DIGITS,
    "starcoder": DIGITS,
    "refact": DIGITS,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "tekken": TEKKEN,
}
WHOLE_WORDS = (LLAMA3, TEKKEN)  # a word that is a piece is taken as one, whether or not merges lead to it


def from_gguf(metadata: Mapping[str, Any], *, gemma: bool) -> dict[str, bytes]:
    """The files tokenizer.json and tokenizer_config.json. Raises UserError for a kind that is not known."""
    has = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind = has.get("model")
    if kind == "gpt2":
        described = byte_level(has["tokens"], has["merges"], cut=has.get("pre", "default"))
    elif kind == "llama" and gemma:
        described = gemma_pieces(has["tokens"])
    elif kind == "llama":
        described = llama_pieces(has["tokens"], has["scores"], prefix_space=has.get("add_space_prefix", True))
    else:
        raise UserError(
            f"its tokenizer is of the kind {kind!r}; known are gpt2 and llama. Give another with --tokenizer"
        )
    vocabulary = described["model"]["vocab"]
    types = has.get("token_type") or [NORMAL] * len(has["tokens"])
    for place, (token, use) in enumerate(zip(has["tokens"], types, strict=True)):
        if use == UNUSED and token == hole(place):
            vocabulary.pop(token, None)
    described["added_tokens"] = [
        _added(i, token, special=kind == CONTROL)
        for i, (token, kind) in enumerate(zip(has["tokens"], types, strict=True))
        if kind == CONTROL or (kind == USER_DEFINED and token in vocabulary)
    ]
    named = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        i = has.get(f"{key}_token_id")
        named[f"{name}_token"] = None if i is None else has["tokens"][i]
    known = {token["content"] for token in described["added_tokens"]}
    for content in dict.fromkeys(token for token in named.values() if token is not None and token not in known):
        described["added_tokens"].append(_added(vocabulary[content], content, special=True))
    described["added_tokens"].sort(key=lambda token: token["id"])
    # Files from before there was such a flag are of models that have <bos>.
    if has.get("add_bos_token", kind == "llama") and named["bos_token"] is not None:
        described["post_processor"] = _template(named["bos_token"], vocabulary[named["bos_token"]])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
    if "mask_token" not in config and "<mask>" in known:
        config["mask_token"] = "<mask>"
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return {BYTE_FILE: _json(described), CONFIG_FILE: _json(config)}


def byte_level(tokens: Sequence[str], merges: Iterable[str], *, cut: str) -> dict[str, Any]:
    """GPT-2's kind: BPE over characters that stand for bytes, on text cut by a pattern."""
    if cut not in CUTS:
        raise UserError(
            f"its tokenizer cuts text in the way {cut!r}; known are {', '.join(CUTS)}. Give the model's own tokenizer.json "
            "with --tokenizer"
        )
    pattern = CUTS[cut]
    bytes_only: dict[str, Any] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    steps: list[dict[str, Any]] = [bytes_only]
    if pattern == DIGITS:
        steps.insert(0, {"type": "Digits", "individual_digits": True})
    elif pattern:
        bytes_only["use_regex"] = False
        steps.insert(0, {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False})
    return _description(
        model=_bpe(tokens, (merge.split(" ") for merge in merges), ignore_merges=pattern in WHOLE_WORDS),
        normalizer={"type": "NFC"} if pattern == QWEN2 else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": steps},
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    )


def llama_pieces(tokens: Sequence[str], scores: Sequence[float], *, prefix_space: bool) -> dict[str, Any]:
    """SentencePiece's BPE: the pieces' scores are the order of the merges; what is not known becomes bytes."""
    ranks = {token: -score for token, score in zip(tokens, scores, strict=True)}
    scheme = "first" if prefix_space else "never"
    decoder = [*_space_decoder(), {"type": "Strip", "content": " ", "start": 1, "stop": 0}][: 4 if prefix_space else 3]
    return _description(
        model=_bpe(tokens, implied_merges(ranks), unk_token="<unk>", fuse_unk=True, byte_fallback=True),
        pre_tokenizer={"type": "Metaspace", "replacement": SPACE_SIGN, "prepend_scheme": scheme, "split": False},
        decoder={"type": "Sequence", "decoders": decoder},
    )


def gemma_pieces(tokens: Sequence[str]) -> dict[str, Any]:
    """Gemma's: no space in front, the pieces' places are the order of the merges, and runs of spaces are pieces."""
    signs = [token.replace(" ", SPACE_SIGN) if token and not token.strip(" ") else token for token in tokens]
    ranks = {token: float(i) for i, token in enumerate(signs)}
    return _description(
        model=_bpe(signs, implied_merges(ranks), unk_token="<unk>", fuse_unk=True, byte_fallback=True),
        normalizer=_replace_spaces(),
        pre_tokenizer={"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
        decoder={"type": "Sequence", "decoders": _space_decoder()},
    )


def implied_merges(ranks: Mapping[str, float]) -> list[list[str]]:
    """The merges of a BPE that is given by its pieces: every way to put a piece together from two, best piece first.

    `ranks`: piece -> rank, lowest first. Among equals a longer left part comes first.
    """
    merges = [
        (rank, -cut, cut - len(piece), piece)
        for piece, rank in ranks.items()
        for cut in range(1, len(piece))
        if piece[:cut] in ranks and piece[cut:] in ranks
    ]
    merges.sort(key=lambda merge: merge[:3])
    return [[piece[:-cut], piece[-cut:]] for _, cut, _, piece in merges]


def of_ours(tokenizer: Tokenizer) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json of a tokenizer trained here.

    It gives the same ids for every text without U+2581, which there cannot be told from a space, and without what its
    pieces for bytes and its special tokens are called (<0x41>, <eos>), which there are these.
    """
    pad, bos, eos, unk = SPECIALS
    tokens, scores, kind = _our_pieces(tokenizer)
    if kind == "unigram":
        model: dict[str, Any] = {
            "type": "Unigram",
            "vocab": [[token, score] for token, score in zip(tokens, scores, strict=True)],
            "unk_id": SPECIALS.index(unk),
            "byte_fallback": True,
        }
    else:
        ranks = {token: -score for token, score in zip(tokens, scores, strict=True)} if kind == "bpe" else {}
        learnt = {token: rank for token, rank in ranks.items() if not is_byte(token) and token not in SPECIALS}
        merges = implied_merges(learnt)
        model = _bpe(tokens, merges, unk_token=unk, fuse_unk=True, byte_fallback=True)
    described = _description(
        model=model,
        normalizer=None if kind == "byte" else _replace_spaces(),
        decoder={"type": "Sequence", "decoders": _space_decoder()},
    )
    described["added_tokens"] = [_added(i, token, special=True) for i, token in enumerate(SPECIALS)]
    if kind != "byte":
        described["added_tokens"] += [
            {**_added(tokens.index(indent), indent, special=False), "normalized": True}
            for indent in INDENTS
            if indent in tokens
        ]
    described["post_processor"] = _template(bos, SPECIALS.index(bos))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "pad_token": pad,
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": unk,
    }
    return {BYTE_FILE: _json(described), CONFIG_FILE: _json(config)}


def _our_pieces(tokenizer: Tokenizer) -> tuple[list[str], list[float], str]:
    """The pieces, their scores, and bpe, unigram, char or byte."""
    if tokenizer.processor is None:
        return [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))], [0.0] * (FIRST_BYTE_ID + 256), "byte"
    from sentencepiece import sentencepiece_model_pb2 as proto

    model: Any = proto.ModelProto.FromString(tokenizer.model)  # type: ignore[attr-defined]
    kinds = {1: "unigram", 2: "bpe", 4: "char"}
    pieces = model.pieces
    return [p.piece for p in pieces], [p.score for p in pieces], kinds[model.trainer_spec.model_type]


def hole(i: int) -> str:
    """What llama.cpp's converter calls an id that the tokenizer lacks and the embeddings have."""
    return f"[PAD{i}]"


def is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _bpe(tokens: Sequence[str], merges: Iterable[Sequence[str]], **settings: Any) -> dict[str, Any]:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise UserError(f"its vocabulary has {len(tokens) - len(vocabulary)} pieces twice")
    nothing = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    more = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **nothing, **more, **settings, "vocab": vocabulary, "merges": [list(m) for m in merges]}


def _description(*, model: dict[str, Any], **parts: Any) -> dict[str, Any]:
    names = ("truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    return {"version": "1.0", **dict.fromkeys(names), "added_tokens": [], **parts, "model": model}


def _added(i: int, content: str, *, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": content, **flags, "special": special}


def _replace_spaces() -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_SIGN}


def _space_decoder() -> list[dict[str, Any]]:
    spaces = {"type": "Replace", "pattern": {"String": SPACE_SIGN}, "content": " "}
    return [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}]


def _template(bos: str, i: int) -> dict[str, Any]:
    """<bos> in front of every text."""
    first, a, b = {"SpecialToken": {"id": bos, "type_id": 0}}, {"id": "A", "type_id": 0}, {"id": "B", "type_id": 1}
    second = {"SpecialToken": {"id": bos, "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": a}],
        "pair": [first, {"Sequence": a}, second, {"Sequence": b}],
        "special_tokens": {bos: {"id": bos, "ids": [i], "tokens": [bos]}},
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
