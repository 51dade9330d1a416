"""Ratings of answers: their file, the strengths of systems, and the agreement of raters.

A file of ratings is JSON Lines, on which reward models can train. Each row has "rater", "time" (seconds since 1970),
"prompt", "answers" (two texts), "systems" (their names), "order" ([0, 1] or [1, 0], how the answers were shown) and
"choice": 0 or 1, the index of the better answer in "answers"; "tie"; or null for a failed judgement, which does not count.
A row of K answers has in place of "choice" their "ranks" (1 is best, equal ones tie) and "scores" from 1 to 5, by the names
of `SCALES`. Whatever compares two answers takes it for its K (K - 1) / 2 pairs.
"""

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from llmjax import storage
from llmjax.errors import UserError
from llmjax.eval import local_data, statistics

Choice = int | str | None
CHOICES: tuple[Choice, ...] = (0, 1, "tie", None)
SCALES = ("fluency", "coherence", "relevance", "helpfulness", "honesty", "harm")  # 5 is most: of harm the worst
BEST, WORST = 5, 1  # scores
ELO_SCALE, ELO_MEAN = 400 / math.log(10), 1000.0


@dataclass(frozen=True)
class Pair:
    """A prompt with two answers, or with several that are to be ranked."""

    prompt: str
    answers: tuple[str, ...]
    systems: tuple[str, ...]


@dataclass(frozen=True)
class Rating:
    """A row of the file, see the module."""

    rater: str
    time: float
    choice: Choice
    prompt: str
    answers: tuple[str, ...]
    order: tuple[int, ...]
    systems: tuple[str, ...]

    @property
    def key(self) -> str:
        """The key of the pair, for all raters and both orders."""
        return pair_key(Pair(self.prompt, self.answers, self.systems))


@dataclass(frozen=True)
class Ranking:
    """A row of K answers, see the module."""

    rater: str
    time: float
    ranks: tuple[int, ...]
    scores: dict[str, tuple[int | None, ...]]  # one an answer, None where the rater gave none
    prompt: str
    answers: tuple[str, ...]
    order: tuple[int, ...]
    systems: tuple[str, ...]

    @property
    def key(self) -> str:
        """The key of the answers, for all raters and orders."""
        return pair_key(Pair(self.prompt, self.answers, self.systems))

    def pairs(self) -> list[Rating]:
        """What it says of each two answers."""
        found = []
        for i, j in itertools.combinations(range(len(self.answers)), 2):
            choice: Choice = "tie" if self.ranks[i] == self.ranks[j] else int(self.ranks[i] > self.ranks[j])
            order = (0, 1) if self.order.index(i) < self.order.index(j) else (1, 0)
            both = [(x[i], x[j]) for x in (self.answers, self.systems)]
            found.append(Rating(self.rater, self.time, choice, self.prompt, both[0], order, both[1]))
        return found


def pair_key(pair: Pair) -> str:
    """A key for answers to a prompt, the same for all orders of them."""
    sides = sorted(zip(pair.systems, pair.answers, strict=True))
    return hashlib.blake2b(json.dumps([pair.prompt, sides]).encode(), digest_size=12).hexdigest()


def rate(pair: Pair, *, rater: str, choice: Choice, order: tuple[int, ...], now: float | None = None) -> Rating:
    """A rating of a pair. Raises UserError for an unknown choice."""
    if choice not in CHOICES or isinstance(choice, bool):
        raise UserError(f"choice={choice!r} is not known: give 0, 1, 'tie' or None")
    return Rating(rater, time.time() if now is None else now, choice, pair.prompt, pair.answers, order, pair.systems)


def rank(
    pair: Pair,
    *,
    rater: str,
    ranks: Sequence[int],
    scores: Mapping[str, Sequence[int | None]],
    order: tuple[int, ...],
    now: float | None = None,
) -> Ranking:
    """A ranking of answers. Raises UserError for ranks and scores that cannot be."""
    count = len(pair.answers)
    if len(ranks) != count or any(not 1 <= one <= count for one in ranks):
        raise UserError(f"ranks={list(ranks)} must be a number from 1 (the best) to {count} for each answer")
    for name, given in scores.items():
        if name not in SCALES or len(given) != count or any(x is not None and not WORST <= x <= BEST for x in given):
            raise UserError(f"scores of {name} are {list(given)}: give {WORST} to {BEST}, or none, for each answer")
    kept = {name: tuple(given) for name, given in scores.items()}
    when = time.time() if now is None else now
    return Ranking(rater, when, tuple(ranks), kept, pair.prompt, pair.answers, order, pair.systems)


