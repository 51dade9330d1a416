"""The verbs card and mark."""

import argparse
from pathlib import Path

from ml_collections import ConfigDict

from llmjax.config.ranges import Range, number
from llmjax.errors import UserError
from llmjax.verb import Verb


def _add(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--license", required=True, metavar="ID",
        help="of the model: an identifier of the hub, such as apache-2.0; other: with --license-name and --license-link",
    )  # fmt: skip
    verb.add_argument("--data-license", default="", metavar="ID", help="of the data: write a data card too")
    verb.add_argument("--license-name", default="", metavar="NAME", help="of a licence that the hub does not know")
    verb.add_argument("--license-link", default="", metavar="URL", help="where its text is")
    verb.add_argument(
        "--language", action="append", default=[], metavar="CODE",
        help="of the texts, such as en; may be repeated (default: as prepare found them)",
    )  # fmt: skip
    verb.add_argument(
        "--base-model", default="", metavar="ID", help="the hub's name of the model that this one starts from"
    )
    verb.add_argument("--use", default="", metavar="TEXT", help="what it is for")
    verb.add_argument("--out-of-scope", default="", metavar="TEXT", help="what it is not for")
    verb.add_argument("--contact", default="", metavar="TEXT", help="who answers questions about it")
    verb.add_argument(
        "--watts", type=number(float, Range(0)), default=0.0, metavar="W",
        help="power of all devices, for the estimate of energy (default: as the chips' makers publish it)",
    )  # fmt: skip
    verb.add_argument("--to", type=Path, metavar="DIR", help="the folder of the cards (default: WORKDIR/card)")


def _card(args: argparse.Namespace, c: ConfigDict) -> int:
    """`llmjax card --workdir RUN --license ID`."""
    from llmjax.report.cards import Given, write_cards
    from llmjax.report.collect import collect

    given = Given(
        license=args.license, data_license=args.data_license, license_name=args.license_name, license_link=args.license_link,
        languages=tuple(args.language), base_model=args.base_model, use=args.use, out_of_scope=args.out_of_scope,
        contact=args.contact, watts=args.watts,
    )  # fmt: skip
    for path in write_cards(collect(args.workdir, config=c), given, args.to or args.workdir / "card"):
        print(f"card: {path}")
    return 0


def _add_mark(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="runs, chains or studies")
    verb.add_argument("--tag", action="append", default=[], metavar="TAG", help="give a tag; may be repeated")
    verb.add_argument("--untag", action="append", default=[], metavar="TAG", help="take a tag away; may be repeated")
    verb.add_argument("--note", metavar="TEXT", help="write a note in place of the one that is there; '': none")


def _mark(args: argparse.Namespace, _: ConfigDict) -> int:
    """`llmjax mark RUN ... --tag TAG --note TEXT`; without a change it prints the marks."""
    from llmjax.report import marks

    made = {}
    for folder in args.runs:
        if not any((folder / name).is_file() for name in marks.MARKED):
            raise UserError(f"{folder} is no run, chain or study: it has none of {', '.join(marks.MARKED)}")
        before = marks.read(folder)
        if gone := [one for one in args.untag if one not in before.tags]:
            raise UserError(f"{folder} has no tag {gone[0]!r}; it has {', '.join(before.tags) or 'none'}")
        tags = [one for one in (*before.tags, *args.tag) if one not in args.untag]
        made[folder] = marks.checked(tags, before.note if args.note is None else args.note)
    for folder, found in made.items():
        if args.tag or args.untag or args.note is not None:
            marks.write(folder, found)
        print(" ".join([f"{folder}:", *(f"#{one}" for one in found.tags), found.note]).rstrip())
    return 0


VERBS = {
    "card": Verb(
        "write a model card and a data card of a run, as the hub reads them", _add, _card,
        after=" Numbers come from the files of the run; what they do not say reads \"not known\".",
    ),
    "mark": Verb(
        "give runs tags and a note, which the studio and reports show", _add_mark, _mark, config="none",
        after=" Without a change it prints them.",
    ),
}  # fmt: skip
