"""One client, several servers: calls take turns, and one that is not ready is left out."""

import asyncio

from jaxinfer.client import Client
from tests.server.serving import running


def test_calls_take_turns_and_leave_out_who_is_not_ready():
    async def main():
        async with running() as first, running() as second:
            target = f"ipv4:{first.target},{second.target}"

            def ask(client, count):
                for number in range(count):
                    client.generate(f"prompt {number}", max_tokens=2, seed=1)

            def counts():
                return len(first.engine.submitted), len(second.engine.submitted)

            with Client(target) as client:
                await asyncio.to_thread(client.wait_ready, 30.0)
                while not all(counts()):
                    await asyncio.to_thread(ask, client, 4)
                await second.server.set_serving(False)
                before = counts()
                while counts()[0] < before[0] + 12:
                    await asyncio.to_thread(ask, client, 4)
                done = counts()
                await asyncio.to_thread(ask, client, 12)
                assert counts() == (done[0] + 12, done[1])
                await second.server.set_serving(True)
                while counts()[1] == done[1]:
                    await asyncio.to_thread(ask, client, 4)

    asyncio.run(main())
