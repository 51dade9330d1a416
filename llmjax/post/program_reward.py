"""A reward by a program: an answer is worth 1 when the `check` of its row runs to its end.

    rollout.rewards = ("llmjax.post.program_reward:passes",)

`check` is a Python program that reads the variable `answer`. It runs in the sandbox (eval/sandbox.py), together with
any part of the answer that it evaluates, so it needs Linux. A failed assertion, a limit or an early exit gives 0.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llmjax.eval import sandbox
from llmjax.post.rewards import batched

LIMITS = sandbox.Limits(cpu_seconds=2, wall_seconds=10.0, memory=256 << 20)
KEPT = 1 << 16  # outcomes that are remembered: a policy writes many answers again
_known: dict[str, bool] = {}  # program -> whether it passed


@batched
def passes(answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """1 for each answer with which the row's `check` passes, else 0; None for a row without `check`.

    Results of earlier programs are remembered. New programs run several at a time.
    """
    programs = [
        f"answer = {answer!r}\n{row['check']}" if row.get("check") else ""
        for answer, row in zip(answers, rows, strict=True)
    ]
    new = list(dict.fromkeys(program for program in programs if program and program not in _known))
    for program, outcome in zip(new, sandbox.run_all(new, limits=LIMITS), strict=True):
        _known[program] = outcome.passed
    made = [float(_known[program]) if program else None for program in programs]
    while len(_known) > KEPT:
        del _known[next(iter(_known))]
    return made
