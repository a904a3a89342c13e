"""The operators' port with the real engine on a tiny model."""

import asyncio
import functools
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from jaxinfer import recording
from jaxinfer.client import Client
from jaxinfer.client.admin import AdminClient
from jaxinfer.config import Config, JournalConfig, override, to_toml
from jaxinfer.edge_config import ServerConfig
from jaxinfer.host import segments
from jaxinfer.host.rehearsal import Rehearsal, compare
from jaxinfer.host.request import JAXINFER_DEFAULTS
from jaxinfer.runner import EngineThread
from jaxinfer.server import app
from jaxinfer.server.facts import gather
from jaxinfer.server.served import ServedModel
from tests import tiny
from tests.server.fake_engine import FakeTokenizer
from tests.server.serving import free_port


@pytest.fixture(scope="module")
def engine():
    """With two programs and no self-test: what operators do is not a matter of bits."""
    return tiny.make_engine(prefill_chunks=(16,), decode_rows=(8,), bits="fast")


def test_secrets_stay_out_of_what_it_says(engine):
    config = override(Config(), "server.prefix_salt=hush", "engine.num_slots=3")
    found = gather(config, engine)
    assert "hush" not in found.config_toml and "num_slots = 3" in found.config_toml
    assert found.device and "decode" in " ".join(found.programs)
    assert to_toml(config) != found.config_toml


def test_a_real_engine_is_flushed_rotated_and_traced_while_it_serves(engine, tmp_path, caplog):
    config = replace(Config(), journal=JournalConfig(folder=str(tmp_path / "journal")))
    engine.journal = recording.open_journal(config, engine, "tiny")

    async def main():
        port = free_port()
        model = ServedModel("tiny", tiny.MODEL, FakeTokenizer(), engine.limits, JAXINFER_DEFAULTS)
        edge = ServerConfig(port=0, admin_port=port)
        make = functools.partial(EngineThread, engine)
        server = app.Server(model, make, edge, facts=gather(config, engine))
        target = f"127.0.0.1:{await server.start()}"
        await server.set_serving(True)
        with AdminClient(f"127.0.0.1:{port}") as admin:
            await asyncio.to_thread(work, target, admin)
        await server.stop(5.0)

    def work(target: str, admin: AdminClient) -> None:
        ask = {"token_ids": [5] * 100, "temperature": 0.0, "max_tokens": 40, "ignore_eos": True}
        with Client(target) as client:
            first = admin.rotate_journal()  # idle: a segment without a step but this one
            folder = Path(admin.start_profile(30.0))
            answer = client.generate(**ask)
            assert admin.stop_profile() == str(folder)
            assert list(folder.rglob("*.xplane.pb"))
            cached = admin.load().num_cached_pages
            assert cached >= 5  # 100 tokens of prompt, 16 to a page
            assert client.generate(**ask).usage.num_cached_tokens > 0
            assert admin.flush() == cached
            assert admin.load().num_cached_pages == 0
            assert client.generate(**ask).usage.num_cached_tokens == 0
            stream = client.stream(**(ask | {"max_tokens": 120}))
            next(stream)
            second = admin.rotate_journal()  # in the middle of an answer
            done = list(stream)[-1].completion
            assert done.token_ids[:40] == answer.token_ids
            third = admin.rotate_journal()
            assert len({first, second, third}) == 3
        for path in map(Path, (first, second, third)):
            segment = segments.read(path)
            rehearsal = Rehearsal(segment)
            for record in segment.records:
                assert compare(record, rehearsal.step(record)) is None
        assert any(record.get("got") for record in segments.read(Path(third)).records)

    with caplog.at_level(logging.ERROR):
        asyncio.run(main())
    assert not caplog.records
    assert engine.stats().num_compiles_after_start == 0
