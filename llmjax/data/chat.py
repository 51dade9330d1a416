"""Chat templates: from messages to the ids that a chat model reads."""

import datetime
from collections.abc import Mapping, Sequence
from typing import NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmjax.data.tokenizer import Tokenizer, parse_specials
from llmjax.errors import UserError

Message = Mapping[str, str]  # "role" and "content"
HIDDEN = "\U000ffffd{}\U000ffffd"  # stands for special tokens that a message mentions; of a plane that no text uses


def chat_text(tokenizer: Tokenizer, messages: Sequence[Message], *, reply: bool = True) -> str:
    """The messages as the tokenizer's template writes them; with `reply` up to where the model's answer begins.

    Raises UserError when there is no template, or it refuses the messages.
    """
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template, so this is no chat model: give it plain prompts")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": datetime.datetime.now().strftime}
    try:
        template = environment.from_string(tokenizer.chat_template)
        return template.render(messages=list(messages), add_generation_prompt=reply, **_named(tokenizer))
    except jinja2.TemplateError as error:
        raise UserError(f"the tokenizer's chat template refuses these messages: {error}") from error


def chat_ids(tokenizer: Tokenizer, messages: Sequence[Message], *, reply: bool = True) -> list[int]:
    """The ids of messages as the template writes them: what a chat model is prompted with.

    Special tokens come from the template only: those that a message mentions stay text, so that nobody can end their
    own turn and speak as another. Raises UserError as `chat_text` does.
    """
    specials = sorted(tokenizer.special_ids, key=len, reverse=True)
    hidden = {text: HIDDEN.format(i) for i, text in enumerate(specials)}

    def hide(message: Message) -> dict[str, str]:
        content = message["content"]
        for text, sign in hidden.items():
            content = content.replace(text, sign)
        return {**message, "content": content}

    text = chat_text(tokenizer, [hide(message) for message in messages], reply=reply)
    if not any(sign in text for sign in hidden.values()):
        return tokenizer.encode(text, specials="parse")

    def encode(part: str) -> list[int]:
        for special, sign in hidden.items():
            part = part.replace(sign, special)
        return tokenizer.encode(part)

    return parse_specials(text, tokenizer.special_ids, encode)


def _named(tokenizer: Tokenizer) -> dict[str, str]:
    """bos_token, eos_token, ... as texts."""
    texts = {i: text for text, i in tokenizer.special_ids.items()}
    ids = {name: getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")}
    return {f"{name}_token": texts[i] for name, i in ids.items() if i in texts}


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
