"""Chat templates in the manner of the families that are imported, tiny tokenizers with their marks, and conversations."""

import json
from pathlib import Path
from typing import Any

from llmjax.data.hf_tokenizer import byte_alphabet
from llmjax.data.tokenizer import SPACE_SIGN, Tokenizer
from llmjax.data.tokenizer_files import load_tokenizer

TOOLS_AS_JSON = "{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}"
# Name: the template, its marks that are flagged special, and those that are not.
TEMPLATES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "chatml": (
        "{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n<tools>' }}" + TOOLS_AS_JSON + "{{- '\\n</tools><|im_end|>\\n' }}{%- endif %}"
        "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
        "{%- if message.content %}{{- message.content }}{%- endif %}"
        "{%- for call in message.tool_calls or [] %}{{- '\\n<tool_call>\\n{\"name\": \"' ~ call.function.name ~ '\", \"arguments\": ' "
        "~ (call.function.arguments | tojson) ~ '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}",
        ("<|im_start|>", "<|im_end|>"), ("<tool_call>", "</tool_call>"),
    ),
    "thoughts": (
        "{%- for m in messages %}{%- set content = m.content %}{%- set thought = m.reasoning_content or '' %}"
        "{%- if '</think>' in content %}{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
        "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
        "{{- '<|im_start|>' + m.role + '\\n' }}{%- if m.role == 'assistant' and loop.last %}"
        "{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif %}{{- content + '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}",
        ("<|im_start|>", "<|im_end|>"), ("<think>", "</think>"),
    ),
    "headers": (
        "{%- macro head(role) %}<|start_header_id|>{{ role }}<|end_header_id|>\n\n{% endmacro %}"
        "{%- if tools is not none %}{{ head('system') }}{{ tools | tojson(indent=4) }}<|eot_id|>{% endif %}"
        "{%- for m in messages %}{% set content = head(m['role']) ~ (m['content'] | trim) ~ '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ head('assistant') }}{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), (),
    ),
    "instructions": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
        "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}"
        "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}"
        "{% else %}{% set content = m['content'] %}{% endif %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        (), ("[INST]", "[/INST]"),
    ),
    "turns": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
        ("<start_of_turn>",), ("<end_of_turn>",),
    ),
    "roles": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        ("<|end|>",), ("<|system|>", "<|user|>", "<|assistant|>"),
    ),
    "bars": (
        "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}"
        "{% endif %}{% endfor %}{{ ns.system }}{% for m in messages %}{% if m.role == 'user' %}{{ '<\uff5cUser\uff5c>' + m.content }}"
        "{% elif m.role == 'assistant' %}{{ '<\uff5cAssistant\uff5c>' + m.content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<\uff5cAssistant\uff5c>{% endif %}",
        (), ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"),
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% if loop.index > 6 %}{% break %}{% endif %}{% endfor %}",
        ("<|im_start|>", "<|im_end|>"), (),
    ),
    "documents": (
        "{% for d in documents or [] %}<doc>{{ d.title | upper }}: {{ d['text'] }}</doc>\n{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m | tojson(sort_keys=true, separators=(',', ':')) }}<|im_end|>{% endfor %}",
        ("<|im_start|>", "<|im_end|>"), ("<doc>",),
    ),
}  # fmt: skip
KINDS = ("bytes", "first", "always", "prepend")  # byte-level BPE, and the ways to write a space in front
TOOLS = [
    {"type": "function", "function": {"name": "look", "description": "looks <up> & 'down' \u00e9", "parameters": {}}}
]
DOCUMENTS = [{"title": "one", "text": "a & b"}]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"where": "\u00e9 <there>"}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "question": [{"role": "user", "content": " hello  there\n\nyou <b> & \u00fc "}],
    "answers": [
        {"role": "system", "content": " be kind "},
        {"role": "user", "content": "hello\n"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "no ", "reasoning_content": "why"},
    ],
    "calls": [
        {"role": "user", "content": "where?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "look", "content": "there"},
    ],
}


def write_chat_tokenizer(folder: Path, name: str, kind: str) -> None:
    """A tokenizer of one of KINDS with the template and the marks of one of TEMPLATES."""
    template, special, plain = TEMPLATES[name]
    text_tokens = ("\n\n", "   ")  # added, but no marks
    if kind == "bytes":
        vocab = {character: i for i, character in enumerate(byte_alphabet())}
        model = {"type": "BPE", "vocab": vocab, "merges": []}
        parts = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        rest = {"pre_tokenizer": {"type": "ByteLevel", **parts}, "decoder": {"type": "ByteLevel", **parts}}
    else:
        pieces = [
            "<unk>",
            *(f"<0x{byte:02X}>" for byte in range(256)),
            SPACE_SIGN,
            *map(chr, range(33, 127)),
            "he",
            SPACE_SIGN + "he",
            "</",
            "s>",
            "</s>",
        ]
        merges = [["h", "e"], [SPACE_SIGN, "he"], ["<", "/"], ["s", ">"], ["</", "s>"]]
        model = {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges}
        model |= {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
        sign = {"type": "Replace", "pattern": {"String": SPACE_SIGN}, "content": " "}
        ends = [{"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
        rest = {"decoder": {"type": "Sequence", "decoders": [sign, *ends]}}
        if kind == "prepend":
            space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_SIGN}
            rest["normalizer"] = {
                "type": "Sequence",
                "normalizers": [{"type": "Prepend", "prepend": SPACE_SIGN}, space],
            }
        else:
            rest["pre_tokenizer"] = {
                "type": "Metaspace",
                "replacement": SPACE_SIGN,
                "prepend_scheme": kind,
                "split": False,
            }
    known = dict(model["vocab"])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = []
    for i, content in enumerate(("<s>", "</s>", *special, *plain, *text_tokens)):
        known.setdefault(content, len(known))
        strips = {"lstrip": i % 4 == 3, "rstrip": i % 3 == 2} if content not in text_tokens else {}
        added.append(
            {
                "id": known[content],
                "content": content,
                **flags,
                **strips,
                "special": content in ("<s>", "</s>", *special),
            }
        )
    added.sort(key=lambda token: token["id"])
    (folder / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "model": model, "added_tokens": added, **rest})
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def chat_tokenizer(folder: Path, name: str, kind: str) -> Tokenizer:
    """The same, loaded."""
    write_chat_tokenizer(folder, name, kind)
    return load_tokenizer(folder)
