"""The command explains itself, and a mistake ends in one line that says how to mend it."""

import argparse
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest

import llmjax
from llmjax import cli, recipe, start
from llmjax.errors import UserError
from llmjax.train import executable
from llmjax.verb import ENDS, WRITES, check_paths

VERBS = tuple(cli.VERBS)
NEEDED = {
    "": (*VERBS, "--traceback", "--version"), "config": ("--config FILE",), "plan": ("--topology CHIP:SHAPE",),
    "import": ("--from DIR", "--to RUN"), "export": ("--from RUN", "--to DIR"), "classify": ("--positive",), "rate": ("--to",),
    "studio": ("--data DIR", "--port N", "--accelerator"),
    "card": ("--license ID", "--workdir DIR", "--watts W"),
    "mark": ("RUN", "--tag TAG", "--untag TAG", "--note TEXT"),
    "sweep": ("--config.KEY=VALUE", "--workdir DIR", "--dry-run"),
    "persona": ("--base RUN", "--rights FILE", "--config.KEY=VALUE"),
    "mcp": ("--workdir DIR", "--tools FILE", "--port N"),
    "budget": ("--flops N", "--out FILE.json"),
    "coordcheck": ("--config.KEY=VALUE", "--widths N,N,...", "--layers N,N,..."),
    "laws": ("--parameters COLUMN", "--out FILE.json"),
    **dict.fromkeys(("run", "prepare", "tokenizer", "rows", "train", "cpt", "sft", "reward", "dpo", "grpo", "ppo"), ("--config.KEY=VALUE", "--workdir DIR", "--again")),
}  # fmt: skip


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([verb, "--help"] if verb else ["--help"])
    assert exit_.value.code == 0
    output = capsys.readouterr().out
    for text in NEEDED.get(verb, ("--config.KEY=VALUE", "--workdir DIR")):
        assert text in output


def test_help_is_quick_because_it_imports_no_jax():
    code = "import sys; from llmjax import cli; cli._parser(); print([m for m in ('jax', 'orbax', 'matplotlib', 'grain') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_config_lists_every_setting_with_its_meaning(capsys):
    from llmjax import config

    assert cli.main(["config"]) == 0
    lines = {line.partition(" = ")[0]: line for line in capsys.readouterr().out.splitlines()}
    meanings = config.comments()
    assert lines.keys() == config.flatten(config.base().to_dict()).keys()
    for key, line in lines.items():
        assert meanings[key]
        assert line.endswith(meanings[key])


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "my_config.py"
    path.write_text("from llmjax.config import base\n\n\ndef get_config(arg=''):\n    return base()\n")
    return path


def mistake(capsys, *arguments):
    """The one line that a mistake ends in; exit status 2 and no traceback."""
    status = cli.main([str(a) for a in arguments])
    output = capsys.readouterr()
    assert status == 2, output
    assert "Traceback" not in output.err
    line = output.err.strip()
    assert line.startswith("llmjax: ")
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batchsize=8", "there is no config key train.batchsize; the closest is train.batch_size"),
        ("lr=8", "there is no config key lr; the closest is"),
        ("train.batch_size=many", "train.batch_size='many': this key takes a int"),
        ("train.batch_size=0", "must be at least 1"),
        ("train.batch_size", "needs a value: --config.train.batch_size=VALUE"),
        ("optimizer.name=adam", "did you mean adamw?"),
        ("model.heads=3", "is not a multiple of model.heads=3"),
        ("train.micro_batches=3", "must divide train.batch_size"),
        ("model.scan_unroll=0", "model.scan_unroll"),
        ("model.vocab_multiple=0", "model.vocab_multiple"),
        ("checkpoint.keep=0", "checkpoint.keep"),
        ("train.max_bad_steps=0", "train.max_bad_steps"),
        ("train.duration=soon", "duration 'soon' is not understood"),
    ],
)
def test_a_wrong_setting_is_named_with_what_to_write_instead(override, message, config_file, tmp_path, capsys):
    assert message in mistake(
        capsys, "train", "--config", config_file, f"--config.{override}", "--workdir", tmp_path / "run"
    )
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_missing_config_or_run_says_what_to_give(config_file, tmp_path, capsys):
    assert "give --config FILE, such as configs/quickstart.py" in mistake(capsys, "train")
    assert "is not a run yet: give --config FILE" in mistake(capsys, "train", "--workdir", tmp_path / "none")
    assert "Did you mean my_config.py?" in mistake(capsys, "train", "--config", tmp_path / "my_confg.py")
    (tmp_path / "empty.py").write_text("")
    assert "has no function get_config" in mistake(capsys, "train", "--config", tmp_path / "empty.py")


