"""`jaxinfer bench serve` from its options to its files, against a server of a fake engine."""

import asyncio
import json
import threading
from contextlib import contextmanager

import pytest

from jaxinfer import cli
from jaxinfer.bench.load.lengths import Lengths
from jaxinfer.cli.bench_serve import SHAPE, Shape, plan_of, recipe_of, slo_of
from jaxinfer.cli.simulate import Load
from jaxinfer.errors import ConfigError
from jaxinfer.host.workload import SLO
from tests.bench_load.sse import served, text_event, usage_event
from tests.server.serving import running_in_thread


def run(capsys, *argv):
    code = cli.run(("bench", "serve", *argv))
    out, err = capsys.readouterr()
    return code, out, err


def test_a_run_prints_saves_draws_and_compares(capsys, tmp_path):
    saved, page = tmp_path / "run.json", tmp_path / "run.html"
    with running_in_thread(step_s=0.001) as server:
        base = ("--target", server.target, "--prompt", "9", "--output", "4", "--requests", "12")
        files = ("--save", str(saved), "--html", str(page))
        code, out, err = run(capsys, *base, "--rate", "500", "--slo", "ttft=60", *files)
        assert (code, err) == (0, "") and "12 of 12 requests answered" in out
        assert "100.0% of all requests within ttft=60" in out
        assert len(server.engine.submitted) == 12 + 4  # and the warm-up
        code, out, _ = run(capsys, *base, "--concurrency", "3", "--compare", str(saved))
        assert code == 0 and "against another run" in out and "ttft p99 ms" in out
    found = json.loads(saved.read_text())
    assert found["figures"]["num_output_tokens"] == 48 and len(found["requests"]) == 12
    assert found["target"]["model"] == "fake" and found["workload"]["arrivals"] == "poisson"
    assert page.read_text().startswith("<!doctype html>")
    code, out, _ = run(capsys, "--saved", str(saved), "--json")
    assert code == 0 and json.loads(out) == found


def test_a_sweep_needs_no_more_than_a_range_and_bounds(capsys):
    with running_in_thread() as server:
        options = ("--sweep", "100-200", "--requests", "8", "--slo", "ttft=60", "--warmup", "0")
        code, out, _ = run(capsys, "--target", server.target, *options)
        assert code == 0 and "200.00 requests/s is the most that kept ttft=60 for 99%" in out
        assert len(server.engine.submitted) == 16


def test_an_openai_server_is_measured_with_texts(capsys, tmp_path):
    token = tmp_path / "token"
    token.write_text("secret\n")
    with in_thread() as (url, seen):
        options = ("--requests", "5", "--concurrency", "2", "--prompt", "9", "--output", "2-4")
        code, out, _ = run(capsys, "--openai", url, *options, "--token-file", str(token), "--json")
        assert code == 0
    found = json.loads(out)
    assert found["target"] == {"kind": "OpenAI", "address": url, "model": "tiny"}
    assert found["figures"]["num_ok"] == 5 and len(seen) == 5 + 4
    assert all(len(one["prompt"].split()) == 9 for one in seen)
    assert seen[0]["headers"]["authorization"] == "bearer secret"


