"""`jaxinfer serve`: one model behind gRPC, until it is told to stop."""

import json
import logging
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from jaxinfer import config
from jaxinfer.cli import progress
from jaxinfer.cli.options import COMMON, Common, Json
from jaxinfer.errors import ConfigError


def serve(
    *,
    as_json: Json = False,
    stats_json: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    common: Common = COMMON,
) -> None:
    """Serves a model over gRPC until SIGTERM or Ctrl-C; running requests may finish first.

    Parameters
    ----------
    as_json
        Says that it is ready with one JSON object on stdout, for scripts.
    stats_json
        Where to write the engine's counts at the end: a file, or - for stdout.
    """
    settings = common.load()
    _check_writable(stats_json)
    logging.basicConfig(
        level=logging.INFO if common.debug else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    from jaxinfer.server import app

    app.check_address(settings.server)
    from jaxinfer import recording
    from jaxinfer.llm import load_engine
    from jaxinfer.server.served import ServedModel

    started_s = time.monotonic()
    with progress.shown() as show:
        loaded = load_engine(settings, progress=show)
    load_s = time.monotonic() - started_s
    served = ServedModel(
        name=loaded.name,
        config=loaded.model,
        tokenizer=loaded.tokenizer,
        limits=loaded.engine.limits,
        defaults=loaded.defaults,
    )

    resumed = recording.resume(settings.snapshot, loaded.engine, loaded.name)

    def ready(port: int) -> None:
        facts = {
            "model": loaded.name,
            "target": f"{settings.server.host}:{port}",
            "port": port,
            "num_programs": loaded.engine.stats().num_programs,
            "load_s": round(load_s, 3),
            "num_restored": len(resumed.requests),
            "exact_bits": loaded.engine.self_test.is_exact,
            "config": config.digest(settings),
        }
        print(json.dumps({"event": "ready", **facts}) if as_json else hello(facts), flush=True)

    try:
        app.run(
            served,
            resumed.make_thread,
            settings.server,
            ready=ready,
            restored=resumed.requests,
        )
    finally:
        write_stats(asdict(loaded.engine.stats()), stats_json)


def hello(facts: dict[str, Any]) -> str:
    """The line that says where the server is and how to call it."""
    call = (
        "from jaxinfer.client import Client; "
        f'print(Client("{facts["target"]}").generate("The sky is", max_tokens=16).text)'
    )
    return f"{facts['model']} on {facts['target']}; try: python -c {shlex.quote(call)}"


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
