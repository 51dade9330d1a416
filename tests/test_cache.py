"""What commands keep between starts: entries are whole or not there, nobody else can put one there, and nothing changes."""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import llmjax
from llmjax.cli import main
from llmjax.errors import UserError
from llmjax.infer import steps, weights
from llmjax.model import transformer
from llmjax.startup import compiled, mapped
from llmjax.startup.cache import ABANDONED, BLOCK, Cache, open_cache, stamp
from llmjax.startup.compiled import Store
from llmjax.train import checkpoint


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    made = open_cache(str(tmp_path / "cache"), limit=1 << 28)
    assert made is not None
    return made


def content_of(cache: Cache, key: str) -> bytes | None:
    found = cache.read("kind", key)
    return None if found is None else found.tobytes()


@pytest.mark.parametrize("size", [1, 100, 3 * BLOCK + 12_345])
def test_an_entry_is_what_was_written_and_a_damaged_one_is_none(
    cache: Cache, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmjax.startup.cache.LARGE", BLOCK)
    content = np.random.default_rng(0).bytes(size)
    path = cache.folder / "kind" / "key"
    for damage in ("none", "flipped", "cut", "longer", "another entry", "empty"):
        cache.write("kind", "key", [content[: size // 3], content[size // 3 :]])
        assert content_of(cache, "key") == content
        whole = path.read_bytes()
        if damage == "flipped":
            path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        elif damage == "cut":
            path.write_bytes(whole[:-1])
        elif damage == "longer":
            path.write_bytes(whole + b"x")
        elif damage == "another entry":
            path.rename(path.with_name("other"))
            assert content_of(cache, "other") is None
            continue
        elif damage == "empty":
            path.write_bytes(b"")
        else:
            continue
        assert content_of(cache, "key") is None
        assert not path.exists()


def test_what_others_can_write_is_not_read(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write("kind", "key", [b"content"])
    path = cache.folder / "kind" / "key"
    assert path.stat().st_mode & 0o777 == 0o600
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    path.chmod(0o660)
    assert content_of(cache, "key") is None
    cache.write("kind", "key", [b"content"])
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert content_of(cache, "key") is None
    monkeypatch.setattr(os, "getuid", lambda: path.parent.stat().st_uid + 1)
    with pytest.raises(UserError, match="another user's"):
        open_cache(str(cache.folder), limit=1)


def test_a_folder_that_cannot_be_used_is_an_error_where_it_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "llmjax"
    shared.mkdir()
    shared.chmod(0o777)
    file = tmp_path / "file"
    file.touch()
    monkeypatch.delenv("LLMJAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert open_cache("auto", limit=1) is None
    for named in (str(shared), str(file)):
        with pytest.raises(UserError, match=r"infer\.cache"):
            open_cache(named, limit=1)
        monkeypatch.setenv("LLMJAX_CACHE", named)
        with pytest.raises(UserError, match=r"infer\.cache"):
            open_cache("auto", limit=1)
    monkeypatch.setenv("LLMJAX_CACHE", str(tmp_path / "own"))
    assert open_cache("auto", limit=1) == Cache(tmp_path / "own", 1)
    assert open_cache("off", limit=1) is None
    monkeypatch.setenv("LLMJAX_CACHE", "off")
    assert open_cache("auto", limit=1) is None


def test_the_entries_used_last_stay_within_the_limit(cache: Cache) -> None:
    size = 100_000
    for number in range(4):
        cache.write("kind", str(number), [bytes(size)])
        os.utime(cache.folder / "kind" / str(number), (number, number))
    assert content_of(cache, "0") == bytes(size)  # which makes it the newest
    small = Cache(cache.folder, 5 * size // 2)
    abandoned, fresh = cache.folder / "kind" / ".a.1-1.tmp", cache.folder / "kind" / ".b.1-1.tmp"
    for path in (abandoned, fresh):
        path.touch()
    old = time.time() - ABANDONED - 10
    os.utime(abandoned, (old, old))
    small.trim()
    assert {path.name for path in (cache.folder / "kind").iterdir()} == {"0", "3", fresh.name}
    small.write("kind", "large", [bytes(2 * size)])  # more than half of the limit: not kept
    assert content_of(small, "large") is None


def test_many_may_write_and_read_an_entry_at_a_time(cache: Cache) -> None:
    content, seen = bytes(300_000), []

    def work() -> None:
        for _ in range(10):
            cache.write("kind", "key", [content])
            seen.append(content_of(cache, "key"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(seen) == {content}
    assert [path.name for path in (cache.folder / "kind").iterdir()] == ["key"]


def test_arrays_are_mapped_and_neither_read_nor_copied(cache: Cache) -> None:
    tree = {
        "a": {"b": np.arange(10, dtype=np.float32).reshape(2, 5), "c": np.zeros((0, 3), np.int8)},
        "layers": ({"d": np.ones(7, ml_dtypes.bfloat16)}, {"d": np.full((), 3.5, np.float32)}),
    }
    device = jax.devices()[1]
    mapped.write(cache, "key", jax.device_put(tree, device))
    back = mapped.read(cache, "key", jax.sharding.SingleDeviceSharding(device))
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for ours, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert (ours.dtype, ours.shape, ours.devices()) == (theirs.dtype, theirs.shape, {device})
        np.testing.assert_array_equal(ours, theirs)
    content = cache.read("weights", "key")
    assert content is not None
    views = mapped.from_bytes(content)
    assert jax.device_put(views["a"]["b"]).unsafe_buffer_pointer() == views["a"]["b"].ctypes.data
    assert mapped.read(cache, "key", None, like={"a": tree["a"]}) is None


def test_a_kept_program_is_neither_traced_nor_compiled_again(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = 0

    def function(state: dict[str, jax.Array], x: np.ndarray) -> tuple[dict[str, jax.Array], jax.Array]:
        nonlocal traced
        traced += 1
        key = jax.random.fold_in(state["key"], 3)
        return {**state, "sum": state["sum"] + x.sum()}, jax.random.normal(key, (4,)) @ jnp.exp(x)

    def run(name: str = "name") -> list[np.ndarray]:
        compiled._cached.cache_clear()
        step = Store(cache).keep(jax.jit(lambda *given: function(*given), donate_argnums=0), name)
        found = []
        for x in (np.ones(4, np.float32), np.ones((4, 2), np.float32)):
            state = {"sum": jnp.zeros(()), "key": jax.random.key(1)}
            for _ in range(2):
                before, (state, y) = state["sum"], step(state, x)
                assert before.is_deleted()  # donated
            found += [np.asarray(state["sum"]), np.asarray(y)]
        assert step._cache_size() == 2
        return found

    first = run()
    assert traced == 2
    again = run()
    assert traced == 2
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    for path in (cache.folder / "programs").iterdir():  # sound, but no program
        key = path.name
        cache.write("programs", key, [b"no pickle"])
    run()
    assert traced == 4
    run("another")
    assert traced == 6
    monkeypatch.setattr(compiled, "environment", lambda: "another machine")
    run()
    assert traced == 8
    with jax.default_matmul_precision("highest"):
        run()
    assert traced == 10


def test_a_program_that_jax_took_from_a_file_is_compiled_before_it_is_kept(cache: Cache) -> None:
    """XLA does not write such a program whole: the one that is loaded again would lack functions."""
    assert jax.config.values["jax_compilation_cache_dir"], "the tests keep JAX's programs (conftest.py)"

    def made() -> Any:
        def of_a_file(x: Any) -> Any:
            return jnp.where(x > 1, jnp.sin(x) + 1, x).cumsum().sum()

        return jax.jit(of_a_file)

    x = np.linspace(0, 3, 4096, dtype=np.float32)
    expected = made()(x)  # JAX writes the file
    function = made()
    assert function(x) == expected  # and reads it
    for _ in range(2):
        compiled._cached.cache_clear()
        assert Store(cache).keep(function, "of_a_file")(x) == expected


def test_programs_belong_to_the_code_the_machine_and_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    def now() -> str:
        compiled.environment.cache_clear()
        return compiled.environment()

    usual = now()
    assert now() == usual
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_cpu_max_isa=AVX2")
        assert now() != usual
    for name in ("_processor", "_code"):
        with monkeypatch.context() as patch:
            patch.setattr(compiled, name, lambda: "another")
            assert now() != usual
    assert "flags" in compiled._processor() or "Features" in compiled._processor() or not Path("/proc/cpuinfo").exists()
    compiled.environment.cache_clear()


def test_a_stamp_tells_when_a_file_was_written(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    file = tmp_path / "deep" / "file"
    file.write_text("aaaa")
    before = stamp(tmp_path, tmp_path / "not there")
    assert stamp(tmp_path) == before
    info = file.stat()
    file.write_text("bbbb")
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert stamp(tmp_path) != before


def test_a_model_is_mapped_from_the_second_time_on_until_its_checkpoint_is_written_again(
    cache: Cache, tmp_path: Path, one_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(Path(__file__).parent / "fixtures" / "run_c4ef595", tmp_path / "run")
    plain = llmjax.load(run)
    first = llmjax.load(run, cache=cache)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "read_params", refuse)
        patch.setattr(transformer, "param_shapes", refuse)
        second = llmjax.load(run, cache=cache)
    for model in (first, second):
        assert jax.tree.structure(model.params) == jax.tree.structure(plain.params)
        for ours, theirs in zip(jax.tree.leaves(model.params), jax.tree.leaves(plain.params), strict=True):
            assert ours.sharding == theirs.sharding
            np.testing.assert_array_equal(ours, theirs)
    assert second.loss("A text.") == plain.loss("A text.")
    compiled._cached.cache_clear()
    assert llmjax.load(run, cache=cache).loss("A text.") == plain.loss("A text.")
    for file in (path for path in (run / "checkpoints").rglob("*") if path.is_file()):
        file.write_bytes(file.read_bytes())
    monkeypatch.setattr(checkpoint, "read_params", refuse)
    with pytest.raises(AssertionError, match="read again"):
        llmjax.load(run, cache=cache)


def test_answers_are_the_same_whether_anything_is_kept_or_not(
    tmp_path: Path, one_device: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the second start traces and prepares nothing; what takes the time is said where it is asked for."""
    run, prompts = Path(__file__).parent / "fixtures" / "run_c4ef595", tmp_path / "prompts.txt"
    prompts.write_text("One thing\nand another\nand a third.\n")
    found = []

    def generate(cache: str, *more: str) -> str:
        for kept_in_memory in (steps.programs, compiled._cached):
            kept_in_memory.cache_clear()
        out = tmp_path / f"{len(found)}.jsonl"
        arguments = ["--workdir", str(run), "--prompts", str(prompts), "--out", str(out), *more]
        capsys.readouterr()
        status = main(["generate", *arguments, f"--config.infer.cache={cache}", "--config.generate.max_new_tokens=12"])
        assert status == 0
        found.append(out.read_text())
        return capsys.readouterr().err

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("made again")

    folder = str(tmp_path / "cache")
    assert "seconds" not in generate("off")
    assert "compile programs" in generate(folder, "--timings")
    for owner, name in (
        (steps, "_one_token"),
        (steps, "prefill"),
        (weights, "_prepared"),
        (transformer, "param_shapes"),
    ):
        monkeypatch.setattr(owner, name, refuse)
    printed = generate(folder, "--timings")
    assert "load programs" in printed
    assert "compile programs" not in printed
    assert found[0] == found[1] == found[2]
    assert found[0].count("log_probability") == 3


def test_settings_and_help_are_shown_without_importing_jax() -> None:
    code = "import sys; from llmjax.cli import main; main(['config']); assert not {'jax', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "infer.cache_bytes = " in done.stdout
