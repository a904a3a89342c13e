"""`jaxinfer chat`: a conversation on the terminal, or line by line from a pipe."""

import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console

from jaxinfer.cli import progress
from jaxinfer.cli.generate import check
from jaxinfer.cli.options import COMMON, UNSET, Common, Sampling, opening
from jaxinfer.errors import InvalidRequest
from jaxinfer.host.request import SamplingParams

if TYPE_CHECKING:
    from jaxinfer.llm import LLM

HELP = "/reset forgets the conversation, /quit leaves, Ctrl-C ends an answer"


def chat(
    *,
    system: str | None = None,
    sampling: Sampling = UNSET,
    common: Common = COMMON,
) -> None:
    """Talks with a model. With a pipe as stdin, each line is one message.

    Parameters
    ----------
    system
        What the model is told first.
    """
    settings = common.load()
    from jaxinfer.llm import LLM

    with progress.shown() as show:
        llm = LLM(config=settings, progress=show)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        Console(stderr=True, highlight=False).print(f"{llm.name}: {HELP}", style="dim")
    talk(llm, read_terminal() if is_terminal else iter(sys.stdin), sampling, system=system)


def talk(
    llm: "LLM", lines: Iterator[str], sampling: SamplingParams, *, system: str | None = None
) -> None:
    """Answers each line until they end or one says /quit."""
    messages = opening(system)
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    for line in lines:
        said = line.strip()
        if said == "/quit":
            return
        if said == "/reset":
            messages = opening(system)
        elif said.startswith("/"):
            errors.print(f"{said.split()[0]} is no command: {HELP}", style="dim")
        elif said:
            question = {"role": "user", "content": said}
            try:
                text = reply(llm, [*messages, question], sampling)
            except InvalidRequest as error:  # most often a conversation that got too long
                errors.print(f"error: {error} (/reset starts over)", style="red", markup=False)
                continue
            messages += [question, {"role": "assistant", "content": text}]


def reply(llm: "LLM", messages: list[dict[str, str]], sampling: SamplingParams) -> str:
    """Streams one answer to stdout and returns it; Ctrl-C ends it and keeps what there is."""
    parts: list[str] = []
    with interruptible() as interrupts, closing(llm.stream(messages, sampling)) as outputs:
        for output in outputs:
            check(output)
            parts.append(output.text)
            sys.stdout.write(output.text)
            sys.stdout.flush()
            if interrupts:
                sys.stdout.write(" [stopped]")
                break
    print(flush=True)
    return "".join(parts)


def read_terminal() -> Iterator[str]:
    """What the user types, line by line; Ctrl-D ends it."""
    console = Console()
    while True:
        try:
            yield console.input("[bold]>[/bold] ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n" + HELP)


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Collects Ctrl-C in a list instead of raising, so that no step of the engine is cut in two."""
    interrupts: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)
