"""Bodies of requests: strict JSON, and the types of its fields.

Null is the same as an absent field. Unknown fields are ignored. What would change the meaning of an answer and is not
supported, or is one of our fields on a path that does not read it, is refused by its name.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from llmjax.serve.refusals import Refusal, unsupported

DEEPEST = 64  # levels of lists and objects
# A text of JSON, up to its end or that of the body. It fits wherever a text begins: or it would be looked for again from every
# quote in a text without an end, which takes the square of the time.
QUOTED = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)
BRACKETS = re.compile(r"[\[\]{}]")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
T = TypeVar("T", bound="Body")

# Messages are checked by `chat.checked`, which names what is wrong. The schema is for who reads the description.
_PART = {
    "type": "object", "required": ["type", "text"], "properties": {"type": {"const": "text"}, "text": {"type": "string"}}
}  # fmt: skip
_CONTENT = {"anyOf": [{"type": ["string", "null"]}, {"type": "array", "items": _PART}]}
_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {"role": {"enum": ROLES}, "content": _CONTENT},
}
Messages = list[Annotated[dict[str, Any], msgspec.Meta(extra_json_schema=_MESSAGE)]]


class Body(msgspec.Struct, kw_only=True):
    """What every request may have."""

    model: str | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None


class StreamOptions(msgspec.Struct):
    """How a stream is told."""

    include_usage: bool | None = None


class Guided(msgspec.Struct):
    """`structured_outputs`: the form of the text."""

    regex: str | None = None
    grammar: str | None = None
    choice: list[str] | None = None
    json: dict[str, Any] | str | None = None


class Sampled(Body, kw_only=True):
    """The fields of requests that have texts written. `fields.py` says what they mean; `Request` checks the numbers."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: Guided | None = None
    response_format: dict[str, Any] | None = None

    @property
    def counted(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class Function(msgspec.Struct):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct):
    """A tool. There are only functions."""

    type: Literal["function"]
    function: Function


class ChatBody(Sampled, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Messages
    source: str | None = None  # of the server, that the last message is asked of
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionBody(Sampled, kw_only=True):
    """POST /v1/completions, and /v1/fim/completions."""

    prompt: str | list[str | int | list[int]]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None


class FlatTool(msgspec.Struct, omit_defaults=True):
    """A tool of `/v1/responses`. Types other than function are skipped."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponsesBody(Body, kw_only=True):
    """POST /v1/responses."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    tools: list[FlatTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    text: dict[str, Any] | None = None
    stream: bool | None = None


class EmbeddingsBody(Body, kw_only=True):
    """POST /v1/embeddings."""

    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None


class RerankBody(Body, kw_only=True):
    """POST /v1/rerank."""

    query: str
    documents: list[str]
    top_n: int | None = None
    return_documents: bool | None = None


class TokenizeBody(Body, kw_only=True):
    """POST /tokenize."""

    prompt: str | None = None
    messages: Messages | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None


class DetokenizeBody(Body, kw_only=True):
    """POST /detokenize."""

    tokens: list[int]


class GivenFile(msgspec.Struct):
    """A text with the name that citations give it."""

    name: str
    text: str


class AskBody(Body, kw_only=True):
    """POST /ask: a question to a source of the server, or to files."""

    question: str
    source: str | None = None
    files: list[GivenFile] | None = None
    transcript: bool | None = None  # whether the answer has a line of a file for `llmjax ask --replay`


class ReadBody(Body, kw_only=True):
    """POST /read: a file in base64."""

    name: str
    data: str


class AgentBody(Body, kw_only=True):
    """POST /agent: a goal for a model with the tools of the server."""

    goal: str
    method: str | None = None
    tries: int | None = None
    calls: int | None = None
    seconds: float | None = None
    tokens: int | None = None
    stream: bool | None = None
    asks: bool | None = None  # whether the client answers questions for permission
    transcript: bool | None = None  # whether the answer has a line of a file for `llmjax agent --replay`


class PermissionBody(Body, kw_only=True):
    """POST /agent/permission: the answer to a question of a stream."""

    id: str
    allow: bool


class FeedbackBody(Body, kw_only=True):
    """POST /feedback: an answer that was rated, or the better one of two."""

    prompt: list[dict[str, str]]
    completion: str | None = None
    label: bool | None = None
    chosen: str | None = None
    rejected: str | None = None


# Fields that only this server has, or only servers like it. A path that does not read one refuses it, because a client that
# found it to work on another path would take the answer for what it is not.
OWN = (
    "source", "files", "transcript", "asks", "structured_outputs", "chat_template_kwargs", "top_k", "min_p", "typical_p", "repetition_penalty",
)  # fmt: skip

# Fields that would change the meaning of the answer, with the values that ask for nothing.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "chat_template": ((), "the model's own template is used; chat_template_kwargs sets its variables"),
    "store": ((False,), "nothing is stored"),
    "audio": ((), "the model writes text only"),
    "modalities": ((["text"],), "the model writes text only"),
    "web_search_options": ((), "the server does not search the web"),
    "functions": (([],), "give tools"),
    "function_call": (("none", "auto"), "give tool_choice"),
    "previous_response_id": ((), "nothing is stored: send the whole conversation as input"),
    "conversation": ((), "nothing is stored: send the whole conversation as input"),
    "background": ((False,), "answers are not kept for later"),
    "use_beam_search": ((False,), "the server samples"),
    "guided_json": ((), "give structured_outputs"),
    "guided_regex": ((), "give structured_outputs"),
    "guided_grammar": ((), "give structured_outputs"),
    "guided_choice": ((), "give structured_outputs"),
    "grammar": ((), "give structured_outputs"),
    "ignore_eos": ((False,), "logit_bias forbids tokens"),
    "min_tokens": ((0,), "logit_bias forbids tokens"),
    "bad_words": (([],), "logit_bias forbids tokens"),
    "prompt_logprobs": ((), "give echo and logprobs to /v1/completions"),
    "continue_final_message": ((False,), "give the text to /v1/completions"),
}


