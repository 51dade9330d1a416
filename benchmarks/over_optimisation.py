"""A hidden gold reward under a learnt proxy: how far it rises, and where optimising the proxy makes it fall.

    python benchmarks/over_optimisation.py --out results/over_optimisation.json

A small model is taught random words over the letters a to d. The gold reward of a word is the share of its neighbours that
follow each other in the circle a b c d, less what the word is longer than eight letters; below four letters it is 0. A reward model
sees pairs of random words, of which one in ten is labelled wrongly, and never the gold reward. It begins with random weights: a model that
has learnt to write random words has learnt that neighbours say nothing. Then GRPO optimises the reward model, with several weights
of the KL to the start, and with none as the control; the gold reward only watches, with weight 0. Few pairs teach a proxy that
can be exploited. Each run gives reward, gold reward and sqrt(KL) of every round (Gao et al. 2023).

Each run takes less than three minutes of 2 cores. The script skips finished runs: with `--seconds 170` it stops after that
time, and the same command goes on. The results are written after every run.
"""

import itertools
import json
import random
import statistics
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import ROOT, Budget, OutOfTime, llmjax, make_parser, write

LETTERS, LONGEST = "abcd", 14
LEAST, ENOUGH = 4, 8  # letters
PAIR = 40  # tokens of two answers with their prompts, at most
UNFELT = 1e-9  # the control's weight of the KL: with 0 the reference is not read, and the KL not measured
MODEL = (
    "--config.tokenizer.kind=byte", "--config.model.layers=2", "--config.model.width=64", "--config.model.heads=4",
    "--config.model.mlp_width=128", "--config.model.vocab_size=320", "--config.data.min_bytes=1", "--config.data.holdout_percent=5",
    "--config.train.batch_size=32", "--config.train.sequence_length=24",
    "--config.model.pattern=('conv','global')",  # attention alone does not find neighbours in so few steps
    "--config.train.eval_every=0 steps", "--config.stages=('prepare','tokenizer','train')",
)  # fmt: skip
TAUGHT = (
    "--config.data.pack=False", "--config.train.batch_size=64", "--config.train.sequence_length=24", "--config.data.holdout_percent=5",
    "--config.schedule.name=constant", "--config.schedule.warmup=0 steps", "--config.checkpoint.every=100%",
    "--config.train.eval_every=100%", "--config.stages=('rows','train')",
)  # fmt: skip
POLICY = (
    "--config.rollout.samples=16", f"--config.rollout.tokens={LONGEST}", "--config.rollout.slots=64", "--config.train.batch_size=128",
    "--config.optimizer.name=muon", "--config.optimizer.muon_learning_rate=0.003", "--config.optimizer.learning_rate=3e-4",
)  # fmt: skip


def gold(answer: str, row: Mapping[str, Any]) -> float:
    """The hidden reward of a word."""
    word = answer.strip()
    if len(word) < LEAST or any(letter not in LETTERS for letter in word):
        return 0.0
    good = sum(LETTERS[(LETTERS.index(a) + 1) % 4] == b for a, b in itertools.pairwise(word))
    return good / (len(word) - 1) - 0.15 * max(0, len(word) - ENOUGH)


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.02, 0.1], help="of the KL")
    parser.add_argument("--pairs", type=int, nargs="+", default=[1000, 8000], help="that teach the reward model")
    parser.add_argument("--steps", type=int, default=300, help="of each policy")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "words", help="where the runs are")
    parser.add_argument("--seconds", type=float, default=0, help="stop after so many, to go on later; 0: never")
    args = parser.parse_args()
    budget, runs = Budget(args.seconds), []
    try:
        for seed in args.seeds:
            folder = args.runs.resolve() / str(seed)
            start = make_start(folder, seed, budget)
            for count, weight in itertools.product(args.pairs, args.weights):
                rewarded = teach(
                    folder, "reward", make_base(folder, seed, budget, steps=1), pairs(seed, count), f"--config.seed={seed}",
                    "--config.optimizer.learning_rate=3e-3", "--config.schedule.name=linear", "--config.schedule.final=0.0",
                    f"--config.train.sequence_length={PAIR}", "--config.data.holdout_percent=20",
                    "--config.train.duration=400 steps", name=f"reward-{count}", budget=budget,
                )  # fmt: skip
                functions = [f"model:{rewarded}", "over_optimisation:gold=0"]
                run = teach(
                    folder, "grpo", start, prompts(), *POLICY, f"--config.rollout.rewards={functions}", f"--config.seed={seed}",
                    f"--config.objective.policy.kl_weight={max(weight, UNFELT)}", f"--config.train.duration={args.steps} steps",
                    name=f"kl-{weight}-{count}", budget=budget,
                )  # fmt: skip
                row = {"seed": seed, "pairs": count, "kl_weight": weight}
                runs.append({**row, "reward_model_accuracy": last(rewarded, "heldout_accuracy"), **curve(run)})
                print({key: value for key, value in runs[-1].items() if key != "rounds"}, flush=True)
                write({"steps": args.steps, "summary": summary(runs), "runs": runs}, args.out)
    except OutOfTime:
        print(f"stopped after {args.seconds:g} seconds: the same command goes on")
    return 0


