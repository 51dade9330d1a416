"""Ratings of pairs of answers: their file, the strengths of systems, and the agreement of raters.

A file of ratings is JSON Lines, on which reward models can train. Each row has "rater", "time" (seconds since 1970),
"prompt", "answers" (two texts), "systems" (their names), "order" ([0, 1] or [1, 0], how the answers were shown) and
"choice": 0 or 1, the index of the better answer in "answers"; "tie"; or null for a failed judgement, which does not count.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from llmjax import storage
from llmjax.errors import UserError
from llmjax.eval import local_data, statistics

Choice = int | str | None
CHOICES: tuple[Choice, ...] = (0, 1, "tie", None)
ELO_SCALE, ELO_MEAN = 400 / math.log(10), 1000.0


@dataclass(frozen=True)
class Pair:
    """A prompt with two answers."""

    prompt: str
    answers: tuple[str, str]
    systems: tuple[str, str]


@dataclass(frozen=True)
class Rating:
    """A row of the file, see the module."""

    rater: str
    time: float
    choice: Choice
    prompt: str
    answers: tuple[str, str]
    order: tuple[int, int]
    systems: tuple[str, str]

    @property
    def key(self) -> str:
        """The key of the pair, for all raters and both orders."""
        return pair_key(Pair(self.prompt, self.answers, self.systems))


def pair_key(pair: Pair) -> str:
    """A key for a pair, the same for both orders of its answers."""
    sides = sorted(zip(pair.systems, pair.answers, strict=True))
    return hashlib.blake2b(json.dumps([pair.prompt, sides]).encode(), digest_size=12).hexdigest()


def rate(pair: Pair, *, rater: str, choice: Choice, order: tuple[int, int], now: float | None = None) -> Rating:
    """A rating of a pair. Raises UserError for an unknown choice."""
    if choice not in CHOICES or isinstance(choice, bool):
        raise UserError(f"choice={choice!r} is not known: give 0, 1, 'tie' or None")
    return Rating(rater, time.time() if now is None else now, choice, pair.prompt, pair.answers, order, pair.systems)


def shown_order(pair: Pair, *, rater: str, seed: int) -> tuple[int, int]:
    """The order in which a rater sees the answers: random, but the same each time."""
    digest = hashlib.blake2b(f"{seed} {rater} {pair_key(pair)}".encode(), digest_size=8).digest()
    # By system, so that the order of the files has no effect.
    first = int(np.argmin(pair.systems)) if pair.systems[0] != pair.systems[1] else 0
    return (first, 1 - first) if digest[0] % 2 else (1 - first, first)


def append(path: Path, rating: Rating) -> None:
    """Append a rating. It is on disk when this returns."""
    storage.append_line(path, json.dumps(asdict(rating), ensure_ascii=False))


def read(path: Path) -> list[Rating]:
    """The ratings of a file, none if there is no file. Raises UserError for a damaged one."""
    if not path.is_file() or not path.stat().st_size:
        return []
    found = []
    for number, row in enumerate(local_data.read(path), start=1):
        try:
            row = {**row, **{name: tuple(row[name]) for name in ("answers", "order", "systems")}}
            found.append(Rating(**{name: row[name] for name in Rating.__dataclass_fields__}))
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number} is no rating ({error!r})") from error
        if found[-1].choice not in CHOICES or isinstance(found[-1].choice, bool):
            raise UserError(f"{path}, line {number}: choice is {found[-1].choice!r}, not 0, 1, 'tie' or null")
    return found


def read_pairs(paths: Sequence[Path]) -> list[Pair]:
    """Pairs of answers to the same prompt: of one file with "prompt", "answers" and "systems", or of several files with
    "prompt" and "text", one for each system.

    Raises UserError if there is no pair.
    """
    if len(paths) == 1:
        rows = local_data.read(paths[0])
        if any(not {"prompt", "answers", "systems"} <= row.keys() for row in rows):
            raise UserError(
                f"{paths[0]} has rows without prompt, answers and systems: give two files of texts, or pairs"
            )
        return [Pair(row["prompt"], tuple(row["answers"]), tuple(row["systems"])) for row in rows]
    by_file: dict[str, dict[str, str]] = {}
    for path in paths:
        name = path.stem if path.stem not in by_file else str(path)
        by_file[name] = {
            str(row["prompt"]): str(row.get("text", row.get("answer", ""))) for row in local_data.read(path)
        }
    names = list(by_file)
    found = [
        Pair(prompt, (text, by_file[b][prompt]), (a, b))
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        for prompt, text in by_file[a].items()
        if prompt in by_file[b]
    ]
    if not found:
        raise UserError("the files have no prompt in common, so there is nothing to compare")
    return found


@dataclass(frozen=True)
class Strength:
    """The strength of a system on Elo's scale (400 points are odds of ten to one, the mean is 1000), with its 95 % interval
    and its number of comparisons."""

    elo: float
    low: float
    high: float
    count: int


def bradley_terry(
    ratings: Iterable[Rating], *, draws: int = 200, seed: int = 0, prior: float = 0.5
) -> dict[str, Strength]:
    """Strengths of systems under the model of Bradley and Terry (1952): the odds that i beats j are exp(s_i - s_j).

    A tie is half a win for each. Missing judgements do not count. Intervals are percentiles of a bootstrap over prompts,
    because ratings of the same prompt are not independent.

    Args:
        prior: ties with a system of mean strength, added to every system. Otherwise a system that never lost would be
            infinitely strong.
    """
    rows = [r for r in ratings if r.choice is not None and r.systems[0] != r.systems[1]]
    names = sorted({name for r in rows for name in r.systems})
    if not rows:
        return {}
    number = {name: i for i, name in enumerate(names)}
    prompts: dict[str, list[tuple[int, int, float]]] = {}
    for r in rows:
        share = 0.5 if r.choice == "tie" else 1.0 - float(r.choice)  # type: ignore[arg-type]
        prompts.setdefault(r.prompt, []).append((number[r.systems[0]], number[r.systems[1]], share))
    tables = np.zeros((len(prompts), len(names), len(names)))
    for table, compared in zip(tables, prompts.values(), strict=True):
        for i, j, share in compared:
            table[i, j] += share
            table[j, i] += 1 - share
    whole = _fit(tables.sum(0), prior)
    rng = np.random.default_rng(seed)
    samples = [_fit(tables[rng.integers(0, len(tables), len(tables))].sum(0), prior) for _ in range(draws)]
    low, high = np.quantile(samples, [0.025, 0.975], axis=0) if draws else (whole, whole)
    counts = tables.sum((0, 2)) + tables.sum((0, 1))
    return {
        name: Strength(float(whole[i]), float(low[i]), float(high[i]), round(counts[i]))
        for name, i in sorted(number.items(), key=lambda item: -whole[item[1]])
    }


def _fit(wins: np.ndarray, prior: float) -> np.ndarray:
    """Elo of each system from wins[i, j], how often i beat j, by Hunter's minorisation (2004)."""
    games = wins + wins.T
    won = wins.sum(1) + prior / 2
    strength = np.ones(len(wins))
    for _ in range(2000):
        denominator = (games / (strength[:, None] + strength[None, :])).sum(1) + prior / (strength + 1.0)
        new = won / denominator
        new /= np.exp(np.log(new).mean())
        if np.abs(np.log(new / strength)).max() < 1e-9:
            strength = new
            break
        strength = new
    return ELO_MEAN + ELO_SCALE * np.log(strength)


