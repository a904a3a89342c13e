"""`jaxinfer trace`: what a journal says, as spans on tracks."""

import itertools
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from jaxinfer import cli
from jaxinfer.cli import trace
from jaxinfer.engine_config import CacheConfig, EngineConfig
from jaxinfer.host.journalled import record
from jaxinfer.host.request import Request, SamplingParams
from jaxinfer.host.scenario import Event, Scenario
from jaxinfer.host.segments import Segment, Writer

CONFIG = EngineConfig(
    num_slots=3,
    max_seq_len=64,
    prefill_chunks=(8, 16),
    attention_block=16,
    cache=CacheConfig(page_size=4, num_pages=20),
    bits="fast",
)


def scenario(num_requests: int = 9) -> Scenario:
    sampling = SamplingParams(temperature=0.0, max_tokens=24, seed=1, ignore_eos=True)
    requests = tuple(
        Request(f"r{n}", tuple(range(3, 10 + 3 * n)), sampling) for n in range(num_requests)
    )
    events = []
    for n in range(num_requests):
        events += [Event("submit", n), Event("step"), Event("step")]
    events += [Event("cancel", 2), Event("step")]
    return Scenario(config=CONFIG, requests=requests, events=tuple(events))


@pytest.fixture(scope="module")
def segment() -> Segment:
    return record(scenario())


def save(segment: Segment, folder: Path) -> None:
    writer = Writer(folder, segment.header, segment_bytes=2**20, num_segments=4)
    for one in segment.records:
        writer.append(one)
    writer.close()


def spans(events, *, slots: bool):
    return [e for e in events if e["ph"] == "X" and (e["tid"] >= trace.FIRST_SLOT) is slots]


def test_every_step_that_ran_is_a_span_with_its_make_up(segment):
    events = list(trace.draw([segment]))
    steps = spans(events, slots=False)
    chunks = [c for one in segment.records for c in one.get("plan", {}).get("chunks", ())]
    drawn = [chunk for step in steps for chunk in step["args"]["chunks"]]
    assert [(one["from"], one["length"], one["size"]) for one in drawn] == [
        tuple(chunk[1:]) for chunk in chunks
    ]
    returned = {part[0] for one in segment.records for part in one.get("got", ())}
    assert len(steps) == len(returned) > 20
    ends = [step["ts"] + step["dur"] for step in steps]
    begins = [step["ts"] for step in steps]
    assert all(end <= begin + 0.2 for end, begin in zip(ends, begins[1:], strict=False))


def test_a_slot_holds_one_request_at_a_time_and_every_request_has_its_spans(segment):
    events = list(trace.draw([segment]))
    held = spans(events, slots=True)
    for slot in range(CONFIG.num_slots):
        mine = sorted((e["ts"], e["dur"]) for e in held if e["tid"] == trace.FIRST_SLOT + slot)
        assert mine
        for (start, took), (then, _) in zip(mine, mine[1:], strict=False):
            assert start + took <= then + 0.2
    admits = [a for one in segment.records for a in one.get("plan", {}).get("admit", ())]
    kinds = Counter(e["name"].split()[0] for e in held)
    assert kinds["prefill"] == len(admits)
    ended = Counter(e["args"]["ended"] for e in held if "ended" in e["args"])
    gave_way = [o for one in segment.records for o in one.get("plan", {}).get("preempt", ())]
    assert ended["gave way"] == len(gave_way) > 0
    reasons = Counter(end[1] for one in segment.records for end in one.get("ended", ()))
    assert ended["length"] == reasons["length"] > 0


def test_counters_of_pages_stay_in_the_pool_and_waiting_comes_back_to_none(segment):
    events = list(trace.draw([segment]))
    pages = [e["args"]["in use"] for e in events if e["ph"] == "C" and e["name"] == "pages"]
    assert max(pages) > CONFIG.num_pages // 2 and max(pages) <= CONFIG.num_pages
    waiting = [e["args"]["requests"] for e in events if e["ph"] == "C" and e["name"] == "waiting"]
    assert max(waiting) >= 3 and waiting[-1] == 0


def test_the_command_writes_what_perfetto_reads(segment, tmp_path, capsys):
    save(segment, tmp_path / "journal")
    target = tmp_path / "trace.json"
    assert cli.run(["trace", str(tmp_path / "journal"), "-o", str(target)]) == 0
    assert f"{len(segment.records)} steps" in capsys.readouterr().out
    events = json.loads(target.read_text())["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "C", "i"}
    assert all({"pid", "name"} <= event.keys() for event in events)
    names = [e["args"].get("name") for e in events if e["name"] == "thread_name"]
    assert names == ["steps", "arrivals", "slot 000", "slot 001", "slot 002"]


def test_a_folder_without_a_journal_is_an_error_of_one_line(tmp_path, capsys):
    assert cli.run(["trace", str(tmp_path), "-o", str(tmp_path / "t.json")]) == 1
    assert "no journal" in capsys.readouterr().err


def test_segments_of_one_engine_follow_each_other(segment, tmp_path):
    save(segment, tmp_path / "journal")
    other = Segment(segment.path, segment.header | {"state": {}}, segment.records, is_torn=False)
    assert not trace._leads_to(segment, other)
    after = {"step": segment.records[-1]["step"] + 1}
    follows = Segment(segment.path, segment.header | {"state": after}, [], is_torn=False)
    assert trace._leads_to(segment, follows)
    assert asdict(segment)["is_torn"] is False


def test_every_event_is_what_the_trace_event_format_asks(segment):
    events = json.loads(json.dumps(list(trace.draw([segment]))))
    keys = {"X": {"tid", "ts", "dur"}, "C": {"ts", "args"}, "i": {"tid", "ts", "s"}}
    keys["M"] = {"tid", "args"}
    for event in events:
        assert keys[event["ph"]] <= event.keys() and event["name"] and event["pid"] == 1
        assert all(isinstance(event.get(key, 0.0), float | int) for key in ("ts", "dur", "tid"))
        if event["ph"] == "C":
            assert all(isinstance(value, int | float) for value in event["args"].values())
    named = {event["tid"] for event in events if event["name"] == "thread_name"}
    drawn = {event["tid"] for event in events if event["ph"] in "Xi"}
    assert drawn <= named
    for track in drawn:  # spans of one track lie side by side, or a viewer would misplace them
        times = [
            (e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X" and e["tid"] == track
        ]
        ordered = sorted(times)
        assert all(end <= start + 0.2 for (_, end), (start, _) in itertools.pairwise(ordered))
