"""Which settings of the objective contradict each other or the model, and what to set instead (see model_checks.py)."""

import re
from collections.abc import Iterator

from ml_collections import ConfigDict

from llmjax.config.model_checks import RECURRENT
from llmjax.config.ranges import AT_LEAST_0, SHARE
from llmjax.config.values import parse_duration

# Objectives that say themselves who sees whom, or for which nothing may be hidden from a token.
ANY_ORDER = ("masked", "translation", "unilm", "permutation", "prefix", "span")
BOTH_SIDES = ("masked", "translation")  # every token sees all others
ANSWERS = ("preference", "unpaired", "reward", "distill", "policy")  # of conversations
LEFT_TO_RIGHT = ("causal", "multi_token", "infill", "prefix", "span", *ANSWERS)
PREFERENCES = (
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo", "nca", "bco", "sppo", "apo_zero", "apo_down", "discopop", "aot",
    "aot_unpaired", "simpo", "cpo", "orpo",
)  # fmt: skip
SHARING = ("preference", "unpaired", "policy")  # objectives that compare answers to one prompt
# Losses of the difference of two scores, in which log Z of the f-divergence cancels (Wang et al. 2023).
OF_DIFFERENCES = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo", "discopop", "sft"}
WEIGHT = r"((\d+(\.\d*)?|\.\d+)(e-?\d+)?)?"
WITHOUT_REFERENCE = {"simpo", "cpo", "orpo", "sft"}
SENTINELS = 100  # ids that stand for hidden spans, as many as T5 has
UNILM_TYPES = 6


def own_order(c: ConfigDict) -> bool:
    """Whether the objective says for each token of a row whom it sees, as by no rule for all rows."""
    name = c.objective.name
    return name in ("unilm", "permutation", "prefix") or (name == "span" and not c.model.encoder_layers)


def _shares(c: ConfigDict) -> Iterator[str]:
    o = c.objective
    if len(o.mask_split) != 3 or not all(share in SHARE for share in o.mask_split) or abs(sum(o.mask_split) - 1) > 1e-6:
        yield f"objective.mask_split={o.mask_split} must be three shares that add up to 1: <mask>, random, kept"
    if len(o.modes) != 4 or not all(weight in AT_LEAST_0 for weight in o.modes) or sum(o.modes) <= 0:
        yield (
            f"objective.modes={o.modes} must be four weights, not all 0: bidirectional, left-to-right, right-to-left, "
            "sequence-to-sequence"
        )
    if o.loss_chunks > c.train.sequence_length:
        yield (
            f"objective.loss_chunks={o.loss_chunks} must be at most train.sequence_length={c.train.sequence_length}, the "
            "tokens of a row"
        )
    if o.whole_words and o.name not in BOTH_SIDES:
        yield f"objective.whole_words is for the masked and translation objectives, not {o.name}: set it to false"


def _directions(c: ConfigDict) -> Iterator[str]:
    name, m = c.objective.name, c.model
    if name in BOTH_SIDES and m.direction != "bidirectional":
        yield (
            f"objective.name={name} predicts hidden tokens from both sides, and model.direction=causal shows one of them: "
            "set model.direction=bidirectional"
        )
    if name in LEFT_TO_RIGHT and m.direction != "causal":
        yield (
            f"objective.name={name} predicts what comes next, and with model.direction=bidirectional tokens see it: set "
            "model.direction=causal, or an objective that hides tokens, such as masked"
        )
    if own_order(c) and m.attention == "splash":
        yield f"objective.name={name} says for each row who sees whom, which model.attention=splash cannot: set it to auto"
    recurrent = next((kind for kind in m.pattern if kind in RECURRENT), "")
    if name in ANY_ORDER and recurrent:
        yield (
            f"objective.name={name} lets tokens see later ones, and {recurrent} layers only read from left to right: set "
            "model.pattern to attention only, or objective.name=causal"
        )


