"""`jaxinfer admin`: what operators ask of a running server, and what they make it do."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.table import Table

from jaxinfer.cli import COMMANDS
from jaxinfer.cli.console import console
from jaxinfer.cli.options import Json
from jaxinfer.client.admin import AdminClient
from jaxinfer.config import access
from jaxinfer.config import load as load_settings
from jaxinfer.errors import ConfigError

app = App(name="admin", help=COMMANDS["admin"])
PROFILE_SPARE_S = 30.0  # a trace whose command was killed ends by itself after this much more


@Parameter(name="*")
@dataclass(frozen=True)
class Where:
    """Which server."""

    address: Annotated[str | None, Parameter(name=["--address", "-a"])] = None
    """HOST:PORT of its server.admin_port; without it the port that the environment sets."""
    token_file: Path | None = None
    """A file with a token of the scope admin, else JAXINFER_TOKEN says it."""

    def client(self) -> AdminClient:
        """The connection; ConfigError where nothing says where to."""
        token = access().get("token") if self.token_file is None else _token(self.token_file)
        return AdminClient(self.address or _usual_address(), token=token)


WHERE = Where()


@app.command
def info(*, as_json: Json = False, config: bool = False, where: Where = WHERE) -> None:
    """Says what a server is, and what it was started with.

    Parameters
    ----------
    as_json
        Prints one JSON object.
    config
        Prints its settings only, as TOML that -c reads back; secrets are left out.
    """
    with where.client() as client:
        found = client.info()
    if config:
        print(found.config_toml, end="")
        return
    if as_json:
        print(json.dumps(asdict(found)))
        return
    _show(
        f"{found.model}, served by jaxinfer {found.version}",
        device=found.device,
        **{"up for": _time(found.uptime_s)},
        programs=", ".join(found.programs),
        **{"compiled since the start": found.num_compiles_after_start},
        **{"promises kept": "\n".join(found.broken_promises) or "all"},
    )


@app.command
def load(*, as_json: Json = False, where: Where = WHERE) -> None:
    """Says what a server holds now.

    Parameters
    ----------
    as_json
        Prints one JSON object.
    """
    with where.client() as client:
        found = client.load()
    if as_json:
        print(json.dumps(asdict(found)))
        return
    state = "draining" if found.is_draining else "serving" if found.is_serving else "not serving"
    if found.stalled_s:
        state += f", no step has ended for {found.stalled_s:.1f} s"
    pages = f"{found.num_free_pages} of {found.num_pages} free"
    _show(
        state,
        running=f"{found.num_running} of {found.num_slots} slots",
        waiting=found.num_waiting,
        pages=f"{pages}, {found.num_cached_pages} of these with cached prefixes",
        steps=found.num_steps,
        **{"output tokens": found.num_output_tokens},
        preemptions=found.num_preemptions,
        **{"live requests": "\n".join(found.live_request_ids) or "none"},
    )


@app.command
def abort(
    *request_ids: str,
    everything: Annotated[bool, Parameter(name="--all")] = False,
    as_json: Json = False,
    where: Where = WHERE,
) -> None:
    """Ends requests; their clients get the status CANCELLED.

    Parameters
    ----------
    request_ids
        Those to end, as `jaxinfer admin load` shows them.
    everything
        Ends all that are live.
    as_json
        Prints one JSON object.
    """
    with where.client() as client:
        found = client.abort(request_ids, everything=everything)
    late = [name for name in request_ids if name not in found]
    text = f"ended {len(found)}" + (f"; not live: {', '.join(late)}" if late else "")
    _say(text, {"aborted": found, "not_live": late}, as_json=as_json)


@app.command
def drain(*, wait_s: float = 0.0, as_json: Json = False, where: Where = WHERE) -> int:
    """Has a server take nothing new, while what runs goes on; exits with 1 where some is left.

    Parameters
    ----------
    wait_s
        Seconds to wait for what runs; 0 only asks, and is always fine.
    as_json
        Prints one JSON object.
    """
    with where.client() as client:
        num_live = client.drain(wait_s)
    _say(f"draining; {num_live} requests still run", {"num_live": num_live}, as_json=as_json)
    return int(bool(wait_s and num_live))


@app.command
def resume(*, as_json: Json = False, where: Where = WHERE) -> None:
    """Has a server take requests again after a drain.

    Parameters
    ----------
    as_json
        Prints one JSON object.
    """
    with where.client() as client:
        client.resume()
    _say("takes requests again", {"resumed": True}, as_json=as_json)


@app.command
def flush(*, as_json: Json = False, where: Where = WHERE) -> None:
    """Forgets every cached prefix.

    Parameters
    ----------
    as_json
        Prints one JSON object.
    """
    with where.client() as client:
        num_pages = client.flush()
    _say(f"{num_pages} pages forgotten", {"num_pages": num_pages}, as_json=as_json)


@app.command
def profile(*, seconds: float = 5.0, as_json: Json = False, where: Where = WHERE) -> None:
    """Records a trace of the device while the server works; TensorBoard and Perfetto read it.

    Parameters
    ----------
    seconds
        How long; Ctrl-C ends it earlier.
    as_json
        Prints one JSON object.
    """
    with where.client() as client:
        client.start_profile(seconds + PROFILE_SPARE_S)
        try:
            time.sleep(seconds)
        finally:
            folder = client.stop_profile()
    _say(f"the trace is in {folder}", {"folder": folder}, as_json=as_json)


@app.command
def rotate(*, as_json: Json = False, where: Where = WHERE) -> None:
    """Closes the journal's segment, so that it can be copied and replayed.

    Parameters
    ----------
    as_json
        Prints one JSON object.
    """
    with where.client() as client:
        path = client.rotate_journal()
    _say(f"complete now: {path}", {"path": path}, as_json=as_json)


def _say(text: str, facts: dict[str, Any], *, as_json: bool) -> None:
    print(json.dumps(facts) if as_json else text)


def _show(title: str, **rows: object) -> None:
    table = Table("", "", title=title, title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, str(value))
    console().print(table, highlight=False, markup=False)


def _time(seconds: float) -> str:
    minutes, _ = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {int(seconds) % 60} s"


def _usual_address() -> str:
    port = load_settings().server.admin_port
    if not port:
        raise ConfigError(
            "which server? give --address 127.0.0.1:PORT, with the port that it was started with "
            "as server.admin_port"
        )
    return f"127.0.0.1:{port}"


def _token(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        raise ConfigError(f"--token-file {path} can't be read: {error.strerror}") from None
