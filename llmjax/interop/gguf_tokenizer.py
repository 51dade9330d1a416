"""The tokenizer of a run as the metadata of a GGUF file; the reverse of `tokenizer_json.from_gguf`.

GGUF names how text is cut and leaves the rest to its readers. What a tokenizer does is therefore compared with what
`from_gguf` makes of the metadata, and a tokenizer that GGUF cannot say is refused by name.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmjax.data.tokenizer import BYTE_FILE, SPACE_SIGN, Tokenizer
from llmjax.errors import UserError
from llmjax.interop.tokenizer_json import (
    BYTE,
    CONTROL,
    CUTS,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    byte_level,
    gemma_pieces,
    hole,
    is_byte,
    llama_pieces,
    of_ours,
)

INSTEAD = "export to a folder, which keeps the tokenizer as it is"
ENDS = ("eos", "eot", "eom")  # the ids at which a text may end
Step = dict[str, Any]


def to_gguf(tokenizer: Tokenizer, vocab_size: int, *, gemma: bool) -> dict[str, Any]:
    """The metadata. Raises UserError for a tokenizer that GGUF, or `from_gguf`, cannot say.

    Args:
        vocab_size: of the model; ids beyond the tokenizer's get names that no text has.
        gemma: whether the file's architecture is one of Gemma's, whose pieces are ordered by their places.
    """
    described = _described(tokenizer)
    model, added = described["model"], {token["content"]: token for token in described["added_tokens"]}
    if model.get("type") != "BPE":
        raise _refused(f"is of the kind {model.get('type')}; GGUF files are written of byte pair encodings")
    flagged = [text for text, token in added.items() if any(token.get(f) for f in ("lstrip", "rstrip", "single_word"))]
    if flagged:
        raise _refused(f"has tokens that take the space around them, such as {flagged[0]!r}")
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    if not merges:
        raise _refused("has no merges")
    ids = {**model["vocab"], **{text: token["id"] for text, token in added.items()}}
    tokens, types = [hole(i) for i in range(vocab_size)], [UNUSED] * vocab_size
    byte_cut = _byte_cut(described)
    for text, i in ids.items():
        if text in added:
            types[i] = CONTROL if added[text].get("special") else USER_DEFINED
        elif not byte_cut and is_byte(text):
            types[i] = BYTE
        else:
            types[i] = UNKNOWN if text == model.get("unk_token") else NORMAL
        # llama.cpp looks for these in the text before it writes the sign for spaces.
        tokens[i] = text.replace(SPACE_SIGN, " ") if types[i] == USER_DEFINED and not byte_cut else text
    said: dict[str, Any] = {"tokens": tokens, "token_type": types}
    if byte_cut:
        said |= {"model": "gpt2", "pre": byte_cut, "merges": [" ".join(merge) for merge in merges]}
    else:
        made = {"".join(merge): i for i, merge in reversed(list(enumerate(merges)))}  # the first that makes a piece
        scores = [-float(made.get(token, len(merges))) for token in tokens]
        prefix = _prefix_space(described)
        said |= {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": prefix}
        again = gemma_pieces(tokens) if gemma else llama_pieces(tokens, scores, prefix_space=prefix)
        whole = {text for text, i in ids.items() if types[i] not in (NORMAL, UNUSED)}
        _require_same_merges(merges, [tuple(merge) for merge in again["model"]["merges"]], whole)
    said |= _special(tokenizer)
    metadata = {f"tokenizer.ggml.{key}": value for key, value in said.items()}
    return metadata | ({"tokenizer.chat_template": tokenizer.chat_template} if tokenizer.chat_template else {})


def _refused(what: str) -> UserError:
    return UserError(f"the tokenizer {what}, which a GGUF file cannot say: {INSTEAD}")


def _described(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer as a tokenizer.json describes it."""
    if tokenizer.kind != "huggingface":
        return dict(json.loads(of_ours(tokenizer)[BYTE_FILE]))
    try:
        return dict(json.loads(tokenizer.model))
    except ValueError:
        raise _refused(f"is a SentencePiece model ({tokenizer.name})") from None


