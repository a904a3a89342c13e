"""Which ranks of a group run here, and where its leader is: given, or read off a launcher."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from jaxinfer.config import Config
from jaxinfer.errors import ConfigError

LOOPBACK = "127.0.0.1"
Variables = Mapping[str, str]
PREFIXES = ("SLURM_", "LWS_")
"""Of the variables in which launchers say it."""
_NODE = re.compile(r"^([^,\[]+)(?:\[([^\]]*)\])?")
_TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")


@dataclass(frozen=True)
class Place:
    """The part of a group that one command runs."""

    ranks: tuple[int, ...]
    """Those that this command starts, ascending; the group numbers them from 0."""
    size: int
    """Processes in the whole group."""
    leader: str = LOOPBACK
    """The host of rank 0, as the others reach it."""
    first_here: int = 0
    """Place of `ranks` among all processes of this machine: which of its devices are theirs."""
    num_here: int = 0
    """Processes of the group on this machine; 0: those of `ranks`."""
    launcher: str = "flags"
    """Who said so."""

    def __post_init__(self) -> None:
        if not self.ranks or not all(0 <= rank < self.size for rank in self.ranks):
            raise ConfigError(
                f"rank {', '.join(map(str, self.ranks)) or 'none'} of a group of {self.size} "
                "processes; ranks go from 0 to one below the size"
            )

    @property
    def has_leader(self) -> bool:
        """Whether rank 0, and with it the gRPC server, is here."""
        return self.ranks[0] == 0

    @property
    def is_alone(self) -> bool:
        """Whether the whole group is on this machine."""
        return len(self.ranks) == self.size


def local(num_processes: int) -> Place:
    """The whole group on this machine."""
    if num_processes < 1:
        raise ConfigError(f"--processes is {num_processes}; it must be at least 1")
    return Place(tuple(range(num_processes)), num_processes, launcher="processes")


def detect(variables: Variables) -> Place | None:
    """The place that a launcher gives in the environment; None where there is none."""
    if "LWS_LEADER_ADDRESS" in variables:
        return _leader_worker_set(variables)
    if "SLURM_PROCID" in variables:
        return _slurm(variables)
    return None


def devices_each(config: Config, size: int) -> int:
    """How many devices each process has; ConfigError where a group can't run these settings."""
    count = math.prod(config.mesh.shape)
    if count % size:
        raise ConfigError(
            f"mesh.shape {config.mesh.shape} is {count} devices, which {size} processes can't "
            "share evenly"
        )
    if "batch" in dict(config.mesh.rules) or config.mesh.first_device:
        raise ConfigError(
            "mesh.rules with 'batch' and mesh.first_device are for one process; start a group for "
            "each replica"
        )
    if config.snapshot.path:
        raise ConfigError("snapshot.path: a group keeps no snapshots; leave it empty")
    return count // size


def _leader_worker_set(variables: Variables) -> Place:
    """One process a pod: LWS_LEADER_ADDRESS, LWS_GROUP_SIZE, LWS_WORKER_INDEX."""
    size = _number(variables, "LWS_GROUP_SIZE")
    rank = _number(variables, "LWS_WORKER_INDEX")
    leader = variables["LWS_LEADER_ADDRESS"]
    return Place((rank,), size, leader, launcher="LeaderWorkerSet")


def _slurm(variables: Variables) -> Place:
    """One process a task of `srun`; those of one node share its devices in order."""
    rank, size = _number(variables, "SLURM_PROCID"), _number(variables, "SLURM_NTASKS")
    if "SLURM_STEP_TASKS_PER_NODE" not in variables:
        raise ConfigError(
            "SLURM_STEP_TASKS_PER_NODE is not set, so this is no task of srun; start the command "
            "with srun, or say --processes, or --rank, --size and --leader"
        )
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST", "")
    counts = _tasks_per_node(variables["SLURM_STEP_TASKS_PER_NODE"])
    node = _number(variables, "SLURM_NODEID") if len(counts) > 1 else 0
    return Place(
        (rank,),
        size,
        LOOPBACK if len(counts) == 1 else first_node(nodes),
        first_here=_number(variables, "SLURM_LOCALID"),
        num_here=counts[min(node, len(counts) - 1)],
        launcher="Slurm",
    )


def first_node(nodes: str) -> str:
    """The first host of a Slurm node list: `gpu[08-11,20],cpu3` begins with gpu08."""
    found = _NODE.match(nodes)
    if found is None:
        raise ConfigError(f"SLURM_JOB_NODELIST is {nodes!r}, which names no host")
    name, ranges = found.groups()
    return name if ranges is None else name + re.split("[-,]", ranges)[0]


def _tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` is 2, 2, 2, 1."""
    counts = [
        int(count)
        for count, times in _TASKS.findall(text)
        for _ in range(int(times) if times else 1)
    ]
    if not counts:
        raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}; it must be like 2(x3),1")
    return counts


def _number(variables: Variables, name: str) -> int:
    text = variables.get(name, "")
    if not text.isdecimal():
        raise ConfigError(f"{name} is {text!r}; it must be a whole number")
    return int(text)
