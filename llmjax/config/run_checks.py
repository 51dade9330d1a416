"""Which settings of training, mesh, tokenizer and evaluation contradict each other (see model_checks.py)."""

import re
from collections.abc import Iterator

from ml_collections import ConfigDict

from llmjax.config.model_checks import bounded_positions
from llmjax.config.values import duration, flatten, parse_duration

DURATIONS = (
    "train.batch_ramp", "train.eval_every", "checkpoint.every", "checkpoint.keep_every", "schedule.warmup",
    "schedule.decay", "schedule.drop_at",
)  # fmt: skip
SMALLEST_VOCABULARY = 260  # the 256 bytes and the 4 special tokens


def _durations(c: ConfigDict) -> Iterator[str]:
    flat = flatten(c.to_dict())
    amount, unit = parse_duration(c.train.duration)
    if unit == "second" and amount <= 0:
        yield f"train.duration={c.train.duration!r} must be above 0"
    if unit != "second":
        duration(c.train.duration, tokens_per_step=1, tokens_per_epoch=1)  # raises what it cannot read
    for key in DURATIONS:
        for value in flat[key] if isinstance(flat[key], tuple) else (flat[key],):
            duration(value, tokens_per_step=1, tokens_per_epoch=1, total_steps=1)


def _training(c: ConfigDict) -> Iterator[str]:
    m, t = c.model, c.train
    ramp = parse_duration(t.batch_ramp)[0]
    yield from _patterns(c)
    if t.batch_size % t.micro_batches:
        yield f"train.micro_batches={t.micro_batches} must divide train.batch_size={t.batch_size}"
    if t.noise_scale and t.micro_batches < 2:
        yield "train.noise_scale compares the micro-batches of a step: set train.micro_batches to at least 2"
    if ramp and t.batch_start >= t.batch_size:
        yield (
            f"train.batch_ramp={t.batch_ramp!r} grows batches from train.batch_start={t.batch_start} to "
            f"train.batch_size={t.batch_size}: lower batch_start, or set train.batch_ramp='0 steps'"
        )
    bounded = bounded_positions(m)
    if bounded and t.sequence_length > m.max_length:
        yield (
            f"train.sequence_length={t.sequence_length} is more than the {m.max_length} {bounded} positions; raise "
            "model.max_length"
        )
    if 0 < t.rewind.factor <= 1:
        yield f"train.rewind.factor={t.rewind.factor} must be above 1, so that the usual loss is not high, or 0 for never"
    if t.rewind.factor and ramp:
        yield (
            f"train.rewind.factor={t.rewind.factor} skips batches, which during train.batch_ramp={t.batch_ramp!r} would be "
            "of other sizes: set one of them to 0"
        )
    if parse_duration(t.duration)[1] == "second" and (ramp or t.executable):
        yield (
            f"train.duration={t.duration!r} is measured with one step of the full size, compiled here: give steps or "
            "tokens, or set train.batch_ramp='0 steps' and train.executable=''"
        )


def _patterns(c: ConfigDict) -> Iterator[str]:
    o, a = c.optimizer, c.model.adapter
    rates = [(rate, *str(rate).rpartition("=")[::2]) for rate in o.rates]
    given = [("optimizer.train", o.train), ("optimizer.freeze", o.freeze)]
    given += [("model.adapter.targets", pattern) for pattern in a.targets]
    given += [("optimizer.rates", pattern) for _, pattern, _ in rates]
    for key, pattern in given:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"{key}={pattern!r} is no regular expression: {error}"
    for rate, pattern, factor in rates:
        if not pattern or not re.fullmatch(r"\d+(\.\d*)?(e-?\d+)?", factor):
            yield f"optimizer.rates has {rate!r}: write PATTERN=FACTOR, such as 'embedding=0.1'"
    if a.kind != "none" and not a.targets:
        yield "model.adapter.targets is empty: give patterns, or set model.adapter.kind=none"
    if a.kind == "none" and a.base_format != "stored":
        yield (
            f"model.adapter.base_format={a.base_format} is of a frozen model, and without adapters it is trained: set "
            "model.adapter.kind=lora, or base_format=stored"
        )
    if a.kind != "none" and not c.train.init_from:
        yield (
            f"model.adapter.kind={a.kind} needs a trained model: give train.init_from=RUN, or set it to none to train all "
            "parameters"
        )


def _is_trained(c: ConfigDict, path: str) -> bool:
    """Whether a parameter that is no adapter's is trained (see train/frozen.py)."""
    o = c.optimizer
    asked = re.search(o.train, path) is not None if o.train else c.model.adapter.kind == "none"
    return asked and not (o.freeze and re.search(o.freeze, path))


