"""Step quality: a trained classifier's probability that a document is of the wanted kind, such as a textbook's page."""

import pyarrow as pa
from ml_collections import ConfigDict

from llmjax.errors import UserError
from llmjax.prepare import classifier
from llmjax.prepare.records import Step, add_facts, kept, reject


def make(settings: ConfigDict) -> Step:
    """Write the fact "quality" and reject documents below settings.quality_min, with the probability as the reason.

    Raises:
        UserError: if settings.quality_model is not set or is not a classifier that can be read.
    """
    if not settings.quality_model:
        raise UserError(
            "the step quality needs a classifier: train one on documents you want and documents you do not "
            "(llmjax.prepare.classifier) and set prepare.quality_model to its file, or take the step out of prepare.steps"
        )
    model = classifier.load(settings.quality_model)
    lowest = settings.quality_min

    def step(batch: pa.RecordBatch) -> pa.RecordBatch:
        texts = batch["text"].to_pylist()
        rows = [row for row, keep in enumerate(kept(batch)) if keep and texts[row] is not None]
        scores = dict(zip(rows, classifier.score(model, [texts[row] for row in rows]).tolist(), strict=True))
        batch = add_facts(batch, {row: {"quality": round(value, 4)} for row, value in scores.items()})
        return reject(batch, {row: f"quality: {value:.2f}" for row, value in scores.items() if value < lowest})

    return step
