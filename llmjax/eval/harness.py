"""lm-evaluation-harness on llmjax models: its tasks, prompts and metrics with our scoring and generation.

The harness is an extra (`pip install 'llmjax[eval]'`, without torch), and is imported when it is used. Questions come from
local files (`local_data.py`). A task that would use the network is an error.
"""

import functools
import importlib.util
import logging
import os
import re
import secrets
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from llmjax.data.chat import chat_text
from llmjax.errors import UserError
from llmjax.eval import leaderboard, local_data, native
from llmjax.eval.encoding import encode_pairs, encode_texts, prefix_id, rolling_windows
from llmjax.eval.leaderboard import Setting, TaskScore, expand, mmlu
from llmjax.eval.likelihood import ScoringRequest, context_length, score_requests
from llmjax.eval.local_data import MMLU, TaskData
from llmjax.eval.statistics import Estimate
from llmjax.infer.language_model import LanguageModel
from llmjax.infer.request import PLAIN

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
NEW_TOKENS = 256  # the harness's default


def require() -> None:
    """Raise UserError unless the harness is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed: pip install 'llmjax[eval]'")


@contextmanager
def offline() -> Iterator[None]:
    """Keep Hugging Face's libraries from using their hub, also if they were imported before."""
    before = {name: os.environ.get(name) for name in OFFLINE}
    os.environ.update(OFFLINE)
    constants = []
    try:
        import datasets.config
        import huggingface_hub.constants

        constants = [(huggingface_hub.constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")]
        held = [(module, name, getattr(module, name)) for module, name in constants if hasattr(module, name)]
        for module, name, _ in held:
            setattr(module, name, True)
        yield
        for module, name, value in held:
            setattr(module, name, value)
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def make_model(
    model: LanguageModel,
    *,
    max_length: int = 0,
    batch_tokens: int = 0,
    on_scored: Callable[[int, int], None] | None = None,
) -> Any:
    """The model for the harness, an `lm_eval.api.model.TemplateLM`.

    Args:
        max_length, batch_tokens: see `likelihood.score_requests`.
        on_scored: called with the numbers of requests that are done and of all.
    """
    require()
    from lm_eval.api.model import TemplateLM

    tokenizer = model.tokenizer
    limit = max_length or context_length(model.config)
    more: dict[str, Any] = {"max_length": limit, "batch_tokens": batch_tokens}

    class Adapter(TemplateLM):
        """Log-likelihoods, rolling log-likelihoods, generation and chat templates."""

        @property
        def eot_token_id(self) -> int:
            return tokenizer.end_id

        @property
        def prefix_token_id(self) -> int:
            return prefix_id(tokenizer)

        @property
        def tokenizer_name(self) -> str:
            return tokenizer.fingerprint

        @property
        def max_length(self) -> int:
            return limit

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            if add_special_tokens is False:
                return tokenizer.encode(string, specials="parse")
            return encode_texts(tokenizer, [string])[0]

        def _score(self, requests: Sequence[ScoringRequest]) -> list[tuple[float, bool]]:
            tell = None if on_scored is None else (lambda done: on_scored(done, len(requests)))
            return [(x.sum, x.greedy) for x in score_requests(model, requests, on_scored=tell, **more)]

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            return self._score([ScoringRequest(context, continuation) for _, context, continuation in requests])

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            pairs = [request.args for request in requests]
            found = self._score(encode_pairs(tokenizer, pairs))
            for pair, one in zip(pairs, found, strict=True):
                self.cache_hook.add_partial("loglikelihood", pair, one)
            return found

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            texts = [request.args[0] for request in requests]
            rows = [
                list(rolling_windows(ids, prefix=self.prefix_token_id, length=limit))
                for ids in encode_texts(tokenizer, texts)
            ]
            parts = iter(self._score([window for row in rows for window in row]))
            found = [float(sum([next(parts)[0] for _ in row])) for row in rows]
            for text, total in zip(texts, found, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            return found

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            texts = [""] * len(requests)
            groups: dict[str, list[int]] = {}
            for number, request in enumerate(requests):
                groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
            for numbers in groups.values():
                settings, count = generation_settings(requests[numbers[0]].args[1], limit=limit)
                prompts = encode_texts(tokenizer, [requests[n].args[0] for n in numbers])
                prompts = [ids[-(limit - count) :] or [self.prefix_token_id] for ids in prompts]
                made = model.generate(prompts, max_new_tokens=count, on_done=on_scored, **{**PLAIN, **settings})
                for number, completion in zip(numbers, made, strict=True):
                    texts[number] = completion.text
            for request, text in zip(requests, texts, strict=True):
                self.cache_hook.add_partial("generate_until", request.args, text)
            return texts

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return chat_prompt(model, chat_history, reply=add_generation_prompt)

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return tokenizer.chat_template if chat_template else None

    return Adapter()


def chat_prompt(model: LanguageModel, messages: Sequence[dict[str, Any]], *, reply: bool) -> str:
    """The messages in the tokenizer's chat template. Without `reply` the last message stays open and is continued.

    If the template refuses a system message, it gets the others, as in the harness. Raises UserError as `chat_text` does,
    and if the template does not write an open last message.
    """
    end = f"[{secrets.token_hex(8)}]"
    if not reply:
        messages = [*messages[:-1], {**messages[-1], "content": (messages[-1].get("content") or "").rstrip() + end}]
    try:
        text = chat_text(model.tokenizer, messages, reply=reply)
    except UserError:
        others = [message for message in messages if message["role"] != "system"]
        if not model.tokenizer.chat_template or len(others) == len(messages):
            raise
        text = chat_text(model.tokenizer, others, reply=reply)
    if reply:
        return text
    # The template ends the last message, so the text is cut where the message itself ends.
    if end not in text:
        raise UserError("the tokenizer's chat template does not write the last message, so it cannot be continued")
    return text[: text.rindex(end)]


def generation_settings(given: dict[str, Any], *, limit: int) -> tuple[dict[str, Any], int]:
    """The settings of `LanguageModel.generate` for a task's generation_kwargs, and its number of new tokens.

    Greedy unless `do_sample`. Raises UserError if the new tokens alone fill the model's context.
    """
    aliases = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    count = int(next((given[name] for name in aliases if given.get(name) is not None), NEW_TOKENS))
    if count >= limit:
        raise UserError(
            f"the task generates {count} tokens, which leaves nothing of the model's {limit} for the prompt: "
            "raise eval.context_length, or use a model that reads more"
        )
    until = given.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    temperature = float(given.get("temperature") or 0.0)
    samples = given.get("do_sample", temperature > 0)
    settings: dict[str, Any] = {
        "stop": [stop for stop in stops if stop],
        "temperature": (temperature or 1.0) if samples else 0.0,
        "top_k": int(given.get("top_k") or 0) if samples else 0,
        "top_p": float(given.get("top_p") or 1.0) if samples else 1.0,
        "min_p": float(given.get("min_p") or 0.0) if samples else 0.0,
    }
    return settings, count


def task_config(task: str, data: TaskData, splits: dict[str, Any], setting: Setting | None) -> dict[str, Any]:
    """A member of a group of the harness: one of its tasks, with our data and number of shots."""
    changes: dict[str, Any] = {"task": task, "custom_dataset": lambda **_: splits, "dataset_kwargs": None}
    if setting is None:
        return changes
    leave_one_out = data.leave_one_out and setting.shots > 0
    # The harness keeps the question out of its own examples only if both come from the test split.
    alone = {"validation_split": None if data.asked == "test" or leave_one_out else data.asked}
    alone["test_split"] = data.asked if data.asked == "test" or leave_one_out else None
    if setting.shots:
        changes |= {"training_split": None, "fewshot_split": data.shots, "num_fewshot": setting.shots}
    else:
        changes |= {"training_split": None}
    return changes | alone


class _Splits(dict):
    """The splits of a task's data. A split that does not exist is empty, and is noted in `missing`."""

    def __init__(self, splits: dict[str, Any]) -> None:
        super().__init__(splits)
        self.missing: list[str] = []

    def __missing__(self, name: str) -> Any:
        import datasets

        self.missing.append(name)
        columns = next(iter(self.values())).column_names
        return datasets.Dataset.from_dict({column: [] for column in columns})

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Splits":
        return self


def evaluate(
    model: Any,
    tasks: Sequence[str],
    folders: Sequence[str | Path],
    *,
    shots: int | None = None,
    limit: int = 0,
    chat: bool = False,
    bootstrap: int = 1000,
) -> dict[str, TaskScore]:
    """Run tasks of the harness: task -> scores. "mmlu" is all its subjects together.

    Args:
        model: from `make_model`, or any other model of the harness.
        tasks: names of the harness, or "openllm_v1_4" and "openllm_v1_6".
        folders: the folders with the data, see `local_data`.
        shots: the number of examples; None: the leaderboard's where it had the task, which also decides the metric.
        limit: the most questions of each task; 0: all.
        chat: write prompts with the tokenizer's chat template, and examples as earlier turns.
        bootstrap: resamples for the standard errors of metrics that are not means.

    Raises:
        UserError: for unknown tasks, missing data, or a task that needs the network.
    """
    require()
    names = expand(tasks)
    parts = {name: native.with_subjects(name, folders) for name in names}
    leaves = list(dict.fromkeys(part for group in parts.values() for part in group))
    with offline(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets
        import lm_eval

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        members, chosen, splits = [], {}, {}
        for leaf in leaves:
            setting = _setting(leaf, shots)
            data = local_data.find(leaf, folders, shots_from=setting.shots_from if setting else "train")
            chosen[leaf] = (setting, data)
            splits[leaf] = _Splits({name: datasets.Dataset.from_list(rows) for name, rows in data.splits.items()})
            members.append(task_config(leaf, data, splits[leaf], setting))
        try:
            found = lm_eval.simple_evaluate(
                model=model,
                tasks=[{"group": "llmjax_local", "task": members}],
                task_manager=_tasks(tuple(leaves)),
                num_fewshot=shots if shots is not None else None,
                limit=limit or None,
                bootstrap_iters=bootstrap,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                log_samples=True,
            )
        except (ConnectionError, OSError) as error:
            raise UserError(
                f"a task needs the Hugging Face hub, which is off ({error}): tasks with their own metrics or data scripts "
                "cannot run from local files"
            ) from error
        except (AssertionError, ValueError) as error:
            lacking = [f"{leaf}_{name}.jsonl" for leaf, data in splits.items() for name in dict.fromkeys(data.missing)]
            if not lacking:
                raise
            raise UserError(
                f"the harness stopped ({error}); it had no {', '.join(lacking)}: add it to the data"
            ) from error
    assert found is not None
    scores = {leaf: _score(leaf, found, *chosen[leaf]) for leaf in leaves}
    return {name: mmlu([scores[p] for p in group]) if name == MMLU else scores[name] for name, group in parts.items()}


@functools.cache
def _tasks(names: tuple[str, ...]) -> Any:
    """The harness's index of at least these tasks.

    The harness has 14,000 files of tasks, and an index of all takes seven seconds of a core. So only the folders are read that
    define one of the tasks by its name. Where that does not find every task, the index is of all.
    """
    import lm_eval.tasks

    line = re.compile(rf"""^["']?task["']?: *["']?({"|".join(map(re.escape, names))})["']? *$""", re.MULTILINE)
    folders: dict[str, Path] = {}
    for path in sorted(Path(lm_eval.tasks.__file__).parent.rglob("*.yaml")):
        for name in line.findall(path.read_text(encoding="utf-8")):
            folders.setdefault(name, path.parent)  # as in an index of all, the first file of a name counts
    first_last = sorted(set(folders.values()), reverse=True)  # a later folder replaces what an earlier one defines
    index = lm_eval.tasks.TaskManager(include_defaults=False, include_path=list(first_last))
    return index if set(names) <= set(index.all_subtasks) else lm_eval.tasks.TaskManager()


def _setting(task: str, shots: int | None) -> Setting | None:
    setting = leaderboard.setting(task)
    if setting is None or shots is None or not setting.shots:
        return setting
    return Setting(shots, setting.metric, setting.shots_from)


def _score(task: str, found: dict[str, Any], setting: Setting | None, data: TaskData) -> TaskScore:
    """The harness's results of one task as a `TaskScore`."""
    results, samples = found["results"][task], found["samples"][task]
    count = len({sample["doc_id"] for sample in samples})
    metrics = {}
    for key, value in results.items():
        name, _, kind = key.partition(",")
        if not isinstance(value, (int, float)) or name.endswith("_stderr") or not kind:
            continue
        error = results.get(f"{name}_stderr,{kind}")
        label = name if kind == "none" else key
        metrics[label] = Estimate(float(value), float(error) if isinstance(error, (int, float)) else np.nan, count)
    if not metrics:
        raise UserError(f"the harness gave no score for {task}")
    main = setting.metric if setting and setting.metric in metrics else next(iter(metrics))
    items: dict[int, dict[str, Any]] = {}
    for sample in samples:
        row = items.setdefault(sample["doc_id"], {"id": sample["doc_id"]})
        for name in sample["metrics"]:
            if isinstance(sample[name], (int, float)):
                row[name if sample["filter"] == "none" else f"{name},{sample['filter']}"] = float(sample[name])
        responses = [
            response for one in sample["filtered_resps"] for response in (one if isinstance(one, list) else [one])
        ]
        if all(isinstance(r, tuple) and len(r) == 2 for r in responses):
            row["log_likelihoods"] = [float(r[0]) for r in responses]
        elif all(isinstance(r, str) for r in responses):
            row.setdefault("texts", responses)
    shots = int(found.get("n-shot", {}).get(task) or (setting.shots if setting else 0))
    notes = native.notes(task, setting, data) if setting else ()
    return TaskScore(task, shots, main, metrics, list(items.values()), notes)