def _parallel(c: ConfigDict) -> Iterator[str]:
    p = c.parallel

    def divided(axis: str) -> bool:
        size = re.search(rf"\b{axis}=(-?\d+)", p.mesh)
        return size is not None and size[1] != "1"

    if p.rounds > 1 and not divided("pipeline"):
        yield (
            f"parallel.rounds={p.rounds} are turns through the stages of a pipeline, and parallel.mesh={p.mesh!r} has "
            "none: set it to 1, or give the mesh the axis pipeline"
        )
    if divided("pipeline") and c.model.norm == "batch":
        yield (
            "model.norm=batch takes statistics over all rows of a micro-batch, and a pipeline sends its parts through one "
            "after another: choose another norm, or a mesh without the axis pipeline"
        )
    if divided("pipeline") and c.objective.recurrence > 1:
        yield (
            f"objective.recurrence={c.objective.recurrence} hands the states of every layer from one part of a row to the "
            "next, which a pipeline does not: set it to 1, or use a mesh without the axis pipeline"
        )
    if divided("context") and p.context == "ring" and c.model.attention_dropout > 0:
        yield (
            "parallel.context=ring never has the weights of attention that model.attention_dropout acts on: set it to 0, "
            "or parallel.context=gather"
        )
    for name, parts in (("sequence", "positions"), ("features", "features")):
        if p[name] and not divided("tensor"):
            yield (
                f"parallel.{name} divides {parts} over tensor, which parallel.mesh={p.mesh!r} does not have: set it to "
                "False"
            )
    if p.sequence and p.features:
        yield "parallel.sequence and parallel.features both divide the residual stream over tensor: set one to False"
    tensor = re.search(r"\btensor=(\d+)", p.mesh)
    if p.features and tensor and c.model.width % int(tensor[1]):
        yield (
            f"parallel.features divides model.width={c.model.width} over tensor={tensor[1]}, which does not divide it: "
            "change one of them, or set parallel.features=False"
        )


def _data(c: ConfigDict) -> Iterator[str]:
    t = c.tokenizer
    if c.data.replay and c.data.mixture:
        yield (
            f"data.replay={tuple(c.data.replay)} and data.mixture both say how often sources are read: leave one of them "
            "empty"
        )
    if (t.add_tokens or t.add_learnt) and not (t.path or c.train.init_from):
        yield (
            "tokenizer.add_tokens and add_learnt add to a tokenizer that is there: give train.init_from or tokenizer.path"
        )
    rows = ("embedding",) if c.model.tie_embeddings else ("embedding", "head/kernel")
    if (t.add_tokens or t.add_learnt) and not all(_is_trained(c, path) for path in rows):
        yield (
            f"tokenizer.add_tokens and add_learnt add rows to {' and '.join(rows)}, which "
            f"{'adapters leave' if c.model.adapter.kind != 'none' else 'optimizer.train or optimizer.freeze leaves'} as they "
            f"are: set optimizer.train='{'|'.join(rows)}' and optimizer.freeze='', or train all parameters"
        )
    if (t.add_tokens or t.add_learnt) and c.data.format != "text":
        yield (
            f"tokenizer.add_tokens and add_learnt are for text, and data.format={c.data.format}: add tokens by "
            "continued pretraining first (configs/post/cpt.py)"
        )
    if not c.data.sources:
        yield "data.sources is empty: give 'stdlib', files or folders"
    if t.kind in ("bpe", "unigram") and not t.path and t.vocab_size < SMALLEST_VOCABULARY:
        yield (
            f"tokenizer.vocab_size={t.vocab_size} must be at least {SMALLEST_VOCABULARY}: the 256 bytes and the 4 special "
            "tokens are pieces too"
        )


def _evaluation(c: ConfigDict) -> Iterator[str]:
    m, e = c.model, c.eval
    window = e.sequence_length or c.train.sequence_length
    if e.stride > window:
        yield (
            f"eval.stride={e.stride} would leave tokens out between windows of {window}: set it to at most {window}, or to "
            "0 for half a window"
        )
    if (bounded := bounded_positions(m)) and window > m.max_length:
        yield f"eval.sequence_length={window} is more than the model's {m.max_length} {bounded} positions: lower it"
    if not all(isinstance(k, int) and 1 <= k <= e.samples for k in e.pass_at):
        yield f"eval.pass_at={e.pass_at} must be whole numbers from 1 to eval.samples={e.samples}"


PARTS = (_durations, _training, _parallel, _data, _evaluation)
