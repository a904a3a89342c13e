"""`jaxinfer serve`: one model behind gRPC, until it is told to stop."""

import json
import logging
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from jaxinfer import config
from jaxinfer.cli import progress
from jaxinfer.cli.options import COMMON, Common, Json
from jaxinfer.errors import ConfigError

if TYPE_CHECKING:
    from jaxinfer.llm import LoadedEngine
    from jaxinfer.server.openai_door import OpenAIDoor


def serve(
    *,
    as_json: Json = False,
    stats_json: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    openai: int | None = None,
    common: Common = COMMON,
) -> None:
    """Serves a model over gRPC until SIGTERM or Ctrl-C; running requests may finish first.

    Parameters
    ----------
    as_json
        Says that it is ready with one JSON object on stdout, for scripts.
    stats_json
        Where to write the engine's counts at the end: a file, or - for stdout.
    openai
        The port of loopback where OpenAI's protocol is spoken too: server.openai_port.
    """
    _check_writable(stats_json)
    settings = checked_settings(common, openai)
    logging.basicConfig(
        level=logging.INFO if common.debug else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    from jaxinfer.llm import load_replicas
    from jaxinfer.replicas import sum_of

    started_s = time.monotonic()
    with progress.shown() as show:
        loaded = load_replicas(settings, progress=show)
    try:
        _serve(settings, loaded, load_s=time.monotonic() - started_s, as_json=as_json)
    finally:
        write_stats(asdict(sum_of([one.engine.stats() for one in loaded])), stats_json)


def checked_settings(common: Common, openai: int | None) -> config.Config:
    """The settings, once it is certain that a server can listen and be safe with them."""
    settings = common.load()
    if openai is not None:
        settings = replace(settings, server=replace(settings.server, openai_port=openai))
    from jaxinfer.server import app, exposure, openai_door, sight

    app.check_address(settings.server)
    exposure.check(settings.server, settings.security)
    openai_door.check(settings.server, settings.security)
    sight.check(settings.server)
    return settings


def _serve(
    settings: config.Config, replicas: Sequence["LoadedEngine"], *, load_s: float, as_json: bool
) -> None:
    from jaxinfer.replicas import resume
    from jaxinfer.server import address, app
    from jaxinfer.server.facts import gather
    from jaxinfer.server.served import ServedModel
    from jaxinfer.server.timeline import Timeline, explainer, total

    loaded, engines = replicas[0], [one.engine for one in replicas]
    engine, timelines = loaded.engine, [Timeline(one.config) for one in engines]
    for one, timeline in zip(engines, timelines, strict=True):
        one.observer = timeline
    resumed = resume(settings.snapshot, engines, loaded.name)

    def ready(port: int) -> None:
        facts = {
            "model": loaded.name,
            "target": f"{settings.server.host}:{port}",
            "port": port,
            "admin": address.of_operators(settings.server),
            "num_programs": sum(one.stats().num_programs for one in engines),
            "num_replicas": len(engines),
            "load_s": round(load_s, 3),
            "num_restored": len(resumed.requests),
            "exact_bits": all(one.self_test.is_exact for one in engines),
            "config": config.digest(settings),
        }
        print(json.dumps({"event": "ready", **facts}) if as_json else hello(facts), flush=True)

    app.run(
        ServedModel(
            name=loaded.name,
            config=loaded.model,
            tokenizer=loaded.tokenizer,
            limits=engine.limits,
            defaults=loaded.defaults,
            text=loaded.tokenizer.assets,
            line=len(engines) * (settings.engine.num_slots + settings.engine.max_waiting),
        ),
        resumed.make_engine,
        settings.server,
        security=settings.security,
        ready=ready,
        restored=resumed.requests,
        facts=gather(settings, *engines),
        explain=explainer(*timelines),
        steps=lambda: total(timeline.counts for timeline in timelines),
        door=open_door(settings, loaded.name, as_json),
    )


def open_door(settings: config.Config, model: str, as_json: bool) -> "OpenAIDoor | None":
    if not settings.server.openai_port:
        return None
    from jaxinfer.server import openai_door

    def announce(url: str, key: str) -> None:
        line = openai_door.curl(url, key, model)
        event = {"event": "openai", "url": url, "key": key, "curl": line}
        print(json.dumps(event) if as_json else f"OpenAI's protocol: {line}", flush=True)

    return openai_door.OpenAIDoor(
        settings.server.openai_port,
        openai_door.read_key(settings.security),
        model,
        grace_s=settings.server.drain_grace_s,
        announce=announce,
    )


def hello(facts: dict[str, Any]) -> str:
    """The line that says where the server is and how to call it."""
    call = (
        "from jaxinfer.client import Client; "
        f'print(Client("{facts["target"]}").generate("The sky is", max_tokens=16).text)'
    )
    line = f"{facts['model']} on {facts['target']}; try: python -c {shlex.quote(call)}"
    admin = facts.get("admin")
    return line + (f"\noperators: jaxinfer admin info --address {admin}" if admin else "")


def write_stats(stats: dict[str, Any], where: str | None) -> None:
    """One JSON object with the engine's counts, where asked for."""
    if where is None:
        return
    line = json.dumps({"event": "stats", **stats}) + "\n"
    if where == "-":
        sys.stdout.write(line)
        sys.stdout.flush()
    else:
        Path(where).write_text(line)


def _check_writable(where: str | None) -> None:
    """Finds out before the model is loaded, not after it has served."""
    if where not in (None, "-") and not Path(where).parent.is_dir():
        raise ConfigError(f"--stats-json {where}: there is no folder {Path(where).parent}")
