"""The command `jaxinfer`. Nothing here imports JAX before a command needs it."""

import re
import sys
from collections.abc import Iterator, Sequence

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console
from rich.text import Text

import jaxinfer
from jaxinfer import config
from jaxinfer.cli import chat, configs, demo, doctor, generate, inspect, serve
from jaxinfer.errors import ConfigError, InvalidRequest, JaxinferError

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
EPILOGUE = """Any setting is a flag too: `--engine.num-slots 32 --engine.cache.page-size 32`. Order:
defaults, files of -c left to right, environment (JAXINFER_ENGINE__NUM_SLOTS=32), flags.
`jaxinfer config show` prints all of them."""

_DOTTED = re.compile(r"--[A-Za-z][\w-]*(\.[\w-]+)+(=.*)?", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command and exits: 0 done, 2 the input or a setting is wrong, 1 anything else."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


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
        return BAD_INPUT if isinstance(error, CycloptsError | ConfigError | InvalidRequest) else FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader left, as `| head` does
        sys.stderr.close()
        return FAILED
    return code if isinstance(code, int) else 0


def make_app() -> App:
    """All commands."""
    plain = Parameter(negative=(), show_default=False)
    app = App(
        name="jaxinfer",
        help="Runs large language models with JAX: in this process, or as a gRPC server.",
        help_epilogue=EPILOGUE,
        help_format="markdown",
        version=jaxinfer.__version__,
        default_parameter=plain,
    )
    app.command(demo.demo)
    app.command(generate.generate)
    app.command(chat.chat)
    app.command(serve.serve)
    app.command(inspect.inspect)
    app.command(configs.make_app(plain))
    app.command(doctor.doctor)
    return app


def with_settings(argv: Sequence[str]) -> Iterator[str]:
    """The arguments, with each dotted flag written as the `--set` that it means."""
    switches = {key for key, value in config.flatten(config.Config()) if isinstance(value, bool)}
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
