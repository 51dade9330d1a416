"""What README, CONTRIBUTING, docs/ and docstrings name exists: files, commands, settings. The guides run as written."""

import ast
import functools
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import assistant
import pytest
import quickstart
from helpers import WORDS

from llmjax import cli, config
from llmjax.recipe import stages

ROOT = Path(__file__).parent.parent
GUIDES = sorted(p for p in (ROOT / "docs").glob("*.md") if p.name != "README.md")
NOTEBOOK = ROOT / "docs" / "colab.ipynb"
INDEXES = [ROOT / folder / "README.md" for folder in (".", "configs", "docs", "results")]
PAGES = [*INDEXES, ROOT / "CONTRIBUTING.md", *GUIDES, NOTEBOOK]
SOURCES = sorted(p for folder in ("llmjax", "configs", "launch", "benchmarks") for p in (ROOT / folder).rglob("*.py"))
SCRIPTS = {p.relative_to(ROOT).as_posix() for p in SOURCES if p.parts[-2] in ("launch", "benchmarks")}
# What is written by a run, or is a user's own: named in many places and found in none.
MADE = (
    "runs/",
    "crawl/",
    "my_notes/",
    "corpus/",
    "questions/",
    "path/to/",
    "textbooks/",
    "forums/",
    "pile/",
    "exported",
)


