"""A journal runs again exactly, and what comes out otherwise is pointed at."""

import copy
import random
from dataclasses import asdict, replace
from pathlib import Path

import jax
import pytest

from jaxinfer import recording
from jaxinfer.config import Config, JournalConfig
from jaxinfer.engine import Engine
from jaxinfer.engine_config import CacheConfig
from jaxinfer.errors import JournalRefused
from jaxinfer.host import segments
from jaxinfer.host.journal import Memory, Recorder
from jaxinfer.host.journalled import record
from jaxinfer.host.scenario import Event, Scenario
from jaxinfer.host.segments import Segment
from jaxinfer.replay import Conditions, on_model, on_schedule
from jaxinfer.store import Store
from tests import tiny
from tests.bits import world

VOCAB = world.MODEL.vocab_size
CONFIG = world.make_config(  # as an engine settles it, and a journal's header says it
    "float32",
    num_slots=4,
    decode_rows=(),
    cache=CacheConfig(page_size=8, num_pages=32),
    products="xla",
)


@pytest.fixture(scope="module")
def store() -> Store | None:
    return tiny.store()


def build(store, conditions=None, **changes):
    outside = {} if conditions is None else {"clock": conditions.clock, "faults": conditions.fault}
    config = replace(CONFIG, **changes)
    params = tiny.params(config.compute_dtype, world.MODEL)
    return Engine(params, world.MODEL, tiny.TokenText(), config, store=store, **outside)


