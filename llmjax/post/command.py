"""The verbs that train a model further: cpt, sft, task, reward, dpo, kto, distill, grpo and ppo.

Each is a recipe with its own objective.
"""

import argparse
from collections.abc import Callable

from ml_collections import ConfigDict

from llmjax.config.ranges import AT_LEAST_1, number
from llmjax.errors import UserError
from llmjax.verb import Verb

OBJECTIVES = {  # verb: (objective, what it does)
    "sft": ("causal", "teach a model to answer as conversations do"),
    "task": ("classify", "train a model to tell the class of a text, or a number of it"),
    "reward": ("reward", "train a reward model on preferences or rankings"),
    "dpo": ("preference", "train a model on preferences, without a reward model"),
    "kto": ("unpaired", "train a model on answers that are each good or bad"),
    "distill": ("distill", "train a model on what another one, its teacher, would write next"),
    "grpo": ("policy", "improve a model by the rewards of answers that it samples, compared within groups"),
    "ppo": ("policy", "improve a model by the rewards of answers that it samples, with a value head"),
}

CONFIGS = {"task": "classify"}  # configs that are not called like their verb


def _add(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--again",
        action="store_true",
        help="let changed settings replace the training in WORKDIR, which moves to WORKDIR/before-N",
    )


def _checked(verb: str) -> Callable[[argparse.Namespace, ConfigDict], None]:
    """The check of a verb before its recipe runs. It refuses a config of another kind."""
    objective = OBJECTIVES[verb][0]

    def run(args: argparse.Namespace, c: ConfigDict) -> None:
        if c.data.format != "conversations" or c.objective.name != objective:
            raise UserError(
                f"llmjax {verb} needs data.format=conversations and objective.name={objective}, and this config has "
                f"{c.data.format} and {c.objective.name}: begin with one of configs/post/, such as configs/post/{CONFIGS.get(verb, verb)}.py"
            )
        if verb == "ppo" and c.rollout.advantage != "gae":
            raise UserError(
                f"llmjax ppo needs rollout.advantage=gae, not {c.rollout.advantage}: see configs/post/ppo.py"
            )

    return run


def _continued(args: argparse.Namespace, c: ConfigDict) -> None:
    """The check of `llmjax cpt` before its recipe runs. It refuses a config without a model to go on with."""
    if c.data.format != "text" or not c.train.init_from:
        raise UserError(
            "llmjax cpt continues the training of a model on text: begin with configs/post/cpt.py, and give "
            "--config.train.init_from=RUN"
        )


def _add_show(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--rows", type=number(int, AT_LEAST_1), default=5, metavar="N", help="so many examples (default: 5)"
    )


def _show(args: argparse.Namespace, c: ConfigDict) -> int:
    """Print what the first rows of `data.sources` teach."""
    from llmjax.post import show

    if c.data.format != "conversations":
        raise UserError(
            "llmjax show reads conversations: give a config with data.format=conversations, such as configs/post/sft.py"
        )
    colour = show.in_colour()
    shown = show.show(c, count=args.rows, colour=colour)
    print("\n\n".join(shown.lines) or "no row teaches anything")
    print(f"\n{'green' if colour else 'in [[ ]]'}: learnt")
    if said := show.diversity(c):
        print(said)
    for one in shown.rejected[: args.rows]:
        print(f"left out: {one.file.name}, row {one.number}: {one.reason}")
    return 0


VERBS = {
    name: Verb(about, _add, _checked(name), whole=True, after=" Needs --config.train.init_from=RUN and data.sources.")
    for name, (_, about) in OBJECTIVES.items()
} | {
    "cpt": Verb(
        "continue the pretraining of a model on the text of a domain",
        _add,
        _continued,
        whole=True,
        after=" Needs --config.train.init_from=RUN and data.sources.",
    ),
    "show": Verb("show token by token what the first rows of data.sources teach", _add_show, _show),
}
