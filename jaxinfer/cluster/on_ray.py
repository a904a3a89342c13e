"""Ray as a launcher: it places one command of a group on each node, and starts them again.

Requests never pass through Ray: the group's processes find each other as they do without it.
"""

import logging
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxinfer.errors import ConfigError, GroupError

PLACE_S = 600.0  # until all nodes are there
ENDS_WITH_PARENT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG; it outlives exec
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
log = logging.getLogger("jaxinfer.cluster")


def find_ray() -> Any:
    """The library; ConfigError where it is not installed."""
    if find_spec("ray") is None:
        raise ConfigError("--ray needs ray, which is not installed; run: pip install ray")
    return import_module("ray")


def launch(ray: Any, size: int, num_devices: int, arguments: Sequence[str]) -> None:
    """Runs a group over `size` nodes until its command ends; GroupError where that has failed.

    `arguments` are those of `jaxinfer cluster` without its place. Where nodes have GPUs each gives
    `num_devices` of them. A group that loses a node is placed again, its server too.
    """
    ray.init(ignore_reinit_error=True)
    num_gpus = num_devices if ray.cluster_resources().get("GPU") else 0
    bundle = {"CPU": 1} | ({"GPU": num_gpus} if num_gpus else {})
    placed = ray.util.placement_group([bundle] * size, strategy="STRICT_SPREAD")
    if not placed.wait(PLACE_S):
        raise GroupError(f"ray has no {size} nodes with {bundle} free within {PLACE_S:g} s")
    try:
        while not _run_once(ray, placed, size, bundle, arguments):
            log.error("ray has lost a node of the group; it starts again")
    finally:
        ray.util.remove_placement_group(placed)


def _run_once(
    ray: Any, placed: Any, size: int, bundle: dict[str, int], arguments: Sequence[str]
) -> bool:
    """One placement of the group; False where Ray lost a part of it."""

    def on(rank: int, function: Any) -> Any:
        """A function as Ray runs it on the node of a rank."""
        strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            placed, placement_group_bundle_index=rank
        )
        return ray.remote(function).options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            max_retries=0,
            scheduling_strategy=strategy,
        )

    key = secrets.token_hex(32)
    tasks: list[Any] = []
    try:
        leader = ray.get(on(0, ray.util.get_node_ip_address).remote())
        for rank in range(size):
            place = ["--rank", str(rank), "--size", str(size), "--leader", leader]
            tasks.append(on(rank, run).remote(key, [*arguments, *place]))
        ended, _ = ray.wait(tasks, num_returns=1)
        status = ray.get(ended[0])
    except ray.exceptions.RayError as error:
        log.error("%s", error)
        return False
    finally:
        for task in tasks:
            ray.cancel(task, force=True)
    if status:
        raise GroupError(f"a command of the group ended with {status}; its log says why")
    return True


def run(key: str, arguments: list[str]) -> int:
    """On a node: runs `jaxinfer cluster` to its end, which is also that of Ray's own process."""
    with tempfile.TemporaryDirectory(prefix="jaxinfer-") as folder:
        path = Path(folder) / "key"
        path.touch(mode=0o600)
        path.write_text(key)
        command = [sys.executable, "-c", ENDS_WITH_PARENT, "-m", "jaxinfer", "cluster"]
        return subprocess.call([*command, *arguments, "--cluster.key-file", str(path)])
