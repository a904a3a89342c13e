"""Files, pages and tables of a measurement."""

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from jaxinfer.bench.load import charts, saved, tables
from jaxinfer.bench.load.drawing import ticks
from jaxinfer.bench.load.drive import Run
from jaxinfer.bench.load.events import Record, figures, spread
from jaxinfer.bench.load.report import html
from jaxinfer.bench.load.saved import Measured
from jaxinfer.bench.load.sweep import Swept, Trial
from jaxinfer.errors import ConfigError
from jaxinfer.host.workload import SLO

BOUNDS = SLO(ttft_s=0.5, tpot_s=0.2)


def records(slowness=1.0, count=9):
    answered = [
        Record(
            number,
            float(number),
            number + 0.005,
            [number + slowness * part for part in (0.2, 0.3, 0.5)],
            number + slowness * 0.5,
            num_prompt_tokens=10,
            num_output_tokens=4,
            queue_s=slowness * 0.05,
            prefill_s=slowness * 0.1,
        )
        for number in range(count)
    ]
    refused = Record(count, 2.5, 2.5, [], 2.6, "RESOURCE_EXHAUSTED", "<b>full</b> & busy")
    return (*answered, refused)


def measured(slowness=1.0, *, rates=()):
    run = Run("2026-01-02T03:04:05+00:00", records(slowness), spread([0.001, 0.002]))
    trials = [Trial(rate, figures(run.records, BOUNDS), run, is_good) for rate, is_good in rates]
    return Measured(
        command="jaxinfer bench serve --rate 2 <&>",
        target={"kind": "gRPC", "address": "here:1", "model": "tiny"},
        workload={"load": "short, 10 requests, 2 a second", "seed": 0},
        slo=BOUNDS,
        run=run,
        swept=Swept(tuple(trials), 0.99) if trials else None,
    )


def lines_of(renderable):
    console = Console(width=100)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get().splitlines()


class Page(HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data.strip())


@pytest.mark.parametrize("rates", [(), ((1.0, True), (2.0, False))])
def test_what_is_saved_comes_back(tmp_path, rates):
    before = measured(rates=rates)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(saved.to_dict(before)))
    after = saved.read(path)
    assert after.figures == before.figures
    assert saved.to_dict(after) == saved.to_dict(before)
    assert json.loads(path.read_text())["figures"]["failures"] == {"RESOURCE_EXHAUSTED": 1}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "other"}'])
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.json"):
        saved.read(path)


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**saved.to_dict(measured()), "requests": [{"colour": 1}]}))
    with pytest.raises(ConfigError, match="is damaged"):
        saved.read(path)


def test_ratios_are_ours_over_theirs():
    found = {name: ratio for name, _, _, ratio in saved.ratios(*both())}
    assert found["ttft_s.p99"] == pytest.approx(2.0) and found["tpot_s.mean"] == pytest.approx(2.0)
    assert found["num_requests"] == 1.0 and found["num_preemptions"] is None
    lines = lines_of(tables.comparison(measured(2.0), measured(), "old.json"))
    (line,) = [line for line in lines if "ttft p99 ms" in line]
    assert re.findall(r"[\d.]+x?", line.replace("p99", "")) == ["200.00", "400.00", "2.00x"]


def test_a_comparison_says_where_the_loads_differ():
    other = replace(measured(), workload={**measured().workload, "seed": 7})
    text = " ".join(lines_of(tables.comparison(measured(), other, "old.json")))
    assert "not the same load: seed 7, now 0" in " ".join(text.split())
    assert tables.differences(measured(2.0), measured()) == []


def both():
    return measured(2.0).figures, measured().figures


def test_the_terminal_shows_percentiles_failures_and_goodput():
    text = "\n".join(lines_of(tables.shown(measured())))
    assert "TTFT" in text and "9 of 10 requests answered" in text
    assert "failed: 1 RESOURCE_EXHAUSTED" in text and "90.0% of all" in text
    assert "within ttft=0.5,tpot=0.2" in text and "<b>full</b> & busy" in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_late_client_and_a_busy_one_are_said():
    late = [replace(one, sent_s=one.planned_s + 0.3) for one in records()]
    one = replace(measured(), run=Run("now", tuple(late), spread([0.2])))
    first, second, _ = tables.warnings(one)
    assert "sent late (300 ms" in first and "lagged (200 ms" in second
    assert len(tables.warnings(measured())) == 1  # the failure; 5 ms late is not late


