"""The airline over HTTP with faults: broken endpoints are told from those that work, and a write whose answer is lost is done once."""

import airline_http
import pytest
from test_agents import BOOKING, world

from llmjax.agents import openapi, probes, tools
from llmjax.agents.tools import Tool


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setattr(openapi, "PAUSE", 0.0)
    monkeypatch.setattr(airline_http, "EXAMPLES", {**airline_http.EXAMPLES, "user_id": "u"})
    _, data = world()
    with airline_http.serving(data, seed=3) as (server, found):
        yield server, found


def of(server, found: list[Tool], name: str, fault: str) -> Tool:
    return next(one for one in found if server.endpoints[one.name] == (name, fault))


def test_probes_tell_broken_endpoints_and_the_filter_takes_them_away(served):
    server, found = served
    reads = [one for one in found if server.endpoints[one.name][0] in ("get_user_details", "list_all_airports")]
    made = probes.probe([*reads, *(one for one in found if one.effect != "read")], tries=2)
    verdicts = {server.endpoints[one.tool][1]: one.verdict for one in made}
    assert verdicts[""] == "works" and verdicts["lost"] == "not probed" and server.done == 0
    known = {"gone": "broken", "hangs": "broken", "schema": "broken", "stale": "works", "flaky": "works"}
    seen = verdicts.keys() - {"", "lost"}
    assert len(seen) > 2 and {fault: verdicts[fault] for fault in seen} == {fault: known[fault] for fault in seen}
    left = {server.endpoints[one.name][1] for one in probes.without_broken(reads, made)}
    assert "" in left and not left & {"gone", "hangs", "schema"}


def test_a_write_whose_answer_is_lost_is_done_once(served):
    server, found = served
    made = of(server, found, "book_reservation", "lost").run(body=BOOKING)
    assert made["reservation_id"] == "HATHAT" and server.done == 1 and server.requests == 2
    assert server.world.get_user_details("u")["reservations"] == ["HATHAT"]


def test_probes_of_a_tool_that_fails_at_times_say_flaky():
    luck = iter([True, False, True])

    def coin() -> str:
        """A coin."""
        if next(luck):
            raise OSError("tails")
        return "heads"

    one = Tool("coin", "", tools.from_function(coin).schema, coin, "read", example={})
    (found,) = probes.probe([one])
    assert (found.verdict, found.failed, found.error) == ("flaky", 2, "OSError: tails")
    assert probes.without_broken([one], [found]) == [one]
