"""OpenAI's and Anthropic's protocols over HTTP: runs the gateway `smg` as a child of the server."""

import asyncio
import importlib
import importlib.util
import json
import logging
import secrets
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxinfer.edge_config import SecurityConfig, ServerConfig
from jaxinfer.errors import ConfigError
from jaxinfer.server.watched import check_private

HOST = "127.0.0.1"
PACKAGES = ("smg", "smg_grpc_proto")
FIRST_WAIT_S, MAX_WAIT_S = 0.5, 30.0  # between the end of a child and the next one
STEADY_S = 60.0  # a child that lived so long was well
ASK_S = 0.1  # between two looks whether it answers
ASK_TIMEOUT_S = 2.0
STOP_S = 2.0  # for last bytes, once the server is done; smg waits 5 s also where none are left
MIN_KEY_CHARS = 16

Announce = Callable[[str, str], None]
"""Hears the base URL and the key once requests are answered."""

log = logging.getLogger("jaxinfer.server")


class OpenAIDoor:
    """One gateway on loopback before one or more gRPC workers; started again where it ends."""

    def __init__(
        self, port: int, key: str, model: str, *, grace_s: float, announce: Announce
    ) -> None:
        self._port = port
        self._model = model
        self._key = key
        self._grace_s = grace_s
        self._announce = announce
        self._is_closing = self._is_announced = False
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """What clients call their base URL."""
        return f"http://{HOST}:{self._port}/v1"

    def open(self, workers: Sequence[str]) -> None:
        """Begins to keep a gateway running before these `grpc://host:port`."""
        self._keeper = asyncio.create_task(self._keep(list(workers)))

    def drain(self) -> None:
        """Takes nothing new from now on; what runs may finish within the grace."""
        self._is_closing = True
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()

    async def close(self) -> None:
        """Returns when no child is left; call it when the workers have finished what they had."""
        self.drain()
        if self._keeper is None:
            return
        if self._process is None or self._process.returncode is not None:
            self._keeper.cancel()
        await asyncio.wait([self._keeper], timeout=STOP_S)
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
        await asyncio.wait([self._keeper])

    async def _keep(self, workers: list[str]) -> None:
        loop, wait_s = asyncio.get_running_loop(), FIRST_WAIT_S
        while not self._is_closing:
            began_s = loop.time()
            self._process = await self._start(workers)
            watch = asyncio.create_task(self._tell_when_it_answers())
            code = await self._process.wait()
            watch.cancel()
            if self._is_closing:
                return
            if loop.time() - began_s > STEADY_S:
                wait_s = FIRST_WAIT_S
            log.warning(
                "the gateway of server.openai_port = %d ended with status %d; it starts again in "
                "%g s",
                self._port,
                code,
                wait_s,
            )
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, MAX_WAIT_S)

    async def _start(self, workers: list[str]) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "jaxinfer.server.openai_child"),
            stdin=asyncio.subprocess.PIPE,
            stdout=sys.stderr.fileno(),  # ours is for those who called us
        )
        assert process.stdin is not None  # it stays open for as long as this process lives
        line = json.dumps(settings_of(self._port, self._key, workers, self._grace_s))
        process.stdin.write(line.encode() + b"\n")
        return process

    async def _tell_when_it_answers(self) -> None:
        while not await asyncio.to_thread(self._answers):
            await asyncio.sleep(ASK_S)
        if self._is_announced:
            log.warning("the gateway of server.openai_port = %d answers again", self._port)
            return
        self._is_announced = True
        self._announce(self.url, self._key)

    def _answers(self) -> bool:
        """Whether it has the model's tokenizer, and so a worker."""
        request = urllib.request.Request(
            f"{self.url}/tokenize",
            data=json.dumps({"model": self._model, "prompt": "hello"}).encode(),
            headers={"authorization": f"Bearer {self._key}", "content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=ASK_TIMEOUT_S) as response:
                return response.status == 200
        except (OSError, urllib.error.URLError):
            return False


def settings_of(port: int, key: str, workers: list[str], grace_s: float) -> dict[str, Any]:
    """What the child is told: `smg`'s own names and values."""
    return {
        "host": HOST,
        "port": port,
        "worker_urls": workers,
        "api_key": key,
        "control_key": secrets.token_urlsafe(32),
        "policy": "round_robin",
        "log_level": "error",
        "prometheus_host": HOST,  # else it listens on every address of the machine
        "prometheus_port": _free_port(),
        "worker_startup_check_interval": 1,
        "health_check_interval_secs": 5,
        "shutdown_grace_period_secs": max(1, round(grace_s)),
    }


def servicer() -> ModuleType | None:
    """The module with what the gateway calls; None where its stubs are not installed."""
    if importlib.util.find_spec("smg_grpc_proto") is None:
        return None
    return importlib.import_module("jaxinfer.server.gateway")


def check(server: ServerConfig, security: SecurityConfig) -> None:
    """Raises ConfigError where the door can't open; before any other work."""
    if not server.openai_port:
        return
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"server.openai_port = {server.openai_port} needs the gateway, and {missing[0]} is not "
            "installed; run: pip install 'jaxinfer[gateway]'"
        )
    for key in ("tls_cert", "tokens"):
        if getattr(security, key):
            raise ConfigError(
                f"server.openai_port = {server.openai_port} with security.{key}: the gateway calls "
                "this server without TLS and tokens; set server.openai_port = 0, or serve OpenAI's "
                "protocol from a server on loopback without them"
            )
    read_key(security)


def read_key(security: SecurityConfig) -> str:
    """The key that clients show: the one in the file, or a new one."""
    if not security.openai_key:
        return "sk-" + secrets.token_urlsafe(32)
    path = Path(security.openai_key)
    check_private(path, "security.openai_key")
    key = path.read_text(errors="replace").strip()
    if len(key) < MIN_KEY_CHARS or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"security.openai_key = {str(path)!r} must hold one key of at least {MIN_KEY_CHARS} "
            "ASCII characters without spaces"
        )
    return key


def worker_url(host: str, port: int) -> str:
    """Where a gateway on the same machine finds a server that listens on `host`."""
    if host in ("", "0.0.0.0", "::"):
        host = "::1" if host == "::" else HOST
    return f"grpc://[{host}]:{port}" if ":" in host else f"grpc://{host}:{port}"


def curl(url: str, key: str, model: str) -> str:
    """A line that asks it something."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16}
    return (
        f"curl {url}/chat/completions -H 'Authorization: Bearer {key}' "
        f"-H 'Content-Type: application/json' -d '{json.dumps(body)}'"
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