@contextmanager
def in_thread():
    """A server of OpenAI's API on another thread's loop, and what it was asked."""
    seen, found, begun = [], [], threading.Event()

    def answer(body, path):
        parts = [text_event("word ", is_chat=False) for _ in range(body["max_tokens"])]
        return [*parts, usage_event(9, body["max_tokens"]), "data: [DONE]"]

    async def main():
        async with served(answer, seen) as url:
            end = asyncio.Event()
            found.extend([url, asyncio.get_running_loop(), end])
            begun.set()
            await end.wait()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert begun.wait(30)
    try:
        yield found[0], seen
    finally:
        found[1].call_soon_threadsafe(found[2].set)
        thread.join(30)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("-w", "none.jsonl"), "short, mixed, shared or a JSONL file"),
        (("--rate", "1", "--concurrency", "2"), "not both"),
        (("--sweep", "1-8"), "give one"),
        (("--sweep", "8-1", "--slo", "ttft=1"), "must be a range of requests"),
        (("--sweep", "1-8", "--slo", "ttft=1", "--rate", "2"), "rates of its own"),
        (("--sweep", "1-8", "--slo", "ttft=1", "--slo-share", "0"), "--slo-share is 0"),
        (("--slo", "p99=1"), "ttft=0.5,tpot=0.1,e2e=10"),
        (("--slo", "ttft=fast"), "bounds in seconds"),
        (("--arrivals", "never"), "--arrivals is 'never'"),
        (("--seconds", "3", "--requests", "4"), "without --requests"),
        (("--warmup", "-1"), "--warmup is -1"),
        (("--groups", "0"), "--groups is 0"),
        (("--groups", "2"), "give --shared TOKENS too"),
        (("--seconds", "3"), "--seconds goes with --rate"),
        (("--arrivals", "even"), "--arrivals goes with --rate"),
        (("--model-name", "x"), "--model-name goes with --openai"),
        (("--openai", "http://x", "--tls"), "give --openai an https URL"),
        (("--timeout", "0"), "--timeout is 0"),
        (("--save", "no/folder/run.json"), "can't be written"),
        (("--compare", "none.json"), "none.json can't be read"),
        (("--openai", "localhost"), "must be a URL"),
        (("--openai", "http://x", "--no-prefix-cache"), "can't say so"),
        (("--openai", "http://x", "--token-file", "none"), "--token-file none can't be read"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_sent(capsys, argv, words):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "") and words in err


def test_nobody_there_is_an_error_of_its_own(capsys):
    code, _, err = run(capsys, "--target", "127.0.0.1:9", "--timeout", "5")
    assert code == 1 and "no server answers at 127.0.0.1:9" in err


def test_options_change_the_named_workload():
    load = Load("shared", rate=2.0, prompt="800-1000~900", output="3", seed=5)
    found = recipe_of(load, Shape(arrivals="bursts:4", seconds=10.5, groups=3))
    assert found.prompt == Lengths(800, 1000, 900) and found.output == Lengths(3, 3)
    assert (found.num_requests, found.rate_per_s, found.concurrency) == (21, 2.0, None)
    assert (found.num_shared_tokens, found.num_groups, found.seed) == (768, 3, 5)
    assert (found.pattern.kind, found.pattern.value) == ("bursts", 4)


def test_a_trace_keeps_its_times_unless_a_rate_or_a_concurrency_is_given(tmp_path):
    path = tmp_path / "trace.jsonl"
    rows = ({"at_s": n, "prompt": "a", "num_output_tokens": 2} for n in range(4))
    path.write_text("\n".join(map(json.dumps, rows)))
    own = recipe_of(Load(str(path)), SHAPE)
    assert own.has_times and (own.rate_per_s, own.concurrency, own.num_requests) == (None, None, 4)
    assert recipe_of(Load(str(path)), Shape(seconds=1.5)).num_requests == 2
    assert not recipe_of(Load(str(path), rate=2.0), SHAPE).has_times
    assert recipe_of(Load(str(path), concurrency=2), SHAPE).concurrency == 2
    with pytest.raises(ConfigError, match="make prompts up"):
        recipe_of(Load(str(path), prompt="20"), SHAPE)


def test_a_chat_needs_texts(tmp_path):
    path = tmp_path / "load.jsonl"
    path.write_text('{"token_ids": [1, 2]}')
    with pytest.raises(ConfigError, match="--chat sends texts"):
        recipe_of(Load(str(path)), Shape(chat=True))


def test_a_sweep_holds_each_rate_for_half_a_minute_or_for_its_requests():
    options = {"slo": "ttft=1", "warmup": 0, "sweep": "0.5-8", "slo_share": 90.0}
    plan = plan_of(Load(), SHAPE, **options)
    assert plan.rates is not None and plan.rates.seconds == 30.0 and plan.rates.share == 0.9
    plan = plan_of(Load(requests=9), SHAPE, **options)
    assert plan.rates is not None and plan.rates.seconds is None


def test_bounds_are_read_as_seconds():
    assert slo_of("ttft=0.5, tpot=0.1,e2e=10") == SLO(0.5, 0.1, 10.0) and slo_of("") == SLO()
