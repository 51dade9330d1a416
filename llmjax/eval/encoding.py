"""From texts to the token ids to score, by the rules of lm-evaluation-harness.

The scores of published models were measured with these rules. A space belongs to the continuation, whose ids are cut out
of those of the whole text. <bos> comes first where the tokenizer puts it. Only the prefix token stands before a
continuation without context.
"""

from collections.abc import Iterator, Sequence

from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.eval.likelihood import ScoringRequest


def prefix_id(tokenizer: Tokenizer) -> int:
    """The token before a text without context: <bos>, else <eos>."""
    return tokenizer.start_id if tokenizer.bos_id is None else tokenizer.bos_id


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of prompts. Special tokens in their text count. The tokenizer's prefix comes first, unless the text begins
    with the prefix token."""
    bos = next((text for text, i in tokenizer.special_ids.items() if i == prefix_id(tokenizer)), None)
    rows = tokenizer.encode_batch(list(texts), specials="parse")
    return [
        row if bos is not None and text.startswith(bos) else [*tokenizer.prefix_ids, *row]
        for text, row in zip(texts, rows, strict=True)
    ]


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[ScoringRequest]:
    """The ids of (context, continuation) texts.

    Spaces at the end of a context move to the continuation. If both become one token, so that no ids are left for the
    continuation, it is encoded alone.

    Raises UserError for an empty continuation.
    """
    moved = []
    for context, continuation in pairs:
        bare = context.rstrip()
        moved.append((bare, context[len(bare) :] + continuation) if context else (context, continuation))
    wanted = dict.fromkeys(text for context, rest in moved if context for text in (context, context + rest))
    ids = dict(zip(wanted, encode_texts(tokenizer, list(wanted)), strict=True))
    bare_texts = dict.fromkeys(
        rest for context, rest in moved if not context or len(ids[context + rest]) <= len(ids[context])
    )
    alone = dict(zip(bare_texts, tokenizer.encode_batch(list(bare_texts), specials="parse"), strict=True))
    first = prefix_id(tokenizer)
    requests = []
    for number, (context, rest) in enumerate(moved):
        if not context:
            begun = alone[rest][:1] == [first] and len(alone[rest]) > 1
            requests.append(ScoringRequest([first], alone[rest][1:] if begun else alone[rest]))
        elif rest in alone and len(ids[context + rest]) <= len(ids[context]):
            requests.append(ScoringRequest(ids[context], alone[rest]))
        else:
            requests.append(ScoringRequest(ids[context], ids[context + rest][len(ids[context]) :]))
        if not requests[-1].continuation:
            raise UserError(f"continuation {number} is empty, so there is nothing to score")
    return requests


def rolling_windows(ids: Sequence[int], *, prefix: int, length: int) -> Iterator[ScoringRequest]:
    """Windows that score each of the ids once; all but the first begin behind `length` - 1 ids of context or fewer.

    The first window scores `length` ids after the prefix token alone. The later ones score as many, given the one id
    before them; the last one scores what is left, with all the context that fits.
    """
    done = 0
    while done < len(ids):
        stop = min(done + length, len(ids))
        context = [prefix] if done == 0 else list(ids[max(stop - length - 1, 0) : done])
        yield ScoringRequest(context, list(ids[done:stop]))
        done = stop
