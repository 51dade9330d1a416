"""The verb `sweep`: many runs that are compared, or that search for the best settings. Imports are late: help is quick."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from llmjax.config.ranges import AT_LEAST_1, number
from llmjax.errors import UserError
from llmjax.verb import Verb

if TYPE_CHECKING:
    from llmjax.sweep.cost import Cost
    from llmjax.sweep.design import Trial
    from llmjax.sweep.study import Row, Study


def _add(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--workdir", type=Path, metavar="DIR", help="the study's folder (default: runs/NAME-study)")
    verb.add_argument("--seeds", type=number(int, AT_LEAST_1), metavar="N", help="seeds of each arm, 0 to N - 1")
    verb.add_argument(
        "--sweep", nargs="+", default=[], metavar="KEY=VALUES",
        help="search these settings: KEY=log(1e-3,1e-1), linear(0,1), integer(2,8), or values 8,16",
    )  # fmt: skip
    verb.add_argument(
        "--trials", type=number(int, AT_LEAST_1), default=20, metavar="N", help="points of a search (default: 20)"
    )
    verb.add_argument(
        "--sampler", choices=("random", "quasi-random", "halving", "tpe"), default="quasi-random",
        help="how a search chooses its points (default: quasi-random; tpe needs llmjax[search])",
    )  # fmt: skip
    verb.add_argument("--metric", nargs="+", metavar="NAME", help="numbers of results.json; several: objectives of tpe")
    verb.add_argument(
        "--better",
        nargs="+",
        choices=("lower", "higher"),
        metavar="lower|higher",
        help="which values of the metric are better",
    )
    verb.add_argument(
        "--budget",
        default="",
        metavar="TIME",
        help="start no trial once the ended ones have taken so long, such as '2 hours'",
    )
    verb.add_argument(
        "--workers", type=number(int, AT_LEAST_1), default=1, metavar="N",
        help="trials at a time on this machine, which share its cores (default: 1)",
    )  # fmt: skip
    verb.add_argument("--retry", action="store_true", help="run trials again that failed or diverged")
    verb.add_argument(
        "--dry-run", action="store_true", help="print the trials, the cost and the commands, and write nothing"
    )
    verb.add_argument(
        "--launcher", choices=("local", "slurm", "gke", "tpu_vm", "sky"), default="local",
        help="who runs the trials: workers here, or jobs of launch/ (default: local)",
    )  # fmt: skip
    verb.add_argument("--launcher-options", default="", metavar="TEXT", help="options of that launcher, as one text")
    verb.add_argument(
        "--trial", action="store_true", help="run the trials of one run of a study; --workdir is that run's"
    )
    verb.add_argument("--worker", default="", help=argparse.SUPPRESS)


def run(args: argparse.Namespace, c: ConfigDict) -> int:
    """Run the open trials of a study. Exit status 0: all trials have ended; 1: some failed, or are still open."""
    from llmjax.sweep import worker

    worker.share_programs(_folder(args, c))
    from llmjax.sweep import cost, page, study, workers  # some of these import jax

    _seconds(args.budget)  # it can be read
    if args.trial:
        return _one(args, c)
    found = _planned(args, c)
    if args.worker:
        workers.take_part(args.worker)
        _work(args, found)
        return 0
    alone = args.workers == 1 and args.launcher == "local" and not args.dry_run
    if not alone:
        cost.keep_off_accelerators()
    else:
        from llmjax.train import pretrain

        pretrain.start_devices(found.config)  # the estimate starts JAX
    rows = study.rows(found.folder)
    _print_plan(found, rows, cost.estimate(found, rows), args)
    if args.dry_run:
        return 0
    study.write(found)
    if args.launcher != "local":
        return workers.launch(found, launcher=args.launcher, options=shlex.split(args.launcher_options))
    if args.workers > 1:
        workers.run(found, count=args.workers, words=_words(args, found.folder))
    else:
        _work(args, found)
    where = page.write(found.folder)
    return _print_end(found.folder, where)


def _folder(args: argparse.Namespace, c: ConfigDict) -> Path:
    """The folder of the study."""
    from llmjax.sweep import study

    if args.trial and args.workdir is None:
        raise UserError("--trial needs --workdir STUDY/runs/RUN")
    return args.workdir.parent.parent if args.trial else args.workdir or study.default_folder(c)


def _words(args: argparse.Namespace, folder: Path) -> list[str]:
    """The words with which this command starts a worker."""
    more = ["--budget", args.budget] if args.budget else []
    return ["sweep", "--workdir", str(folder), *more, *(["--retry"] if args.retry else [])]


def _planned(args: argparse.Namespace, c: ConfigDict) -> "Study":
    """The study of the command's config, or the one in --workdir."""
    from llmjax import config
    from llmjax.sweep import design, search, study
    from llmjax.sweep.space import read_space

    if not args.config:
        if config.differences(config.base(), c):
            raise UserError(
                "settings need --config FILE: without it the study goes on with the settings of its study.json"
            )
        if args.workdir is None:
            raise UserError("give --config FILE with get_sweep(arg), or --workdir with an existing study")
        found = study.read(args.workdir)
        if args.sweep:
            raise UserError("--sweep needs --config FILE, the config whose settings are searched")
        if args.seeds:
            made = replace(found.design, seeds=design.read_seeds(args.seeds))
            found = study.plan(found.folder, found.config, made, search=found.search, one_run_a=found.one_run_a)
        return found
    folder = _folder(args, c)
    given = {"metric": args.metric, "better": args.better, "seeds": args.seeds}
    given = {key: value for key, value in given.items() if value is not None}
    if args.sweep:
        space = read_space(args.sweep)
        made = design.read_design({"seeds": (c.seed,), "control": "", "arms": {"space": {}}, **given})
        looked = search.make(c, space, sampler=args.sampler, count=args.trials, seed=c.seed)
        return search.first(folder, c, looked, replace(made, arms={}))
    tree = config.sweep(args.config)
    if tree is None:
        raise UserError(f"{args.config} has no get_sweep(arg): add one (docs/sweeps.md), or give --sweep KEY=VALUES")
    return study.plan(folder, c, design.read_design({**tree, **given}))


