"""Fill in the middle (Bavarian et al. 2022): a causal model learns to write the missing middle of a text."""

import numpy as np
from ml_collections import ConfigDict

from llmjax.data.batches import pack
from llmjax.errors import UserError
from llmjax.objectives.rows import Row, documents, languages_of
from llmjax.objectives.special import Special


def infill(row: Row, rng: np.random.Generator, c: ConfigDict, special: Special) -> Row:
    """A row of L + 1 tokens -> one of length L with the middle of some documents moved to their end.

    Each document's part in the row is rearranged with probability `infill_rate` (the paper's context level, which it found
    better than whole documents that the row's borders then cut). A share `infill_suffix_first` of those become

        <bos> <prefix> <suffix> SUFFIX <middle> PREFIX MIDDLE <eos>    (the paper's second form)

    and the rest <bos> <prefix> PREFIX <suffix> SUFFIX <middle> MIDDLE <eos>. The two cuts are uniform over the characters,
    as the paper advises, and the three texts are encoded anew. Where the row's border leaves half a character, the cuts
    are between tokens. Markers are not predicted, because a user gives them. Room for them is taken from the end of the row.
    """
    room = len(row["tokens"])
    new: list[int] = []
    for places in documents(row["segments"]):
        part = row["tokens"][places][: room - len(new)].tolist()
        if part and rng.random() < c.objective.infill_rate:
            part = rearrange(part, rng, c, special, room=room - len(new))
        new += part
    packed = pack([np.array(new, np.int32)], length=room - 1, start_id=special.start, end_id=special.end)
    done = {name: values[0] for name, values in packed.items()}
    done["weights"][np.isin(done["targets"], (special.prefix, special.suffix, special.middle))] = 0.0
    if "languages" in row:
        done["languages"] = languages_of(row, done["segments"])
    return done


def rearrange(part: list[int], rng: np.random.Generator, c: ConfigDict, special: Special, *, room: int) -> list[int]:
    """One document's tokens with the middle at the end, at most `room` of them; unchanged where it is too short."""
    start = part[:1] if part[0] == special.start else []
    body = [token for token in part[len(start) :] if token != special.end]
    over = len(start) + len(body) + 4 - room
    while body:
        body = body[: len(body) - max(over, 0)]
        first, middle, last = split(body, rng, special)
        if rng.random() < c.objective.infill_suffix_first:
            new = [special.prefix, special.suffix, *last, special.middle, *first, *middle]
        else:
            new = [special.prefix, *first, special.suffix, *last, special.middle, *middle]
        new = [*start, *new, special.end]
        over = len(new) - room
        if body and over <= 0:
            return new
    return part[:room]


def split(body: list[int], rng: np.random.Generator, special: Special) -> tuple[list[int], list[int], list[int]]:
    """Tokens of text in three parts, cut at two uniform places between characters (or tokens, see `infill`)."""
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
