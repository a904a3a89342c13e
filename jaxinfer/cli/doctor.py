"""`jaxinfer doctor`: what this machine is, and what is wrong with it."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from rich.table import Table
from rich.text import Text

import jaxinfer
from jaxinfer import config
from jaxinfer.cli.console import console
from jaxinfer.cli.inspect import size
from jaxinfer.cli.options import COMMON, Common, Json
from jaxinfer.errors import JaxinferError

State = Literal["ok", "note", "broken"]
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
NEEDED_MEMORY, NEEDED_DISK = 2 << 30, 1 << 30
EXTRAS = {
    "jax-cuda13-plugin": "NVIDIA GPUs: pip install 'jaxinfer[cuda13]'",
    "jax-cuda12-plugin": "NVIDIA GPUs, older drivers: pip install 'jaxinfer[cuda12]'",
    "libtpu": "TPUs: pip install 'jaxinfer[tpu]'",
}


COLOURS = {"ok": "green", "note": "yellow", "broken": "bold red"}


class Check(NamedTuple):
    """One finding."""

    name: str
    value: str
    state: State = "ok"
    advice: str = ""


def doctor(*, as_json: Json = False, common: Common = COMMON) -> int:
    """Looks at this machine and says what would keep jaxinfer from running on it.

    Exits with 1 where something is broken.

    Parameters
    ----------
    as_json
        Prints one JSON object.
    """
    checks = list(examine(common))
    is_broken = any(check.state == "broken" for check in checks)
    if as_json:
        findings = [check._asdict() for check in checks]
        print(json.dumps({"ok": not is_broken, "checks": findings}))
        return int(is_broken)
    table = Table("", "what", "found", "what to do", box=None, pad_edge=False)
    for check in checks:
        table.add_row(
            Text(check.state, COLOURS[check.state]),
            *map(Text, (check.name, check.value, check.advice)),
        )
    console(120).print(table)
    return int(is_broken)


def examine(common: Common) -> Iterator[Check]:
    """All findings, those that need nothing first."""
    yield _python()
    yield from _packages()
    yield _devices()
    yield _cpu()
    yield _native()
    yield _glibc()
    yield _memory()
    try:
        settings = common.load()
    except JaxinferError as error:
        yield Check("settings", str(error), "broken", "correct the file, variable or flag it names")
        settings = config.Config()
    else:
        yield Check("settings", config.digest(settings))
    yield _cache_dir(config.cache_dir())
    yield _model(settings.model)
    yield port(settings.server.host, settings.server.port)


def port(host: str, number: int) -> Check:
    """Whether the server could listen where it is told to."""
    name = f"port {number} on {host}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        advice = "stop what listens there, or set --server.port (0 takes a free one)"
        return Check(name, str(error.strerror), "note", advice)
    return Check(name, "free")


def _python() -> Check:
    return Check("python", f"{platform.python_version()} at {sys.executable}")


def _packages() -> Iterator[Check]:
    yield Check("jaxinfer", jaxinfer.__version__)
    for name in sorted({"jax", "jaxlib", *_required()}):
        version = _version(name)
        if version is None:
            yield Check(name, "missing", "broken", f"pip install {name}")
        elif name in ("jax", "jaxlib"):
            yield Check(name, version)
    jax, jaxlib = _version("jax"), _version("jaxlib")
    if jax and jaxlib and jax != jaxlib:
        yield Check(
            "jax and jaxlib", f"{jax}, {jaxlib}", "note", "install the same version of both"
        )
    for name, purpose in EXTRAS.items():
        version = _version(name)
        yield Check(
            f"{name} (optional)", version or "not installed", "ok", "" if version else purpose
        )


def _required() -> list[str]:
    """Names of the packages that jaxinfer can't do without; none where it runs uninstalled."""
    try:
        requirements = importlib.metadata.requires("jaxinfer") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    names = [re.match(r"[\w.-]+", text) for text in requirements if "extra ==" not in text]
    return [found[0] for found in names if found]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Check:
    if _version("jax") is None:
        return Check("devices", "unknown without jax", "broken", "pip install jax")
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        return Check(
            "devices",
            str(error).splitlines()[0],
            "broken",
            "JAX can't start its platform: check the driver, or set JAX_PLATFORMS=cpu",
        )
    kinds = sorted({f"{device.platform} ({device.device_kind})" for device in devices})
    return Check("devices", f"{len(devices)} x {', '.join(kinds)}")


