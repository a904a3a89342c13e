"""What a compiled program depends on: the key under which it is stored."""

import functools
import hashlib
import os
import platform
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jaxlib.version
from jax.sharding import NamedSharding

from jaxinfer import cache as paged
from jaxinfer import config as settings
from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.kernels import native, paged_attention, products
from jaxinfer.kernels.paged_attention import tuned
from jaxinfer.spec import dotted
from jaxinfer.store import Devices, Key

# Nothing in these runs on the device; whatever else is in the package is taken to.
HOST_ONLY = {
    *("bench", "cli", "client", "cluster", "host", "quality", "server", "text", "v1", "weights"),
    *("__init__.py", "__main__.py", "demo.py", "engine.py", "errors.py", "llm.py", "manifest.py"),
    *(
        "plan.py",
        "replicas.py",
        "runner.py",
        "selftest.py",
        "settings.py",
        "store.py",
        "verdict.py",
    ),
}
# Settings of jax whose names hold one of these change no program.
_HARMLESS = (
    "cache",
    "captured_constants",
    "distributed",
    "dump",
    "explain",
    "log",
    "metadata_in_key",
    "platform",
    "pprint",
    "profil",
    "timeout",
    "traceback",
    "transfer_guard",
    "visible_devices",  # which devices are there stands in the key by itself
)


class Settled(NamedTuple):
    """A config as its programs are compiled, and why a choice in it is not the faster one."""

    engine: EngineConfig
    reason: str


def settle(model: ModelConfig, engine: EngineConfig, devices: Devices) -> Settled:
    """Decides what `auto` leaves open; raises ConfigError where what was asked for can't be had."""
    weights = engine.compute_dtype if model.quant == "none" else products.INT8
    here = str(devices[0].platform)
    capability = str(devices[0].compute_capability) if here == "gpu" else ""
    needs = products.Needs(here, len(devices), weights, capability)
    choice = products.choose(engine.products, needs)
    attention = paged_attention.pick(engine.attention, needs_of(model, engine))
    return Settled(replace(engine, products=choice.name, attention=attention), choice.reason)


def settle_here(model: ModelConfig, engine: EngineConfig, devices: Devices) -> Settled:
    """The same, with the tile sizes that were measured on this device: what is built here."""
    found = settle(model, engine, devices)
    group = model.num_heads // model.num_kv_heads
    needs = needs_of(model, found.engine)
    return found._replace(engine=tuned.settle(found.engine, needs, group=group))


def needs_of(model: ModelConfig, engine: EngineConfig) -> paged_attention.Needs:
    """What an engine needs of attention."""
    return paged_attention.needs_here(
        dtype=paged.kept_dtype(engine),
        head_dim=model.head_dim,
        page_size=engine.cache.page_size,
        block=engine.attention_block,
        compute_dtype=engine.compute_dtype,
    )


def program_key(
    name: str,
    model: ModelConfig,
    engine: EngineConfig,
    *,
    arguments: Any,
    devices: Devices,
    mesh: str = "",
) -> Key:
    """Everything that one program depends on; `arguments` are abstract values."""
    engine = settle(model, engine, devices).engine
    return {
        "program": name,
        "model": repr(model),
        "engine": repr(
            {
                "attention": native.identity(engine.attention),
                "attention_block": engine.attention_block,
                "attention_tiles": engine.attention_tiles,
                "bits": engine.bits,
                "compute_dtype": engine.compute_dtype,
                "num_pages": engine.num_pages,
                "num_slots": engine.num_slots,
                "page_dtype": engine.cache.dtype,
                "page_size": engine.cache.page_size,
                "pages_per_seq": engine.pages_per_seq,
                "products": native.identity(engine.products),
            }
        ),
        "arguments": arguments_digest(arguments),
        "mesh": mesh,
        **environment(devices),
    }


def environment(devices: Devices) -> Key:
    """The part of a key that is the same for all programs of a process."""
    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "device": _device(devices),
        "processor": processor() if devices[0].platform == "cpu" else platform.machine(),
        "flags": repr(sorted(settings.compiler_flags().items())),
        "jax_settings": _digest(*jax_settings()),
        "source": source_digest(),
    }


def arguments_digest(arguments: Any) -> str:
    """Names, shapes, dtypes and layouts over devices of all arrays that a program takes."""
    leaves, tree = jax.tree.flatten_with_path(arguments)
    return _digest(
        str(tree),
        *(f"{dotted(path)} {leaf.dtype}{leaf.shape} {_spread(leaf)}" for path, leaf in leaves),
    )


def jax_settings() -> tuple[str, ...]:
    """Every setting of jax that may change a program; a new one counts until it is known not to."""
    return tuple(
        f"{name}={value}"
        for name, value in sorted(jax.config.values.items())
        if not any(word in name for word in _HARMLESS)
    )


@functools.cache
def processor() -> str:
    """The CPU that code is compiled for: its kind, its features, and how many cores there are."""
    wanted = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU part")
    found: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        name, _, value = line.partition(":")
        if name.strip() in wanted:
            found.setdefault(name.strip(), value.strip())
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    name = found.get("model name") or platform.processor() or platform.machine()
    return f"{name}, {cores} cores, {_digest(repr(sorted(found.items())))}"


@functools.cache
def source_digest() -> str:
    """A digest of all code of this package that can run on a device."""
    root = Path(__file__).parent
    paths = [path.relative_to(root) for path in sorted(root.rglob("*.py"))]
    on_device = [path for path in paths if path.parts[0] not in HOST_ONLY]
    return _digest(*(f"{path.as_posix()}\n{(root / path).read_text()}" for path in on_device))


def _device(devices: Devices) -> str:
    first = devices[0]
    version = " ".join(first.client.platform_version.split())
    places = ",".join(str(device.id) for device in devices)
    if processes := max(device.process_index for device in devices):
        places += f" of {processes + 1} processes"
    return f"{first.platform} {first.device_kind}, {version}, devices {places}"


def _spread(leaf: Any) -> str:
    """How a leaf lies over devices; nothing where it lies on one."""
    sharding = leaf.sharding
    if sharding is None or len(sharding.device_set) == 1:
        return ""
    if isinstance(sharding, NamedSharding):  # P("X") and P("X", None) are the same
        axes = (*sharding.spec, *(None,) * (len(leaf.shape) - len(sharding.spec)))
        return f"{sharding.mesh} {axes} {sharding.memory_kind}"
    return str(sharding)


def _digest(*parts: str) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(f"{len(part)}:{part}".encode())
    return whole.hexdigest()[:32]