def make_base(folder: Path, seed: int, budget: Budget, *, steps: int) -> Path:
    """A model that has read random words for so many steps."""
    draw = random.Random(seed)
    for i in range(32):
        lines = [f"{draw.choice(string.ascii_lowercase)}: {word(draw)}\n" for _ in range(60)]
        write_once(folder / "texts" / f"{i}.txt", "".join(lines))
    workdir = folder / f"base-{steps}"
    given = (f"--config.data.sources=['{folder / 'texts'}']", f"--config.seed={seed}", f"--config.train.duration={steps} steps",
             "--workdir", workdir)  # fmt: skip
    llmjax("run", "--config", "configs/quickstart.py", *MODEL, *given, budget=budget, log=folder / "log")
    return workdir


def make_start(folder: Path, seed: int, budget: Budget) -> Path:
    """A model that writes random words after a letter."""
    draw = random.Random(f"chats {seed}")
    chats = [{"prompt": asked, "completion": word(draw)} for asked in questions() for _ in range(40)]
    base = make_base(folder, seed, budget, steps=60)
    return teach(folder, "sft", base, chats, f"--config.seed={seed}", "--config.optimizer.learning_rate=2e-3",
                 "--config.train.duration=3 epochs", budget=budget)  # fmt: skip


def word(draw: random.Random) -> str:
    return "".join(draw.choice(LETTERS) for _ in range(draw.randint(3, 10)))


def questions() -> list[str]:
    return [f"{letter}{number}: " for letter in string.ascii_lowercase for number in range(2)]


def prompts() -> list[dict[str, str]]:
    return [{"prompt": asked} for asked in questions()]


def pairs(seed: int, count: int) -> list[dict[str, str]]:
    """Pairs of random words, the better one by the gold reward first, but for one in ten."""
    draw, made = random.Random(f"pairs {seed}"), []
    while len(made) < count:
        one, other = word(draw), word(draw)
        if gold(one, {}) == gold(other, {}):
            continue
        better, worse = (one, other) if gold(one, {}) > gold(other, {}) else (other, one)
        if draw.random() < 0.1:
            better, worse = worse, better
        made.append({"prompt": draw.choice(questions()), "chosen": better, "rejected": worse})
    return made


def teach(
    folder: Path,
    verb: str,
    start: Path,
    rows: Sequence[Mapping[str, str]],
    *more: str,
    budget: Budget,
    name: str = "",
) -> Path:
    """Run a verb of post-training on rows, unless it is done: its run."""
    workdir, file = folder / (name or verb), folder / f"{name or verb}.jsonl"
    write_once(file, "".join(json.dumps(row) + "\n" for row in rows))
    given = (f"--config.train.init_from={start}", f"--config.data.sources=['{file}']", "--workdir", workdir)
    rewards = {"PYTHONPATH": str(ROOT / "benchmarks")}  # where the functions are that reward
    llmjax(verb, "--config", f"configs/post/{verb}.py", *TAUGHT, *more, *given, budget=budget, log=folder / "log",
           environment=rewards)  # fmt: skip
    return workdir


def write_once(file: Path, text: str) -> None:
    """Write a file that is not there. One that is written again would be another one, and its training another one too."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def last(run: Path, name: str) -> float:
    return float([row[name] for row in metrics(run) if name in row][-1])


def curve(run: Path) -> dict[str, Any]:
    """The rounds of a run as (sqrt(KL), reward, gold reward), and what they begin and end with."""
    (proxy,) = {key for row in metrics(run) for key in row if key.startswith("rollout/reward/")} - {
        "rollout/reward/gold"
    }
    rounds = [
        (max(row["rollout/kl"], 0.0) ** 0.5, row[proxy], row["rollout/reward/gold"])
        for row in metrics(run)
        if "rollout/kl" in row
    ]
    smooth = [
        tuple(map(statistics.fmean, zip(*rounds[max(0, i - 4) : i + 1], strict=True))) for i in range(len(rounds))
    ]
    best = max(range(len(smooth)), key=lambda i: smooth[i][2])
    return {
        "gold_at_first": rounds[0][2],
        "gold_best": smooth[best][2],
        "gold_at_last": smooth[-1][2],
        "kl_at_best": smooth[best][0] ** 2,
        "kl_at_last": smooth[-1][0] ** 2,
        "proxy_at_first": rounds[0][1],
        "proxy_at_last": smooth[-1][1],
        "rounds": [[round(x, 4) for x in one] for one in smooth[:: max(1, len(smooth) // 50)]],
    }


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For each number of pairs and weight, over the seeds: what the gold reward rises, how far it falls from its best, and the KL; mean, least, largest."""
    found = {}
    for count, weight in sorted({(one["pairs"], one["kl_weight"]) for one in runs}):
        mine = [one for one in runs if (one["pairs"], one["kl_weight"]) == (count, weight)]
        columns = {
            "rise": [one["gold_at_last"] - one["gold_at_first"] for one in mine],
            "rise_to_best": [one["gold_best"] - one["gold_at_first"] for one in mine],
            "fall_from_best": [one["gold_best"] - one["gold_at_last"] for one in mine],
            "kl": [one["kl_at_last"] for one in mine],
        }
        found[f"{count} pairs, {weight:g} KL"] = {
            name: [statistics.fmean(x), min(x), max(x)] for name, x in columns.items()
        }
    return found


if __name__ == "__main__":
    raise SystemExit(main())