def _special(tokenizer: Tokenizer) -> dict[str, Any]:
    """The ids with a name, and what stands around a text."""
    if len(tokenizer.eos_ids) > len(ENDS):
        raise _refused(f"ends texts at {len(tokenizer.eos_ids)} ids ({', '.join(map(str, tokenizer.eos_ids))})")
    bos = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
    if tokenizer.suffix_ids or tokenizer.prefix_ids not in ((), bos):
        raise _refused(f"puts the ids {tokenizer.prefix_ids} before a text and {tokenizer.suffix_ids} behind it")
    named = {"bos": tokenizer.bos_id, "unknown": tokenizer.unk_id, "padding": tokenizer.pad_id}
    named |= dict(zip(ENDS, tokenizer.eos_ids, strict=False))
    said: dict[str, Any] = {f"{name}_token_id": i for name, i in named.items() if i is not None}
    return {**said, "add_bos_token": bool(tokenizer.prefix_ids), "add_eos_token": False}


def _byte_cut(described: Mapping[str, Any]) -> str:
    """llama.cpp's name for how byte-level BPE cuts its text; "" for another kind. UserError if it has no name."""
    steps = _steps(described.get("pre_tokenizer"), "pretokenizers")
    if not any(step["type"] == "ByteLevel" for step in steps):
        return ""
    mine = steps, _steps(described.get("normalizer"), "normalizers"), bool(described["model"].get("ignore_merges"))
    for name in CUTS:
        known = byte_level([], [], cut=name)
        normal = _steps(known["normalizer"], "normalizers")
        if mine == (_steps(known["pre_tokenizer"], "pretokenizers"), normal, known["model"]["ignore_merges"]):
            return name
    raise _refused(f"cuts text in a way that has no name here ({json.dumps(described.get('pre_tokenizer'))})")


def _prefix_space(described: Mapping[str, Any]) -> bool:
    """Whether pieces with signs for spaces get one in front. UserError for what is done to text beside."""
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_SIGN}
    prepend = {"type": "Prepend", "prepend": SPACE_SIGN}
    words = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    pieces = {"type": "Metaspace", "replacement": SPACE_SIGN, "split": False}
    known: list[tuple[list[Step], list[Step], bool]] = [
        ([spaces], [], False),
        ([spaces], [words], False),  # Gemma's; all spaces are signs by then
        ([prepend, spaces], [], True),
        ([], [{**pieces, "prepend_scheme": "first"}], True),
        ([], [{**pieces, "prepend_scheme": "never"}], False),
    ]
    normal = _steps(described.get("normalizer"), "normalizers")
    cut = _steps(described.get("pre_tokenizer"), "pretokenizers")
    for one, other, prefix in known:
        if (normal, cut) == (one, other) and described["model"].get("byte_fallback"):
            return prefix
    raise _refused(
        f"changes text in another way (normalizer {json.dumps(described.get('normalizer'))}, pre_tokenizer "
        f"{json.dumps(described.get('pre_tokenizer'))}, byte_fallback {described['model'].get('byte_fallback')})"
    )


def _steps(step: Mapping[str, Any] | None, parts: str) -> list[Step]:
    """A normalizer or pre-tokenizer as a flat list, without what does not change the ids."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [one for part in step[parts] for one in _steps(part, parts)]
    plain = {key: value for key, value in step.items() if key != "trim_offsets"}
    return [{"use_regex": True, **plain} if step["type"] == "ByteLevel" else plain]


def _require_same_merges(mine: Sequence[tuple[str, ...]], again: Sequence[tuple[str, ...]], whole: set[str]) -> None:
    """UserError unless the pieces' order says the same merges; `whole`: pieces that are never put together."""
    mine, again = ([merge for merge in merges if "".join(merge) not in whole] for merges in (mine, again))

    def order(merges: Sequence[tuple[str, ...]]) -> list[str]:
        return list(dict.fromkeys("".join(merge) for merge in merges))

    if set(mine) != set(again) or order(mine) != order(again):
        raise _refused("has merges that are not in the order of their pieces")
