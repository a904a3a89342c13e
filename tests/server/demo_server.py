"""A server process with the demo model, for tests of what others bring to it."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxinfer import demo

MODEL = "smollm2-135m"


@contextmanager
def serving(*options: str) -> Iterator[tuple["subprocess.Popen[str]", dict[str, Any]]]:
    """The process until the end of the block, and what it said when it was ready."""
    command = [sys.executable, "-m", "jaxinfer", "serve", "--json", "-m", MODEL]
    command += ["--engine.max-seq-len", "512", "--server.port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process, demo._event(process, "ready")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