def _parts_of_models(c: ConfigDict) -> Iterator[str]:
    o, m = c.objective, c.model
    if o.name == "permutation" and not m.two_stream:
        yield (
            "objective.name=permutation asks for tokens by queries that do not see them: set model.two_stream=true (and "
            "model.position=xlnet)"
        )
    if o.name != "permutation" and m.two_stream:
        yield (
            f"model.two_stream is for objective.name=permutation, and {o.name} would never train its queries: set it to "
            "false"
        )
    if o.name == "multi_token" and m.ahead < 2:
        yield "objective.name=multi_token predicts several tokens from each position: set model.ahead to 2 or more"
    if o.name != "multi_token" and m.ahead > 1:
        yield f"model.ahead={m.ahead} has heads that only objective.name=multi_token trains: set that, or model.ahead=1"
    if o.name != "span" and m.encoder_layers > 0:
        yield (
            f"model.encoder_layers={m.encoder_layers} is for objective.name=span, which gives the encoder something to "
            f"read, and {o.name} does not: set that, or model.encoder_layers=0"
        )
    if o.name == "translation" and m.languages < 2:
        yield "objective.name=translation tells languages apart by their embeddings: set model.languages to 2 or more"
    if o.name == "unilm" and 0 < m.types < UNILM_TYPES:
        yield (
            f"objective.name=unilm marks its kinds of rows with {UNILM_TYPES} types, and model.types={m.types}: set it to "
            f"{UNILM_TYPES}, or to 0 for none"
        )
    length = c.train.sequence_length
    if o.name == "permutation" and length % o.recurrence != 0:
        yield f"objective.recurrence={o.recurrence} must divide train.sequence_length={length}"
    # About 1 + rate tokens of text make a row; what is a little above does no harm (see objectives/span.py).
    if o.name == "span" and length * o.mask_rate / o.span_length > SENTINELS:
        yield (
            f"rows of train.sequence_length={length} have about {length * o.mask_rate / o.span_length:.0f} hidden spans, and "
            f"there are {SENTINELS} sentinels: raise objective.span_length, or lower objective.mask_rate or the length"
        )


def _data(c: ConfigDict) -> Iterator[str]:
    parallel = next((source for source in c.data.sources if "|" in source), "")
    if parallel and c.data.holdout_tail_percent > 0:
        yield (
            f"data.holdout_tail_percent cuts documents in two, and {parallel!r} has pairs of lines: set it to 0 and "
            "data.holdout_percent to the share of pairs"
        )


def _answers(c: ConfigDict) -> Iterator[str]:
    o, r, conversations = c.objective, c.rollout, c.data.format == "conversations"
    if o.name in ANSWERS and not conversations:
        yield f"objective.name={o.name} learns from answers: set data.format=conversations"
    if o.name == "classify" and not conversations:
        yield "objective.name=classify learns from texts with labels: set data.format=conversations"
    if conversations and o.name not in ("causal", "classify", *ANSWERS):
        of_answers = ", ".join(("classify", *ANSWERS))
        yield f"objective.name={o.name} is for text: with data.format=conversations it is causal, {of_answers}"
    if o.classify.labels and o.classify.target == "number":
        yield "objective.classify.labels are names of classes, and the target is a number: set them to ()"
    if o.name == "reward" and not c.model.value_head:
        yield "objective.name=reward needs a head that gives a number: set model.value_head=true"
    known = (*PREFERENCES, "sft")
    parts = [part.partition("=")[::2] for part in o.preference.loss.split()]
    losses = [name for name, _ in parts]
    if not losses or any(name not in known for name in losses):
        yield f"objective.preference.loss={o.preference.loss!r} must name losses, with weights or without: {', '.join(known)}"
    if len(set(losses)) < len(losses) or not all(re.fullmatch(WEIGHT, weight) for _, weight in parts):
        yield (
            f"objective.preference.loss={o.preference.loss!r} must name each loss once, with a weight that is a number or "
            "without, as in 'orpo=1 sft=0.5'"
        )
    plain = sorted(set(losses) - OF_DIFFERENCES)
    if o.name == "preference" and plain and o.preference.divergence != "reverse_kl":
        yield (
            f"objective.preference.divergence={o.preference.divergence} is for losses of the difference of two scores, and "
            f"{plain[0]} is none: set it to reverse_kl"
        )
    if "exo" in losses and not o.preference.label_smoothing:
        yield "objective.preference.loss=exo needs label_smoothing above 0, such as 0.001"
    if set(losses) & {"aot", "aot_unpaired"} and (c.train.micro_batches > 1 or c.data.pack) and o.name == "preference":
        yield "aot sorts the whole batch: set train.micro_batches=1 and data.pack=false"
    if o.name == "unpaired" and (c.train.micro_batches > 1 or c.train.batch_size < 2):
        yield (
            "objective.name=unpaired compares each answer with a KL over the whole batch: set train.micro_batches=1, and "
            "train.batch_size to 2 or more"
        )
    if o.name == "policy" and r.kl_weight and o.policy.kl_weight:
        yield "the KL is either in the reward (rollout.kl_weight) or in the loss (objective.policy.kl_weight): set one to 0"
    if o.name == "policy" and o.policy.temperature not in (0, r.temperature):
        yield (
            f"objective.policy.temperature={o.policy.temperature} trains another distribution than rollout.temperature="
            f"{r.temperature} samples: set it to 0"
        )
    if o.name == "policy" and r.advantage in ("mean", "leave_one_out") and r.samples < 2:
        yield f"rollout.advantage={r.advantage} compares answers to one prompt: set rollout.samples to 2 or more"
    if o.name == "policy" and r.advantage == "gae" and not c.model.value_head:
        yield "rollout.advantage=gae needs a critic: set model.value_head=true"
    if o.name == "policy" and (c.model.dropout or c.model.attention_dropout or c.model.layer_drop):
        yield "a policy's ratio to itself must be 1, and dropout makes it another: set model.dropout and its like to 0"
    compared = o.name == "preference" and set(losses) - WITHOUT_REFERENCE
    if compared and (c.model.dropout or c.model.attention_dropout or c.model.layer_drop):
        yield (
            "a model that has not moved must equal its reference, and dropout makes it another: set model.dropout and its "
            "like to 0"
        )


