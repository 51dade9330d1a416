"""Step toxicity: the share of words that are on this project's own lists, and a trained classifier where one is given."""

import pyarrow as pa
from ml_collections import ConfigDict

from llmjax.prepare import classifier, lexicons
from llmjax.prepare.records import Step, add_facts, kept, reject

FEWEST = 2  # words on the lists: one swear word in a short comment is no reason, a slur or a threat is


def toxic_words(lexicon: lexicons.Lexicon, text: str) -> tuple[dict[str, int], float]:
    """Words on the list by section, without ambiguous ones that stand alone, and their share of all words."""
    hits, total = lexicons.find(lexicon, text)
    if set(hits) == {lexicons.AMBIGUOUS}:
        hits = {}
    return hits, sum(hits.values()) / max(total, 1)


def make(settings: ConfigDict) -> Step:
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
        texts, languages = batch["text"].to_pylist(), [code or "" for code in batch["language"].to_pylist()]
        rows = [row for row, keep in enumerate(kept(batch)) if keep and texts[row] is not None]
        facts: dict[int, dict[str, float]] = {row: {} for row in rows}
        reasons: dict[int, str] = {}
        for row in rows:
            lexicon = lists.get(languages[row].lower().replace("_", "-").split("-")[0] or "en")
            if lexicon is None:
                continue
            hits, share = toxic_words(lexicon, texts[row])
            facts[row]["toxic_words"] = round(share, 6)
            facts[row].update({f"toxic_words.{section}": count for section, count in hits.items()})
            serious = hits.get("slur", 0) + hits.get("threat", 0)
            if share > most_words and (serious or sum(hits.values()) >= FEWEST):
                reasons[row] = f"toxic_words: {share:.3f} of words"
        if model is not None:
            for row, value in zip(rows, classifier.score(model, [texts[row] for row in rows]).tolist(), strict=True):
                facts[row]["toxicity"] = round(value, 4)
                if value > highest:
                    reasons.setdefault(row, f"toxicity: {value:.2f}")
        return reject(add_facts(batch, facts), reasons)

    return step
