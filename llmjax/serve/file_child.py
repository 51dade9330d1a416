"""The program that `reading.py` starts: it reads one file, prints its text as JSON and ends, within the limits of its process.

python -c "... file_child.main()" KIND SECONDS MEMORY < FILE
"""

import json
import os
import resource
import sys


def main() -> None:
    """See the module."""
    kind, seconds, memory = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # no file can be written
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    if sys.platform == "linux":  # macOS refuses to limit it
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    replies = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries print warnings about files

    from llmjax.prepare.formats import RejectedError, extraction

    try:
        data = sys.stdin.buffer.read()
        text, _ = extraction.read(data, kind, "", extraction.Options(encodings=("utf-8", "detect")))
        reply = {"text": text}
    except RejectedError as rejected:
        reply = {"reason": str(rejected)}
    except MemoryError:
        reply = {"reason": f"too large: it needs more than {memory:,} bytes of memory"}
    left = memoryview(json.dumps(reply).encode())
    while left:  # a pipe takes a part at a time
        left = left[os.write(replies, left) :]