def cohen_kappa(a: Sequence[Choice], b: Sequence[Choice]) -> float:
    """Agreement of two raters on the same items (Cohen 1960): 1 is full, 0 is chance, nan if all choices are equal."""
    if len(a) != len(b) or not a:
        raise UserError("two raters must have rated the same items, at least one")
    kinds = list(dict.fromkeys([*a, *b]))
    left = np.array([[x == kind for kind in kinds] for x in a], float)
    right = np.array([[x == kind for kind in kinds] for x in b], float)
    observed, expected = (left * right).sum() / len(a), float(left.mean(0) @ right.mean(0))
    return math.nan if expected == 1 else float((observed - expected) / (1 - expected))


def fleiss_kappa(counts: np.ndarray) -> float:
    """Agreement of several raters (Fleiss 1971). counts[item, kind]: each item has the same number of ratings, at least two."""
    counts = np.asarray(counts, float)
    raters = counts.sum(1)
    if counts.ndim != 2 or not len(counts) or (raters != raters[0]).any() or raters[0] < 2:
        raise UserError("every item must have been rated by as many raters, at least two")
    n = raters[0]
    agreement = ((counts**2).sum(1) - n) / (n * (n - 1))
    expected = float(((counts.sum(0) / counts.sum()) ** 2).sum())
    return math.nan if expected == 1 else float((agreement.mean() - expected) / (1 - expected))


def agreement(ratings: Iterable[Rating]) -> dict[str, float]:
    """ "A ~ B" -> Cohen's kappa of each two raters with common items; for three or more raters also "all" -> Fleiss' kappa of
    the items that all have rated. Of several ratings of an item the last one counts."""
    by_rater: dict[str, dict[str, Choice]] = {}
    for r in ratings:
        choice = r.choice
        if isinstance(choice, int) and r.systems[0] > r.systems[1]:
            choice = 1 - choice  # the same answer has the same index in both orders of the file
        if choice is not None:
            by_rater.setdefault(r.rater, {})[r.key] = choice
    names = sorted(by_rater)
    found = {}
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            if common := sorted(by_rater[a].keys() & by_rater[b].keys()):
                pairs = [by_rater[a][k] for k in common], [by_rater[b][k] for k in common]
                found[f"{a} ~ {b}"] = cohen_kappa(*pairs)
    shared = sorted(set.intersection(*(set(rated) for rated in by_rater.values()))) if by_rater else []
    if len(names) > 2 and shared:
        kinds: tuple[Choice, ...] = (0, 1, "tie")
        table = [[sum(by_rater[n][key] == kind for n in names) for kind in kinds] for key in shared]
        found["all"] = fleiss_kappa(np.array(table))
    return found


def summary(ratings: Sequence[Rating], *, bootstrap: Callable[..., dict[str, Strength]] = bradley_terry) -> str:
    """The results of the ratings in a few lines."""
    missing = sum(r.choice is None for r in ratings)
    lines = [
        f"{len(ratings) - missing} ratings by {len({r.rater for r in ratings if r.choice is not None})} raters"
        + f", {missing} missing" * bool(missing)
    ]
    for name, strength in bootstrap(ratings).items():
        lines.append(
            f"  {name}: Elo {strength.elo:.0f} [{strength.low:.0f}, {strength.high:.0f}], {strength.count} comparisons"
        )
    first = [r.choice == r.order[0] for r in ratings if isinstance(r.choice, int)]
    if len(first) > 1:
        share = statistics.mean([float(x) for x in first])
        lines.append(
            f"  the answer shown first was preferred {share.value:.1%} of the time (standard error {share.error:.1%})"
        )
    lines += [f"  agreement {name}: kappa {kappa:.2f}" for name, kappa in agreement(ratings).items()]
    return "\n".join(lines)
