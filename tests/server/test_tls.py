"""TLS and mTLS with real certificates, their renewal, and addresses that ask for them."""

import asyncio
import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import trustme

from jaxinfer.bench.load import events
from jaxinfer.cli import run
from jaxinfer.cli.options import Common
from jaxinfer.cli.serve import serve
from jaxinfer.client import AsyncClient, Client
from jaxinfer.edge_config import SecurityConfig, ServerConfig
from jaxinfer.errors import ConfigError, JaxinferError, Unauthenticated, Unreachable
from jaxinfer.server import exposure, tls, tokens
from jaxinfer.v1 import admin_pb2
from tests.server.fake_engine import expected_text
from tests.server.serving import free_port, running, running_in_thread, until


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def stranger():
    return trustme.CA()


def issue(folder: Path, authority: trustme.CA, name: str = "server") -> tuple[str, str]:
    """Writes a certificate for loopback and its key, as a renewal would: each file at once."""
    certificate = authority.issue_cert("localhost", "127.0.0.1", common_name=name)
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    for path, text in (
        (cert, b"".join(blob.bytes() for blob in certificate.cert_chain_pems)),
        (key, certificate.private_key_pem.bytes()),
    ):
        fresh = path.with_suffix(".new")
        fresh.touch(0o600)
        fresh.write_bytes(text)
        os.replace(fresh, path)
    return str(cert), str(key)


def write_ca(folder: Path, authority: trustme.CA, name: str = "ca.pem") -> str:
    authority.cert_pem.write_to_path(folder / name)
    return str(folder / name)


@pytest.fixture
def security(tmp_path, authority):
    cert, key = issue(tmp_path, authority)
    return SecurityConfig(tls_cert=cert, tls_key=key)


@pytest.fixture
def ca(tmp_path, authority):
    return write_ca(tmp_path, authority)


def with_tokens(security: SecurityConfig, folder: Path) -> tuple[SecurityConfig, str]:
    token = tokens.new_token()
    entry = tokens.entry_of(token, tenant="t", scopes=("generate", "read"))
    tokens.append(folder / "tokens.toml", "t", entry)
    fields = {name: getattr(security, name) for name in ("tls_cert", "tls_key", "tls_client_ca")}
    return SecurityConfig(**fields, tokens=str(folder / "tokens.toml")), token


def test_clients_that_trust_the_authority_are_served_and_no_others(
    security, ca, stranger, tmp_path
):
    other = write_ca(tmp_path, stranger, "other.pem")

    async def main():
        async with running(security=security) as server:
            async with AsyncClient(server.target, tls_ca=ca) as client:
                assert (await client.generate("a", seed=0)).text == expected_text("a", 8)
                events = [event async for event in client.stream("a", seed=0)]
                assert events[-1].completion.text == expected_text("a", 8)
            for options in ({}, {"tls": True}, {"tls_ca": other}):
                async with AsyncClient(server.target, timeout_s=2.0, **options) as client:
                    with pytest.raises(Unreachable):
                        await client.models()

    asyncio.run(main())


def test_tokens_travel_over_tls_with_both_clients(security, ca, tmp_path):
    security, token = with_tokens(security, tmp_path)
    with running_in_thread(security=security) as server:
        with Client(server.target, tls_ca=ca, token=token) as client:
            client.wait_ready(5.0)
            assert client.generate("a", seed=0).text == expected_text("a", 8)
            assert client.model().name == client.models()[0].name
        with Client(server.target, tls_ca=ca) as client, pytest.raises(Unauthenticated):
            client.models()


def test_with_a_client_authority_only_its_clients_are_served(
    security, ca, authority, stranger, tmp_path
):
    security = SecurityConfig(security.tls_cert, security.tls_key, tls_client_ca=ca)
    theirs = dict(zip(("tls_cert", "tls_key"), issue(tmp_path, authority, "client"), strict=True))
    other = dict(zip(("tls_cert", "tls_key"), issue(tmp_path, stranger, "other"), strict=True))

    async def main():
        async with running(security=security) as server:
            async with AsyncClient(server.target, tls_ca=ca, **theirs) as client:
                assert (await client.generate("a", seed=0)).text == expected_text("a", 8)
            for options in ({}, other):
                async with AsyncClient(
                    server.target, tls_ca=ca, timeout_s=2.0, **options
                ) as client:
                    with pytest.raises(Unreachable):
                        await client.models()

    asyncio.run(main())


