"""Chat templates: from messages to the ids that a chat model reads.

Nothing that stands in a message becomes a control token, whoever sent it: not its content, nor its role, the texts and
names of tools, documents or a template's own settings. Control tokens come from the template alone (`written.py`).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2

from llmjax.data.templates import Template, compiled
from llmjax.data.tokenizer import Segment, Tokenizer
from llmjax.data.written import Written, by_template
from llmjax.errors import UserError

Message = Mapping[str, Any]  # "role", "content" (a text, null, or a list of parts), and what else a template reads
# Templates build marks of these, such as '<|' + role + '|>'. Any other role is a mere string, as content is.
ROLES = frozenset(
    ("system", "developer", "user", "assistant", "tool", "function", "ipython", "environment", "observation", "model")
)
REASONING = ("reasoning_content", "thinking", "reasoning")  # one thing, under the names that templates read it by
# What the expressions of a template raise when they are handed what they do not expect. It is a program of strangers:
# its mistakes are not ours.
TEMPLATE_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
PROBE_PART = "a part of a message"


def chat_text(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    /,
    *,
    reply: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> Written:
    """The messages as the tokenizer's template writes them; the text knows which of its characters the template wrote.

    Args:
        reply: the text ends where the model's answer begins (`add_generation_prompt`).
        tools: JSON schemas of functions that the model may call.
        documents: what the model may cite, each with "title" and "text".
        variables: whatever else the template reads, such as enable_thinking.

    Raises UserError when there is no template, a message is malformed, or the template refuses one.
    """
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template, so this is no chat model: give it plain prompts")
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise UserError(f"the messages are {messages!r}: give a list of {{'role': ..., 'content': ...}}")
    source = tokenizer.tool_template if tools and tokenizer.tool_template else tokenizer.chat_template
    template = compiled_template(source)
    checked = [_checked(message, number) for number, message in enumerate(messages, start=1)]
    if any(isinstance(message.get("content"), list) for message in checked) and not _reads_parts(template):
        checked = [_with_joined_parts(message) for message in checked]
    given = {
        **{f"{name}_token": by_template(text) for name, text in tokenizer.named_tokens.items()},
        **_plain(variables),
        "tools": _plain(_mappings(tools, "tools")),
        "documents": _plain(_mappings(documents, "documents")),
    }

    def write(some: Sequence[dict[str, Any]], *, reply: bool) -> Written:
        variables = {**given, "messages": some, "add_generation_prompt": reply}
        try:
            return template.render(variables)
        except TEMPLATE_ERRORS:
            if all("content" in message for message in some):
                raise
            return template.render({**variables, "messages": [{"content": "", **message} for message in some]})

    try:
        return write(checked, reply=reply)
    except TEMPLATE_ERRORS as error:
        where = _refused(write, checked, error)
        said = str(error) if isinstance(error, jinja2.TemplateError) else f"{error.__class__.__name__}: {error}"
        raise UserError(f"the tokenizer's chat template refuses {where}: {said}") from error


def render(tokenizer: Tokenizer, messages: Sequence[Message], *, reply: bool = True, **given: Any) -> list[Segment]:
    """The parts of a chat, for masks that are exact: control tokens, and what is within {% generation %}.

    The texts of the parts together are `chat_text`; the arguments and the errors are the same.
    """
    return tokenizer.segments(chat_text(tokenizer, messages, reply=reply, **given))


def chat_ids(tokenizer: Tokenizer, messages: Sequence[Message], *, reply: bool = True, **given: Any) -> list[int]:
    """The ids of messages as the template writes them: what a chat model is prompted with.

    The arguments and the errors are those of `chat_text`.
    """
    return tokenizer.encode(chat_text(tokenizer, messages, reply=reply, **given), specials="parse")


def compiled_template(source: str) -> Template:
    """The template, ready to render. Raises UserError when it is none."""
    try:
        return compiled(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the tokenizer's chat template is no template: line {error.lineno}: {error}") from error


def _checked(message: Message, number: int) -> dict[str, Any]:
    """The message as templates get it: of plain values, without null, its reasoning under every usual name."""
    if not isinstance(message, Mapping):
        raise UserError(f"message {number} is {message!r}: give {{'role': ..., 'content': ...}}")
    made = {key: value for key, value in _plain(message).items() if value is not None}
    if not isinstance(made.get("role"), str):
        raise UserError(f"message {number} has the role {message.get('role')!r}: give a text, such as 'user'")
    content = made.get("content", "")
    if not isinstance(content, str | list):
        raise UserError(f"message {number} has the content {content!r}: give a text or a list of parts")
    for part in content if isinstance(content, list) else ():
        if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise UserError(
                f"message {number} has a part {kind!r} that is no text: "
                "give {'type': 'text', 'text': ...}; images, audio and video are not read"
            )
    if made["role"] in ROLES:
        made["role"] = by_template(made["role"])
    reasoning = next((made[name] for name in REASONING if name in made), None)
    if reasoning is not None:
        made = {"thinking": reasoning, **made, "reasoning_content": reasoning}
    return made


def _plain(value: Any) -> Any:
    """A copy made of nothing but JSON's types, so that a template can reach no method of a caller's objects."""
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {str.__str__(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return str.__str__(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    raise UserError(f"a chat template is given {value!r}: give texts, numbers, lists and dicts")


def _mappings(given: Iterable[Any] | None, name: str) -> list[Any] | None:
    if given is None:
        return None
    rows = list(given) if isinstance(given, list | tuple) else [given]
    if wrong := [row for row in rows if not isinstance(row, Mapping)]:
        raise UserError(f"{name} holds {wrong[0]!r}: give a list of dicts")
    return rows


def _with_joined_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": "".join(part["text"] for part in content)} if isinstance(content, list) else message


def _reads_parts(template: Template) -> bool:
    """Whether the template writes the texts of a content that is a list, and not the list."""
    message = {"role": by_template("user"), "content": [{"type": "text", "text": PROBE_PART}]}
    try:
        text = template.render({"messages": [message], "add_generation_prompt": False, "tools": None})
    except TEMPLATE_ERRORS:
        return False
    return PROBE_PART in text and "'type'" not in text and '"type"' not in text


def _refused(write: Any, messages: Sequence[dict[str, Any]], error: Exception) -> str:
    """Which message the template refuses: the last of the shortest beginning of the chat that fails in the same way."""
    for number in range(1, len(messages)):
        try:
            write(messages[:number], reply=False)
        except TEMPLATE_ERRORS as other:
            if str(other) == str(error):
                return f"these messages at message {number} of {len(messages)}"
    return f"these messages at message {len(messages)} of {len(messages)}" if messages else "these messages"
