"""One process of a group: `python -m jaxinfer.cluster.rank`, told on stdin what it is.

Its first line on stdin is a Spec with the group's key, which so stands in no argument and no
variable; the word `stop` ends the group, and the end of stdin this process. What it says on stdout
are events for whoever started it: one JSON object a line.
"""

import json
import logging
import signal
import sys
import traceback

from jaxinfer.cluster import follower, leader
from jaxinfer.cluster.process import FAILED, WRONG, Process, Spec
from jaxinfer.errors import (
    CheckpointError,
    ConfigError,
    GroupRefused,
    InvalidRequest,
    JaxinferError,
)


def main() -> None:
    """Runs until the group ends."""
    line = sys.stdin.readline()
    if not line:
        return  # whoever started this process is gone already
    spec = Spec(**json.loads(line))
    logging.basicConfig(
        level=logging.INFO if spec.is_debug else logging.WARNING,
        format=f"%(asctime)s %(levelname)s rank {spec.rank} %(name)s: %(message)s",
        force=True,  # a library may have set it as it was imported
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # stdin says when to end
    process = Process(spec)
    code = FAILED
    try:
        (leader if spec.rank == 0 else follower).run(process)
    except JaxinferError as error:
        wrong = isinstance(error, ConfigError | CheckpointError | InvalidRequest | GroupRefused)
        code = WRONG if wrong else FAILED
        process.end(code, str(error))
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        process.end(code, "it failed, as the log says" if code else "")


if __name__ == "__main__":
    main()
