"""The demo: a real server process on a tiny model, asked over gRPC, and stopped."""

import io
import re

import pytest
from rich.console import Console

from jaxinfer import demo
from jaxinfer.client import Completion, Stamps, Timings, Usage
from jaxinfer.errors import EngineFailed
from jaxinfer.host.request import FinishReason, SamplingParams
from tests import cli_model

STATS = {
    "peak_pages_used": 7,
    "num_pages": 64,
    "num_programs": 4,
    "num_compiles_after_start": 0,
}


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINFER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    model = cli_model.save(tmp_path)
    return ("-m", str(model), "-c", str(tmp_path / "tiny.toml"))


def test_it_asks_a_real_server_and_stops_it(arguments, capfd):
    demo.run(("hello", "again"), max_tokens=5, arguments=arguments)
    out, err = capfd.readouterr()
    assert err == ""
    assert "tiny on 127.0.0.1:" in out
    assert "== hello" in out
    assert "== again" in out
    assert re.search(r"output tokens +│ +10 ", out)
    assert re.search(r"programs compiled after the start +│ +0 ", out)


def test_a_server_that_does_not_come_up_is_an_error(tmp_path, capfd):
    with (
        pytest.raises(EngineFailed, match="ended with exit status 2"),
        demo.server(("-m", str(tmp_path / "none"))),
    ):
        pass
    assert "error: no model" in capfd.readouterr().err


def test_numbers_are_those_of_the_answers():
    answers = [answer("one", num_tokens=3), answer("[b]two", num_tokens=1)]
    shown = render(demo.per_prompt(answers), demo.totals(answers, STATS, 2.0))
    assert re.search(r"one +│ +12.3 │ +4.0 │ +3 │ length", shown)
    assert re.search(r"\[b\]two +│ +12.3 │ +- │ +1 │ length", shown)
    assert re.search(r"output tokens/s, all together +│ +2.0 ", shown)
    assert "7 of 64" in shown


def test_panels_show_the_end_of_each_answer():
    answers = [demo.Answer("a prompt", text="\n".join(f"line {n}" for n in range(9)))]
    shown = render(demo.panels(answers, width=80, lines=4))
    assert "a prompt" in shown
    assert "line 8" in shown
    assert "line 4" not in shown


def answer(prompt: str, *, num_tokens: int) -> demo.Answer:
    completion = Completion(
        text="x",
        token_ids=(1,) * num_tokens,
        finish_reason=FinishReason.LENGTH,
        usage=Usage(4, num_tokens, 0),
        timings=Timings(),
        parameters=SamplingParams(),
        request_id="r",
        model="tiny",
        stamps=Stamps(ttft_s=0.0123, tpot_s=0.004 if num_tokens > 1 else None, e2e_s=1.0),
    )
    return demo.Answer(prompt, "x", completion)


def render(*parts: object) -> str:
    console = Console(file=io.StringIO(), width=100, color_system=None)
    for part in parts:
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
