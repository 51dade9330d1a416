"""The benchmarks of `eval.tasks` during training. The train stage gets them as a function.

Only tasks of the native runner are scored, each with at most `eval.limit` questions. `llmjax eval` runs the others after
the training.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from llmjax.data.tokenizer import Tokenizer
from llmjax.model.transformer import Transformer
from llmjax.parallel import processes
from llmjax.train import check as checks
from llmjax.train import pretrain


def check(c: ConfigDict, workdir: Path | None, *, fresh: bool) -> None:
    """Raise UserError for a training that cannot begin, and for a task without questions in `eval.data`."""
    checks.check(c, workdir, fresh=fresh)
    _task_names(c)


def _task_names(c: ConfigDict) -> list[str]:
    """The tasks to score during training."""
    from llmjax.eval import local_data, native
    from llmjax.eval.leaderboard import expand

    names = [name for name in expand(c.eval.tasks) if native.can_run(name)] if c.eval.tasks else []
    for name in names:
        for part in native.with_subjects(name, c.eval.data):
            local_data.find(part, c.eval.data, shots_from=native.setting_of(part).shots_from)
    return names


def make(c: ConfigDict) -> pretrain.MakeBenchmarks | None:
    """The function for `pretrain.run` that scores the tasks; None if there are none.

    Raises:
        UserError: for a task without questions in `eval.data`.
    """
    if not c.eval.tasks:
        return None
    from llmjax.eval import native

    names = _task_names(c)
    if not names or processes.count() > 1:
        why = "in training they need a single process" if names else "none is of the native runner"
        processes.say(f"eval.tasks are not scored during training ({why}); `llmjax eval` scores them afterwards")
        return None

    def make_evaluate(
        resolved: ConfigDict, module: Transformer, tokenizer: Tokenizer, mesh: jax.sharding.Mesh
    ) -> Callable[[Any], dict[str, float]]:
        from llmjax.infer.language_model import LanguageModel
        from llmjax.train.step import make_eval_step

        step = jax.jit(make_eval_step(module, resolved))
        with_tasks = resolved.copy_and_resolve_references()
        with with_tasks.unlocked():
            with_tasks.eval.tasks = tuple(names)
        with_tasks.lock()
        return lambda params: native.numbers(
            with_tasks, LanguageModel(with_tasks, module, params, tokenizer, 0, mesh, step)
        )

    return make_evaluate