def read(data: bytes, kind: type[T], *, on_unknown: Callable[[str], None] = lambda name: None) -> T:
    """The body of a request. Raises Refusal that names the field which is wrong.

    Args:
        on_unknown: told the name of each field that is ignored.
    """
    value = parse(data)
    if not isinstance(value, dict):
        raise Refusal(400, "the body must be a JSON object", code="invalid_json")
    given = {name: field for name, field in value.items() if field is not None}
    for name, (harmless, why) in REFUSED.items():
        if name in given and given[name] not in harmless:
            raise unsupported(name, why)
    for name in OWN:
        if name in given and name not in kind.__struct_fields__:
            raise unsupported(name, "this path does not read it, others do: see /openapi.json")
    for name in given.keys() - REFUSED.keys() - set(kind.__struct_fields__):
        on_unknown(name)
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `")
        param = path.rstrip("`").removeprefix("$").removeprefix(".") or None
        if param is None and "missing required field" in message:
            param = message.rpartition("field `")[2].rstrip("`")
        raise Refusal(400, f"{param}: {message}" if path else message, code="invalid_type", param=param) from error


def text_of(content: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a message's content, which may be parts."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def parse(data: bytes) -> Any:
    """The value of a JSON text.

    Raises Refusal for what is no JSON, and for what readers understand differently: keys that occur twice, NaN and
    infinities, numbers of thousands of digits, lone surrogates, and nesting deeper than DEEPEST.
    """
    try:
        text = data.decode("utf-8")
        _check_depth(text)
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse, parse_float=_float)
        if "\\u" in text:  # only an escape can write half a character
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        reason = "half of a character" if isinstance(error, UnicodeEncodeError) else str(error)
        raise Refusal(400, f"the body is no valid JSON: {reason}", code="invalid_json") from error


def _check_depth(text: str) -> None:
    depth = 0
    for bracket in BRACKETS.finditer(QUOTED.sub("", text)):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > DEEPEST:
            raise ValueError(f"more than {DEEPEST} levels")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice in an object")
    return found


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _refuse(name: str) -> Callable[[], None]:
    raise ValueError(f"{name} is no JSON")
