"""Clients of others against the server, unchanged: which of their features work.

    python -m venv .venv-clients
    .venv-clients/bin/pip install langchain-openai llama-index-llms-openai-like litellm
    python benchmarks/clients.py --workdir runs/smollm2 --python .venv-clients/bin/python --out results/clients.json

Needs a run with a chat template. Each feature runs in a process of the other environment, because these packages pin
versions of each other. A package that is not installed is reported as such. OpenAI's own client is in
`tests/test_serve_http.py`.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import make_parser, write
from serving import Process

LANGCHAIN = """
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
chat = ChatOpenAI(base_url=BASE, api_key="none", model=MODEL, max_completion_tokens=TOKENS)
"""
LLAMAINDEX = """
from llama_index.llms.openai_like import OpenAILike
from llama_index.core.llms import ChatMessage
model = OpenAILike(model=MODEL, api_base=BASE, api_key="none", is_chat_model=True, max_tokens=TOKENS, context_window=1024)
"""
LITELLM = """
import litellm
ask = dict(model="openai/" + MODEL, api_base=BASE, api_key="none", messages=[{"role": "user", "content": "hi"}], max_tokens=TOKENS)
tool = {"type": "function", "function": {"name": "see", "parameters": {"type": "object", "properties": {}}}}
"""
# Feature: the package it needs, and code that fails unless the feature works.
FEATURES: dict[str, tuple[str, str]] = {
    "LangChain: chat": ("langchain_openai", LANGCHAIN + "assert isinstance(chat.invoke('hi').content, str)"),
    "LangChain: stream with usage": (
        "langchain_openai",
        LANGCHAIN + "parts = list(chat.stream('hi', stream_usage=True))\nassert sum((p.usage_metadata or {}).get('output_tokens', 0) for p in parts) > 0",
    ),
    "LangChain: tools": (
        "langchain_openai",
        LANGCHAIN + "from langchain_core.tools import tool\n@tool\ndef see() -> str:\n    'look'\n"
        "call, = chat.bind_tools([see], tool_choice='see').invoke('hi').tool_calls\nassert call['name'] == 'see' and call['args'] == {}",
    ),
    "LangChain: structured output": (
        "langchain_openai",
        LANGCHAIN + "from pydantic import BaseModel\nclass A(BaseModel):\n    yes: bool\nassert isinstance(chat.with_structured_output(A).invoke('hi'), A)",
    ),
    "LangChain: embeddings": (
        "langchain_openai",
        LANGCHAIN + "e = OpenAIEmbeddings(base_url=BASE, api_key='none', model=MODEL, check_embedding_ctx_length=False)\nassert len(e.embed_documents(['a', 'b'])) == 2",
    ),
    "LlamaIndex: chat": ("llama_index", LLAMAINDEX + "assert model.chat([ChatMessage(role='user', content='hi')]).message"),
    "LlamaIndex: stream": (
        "llama_index",
        LLAMAINDEX + "parts = list(model.stream_chat([ChatMessage(role='user', content='hi')]))\nassert ''.join(p.delta or '' for p in parts) == parts[-1].message.content",
    ),
    "litellm: chat": ("litellm", LITELLM + "assert litellm.completion(**ask).choices[0].finish_reason in ('stop', 'length')"),
    "litellm: stream": (
        "litellm",
        LITELLM + "parts = list(litellm.completion(**ask, stream=True))\nassert any(p.choices[0].finish_reason for p in parts if p.choices)",
    ),
    "litellm: tools as a stream": (
        "litellm",
        LITELLM + "parts = list(litellm.completion(**{**ask, 'max_tokens': 60}, tools=[tool], tool_choice='required', parallel_tool_calls=False, stream=True))\n"
        "whole = litellm.stream_chunk_builder(parts)\nassert whole.choices[0].message.tool_calls[0].function.arguments == '{}'",
    ),
}  # fmt: skip


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="the run to serve, with a chat template")
    parser.add_argument("--python", default=sys.executable, help="the Python that has the clients")
    args = parser.parse_args()
    served = Process(args.workdir, 2, 1024, [])
    head = f"BASE, MODEL, TOKENS = 'http://127.0.0.1:{served.port}/v1', {args.workdir.resolve().name!r}, 24\n"
    results: dict[str, Any] = {}
    try:
        for name, (package, code) in FEATURES.items():
            found = subprocess.run([args.python, "-c", f"import {package}"], capture_output=True)
            if found.returncode:
                results[name] = f"{package} is not installed"
                continue
            done = subprocess.run([args.python, "-c", head + code], capture_output=True, text=True, timeout=300)
            results[name] = "works" if done.returncode == 0 else done.stderr.strip().rpartition("\n")[2]
            print(f"{name:<32} {results[name]}", flush=True)
    finally:
        served.end()
    print(json.dumps(results, indent=1))
    write({"features": results}, args.out)


if __name__ == "__main__":
    main()
