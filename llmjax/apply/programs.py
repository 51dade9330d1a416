"""Code from a docstring: the model completes a function, and a sandbox runs its tests; a failure goes back to the model.

The tests are those of the row (`tests`: statements such as assertions), else the examples of the docstring (`>>> f(1)`). The program is of
a model, so it runs in the sandbox of `eval.sandbox` alone.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmjax.data.chat import Message
from llmjax.errors import UserError
from llmjax.eval import sandbox
from llmjax.infer.asking import Ask, Conversation

NEW_TOKENS, TRIES = 512, 3
TEMPERATURE = 0.7  # of every try but the first
OUTPUT = 600  # characters of an error that the model sees
SYSTEM = "You complete Python functions. Write the whole function in one block of ```python and nothing else."
EXAMPLES = """
import doctest as _doctest
_test = _doctest.DocTestParser().get_doctest({prompt!r}, dict(globals()), "examples", None, 0)
_found = _doctest.DocTestRunner(verbose=False).run(_test)
assert not _found.failed
"""


def programmed(
    row: Mapping[str, Any], *, field: str, tries: int = TRIES, limits: sandbox.Limits | None = None
) -> Conversation[dict[str, Any]]:
    """The code of a row, whether it passed its tests, and after how many tries. Raises UserError for a row without tests."""
    prompt: str = row[field]
    tests = tests_of(row, prompt)
    messages: list[Message] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
    code, outcome = "", sandbox.Outcome("failed", "", 0.0)
    for number in range(1, tries + 1):
        temperature = TEMPERATURE if number > 1 else 0.0
        written = yield Ask("code", (messages,), max_new_tokens=NEW_TOKENS, temperature=temperature, seed=number)
        code = code_of(written, prompt)
        outcome = sandbox.run(f"{code}\n\n{tests}\n", limits=limits)
        if outcome.passed:
            break
        shown = outcome.output.strip()[-OUTPUT:] or outcome.status
        told = f"The tests fail. What stands between the marks is their output.\n<data>\n{shown.replace('</data', '&lt;/data')}\n</data>\nWrite the function again."  # fmt: skip
        messages = [*messages[:2], {"role": "assistant", "content": written}, {"role": "user", "content": told}]
    error = {} if outcome.passed else {"output": outcome.output.strip()[-OUTPUT:], "status": outcome.status}
    return {"code": code, "passed": outcome.passed, "tries": number, **error}


def tests_of(row: Mapping[str, Any], prompt: str) -> str:
    """The program that tests a row's code."""
    tests = row.get("tests")
    if isinstance(tests, str) and tests.strip():
        return tests
    if isinstance(tests, Sequence) and not isinstance(tests, str) and tests:
        return "\n".join(map(str, tests))
    if ">>>" in prompt:
        return EXAMPLES.format(prompt=re.sub(r'"{3}|\'{3}', "", prompt))  # an example would go on to the closing quotes
    raise UserError("the row has neither tests nor examples (>>> ...) in its docstring")


def code_of(written: str, prompt: str) -> str:
    """The code in an answer: its first block, else all of it; where that does not define the function, it goes on from the prompt."""
    block = re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", written, re.DOTALL)
    code = block[1] if block else written
    name = re.search(r"^\s*(?:async\s+)?def\s+(\w+)", prompt, re.MULTILINE)
    if name and not re.search(rf"^\s*(?:async\s+)?def\s+{name[1]}\b", code, re.MULTILINE):
        return f"{prompt.rstrip()}\n{code}"
    before = prompt[: name.start()].strip() if name else ""  # imports that the prompt has above the function
    return f"{before}\n\n{code}" if before and before not in code else code
