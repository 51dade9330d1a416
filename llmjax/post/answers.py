"""The answers stage: the model answers the prompts of `eval.prompts`, and the rewards of `rollout.rewards` score them.

The same prompts and rewards before and after a training measure its effect. Answers are greedy, of at most
`rollout.tokens` tokens. A run that does not train measures the model of `train.init_from`.
"""

import importlib
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from llmjax import storage
from llmjax.data import conversations, records
from llmjax.data.conversations import Rejected, Row
from llmjax.data.examples import as_messages, prompt_ids
from llmjax.data.tokenizer_files import load_tokenizer
from llmjax.errors import UserError
from llmjax.infer.language_model import load
from llmjax.infer.rollout import sample_rollouts
from llmjax.post import rewards
from llmjax.startup.cache import cache_of
from llmjax.train import pretrain

FILE = "answers/answers.jsonl"  # in the run's folder
SHOWN = 6  # answers on the screen


def check(c: ConfigDict, workdir: Path | None, *, fresh: bool) -> None:
    """Raise UserError for prompts or rewards that are not there."""
    _rewards(c)
    _baseline(c)
    if not c.eval.prompts:
        raise UserError(
            "eval.prompts is empty: give files of prompts, such as --config.eval.prompts='[\"test.jsonl\"]'"
        )
    records.files_of(c.eval.prompts)


def run(c: ConfigDict, workdir: Path) -> dict[str, float | int | str]:
    """Answer the prompts and write WORKDIR/answers/answers.jsonl.

    Returns exact_match (of rows with `answer`) and reward, both also for each `kind` of rows as NAME/KIND, reward/FUNCTION,
    the same of `eval.baseline` as baseline_NAME, prompts, and ended, the share of answers that end by themselves.

    Raises UserError for prompts that cannot be read, and for a model that cannot answer them.
    """
    began = time.perf_counter()
    pretrain.start_devices(c)  # a training may follow in this process
    trained = (workdir / "checkpoints").is_dir()
    model = load(workdir if trained else c.train.init_from, mesh=c.infer.mesh, cache=cache_of(c))
    tokenizer = load_tokenizer(workdir / "tokenizer")
    rows = _prompts(c)
    ids = [prompt_ids(tokenizer, row) for row in rows]
    longest = max(map(len, ids)) + c.rollout.tokens
    if longest > model.config.model.max_length:
        raise UserError(
            f"the longest prompt and rollout.tokens={c.rollout.tokens} are {longest} tokens together, more than "
            f"model.max_length={model.config.model.max_length}: lower rollout.tokens, or leave long prompts out"
        )
    engine = model.engine(slots=c.rollout.slots, length=longest)
    made = sample_rollouts(engine, ids, samples=1, max_new_tokens=c.rollout.tokens, seed=c.seed, temperature=0.0)
    texts = [tokenizer.decode(row[:n].tolist()) for row, n in zip(made.tokens, made.lengths, strict=True)]
    columns = [{**row.columns, "prompt": row.prompt} for row in rows]
    scores = _scores(c, texts, columns)
    results: dict[str, float | int | str] = {"prompts": len(rows), **_means(scores, columns)}
    results["ended"] = float(np.mean([end != "length" for end in made.finish]))
    questions = ["\n".join(str(said["content"]) for said in as_messages(row.prompt, "user")) for row in rows]
    if (baseline := _baseline(c)) is not None:
        answers = baseline([{**row, "question": asked} for row, asked in zip(columns, questions, strict=True)])
        found = _means(_scores(c, answers, columns), columns)
        results |= {f"baseline_{name}": value for name, value in found.items()}
    lines = [
        {"prompt": asked, "answer": text.strip(), "wanted": row.get("answer"), "kind": row.get("kind", "")}
        | {name: None if np.isnan(values[i]) else float(values[i]) for name, values in scores.items()}
        for i, (asked, text, row) in enumerate(zip(questions, texts, columns, strict=True))
    ]
    storage.write_text(workdir / FILE, "".join(json.dumps(line) + "\n" for line in lines))
    show(workdir)
    told = ("exact_match", "reward", "baseline_exact_match", "baseline_reward")
    print(", ".join(f"{name} {results[name]:.3f}" for name in told if name in results) + f" of {len(rows)} prompts")
    return {**results, "checkpoint_step": model.step if trained else 0, "seconds": time.perf_counter() - began}


def show(workdir: Path) -> None:
    """Print some of the answers of a run."""
    for line in itertools.islice(storage.read_lines(workdir / FILE), SHOWN):
        row = json.loads(line)
        wanted = f"   (wanted: {row['wanted']})" if row["wanted"] not in (None, row["answer"]) else ""
        print(f"> {row['prompt']}\n{row['answer']}{wanted}")


def _prompts(c: ConfigDict) -> list[Row]:
    found: list[Row] = []
    for file in records.files_of(c.eval.prompts):
        for row in conversations.read(file):
            if isinstance(row, Rejected):
                raise UserError(f"{file}, row {row.number}: {row.reason}")
            found.append(row)
    return found[: c.eval.limit or None]


def _rewards(c: ConfigDict) -> dict[str, rewards.Reward]:
    return rewards.parse(c.rollout.rewards) if c.rollout.rewards else {}


def _baseline(c: ConfigDict) -> Any:
    if not c.eval.baseline:
        return None
    module, _, name = c.eval.baseline.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"eval.baseline={c.eval.baseline} is no function ({error}): give module:function") from error


def _scores(c: ConfigDict, answers: Sequence[str], columns: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """One number for each answer under each name; NaN where there is none."""
    matches = [rewards.exact_match(answer, row) for answer, row in zip(answers, columns, strict=True)]
    found = {"exact_match": np.array([np.nan if one is None else one for one in matches])}
    if given := _rewards(c):
        scored = rewards.score(given, answers, columns)
        found |= {"reward": scored.total, **{f"reward/{name}": part for name, part in scored.parts.items()}}
    return found


def _means(scores: Mapping[str, np.ndarray], columns: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The means of all rows, and as NAME/KIND of each kind of rows."""
    kinds = np.array([str(row.get("kind", "")) for row in columns])
    found = {}
    for name, values in scores.items():
        for kind in ("",) if "/" in name else ("", *sorted(set(kinds) - {""})):
            inside = values[kinds == kind] if kind else values
            if not np.isnan(inside).all():
                found[f"{name}{'/' * bool(kind)}{kind}"] = float(np.nanmean(inside))
    return found
