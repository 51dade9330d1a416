"""Every number that a user can give has a range, in the settings and on the command line."""

import math
import re

import pytest

from llmjax import cli, config
from llmjax.config.ranges import ABOVE_0, ANY, AT_LEAST_1, LISTS, RANGE_OF, RANGES, SHARE_BELOW_1, Range
from llmjax.errors import UserError


def numbers():
    flat = config.flatten(config.base().to_dict())
    return {
        key: value for key, value in flat.items() if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def test_every_number_among_the_settings_has_a_range_that_its_default_is_in():
    assert RANGE_OF.keys() == numbers().keys(), "a new number needs a row in llmjax/config/ranges.py"
    assert sum(map(len, RANGES.values())) == len(RANGE_OF)  # none has two
    for key, value in numbers().items():
        assert value in RANGE_OF[key], key


@pytest.mark.parametrize("key", sorted(numbers()))
def test_what_is_below_a_range_above_it_or_no_finite_number_is_refused_by_name(key):
    allowed, default = RANGE_OF[key], numbers()[key]
    wrong = [bound + step for bound, step in ((allowed.low, -1), (allowed.high, 1)) if math.isfinite(bound)]
    if isinstance(default, float):
        wrong += [math.inf, -math.inf, math.nan, 1e300]
        wrong += [0.0, 1e-300] * (allowed == ABOVE_0)  # float32 has no 1e-300
    for value in wrong:
        c = config.base()
        config.set_key(c, key, value)
        with pytest.raises(UserError, match=re.escape(f"{key}=")):
            config.check(c)


def test_ranges_say_what_they_hold():
    assert [str(r) for r in (ANY, AT_LEAST_1, SHARE_BELOW_1, Range(0, 65535), Range(3, 3))] == [
        "a finite number", "at least 1", "at least 0 and below 1", "at least 0 and at most 65535", "3",
    ]  # fmt: skip
    assert 0 in SHARE_BELOW_1 and 1 not in SHARE_BELOW_1
    for value in (True, "1", None, math.nan):
        assert value not in AT_LEAST_1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("eval.stride", 257, "eval.stride=257 would leave tokens out between windows of 256: set it to at most 256"),
        ("eval.pass_at", (2,), "eval.pass_at=(2,) must be whole numbers from 1 to eval.samples=1"),
        ("objective.mask_split", (0.5, 0.2, 0.5), "must be three shares that add up to 1"),
        ("objective.modes", (1.0, 1.0, 1.0), "must be four weights"),
        ("tokenizer.vocab_size", 259, "tokenizer.vocab_size=259 must be at least 260"),
        ("eval.runner", "harnes", "did you mean harness?"),
        ("prepare.html", "text", "it can be main, all, raw"),
    ],
)
def test_what_is_found_out_after_training_otherwise_is_refused_at_the_start(key, value, message):
    c = config.base()
    config.set_key(c, key, value)
    with pytest.raises(UserError, match=re.escape(message)):
        config.check(c)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rate", "--port", "-1"], "argument --port: -1 must be at least 0 and at most 65535"),
        (["rate", "--port", "70000"], "argument --port: 70000 must be"),
        (["rate", "--seed", "-1"], "argument --seed: -1 must be at least 0"),
        (["classify", "--seed", "-1"], "argument --seed: -1 must be at least 0"),
        (["eval", "--limit", "-3"], "argument --limit: -3 must be at least 0"),
        (["eval", "--limit", "2.5"], "argument --limit: '2.5' is no whole number"),
        (["plan", "--slices", "0"], "argument --slices: 0 must be at least 1"),
        (["plan", "--trials", "0"], "argument --trials: 0 must be at least 1"),
        (["plan", "--price", "nan"], "argument --price: nan must be at least 0"),
    ],
)
def test_numbers_of_the_command_line_have_ranges_too(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "key", sorted(key for key, value in config.flatten(config.base().to_dict()).items() if isinstance(value, tuple))
)
def test_a_list_holds_what_its_setting_is_made_of(key):
    """Every list among the settings: an element of another kind is refused by name and not met in the middle of a run."""
    wrong = [None, True, ("a",), ((),)] + (["a", math.nan] if key in LISTS else [1.5])
    for element in wrong:
        c = config.base()
        config.set_key(c, key, [element])
        with pytest.raises(UserError, match=re.escape(f"{key} has ")):
            config.check(c)


def test_durations_that_look_like_numbers_are_read_or_refused():
    assert config.parse_duration("1_000.5 tokens") == (1000.5, "token") and config.parse_duration("2e3") == (
        2000,
        "step",
    )
    for text in ("1.2.3 steps", "1_ steps", "1__0", "1e400 steps", "1e999", "_1", ".", "e5"):
        with pytest.raises(UserError, match="is not understood"):
            config.parse_duration(text)
