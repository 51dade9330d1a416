"""The cost of a study: FLOPs by formula, and seconds by the trials that have ended."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llmjax import config, human
from llmjax.data import ramp
from llmjax.errors import UserError
from llmjax.model import transformer
from llmjax.model.count import flops_per_token
from llmjax.sweep.study import ENDED, Row, Study

OWN_SIZES = {"byte": 260}  # tokenizers that know their size before they are trained


@dataclass(frozen=True)
class Cost:
    """Of the trials that are open; None: not known before the first trial has ended."""

    trials: int
    flops: float | None
    seconds: float | None
    why: str  # where the seconds are from


def keep_off_accelerators() -> None:
    """Keep JAX on the CPU in a process that only estimates, so that it takes no device from a run."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def flops_of(c: config.ConfigDict) -> float | None:
    """FLOPs to train a config; None where its duration is in epochs or time, or its vocabulary is not known yet."""
    m = c.model.copy_and_resolve_references()
    if not m.vocab_size:
        size = OWN_SIZES.get(c.tokenizer.kind, c.tokenizer.vocab_size)
        with m.unlocked():
            m.vocab_size = transformer.padded_vocab(m, size)
    sizes = ramp.batch_sizes(c.train)
    try:
        steps = sizes.steps(c.train.duration)
    except UserError:  # epochs, or a time
        return None
    return sizes.tokens(steps) * flops_per_token(m, sequence_length=c.train.sequence_length)


def estimate(study: Study, rows: Mapping[str, Row]) -> Cost:
    """The cost of what is open, by formula and by the trials that have ended."""
    still = {trial.id: trial for trial in study.trials if rows.get(trial.id, {}).get("state") not in ENDED}
    flops = {trial.arm: flops_of(study.config_of(trial)) for trial in still.values()}
    known = [flops[trial.arm] for trial in still.values()]
    total = None if any(one is None for one in known) else float(sum(one or 0.0 for one in known))
    ended = [row for row in rows.values() if row.get("state") == "done"]
    if not still:
        return Cost(0, 0.0, 0.0, "nothing is left")
    if not ended:
        return Cost(len(still), total, None, "not known before the first trial has ended")
    arms: dict[str, list[float]] = {}
    for row in ended:
        arms.setdefault(row["arm"], []).append(row["seconds"])
    usual = float(np.mean([row["seconds"] for row in ended]))
    seconds = sum(float(np.mean(arms.get(trial.arm, [usual]))) for trial in still.values())
    return Cost(len(still), total, seconds, f"as {len(ended)} trials took")


def described(cost: Cost, *, workers: int) -> str:
    """In a line."""
    work = "FLOPs not known (time or epochs)" if cost.flops is None else f"{cost.flops:.3g} FLOPs"
    if cost.seconds is None:
        return f"{cost.trials} trials are open: {work}; the time is {cost.why}"
    spread = f", {human.duration(cost.seconds / workers)} with {workers} workers" if workers > 1 else ""
    return f"{cost.trials} trials are open: {work}, {human.duration(cost.seconds)} of a worker{spread} ({cost.why})"
