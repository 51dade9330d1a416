"""Which tools work: those that read are called with their examples before an agent gets them (ToolLLM, Qin et al. 2023).

A tool that fails every time is broken, one that fails at times is flaky. Tools that write, and those without an example, are not
called. A probe sees errors, time-outs and answers that are not of the tool's schema. It cannot see that an answer is out of date.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llmjax.agents.react import Call, run_tool
from llmjax.agents.tools import Tool

TRIES, SECONDS = 3, 30.0  # of a tool; of a call


@dataclass(frozen=True)
class Probe:
    """What the calls of a tool gave."""

    tool: str
    calls: int = 0
    failed: int = 0
    error: str = ""  # of the last call that failed

    @property
    def verdict(self) -> str:
        """works, flaky, broken or not probed."""
        return (
            "not probed"
            if not self.calls
            else "works"
            if not self.failed
            else "broken"
            if self.failed == self.calls
            else "flaky"
        )


def probe(tools: Sequence[Tool], *, tries: int = TRIES, seconds: float = SECONDS) -> list[Probe]:
    """Call each tool that reads and has an example."""
    found = []
    for tool in tools:
        if tool.effect != "read" or tool.example is None:
            found.append(Probe(tool.name))
            continue
        made = [run_tool(tool, Call(tool.name, tool.example), seconds) for _ in range(tries)]
        errors = [text for text, failed in made if failed]
        found.append(Probe(tool.name, tries, len(errors), errors[-1] if errors else ""))
    return found


def without_broken(tools: Sequence[Tool], probes: Sequence[Probe]) -> list[Tool]:
    """The tools that are not broken."""
    broken = {one.tool for one in probes if one.verdict == "broken"}
    return [tool for tool in tools if tool.name not in broken]