@functools.cache
def text_of(path: Path) -> str:
    """A page; of a notebook its cells, of a source its docstrings."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    if path.suffix == ".py":
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = (ast.get_docstring(node, clean=False) for node in ast.walk(ast.parse(text)) if isinstance(node, kinds))
        return "\n\n".join(filter(None, found))
    return text


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def commands(text: str) -> list[str]:
    """The lines that are commands, and those in backticks, without what explains them."""
    text = re.sub(r"\\+\n", " ", text)
    whole = [line.strip().lstrip("!") for line in text.splitlines()]
    inline = re.findall(r"`([^`\n]+)`", text)
    found = [re.split(r"   +|  #|\{", line)[0].strip() for line in (*whole, *inline)]
    start = re.compile(r"(?:\S*bin/)?(?:llmjax [a-z-]+( |$)(?!=)|python (?:launch|benchmarks|configs)/)")
    return list(dict.fromkeys(re.sub(r"^\S*bin/", "", line) for line in found if start.match(line)))


def documented() -> list[str]:
    texts = (*map(text_of, (*PAGES, *SOURCES)), cli.EXAMPLES)
    return list(dict.fromkeys(line for text in texts for line in commands(text)))


# ---------------------------------------------------------------------- what is named exists


@pytest.mark.parametrize("command", [line for line in documented() if line.startswith("llmjax ")])
def test_every_llmjax_command_parses_and_names_configs_that_load(command, capsys):
    words = shlex.split(command.replace("...", ""))[1:]
    assert words[0] in cli.VERBS, f"there is no verb {words[0]}"
    if re.fullmatch(r"[A-Z.]+|--[a-z-]+", words[-1]) and len(words) > 1:  # a pattern, such as `llmjax eval --tasks`
        with pytest.raises(SystemExit):
            cli.main([words[0], "--help"])
        options = capsys.readouterr().out
        assert all(word in options for word in words if word.startswith("--"))
        return
    if not words[1:]:
        return
    overrides = [word.removeprefix("--config.") for word in words if word.startswith("--config.")]
    args = cli._parser().parse_args([word for word in words if not word.startswith("--config.")])
    if getattr(args, "config", None) and args.config.startswith("configs/") and args.config != "configs/mine.py:tiny":
        load = config.load_chain if config.is_chain(str(ROOT / args.config)) else config.load
        load(str(ROOT / args.config), overrides=overrides)
        needs = next((stage.needs for stage in stages.STAGES if stage.name == args.verb), ())
        assert not needs or args.workdir, f"llmjax {args.verb} needs {needs[0]} first: write llmjax run"


@pytest.mark.parametrize("command", [line for line in documented() if line.startswith("python ")])
def test_every_script_that_is_named_exists_and_takes_its_options(command):
    script, *words = command.replace("[", "").replace("]", "").split()[1:]
    assert (ROOT / script).is_file(), script
    shared = (ROOT / script).with_name("jobs.py" if script.startswith("launch/") else "common.py")
    known = (ROOT / script).read_text() + (shared.read_text() if shared.exists() else "")
    own = words[: words.index("--")] if "--" in words else words
    for word in own:
        if word.startswith("--"):
            assert f'"{word.partition("=")[0]}"' in known, f"{script} has no option {word}"


def test_every_setting_that_is_named_exists():
    known = config.flatten(config.base().to_dict())
    groups = {key.rpartition(".")[0] for key in known} - {""}
    sections = "|".join(sorted(group for group in groups if "." not in group))
    wrong = []
    for path in (*PAGES, ROOT / "CHANGELOG.md", *SOURCES):
        text = text_of(path)
        named = set(re.findall(r"--config\.(?:(?:base|sft|dpo|grpo)\.)?([a-z_.0-9]+[a-z_0-9])", text)) - {"key"}
        if path.suffix != ".py":
            named |= set(re.findall(rf"`((?:{sections})\.[a-z_.0-9]+)(?:=[^`]*)?`", text))
        files = (".py", ".json", ".jsonl")
        wrong += [f"{relative(path)}: {name}" for name in named - known.keys() - groups if not name.endswith(files)]
    assert not wrong


def exists(name: str, page: Path) -> bool:
    """Whether a path is there, from the root, a page's own folder, or the package."""
    own = [page.parent, page.parent.parent]
    places = [ROOT, ROOT / "llmjax", ROOT / "configs", ROOT / "tests", *own]
    return any((place / name).exists() or any(place.glob(name)) for place in places)


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CHANGELOG.md"], ids=relative)
def test_every_link_and_path_of_a_page_is_there(path):
    text = text_of(path)
    made = set(re.findall(r"^# file: (\S+)$", text, re.M))
    links = [link.partition("#")[0].replace("\\", "") for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    wrong = [link for link in links if link and "://" not in link and not (path.parent / link).exists()]
    assert not wrong, f"links to nothing: {wrong}"
    rooms = ("llmjax/", "tests/", "configs/", "docs/", "benchmarks/", "results/", "launch/", ".ci/")
    ours = [
        name
        for name in re.findall(r"`([\w.*/-]+)`", text)
        if name.startswith(rooms) or (re.search(r"\.(py|md|ipynb)$", name) and not name.startswith(MADE))
    ]
    files = {p.name for p in SOURCES} | {p.name for p in (ROOT / "tests").glob("*.py")}
    wrong = [name for name in ours if not (exists(name, path) or name in made or name in files) and "NAME" not in name]
    assert not wrong, f"paths to nothing: {wrong}"


def test_every_file_that_a_docstring_names_is_there():
    wrong = []
    for path in SOURCES:
        for name in re.findall(r"(?<![\w./:-])((?:[\w-]+/)+[\w-]+\.py)\b", text_of(path)):
            if not exists(name, path) and path.name != "stdlib_corpus.py":  # which names files of the standard library
                wrong.append(f"{relative(path)}: {name}")
    assert not wrong


def test_the_names_of_the_map_stand_in_the_files_of_their_row():
    checked = 0
    for row in text_of(ROOT / "CONTRIBUTING.md").splitlines():
        names = re.findall(r"`([A-Z][A-Z_]{3,})`", row) if row.startswith("| ") else []
        given = re.findall(r"`([\w/.]+(?:\.py|/))`", row)
        texts = [
            p.read_text()
            for p in SOURCES
            if any(f"/{p}".endswith(f"/{n}") or f"{p.parent}/".endswith(n) for n in given)
        ]
        for name in names:
            checked += 1
            assert any(re.search(rf"\b{name}\b", text) for text in texts), f"{name}: {row}"
    assert checked > 3


def test_the_map_shows_every_room():
    rooms = {p.parent.name for p in (ROOT / "llmjax").glob("*/__init__.py")}
    drawn = re.search(r"## The map of the house.*?```\n(.*?)```", text_of(ROOT / "CONTRIBUTING.md"), re.S)[1]
    assert {room for room in rooms if f"{room}/" not in drawn} == set()
    assert {room for room in re.findall(r"\b([a-z]+)/", drawn) if not (ROOT / "llmjax" / room).is_dir()} == set()


def test_every_guide_is_in_the_index():
    linked = re.findall(r"\]\(([\w.-]+)\)", text_of(ROOT / "docs" / "README.md"))
    assert {p.name for p in (*GUIDES, NOTEBOOK)} == set(linked)


def test_the_reading_path_is_short():
    rows = re.findall(r"^\| (\d+) \| \[([^]]+)\]\(\.\./([^)]+)\)", text_of(ROOT / "docs" / "reading.md"), re.M)
    assert [int(number) for number, _, _ in rows] == list(range(1, len(rows) + 1))
    assert all(shown == link for _, shown, link in rows)
    assert 10 <= len(rows) <= 14
    lines = {link: len((ROOT / link).read_text().splitlines()) for _, _, link in rows}
    assert sum(lines.values()) <= 3500, lines


def test_readme_is_short_and_its_figures_are_those_of_results():
    readme = text_of(ROOT / "README.md")
    for part, content in (("figures", quickstart.table()), ("comparison", quickstart.comparison())):
        assert quickstart.replaced(readme, part, content) == readme, "run python benchmarks/quickstart.py"
    for page in assistant.PAGES:
        text = text_of(page)
        assert assistant.replaced(text, "assistant", assistant.table()) == text, (
            "run python benchmarks/assistant.py --pages"
        )
    assert len(readme.splitlines()) <= 130


# ---------------------------------------------------------------------- the guides run


TINY = {
    "data.min_bytes": 1, "data.holdout_percent": 20.0, "prepare.workers": 1, "tokenizer.vocab_size": 420, "model.layers": 1,
    "model.width": 32, "model.heads": 2, "model.mlp_width": 64, "train.batch_size": 8, "train.sequence_length": 32,
    "eval.max_bytes": 400, "eval.batch_size": 8, "generate.max_new_tokens": 4,
}  # fmt: skip
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def tiny(words: list[str]) -> list[str]:
    """A guide's command with settings that take no time; its own settings win, but for the duration of a training."""
    if "--config" not in words and not any(word.startswith("--config.train.duration") for word in words):
        return words
    asked = [word for word in words if word.startswith("--config.train.duration")]
    rest = [word for word in words if word not in asked]
    small = (
        []
        if words[0] == "plan" or "--config" not in words
        else [f"--config.{key}={value}" for key, value in TINY.items()]
    )
    duration = [] if words[0] == "plan" else [f"--config.train.duration={4 if asked else 2} steps"]
    return [rest[0], *small, *rest[1:], *duration]


def run_guide(text: str) -> None:
    """Run a guide's blocks in the folder that this process is in."""
    for kind, block in BLOCK.findall(text):
        named = re.match(r"# file: (\S+)\n", block)
        if named:
            Path(named[1]).parent.mkdir(parents=True, exist_ok=True)
            Path(named[1]).write_text(block[named.end() :])
        elif kind == "python":
            exec(compile(block, "guide", "exec"), {"__name__": "guide"})
        elif kind == "sh":
            for line in block.splitlines():
                run_line(line)


def run_line(line: str) -> None:
    words = [
        name for word in shlex.split(line) for name in (sorted(map(str, Path().glob(word))) if "*" in word else [word])
    ]
    if words[0] == "llmjax":
        assert cli.main(tiny(words[1:])) == 0, line
    else:
        assert words[0] == "python", f"{line}: a guide runs llmjax or python; give other commands a block of console"
        done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{line}: {done.stderr}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which guides are run, with the run `runs/notes`."""
    folder = tmp_path_factory.mktemp("guides")
    for name in ("configs", "launch", "results"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "my_notes").mkdir()
    for i in range(40):  # no two are alike, so that none is a near duplicate
        draw = random.Random(i)
        words = ("".join(draw.choices(("ka", "lo", "mi", "ru", "te"), k=draw.randint(1, 3))) for _ in range(120))
        (folder / "my_notes" / f"{i:02}.txt").write_text(f"Text number {i}.\n" + " ".join(words) + "\n")
    (folder / "book.txt").write_text("\n".join(" ".join(WORDS[i % 7 :]) for i in range(60)))
    return folder


@pytest.fixture
def guide_folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's own copy of that folder, which becomes the working directory."""
    monkeypatch.chdir(made)
    if not (made / "runs").exists():
        first = re.search(r"^llmjax run .*$", text_of(ROOT / "docs" / "pretrain.md"), re.M)[0]
        run_line(first)
    copy = shutil.copytree(made, tmp_path / "guides", symlinks=True)
    (copy / "configs").unlink()
    shutil.copytree(ROOT / "configs", copy / "configs")  # guides add to it
    monkeypatch.chdir(copy)
    return copy


def has_commands(path: Path) -> bool:
    return any(kind == "sh" for kind, _ in BLOCK.findall(text_of(path)))


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in GUIDES if has_commands(p)], ids=relative)
def test_a_guide_runs_as_it_is_written(path, guide_folder):
    run_guide(text_of(path))


