"""Do small masked, permutation and translation language models learn something real from a book in two languages?

    python benchmarks/translation.py --texts FOLDER [--out results/translation.json] [--workdir runs/translation]

FOLDER has french.txt and portuguese.txt, Genesis with a verse a line (1,533 in both). Every tenth verse is kept for
the test.

Translation: the same model is trained twice for each seed, once with the verses aligned, once with the Portuguese ones
in another order (fixed for the seed); nothing else differs. Then French tokens of test verses are hidden, and
predicted beside the Portuguese verse that belongs to them, beside another one, and beside none. The same tokens are
hidden in all three. The difference between the contexts within the aligned arm, and between the arms, is what the
model learned from the other language.

Masked and permutation: trained on the French verses, measured on French test verses, beside the best that the
frequencies of tokens alone can do on the same targets.

Hardware: 2 CPU cores.
"""

import json
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import make_parser, write

import llmjax
from llmjax import config, recipe
from llmjax.data.batches import pack
from llmjax.data.tokens import read_stream
from llmjax.infer.language_model import LanguageModel
from llmjax.objectives import OBJECTIVES, corruption, special_ids
from llmjax.objectives.masking import masked
from llmjax.train.step import make_heldout_step

LANGUAGES = ("french", "portuguese")
EVERY = 10  # verses: one of so many is for the test
LENGTH = 160
MASKINGS = 4  # times that each test verse is hidden anew
ROWS = 32
Example = dict[str, np.ndarray]


def settings(name: str, sources: Sequence[str], *, seed: int, steps: int, **changes: Any) -> config.ConfigDict:
    """The config of one run; what is not named here is the default."""
    c = config.base()
    c.name, c.seed = name, seed
    c.data.sources = tuple(sources)
    c.data.min_bytes, c.data.holdout_percent = 1, 0.0
    c.tokenizer.vocab_size = 1000
    m = c.model
    m.layers, m.width, m.heads, m.activation = 3, 96, 4, "gelu"
    m.direction = "bidirectional"
    c.objective.mask_rate = 0.25
    c.optimizer.name, c.optimizer.learning_rate = "muon", 3e-3
    c.train.batch_size, c.train.sequence_length, c.train.duration = 16, LENGTH, f"{steps} steps"
    c.train.eval_every, c.checkpoint.every = "0 steps", "100%"
    for key, value in changes.items():
        config.set_key(c, key.replace("__", "."), value)
    config.check(c)
    return c.lock()


def train(c: config.ConfigDict, workdir: Path) -> LanguageModel:
    """The model of a config, trained in `workdir`, or as it was trained there before."""
    recipe.run(c, workdir, ("prepare", "tokenizer", "train"))
    return llmjax.load(workdir)


def write_verses(texts: Path, folder: Path, *, seeds: Sequence[int]) -> dict[str, list[str]]:
    """Training files of both languages, the second also in another order for each seed; returns the test verses."""
    folder.mkdir(parents=True, exist_ok=True)
    test = {}
    for language in LANGUAGES:
        lines = (texts / f"{language}.txt").read_text(encoding="utf-8").splitlines()
        test[language] = [line.strip() for line in lines[::EVERY]]
        rest = [line.strip() for number, line in enumerate(lines) if number % EVERY]
        (folder / f"{language}.txt").write_text("\n".join(rest) + "\n", encoding="utf-8")
    for seed in seeds:
        order = np.random.default_rng(seed).permutation(len(rest))
        (folder / f"random-{seed}.txt").write_text("\n".join(rest[i] for i in order) + "\n", encoding="utf-8")
    if len(test[LANGUAGES[0]]) != len(test[LANGUAGES[1]]):
        raise ValueError(f"{LANGUAGES[0]}.txt and {LANGUAGES[1]}.txt have different numbers of lines")
    return test


# ------------------------------------------------------------------ translation