def _cpu() -> Check:
    flags = set(_field(Path("/proc/cpuinfo"), "flags").split())
    found = [name for name in CPU_FEATURES if name in flags]
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    value = f"{platform.machine()}, {cores} cores, {' '.join(found) or 'no known vector features'}"
    if platform.machine() == "x86_64" and flags and "avx2" not in flags:
        return Check("cpu", value, "note", "without AVX2 decoding is very slow")
    if flags and not {"amx_bf16", "avx512_bf16"} & flags:
        return Check("cpu", value, "ok", "no bfloat16 units: -c exact-f32 may be as fast")
    return Check("cpu", value)


def _native() -> Check:
    """Kernels in C++, for products and, where it is asked for, attention; XLA does without."""
    name = "native kernels"
    if _version("jax") is None:
        return Check(name, "unknown without jax")
    from jaxinfer.kernels import native

    plan = native.plan()
    if isinstance(plan, str):
        return Check(name, f"none: {plan}", "ok", "XLA computes all; int8 is slower on a CPU")
    if plan.path.is_file():
        return Check(name, f"built: {plan.path}")
    return Check(name, f"not built yet; {plan.compiler} will, in seconds, when they are needed")


def _glibc() -> Check:
    kind, version = platform.libc_ver()
    if kind == "glibc" and tuple(map(int, version.split(".")[:2])) < (2, 27):
        return Check("libc", f"{kind} {version}", "broken", "jaxlib needs glibc 2.27 or newer")
    return Check("libc", f"{kind} {version}".strip() or "not glibc")


def _memory() -> Check:
    total, free = (_kib(_field(Path("/proc/meminfo"), key)) for key in ("MemTotal", "MemAvailable"))
    if total == 0:
        return Check("memory", "unknown")
    limit_file = Path("/sys/fs/cgroup/memory.max")
    text = limit_file.read_text().strip() if limit_file.is_file() else "max"
    limit = min(total, int(text)) if text.isdigit() else total
    value = f"{size(min(free, limit))} free of {size(limit)}"
    if min(free, limit) < NEEDED_MEMORY:
        advice = "the demo model needs about 2 GiB: stop other programs or lower engine.num_slots"
        return Check("memory", value, "note", advice)
    return Check("memory", value)


def _cache_dir(folder: Path) -> Check:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    value = f"{folder}, {size(free)} free"
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        advice = "set JAXINFER_CACHE_DIR to a folder that can be written"
        return Check("cache folder", f"{folder} can't be written", "broken", advice)
    if free < NEEDED_DISK:
        return Check("cache folder", value, "note", "free some space or set JAXINFER_CACHE_DIR")
    return Check("cache folder", value)


def _model(model: str) -> Check:
    from jaxinfer import weights

    if model in weights.ALIASES and not weights.is_ready(model):
        advice = "the first run gets and converts it; that needs the network"
        return Check("model", f"{model} is not here yet", "note", advice)
    try:
        source = weights.describe(model)
    except JaxinferError as error:
        return Check("model", model, "broken", str(error))
    return Check("model", f"{model}: {source.config.architecture}")


def _field(path: Path, key: str) -> str:
    """The value of the first `key : value` line of a file of the kernel's; "" without one."""
    if not path.is_file():
        return ""
    found = re.search(rf"^{key}\s*:\s*(.*)$", path.read_text(), re.MULTILINE)
    return found[1] if found else ""


def _kib(text: str) -> int:
    return int(text.split()[0]) * 1024 if text else 0
