"""The child process behind the OpenAI door: the gateway `smg`, told by stdin and never by argv.

Its first line of stdin has the settings, the key among them, as other users can read a command
line. The end of stdin is the end of its parent, and so its own.
"""

import json
import os
import sys
import threading

from smg.router import Router  # pyright: ignore[reportMissingImports]
from smg.router_args import RouterArgs  # pyright: ignore[reportMissingImports]


def main() -> None:
    """Serves until SIGTERM, or until the parent is gone."""
    settings = json.loads(sys.stdin.readline())
    # The only key of the gateway's control plane, so that a client's key can't change its workers.
    operators = [("nobody", "nobody", settings.pop("control_key"), "admin")]
    threading.Thread(target=_end_with_parent, daemon=True).start()
    Router.from_args(RouterArgs(**settings, control_plane_api_keys=operators)).start()


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
