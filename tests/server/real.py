"""The server with the real engine on a tiny model, for one scenario."""

import asyncio
from functools import partial

from jaxinfer.client import AsyncClient
from jaxinfer.edge_config import ServerConfig
from jaxinfer.host.request import JAXINFER_DEFAULTS
from jaxinfer.runner import EngineThread
from jaxinfer.server.app import Server
from jaxinfer.server.served import ServedModel
from tests import tiny
from tests.server.fake_engine import FakeTokenizer


def serve(engine, scenario, restored=()):
    """Runs `scenario(client)` against a server with this engine."""

    async def run():
        tokenizer = FakeTokenizer()
        served = ServedModel("tiny", tiny.MODEL, tokenizer, engine.limits, JAXINFER_DEFAULTS)
        thread = partial(EngineThread, engine)
        server = Server(served, thread, ServerConfig(port=0), restored=restored)
        port = await server.start()
        await server.set_serving(True)
        client = AsyncClient(f"127.0.0.1:{port}")
        try:
            return await scenario(client)
        finally:
            await client.close()
            await server.stop(2.0)

    return asyncio.run(run())
