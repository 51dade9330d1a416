"""The words of a question: those that it is searched by, and those that only ask."""

import re

# Lucene's stop words. They would be found in nearly every block, which takes time and changes little.
STOP_WORDS = frozenset([
    "a", "an", "and", "are", "as", "at", "be", "but", "by", "for", "if", "in", "into", "is", "it", "no", "not",
    "of", "on", "or", "such", "that", "the", "their", "then", "there", "these", "they", "this", "to", "was", "will",
    "with",
])  # fmt: skip
# Words that ask, in English and German: a passage need not have them to hold the answer.
ASKING_WORDS = frozenset([
    "what", "when", "where", "which", "who", "whom", "whose", "why", "how", "many", "much", "long", "often", "did",
    "do", "does", "has", "have", "had", "can", "could", "would", "should", "were", "been", "you", "me", "i", "we",
    "tell", "give", "name", "find", "show", "about", "from", "there's", "was", "wann", "wer", "wen", "wem", "wo",
    "wie", "warum", "welche", "welcher", "welches", "wieviele", "viele", "ist", "sind", "war", "waren", "hat",
    "haben", "wurde", "wurden", "der", "die", "das", "den", "dem", "des", "ein", "eine", "einen", "und", "oder",
    "von", "zu", "in", "im", "für", "mit", "auf",
])  # fmt: skip


def query_words(question: str) -> list[str]:
    """The words that a question is searched by: lower case, each once, without stop words."""
    words = dict.fromkeys(re.findall(r"\w+", question.lower()))
    return [word for word in words if word not in STOP_WORDS] or list(words)
