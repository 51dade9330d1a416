"""Figures of a style: lengths of sentences, function words, favourite words.

Function words identify an author best, because authors do not choose them consciously (Mosteller and Wallace 1964).
"""

import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from llmjax.retrieve.documents.blocks import sentences

WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
SHOWN = 20  # words of a list
RARE = 3  # a favourite word comes at least so often
FUNCTION_WORDS = frozenset(
    WORD.findall("""a about above after again against all also although am among an and any are as at be because been before being
    below between both but by can cannot could did do does down during each either else ere even ever every few for from
    further had has hast hath have having he her here hers herself him himself his how however i if in into is it its
    itself let like may me might mine more most much must my myself neither never no none nor not nothing now o of off oh
    on once one only or other our ours ourselves out over own perhaps rather same shall shalt she should since so some
    still such than that the thee their theirs them themselves then thence there therefore these they thine this those
    thou though through thus thy till to too under unless until up upon us very was we were what when where whether which
    while who whom whose why will wilt with within without would yet you your yours yourself""")
)


def words_of(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return [word.replace("\u2019", "'") for word in WORD.findall(text.lower())]


def figures(texts: Sequence[str]) -> dict[str, Any]:
    """The figures of a style.

    Returns `words` and `sentences` (counts), `sentence_words` (mean, median and deviation), `word_letters` (mean),
    `function_words` (word -> times in 1,000 words) and `favourite_words` (word -> times in 10,000 words). Words that
    mostly begin with a capital inside sentences are names, and no favourites.
    """
    cut = [text[a:b] for text in texts for a, b in sentences(text)]
    lengths = [count for one in cut if (count := len(words_of(one)))]
    words = [word for text in texts for word in words_of(text)]
    counts, total = Counter(words), max(1, len(words))
    capitals = Counter(
        word.lower().replace("\u2019", "'") for text in cut for word in WORD.findall(text)[1:] if word[0].isupper()
    )
    function = {word: round(1000 * n / total, 2) for word, n in counts.most_common() if word in FUNCTION_WORDS}
    favourite = {
        word: round(10000 * n / total, 1) for word, n in counts.most_common()
        if word not in FUNCTION_WORDS and len(word) > 2 and n >= RARE and 2 * capitals[word] < n
    }  # fmt: skip
    return {
        "words": len(words), "sentences": len(lengths),
        "sentence_words": {
            "mean": round(statistics.fmean(lengths), 1) if lengths else 0.0,
            "median": float(statistics.median(lengths)) if lengths else 0.0,
            "deviation": round(statistics.pstdev(lengths), 1) if lengths else 0.0,
        },
        "word_letters": round(sum(map(len, words)) / total, 2),
        "function_words": dict(list(function.items())[:SHOWN]), "favourite_words": dict(list(favourite.items())[:SHOWN]),
    }  # fmt: skip


def told(style: Mapping[str, Any]) -> str:
    """The figures as a line of a prompt."""
    favourite = ", ".join(list(style["favourite_words"])[:10])
    return f"sentences of about {style['sentence_words']['median']:.0f} words; favourite words: {favourite or 'none'}"
