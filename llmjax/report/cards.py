"""Model card and data card of a run, from its own records, in the form that the hub reads (YAML and Markdown).

Every number comes from a file of the run. What no file says, and what the caller does not give, reads "not known".
The headings of the model card follow Mitchell et al. (2019), those of the data card Gebru et al. (2021).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmjax import human, storage
from llmjax.errors import UserError
from llmjax.parallel import chips
from llmjax.report import card_data, facts, page
from llmjax.report.collect import Run
from llmjax.report.scores import read_scores

UNKNOWN = "not known"
UNSET = ("", "0", "()", "[]")  # of settings that then follow from others
FAIRNESS = ("bbq", "crows_pairs", "winobias")  # tasks of `llmjax eval --tasks` about social bias
HELDOUT = ("bits_per_byte", "perplexity", "loss")
ANSWERS = ("exact_match", "reward", "accuracy")
ARCHITECTURE = ("layers", "width", "heads", "kv_heads", "head_size", "mlp_width", "activation", "norm", "position", "max_length",
                "vocab_size", "experts", "dtype")  # fmt: skip
TRAINING = ("objective.name", "train.duration", "train.batch_size", "train.sequence_length", "train.micro_batches",
            "train.init_from", "optimizer.name", "optimizer.learning_rate", "optimizer.weight_decay", "optimizer.clip_norm",
            "schedule.name", "schedule.warmup")  # fmt: skip


@dataclass(frozen=True)
class Given:
    """What only the author knows. Empty: not given."""

    license: str
    data_license: str = ""
    license_name: str = ""
    license_link: str = ""
    languages: tuple[str, ...] = ()
    base_model: str = ""  # its name on the hub
    use: str = ""
    out_of_scope: str = ""
    contact: str = ""
    watts: float = 0.0  # of all devices together; 0: what the makers of the chips publish


def write_cards(run: Run, given: Given, folder: Path) -> list[Path]:
    """Write folder/model/README.md, and with `given.data_license` and data of the run folder/data/README.md: the files.

    Raises:
        UserError: for a licence or a language that the hub does not know, before anything is written.
    """
    texts = {"model": model_card(run, given)}
    if given.data_license:
        if not has_data(run):
            raise UserError(
                f"{run.workdir} has no records of its data, so it has no data card: leave --data-license out"
            )
        texts["data"] = data_card(run, given)
    paths = []
    for name, text in texts.items():
        paths.append(folder / name / "README.md")
        storage.write_text(paths[-1], text)
    return paths


def has_data(run: Run) -> bool:
    """Whether the run has records of the texts that it reads."""
    return bool(facts.source_table(run) or run.stages.get("rows"))


def model_card(run: Run, given: Given) -> str:
    """The model card as text. Raises UserError as `write_cards` does."""
    scores = read_scores(run.workdir).get("tasks", {})
    results = _results(run, scores)
    languages = card_data.languages_of(given.languages, _languages(run))
    metadata = {
        "language": languages,
        **card_data.license_of(given.license, name=given.license_name, link=given.license_link, option="--license"),
        "library_name": "llmjax",
        "tags": ["llmjax", *(["conversational"] if _is_chat(run) else [])],
        "pipeline_tag": "text-generation" if _writes(run) else "",
        "base_model": given.base_model,
        "model-index": [{"name": run.name, "results": results}] if results else [],
    }
    story = {
        "run": run,
        "given": given,
        "sentence": facts.sentence(run),
        "start": _start(run, given),
        "read_from": _read_from(run),
        "architecture": _settings(run, [f"model.{name}" for name in ARCHITECTURE]),
        "training": _settings(run, TRAINING),
        "numbers": [(name, facts.show(name, value)) for name, value in run.stages.get("train", {}).items()],
        "sources": facts.source_table(run),
        "rows": run.stages.get("rows", {}),
        "tokenizer": facts.tokenizer_facts(run),
        "evaluation": facts.evaluation(run),
        "answers": run.stages.get("answers", {}),
        "tasks": [(name, entry) for name, entry in scores.items() if name not in FAIRNESS],
        "fairness": [(name, entry) for name, entry in scores.items() if name in FAIRNESS],
        "limits": _limits(run, languages, scores),
        "compute": _compute(run, given),
        "languages": languages,
    }
    return _rendered("model_card", metadata, story)


def data_card(run: Run, given: Given) -> str:
    """The data card as text. Raises UserError as `write_cards` does."""
    sources, rows = facts.source_table(run), run.stages.get("rows", {})
    count = sum(source["train"][0] + source["heldout"][0] for source in sources) or int(rows.get("rows", 0))
    languages = card_data.languages_of(given.languages, _languages(run))
    named, linked = (given.license_name, given.license_link) if given.data_license == "other" else ("", "")
    metadata = {
        "pretty_name": f"The data of {run.name}",
        "language": languages,
        **card_data.license_of(given.data_license, name=named, link=linked, option="--data-license"),
        "size_categories": [card_data.size_category(count)],
        "task_categories": ["text-generation"],
        "tags": ["llmjax"],
    }
    story = {
        "run": run,
        "given": given,
        "count": count,
        "sources": sources,
        "funnel": facts.funnel(run),
        "rows": rows,
        "steps": _settings(run, ("prepare.steps", "data.min_bytes", "data.holdout_percent", "data.format")),
        "licences": _kept(run, "licence"),
        "languages": _languages(run),
        "read_from": _read_from(run),
    }
    return _rendered("data_card", metadata, story)


def _rendered(template: str, metadata: dict[str, Any], story: dict[str, Any]) -> str:
    text = page.environment(html=False).get_template(f"{template}.md").render({**story, "unknown": UNKNOWN})
    return card_data.front_matter(metadata) + text


def _settings(run: Run, keys: Any) -> list[tuple[str, str]]:
    """(key, value) of settings that the run has."""
    known = {setting.key: setting.value.strip("'") for setting in facts.settings(run)}
    return [(key, _public(known[key])) for key in keys if known.get(key, "") not in UNSET]


def _public(text: str) -> str:
    """A setting without the folders of this machine."""
    return Path(text).name if "://" not in text and text.startswith(("/", ".", "~")) else text


def _start(run: Run, given: Given) -> str:
    """What the training started from."""
    if given.base_model or run.config is None:
        return given.base_model or UNKNOWN
    start = run.config.train.init_from
    return f"{Path(start).name}, a run of llmjax" if start else "none: trained from the start"


def _read_from(run: Run) -> str:
    """The sources of the data."""
    return ", ".join(_public(str(source)) for source in run.config.data.sources) if run.config else UNKNOWN


def _writes(run: Run) -> bool:
    return run.config is None or (run.config.model.direction == "causal" and not run.config.model.encoder_layers)


def _is_chat(run: Run) -> bool:
    return run.config is not None and run.config.data.format == "conversations"


def _kept(run: Run, what: str) -> dict[str, int]:
    """value -> documents that were kept, of all sources; "" is what no document says."""
    found: dict[str, int] = {}
    sources = run.manifest.get("sources")
    for source in sources.values() if isinstance(sources, dict) else ():
        for value, documents in source.get("kept", {}).get(what, {}).items():
            found[value] = found.get(value, 0) + int(documents)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _languages(run: Run) -> dict[str, int]:
    return {name: count for name, count in _kept(run, "language").items() if name}


def _results(run: Run, scores: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of `model-index`: held-out text in all and by source, answers, tasks."""
    task = "text-generation"
    measured, answered = run.stages.get("eval", {}), run.stages.get("answers", {})
    found = [card_data.result("held-out text", "heldout", task, {k: measured[k] for k in HELDOUT if k in measured})]
    for source in dict.fromkeys(name.partition("/")[2] for name in measured if name.startswith("bits_per_byte/")):
        numbers = {k: measured[f"{k}/{source}"] for k in HELDOUT if f"{k}/{source}" in measured}
        found.append(card_data.result(f"held-out text of {source}", "heldout", task, numbers, split=source))
    found.append(card_data.result("answers", "answers", task, {k: answered[k] for k in ANSWERS if k in answered}))
    for name, entry in scores.items():
        main = entry["main"]
        ordered = {main: entry["metrics"][main], **entry["metrics"]}
        found.append(card_data.result(name, name, task, {k: estimate["value"] for k, estimate in ordered.items()}))
    return [one for one in found if one["metrics"]]


