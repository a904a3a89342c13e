"""Kernels in C++ for CPUs: built once where a compiler is found, and handed to XLA as custom calls.

What is built depends on the sources, XLA's headers, the compiler and its flags; their hash names
the file and the custom calls, so that a program never meets code that it was not compiled with.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxinfer.config import cache_dir
from jaxinfer.errors import ConfigError

NATIVE = "native"  # what settings call these kernels
HANDLERS = ("product", "float_product", "attention", "likeliest", "untouched")
"""Functions jaxinfer_NAME of the library, each a custom call."""
COMPILERS = ("c++", "g++", "clang++")
NEEDED = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni")
FLAGS = (
    *("-std=c++17", "-O3", "-shared", "-fPIC", "-fvisibility=hidden"),
    *("-march=x86-64-v4", "-mavx512vnni", "-mprefer-vector-width=512"),
    "-ffp-contract=off",  # a sum and a product that are rounded once in one place, twice in another
)
OPTIONS = {"avx512_bf16": "-mavx512bf16"}
"""What some kernels need besides, where the processor has it."""
BUILD_S = 300.0
log = logging.getLogger(__name__)


class Plan(NamedTuple):
    """What would be built, and where to."""

    compiler: str
    digest: str
    path: Path


class Library(NamedTuple):
    """The kernels that this process has loaded."""

    digest: str

    def target(self, handler: str) -> str:
        """The name under which XLA knows a custom call."""
        return f"jaxinfer_{handler}_{self.digest}"


def refusal() -> str:
    """Why there are no native kernels in this process; "" where there are. Builds them."""
    found = _load()
    return found if isinstance(found, str) else ""


def library() -> Library:
    """The kernels; raises ConfigError where there are none."""
    found = _load()
    if isinstance(found, str):
        raise ConfigError(f"there are no native kernels: {found}")
    return found


def lacks(feature: str) -> str:
    """Why a kernel that needs one of OPTIONS can't be had; "" where it can."""
    return refusal() or ("" if feature in _cpu_flags() else f"this processor has no {feature}")


def identity(name: str) -> str:
    """What a program that uses `name` depends on: for native code, which."""
    return f"{name} {library().digest}" if name == NATIVE else name


def untouched(shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """An array to which nothing is written: the system gives its memory as it comes into use."""
    result = jax.ShapeDtypeStruct(shape, dtype)
    name = library().target("untouched")
    return jax.ffi.ffi_call(name, result, has_side_effect=True)()  # calls alike stay apart


def plan() -> Plan | str:
    """What this machine would build, without doing it; why it can't, where it can't."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"they are for x86-64 under Linux, and this is {platform.machine()} {sys.platform}"
    if missing := [name for name in NEEDED if name not in _cpu_flags()]:
        return f"this processor has no {', '.join(missing)}"
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return f"no C++ compiler is installed ({', '.join(COMPILERS)})"
    try:
        version = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, check=True, timeout=30
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"{compiler} does not work: {error}"
    whole = hashlib.sha256("\0".join((version, *_flags(), *NEEDED)).encode())
    for path in (*_sources(".h"), *_sources(".cc"), *sorted(_headers().rglob("*.h"))):
        whole.update(path.name.encode() + b"\0" + path.read_bytes())
    digest = whole.hexdigest()[:16]
    return Plan(compiler, digest, cache_dir() / "native" / f"kernels-{digest}.so")


@functools.cache
def _load() -> Library | str:
    """The library, or why there is none; one answer a process."""
    wanted = plan()
    if isinstance(wanted, str):
        return wanted
    try:
        if not wanted.path.is_file():
            _build(wanted)
        if why := _why_not_private(wanted.path) or _why_not_private(wanted.path.parent):
            return why
        code = ctypes.CDLL(str(wanted.path))
        found = Library(wanted.digest)
        for handler in HANDLERS:
            capsule = jax.ffi.pycapsule(code[f"jaxinfer_{handler}"])
            jax.ffi.register_ffi_target(found.target(handler), capsule, platform="cpu")
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        return f"they can't be built or loaded: {_first_line(error)}"
    return found


def _build(wanted: Plan) -> None:
    """Compiles all sources to one file; whole or not there, whoever else builds it meanwhile."""
    started = time.monotonic()
    wanted.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix="building-", suffix=".so", dir=wanted.path.parent)
    os.close(descriptor)
    here = Path(__file__).parent.parent
    includes = [f"-I{here}", f"-I{_headers()}"]
    command = [wanted.compiler, *_flags(), *includes, *map(str, _sources(".cc")), "-o", name]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=BUILD_S)
        os.chmod(name, 0o700)
        os.replace(name, wanted.path)
    finally:
        Path(name).unlink(missing_ok=True)
    log.info("native kernels: %s, built in %.1f s", wanted.path, time.monotonic() - started)


def _flags() -> list[str]:
    found = _cpu_flags()
    return [*FLAGS, *(flag for feature, flag in OPTIONS.items() if feature in found)]


def _sources(suffix: str) -> list[Path]:
    return sorted(Path(__file__).parent.parent.rglob(f"*{suffix}"))


def _headers() -> Path:
    return Path(jax.ffi.include_dir())


def _cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def _why_not_private(path: Path) -> str:
    """Whoever can write to the file can run code in this process."""
    found = path.stat()
    if found.st_uid not in (os.getuid(), 0):
        return f"{path} belongs to user {found.st_uid}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} can be written by others"
    return ""


def _first_line(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in error.stderr.splitlines() if "error" in line]
        return lines[0] if lines else f"{error.cmd[0]} ended with {error.returncode}"
    return str(error).splitlines()[0]
