"""`jaxinfer cluster`: one model over several processes, behind one gRPC server."""

import json
import logging
import signal
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jaxinfer import config
from jaxinfer.cli.options import COMMON, Common, Json
from jaxinfer.cli.serve import checked_settings, hello, open_door
from jaxinfer.cluster.keeper import Ended, Happened, Keeper
from jaxinfer.cluster.place import PREFIXES, Place, detect, devices_each, local
from jaxinfer.cluster.process import WRONG, Spec
from jaxinfer.cluster.secret import find_key
from jaxinfer.config import Config
from jaxinfer.errors import ConfigError, GroupError
from jaxinfer.settings import variables

if TYPE_CHECKING:
    from jaxinfer.cluster.front import Front

PORT = 50052


def cluster(
    *,
    processes: int | None = None,
    rank: int | None = None,
    size: int | None = None,
    leader: str | None = None,
    ray: int | None = None,
    as_json: Json = False,
    openai: int | None = None,
    common: Common = COMMON,
) -> None:
    """Serves one model from several processes, which start again as a group where one is lost.

    Rank 0's command has the gRPC server; it stays while the processes start again. What is not
    said is read off Slurm's variables, or LeaderWorkerSet's.

    Parameters
    ----------
    processes
        So many processes, all on this machine.
    rank
        Or: the one process of this machine, from 0 ...
    size
        ... of so many ...
    leader
        ... and the host of rank 0, as the others reach it.
    ray
        So many processes, each on a node of its own that Ray finds.
    as_json
        Says what happens as JSON objects on stdout, for scripts.
    openai
        The port of loopback where OpenAI's protocol is spoken too: server.openai_port.
    """
    settings = checked_settings(common, openai)
    if ray is not None:
        _launch_on_ray(settings, ray, (processes, rank, size, leader), common, as_json=as_json)
        return
    place = find_place(processes, rank, size, leader)
    devices_each(settings, place.size)
    logging.basicConfig(
        level=logging.INFO if common.debug else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    key = find_key(settings.cluster, place)
    run = _lead if place.has_leader else _follow
    ended = run(settings, place, key, as_json=as_json, is_debug=common.debug)
    if ended.code:
        raise (ConfigError if ended.code == WRONG else GroupError)(ended.why)


def find_place(
    processes: int | None, rank: int | None, size: int | None, leader: str | None
) -> Place:
    """The place that the flags say, or a launcher."""
    given = (rank, size, leader)
    if processes is not None:
        if any(one is not None for one in given):
            raise ConfigError("--processes is for one machine; --rank, --size, --leader for many")
        return local(processes)
    if rank is not None and size is not None and leader is not None:
        return Place((rank,), size, leader)
    if any(one is not None for one in given):
        raise ConfigError("--rank, --size and --leader go together; give all three")
    found = detect(variables(*PREFIXES))
    if found is None:
        raise ConfigError(
            "no launcher says which process this is; give --processes, or --rank, --size and "
            "--leader, or start it with srun or in a LeaderWorkerSet"
        )
    return found


def _launch_on_ray(
    settings: Config, size: int, given: Sequence[Any], common: Common, *, as_json: bool
) -> None:
    from jaxinfer.cluster import on_ray

    if any(one is not None for one in given) or settings.cluster.key_file:
        raise ConfigError("--ray says places and the key itself; leave the other flags out")
    num_devices = devices_each(settings, local(size).size)
    arguments = [*common.arguments(), *(["--json"] if as_json else [])]
    if settings.server.openai_port:
        arguments += ["--openai", str(settings.server.openai_port)]
    on_ray.launch(on_ray.find_ray(), size, num_devices, arguments)


def _lead(settings: Config, place: Place, key: bytes, *, as_json: bool, is_debug: bool) -> Ended:
    from jaxinfer.cluster.front import Front
    from jaxinfer.cluster.remote import Address

    front, ends = Front(), list[Ended]()

    def told(happened: Happened) -> None:
        if happened.event == "listening":
            front.connect(Address(place.leader, int(happened.facts["port"]), key))
        if as_json:
            _say_event(happened, keeper)

    keeper = _keeper(settings, place, key, told, is_debug=is_debug)

    def keep() -> None:
        ends.append(keeper.keep())
        front.end(ends[0].why or "the group was told to stop")

    thread = threading.Thread(target=keep, name="keeper")
    thread.start()
    try:
        if front.wait() is not None:
            _serve(front, settings, place, as_json=as_json)
    finally:
        keeper.stop()
        thread.join()
    return ends[0]


def _follow(settings: Config, place: Place, key: bytes, *, as_json: bool, is_debug: bool) -> Ended:
    def told(happened: Happened) -> None:
        if as_json:
            _say_event(happened, keeper)

    keeper = _keeper(settings, place, key, told, is_debug=is_debug)
    later = threading.Timer(settings.server.drain_grace_s, keeper.stop)
    later.daemon = True

    def end(*_: Any) -> None:
        """Launchers tell all ranks at once: rank 0 may let requests finish, and then says so."""
        if later.is_alive():
            keeper.stop()
        else:
            later.start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    return keeper.keep()


def _keeper(
    settings: Config,
    place: Place,
    key: bytes,
    told: Callable[[Happened], None],
    *,
    is_debug: bool,
) -> Keeper:
    text, limits = config.to_toml(settings), settings.cluster
    specs = [
        Spec(
            rank=rank,
            size=place.size,
            host=place.leader,
            port=limits.port or (0 if place.is_alone else PORT),
            key=key.hex(),
            settings=text,
            place=place.first_here + number,
            num_here=place.num_here or len(place.ranks),
            is_debug=is_debug,
        )
        for number, rank in enumerate(place.ranks)
    ]
    return Keeper(
        specs,
        start_limit_s=limits.start_limit_s,
        max_failed_starts=limits.max_failed_starts if place.has_leader else 0,
        told=told,
    )


def _serve(front: "Front", settings: Config, place: Place, *, as_json: bool) -> None:
    from jaxinfer.server import address

    about = front.about

    def ready(port: int) -> None:
        facts: dict[str, Any] = {
            "model": about["name"],
            "target": f"{settings.server.host}:{port}",
            "port": port,
            "admin": address.of_operators(settings.server),
            "processes": place.size,
            "load_s": about["load_s"],
            "exact_bits": about["exact_bits"],
            "config": config.digest(settings),
        }
        print(json.dumps({"event": "ready", **facts}) if as_json else hello(facts), flush=True)

    front.run(settings, ready=ready, door=open_door(settings, about["name"], as_json))


def _say_event(happened: Happened, keeper: Keeper) -> None:
    facts = {"rank": happened.rank, "pid": keeper.pids.get(happened.rank), "said": happened.event}
    print(json.dumps({"event": "rank", **facts}), flush=True)
