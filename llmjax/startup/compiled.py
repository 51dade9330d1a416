"""Compiled programs kept between starts: a jitted function that looks into the cache before it is traced.

Tracing a decoder takes a second and compiling it several seconds. Loading a kept program takes a fraction of a second.
Its key is a hash of everything that it follows from (`environment`, the settings that the function closes over, the
types of the arguments), so nothing is traced. This assumes that programs follow from the installed files: a process that
replaces functions of llmjax while it runs must keep no programs (`store=None`, as in notebooks and tests).
"""

import functools
import hashlib
import inspect
import os
import pickle
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
import numpy as np
from flax import linen as nn
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import FrozenConfigDict

from llmjax.startup import timings
from llmjax.startup.cache import Cache, key_of

KIND = "programs"


@functools.cache
def environment() -> str:
    """A hash of what all programs follow from: the code, the versions, the machine and the flags of XLA."""
    return key_of(
        _code(),
        (jax.__version__, jaxlib.__version__, flax.__version__, np.__version__),
        (platform.machine(), _processor(), _cores()),
        [(d.platform, d.device_kind, d.client.platform_version) for d in jax.local_devices()[:1]],
        sorted(item for item in os.environ.items() if item[0].startswith(("XLA_", "LIBTPU_", "TF_"))),
    )


def _cores() -> int | None:
    """How many this process may use: XLA divides loops by it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _code() -> str:
    """A hash of all of llmjax's source."""
    root, found = Path(__file__).parents[1], hashlib.blake2b(digest_size=20)
    for path in sorted(root.rglob("*.py")):
        found.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return found.hexdigest()


def _processor() -> str:
    """The processor and its instructions: a program must never be loaded where one of them is missing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.processor()} {platform.node()}"
    told = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features", "CPU implementer")
    return "\n".join(line for line in lines if line.partition(":")[0].strip() in (*told, "CPU part", "CPU variant"))


@dataclass(frozen=True)
class Store:
    """Where the programs of a model are kept.

    Args:
        cache: the folder.
        weights: the key of the parameters, under which other forms of them are kept too; "": none are.
        setting: mesh and placement, from which programs follow too.
    """

    cache: Cache
    weights: str = ""
    setting: str = ""

    def keep(self, function: Callable[..., Any], name: str, *parts: Any) -> "CachedFunction":
        """The jitted function with its programs kept; the same object for the same arguments.

        Args:
            name: of the function.
            parts: what it closes over, hashable; parts with the same `repr` are the same.
        """
        settings = tuple((key, repr(value)) for key, value in jax.config.values.items() if "cache" not in key)
        return _cached(function, self.cache, (environment(), self.setting, name, settings, parts))


@functools.lru_cache(maxsize=128)
def _cached(function: Callable[..., Any], cache: Cache, parts: tuple[Any, ...]) -> "CachedFunction":
    return CachedFunction(function, cache, parts)


@dataclass
class CachedFunction:
    """A jitted function of positional arguments, with its programs kept between starts.

    A call chooses its program by the shapes of arguments that are arrays or dicts of arrays, and by which are None.
    Looking at all arrays of large trees would take too long. A program itself refuses arrays of other types.
    """

    function: Any
    cache: Cache
    parts: tuple[Any, ...]
    programs: dict[tuple[Any, ...], Callable[..., Any]] = field(default_factory=dict)

    def __call__(self, *arguments: Any) -> Any:
        shapes = tuple(_shape(one) for one in arguments)
        if shapes in self.programs:
            try:
                return self.programs[shapes](*arguments)
            except (TypeError, ValueError):  # of other types, or in other places
                pass
        self.programs[shapes] = self._program(arguments)
        return self.programs[shapes](*arguments)

    def _cache_size(self) -> int:
        """How many programs there are; jax's name for it."""
        return len(self.programs)

    def _program(self, arguments: tuple[Any, ...]) -> Callable[..., Any]:
        leaves, tree = jax.tree.flatten((arguments, {}))
        devices = _devices(leaves)
        key = key_of(self.parts, str(tree), [_described(leaf) for leaf in leaves], [d.id for d in devices])
        with timings.phase("load programs"):
            if (found := self.cache.read(KIND, key)) is not None and (program := _loaded(found, tree, devices)):
                return program
        with timings.phase("compile programs"):
            lowered = self.function.lower(*arguments)
            compiled = compile_to_keep(lowered)
            try:
                text, _, out = serialize_executable.serialize(compiled)
                content = pickle.dumps((text, out))
            except Exception:  # a platform or a program that cannot be serialized: each kind has its own exception
                return compiled
            self.cache.write(KIND, key, [content])
        return compiled


def compile_to_keep(lowered: jax.stages.Lowered) -> Any:
    """Compile without JAX's own cache: a program that XLA took from a file cannot be serialized again.

    JAX also gives a program of the same text again that this process has, and that may be from a file. An option that
    no other compilation names, with the value that it has anyway, keeps both apart.
    """
    if not jax.config.values["jax_compilation_cache_dir"] or not jax.config.values["jax_enable_compilation_cache"]:
        return lowered.compile()
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        return lowered.compile(compiler_options={"xla_embed_ir_in_executable": False})
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()


def _shape(argument: Any) -> Any:
    """The part of an argument that usually differs from call to call."""
    if isinstance(argument, dict):
        return tuple(sorted((name, getattr(one, "shape", None)) for name, one in argument.items()))
    return getattr(argument, "shape", argument is None)


def _loaded(content: np.ndarray, tree: Any, devices: list[jax.Device]) -> Callable[..., Any] | None:
    """The program; None: jax does not take it, and it must be compiled."""
    try:
        program, out = pickle.loads(content.tobytes())
        return serialize_executable.deserialize_and_load(
            program, tree, out, backend=devices[0].client, execution_devices=devices
        )
    except Exception:  # whatever it is, compiling it again mends it
        return None


def _devices(leaves: list[Any]) -> list[jax.Device]:
    """The devices of the arguments, in the order of their mesh; without arguments the first device."""
    for leaf in leaves:
        if isinstance(leaf, jax.Array):
            mesh = getattr(leaf.sharding, "mesh", None)
            return list(leaf.sharding.device_set) if mesh is None else list(mesh.devices.flat)
    return jax.local_devices()[:1]


@functools.lru_cache(maxsize=32)
def named(module: nn.Module) -> str:
    """A module with all of its fields, as text."""
    fields = {name: getattr(module, name) for name in module.__dataclass_fields__ if name not in ("parent", "name")}
    plain = {key: _plain(value) for key, value in fields.items()}
    return f"{type(module).__module__}.{type(module).__qualname__} {plain}"


def _plain(value: Any) -> Any:
    """A field's value in a form whose `repr` is the same in every process."""
    if isinstance(value, FrozenConfigDict):
        return value.to_dict()
    return f"{value.__module__}.{value.__qualname__}" if inspect.isfunction(value) else value


def described(tree: Any) -> str:
    """A hash of the types of all arrays of a tree, and where they are."""
    leaves, structure = jax.tree.flatten(tree)
    return key_of(str(structure), [_described(leaf) for leaf in leaves])


def _described(leaf: Any) -> tuple[Any, ...]:
    if isinstance(leaf, jax.Array):
        return str(leaf.dtype), leaf.shape, getattr(leaf, "weak_type", False), str(getattr(leaf.sharding, "spec", ""))
    return str(np.asarray(leaf).dtype), np.shape(leaf), type(leaf).__name__
