"""From texts to the token ids that are scored, with the beginnings, spaces and borders that lm-evaluation-harness has.

Scores of published models were measured with its rules, so they are kept where others would be as good: a space belongs
to the continuation, which is cut out of the ids of the whole text; <bos> comes first where the tokenizer puts it, and
nothing else but the prefix token stands before a continuation that has no context.
"""

from collections.abc import Iterator, Sequence

from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.eval.likelihood import Request


def prefix_id(tokenizer: Tokenizer) -> int:
    """What stands before a text that has nothing before it: <bos>, else <eos>."""
    return tokenizer.start_id if tokenizer.bos_id is None else tokenizer.bos_id


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of prompts: special tokens that are written in them count, and what the tokenizer puts first comes first,
    but not a second time where a text begins with the prefix token already."""
    bos = next((text for text, i in tokenizer.special_ids.items() if i == prefix_id(tokenizer)), None)
    rows = tokenizer.encode_batch(list(texts), specials="parse")
    return [
        row if bos is not None and text.startswith(bos) else [*tokenizer.prefix_ids, *row]
        for text, row in zip(texts, rows, strict=True)
    ]


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Request]:
    """The ids of (context, continuation) texts.

    Spaces at the end of a context go over to the continuation. Where the two melt into one token, so that nothing is
    left of the continuation, it is encoded alone.

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
            requests.append(Request([first], alone[rest][1:] if begun else alone[rest]))
        elif rest in alone and len(ids[context + rest]) <= len(ids[context]):
            requests.append(Request(ids[context], alone[rest]))
        else:
            requests.append(Request(ids[context], ids[context + rest][len(ids[context]) :]))
        if not requests[-1].continuation:
            raise UserError(f"continuation {number} is empty, so there is nothing to score")
    return requests


def rolling_windows(ids: Sequence[int], *, prefix: int, length: int) -> Iterator[Request]:
    """Windows that score each of the ids once; all but the first begin behind `length` - 1 ids of context or fewer.

    The first window scores `length` ids after the prefix token alone. The later ones score as many, given the one id
    before them; the last one scores what is left, with all the context that fits.
    """
    done = 0
    while done < len(ids):
        stop = min(done + length, len(ids))
        context = [prefix] if done == 0 else list(ids[max(stop - length - 1, 0) : done])
        yield Request(context, list(ids[done:stop]))
        done = stop