@pytest.mark.parametrize(("name", "content"), [("config.json", "{torn"), ("stages.json", "{torn")])
def test_a_torn_file_of_the_run_is_named(name, content, config_file, tmp_path, capsys):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / name).write_text(content)
    given = ("--workdir", workdir) if name == "config.json" else ("--workdir", workdir, "--config", config_file)
    assert name in mistake(capsys, "eval", *given)


def test_bad_sources_end_in_one_line(config_file, tmp_path, capsys):
    def prepare(source):
        return mistake(
            capsys, "prepare", "--config", config_file, f"--config.data.sources={source}", "--workdir", tmp_path / "run"
        )

    (tmp_path / "empty").mkdir()
    assert "missing.txt" in prepare(tmp_path / "missing.txt")
    assert str(tmp_path / "empty") in prepare(tmp_path / "empty")


def test_a_stage_that_needs_others_says_so(config_file, tmp_path, capsys):
    line = mistake(capsys, "train", "--config", config_file, "--workdir", tmp_path / "run")
    assert "train needs tokenizer" in line
    assert "run `llmjax tokenizer` first" in line


def paths_of(parser):
    """The arguments of a verb that name what it reads, and what it writes."""
    files = [one for one in parser._actions if (one.type is Path or one.dest in ENDS) and one.dest != "workdir"]
    return [one for one in files if one.dest not in WRITES], [one for one in files if one.dest in WRITES]


def test_what_a_verb_reads_it_never_writes(tmp_path):
    """Of every verb, each file that is written against each that is read, and against each other that is written."""
    file = tmp_path / "file.jsonl"
    file.write_text("mine")
    parser, checked = cli._parser(), set()
    for verb, own in parser._subparsers._group_actions[0].choices.items():
        read, written = paths_of(own)
        said = [
            one.dest for one in read if re.search(r"\b(write|append|save) |\bhere\b", one.help) and one.dest != "index"
        ]
        assert said == [], f"{verb} says that it writes there: that belongs to verb.WRITES"
        needed = {one.dest: one.default for one in own._actions}
        for out, one in ((out, one) for out in written for one in (*read, *written) if one is not out):
            several = isinstance(one.default, list) or one.nargs == "*"
            text = file if one.type is Path else str(file)
            args = argparse.Namespace(
                **{**needed, out.dest: tmp_path / "." / "file.jsonl", one.dest: [text] if several else text}
            )
            with pytest.raises(
                UserError,
                match=f"{out.dest.replace('_', '-')} .* is the file of {one.dest}|{one.dest.replace('_', '-')} .* is the file of {out.dest}",
            ):
                check_paths(args)
            checked |= {(verb, out.dest, one.dest)}
    assert {("ask", "out", "questions"), ("apply", "out", "rows"), ("rate", "to", "answers"), ("laws", "out", "given"),
            ("generate", "out", "prompts"), ("plan", "out", "config"), ("agent", "transcript", "tools")} <= checked  # fmt: skip
    assert {out for _, out, _ in checked} == set(WRITES)


@pytest.mark.parametrize("link", ["itself", "hard", "symbolic", "another way", "not there yet"])
def test_a_file_that_is_read_and_written_is_refused_whatever_its_path_is(link, tmp_path, capsys):
    (tmp_path / "more").mkdir()
    file, other = tmp_path / "q.jsonl", tmp_path / "more" / "q.jsonl"
    file.write_text('{"question": "a"}')
    if link == "hard":
        os.link(file, other)
    elif link == "symbolic":
        other.symlink_to(file)
    else:
        other = file if link == "itself" else tmp_path / "more" / ".." / "q.jsonl"
    if link == "not there yet":
        file.unlink()
    before = {path.name: path.read_text() for path in tmp_path.glob("*.jsonl")}
    said = mistake(capsys, "ask", "--docs", tmp_path, "--questions", file, "--out", other)
    assert said == f"llmjax: --out {other} is the file of questions, which is read: give another"
    assert {path.name: path.read_text() for path in tmp_path.glob("*.jsonl")} == before


def test_what_ask_writes_beside_its_answers_is_none_of_its_files_either(config_file, tmp_path, capsys):
    file = tmp_path / "a.transcript.jsonl"
    file.write_text('{"question": "a"}\n')
    docs = tmp_path / "docs"
    docs.mkdir()
    words = ("ask", "--config", config_file, "--docs", docs, "--questions", file, "--out", tmp_path / "a.jsonl")
    assert "transcript" in mistake(capsys, *words)
    rules = tmp_path / "filters.jsonl"
    rules.write_text('{"rules": []}')
    words = (
        "ask",
        "--config",
        config_file,
        "--docs",
        docs,
        "a",
        "--filters",
        rules,
        "--transcript",
        tmp_path / "t.jsonl",
    )
    assert "filters.jsonl" in mistake(capsys, *words)
    assert file.read_text() == '{"question": "a"}\n' and rules.read_text() == '{"rules": []}'


