"""Where the time of a request went: pieces that add up, and that say why."""

import itertools
import json
import random
import tracemalloc
from collections import Counter

import jax
import pytest

from jaxinfer import cli
from jaxinfer.edge_config import ServerConfig
from jaxinfer.engine import Engine
from jaxinfer.engine_config import CacheConfig
from jaxinfer.host.request import FinishReason
from jaxinfer.server.account import Happening
from jaxinfer.server.timeline import Timeline, explainer
from tests import tiny
from tests.server.serving import running_in_thread
from tests.server.test_metrics import free_port


class Ticks:
    """A clock on which every look takes a millisecond."""

    def __init__(self) -> None:
        self._ticks = itertools.count()

    def __call__(self) -> float:
        return next(self._ticks) / 1024  # exact in binary, so that sums are


def watched(*, faults=lambda phase: None, max_bytes: int = 2**20, max_ended: int = 1000, **changes):
    # One set of programs for all tests, and few pages, so that requests give way.
    config = tiny.engine_config(
        num_slots=4, cache=CacheConfig(num_pages=16), bits="fast", **changes
    )
    clock = Ticks()
    engine = Engine(
        tiny.params(config.compute_dtype),
        tiny.MODEL,
        tiny.TokenText(),
        config,
        clock=clock,
        store=tiny.store(),
        faults=faults,
    )
    timeline = Timeline(engine.config, clock=clock, max_bytes=max_bytes, max_ended=max_ended)
    engine.observer = timeline
    return engine, timeline


def kinds(story: tuple[Happening, ...]) -> list[str]:
    return [one.kind for one in story]


def check_tiles(story: tuple[Happening, ...], total_s: float) -> None:
    """Each piece begins where the one before ended, and the last one ends with the request."""
    at_s = 0.0
    for piece in story:
        assert piece.at_s == at_s and piece.seconds >= 0, story
        at_s += piece.seconds
    assert at_s == total_s, story


def check_all(answers, timeline: Timeline) -> None:
    for name, answer in answers.items():
        timings, story = answer.last.timings, timeline.explain(name)
        check_tiles(story, timings.finished_s - timings.arrived_s)
        assert story[-1].kind == "finished"
        assert story[-1].text == f"{answer.last.finish_reason}, {len(answer.tokens)} tokens"


def num_decodes(story: tuple[Happening, ...]) -> int:
    texts = [one.text for one in story if one.kind in ("decode", "beside")]
    return sum(int(text.split()[0]) for text in texts)


@pytest.mark.parametrize("overlap", [True, False])
def test_the_pieces_of_every_request_add_up_to_its_time(overlap):
    engine, timeline = watched(overlap=overlap)
    requests = tiny.random_requests(24, seed=3, max_prompt=100, max_tokens=30)
    answers = tiny.run(engine, requests, arrivals_per_step=2)
    assert len(answers) == 24
    check_all(answers, timeline)
    stories = [timeline.explain(name) for name in answers]
    seen = {kind for story in stories for kind in kinds(story)}
    assert {"queued", "admitted", "prefill", "decode", "beside", "finished"} <= seen
    texts = {one.text for story in stories for one in story}
    assert "no slot was free for the first in line" in texts


def test_a_request_alone_is_prefilled_in_padded_chunks_and_decoded_step_by_step():
    engine, timeline = watched(overlap=False)
    answers = tiny.run(engine, [tiny.make_request("a", range(3, 75), max_tokens=9)])
    check_all(answers, timeline)
    story = timeline.explain("a")
    assert kinds(story) == ["queued", "admitted", "prefill", "decode", "finished"]
    prefills = [one.text for one in story if one.kind == "prefill"]
    assert " ".join(prefills).count("padded") == len(prefills)
    assert sum(int(text.split()[0]) for text in prefills) == 72
    # The first token is the prefill's, and the second one's decode is in the same step.
    assert num_decodes(story) == 9 - 2


def test_steps_beside_anothers_prefill_name_it():
    engine, timeline = watched()
    engine.submit(tiny.make_request("talks", [5, 6, 7], max_tokens=30))
    for _ in range(5):
        engine.step()
    engine.submit(tiny.make_request("long", range(3, 150), max_tokens=2))
    tiny.run(engine, [])
    beside = [one for one in timeline.explain("talks") if one.kind == "beside"]
    assert beside and all("prefill tokens of long" in one.text for one in beside)
    assert num_decodes(timeline.explain("talks")) == 30 - 2


def test_who_ends_with_its_first_token_does_not_wait_for_the_decodes_behind_it():
    engine, timeline = watched(overlap=False)
    engine.submit(tiny.make_request("talks", [5, 6, 7], max_tokens=30))
    for _ in range(3):
        engine.step()
    engine.submit(tiny.make_request("brief", range(3, 20), max_tokens=1))
    answers = tiny.run(engine, [])
    check_all({"brief": answers["brief"]}, timeline)
    story = timeline.explain("brief")
    assert kinds(story) == ["queued", "admitted", "prefill", "finished"]
    ends_s = {name: one.last.timings.finished_s for name, one in answers.items()}
    assert ends_s["brief"] < ends_s["talks"]


def test_who_gives_way_reads_for_whom_and_that_it_came_back():
    engine, timeline = watched()
    answers = tiny.run(engine, tiny.random_requests(12, seed=5, max_prompt=60, max_tokens=60))
    check_all(answers, timeline)
    lost = [name for name, answer in answers.items() if answer.last.num_preemptions]
    assert lost
    for name in lost:
        story = timeline.explain(name)
        count = Counter(kinds(story))
        assert count["preempted"] == answers[name].last.num_preemptions
        assert count["admitted"] == count["preempted"] + 1
        gainers = [one.text.split()[-1] for one in story if one.kind == "preempted"]
        assert set(gainers) <= answers.keys() - {name}


