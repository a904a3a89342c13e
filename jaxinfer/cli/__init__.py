"""The command `jaxinfer`: its table of commands, and an overview that needs no library."""

import sys
from collections.abc import Sequence

import jaxinfer

COMMANDS = {
    "demo": "Starts a server, asks it six things at once, shows answers and numbers.",
    "generate": "Continues one prompt, without a server.",
    "chat": "Talks with a model, on the terminal or line by line from a pipe.",
    "serve": "Serves a model over gRPC until SIGTERM or Ctrl-C.",
    "cluster": "Serves one model from several processes, on one machine or many.",
    "top": "Shows what a running server does: slots, pages, rates and times.",
    "explain": "Says where the time of one request went, on a running server.",
    "admin": "Looks into a running server, and drains, aborts, flushes or traces it.",
    "inspect": "Shows the parameter tree of a model and the memory plan of the settings.",
    "plan": "Says what memory a model takes, and how many sequences fit.",
    "compile": "Builds every program of the settings, so that the next start loads them.",
    "quantize": "Writes a checkpoint with int8 weights, and how far it is from the model.",
    "validate": "Compares quantised weights with those that they were made of.",
    "simulate": "Predicts what clients of a workload would see, without a model.",
    "replay": "Runs a journal again and points at the first difference.",
    "trace": "Draws a journal as a timeline of slots and steps, for Perfetto.",
    "bench": "Measures this machine with a model, against what it could do.",
    "tune": "Times the tile sizes of the attention kernel on this device, and writes the best.",
    "ablate": "Switches each lever of the settings off, and on alone: what each is worth.",
    "token": "Makes, lists and revokes the tokens that clients of a server show.",
    "config": "Shows, compares and describes settings.",
    "doctor": "Says what would keep jaxinfer from running on this machine.",
}
"""One line a command; each lives in the module of its name, loaded when it is called."""

SETTINGS_HELP = """\
Every setting is a flag: --engine.num-slots 32 --engine.cache.page-size 32; a later one of these
wins: defaults, files of -c left to right, environment (JAXINFER_ENGINE__NUM_SLOTS=32), flags.
`jaxinfer config show` prints them all."""


def main() -> None:
    """Runs one command and exits: 0 done, 2 the input or a setting is wrong, 1 anything else."""
    sys.exit(run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    """Runs one command and returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return 0
    from jaxinfer.cli import app

    return app.run(argv)


def overview() -> str:
    """What `jaxinfer --help` says."""
    width = max(map(len, COMMANDS)) + 2
    lines = (f"  {name:<{width}}{text}" for name, text in COMMANDS.items())
    return f"""\
jaxinfer {jaxinfer.__version__}: runs language models with JAX, in this process or as a gRPC server.

  jaxinfer COMMAND --help     the options of a command
  jaxinfer --version

{chr(10).join(lines)}

{SETTINGS_HELP}"""
