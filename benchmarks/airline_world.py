"""An airline's world: 300 flights, 2,000 reservations, 500 users, and the 15 tools of an agent, each a function below.

It is the world of tau-bench (Yao et al. 2024) written anew. `airline.py` judges agents in it, `airline_http.py` serves it with faults.
"""

import ast
import copy
import gzip
import hashlib
import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from llmjax.agents import tool, tools

NOW = "2024-05-15T15:00:00"
NEW_RESERVATIONS = ("HATHAT", "HATHAU", "HATHAV")
NEW_CERTIFICATES = ("certificate_3221322", "certificate_3221323", "certificate_3221324")
Cabin = Literal["basic_economy", "economy", "business"]
YesNo = Literal["yes", "no"]
OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.USub: operator.neg,
}  # fmt: skip


class Segment(TypedDict):
    """A flight on a date."""

    flight_number: str
    date: str


class Passenger(TypedDict):
    """A traveller."""

    first_name: str
    last_name: str
    dob: str


class Payment(TypedDict):
    """A part of a price, from one of the user's means of payment."""

    payment_id: str
    amount: int


class RefusedError(Exception):
    """What the airline does not do."""


class World:
    """The airline's data and its tools."""

    def __init__(self, data: Mapping[str, dict[str, Any]]) -> None:
        # Flights are only read: they are shared. The others are copied when they are first changed.
        self._flights, self._users, self._reservations = (
            data["flights"],
            dict(data["users"]),
            dict(data["reservations"]),
        )
        self._own: set[str] = set()

    def state(self) -> str:
        """A hash of all that tools can change."""
        return hashlib.sha256(json.dumps([self._users, self._reservations], sort_keys=True).encode()).hexdigest()

    def tools(self) -> list[tools.Tool]:
        """The tools."""
        return [
            tools.from_function(getattr(self, name)) for name, one in vars(World).items() if hasattr(one, "__tool__")
        ]

    # ------------------------------------------------------------------ reading

    @tool(effect="read", trusted=True)
    def get_user_details(self, user_id: str) -> dict[str, Any]:
        """The profile of a user: name, payment methods, membership, reservations."""
        return _known(self._users, user_id, "user")

    @tool(effect="read", trusted=True)
    def get_reservation_details(self, reservation_id: str) -> dict[str, Any]:
        """A reservation: flights, cabin, passengers, payments, bags, insurance."""
        return _known(self._reservations, reservation_id, "reservation")

    @tool(effect="read", trusted=True)
    def list_all_airports(self) -> list[str]:
        """The codes of all airports."""
        return sorted({flight[end] for flight in self._flights.values() for end in ("origin", "destination")})

    @tool(effect="read", trusted=True)
    def search_direct_flight(self, origin: str, destination: str, date: str) -> list[dict[str, Any]]:
        """Flights between two airports on a date, such as 2024-05-20, with seats and prices."""
        return list(self._available(origin, destination, date))

    @tool(effect="read", trusted=True)
    def search_onestop_flight(self, origin: str, destination: str, date: str) -> list[list[dict[str, Any]]]:
        """Pairs of flights with one stop, the second after the first has arrived."""
        found = []
        for first in self._available(origin, None, date):
            for second in self._available(first["destination"], destination, date):
                if second["scheduled_departure_time_est"] > first["scheduled_arrival_time_est"]:
                    found.append([first, second])
        return found

    def _available(self, origin: str, destination: str | None, date: str) -> Iterator[dict[str, Any]]:
        for flight in self._flights.values():
            if flight["origin"] == origin and destination in (None, flight["destination"]):
                day = flight["dates"].get(date, {})
                if day.get("status") == "available":
                    yield {k: v for k, v in flight.items() if k != "dates"} | {
                        k: v for k, v in day.items() if k != "status"
                    }

    @tool(effect="read", trusted=True)
    def get_flight_status(self, flight_number: str, date: str) -> str:
        """Whether a flight of a date is available, delayed, on time, flying, landed or cancelled."""
        days = _known(self._flights, flight_number, "flight")["dates"]
        return str(_known(days, date, f"{flight_number} on")["status"])

    @tool(effect="read", trusted=True)
    def calculate(self, expression: str) -> str:
        """The value of a sum such as 2 * (3 + 4.5), rounded to two digits."""
        try:
            value = _value(ast.parse(expression, mode="eval").body)
        except (SyntaxError, ZeroDivisionError, RecursionError) as error:
            raise RefusedError(f"{expression!r} cannot be computed: {error}") from error
        return str(round(value, 2))

    @tool(effect="read", trusted=True)
    def think(self, thought: str) -> str:
        """A note to yourself."""
        return ""

    # ------------------------------------------------------------------ writing

    @tool(effect="write")
    def book_reservation(
        self, user_id: str, origin: str, destination: str, flight_type: Literal["round_trip", "one_way"], cabin: Cabin,
        flights: list[Segment], passengers: list[Passenger], payment_methods: list[Payment], total_baggages: int,
        nonfree_baggages: int, insurance: YesNo,
    ) -> dict[str, Any]:  # fmt: skip
        """Book flights for passengers; the payments must be the whole price."""
        user = self._changed(self._users, user_id, "user")
        taken = [self._seat(one, cabin, len(passengers)) for one in flights]
        price = sum(one["price"] for one in taken) * len(passengers) + 50 * nonfree_baggages
        price += 30 * len(passengers) if insurance == "yes" else 0
        for payment in payment_methods:
            method = _known(user["payment_methods"], payment["payment_id"], "payment method")
            if method["source"] in ("gift_card", "certificate") and method["amount"] < payment["amount"]:
                raise RefusedError(f"there is not enough on {payment['payment_id']}")
        if sum(payment["amount"] for payment in payment_methods) != price:
            raise RefusedError(f"the payments must be {price} together")
        for payment in payment_methods:
            method = user["payment_methods"][payment["payment_id"]]
            if method["source"] == "gift_card":
                method["amount"] -= payment["amount"]
            elif method["source"] == "certificate":
                del user["payment_methods"][payment["payment_id"]]
        number = _new(NEW_RESERVATIONS, self._reservations, "reservations")
        self._reservations[number] = {
            "reservation_id": number, "user_id": user_id, "origin": origin, "destination": destination, "flight_type": flight_type,
            "cabin": cabin, "flights": taken, "passengers": copy.deepcopy(passengers), "payment_history": copy.deepcopy(payment_methods),
            "created_at": NOW, "total_baggages": total_baggages, "nonfree_baggages": nonfree_baggages, "insurance": insurance,
        }  # fmt: skip
        self._own.add(number)
        user["reservations"].append(number)
        return self._reservations[number]

    @tool(effect="write")
    def cancel_reservation(self, reservation_id: str) -> dict[str, Any]:
        """Cancel a whole reservation; every payment is paid back."""
        reservation = self._changed(self._reservations, reservation_id, "reservation")
        history = reservation["payment_history"]
        history += [{"payment_id": one["payment_id"], "amount": -one["amount"]} for one in list(history)]
        reservation["status"] = "cancelled"
        return reservation

    @tool(effect="write")
    def update_reservation_baggages(
        self, reservation_id: str, total_baggages: int, nonfree_baggages: int, payment_id: str
    ) -> dict[str, Any]:
        """Change the number of bags; those that are not free cost 50 each."""
        reservation = self._changed(self._reservations, reservation_id, "reservation")
        more = max(0, nonfree_baggages - reservation["nonfree_baggages"])
        self._pay(reservation, payment_id, 50 * more)
        reservation |= {"total_baggages": total_baggages, "nonfree_baggages": nonfree_baggages}
        return reservation

    @tool(effect="write")
    def update_reservation_flights(
        self, reservation_id: str, cabin: Cabin, flights: list[Segment], payment_id: str
    ) -> dict[str, Any]:
        """Change the flights or the cabin; give all flights of the reservation, also those that stay."""
        reservation = self._changed(self._reservations, reservation_id, "reservation")
        count, taken = len(reservation["passengers"]), []
        for one in flights:
            same = [
                old for old in reservation["flights"]
                if cabin == reservation["cabin"] and (old["flight_number"], old["date"]) == (one["flight_number"], one["date"])
            ]  # fmt: skip
            taken.append(same[0] if same else self._seat(one, cabin, count))
        self._pay(
            reservation,
            payment_id,
            count * (sum(f["price"] for f in taken) - sum(f["price"] for f in reservation["flights"])),
        )
        reservation |= {"flights": taken, "cabin": cabin}
        return reservation

    @tool(effect="write")
    def update_reservation_passengers(self, reservation_id: str, passengers: list[Passenger]) -> dict[str, Any]:
        """Change the passengers; their number stays."""
        reservation = self._changed(self._reservations, reservation_id, "reservation")
        if len(passengers) != len(reservation["passengers"]):
            raise RefusedError("the number of passengers cannot change")
        reservation["passengers"] = copy.deepcopy(passengers)
        return reservation

    @tool(effect="write")
    def send_certificate(self, user_id: str, amount: int) -> str:
        """Give a user a travel certificate of so many dollars."""
        user = self._changed(self._users, user_id, "user")
        number = _new(NEW_CERTIFICATES, user["payment_methods"], "certificates")
        user["payment_methods"][number] = {"source": "certificate", "amount": amount, "id": number}
        return f"{number} of {amount} was added"

    @tool(effect="read", trusted=True)
    def transfer_to_human_agents(self, summary: str) -> str:
        """Hand the user over to a person, with a summary."""
        return "handed over"

    # ------------------------------------------------------------------ rules

    def _changed(self, table: dict[str, Any], key: str, what: str) -> dict[str, Any]:
        """An entry that may be changed: the world's own copy."""
        _known(table, key, what)
        if key not in self._own:
            table[key] = copy.deepcopy(table[key])
            self._own.add(key)
        found: dict[str, Any] = table[key]
        return found

    def _seat(self, segment: Segment, cabin: str, count: int) -> dict[str, Any]:
        flight = _known(self._flights, segment["flight_number"], "flight")
        day = flight["dates"].get(segment["date"])
        if day is None or day["status"] != "available":
            raise RefusedError(f"{segment['flight_number']} is not available on {segment['date']}")
        if day["available_seats"][cabin] < count:
            raise RefusedError(f"{segment['flight_number']} has not enough seats in {cabin}")
        return {
            "origin": flight["origin"], "destination": flight["destination"], "flight_number": segment["flight_number"],
            "date": segment["date"], "price": day["prices"][cabin],
        }  # fmt: skip

    def _pay(self, reservation: dict[str, Any], payment_id: str, amount: int) -> None:
        user = self._changed(self._users, reservation["user_id"], "user")
        method = _known(user["payment_methods"], payment_id, "payment method")
        if method["source"] == "certificate":
            raise RefusedError("a certificate cannot pay for a change")
        if method["source"] == "gift_card":
            if method["amount"] < amount:
                raise RefusedError(f"there is not enough on {payment_id}")
            method["amount"] -= amount
        if amount:
            reservation["payment_history"].append({"payment_id": payment_id, "amount": amount})


def _known(table: Mapping[str, Any], key: str, what: str) -> Any:
    if key not in table:
        raise RefusedError(f"there is no {what} {key}")
    return table[key]


def _new(names: Sequence[str], taken: Mapping[str, Any], what: str) -> str:
    """The first name that is free. Names are known beforehand, so that a final state can be compared."""
    for name in names:
        if name not in taken:
            return name
    raise RefusedError(f"there are no more than {len(names)} new {what}")


def _value(node: ast.AST) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.operand))
    raise SyntaxError("only numbers, + - * / and brackets")


def read_data(folder: Path) -> dict[str, dict[str, Any]]:
    """The world's tables."""
    names = ("flights", "reservations", "users")
    return {name: json.loads(gzip.decompress((folder / f"{name}.json.gz").read_bytes())) for name in names}
