"""Programs as answers: HumanEval (Chen et al. 2021) and MBPP (Austin et al. 2021), scored by running their tests.

The files are JSON Lines, as published. HumanEval: task_id, prompt, entry_point, test, canonical_solution. MBPP: task_id, text (or
prompt), test_list, and optionally test_setup_code (or test_imports) and code.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmjax.errors import UserError
from llmjax.eval import local_data, sandbox
from llmjax.eval.leaderboard import TaskScore
from llmjax.eval.likelihood import context_length
from llmjax.eval.statistics import mean
from llmjax.infer.language_model import LanguageModel
from llmjax.infer.request import PLAIN

TASKS = ("humaneval", "mbpp")
STOPS = {
    "humaneval": ("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
    "mbpp": ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n```"),
}
NEW_TOKENS = 512
REFUSAL = (
    "this task runs programs that the model writes: give --allow-code-execution to permit that. They run in a sandbox, "
    "whose limits llmjax/eval/sandbox.py describes"
)


@dataclass(frozen=True)
class Problem:
    """A prompt that the model continues. `program` makes a program with its test from a continuation."""

    name: str
    prompt: str
    stops: tuple[str, ...]
    program: Callable[[str], str]
    solution: str  # the published solution; "" if there is none


def load(path: str | Path) -> list[Problem]:
    """The problems of a file in either format. Raises UserError for another format."""
    problems = []
    for number, row in enumerate(local_data.read(Path(path))):
        if {"prompt", "entry_point", "test"} <= row.keys():
            problems.append(_humaneval(row))
        elif "test_list" in row and ("text" in row or "prompt" in row):
            problems.append(_mbpp(row))
        else:
            raise UserError(
                f"row {number} of {path} is in neither HumanEval's nor MBPP's format: it has {', '.join(row)}"
            )
    return problems


def find(task: str, folders: Sequence[str | Path]) -> list[Problem]:
    """The problems of "humaneval" or "mbpp" in local folders: TASK.jsonl or TASK_test.jsonl."""
    for folder in folders:
        for name in (f"{task}.jsonl", f"{task}_test.jsonl"):
            if (Path(folder) / name).is_file():
                return load(Path(folder) / name)
    raise UserError(f"no problems of {task}: give --data DIR, a folder with {task}.jsonl")


def _humaneval(row: dict[str, Any]) -> Problem:
    def program(completion: str) -> str:
        return f"{row['prompt']}{completion}\n{row['test']}\ncheck({row['entry_point']})\n"

    return Problem(row["task_id"], row["prompt"], STOPS["humaneval"], program, row.get("canonical_solution", ""))


def _mbpp(row: dict[str, Any]) -> Problem:
    text, tests = row.get("text") or row["prompt"], "\n".join(row["test_list"])
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports", ()))
    prompt = f'"""\n{text}\n{tests}\n"""\n'

    def program(completion: str) -> str:
        return f"{completion}\n{setup}\n{tests}\n"

    return Problem(f"MBPP/{row['task_id']}", prompt, STOPS["mbpp"], program, row.get("code", ""))


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k samples is right: 1 - C(n-c, k) / C(n, k), c of n being right.

    Raises UserError for fewer than k samples.
    """
    if not 1 <= k <= samples or not 0 <= right <= samples:
        raise UserError(
            f"pass@{k} cannot be estimated from {samples} samples, {right} of them right: raise eval.samples, or lower k"
        )
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def check(problems: Sequence[Problem], completions: Sequence[Sequence[str]], **settings: Any) -> list[list[bool]]:
    """Whether each completion of each problem passes its test. `settings`: of `sandbox.run_all`."""
    programs = [p.program(text) for p, texts in zip(problems, completions, strict=True) for text in texts]
    outcomes = iter(sandbox.run_all(programs, **settings))
    return [[next(outcomes).passed for _ in texts] for texts in completions]


def evaluate(
    model: LanguageModel,
    task: str,
    folders: Sequence[str | Path],
    *,
    allow_code_execution: bool,
    samples: int = 1,
    ks: Sequence[int] = (1,),
    temperature: float = 0.0,
    top_p: float = 0.95,
    max_new_tokens: int = NEW_TOKENS,
    seed: int = 0,
    limit: int = 0,
    on_written: Callable[[int, int], None] | None = None,
    limits: sandbox.Limits | None = None,
) -> TaskScore:
    """pass@k of the programs of a model.

    Args:
        allow_code_execution: must be True; the command's --allow-code-execution.
        samples: programs for each problem.
        ks: the k of pass@k, each at most `samples`.
        temperature, top_p: of sampling. Temperature 0 is greedy, for a single sample.
        on_written: called with the numbers of programs that are written and of all.
        limits: of each program.

    Raises:
        UserError: if code may not run, several samples would be equal, or data is missing.
    """
    if not allow_code_execution:
        raise UserError(f"{task}: {REFUSAL}")
    if samples > 1 and temperature == 0:
        raise UserError(f"{samples} samples at temperature 0 are all equal: set eval.temperature, for instance to 0.8")
    for k in ks:
        pass_at_k(samples, 0, k)
    problems = find(task, folders)
    problems = problems[:limit] if limit else problems
    print(sandbox.describe())
    room = context_length(model.config) - max_new_tokens
    jobs = []
    for problem in problems:
        ids = [*model.tokenizer.prefix_ids, *model.tokenizer.encode(problem.prompt)]
        jobs += [(problem, (ids[-room:] if room > 0 else ids) or [model.tokenizer.start_id])] * samples
    made = model.generate(
        [ids for _, ids in jobs], max_new_tokens=max_new_tokens, stop=list(problems[0].stops),
        seed=[(seed + i) % 2**32 for i in range(len(jobs))], on_done=on_written,
        **{**PLAIN, "temperature": temperature, "top_p": top_p if temperature else 1.0},
    )  # fmt: skip
    texts = [completion.text for completion in made]
    completions = [texts[i * samples : (i + 1) * samples] for i in range(len(problems))]
    passed = check(problems, completions, limits=limits)
    items: list[dict[str, Any]] = [
        {
            "id": problem.name,
            **{f"pass@{k}": pass_at_k(samples, sum(right), k) for k in ks},
            "texts": list(written),
            "passed": right,
        }
        for problem, written, right in zip(problems, completions, passed, strict=True)
    ]
    metrics = {f"pass@{k}": mean([item[f"pass@{k}"] for item in items]) for k in ks}
    return TaskScore(task, 0, f"pass@{ks[0]}", metrics, items, (sandbox.describe(),))
