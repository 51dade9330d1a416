"""The quickstart goes on: its base model learns to answer questions about functions, in four links. Offline.

    llmjax run --config configs/quickstart.py            the base model in runs/quickstart, if it is not there yet
    llmjax run --config configs/assistant.py             at most 10 minutes on 2 cores, in runs/assistant
    llmjax run --config configs/assistant.py --config.sft.train.duration='1200 steps' --workdir runs/longer

`make assistant` runs the first two. Questions and answers are made of the functions of Python's standard library
(data/stdlib_questions.py); one function in ten is held out, and 200 prompts about those measure every link:

    base   the quickstart's model, measured as it is
    sft    learns from examples, most of whose authors give arguments in a form that is often wrong
    dpo    learns which form is preferred
    grpo   improves by its own answers: half of the reward is for an answer that passes its check, a program that runs in
           the sandbox, and half for the preferred one
"""

from ml_collections import ConfigDict

from llmjax.config import parse_arg, post_run

BASE = "runs/quickstart"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ 'Answer: ' + message.content + eos_token + '\\n' if message.role == 'assistant' else 'Question: ' + message.content + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
)


def get_chain(arg: str = "") -> dict[str, ConfigDict]:
    """The links in order: base, sft, dpo, grpo."""
    parse_arg(arg, choices=("full",))
    return {"base": _base(), "sft": _sft(), "dpo": _dpo(), "grpo": _grpo()}


def _link(name: str, start: str, source: str, *, objective: str = "causal") -> ConfigDict:
    """What the links share: where they start, how messages are written, and what measures them."""
    c = post_run(name, objective=objective)
    c.stages = ("rows", "train", "answers", "report")
    c.train.init_from = start
    c.data.sources = (source,)
    c.data.chat_template = TEMPLATE
    c.data.holdout_percent = 2.0
    c.eval.prompts = ("stdlib-test",)
    c.eval.limit = 200
    c.eval.baseline = "llmjax.data.stdlib_questions:baseline"
    c.rollout.rewards = ("llmjax.post.program_reward:passes=0.5", "exact_match=0.5")
    c.rollout.tokens = 40
    c.rollout.slots = 32
    c.generate.prompts = ()
    c.generate.temperature = 0.0
    c.generate.max_new_tokens = 60
    c.train.sequence_length = 256
    c.train.eval_every = "50%"
    c.train.eval_batches = 2
    return c


def _base() -> ConfigDict:
    c = _link("base", BASE, "stdlib-prompts", objective="policy")
    c.stages = ("rows", "answers")
    return c


def _sft() -> ConfigDict:
    c = _link("sft", "base", "stdlib-answers")
    c.optimizer.name = "muon"
    c.optimizer.learning_rate = 3e-3
    c.optimizer.muon_learning_rate = 0.01
    c.schedule.name = "linear"
    c.schedule.final = 0.0
    c.train.batch_size = 8
    c.train.duration = "600 steps"
    return c


def _dpo() -> ConfigDict:
    c = _link("dpo", "sft", "stdlib-pairs", objective="preference")
    # Without the second loss both answers lose probability, and names are copied worse.
    c.objective.preference.loss = "sigmoid=1 sft=2"
    c.optimizer.learning_rate = 5e-5
    c.train.batch_size = 16
    c.train.duration = "40 steps"
    return c


def _grpo() -> ConfigDict:
    c = _link("grpo", "dpo", "stdlib-prompts", objective="policy")
    c.optimizer.learning_rate = (
        1e-4  # 1.5e-4 for 80 steps gives nothing more; 3e-4 rises within 20 steps, and falls again
    )
    c.schedule.name = "linear"
    c.schedule.final = 0.0
    c.rollout.samples = 8
    c.train.batch_size = 64
    c.train.sequence_length = 128
    c.train.duration = "50 steps"
    return c