def _limits(run: Run, languages: list[str], scores: dict[str, Any]) -> list[str]:
    """What the records say of the limits of a model."""
    limits = []
    if run.config is not None:
        limits.append(f"A text and its continuation have at most {run.config.model.max_length:,} tokens together.")
    if languages:
        limits.append(f"Its texts are in {', '.join(languages)}; other languages were not measured.")
    parameters, tokens = (facts.number(run, "train", name) for name in ("parameters", "tokens"))
    if parameters and tokens and not (run.config and run.config.train.init_from):
        limits.append(f"It has read {tokens / parameters:.3g} tokens for each parameter.")
    if not _is_chat(run):
        limits.append("It continues texts. It was not taught to follow instructions or to refuse.")
    if not scores:
        limits.append("No benchmark was run on it: its abilities beyond the figures below are not known.")
    elif leaked := [name for name, entry in scores.items() if entry.get("seen_in_training")]:
        limits.append(f"Some questions of {', '.join(leaked)} stand in its training data, so their scores flatter it.")
    if not any(name in scores for name in FAIRNESS):
        limits.append("Social bias was not measured.")
    limits.append("It makes up facts. Let people check what it writes before it decides anything about people.")
    return limits


def _compute(run: Run, given: Given) -> list[tuple[str, str]]:
    """Compute as it was counted, and energy as it is estimated, each with where it is from."""
    seconds, flops = (facts.train_number(run, name) for name in ("train_seconds", "flops"))
    device = str(facts.number(run, "train", "device") or "")
    found = [("hardware", device or UNKNOWN), ("time of training", human.duration(seconds) if seconds else UNKNOWN)]
    found.append(("FLOPs of the model (counted, without recomputation)", f"{flops:.3g}" if flops else UNKNOWN))
    count, _, kind = device.partition(" ")
    chip = chips.of_device_kind(kind)
    watts, source = given.watts, f"at the {given.watts:g} W that the author gives for all devices"
    if not watts and chip and count.isdigit():
        watts = chip.watts * int(count) / chip.devices
        source = f"at {chip.watts:g} W for each {chip.name} ({chip.sources.get('watts', 'its data sheet')})"
    if not watts or not seconds:
        return [*found, ("energy (estimate)", UNKNOWN)]
    energy = f"about {watts * seconds / 3.6e6:.3g} kWh, {source}; without cooling, hosts and network"
    return [*found, ("energy (estimate)", energy)]
