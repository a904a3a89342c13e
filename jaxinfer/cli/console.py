"""Where tables go: as wide as the terminal, and of one width where there is none."""

import sys

from rich.console import Console


def console(width: int = 100) -> Console:
    """For stdout; what a pipe or a file gets is `width` columns wide."""
    return Console() if sys.stdout.isatty() else Console(width=width)
