"""The rights statement of a persona: whose texts they are, which ones, and why they may be used.

A person fills in this JSON file. llmjax reads nothing else before the statement is valid.
"""

import datetime
import re
from dataclasses import dataclass
from pathlib import Path

from llmjax import storage
from llmjax.errors import UserError

BASES = ("own texts", "public domain", "consent")
FIELDS = {  # field -> what it says
    "who": "whose texts these are",
    "texts": "which texts",
    "basis": f"one of {', '.join(BASES)}",
    "evidence": "why that holds: the year of death, the licence, or where the signed consent is kept",
    "stated_by": "who says so",
}
UNTIL = "until"  # the last day of a consent, as 2030-12-31
LETTERS = 2  # the fewest of an answer
PLACEHOLDER = re.compile(
    r"[<\[{(].*[>\]})]|(to ?do|tbd|tba|fix ?me|x{2,}|n/?a|none|null|nobody|unknown|placeholder|example|test|same|"
    r"(your |the |a )?(full )?name|someone|somebody|fill .*|change ?me|lorem .*|text|texts|string|author|as above)[.!]*",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class Rights:
    """A valid statement."""

    who: str
    texts: str
    basis: str
    evidence: str
    stated_by: str
    until: str = ""

    def check_term(self, mend: str) -> None:
        """Raise UserError, with `mend` as the advice, when the consent has ended."""
        if self.until and datetime.date.fromisoformat(self.until) < datetime.date.today():
            raise UserError(f"the consent of {self.who} ended on {self.until}: {mend}")


def read(path: Path) -> Rights:
    """The statement in a file. Raises UserError, which says what to write, if it is not filled in."""
    if not path.is_file():
        raise UserError(f"there is no rights statement {path}: {_form()}")
    given = storage.read_json(path, mend=_form())
    if not isinstance(given, dict):
        raise UserError(f"{path} is no object: {_form()}")
    if unknown := sorted(str(name) for name in given if name not in (*FIELDS, UNTIL)):
        raise UserError(f"{path}: there is no field {unknown[0]!r}: {_form()}")
    return checked(given, str(path))


def checked(given: dict[str, object], where: str) -> Rights:
    """The statement of these fields. Raises UserError for a field that is missing, empty, a placeholder or out of
    date."""
    for name, meaning in FIELDS.items():
        value = given.get(name)
        if not isinstance(value, str) or sum(c.isalpha() for c in value) < LETTERS or is_placeholder(value, meaning):
            raise UserError(f"{where}: {name} is not filled in: write {meaning}")
    found = {name: str(given[name]).strip() for name in FIELDS}
    found["basis"] = found["basis"].lower()
    if found["basis"] not in BASES:
        raise UserError(f"{where}: basis must be {FIELDS['basis']}, not {found['basis'][:80]!r}")
    until = given.get(UNTIL, "")
    if until or found["basis"] == "consent":
        try:
            found[UNTIL] = datetime.date.fromisoformat(str(until)).isoformat()
        except ValueError as error:
            raise UserError(f"{where}: until must be the last day of the consent, such as 2030-12-31") from error
    made = Rights(**found)
    made.check_term("ask for a new one, and write its last day in until")
    return made


def is_placeholder(value: str, meaning: str = "") -> bool:
    """Whether a field still holds a placeholder."""
    said = value.strip()
    return said.lower() == meaning.lower() or PLACEHOLDER.fullmatch(said) is not None


def _form() -> str:
    fields = ", ".join(f'"{name}" ({meaning})' for name, meaning in FIELDS.items())
    return f'write a JSON object with {fields}, and for a consent "{UNTIL}" (its last day); docs/persona.md has one'