class Incident:
    """Everything that a journal must be able to bring back, from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.fails_in = 0

    def clock(self) -> float:
        return self.now_s

    def fault(self, phase: str) -> None:
        if self.fails_in and self.rng.random() < 0.5:
            self.fails_in -= 1
            raise jax.errors.JaxRuntimeError(f"INTERNAL: planted on {phase}")

    def requests(self, count: int):
        shared = [self.rng.randrange(1, VOCAB) for _ in range(64)]
        seed = self.rng.randrange(99)
        plain = tiny.random_requests(count, seed=seed, max_prompt=90, max_tokens=40)
        for number, request in enumerate(plain):
            request = replace(request, prompt=tuple(token % VOCAB for token in request.prompt))
            if number % 3 == 0:
                request = replace(request, prompt=(*shared, *request.prompt[:20]))
            if number % 4 == 1:
                request = replace(request, priority=self.rng.randrange(-1, 2))
            if number % 5 == 2:
                request = replace(request, deadline_s=self.now_s + self.rng.uniform(0, 30))
            if number % 3 == 1:
                stop = tuple(f"<{token}>" for token in self.rng.sample(range(VOCAB), 9))
                sampling = replace(request.sampling, stop=stop, ignore_eos=False)
                request = replace(request, sampling=sampling)
            yield request

    def happen(self, engine: Engine, *, num_requests: int = 30) -> dict:
        line = list(self.requests(num_requests))
        outputs = []
        while line or engine.has_work:
            self.now_s += self.rng.uniform(0.0, 1.0)
            for _ in range(self.rng.randrange(3)):
                if line:
                    engine.submit(line.pop())
            if self.rng.random() < 0.05 and engine._live:
                engine.cancel(self.rng.choice(sorted(engine._live)))
            if self.rng.random() < 0.02:
                engine.flush_prefix_cache()
            if self.rng.random() < 0.04:
                self.fails_in = 1
            outputs += engine.step()
        return outputs


def header(**changes):
    return {
        "engine": asdict(CONFIG),
        "eos_token_ids": [0],
        "prompts": "keep",
        "state": {},
    } | changes


def recorded(store, seed: int, **changes) -> Segment:
    incident, memory = Incident(seed), Memory()
    engine = build(store, incident, **changes)
    engine.journal = Recorder(memory)
    incident.happen(engine)
    stats = engine.stats()
    assert stats.num_preemptions and stats.num_recoveries and stats.num_cached_tokens
    config = asdict(replace(CONFIG, **changes))
    return Segment(Path("memory"), header(engine=config), memory.records, is_torn=False)


@pytest.fixture(scope="module")
def segment(store) -> Segment:
    return recorded(store, seed=3)


def replayed(segment, store, **changes):
    conditions = Conditions()
    return on_model(segment, build(store, conditions, **changes), conditions)


def test_an_incident_runs_again_on_the_model_bit_for_bit(store, segment):
    report = replayed(segment, store)
    assert report.difference is None
    assert report.num_steps == len(segment.records) > 100
    assert report.num_tokens > 150 and report.num_requests == 30
    seen = {name for record in segment.records for name in (*record, *record["plan"])}
    assert {"failed", "preempt", "admit", "chunks", "decodes", "events", "ended"} <= seen
    ends = {end[1] for record in segment.records for end in record.get("ended", ())}
    assert {"length", "deadline", "stop_string"} <= ends


def test_its_schedule_runs_again_without_a_model(segment):
    report = on_schedule(segment)
    assert report.difference is None and report.num_steps == len(segment.records)


def test_without_overlap_too(store):
    segment = recorded(store, seed=4, overlap=False)
    assert replayed(segment, store, overlap=False).difference is None
    assert on_schedule(segment).difference is None


def test_a_journal_from_before_pieces_of_prompts_shared_programs_has_one_row_in_each(store):
    segment = recorded(store, seed=3, prefill_rows=(1,))
    del segment.header["engine"]["prefill_rows"]
    assert on_schedule(segment).difference is None
    with_rows = replace(segment, header=header())
    found = on_schedule(with_rows).difference
    assert found is not None, "the rows make other batches or other plans"


def changed(segment: Segment, change) -> Segment:
    records = copy.deepcopy(segment.records)
    change(records)
    return replace(segment, records=records)


def test_the_first_difference_is_pointed_at(store, segment):
    steps = [at for at, record in enumerate(segment.records) if record.get("got")]
    at = steps[len(steps) // 2]

    def other_token(records):
        records[at]["got"][0][1][0] ^= 1

    def other_bits(records):
        records[at]["got"][0][2] ^= 1

    def other_batch(records):
        records[next(i for i in range(at, 0, -1) if "batch" in records[i])]["batch"] ^= 1

    def other_end(records):
        next(record for record in records[at:] if "ended" in record)["ended"][0][1] = "error"

    for change, what in (
        (other_token, "tokens"),
        (other_bits, "log probabilities"),
        (other_batch, "batch"),
        (other_end, "ended"),
    ):
        found = replayed(changed(segment, change), store).difference
        assert found is not None and found.what.startswith(what), what
        assert found.was != found.now and str(found.step) in str(found)


def test_other_settings_are_another_schedule(store, segment):
    less = replace(CONFIG, max_prefill_tokens=32)
    other = replace(segment, header=header(engine=asdict(less)))
    found = on_schedule(other).difference
    assert found is not None and found.what.startswith("plan, ")
    by_model = replayed(segment, store, max_prefill_tokens=32).difference
    assert by_model == found


def journalled(folder: Path, store, *, prompts="keep", **changes) -> list[Path]:
    incident = Incident(5)
    engine = build(store, incident)
    wanted = JournalConfig(folder=str(folder), prompts=prompts)
    engine.journal = recording.open_journal(Config(engine=CONFIG, journal=wanted), engine, "tiny")
    engine.journal._sink._segment_bytes = 6000
    for name, value in changes.items():
        setattr(engine.journal._sink, name, value)
    incident.happen(engine)
    return segments.segments(folder)


def test_every_segment_of_a_journal_runs_again_alone(tmp_path, store):
    paths = journalled(tmp_path, store)
    assert len(paths) > 3
    found = [segments.read(path) for path in paths]
    assert any(one.header["state"].get("known") for one in found[1:])
    assert any(one["slot"] is not None for s in found[1:] for one in s.header["state"]["sequences"])
    for one in found:
        report = replayed(one, store)
        assert report.difference is None, (one.path.name, report.difference)
        assert on_schedule(one).difference is None, one.path.name


def test_old_segments_go(tmp_path, store):
    paths = journalled(tmp_path, store, _num_segments=2)
    assert [segments.read(path).header["segment"] for path in paths] == [
        (last := segments.read(paths[-1]).header["segment"]) - 1,
        last,
    ]
    assert last > 3
    assert segments.find(tmp_path) == paths[-1]
    with pytest.raises(JournalRefused, match="no segment 1 in"):
        segments.find(tmp_path, number=1)


@pytest.mark.parametrize("prompts", ["hash", "redact"])
def test_without_its_prompts_a_journal_keeps_its_schedule(tmp_path, store, prompts):
    paths = journalled(tmp_path, store, prompts=prompts)
    assert len(paths) > 3
    for path in paths:
        one = segments.read(path)
        assert bool(one.header["key"]) == (prompts == "hash")
        assert on_schedule(one).difference is None
        with pytest.raises(JournalRefused, match="only its schedule"):
            replayed(one, store)
    first = segments.read(paths[0]).records
    said = [e[2] for record in first for e in record.get("events", ()) if e[0] == "submit"]
    known = {request.request_id: request for request in Incident(5).requests(30)}
    for request in said:
        assert request["prompt"] != list(known[request["request_id"]].prompt)
        assert "stop" not in request["sampling"]


def test_a_torn_line_is_left_out_and_a_damaged_one_refused(tmp_path, store):
    path = journalled(tmp_path, store)[0]
    whole = segments.read(path)
    data = path.read_bytes()
    path.write_bytes(data[:-20])
    torn = segments.read(path)
    assert torn.is_torn and torn.records == whole.records[:-1]
    assert on_schedule(torn).difference is None
    path.write_bytes(data.replace(b'"now"', b'"nuw"', 1))
    with pytest.raises(JournalRefused, match="damaged: line 2 of"):
        segments.read(path)
    path.write_bytes(b"")
    with pytest.raises(JournalRefused, match="no journal"):
        segments.read(path)
    with pytest.raises(JournalRefused, match="no file is called"):
        segments.find(tmp_path / "elsewhere")


def test_a_full_disk_costs_the_journal_and_not_the_service(tmp_path, store, monkeypatch, caplog):
    incident = Incident(6)
    engine = build(store, incident)
    wanted = JournalConfig(folder=str(tmp_path))
    engine.journal = recording.open_journal(Config(engine=CONFIG, journal=wanted), engine, "tiny")
    write = segments.os.write

    def full(file, line):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(segments.os, "write", full)
    outputs = incident.happen(engine, num_requests=4)
    monkeypatch.setattr(segments.os, "write", write)
    assert sum(output.finish_reason is not None for output in outputs) == 4
    assert [record.getMessage() for record in caplog.records if "journal" in record.message] == [
        f"the journal in {tmp_path} stops here: [Errno 28] No space left on device"
    ]


def scenario(seed: int, **changes) -> Scenario:
    """Arrivals, cancels, failures and a flush; answers end by their length alone."""
    rng = random.Random(seed)
    requests = tuple(
        replace(
            tiny.make_request(
                f"r{number}",
                [*([7] * 24 if number % 2 else []), *(rng.randrange(50) for _ in range(30))],
                max_tokens=rng.randint(1, 30),
            ),
            deadline_s=9.0 if number == 5 else None,
        )
        for number in range(12)
    )
    events = [Event("submit", number) for number in range(12)]
    events += [Event("cancel", 3), Event("flush"), Event("time", at=10.0)]
    events += [Event("fail"), Event("fail", phase="read")]
    rng.shuffle(events)
    steps = [event for one in events for event in (one, *[Event("step")] * rng.randrange(8))]
    return Scenario(config=replace(CONFIG, **changes), requests=requests, events=tuple(steps))


@pytest.mark.parametrize("overlap", [True, False])
def test_a_simulation_runs_again_on_the_model_and_the_other_way_round(store, segment, overlap):
    simulated = record(scenario(seed=7, overlap=overlap))
    assert any("failed" in one for one in simulated.records)
    assert on_schedule(simulated).difference is None
    conditions = Conditions()
    engine = build(store, conditions, overlap=overlap)
    report = on_model(simulated, engine, conditions, tokens=False)
    assert report.difference is None and report.num_steps == len(simulated.records) > 60
    told = on_model(simulated, build(store, conditions, overlap=overlap), conditions)
    assert told.difference is not None and told.difference.what.startswith("tokens")
