"""Step perplexity: how many bits a byte costs a small n-gram model of trusted text (CCNet, Wenzek et al. 2020)."""

import pyarrow as pa
from ml_collections import ConfigDict

from llmjax.errors import UserError
from llmjax.prepare import ngram
from llmjax.prepare.records import Step, add_facts, kept, reject


def make(settings: ConfigDict) -> Step:
    """Write the fact "perplexity.bits_per_byte" and reject documents above settings.perplexity_max, if that is set.

    Bits a byte is the logarithm of perplexity; natural text of the model's language and domain has about 2 with a
    6-gram model of a few MB, another language 4 and more, random letters more than that.

    Raises:
        UserError: if settings.perplexity_model is not set or is not an n-gram model that can be read.
    """
    if not settings.perplexity_model:
        raise UserError(
            "the step perplexity needs an n-gram model: train one with llmjax.prepare.ngram and set "
            "prepare.perplexity_model to its file, or take the step out of prepare.steps"
        )
    model = ngram.load(settings.perplexity_model)
    highest = settings.perplexity_max

    def step(batch: pa.RecordBatch) -> pa.RecordBatch:
        texts = batch["text"].to_pylist()
        rows = [row for row, keep in enumerate(kept(batch)) if keep and texts[row] is not None]
        bits = dict(zip(rows, ngram.score(model, [texts[row] for row in rows]).tolist(), strict=True))
        batch = add_facts(batch, {row: {"perplexity.bits_per_byte": round(value, 4)} for row, value in bits.items()})
        if highest <= 0:
            return batch
        return reject(
            batch, {row: f"perplexity: {value:.2f} bits a byte" for row, value in bits.items() if value > highest}
        )

    return step