def test_a_failed_step_is_in_the_story_of_those_it_hit():
    left = iter([False] * 12 + [True])

    def fault(phase):
        if next(left, False):
            raise jax.errors.JaxRuntimeError("INTERNAL: planted")

    engine, timeline = watched(faults=fault)
    answers = tiny.run(engine, [tiny.make_request("a", range(3, 40), max_tokens=20)])
    check_all(answers, timeline)
    story = timeline.explain("a")
    assert kinds(story).count("failed") == 1 and kinds(story).count("admitted") == 2
    assert "again" in story[kinds(story).index("failed") + 2].text


def test_requests_that_end_early_and_live_ones_add_up_as_well():
    engine, timeline = watched()
    others = [f"other{number}" for number in range(3)]
    for name in ("first", *others, "second", "third"):
        engine.submit(tiny.make_request(name, [3, 4, 5], max_tokens=50))
    for _ in range(7):
        engine.step()
    engine.cancel("first")
    engine.cancel("third")
    ended = {one.request_id: one for one in engine.step()}
    for name in ("first", "third"):
        timings = ended[name].timings
        assert ended[name].finish_reason is FinishReason.CANCELLED
        assert timings.finished_s is not None
        check_tiles(timeline.explain(name), timings.finished_s - timings.arrived_s)
    assert "admitted" not in kinds(timeline.explain("third"))
    before = timeline.explain("second")
    engine.step()
    after = timeline.explain("second")
    assert sum(one.seconds for one in after) > sum(one.seconds for one in before)
    assert kinds(after)[-1] in ("running", "decode", "queued")


def test_the_last_requests_are_known_and_no_others():
    engine, timeline = watched(max_ended=5)
    answers = tiny.run(engine, tiny.random_requests(12, seed=1, max_prompt=20, max_tokens=8))
    known = [name for name in answers if timeline.explain(name)]
    assert len(known) == 5 and timeline.explain("never") == ()


def test_memory_is_bounded_and_a_story_says_what_is_forgotten():
    engine, timeline = watched(max_bytes=6000)
    short = tiny.random_requests(30, seed=2, max_prompt=20, max_tokens=4)
    answers = tiny.run(
        engine, [tiny.make_request("long", [3, 4], max_tokens=200), *short], arrivals_per_step=1
    )
    assert timeline.num_bytes <= 6000
    check_all(answers, timeline)
    assert kinds(timeline.explain("long"))[0] == "forgotten"


def test_the_estimate_of_memory_is_no_lower_than_what_is_taken():
    engine, timeline = watched()
    tracemalloc.start(1)
    before = tracemalloc.take_snapshot()
    tiny.run(engine, tiny.random_requests(40, seed=4, max_prompt=60, max_tokens=20))
    after = tracemalloc.take_snapshot()
    tracemalloc.stop()
    grown = sum(
        one.size_diff
        for one in after.compare_to(before, "filename")
        if one.traceback[0].filename.endswith("server/timeline.py")
    )
    assert 0 < grown < timeline.num_bytes + 40 * 1000


def test_a_steady_batch_is_one_stretch():
    engine, timeline = watched()
    for number in range(4):
        engine.submit(tiny.make_request(f"r{number}", [number + 3], max_tokens=100))
    engine.step()
    engine.step()
    before = timeline.num_bytes
    for _ in range(60):
        engine.step()
    assert timeline.num_bytes - before <= 1000  # one that began, whatever its length


def test_counts_say_what_was_computed_and_what_of_it_was_of_use():
    engine, timeline = watched(overlap=False)
    requests = tiny.random_requests(10, seed=7, max_prompt=60, max_tokens=12)
    rng = random.Random(1)
    rng.shuffle(requests)
    tiny.run(engine, requests)
    counts, stats = timeline.counts, engine.stats()
    assert counts.num_steps == stats.num_steps
    num_decoded = counts.num_useful_tokens - stats.num_prefill_tokens
    assert 0 < num_decoded < stats.num_output_tokens
    assert counts.num_computed_tokens > counts.num_useful_tokens
    assert counts.gap_s > 0 and counts.prefill_s > 0 and counts.decode_s > 0


def test_operators_read_the_story_on_the_command_line(capsys):
    engine, timeline = watched()
    answers = tiny.run(engine, tiny.random_requests(6, seed=9, max_prompt=40, max_tokens=20))
    name, answer = next(iter(answers.items()))
    timings = answer.last.timings
    assert timings.finished_s is not None
    config = ServerConfig(port=0, admin_port=free_port())
    address = f"127.0.0.1:{config.admin_port}"
    with running_in_thread(config=config, explain=explainer(timeline)):
        assert cli.run(["explain", name, "--address", address, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert cli.run(["explain", name, "--address", address]) == 0
        shown = capsys.readouterr().out
        assert cli.run(["explain", "nobody", "--address", address]) != 0
    pieces = [Happening(**piece) for piece in found["happenings"]]
    assert tuple(pieces) == timeline.explain(name)
    total_s = timings.finished_s - timings.arrived_s
    assert f"{1e3 * total_s:.2f} ms in all" in shown and "prefill" in shown
    assert "nobody" in capsys.readouterr().err
