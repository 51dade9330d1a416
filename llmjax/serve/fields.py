"""From the fields of a request to those of `infer.request.Request`, which checks the numbers."""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from llmjax.errors import UserError
from llmjax.infer.request import CONSTRAINTS, Request
from llmjax.serve.messages import Guided, Sampled
from llmjax.serve.refusals import Refusal, of_user_error, unsupported

NUMBERS = (
    "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "frequency_penalty", "presence_penalty",
)  # fmt: skip
MOST_STOPS, LONGEST_STOP = 4, 256
MOST_BIASES = 1024
MOST_LIKELIEST = 20
LONGEST_FORM = 1 << 16  # characters of a schema, an expression or a grammar
MOST_CHOICES = 1000  # of structured_outputs.choice


def requests_of(
    body: Sampled,
    ids: Sequence[int],
    *,
    defaults: Mapping[str, Any],
    room: int,
    count: int,
    constraint: tuple[str, Any] | None = None,
) -> list[Request]:
    """The requests of one prompt, one for each of `count` samples.

    Args:
        defaults: settings of `Request` for fields that are absent.
        room: tokens of prompt and text together.
        constraint: its kind and the constraint itself; None: that of the body.
    Raises Refusal that names the wrong field.
    """
    given: dict[str, Any] = {**defaults, **dict.fromkeys(CONSTRAINTS, "")}
    given |= {name: value for name in NUMBERS if (value := getattr(body, name)) is not None}
    given["max_new_tokens"] = _length(body, len(ids), room)
    if body.stop is not None:
        given["stop"] = _stops(body.stop)
    if body.logit_bias:
        if len(body.logit_bias) > MOST_BIASES:
            raise Refusal(400, f"logit_bias has more than {MOST_BIASES:,} ids", param="logit_bias")
        given["logit_bias"] = body.logit_bias
    given["seed"] = seed_of(body, secrets.randbits(32))
    found = constraint or form_of(body)
    if found is not None:
        given[found[0]] = found[1]
    try:
        return [Request.parse({**given, "ids": tuple(ids), "number": number}) for number in range(count)]
    except UserError as error:
        refusal = of_user_error(error)
        if refusal.param in ("response_format", "structured_outputs"):
            refusal.param = form_field(body)
        raise refusal from error


def choices_of(body: Sampled, most: int) -> int:
    """How many samples are asked for. Raises Refusal."""
    count = 1 if body.n is None else body.n
    if not 1 <= count <= most:
        raise Refusal(400, f"n={count} must be from 1 to {most}", param="n")
    return count


def likeliest_of(name: str, value: int | None) -> int:
    """How many of the likeliest tokens are asked for. Raises Refusal."""
    if value is not None and not 0 <= value <= MOST_LIKELIEST:
        raise Refusal(400, f"{name}={value} must be from 0 to {MOST_LIKELIEST}", param=name)
    return value or 0


def seed_of(body: Sampled, otherwise: int) -> int:
    """The seed of a request; clients send any whole number."""
    return otherwise if body.seed is None else body.seed % 2**32


def length_of(body: Sampled) -> int | None:
    """The most tokens to write, the smaller of the fields that say it; None: the request does not say. Raises Refusal."""
    names = [name for name in ("max_tokens", "max_completion_tokens") if getattr(body, name, None) is not None]
    for name in names:
        if getattr(body, name) < 1:
            raise Refusal(400, f"{name}={getattr(body, name)} must be at least 1", param=name)
    return min((getattr(body, name) for name in names), default=None)


def _length(body: Sampled, prompt: int, room: int) -> int:
    """The most tokens to write. Raises Refusal if they do not fit beside the prompt: nothing is cut silently."""
    wanted = length_of(body)
    if prompt + (wanted or 1) > room:
        raise Refusal(
            400,
            f"the prompt has {prompt} tokens, {wanted or 1} are to be written, and the model's context is {room} tokens: "
            "shorten the prompt or lower max_tokens",
            code="context_length_exceeded", param="messages" if hasattr(body, "messages") else "prompt",
        )  # fmt: skip
    return wanted or room - prompt


def _stops(given: str | list[str]) -> list[str]:
    stops = [given] if isinstance(given, str) else given
    if len(stops) > MOST_STOPS or any(len(stop) > LONGEST_STOP for stop in stops):
        raise Refusal(400, f"stop may have {MOST_STOPS} texts of {LONGEST_STOP} characters each at most", param="stop")
    return stops


def form_field(body: Sampled) -> str:
    """The field that says the form of a text."""
    return "structured_outputs" if body.response_format is None else "response_format"


def form_of(body: Sampled) -> tuple[str, Any] | None:
    """The form that a text is held to: the kind of constraint and the constraint; None: any. Raises Refusal."""
    schema = schema_of(body.response_format)
    guided = None if body.structured_outputs is None else _guided(body.structured_outputs)
    if schema is not None and guided is not None:
        raise Refusal(400, "give response_format or structured_outputs, not both", param="structured_outputs")
    found = ("json_schema", schema) if schema is not None else guided
    if found is not None and len(found[1] if isinstance(found[1], str) else json.dumps(found[1])) > LONGEST_FORM:
        raise Refusal(400, f"the form of the answer has more than {LONGEST_FORM:,} characters", param=form_field(body))
    return found


def schema_of(form: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The JSON schema that `response_format` asks for; None: any text. Raises Refusal for another form than OpenAI's."""
    kind = "text" if form is None else form.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if form is None or kind != "json_schema":
        raise Refusal(
            400, "response_format.type must be text, json_object or json_schema", param="response_format.type"
        )
    within = form.get("json_schema")
    if not isinstance(within, dict) or not isinstance(within.get("schema"), dict):
        raise Refusal(
            400, "response_format must be {type: json_schema, json_schema: {name, schema: {...}}}",
            param="response_format.json_schema.schema",
        )  # fmt: skip
    return dict(within["schema"])


def _guided(given: Guided) -> tuple[str, Any] | None:
    found: list[tuple[str, Any]] = []
    if given.regex is not None:
        found.append(("regex", given.regex))
    if given.grammar is not None:
        found.append(("grammar", given.grammar))
    if given.json is not None:
        found.append(("json_schema", given.json))
    if given.choice is not None:
        if not given.choice or len(given.choice) > MOST_CHOICES:
            raise Refusal(400, f"choice must have from 1 to {MOST_CHOICES:,} texts", param="structured_outputs.choice")
        found.append(("regex", "|".join(map(re.escape, given.choice))))
    if len(found) > 1:
        raise Refusal(400, "give one of regex, grammar, json and choice", param="structured_outputs")
    if found and not found[0][1]:
        raise unsupported("structured_outputs", f"an empty {found[0][0]}")
    return found[0] if found else None