@pytest.mark.parametrize("path", [p for p in GUIDES if not has_commands(p)], ids=relative)
def test_the_code_of_a_guide_without_commands_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_guide(text_of(path))


# ---------------------------------------------------------------------- the notebook


def cells(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The code cells of a notebook and their tags."""
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            yield "".join(cell["source"]), cell["metadata"].get("tags", [])


def in_shell(cell: str) -> str:
    """A cell as Python: a line that begins with "!" is a command whose {expressions} are filled in, as in Jupyter."""
    return re.sub(r"^( *)!(.*)$", lambda found: f"{found[1]}shell(rf{found[2]!r})", cell, flags=re.M)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    monkeypatch.setenv("PATH", path)

    def shell(command: str) -> None:
        done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"

    namespace = {"__name__": "__main__", "shell": shell}
    small = " ".join(f"--config.{key}={value}" for key, value in TINY.items() if not key.startswith("data."))
    for cell, tags in cells(NOTEBOOK):
        exec(compile(in_shell(cell), "cell", "exec"), namespace)
        if "parameters" in tags:  # as papermill has it: what the cell sets can be given from outside
            namespace["SETTINGS"] = f"{small} --config.train.duration='2 steps'"
    assert (tmp_path / "runs" / "quickstart" / "report" / "index.html").is_file()
