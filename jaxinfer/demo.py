"""The demo: a real server process, six chat prompts at once through the client, real numbers."""

import asyncio
import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from jaxinfer.client import AsyncClient, Completed, Completion
from jaxinfer.errors import EngineFailed

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Write a short poem about the sea.",
    "Explain in two sentences why the sky is blue.",
    "Give me three tips for a good night's sleep.",
    "Name the planets of the solar system in order.",
    "Write a Python function that adds two numbers.",
)
STOP_S = 30.0  # for a server to finish after SIGTERM
REFRESH_PER_S = 12
MAX_LINES = 10  # of one panel


@dataclass
class Answer:
    """One prompt and what came back so far."""

    prompt: str
    text: str = ""
    completion: Completion | None = None


@dataclass
class Server:
    """A server process that has said it is ready; `stats` is there once it has stopped."""

    process: subprocess.Popen[str]
    ready: dict[str, Any]
    stats: dict[str, Any] = field(default_factory=dict)


def run(prompts: Sequence[str], *, max_tokens: int, arguments: Sequence[str] = ()) -> None:
    """Starts a server, asks all prompts at once, prints answers and numbers, stops the server."""
    console = Console() if sys.stdout.isatty() else Console(width=100)
    started_s = time.monotonic()
    answers = [Answer(prompt) for prompt in prompts]
    with server(arguments) as running:
        facts = running.ready
        console.print(
            f"{facts['model']} on {facts['target']}: a process of its own, ready after "
            f"{time.monotonic() - started_s:.1f} s (load and compile {facts['load_s']:.1f} s)",
            highlight=False,
        )
        asked_s = time.monotonic()
        asyncio.run(_ask_all(answers, facts["target"], console, max_tokens=max_tokens))
        answered_s = time.monotonic() - asked_s
    console.print(per_prompt(answers))
    console.print(totals(answers, running.stats, answered_s))


@contextmanager
def server(arguments: Sequence[str] = ()) -> Iterator[Server]:
    """A server on a free loopback port; stopped with SIGTERM at the end.

    Raises EngineFailed where it does not come up, or does not stop with exit status 0.
    """
    options = ("--server.port", "0", "--json", "--stats-json", "-")
    command = [sys.executable, "-m", "jaxinfer", "serve", *arguments, *options]
    # stderr goes where ours goes: progress and errors of the server are the user's to see.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        running = Server(process, _event(process, "ready"))
        yield running
        process.send_signal(signal.SIGTERM)
        running.stats = _event(process, "stats")
        code = process.wait(timeout=STOP_S)
        if code != 0:
            raise EngineFailed(f"the server ended with exit status {code}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def per_prompt(answers: Sequence[Answer]) -> Table:
    """What each prompt took, on the client's clock."""
    table = Table("prompt", "TTFT ms", "TPOT ms", "tokens", "ended by")
    for column in table.columns[1:4]:
        column.justify = "right"
    for answer in answers:
        completion = answer.completion
        assert completion is not None
        table.add_row(
            escape(answer.prompt),
            _milliseconds(completion.stamps.ttft_s),
            _milliseconds(completion.stamps.tpot_s),
            str(completion.usage.num_output_tokens),
            str(completion.finish_reason),
        )
    return table


def totals(answers: Sequence[Answer], stats: dict[str, Any], answered_s: float) -> Table:
    """What all of them took together, and the engine's own counts."""
    done = [answer.completion for answer in answers if answer.completion is not None]
    num_tokens = sum(completion.usage.num_output_tokens for completion in done)
    table = Table("", "", show_header=False)
    table.columns[1].justify = "right"
    for name, value in (
        ("answers", str(len(done))),
        ("output tokens", str(num_tokens)),
        ("seconds, first send to last token", f"{answered_s:.2f}"),
        ("output tokens/s, all together", f"{num_tokens / answered_s:.1f}"),
        ("pages used at the peak", f"{stats['peak_pages_used']} of {stats['num_pages']}"),
        ("programs compiled at the start", str(stats["num_programs"])),
        ("programs compiled after the start", str(stats["num_compiles_after_start"])),
    ):
        table.add_row(name, value)
    return table


def panels(answers: Sequence[Answer], *, width: int, lines: int) -> RenderableType:
    """The answers side by side, three to a row where there is room."""
    across = min(len(answers), max(1, min(3, width // 36)))
    each = width // across - 1
    return Columns(
        [
            Panel(
                escape(_tail(answer.text, width=each - 4, lines=lines)),
                title=escape(answer.prompt[: each - 8]),
                border_style="green" if answer.completion else "blue",
                width=each,
                height=lines + 2,
            )
            for answer in answers
        ],
        padding=(0, 0),
    )


async def _ask_all(
    answers: Sequence[Answer], target: str, console: Console, *, max_tokens: int
) -> None:
    """Streams all answers at once; on a terminal into panels, else each as it is finished."""
    async with AsyncClient(target) as client:
        if not console.is_terminal:

            def finished(answer: Answer) -> None:
                console.print(f"\n== {answer.prompt}", markup=False, highlight=False)
                console.print(answer.text.strip(), markup=False, highlight=False)

            await _gather(client, answers, finished, max_tokens=max_tokens)
            return
        rows = -(-len(answers) // max(1, min(3, console.width // 36)))
        lines = min(MAX_LINES, max(4, (console.height - 4) // rows - 3))

        def view() -> RenderableType:
            return panels(answers, width=console.width, lines=lines)

        with Live(console=console, get_renderable=view, refresh_per_second=REFRESH_PER_S):
            await _gather(client, answers, lambda answer: None, max_tokens=max_tokens)


async def _gather(
    client: AsyncClient,
    answers: Sequence[Answer],
    finished: Callable[[Answer], None],
    *,
    max_tokens: int,
) -> None:
    async def ask(answer: Answer) -> None:
        messages = [{"role": "user", "content": answer.prompt}]
        events = client.stream(messages=messages, temperature=0.0, max_tokens=max_tokens)
        async for event in events:
            if isinstance(event, Completed):
                answer.completion = event.completion
                finished(answer)
            else:
                answer.text += event.text

    await asyncio.gather(*(ask(answer) for answer in answers))


def _event(process: subprocess.Popen[str], name: str) -> dict[str, Any]:
    """The next JSON line that the server prints; EngineFailed where it ends without one."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        code = process.wait(timeout=STOP_S)
        raise EngineFailed(f"the server ended with exit status {code}; see what it said above")
    event = json.loads(line)
    assert event["event"] == name, event
    return event


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f}"


def _tail(text: str, *, width: int, lines: int) -> str:
    """The last lines of a text, wrapped, that fit into a panel."""
    wrapped: list[str] = []
    for line in text.strip().splitlines():
        wrapped += textwrap.wrap(line, width) or [""]
    return "\n".join(wrapped[-lines:])
