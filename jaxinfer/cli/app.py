"""Parses a command line, runs the command, and says errors in one line."""

import os
import re
import sys
from collections.abc import Iterator, Sequence

from cyclopts import App, CycloptsError, Parameter

import jaxinfer
from jaxinfer import config, settings
from jaxinfer.cli import COMMANDS, SETTINGS_HELP
from jaxinfer.errors import ConfigError, InvalidRequest, JaxinferError

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130

_DOTTED = re.compile(r"--[A-Za-z][\w-]*(\.[\w-]+)+(=.*)?", re.DOTALL)


def run(argv: Sequence[str]) -> int:
    """Runs one command and returns the exit code; errors of ours become one line on stderr."""
    is_debug = "--debug" in argv or config.is_debug()
    try:
        code = make_app()(
            list(with_settings(argv)),
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
        sys.stdout.flush()
    except (CycloptsError, JaxinferError) as error:
        if is_debug and isinstance(error, JaxinferError):
            raise
        say_error(str(error))
        is_input = isinstance(error, CycloptsError | ConfigError | InvalidRequest)
        return BAD_INPUT if is_input else FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return code if isinstance(code, int) else 0


def make_app() -> App:
    """All commands; the module of one is imported when it is called."""
    app = App(
        name="jaxinfer",
        help_epilogue=SETTINGS_HELP.replace("\n", " "),
        help_format="plaintext",
        version=jaxinfer.__version__,
        default_parameter=Parameter(negative=(), show_default=False),
    )
    for name, text in COMMANDS.items():
        member = "app" if name in ("admin", "bench", "config", "token") else name
        app.command(f"jaxinfer.cli.{name}:{member}", name=name, help=text)
    return app


def with_settings(argv: Sequence[str]) -> Iterator[str]:
    """The arguments, with each dotted flag written as the `--set` that it means."""
    switches = {key for key, value in settings.flatten(config.Config()) if isinstance(value, bool)}
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if token == "--":
            yield from (token, *tokens)
            return
        if not _DOTTED.fullmatch(token):
            yield token
            continue
        if "=" not in token:
            is_switch = token.removeprefix("--").replace("-", "_") in switches
            token += f"={_value(tokens, is_switch=is_switch)}"
        yield f"--set={token}"


def say_error(message: str) -> None:
    """One line on stderr, red where there is colour."""
    line = " ".join(message.split())
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True, highlight=False).print(
        Text.assemble(("error: ", "bold red"), (line, "red"))
    )


def _value(tokens: list[str], *, is_switch: bool) -> str:
    """Takes the value of a dotted flag from the tokens after it; a switch may stand alone."""
    following = tokens[0] if tokens else ""
    if is_switch and following.lower() not in ("true", "false", "1", "0"):
        return "true"
    if not tokens or re.match(r"-[A-Za-z-]", following):
        return ""
    return tokens.pop(0)