async def shown(port: int, ca: bytes) -> bool:
    """Whether a new connection that trusts this authority gets through."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    secure = grpc.ssl_channel_credentials(ca)
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", secure, options=options) as wire:
        try:
            async with asyncio.timeout(2.0):
                await wire.channel_ready()
        except TimeoutError:
            return False
    return True


def test_a_renewed_certificate_is_shown_without_a_restart_and_a_broken_one_is_not(
    security, authority, stranger, tmp_path, caplog
):
    old, new = authority.cert_pem.bytes(), stranger.cert_pem.bytes()

    async def main():
        server = grpc.aio.server()
        credentials = tls.credentials(security, every_s=0.0)
        assert credentials is not None
        port = server.add_secure_port("127.0.0.1:0", credentials)
        await server.start()
        try:
            assert (await shown(port, old), await shown(port, new)) == (True, False)
            key = Path(security.tls_key).read_bytes()
            Path(security.tls_key).write_bytes(b"half a ke")
            assert await shown(port, old)
            assert "a changed file is not used" in caplog.text
            Path(security.tls_key).write_bytes(key)
            assert await shown(port, old)
            issue(tmp_path, stranger)
            assert (await shown(port, old), await shown(port, new)) == (False, True)
        finally:
            await server.stop(0)

    with caplog.at_level(logging.WARNING, logger="jaxinfer.server"):
        asyncio.run(main())


def test_calls_under_way_outlive_a_renewal(security, ca, authority, tmp_path):
    async def main():
        async with (
            running(security=security, step_s=0.002) as server,
            AsyncClient(server.target, tls_ca=ca) as client,
        ):
            stream = client.stream("a", seed=0, max_tokens=300)
            await anext(aiter(stream))
            issue(tmp_path, authority)
            events = [event async for event in stream]
            assert events[-1].completion.text == expected_text("a", 300)
            await until(lambda: not server.server._hub.live)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tls_key": ""}, "security.tls_cert is set without security.tls_key"),
        ({"tls_cert": ""}, "security.tls_key is set without security.tls_cert"),
        ({"tls_cert": "", "tls_key": "", "tls_client_ca": "x"}, "without security.tls_cert"),
        ({"tls_cert": "/no/such.pem"}, "security.tls_cert = '/no/such.pem' can't be read"),
        ({"tls_client_ca": "/no/ca.pem"}, "security.tls_client_ca = '/no/ca.pem' can't be read"),
        ({"tokens": "/no/tokens.toml"}, "security.tokens = '/no/tokens.toml' can't be read"),
    ],
)
def test_settings_that_lack_something_are_config_errors(security, changes, match):
    files = {"tls_cert": security.tls_cert, "tls_key": security.tls_key}
    with pytest.raises(ConfigError, match=match):
        exposure.check(ServerConfig(), SecurityConfig(**files | changes))


def test_files_that_do_not_fit_are_config_errors(security, authority, tmp_path):
    _, other = issue(tmp_path, authority, "other")
    mixed = SecurityConfig(tls_cert=security.tls_cert, tls_key=other)
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("no PEM é")
    for wrong, match in (
        (mixed, "tls_cert.*tls_key.*its key"),
        (SecurityConfig(str(garbage), security.tls_key), "tls_cert"),
        (SecurityConfig(security.tls_cert, security.tls_key, str(garbage)), "tls_client_ca"),
    ):
        with pytest.raises(ConfigError, match=match):
            tls.read(wrong)
    Path(security.tls_key).chmod(0o644)
    with pytest.raises(ConfigError, match="security.tls_key.*mode 644.*chmod 600"):
        tls.read(security)


def test_a_key_with_a_password_is_a_config_error_and_asks_nobody(security, tmp_path):
    from cryptography.hazmat.primitives import serialization as form

    path = tmp_path / "locked.key"
    key = form.load_pem_private_key(Path(security.tls_key).read_bytes(), None)
    path.touch(0o600)
    path.write_bytes(
        key.private_bytes(
            form.Encoding.PEM, form.PrivateFormat.PKCS8, form.BestAvailableEncryption(b"secret")
        )
    )
    with pytest.raises(ConfigError, match="without a password"):
        tls.read(SecurityConfig(security.tls_cert, str(path)))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
@pytest.mark.parametrize(
    ("has_tls", "has_tokens", "missing"),
    [
        (False, False, "security.tls_cert, security.tls_key and security.tokens are not set"),
        (True, False, "security.tokens is not set"),
        (False, True, "security.tls_cert and security.tls_key are not set"),
    ],
)
def test_beyond_loopback_needs_tls_and_tokens(
    host, has_tls, has_tokens, missing, security, tmp_path
):
    full, _ = with_tokens(security, tmp_path)
    given = SecurityConfig(
        tls_cert=full.tls_cert if has_tls else "",
        tls_key=full.tls_key if has_tls else "",
        tokens=full.tokens if has_tokens else "",
    )
    server = ServerConfig(host=host, port=0)
    with pytest.raises(ConfigError, match=missing) as caught:
        exposure.check(server, given)
    assert "security.allow_insecure = true" in str(caught.value)
    exposure.check(server, full)


def test_beyond_loopback_without_either_needs_to_be_said(caplog):
    with caplog.at_level(logging.WARNING, logger="jaxinfer.server"):
        exposure.check(ServerConfig(host="0.0.0.0"), SecurityConfig(allow_insecure=True))
    assert "allow_insecure is set" in caplog.text


def test_the_metrics_port_counts_as_a_way_in(security, tmp_path):
    full, _ = with_tokens(security, tmp_path)
    with pytest.raises(ConfigError, match=r"server.metrics_port = 9090.*0\.0\.0\.0"):
        exposure.check(ServerConfig(host="0.0.0.0", metrics_port=9090), full)
    exposure.check(ServerConfig(metrics_port=9090), SecurityConfig())


def test_a_name_is_loopback_only_where_all_of_its_addresses_are(monkeypatch):
    assert exposure.is_loopback("127.0.0.1") and exposure.is_loopback("localhost")
    assert exposure.is_loopback("127.8.8.8") and exposure.is_loopback("::1")
    assert not exposure.is_loopback("no.such.host.invalid")

    def both(*_, **__):
        return [(2, 1, 6, "", ("127.0.0.1", 0)), (2, 1, 6, "", ("203.0.113.7", 0))]

    monkeypatch.setattr(exposure.socket, "getaddrinfo", both)
    assert not exposure.is_loopback("two.faced")


def test_serve_refuses_an_open_address_before_it_looks_for_a_model(tmp_path):
    missing = str(tmp_path / "no model")
    options = ("server.port=0", "server.host=0.0.0.0")
    with pytest.raises(ConfigError, match="security.tokens"):
        serve(common=Common(model=missing, overrides=options))
    with pytest.raises(JaxinferError, match="no model") as caught:
        serve(common=Common(model=missing, overrides=(*options, "security.allow_insecure=true")))
    assert "security" not in str(caught.value)


def test_the_server_itself_refuses_an_open_address():
    async def main():
        with pytest.raises(ConfigError, match="can be reached from other machines"):
            async with running(config=ServerConfig(host="0.0.0.0", port=0)):
                pass

    asyncio.run(main())


def test_a_folder_of_files_that_is_swapped_at_once_is_read_again(security, authority, tmp_path):
    """As mounted secrets are renewed: the folder is a link, and the link is replaced."""
    first, second = tmp_path / "1", tmp_path / "2"
    for folder in (first, second):
        folder.mkdir()
        issue(folder, authority)
    link = tmp_path / "now"
    link.symlink_to(first)
    mounted = SecurityConfig(str(link / "server.pem"), str(link / "server.key"))
    before = tls.read(mounted)
    fresh = tmp_path / "fresh"
    fresh.symlink_to(second)
    os.replace(fresh, link)
    assert tls.read(mounted) != before
    shutil.rmtree(first)
    assert tls.read(mounted).cert == (second / "server.pem").read_bytes()


def test_commands_show_who_asks_by_the_environment(security, ca, tmp_path, monkeypatch, capsys):
    path, token = tmp_path / "tokens.toml", tokens.new_token()
    scopes = ("generate", "read", "admin")
    tokens.append(path, "all", tokens.entry_of(token, tenant="a", scopes=scopes))
    config = ServerConfig(port=0, admin_port=free_port())
    told = [admin_pb2.Happening(kind="decode", seconds=0.5, text="5 steps")]
    safe = replace(security, tokens=str(path))
    with running_in_thread(config=config, security=safe, explain=lambda _: told) as server:
        bench = ["bench", "serve", "--target", server.target.replace("127.0.0.1", "localhost")]
        bench += ["--requests", "2", "--concurrency", "1", "--warmup", "0", "--json"]
        bench += ["--prompt", "4", "--output", "4"]
        explain = ["explain", "a/r", "--address", f"127.0.0.1:{config.admin_port}"]
        assert run([*bench, "--tls-ca", ca]) != 0 and run(explain) != 0
        assert capsys.readouterr().err.count("token") >= 2
        monkeypatch.setenv("JAXINFER_TOKEN", token)
        monkeypatch.setenv("JAXINFER_TLS_CA", ca)
        assert run(explain) == 0 and "5 steps" in capsys.readouterr().out
        assert run(bench) == 0
        found = json.loads(capsys.readouterr().out)
    assert [one["status"] for one in found["requests"]] == [events.OK] * 2, found


def test_connections_of_other_machines_are_bound_closer():
    far, near = ServerConfig(host="0.0.0.0"), ServerConfig()
    assert exposure.stream_limits(far) == (128, True)
    assert exposure.stream_limits(near) == (1024, False)
    chosen = replace(far, max_streams=7, refuse_resets="off")
    assert exposure.stream_limits(chosen) == (7, False)
    assert exposure.stream_limits(replace(near, refuse_resets="on")) == (1024, True)