def shown_order(pair: Pair, *, rater: str, seed: int) -> tuple[int, ...]:
    """The order in which a rater sees the answers: random, but the same each time."""
    digest = hashlib.blake2b(f"{seed} {rater} {pair_key(pair)}".encode(), digest_size=8).digest()
    if len(pair.answers) > 2:
        drawn = np.random.default_rng(int.from_bytes(digest)).permutation(len(pair.answers))
        by_system = sorted(range(len(pair.answers)), key=lambda i: (pair.systems[i], pair.answers[i]))
        return tuple(by_system[i] for i in drawn)
    # By system, so that the order of the files has no effect.
    first = int(np.argmin(pair.systems)) if pair.systems[0] != pair.systems[1] else 0
    return (first, 1 - first) if digest[0] % 2 else (1 - first, first)


def append(path: Path, rating: Rating | Ranking) -> None:
    """Append a rating. It is on disk when this returns."""
    storage.append_line(path, json.dumps(asdict(rating), ensure_ascii=False))


def read(path: Path) -> list[Rating | Ranking]:
    """The rows of a file, none if there is no file. Raises UserError for a damaged one."""
    if not path.is_file() or not path.stat().st_size:
        return []
    found: list[Rating | Ranking] = []
    for number, row in enumerate(local_data.read(path), start=1):
        try:
            kind = Ranking if "ranks" in row else Rating
            tuples = ("answers", "order", "systems", *(["ranks"] if kind is Ranking else []))
            row = {**row, **{name: tuple(row[name]) for name in tuples}}
            if kind is Ranking:
                row["scores"] = {name: tuple(given) for name, given in row["scores"].items()}
            made = kind(**{name: row[name] for name in kind.__dataclass_fields__})
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}, line {number} is no rating ({error!r})") from error
        if isinstance(made, Rating) and (made.choice not in CHOICES or isinstance(made.choice, bool)):
            raise UserError(f"{path}, line {number}: choice is {made.choice!r}, not 0, 1, 'tie' or null")
        found.append(made)
    return found


def pairwise(rows: Iterable[Rating | Ranking]) -> list[Rating]:
    """What rows say of each two answers."""
    return [one for row in rows for one in (row.pairs() if isinstance(row, Ranking) else [row])]


def read_pairs(paths: Sequence[Path], *, together: bool = False) -> list[Pair]:
    """Pairs of answers to the same prompt: of one file with "prompt", "answers" and "systems", or of several files with
    "prompt" and "text", one for each system. With `together` the answers of all files to a prompt are one.

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
    if together:
        shared = [prompt for prompt in by_file[names[0]] if all(prompt in by_file[name] for name in names)]
        made = [Pair(prompt, tuple(by_file[name][prompt] for name in names), tuple(names)) for prompt in shared]
        if not made:
            raise UserError("no prompt is in all of the files, so there is nothing to rank")
        return made
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


def mean_scores(rows: Iterable[Rating | Ranking]) -> dict[tuple[str, str], statistics.Estimate]:
    """(system, scale) -> the mean of its scores, with the error of the mean."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        for scale, given in row.scores.items() if isinstance(row, Ranking) else ():
            for system, score in zip(row.systems, given, strict=True):
                if score is not None:
                    found.setdefault((system, scale), []).append(float(score))
    return {key: statistics.mean(values) for key, values in sorted(found.items())}


def summary(rows: Sequence[Rating | Ranking], *, bootstrap: Callable[..., dict[str, Strength]] = bradley_terry) -> str:
    """The results of the ratings in a few lines."""
    ratings = pairwise(rows)
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
    lines += [
        f"  {system}, {scale}: {mean.value:.2f} of {BEST} (standard error {mean.error:.2f})"
        for (system, scale), mean in mean_scores(rows).items()
    ]
    return "\n".join(lines)
