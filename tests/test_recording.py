"""What is live outlives its process: snapshots are whole, small, and go on exactly."""

import json
import time
from dataclasses import replace

import pytest

from jaxinfer import recording
from jaxinfer.engine import Engine
from jaxinfer.engine_config import CacheConfig
from jaxinfer.errors import DuplicateRequest, SnapshotRefused
from jaxinfer.host import snapshot as snapshots
from jaxinfer.host.request import FinishReason
from jaxinfer.host.snapshot import Saved, Snapshot
from jaxinfer.runner import EngineThread
from tests import tiny
from tests.bits import world

POOL = CacheConfig(page_size=8, num_pages=72)
CONFIG = world.make_config("float32", num_slots=4, decode_rows=(), cache=POOL)


@pytest.fixture(scope="module")
def store():
    return tiny.store()


@pytest.fixture
def build(store):
    params = tiny.params("float32", world.MODEL)
    return lambda: Engine(params, world.MODEL, tiny.TokenText(), CONFIG, store=store)


REQUESTS = world.make_requests(12, seed=5)
SAVED = Snapshot(
    tuple(
        Saved(
            replace(request, priority=at, salt="s", deadline_s=7.5), (1, 2, at), (-0.1, -1e-9, 0.0)
        )
        for at, request in enumerate(REQUESTS)
    ),
    "model",
)


def as_f32(saved: Snapshot) -> list:
    return [[float(f"{p:.6g}") for p in one.logprobs] for one in saved.requests]


def test_a_snapshot_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "live"
    assert snapshots.read(path) is None
    snapshots.write(SAVED, path)
    found = snapshots.read(path)
    assert [one[:2] for one in found.requests] == [one[:2] for one in SAVED.requests]
    assert found.model == "model" and as_f32(found) == as_f32(SAVED)
    assert [file.name for file in tmp_path.iterdir()] == ["live"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_damaged_or_newer_snapshot_is_refused(tmp_path):
    path = tmp_path / "live"
    snapshots.write(SAVED, path)
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole.replace(b"prompt", b"prompd"), b"", b"x y"):
        path.write_bytes(damaged)
        with pytest.raises(SnapshotRefused, match="damaged"):
            snapshots.read(path)
    text = json.dumps({"snapshot": 2}).encode()
    path.write_bytes(b"%08x %s\n" % (snapshots.zlib.crc32(text), text))
    with pytest.raises(SnapshotRefused, match="has format 2, this is 1"):
        snapshots.read(path)


def test_one_that_does_not_fit_is_put_aside_and_the_start_goes_on(tmp_path, build, caplog):
    engine = build()
    path = tmp_path / "live"
    assert recording.restore(path, engine, "tiny") == ()
    too_long = replace(REQUESTS[0], prompt=(1,) * 500)
    mine = recording.identity(engine.model, "tiny")
    for bad in (SAVED, Snapshot((Saved(too_long, (), ()),), mine)):
        snapshots.write(bad, path)
        assert recording.restore(path, engine, "tiny") == ()
        assert not path.exists() and (tmp_path / "live.refused").exists()
        assert "nothing was restored" in caplog.messages[-1]
        assert not engine.has_work
    path.write_bytes(b"half")
    assert recording.restore(path, engine, "tiny") == () and not engine.has_work


def answers(engine, outputs=()):
    """What each request has got: ids, log probabilities, text, and why it ended."""
    found = {}
    outputs = list(outputs)
    while engine.has_work:
        outputs += engine.step()
    for one in outputs:
        ids, logprobs, text, _ = found.get(one.request_id, ((), (), "", None))
        found[one.request_id] = (
            ids + one.token_ids,
            logprobs + one.logprobs,
            text + one.text,
            one.finish_reason,
        )
    return found


@pytest.mark.parametrize("num_steps", [0, 1, 2, 7, 20])
def test_another_engine_goes_on_exactly(tmp_path, build, num_steps):
    whole = build()
    for request in REQUESTS:
        whole.submit(request)
    wanted = answers(whole)
    first, outputs = build(), []
    for request in REQUESTS:
        first.submit(replace(request, deadline_s=1e9 + first._clock()))
    for _ in range(num_steps):
        outputs += first.step()
    snapshots.write(first.snapshot()._replace(model="m"), tmp_path / "live")
    ended = {one.request_id for one in outputs if one.finish_reason is not None}
    second = build()
    restored = second.restore(snapshots.read(tmp_path / "live"))
    assert {request.request_id for request in restored} == {*wanted} - ended
    assert all(request.deadline_s is None for request in restored)
    with pytest.raises(DuplicateRequest):
        second.submit(restored[0])
    found = answers(second)
    assert {name: wanted[name] for name in found} == found
    assert {*found} == {*wanted} - ended


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def test_a_thread_keeps_what_is_live_and_forgets_what_has_ended(tmp_path, build):
    engine, outputs, path = build(), [], tmp_path / "live"
    keeper = recording.Keeper(engine.snapshot, path, model="m", interval_s=3600.0, clock=Clock())
    thread = EngineThread(engine, outputs.extend, keeper=keeper)
    thread.start()
    thread.submit(REQUESTS[0])
    assert thread.drain(60.0)
    for _ in range(1000):
        found = snapshots.read(path)
        if found is not None and not found.requests:
            break
        time.sleep(0.01)
    assert found is not None and found.requests == (), "an idle engine has nothing to keep"
    thread.stop()


def test_what_is_live_at_the_end_goes_on_in_another_process(tmp_path, build):
    engine, outputs, path = build(), [], tmp_path / "live"
    name = recording.identity(engine.model, "tiny")
    keeper = recording.Keeper(engine.snapshot, path, model=name, interval_s=1e-6)
    thread = EngineThread(engine, outputs.extend, keeper=keeper)
    endless = replace(REQUESTS[0].sampling, max_tokens=200)
    thread.start()
    thread.submit(replace(REQUESTS[0], sampling=endless))
    while not outputs:
        time.sleep(0.001)
    thread.stop()
    told = answers(build(), outputs)[REQUESTS[0].request_id]
    assert told[3] is FinishReason.CANCELLED
    again = build()
    restored = recording.restore(path, again, "tiny")
    assert [request.request_id for request in restored] == [REQUESTS[0].request_id]
    ids, logprobs, text, reason = answers(again)[REQUESTS[0].request_id]
    assert reason is FinishReason.LENGTH and len(ids) == 200
    assert told[:3] == (ids[: len(told[0])], logprobs[: len(told[1])], text[: len(told[2])])
