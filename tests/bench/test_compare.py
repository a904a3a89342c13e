"""Two programs in turns: who goes when, what is divided by what, and what is refused."""

import json
import sys

import pytest
from rich.console import Console

from jaxinfer import cli
from jaxinfer.bench import compare, page, probes
from jaxinfer.errors import ConfigError


@pytest.fixture(autouse=True)
def small_probe(monkeypatch):
    monkeypatch.setattr(probes, "_BYTES", 2**20)


def fake(log):
    def run(command):
        log.append(command[0])
        is_ours = command[0] == "ours"
        return {
            "peer": command[0],
            "seconds": 2.0 if is_ours else 3.0,
            "out_tok_s": 90.0 if is_ours else 60.0 + 30 * log.count("theirs"),
            "peak_rss_mb": 400 if is_ours else 1600,
            "ttft_ms": None,
        }

    return run


def test_sides_take_turns_and_ratios_are_of_one_round():
    log = []
    report = compare.measure(["ours"], ["theirs"], workload="W3", rounds=3, run=fake(log))
    assert log == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    found = {one.name: one for one in report.figures}
    assert set(found) == {"seconds", "out_tok_s", "peak_rss_mb"}
    assert found["seconds"].ratios == (1.5, 1.5, 1.5)  # three seconds against two
    assert found["out_tok_s"].ratios == (90 / 90, 90 / 120, 90 / 150)
    assert found["peak_rss_mb"].ratios == (4.0, 4.0, 4.0)
    facts = json.loads(json.dumps(report.as_dict()))
    assert [one["ratio"] for one in facts["figures"]] == [0.75, 1.5, 4.0]
    shown = compare.page(report)
    console = Console(width=80)
    with console.capture() as captured:
        console.print(page.shown(shown.sheets[0]))
    assert "W3: ours against theirs" in captured.get() and "4.00" in captured.get()
    assert "times ahead" in page.html(shown)


def test_a_round_on_a_busy_machine_is_told():
    line = {"seconds": 1.0}
    rounds = tuple(compare.Round(line, line, speed) for speed in (20.0, 19.0, 9.0))
    report = compare.Report("W1", "a", "b", ("b",), rounds)
    assert report.num_busy == 1
    assert "in 1 of them" in " ".join(compare.page(report).sheets[0].notes)


def test_the_last_json_line_of_a_command_counts():
    script = "print('hello'); print('{\"seconds\": 1}'); print('{\"seconds\": 2}'); print('bye')"
    assert compare.run_command([sys.executable, "-c", script]) == {"seconds": 2}


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("print(5)", "printed no JSON object"),
        ("print('{\"seconds\": 1}'); raise SystemExit('no model')", "ended with 1.*no model"),
    ],
)
def test_a_command_that_fails_is_quoted(script, words):
    with pytest.raises(ConfigError, match=words):
        compare.run_command([sys.executable, "-c", script])
    with pytest.raises(ConfigError, match="can't be run: No such file"):
        compare.run_command(["no-such-program-anywhere"])


def test_the_command_line_wants_a_command(capsys):
    assert cli.run(["bench", "compare", "W1"]) == 2
    assert "give one after --" in " ".join(capsys.readouterr().err.split())


def test_what_stands_after_the_dashes_is_the_other_program_as_it_is(monkeypatch, capsys):
    seen = []

    def measure(ours, theirs, **_):
        seen.append((list(ours), list(theirs)))
        raise ConfigError("enough")

    monkeypatch.setattr(compare, "measure", measure)
    command = ["python", "peer.py", "W3", "--json", "--variant=q4"]
    code = cli.run(
        ["bench", "compare", "W3", "--engine.num-slots=4", "--repeats=2", "--", *command]
    )
    assert code == 2 and "enough" in capsys.readouterr().err
    ours, theirs = seen[0]
    assert theirs == command
    assert ours[1:] == [
        *("-m", "jaxinfer", "bench", "offline", "W3", "--json", "--rounds=2"),
        "--set=--engine.num-slots=4",
    ]
