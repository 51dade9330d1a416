"""Fill in the middle (Bavarian et al. 2022): a causal model that learns to write what is missing inside a text."""

import numpy as np
from ml_collections import ConfigDict

from llmjax.data.batches import pack
from llmjax.errors import UserError
from llmjax.objectives.rows import Row, documents, languages_of
from llmjax.objectives.special import Special


def infill(row: Row, rng: np.random.Generator, c: ConfigDict, special: Special) -> Row:
    """A row of L + 1 tokens -> one of length L with the middle of some documents moved to their end.

    Each document's part in the row (the paper's context level, which it found better than whole documents that the
    row's borders then cut) is rearranged with probability `c.infill_rate`, and of those `c.infill_suffix_first` as

        <bos> <prefix> <suffix> SUFFIX <middle> PREFIX MIDDLE <eos>    (the paper's second form)

    and the rest as <bos> <prefix> PREFIX <suffix> SUFFIX <middle> MIDDLE <eos>. The two cuts are uniform over the
    characters, as the paper advises, and the three texts are encoded anew; where the row's border has left half a
    character, the cuts are between tokens. Markers are not predicted: a user gives them. The markers' room is taken
    from the end of the row.
    """
    room = len(row["tokens"])
    new: list[int] = []
    for places in documents(row["segments"]):
        part = row["tokens"][places][: room - len(new)].tolist()
        if part and rng.random() < c.infill_rate:
            part = rearrange(part, rng, c, special, room=room - len(new))
        new += part
    packed = pack([np.array(new, np.int32)], length=room - 1, start_id=special.start, end_id=special.end)
    done = {name: values[0] for name, values in packed.items()}
    done["weights"][np.isin(done["targets"], (special.prefix, special.suffix, special.middle))] = 0.0
    if "languages" in row:
        done["languages"] = languages_of(row, done["segments"])
    return done


def rearrange(part: list[int], rng: np.random.Generator, c: ConfigDict, special: Special, *, room: int) -> list[int]:
    """One document's tokens with the middle at the end, at most `room` of them; as it was where it is too short."""
    start = part[:1] if part[0] == special.start else []
    body = [token for token in part[len(start) :] if token != special.end]
    over = len(start) + len(body) + 4 - room
    while body:
        body = body[: len(body) - max(over, 0)]
        first, middle, last = split(body, rng, special)
        if rng.random() < c.infill_suffix_first:
            new = [special.prefix, special.suffix, *last, special.middle, *first, *middle]
        else:
            new = [special.prefix, *first, special.suffix, *last, special.middle, *middle]
        new = [*start, *new, special.end]
        over = len(new) - room
        if body and over <= 0:
            return new
    return part[:room]


def split(body: list[int], rng: np.random.Generator, special: Special) -> tuple[list[int], list[int], list[int]]:
    """Tokens of text as three parts, cut at two uniform places between characters (or tokens, see `infill`)."""
    tokenizer = special.tokenizer
    try:
        if not special.is_text[body].all():
            raise UserError("what the tokenizer does not know has no text")
        text = b"".join(tokenizer.piece_bytes[token] for token in body).decode()
    except ValueError:
        low, high = np.sort(rng.integers(0, len(body) + 1, 2))
        return body[:low], body[low:high], body[high:]
    low, high = np.sort(rng.integers(0, len(text) + 1, 2))
    first, middle, last = tokenizer.encode_batch([text[:low], text[low:high], text[high:]], threads=1)
    return first, middle, last
