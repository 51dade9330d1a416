"""Numbers for people: counts with K/M/B/T, sizes in decimal bytes, durations in two units."""

import math
import re

from llmjax.errors import UserError


def count(n: float) -> str:
    """A count in short form.

    >>> count(950), count(1_234), count(1_234_567), count(540e9)
    ('950', '1.23K', '1.23M', '540B')
    """
    if not math.isfinite(n):
        return str(n)
    return _scaled(n, (("", 1), ("K", 1e3), ("M", 1e6), ("B", 1e9), ("T", 1e12)))


def size(bytes: float) -> str:
    """A number of bytes in decimal units.

    >>> size(12), size(3_400_000), size(25.6e9)
    ('12 B', '3.4 MB', '25.6 GB')
    """
    if not math.isfinite(bytes):
        return str(bytes)
    return _scaled(bytes, ((" B", 1), (" kB", 1e3), (" MB", 1e6), (" GB", 1e9), (" TB", 1e12), (" PB", 1e15)))


def parse_size(text: str) -> int:
    """A number of bytes from "5GB", "500 MB", "1.5 kB" or "1000". Raises UserError for anything else.

    >>> parse_size("5GB"), parse_size("1.5 kB"), parse_size("1000")
    (5000000000, 1500, 1000)
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([kMGT]?)B?", text.strip())
    if not match:
        raise UserError(f"the size {text!r} is not understood: write 5GB, 500MB or a number of bytes")
    return int(float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[match[2]])


def duration(seconds: float) -> str:
    """A time in its two largest units.

    >>> duration(0.0123), duration(4.26), duration(200), duration(7_260), duration(200_000)
    ('12 ms', '4.3 s', '3 min 20 s', '2 h 1 min', '2 d 8 h')
    """
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 0:
        return "-" + duration(-seconds)
    if seconds < 0.9995:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    # Rounded to the smaller unit before it is split, so that 3,599.7 s is 1 h and not 59 min 60 s.
    if whole < 3600:
        return _two(whole, "min", 60, "s")
    if round(seconds / 60) < 24 * 60:
        return _two(round(seconds / 60), "h", 60, "min")
    return _two(round(seconds / 3600), "d", 24, "h")


def _two(amount: int, large: str, per: int, small: str) -> str:
    whole, rest = divmod(amount, per)
    return f"{whole} {large} {rest} {small}" if rest else f"{whole} {large}"


def _scaled(n: float, units: tuple[tuple[str, float], ...]) -> str:
    for i, (unit, scale) in enumerate(units):
        text = _three_digits(n / scale)
        # 999.7 K is written 1M: a value that rounds up to 1,000 belongs to the next unit.
        if abs(float(text)) < 1000 or i == len(units) - 1:
            return text + unit
    raise AssertionError("the last unit always returns")


def _three_digits(x: float) -> str:
    digits = max(0, 2 - math.floor(math.log10(abs(x)))) if x else 0
    text = f"{x:.{min(digits, 3)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