def _print_plan(found: "Study", rows: "dict[str, Row]", left: "Cost", args: argparse.Namespace) -> None:
    from llmjax import config
    from llmjax.sweep import comparison, cost, workers

    header = ("arm", "settings", "trials")
    table = [header]
    for arm in comparison.arms_of(found, rows):
        table.append((arm.name, comparison.shown_settings(arm.settings), comparison.told(arm)))
    print(f"the study {found.folder}: {len(found.design.arms)} arms, seeds {', '.join(map(str, found.design.seeds))}\n")
    print(comparison.aligned(table))
    print(f"\n{cost.described(left, workers=args.workers)}", flush=True)
    if config.parse_duration(found.config.train.duration)[1] == "second":
        print(
            "WARNING: train.duration is a time, so arms that share the machine take fewer steps: give steps or tokens"
        )
    if args.dry_run or args.launcher != "local":
        print("\n".join(["", *(f"llmjax {shlex.join(words)}" for words in workers.commands(found))]))


def _work(args: argparse.Namespace, found: "Study") -> None:
    """Run the open trials one after another, and write the table when one ends."""
    from llmjax.sweep import page, search, study, worker

    before = study.rows(found.folder)
    again = {name: row["time"] for name, row in before.items() if args.retry and row["state"] in ("failed", "diverged")}
    limit = _seconds(args.budget)

    def is_open(row: "Row") -> bool:
        return row.get("state") not in study.ENDED or again.get(row["trial"]) == row["time"]

    def wanted() -> "Sequence[Trial]":
        known = study.rows(found.folder)
        if limit and sum(row.get("seconds", 0.0) for row in known.values()) >= limit:
            return []
        now = search.propose(found.folder) if found.search else found
        if now.config.to_dict() != found.config.to_dict():
            raise UserError(
                f"another command has given {found.folder} another config: run this one in a folder of its own"
            )
        return study.open_trials(now, {name: row for name, row in known.items() if not is_open(row)})

    def ended(trial: "Trial") -> None:
        page.write_results(found.folder)
        row = study.rows(found.folder)[trial.id]
        print(
            f"=== {trial.arm}, seed {trial.seed}: {row['state']}, {row.get('error') or row.get('values')}", flush=True
        )

    worker.work(found, wanted=wanted, ended=ended)


def _seconds(text: str) -> float:
    from llmjax import config

    if not text:
        return 0.0
    amount, unit = config.parse_duration(text)
    if unit != "second":
        raise UserError(f"--budget {text!r}: give a time, such as '2 hours'")
    return amount


def _one(args: argparse.Namespace, c: ConfigDict) -> int:
    """Run the trials of one run of a study, which a launcher has started, in one process or several."""
    from llmjax.parallel import processes
    from llmjax.sweep import page, study, worker

    found = study.read(_folder(args, c))
    mine = [trial for trial in found.trials if trial.run == args.workdir.name]
    if not mine:
        raise UserError(f"{found.folder} has no trial whose run is {args.workdir.name}: run its sweep again")
    parallel = found.config.parallel
    processes.start(heartbeat_seconds=parallel.heartbeat_seconds, start_seconds=parallel.start_seconds)

    def wanted() -> "Sequence[Trial]":
        known = processes.broadcast_from_first(lambda: sorted(study.rows(found.folder).items()))
        ended = {name for name, row in known if row["state"] in study.ENDED}
        return [trial for trial in mine if trial.id not in ended]

    worker.work(found, wanted=wanted)
    if processes.is_first():
        page.write(found.folder)
    return 0


def _print_end(folder: Path, where: Path) -> int:
    from llmjax.sweep import comparison, search, study

    found, rows = study.read(folder), study.rows(folder)
    arms = comparison.arms_of(found, rows)
    print(f"\n{comparison.aligned(comparison.table(found, arms))}\n")
    tree = search.summary(found, arms, rows)
    for line in search.described(tree):
        print(line)
    if tree.get("best"):
        from llmjax import storage

        storage.write_text(folder / "best.py", search.best_config(found, tree))
        print(f"the best config: {folder / 'best.py'}")
    states = [rows.get(trial.id, {}).get("state", "open") for trial in found.trials]
    failed, still = states.count("failed"), sum(state not in study.ENDED for state in states)
    if failed:
        print(f"{failed} trials failed; the page says why, and --retry runs them again", file=sys.stderr)
    if still:
        print(f"{still} trials are open; the same command goes on with them", file=sys.stderr)
    print(f"the page: {where}")
    return 1 if failed or still else 0


VERBS = {
    "sweep": Verb(
        "run the arms of a study with several seeds, or search for settings, and compare the results",
        _add, run, config="optional",
    ),
}  # fmt: skip
