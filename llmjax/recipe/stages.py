"""The table of stages: a function each, the settings and stages that it depends on, and what it leaves."""

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ml_collections import ConfigDict

from llmjax import config
from llmjax.config import changes
from llmjax.errors import UserError


@dataclass(frozen=True)
class Stage:
    """A stage: its functions (imported only when they run), the settings and stages it depends on, its help."""

    name: str
    function: str
    keys: tuple[str, ...]  # the settings, or groups of settings, that it depends on
    needs: tuple[str, ...]
    about: str
    format: str = ""  # the `data.format` that it is for; "": any
    # (config, workdir | None, fresh) raises UserError for what the stage would refuse, and changes nothing. Without a
    # workdir the stages before it are yet to run; fresh: its results so far will be moved away.
    check: str = ""
    given: tuple[tuple[str, str], ...] = ()  # arguments that rooms above make from the config
    show: str = ""  # (workdir) prints the results, if the stage is asked for alone and is done already
    leaves: tuple[str, ...] = ()  # patterns of files and folders of a finished stage, at least one of each
    everywhere: bool = False  # all processes of a job run it
    after: tuple[str, ...] = ()  # stages that it also needs, where `config.stages` has them
    reads_start: bool = False  # its check reads the run of `train.init_from`
    main: bool = False  # its results have their names without the stage's, too


STAGES: tuple[Stage, ...] = (
    Stage(
        "prepare", "llmjax.prepare.run:run",
        ("prepare", "data.sources", "data.text_field", "data.min_bytes", "data.holdout_percent",
         "data.holdout_max_bytes", "data.holdout_tail_percent", "data.shard_bytes"), (),
        "read the sources into clean, deduplicated shards of documents", "text",
        check="llmjax.prepare.run:check",
        leaves=("prepare/train/*",),
    ),
    Stage(
        "tokenizer", "llmjax.data.tokenizer_stage:run", ("tokenizer", "data.record_tokens", "data.replay", "train.init_from"), ("prepare",),
        "train the tokenizer and write token shards", "text",
        check="llmjax.data.tokenizer_stage:check", reads_start=True,
        leaves=("tokenizer/tokens/index.json",),
    ),
    Stage(
        "rows", "llmjax.post.rows:run",
        ("data.sources", "data.format", "data.turns", "data.chat_template", "data.rejected_percent",
         "data.holdout_percent", "objective.name", "rollout.tools", "tokenizer.path", "train.init_from",
         "train.sequence_length"), (),
        "read conversations, preferences or prompts into rows of ids", "conversations",
        check="llmjax.post.rows:check",
        leaves=("rows/index.json",),
    ),
    Stage(
        "train", "llmjax.train.pretrain:run",
        ("seed", "data.mixture", "data.mixture_temperature", "data.max_epochs", "data.replay", "data.replay_percent", "model",
         "objective", "optimizer", "schedule", "train"), ("tokenizer",),
        "train the model, or go on from its last checkpoint", "text",
        check="llmjax.eval.during_training:check",
        given=(("make_benchmarks", "llmjax.eval.during_training:make"),),
        leaves=("checkpoints/[0-9]*",), everywhere=True, reads_start=True,
    ),
    Stage(
        "train", "llmjax.post.train:run",
        ("seed", "data.pack", "model", "objective", "optimizer", "rollout", "schedule", "train"), ("rows",),
        "train a model further on them, or go on from the last checkpoint", "conversations",
        check="llmjax.post.train:check",
        leaves=("checkpoints/[0-9]*",), everywhere=True, reads_start=True,
    ),
    Stage(
        "eval", "llmjax.eval.stage:run", ("eval",), ("train",),
        "measure perplexity and bits per byte on held-out text",
        check="llmjax.eval.stage:check", show="llmjax.eval.stage:show", main=True,
    ),
    Stage(
        "generate", "llmjax.infer.stage:run", ("generate", "seed"), ("train",),
        "continue the prompts of the config",
        check="llmjax.infer.stage:check", show="llmjax.infer.stage:show",
    ),
    Stage(
        "answers", "llmjax.post.answers:run",
        ("eval.prompts", "eval.baseline", "eval.limit", "rollout.rewards", "rollout.tokens"), ("rows",),
        "answer prompts and score the answers", "conversations", after=("train",),
        check="llmjax.post.answers:check", show="llmjax.post.answers:show", leaves=("answers/answers.jsonl",), main=True,
    ),
    Stage("report", "llmjax.report:run", ("name",), (), "write the run's story as HTML and Markdown"),
)  # fmt: skip

FILES = "the files of data.sources"
START = "the model of train.init_from"
READING = ("prepare", "rows")  # the stages that read the files of data.sources
TRAINED = ("prepare", "tokenizer", "rows", "train")  # the stages on which a training stands


def all_names() -> list[str]:
    """The names of all stages, in the order in which they run."""
    return list(dict.fromkeys(stage.name for stage in STAGES))


def stage_of(c: ConfigDict, name: str) -> Stage:
    """A stage as this config has it. Raises UserError for a name that no stage has."""
    for stage in STAGES:
        if stage.name == name and stage.format in ("", c.data.format):
            return replace(stage, needs=(*stage.needs, *(one for one in stage.after if one in c.stages)))
    able = dict.fromkeys(stage.name for stage in STAGES if stage.format in ("", c.data.format))
    raise UserError(f"there is no stage {name!r} of data.format={c.data.format}; stages are {', '.join(able)}")


def function(name: str) -> Any:
    """The function "module:name", imported now."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def dependencies(c: ConfigDict, name: str, *, files: str | None = None, start: str = "") -> dict[str, Any]:
    """The settings that a stage and its predecessors depend on, and the state of what they read.

    Args:
        files: a digest of the files of `data.sources`; None: not known.
        start: a digest of the training of `train.init_from`; "": its path alone counts.
    """
    stage, keys = stage_of(c, name), dict[str, Any]()
    for need in stage.needs:
        keys |= dependencies(c, need, files=files, start=start)
    for key, value in config.flatten(c.to_dict()).items():
        if any(f"{key}.".startswith(f"{group}.") for group in stage.keys):
            keys[key] = value
    if name in READING and files is not None:
        keys[FILES] = files
    if start and "train.init_from" in keys:
        keys[START] = start
    return json.loads(json.dumps(keys))


def identity(c: ConfigDict, names: Sequence[str]) -> dict[str, Any]:
    """The settings that the results of stages depend on. How fast and where they run is not among them."""
    found: dict[str, Any] = {}
    for name in names:
        found |= dependencies(c, name)
    return {key: value for key, value in sorted(found.items()) if changes.class_of(key) != changes.IRRELEVANT}