def measure_contexts(model: LanguageModel, test: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """Accuracy, loss and number of the hidden French tokens of test verses, by what stands beside them."""
    tokenizer, c = model.tokenizer, model.config
    special = special_ids(c.objective, tokenizer)
    names = sorted(LANGUAGES)

    def hidden(language: str, verse: int, masking: int) -> Example:
        """One verse by itself, its tokens hidden by a generator that depends on the verse and the masking alone."""
        ids = [tokenizer.start_id, *tokenizer.encode(test[language][verse])[: LENGTH // 2 - 2], tokenizer.end_id]
        row = {name: values[0] for name, values in pack([np.array(ids)], length=len(ids)).items()}
        rng = np.random.default_rng((names.index(language), verse, masking))
        return masked(row, rng, c, special)

    def beside(a: Example, b: Example | None) -> Example:
        row = {name: np.zeros(LENGTH, values.dtype) for name, values in a.items()}
        row["languages"] = np.zeros(LENGTH, np.int32)
        start = 0
        for language, one in zip(LANGUAGES, (a, b), strict=True):
            if one is None:
                continue
            here = slice(start, start + len(one["tokens"]))
            start = here.stop
            for name in ("tokens", "positions", "targets"):
                row[name][here] = one[name]
            row["segments"][here], row["languages"][here] = 1, names.index(language)
            row["weights"][here] = one["weights"] if one is a else 0.0
        return row

    count = len(test[LANGUAGES[0]])
    found = {}
    for context in ("aligned", "random", "none"):
        rows = []
        for masking in range(MASKINGS):
            for verse in range(count):
                other = {"aligned": verse, "random": (verse + count // 2) % count, "none": None}[context]
                second = None if other is None else hidden(LANGUAGES[1], other, masking)
                rows.append(beside(hidden(LANGUAGES[0], verse, masking), second))
        found[context] = measure_rows(model, rows)
    return found


def measure_rows(model: LanguageModel, rows: list[Example]) -> dict[str, float]:
    """Accuracy, loss and number of the predictions of rows."""
    step = jax.jit(make_heldout_step(model.module, OBJECTIVES[model.config.objective.name], model.config))
    total = {"nats": 0.0, "correct": 0.0, "tokens": 0.0}
    rows = rows + [{name: np.zeros_like(values) for name, values in rows[0].items()}] * (-len(rows) % ROWS)
    for first in range(0, len(rows), ROWS):
        batch = {name: np.stack([row[name] for row in rows[first : first + ROWS]]) for name in rows[0]}
        for name, value in step(model.params, batch).items():
            total[name] += float(value)
    return {
        "accuracy": total["correct"] / total["tokens"],
        "loss": total["nats"] / total["tokens"],
        "tokens": total["tokens"],
    }


# ------------------------------------------------------------------ one language


def measure_one_language(model: LanguageModel, workdir: Path, text: str) -> dict[str, Any]:
    """A model's accuracy and loss on a text, and those of the training text's frequencies on the same targets."""
    c, tokenizer = model.config, model.tokenizer
    change = corruption(c, tokenizer)
    assert change is not None
    ids = np.array([tokenizer.start_id, *tokenizer.encode(text), tokenizer.end_id])
    windows = [ids[start : start + LENGTH + 1] for start in range(0, len(ids) - 1, LENGTH)]
    packed = pack(windows, length=LENGTH)
    rows = [
        change.transform({name: values[i] for name, values in packed.items()}, np.random.default_rng((masking, i)))
        for masking in range(MASKINGS)
        for i in range(len(windows))
    ]
    special = special_ids(c.objective, tokenizer)
    counts = np.zeros(tokenizer.vocab_size)
    stream = read_stream(workdir / "tokenizer" / "tokens", "train", "french")
    ids, numbers = np.unique(stream[special.is_text[stream]], return_counts=True)
    counts[ids] = numbers
    shares = (counts + 1) / (counts + 1)[special.ordinary].sum()
    targets = np.concatenate([row["targets"][row["weights"] > 0] for row in rows])
    unigram = {
        "accuracy": float((targets == counts.argmax()).mean()),
        "loss": float(-np.log(shares[targets]).mean()),
        "tokens": float(len(targets)),
    }
    return {"model": measure_rows(model, rows), "unigram": unigram}


def summary(results: dict[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """Means over the seeds, and the differences seed by seed."""

    def values(measure: str, arm: str, context: str) -> list[float]:
        return [results["translation"][str(seed)][arm][context][measure] for seed in seeds]

    def described(numbers: Sequence[float]) -> dict[str, Any]:
        deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
        return {"mean": statistics.mean(numbers), "deviation": deviation, "by_seed": list(numbers)}

    arms = {
        measure: {
            f"{arm} arm, {context} verse": described(values(measure, arm, context))
            for arm in ("aligned", "random")
            for context in ("aligned", "random", "none")
        }
        for measure in ("accuracy", "loss")
    }
    minus = {
        "aligned arm: aligned verse minus random verse": (("aligned", "aligned"), ("aligned", "random")),
        "aligned verse: aligned arm minus random arm": (("aligned", "aligned"), ("random", "aligned")),
        "random arm: aligned verse minus random verse": (("random", "aligned"), ("random", "random")),
    }
    differences = {
        measure: {
            name: described([a - b for a, b in zip(values(measure, *first), values(measure, *second), strict=True)])
            for name, (first, second) in minus.items()
        }
        for measure in ("accuracy", "loss")
    }
    one = {
        name: {
            measure: described([results[name][str(seed)]["model"][measure] for seed in seeds])
            | {"unigram": results[name][str(seeds[0])]["unigram"][measure]}
            for measure in ("accuracy", "loss")
        }
        for name in ("masked", "permutation")
    }
    return {"translation": arms, "differences": differences, **one}


def main() -> None:
    parser = make_parser(__doc__, out=Path("results/translation.json"))
    parser.add_argument("--texts", type=Path, required=True, help="the folder with french.txt and portuguese.txt")
    parser.add_argument("--workdir", type=Path, default=Path("runs/translation"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600, help="of the translation arms")
    parser.add_argument("--other-steps", type=int, default=300, help="of the masked and permutation arms")
    args = parser.parse_args()
    began, seeds = time.perf_counter(), range(args.seeds)
    folder = args.workdir / "verses"
    shutil.rmtree(folder, ignore_errors=True)
    test = write_verses(args.texts, folder, seeds=seeds)
    french = folder / "french.txt"

    results: dict[str, Any] = {"translation": {}, "masked": {}, "permutation": {}}
    tokenizer = args.workdir / "aligned-0" / "tokenizer"
    for seed in seeds:
        results["translation"][str(seed)] = {}
        for arm, second in (("aligned", folder / "portuguese.txt"), ("random", folder / f"random-{seed}.txt")):
            name = f"{arm}-{seed}"
            changes: dict[str, Any] = {} if name == "aligned-0" else {"tokenizer__path": str(tokenizer)}
            c = settings(
                name, (f"french|portuguese={french}|{second}",), seed=seed, steps=args.steps,
                objective__name="translation", objective__whole_words=True, model__languages=2, **changes,
            )  # fmt: skip
            found = measure_contexts(train(c, args.workdir / name), test)
            results["translation"][str(seed)][arm] = found
            print(name, {context: round(numbers["accuracy"], 4) for context, numbers in found.items()}, flush=True)
    words: dict[str, Any] = {"objective__whole_words": True}
    streams: dict[str, Any] = {"model__two_stream": True, "model__position": "xlnet"}
    for objective, changes in (("masked", words), ("permutation", streams)):
        for seed in seeds:
            name = f"{objective}-{seed}"
            c = settings(
                name, (f"french={french}",), seed=seed, steps=args.other_steps,
                objective__name=objective, tokenizer__path=str(tokenizer), **changes,
            )  # fmt: skip
            found = measure_one_language(train(c, args.workdir / name), args.workdir / name, "\n".join(test["french"]))
            results[objective][str(seed)] = found
            print(name, found, flush=True)
    whole = {
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "summary": summary(results, seeds),
        **results,
    }
    write(whole, args.out)
    print(json.dumps(whole["summary"], indent=1))


if __name__ == "__main__":
    main()