def test_prompts_that_were_sent_before_are_said():
    again = [replace(one, num_cached_tokens=8) for one in records()]
    run = Run("now", tuple(again), spread([]))
    one = replace(measured(), run=run, workload={"load": "short", "shared tokens": 0})
    assert "80% of the prompt tokens were in" in tables.warnings(one)[0]
    shared = replace(one, workload={"load": "shared", "shared tokens": 8})
    assert len(tables.warnings(shared)) == 1  # the failure


def test_a_sweep_says_what_it_found():
    text = "\n".join(lines_of(tables.shown(measured(rates=((1.0, True), (2.0, False))))))
    assert "1.00 requests/s is the most that kept ttft=0.5,tpot=0.2 for 99%" in text
    (none,) = [measured(rates=((1.0, False),)).swept]
    assert "even 1.00 requests/s did not keep" in tables.verdict(none, BOUNDS)
    (open_,) = [measured(rates=((1.0, True),)).swept]
    assert "sweep further up" in tables.verdict(open_, BOUNDS)


@pytest.mark.parametrize("rates", [(), ((1.0, True), (2.0, False))])
def test_the_page_is_one_file_and_escapes_what_servers_say(rates):
    page = html(measured(rates=rates))
    found = Page(page)
    kinds = {tag for tag, _ in found.tags}
    assert not kinds & {"script", "link", "img", "iframe", "b_full"}
    assert not [a for _, a in found.tags if {"src", "href", "onload"} & set(a)]
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "<b>full" not in page and "&lt;b&gt;full" in page
    assert "jaxinfer bench serve --rate 2 <&>" in found.words  # as text
    assert "prefers-color-scheme: dark" in page


def test_every_picture_is_sound_xml_and_draws_what_there_was():
    page = html(measured(rates=((1.0, True), (2.0, False))))
    pictures = [ElementTree.fromstring(one) for one in re.findall(r"<svg.*?</svg>", page, re.S)]
    plots = [one for one in pictures if one.get("role")]
    assert len(plots) == 9  # three CDFs, two over time, the requests, three of the sweep
    (gantt,) = [
        ElementTree.fromstring(charts.gantt(records())),
    ]
    space = "{http://www.w3.org/2000/svg}"
    bars = [one.get("class") for one in gantt.iter(f"{space}rect")]
    assert bars.count("decode") == bars.count("queue") == 9 and bars.count("failed") == 1
    titles = [one.text for one in gantt.iter(f"{space}title")]
    assert len(titles) == 10 and "10 + 4 tokens: late 5 ms, queue 50 ms" in titles[0]


def test_phases_follow_each_other_without_a_gap():
    one = records()[0]
    found = charts.phases(one)
    assert [end for _, _, end in found[:-1]] == [begin for _, begin, _ in found[1:]]
    assert (found[0][1], found[-1][2]) == (one.planned_s, one.chunks_s[-1])


def test_tokens_over_time_add_up_to_all_tokens():
    rates, width_s = charts.tokens_over_time(records(), 10.0)
    assert sum(rates) * width_s == pytest.approx(9 * 4)


def test_a_page_of_failures_only_or_of_very_many_requests_is_drawn_too():
    lost = tuple(one for one in records() if not one.is_ok)
    assert "0 of 1" in html(replace(measured(), run=Run("now", lost, spread([]))))
    many = html(replace(measured(), run=Run("now", records(count=1999), spread([]))))
    assert "400 of 2000 requests are drawn" in many


@pytest.mark.parametrize(
    ("top", "expected"),
    [(1.0, (0, 0.25, 0.5, 0.75, 1.0)), (160, (0, 50, 100, 150)), (0.0, (0.0,))],
)
def test_ticks_are_round(top, expected):
    assert tuple(ticks(float(top), 4)) == pytest.approx(expected)
