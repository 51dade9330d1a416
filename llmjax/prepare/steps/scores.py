"""Steps quality, toxicity and perplexity: documents are scored, the score is a fact, and a limit rejects.

Quality is a trained classifier's probability that a document is of the wanted kind, such as a page of a textbook.
Toxicity is the share of words on this project's own lists, and a classifier's probability if one is given. Perplexity
is the number of bits a byte that a small n-gram model of trusted text needs (CCNet, Wenzek et al. 2020).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from llmjax.errors import UserError
from llmjax.prepare.documents import Step, add_facts, kept, reject
from llmjax.prepare.learn import classifier, lexicons, ngram

FEWEST = 2  # words on the lists; one swear word in a short comment is no reason to reject, one slur or threat is


def quality(settings: Any) -> Step:
    """Write the fact "quality" and reject documents below settings.quality_min, with the probability as the reason.

    Raises:
        UserError: if settings.quality_model is not set or is not a classifier that can be read.
    """
    if not settings.quality_model:
        raise UserError(
            "the step quality needs a classifier: train one on documents you want and documents you do not "
            "(llmjax classify) and set prepare.quality_model to its file, or take the step out of prepare.steps"
        )
    model, lowest = classifier.load(settings.quality_model), settings.quality_min

    def reason(value: float) -> str:
        return f"quality: {value:.2f}" if value < lowest else ""

    return _scoring("quality", lambda texts: classifier.score(model, texts), reason)


def perplexity(settings: Any) -> Step:
    """Write the fact "perplexity.bits_per_byte" and reject documents above settings.perplexity_max, if that is set.

    Bits a byte is the logarithm of perplexity; natural text of the model's language and domain has about 2 with a
    6-gram model of a few MB, another language 4 and more, random letters more than that.

    Raises:
        UserError: if settings.perplexity_model is not set or is not an n-gram model that can be read.
    """
    if not settings.perplexity_model:
        raise UserError(
            "the step perplexity needs an n-gram model: train one with llmjax classify --kind ngram and set "
            "prepare.perplexity_model to its file, or take the step out of prepare.steps"
        )
    model, highest = ngram.load(settings.perplexity_model), settings.perplexity_max

    def reason(value: float) -> str:
        return f"perplexity: {value:.2f} bits a byte" if 0 < highest < value else ""

    return _scoring("perplexity.bits_per_byte", lambda texts: ngram.score(model, texts), reason)


def _scoring(fact: str, score: Callable[[Sequence[str]], np.ndarray], reason: Callable[[float], str]) -> Step:
    """A step that writes the score of every kept text as a fact, and rejects those for which there is a reason."""

    def step(batch: pa.RecordBatch) -> pa.RecordBatch:
        texts, rows = _kept_texts(batch)
        scores = dict(zip(rows, score(texts).tolist(), strict=True))
        batch = add_facts(batch, {row: {fact: round(value, 4)} for row, value in scores.items()})
        return reject(batch, {row: why for row, value in scores.items() if (why := reason(value))})

    return step


def _kept_texts(batch: pa.RecordBatch) -> tuple[list[str], list[int]]:
    """The texts of the kept rows, and the numbers of these rows."""
    texts = batch["text"].to_pylist()
    rows = [row for row, keep in enumerate(kept(batch)) if keep and texts[row] is not None]
    return [texts[row] for row in rows], rows


def toxic_words(lexicon: lexicons.Lexicon, text: str) -> tuple[dict[str, int], float]:
    """Words on the list by section, without ambiguous ones that stand alone, and their share of all words."""
    hits, total = lexicons.find(lexicon, text)
    if set(hits) == {lexicons.AMBIGUOUS}:
        hits = {}
    return hits, sum(hits.values()) / max(total, 1)


def toxicity(settings: Any) -> Step:
    """Write facts and reject toxic documents.

    Facts: "toxic_words", the share of words on the list of the document's language (English where the language is not
    known; a language without a list is left to the classifier); "toxic_words.SECTION", counts, where there are any;
    "toxicity", the probability of the classifier in settings.toxicity_model, if that is set.
    Rejected are documents above settings.toxic_words_max that have at least two such words, or one slur or threat, and
    documents above settings.toxicity_max.

    Raises:
        UserError: if settings.toxicity_model is set and is not a classifier that can be read.
    """
    lists = {language: lexicons.load(language) for language in lexicons.LANGUAGES}
    model = classifier.load(settings.toxicity_model) if settings.toxicity_model else None
    most_words, highest = settings.toxic_words_max, settings.toxicity_max

    def step(batch: pa.RecordBatch) -> pa.RecordBatch:
        texts, rows = _kept_texts(batch)
        languages = batch["language"].to_pylist()
        facts: dict[int, dict[str, float]] = {row: {} for row in rows}
        reasons: dict[int, str] = {}
        for row, text in zip(rows, texts, strict=True):
            lexicon = lists.get((languages[row] or "en").lower().replace("_", "-").split("-")[0])
            if lexicon is None:
                continue
            hits, share = toxic_words(lexicon, text)
            facts[row] = {"toxic_words": round(share, 6), **{f"toxic_words.{name}": n for name, n in hits.items()}}
            serious = hits.get("slur", 0) + hits.get("threat", 0)
            if share > most_words and (serious or sum(hits.values()) >= FEWEST):
                reasons[row] = f"toxic_words: {share:.3f} of words"
        if model is not None:
            for row, value in zip(rows, classifier.score(model, texts).tolist(), strict=True):
                facts[row]["toxicity"] = round(value, 4)
                if value > highest:
                    reasons.setdefault(row, f"toxicity: {value:.2f}")
        return reject(add_facts(batch, facts), reasons)

    return step