def _shared_prompts(c: ConfigDict) -> Iterator[str]:
    """Of rows that are trees: a prompt and the answers to it."""
    name, m, t, samples = c.objective.name, c.model, c.train, c.rollout.samples
    if not c.data.share_prompts:
        return
    if name not in SHARING:
        yield f"data.share_prompts is for answers to one prompt, and objective.name={name} has none: set it to False"
    recurrent = next((kind for kind in m.pattern if kind in RECURRENT), "")
    if recurrent:
        yield f"{recurrent} layers read one text after another, not several with one beginning: set data.share_prompts=False"
    if m.moe.experts:
        yield (
            "the losses that balance model.moe.experts count every token, and a shared prompt is fewer of them: set "
            "data.share_prompts=False"
        )
    if m.attention == "splash":
        yield "model.attention=splash cannot see a row as a tree: set it to auto, or data.share_prompts=False"
    for axis in ("context", "pipeline"):
        if re.search(rf"\b{axis}=(?!1\b)", c.parallel.mesh):
            yield (
                f"data.share_prompts needs whole rows in every layer, and parallel.mesh={c.parallel.mesh!r} divides them: set "
                f"it to False, or use a mesh without the axis {axis}"
            )
    if name == "policy" and c.rollout.pack > 1:
        yield "rollout.pack and data.share_prompts both say which answers share a row: set rollout.pack=1"
    if name == "policy" and t.batch_size % (samples * t.micro_batches):
        yield (
            f"data.share_prompts makes a row of the rollout.samples={samples} answers to a prompt, which must not be cut: make "
            f"train.batch_size={t.batch_size} a multiple of them times train.micro_batches={t.micro_batches}"
        )


def _sampled(c: ConfigDict) -> Iterator[str]:
    """Of rows that are conversations, and of answers that are sampled."""
    name, m, r, t = c.objective.name, c.model, c.rollout, c.train
    if c.data.format == "conversations" and parse_duration(t.batch_ramp)[0]:
        yield f"train.batch_ramp={t.batch_ramp!r} is for text: with data.format=conversations set it to '0 steps'"
    own = name == "distill" and c.objective.distill.on_policy > 0
    if name != "policy" and not own:
        return
    if parse_duration(t.duration)[1] == "second":
        yield (
            f"train.duration={t.duration!r}: the time of a step cannot be measured where answers are sampled: give steps or "
            "tokens"
        )
    if t.rewind.factor:
        yield (
            "train.rewind.factor skips batches, and answers that are sampled depend on all steps before them: set it to 0"
        )
    texts = r.updates * t.batch_size
    if name == "policy" and texts % r.samples:
        yield (
            f"a round has rollout.updates x train.batch_size = {r.updates} x {t.batch_size} = {texts} texts, which is no "
            f"multiple of rollout.samples={r.samples}: change one of them"
        )
    if name == "policy" and r.pack > 1 and t.micro_batches == 1:
        yield (
            f"rollout.pack={r.pack} saves the micro-batches that stay empty, and there is one: set train.micro_batches to 2 or "
            "more"
        )
    if name == "policy" and r.pack > 1 and t.noise_scale:
        yield "train.noise_scale compares micro-batches, and rollout.pack leaves some empty: set one of them off"
    if name == "policy" and m.moe.experts and m.moe.dispatch == "capacity":
        yield (
            "model.moe.dispatch=capacity drops tokens by what else is in a batch, so the sampler and the trainer are not one "
            "model: set it to dropless"
        )
    if name == "policy" and m.norm == "batch":
        yield (
            "model.norm=batch takes statistics over the batch in training and kept ones in sampling, so they are not one "
            "model: choose another norm"
        )


PARTS = (_shares, _directions, _parts_of_models, _data, _answers, _shared_prompts, _sampled)
