"""Instructions that a program checks (IFEval) as a reward, and prompts divided for training and for held-out scores.

    --config.rollout.rewards='["llmjax.post.instructions:ifeval"]'

The rows of prompts have IFEval's columns: prompt, instruction_id_list and kwargs. Other prompts of the same file have
null there, and this reward does not score them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmjax import storage
from llmjax.errors import UserError
from llmjax.eval import constraints
from llmjax.eval import ifeval as task

# Constraints that no training prompt has, so that held-out prompts also show what carries over to new ones.
HELD_OUT = ("detectable_format:json_format", "startend:quotation", "detectable_content:postscript")


def ifeval(answer: str, row: Mapping[str, Any]) -> float | None:
    """The share of a prompt's constraints that an answer follows, strictly; None where the columns are null."""
    names, arguments = row.get("instruction_id_list"), row.get("kwargs")
    if {"instruction_id_list", "kwargs"} <= row.keys() and names is arguments is None:
        return None
    if not names or arguments is None or len(names) != len(arguments):
        raise UserError("the reward ifeval needs rows with instruction_id_list and kwargs, one for each constraint")
    return sum(constraints.follows(answer, n, a) for n, a in zip(names, arguments, strict=True)) / len(names)


def write_prompts(
    source: str | Path,
    folder: str | Path,
    *,
    held_out: Sequence[str] = HELD_OUT,
    share: float = 0.2,
    without: Sequence[str] = (),
    seed: int = 0,
) -> tuple[int, int]:
    """Divide a folder's IFEval prompts: FOLDER/train.jsonl, and FOLDER/ifeval_prompts.jsonl for `--tasks ifeval`.

    Args:
        held_out: constraints; every prompt that has one of them is held out.
        share: of the other prompts, the share that is held out too.
        without: constraints whose prompts are left out, such as those whose data is missing.

    Returns:
        The numbers of prompts for training and held out; no prompt is in both.
    """
    rows = [row for row in task.find([source]) if not set(row["instruction_id_list"]) & set(without)]
    unknown = {*held_out, *without} - set(constraints.CHECKS)
    if unknown:
        raise UserError(f"{sorted(unknown)[0]!r} is no constraint of IFEval; they are {', '.join(constraints.CHECKS)}")
    drawn = np.random.default_rng(seed).random(len(rows)) < share
    away = [
        bool(set(row["instruction_id_list"]) & set(held_out)) or bool(d) for row, d in zip(rows, drawn, strict=True)
    ]
    texts = {row["prompt"].strip() for row, out in zip(rows, away, strict=True) if out}
    train = [row for row, out in zip(rows, away, strict=True) if not out and row["prompt"].strip() not in texts]
    held = [row for row, out in zip(rows, away, strict=True) if out]
    for name, part in (("train.jsonl", train), (task.FILES[0], held)):
        storage.write_text(Path(folder) / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part))
    return len(train), len(held)
