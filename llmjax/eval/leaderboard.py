"""The settings of the Open LLM Leaderboard (version 1): shots and metric of each task, and the mean of the tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmjax.eval.local_data import MMLU
from llmjax.eval.statistics import Estimate, mean_by_size, mean_of_means


@dataclass(frozen=True)
class Setting:
    """The setting of a task: shots, the main metric (named as in lm-evaluation-harness), and the split of the examples."""

    shots: int
    metric: str
    shots_from: str = "train"


SETTINGS: dict[str, Setting] = {
    "arc_challenge": Setting(25, "acc_norm"),
    "arc_easy": Setting(25, "acc_norm"),
    "hellaswag": Setting(10, "acc_norm"),
    "mmlu": Setting(5, "acc", "dev"),
    "truthfulqa_mc1": Setting(0, "acc"),
    "truthfulqa_mc2": Setting(0, "acc"),  # the harness's name for the mass of the true answers
    "winogrande": Setting(5, "acc"),
    "gsm8k": Setting(5, "exact_match,strict-match"),
}
V1_4 = ("arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2")
AGGREGATES: dict[str, tuple[str, ...]] = {"openllm_v1_4": V1_4, "openllm_v1_6": (*V1_4, "winogrande", "gsm8k")}


@dataclass(frozen=True)
class TaskScore:
    """One task's scores.

    Attributes:
        metrics: name -> estimate. `main` is the name of the main metric.
        items: a dict for each question: "id", and the value of every metric of a question.
        notes: differences from the leaderboard, such as examples from another split.
    """

    task: str
    shots: int
    main: str
    metrics: dict[str, Estimate]
    items: list[dict[str, Any]] = field(default_factory=list, repr=False)
    notes: tuple[str, ...] = ()

    @property
    def score(self) -> Estimate:
        """The main metric."""
        return self.metrics[self.main]


def setting(task: str) -> Setting | None:
    """The setting of a task or a subject of MMLU; None for one that the leaderboard did not have."""
    return SETTINGS.get(MMLU if task.startswith(f"{MMLU}_") else task)


def expand(names: Sequence[str]) -> list[str]:
    """Names of tasks with each aggregate replaced by its tasks, without repetitions, in order."""
    return list(dict.fromkeys(task for name in names for task in AGGREGATES.get(name, (name,))))


def mmlu(parts: Sequence[TaskScore]) -> TaskScore:
    """The subjects of MMLU together: `acc` is the leaderboard's mean over subjects, `acc_by_question` that of the harness."""
    accuracies = [part.metrics["acc"] for part in parts]
    metrics = {"acc": mean_of_means(accuracies), "acc_by_question": mean_by_size(accuracies)}
    items = [{**item, "task": part.task} for part in parts for item in part.items]
    notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
    return TaskScore(MMLU, parts[0].shots, "acc", metrics, items, notes)


def aggregates(scores: Mapping[str, TaskScore]) -> dict[str, Estimate]:
    """The leaderboard's plain means, for aggregates with scores of all their tasks."""
    return {
        name: mean_of_means([scores[task].score for task in tasks])
        for name, tasks in AGGREGATES.items()
        if all(task in scores for task in tasks)
    }
