"""The program that `processes.py` starts: it loads a file of tools, and runs the calls that come on its standard input.

python -c "... tool_child.main()" FILE

Messages are lines of JSON. The first that it writes has the tools, or why there are none. Each call runs in a thread. The
program ends with its standard input, whatever its threads do.
"""

import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any

from llmjax.agents import tools
from llmjax.errors import UserError


def main() -> None:
    """See the module."""
    asked, told = os.fdopen(os.dup(0), "rb"), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the pipes are not for tools: they read nothing,
    os.dup2(2, 1)  # and what they print stands among the errors, line by line
    sys.stdout = sys.stderr
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    telling = threading.Lock()

    def read() -> None:
        for line in asked:
            lines.put(line)
        os._exit(0)

    def tell(message: dict[str, Any]) -> None:
        left = memoryview(json.dumps(message).encode() + b"\n")
        with telling:
            while left:  # a pipe takes a part at a time
                left = left[os.write(told, left) :]

    threading.Thread(target=read, daemon=True).start()
    try:
        found = {one.name: one for one in tools.load(Path(sys.argv[1]))}
    except UserError as error:
        tell({"error": str(error)})
        return
    tell({"tools": [{name: getattr(one, name) for name in tools.DESCRIBED} for one in found.values()]})

    def run(call: dict[str, Any]) -> None:
        text, failed = tools.outcome(found[call["tool"]], call["arguments"])
        tell({"number": call["number"], "text": text, "failed": failed})

    while True:
        threading.Thread(target=run, args=(json.loads(lines.get()),), daemon=True).start()
