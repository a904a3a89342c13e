"""Makes this process a part of jax.distributed, and loads its part of the model.

All processes run the same programs in the same order, or they wait for each other for ever. So
whatever a process could decide by itself here is either compared or agreed on:

    settings                    rank 0's, sent to all
    jaxinfer's code             compared as a process joins
    jax, device, processor      compared here, before anything runs
    kernels, tile sizes, model  compared here, before anything runs
    which programs are stored   agreed on one by one: store.Store.load
    what a self-test found      agreed on: Store.recall; its input is gathered: compile.READ_PAGES
    config after the self-test  compared here, before the first request
    memory, model files         a process that finds them wrong ends, and the group with it
    clock, pace, arrivals       rank 0's, in its log
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxinfer import config as settings
from jaxinfer import fingerprint, sharding, weights
from jaxinfer.cluster.place import devices_each
from jaxinfer.compile import Progress
from jaxinfer.config import Config
from jaxinfer.errors import ConfigError, GroupRefused
from jaxinfer.llm import LoadedEngine, load_engine
from jaxinfer.store import Agree, Devices

VIRTUAL_DEVICES = "xla_force_host_platform_device_count"
ROOT = Path(__file__).parents[1]


class Meeting(NamedTuple):
    """Where jax's processes meet, and which of them this is."""

    address: str
    rank: int
    size: int
    place: int
    """Among the processes of this machine."""
    num_here: int


def about() -> dict[str, str]:
    """What must be the same in all processes, before jax is asked."""
    whole = hashlib.sha256()
    for path in sorted(ROOT.rglob("*.py")):
        whole.update(f"{path.relative_to(ROOT).as_posix()}\n".encode() + path.read_bytes())
    return {"code": whole.hexdigest()[:16]}


def meet(config: Config, meeting: Meeting) -> None:
    """Joins jax's processes; only then devices may be looked at."""
    here = devices_each(config, meeting.size)
    if config.model in weights.ALIASES and not weights.is_ready(config.model):
        raise ConfigError(
            f"the model {config.model} is not on this machine yet; run: jaxinfer generate -m "
            f"{config.model} -p hello"
        )
    if VIRTUAL_DEVICES not in settings.compiler_flags().get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", here)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    first = meeting.place * here
    jax.distributed.initialize(
        meeting.address,
        meeting.size,
        meeting.rank,
        local_device_ids=range(first, first + here) if meeting.num_here > 1 else None,
        coordinator_bind_address=meeting.address if meeting.rank == 0 else None,
        initialization_timeout=math.ceil(config.cluster.start_limit_s),
    )
    found, wanted = jax.local_device_count(), here
    if found != wanted:
        raise ConfigError(
            f"rank {meeting.rank} has {found} devices and mesh.shape {config.mesh.shape} over "
            f"{meeting.size} processes takes {wanted} of each"
        )


def load(
    config: Config,
    agree: Agree,
    *,
    is_fresh: bool,
    progress: Progress = lambda stage, done, total: None,
    **engine: Any,
) -> LoadedEngine:
    """This process's part of the model and its engine, once it is certain that all fit."""
    devices = sharding.make_mesh(config.mesh).devices.ravel().tolist()
    same(agree, "environment", {**fingerprint.environment(devices), **_chosen(config, devices)})
    loaded = load_engine(
        config, agree=partial(_agree, agree, is_fresh), progress=progress, **engine
    )
    same(agree, "engine", described(loaded))
    return loaded


def _chosen(config: Config, devices: Devices) -> dict[str, str]:
    """What is chosen here by what this machine has: kernels, tile sizes, the model's shape."""
    source = weights.describe(config.model, quant=config.quant.scheme)
    model = sharding.fit(source.config, config.mesh)
    engine = fingerprint.settle_here(model, config.engine, devices).engine
    return {
        "model": _short([source.name, asdict(model)]),
        "chosen settings": json.dumps(asdict(engine), sort_keys=True),
    }


def described(loaded: LoadedEngine) -> dict[str, str]:
    """What of a built engine decides on its steps."""
    engine, found = loaded.engine, loaded.engine.self_test
    return {
        "settings of the engine": json.dumps(asdict(engine.config), sort_keys=True),
        "model": _short([loaded.name, asdict(loaded.model)]),
        "tokenizer": _short(asdict(loaded.tokenizer.assets)),
        "programs": _short([shape.name for shape in engine.programs]),
        "self-test": _short([found.num_tokens, found.groups, found.unsteady, found.dropped]),
    }


def same(agree: Callable[[str, Any], tuple[Any, ...]], label: str, own: Any) -> None:
    """Raises GroupRefused, in all processes alike, where one says something else than rank 0."""
    first, *others = agree(label, dict(own))
    for rank, other in enumerate(others, start=1):
        for name, value in first.items():
            if other.get(name) != value:
                raise GroupRefused(
                    f"{name} of rank {rank} is {other.get(name)}, of rank 0 {value}; all "
                    "processes of a group must be alike"
                )


def _agree(agree: Agree, is_fresh: bool, label: str, value: Any) -> tuple[Any, ...]:
    """After starts that failed nothing of the store counts."""
    return agree(label, False if is_fresh and label.startswith("program ") else value)


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