def test_nothing_is_written_among_the_documents(config_file, tmp_path, capsys):
    """They would have changed when the next question is asked, by the answers."""
    docs = tmp_path / "docs"
    (docs / "deep").mkdir(parents=True)
    words = ("ask", "--config", config_file, "--docs", docs, "--workdir", docs / "runs")
    for more in (
        ("--questions", "q.jsonl", "--out", docs / "deep" / "a.jsonl"),
        ("a", "--transcript", docs / "t.jsonl"),
    ):
        assert f"lies in {docs}, the folder of docs" in mistake(capsys, *words, *more)
    assert "lies in" in mistake(capsys, "persona", "--texts", docs, "--to", docs / "somebody")
    assert "q.jsonl" in mistake(capsys, *words, "--questions", "q.jsonl", "--out", tmp_path / "docs.jsonl")


def test_a_device_may_take_all_that_is_written(capsys):
    check_paths(argparse.Namespace(out=Path("/dev/null"), transcript=Path("/dev/null")))


def test_an_unknown_verb_or_option_lists_what_there_is(capsys):
    for arguments in (["trian"], ["train", "--confg", "x"]):
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        assert exit_.value.code == 2
        assert "usage: llmjax" in capsys.readouterr().err


def test_the_traceback_is_there_for_those_who_ask(config_file, monkeypatch, tmp_path, capsys):
    command = ["train", "--config", str(config_file), "--config.no.such=1", "--workdir", str(tmp_path)]
    for words in (["--traceback", *command], [*command, "--traceback"]):
        with pytest.raises(UserError, match="there is no config key"):
            cli.main(words)
    assert cli.main(command) == 2
    monkeypatch.setenv("LLMJAX_TRACEBACK", "1")
    with pytest.raises(UserError, match="there is no config key"):
        cli.main(command)


def test_a_bug_keeps_its_traceback(config_file, monkeypatch, tmp_path):
    """NumPy reports many a bug as a ValueError: it is no mistake of the user."""
    monkeypatch.setattr(recipe, "run", lambda *_, **__: np.zeros((8, 3)) + np.zeros(8))
    with pytest.raises(ValueError, match="could not be broadcast"):
        cli.main(["train", "--config", str(config_file), "--workdir", str(tmp_path)])


def test_a_setting_behind_a_space_is_told_how_to_be_written(config_file, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", "--config", str(config_file), "--config.train.batch_size", "8"])
    assert exit_.value.code == 2
    assert "write --config.train.batch_size=8, with = and without a space" in capsys.readouterr().err


def test_settings_are_not_ignored_where_there_are_none(tmp_path, capsys):
    line = mistake(capsys, "import", "--from", tmp_path, "--to", tmp_path / "x", "--config.model.dtype=float32")
    assert "llmjax import has no settings: leave --config.model.dtype out" in line
    assert cli.main(["config", "--config.seed=3"]) == 0
    assert "seed = 3" in capsys.readouterr().out


def test_a_tpu_that_is_not_there_is_passed_over_also_where_malloc_has_its_own_settings(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")  # so that Python is not started again
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setattr(start, "platforms", lambda: {"JAX_PLATFORMS": "cpu"})
    monkeypatch.setattr(sys, "argv", ["llmjax", "config"])
    monkeypatch.setattr(cli, "main", lambda: 5 if os.environ["JAX_PLATFORMS"] == "cpu" else 0)
    with pytest.raises(SystemExit) as exit_:
        start.script()
    assert exit_.value.code == 5


def test_a_full_disk_is_the_machines_fault_exit_status_1(config_file, monkeypatch, tmp_path, capsys):
    import errno

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(recipe, "run", full)
    assert cli.main(["run", "--config", str(config_file), "--workdir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("llmjax: No space left on device (metrics.jsonl). Free some space")


def test_four_calls_lead_from_the_command_to_the_step(tiny_run, one_device, monkeypatch):
    stacks, real = [], executable.compile_once

    def compile_once(lowered, **given):
        program = real(lowered, **given)

        def step(*arguments):
            ours = [
                f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(Path(llmjax.__file__).parent)
            ]
            stacks.append([f"{Path(f.filename).stem}.{f.name}" for f in ours])
            return program(*arguments)

        return step

    monkeypatch.setattr(executable, "compile_once", compile_once)
    assert cli.main(["train", "--workdir", str(tiny_run), "--config.train.duration=2 steps"]) == 0
    assert stacks == [["cli.main", "__init__.run", "pretrain.run", "loop.train"]] * 2
