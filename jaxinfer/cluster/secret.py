"""The key that the processes of a group prove to each other."""

import hashlib
import secrets
from pathlib import Path

from jaxinfer.cluster.place import Place
from jaxinfer.edge_config import ClusterConfig
from jaxinfer.errors import ConfigError
from jaxinfer.server.watched import check_private

MIN_CHARS = 32
HOW = "head -c 32 /dev/urandom | base64 > FILE; chmod 600 FILE"


def find_key(config: ClusterConfig, place: Place) -> bytes:
    """The one in `cluster.key_file`, or a new one for a group that is all on this machine."""
    if not config.key_file:
        if place.is_alone:
            return secrets.token_bytes(32)
        raise ConfigError(
            f"cluster.key_file is not set, and a group of {place.size} processes that are started "
            f"apart needs one, the same for all: {HOW}"
        )
    path = Path(config.key_file).expanduser()
    check_private(path, "cluster.key_file")
    text = path.read_text(errors="replace").strip()
    if len(text) < MIN_CHARS:
        raise ConfigError(
            f"cluster.key_file = {str(path)!r} holds {len(text)} characters; at least {MIN_CHARS} "
            f"are needed: {HOW}"
        )
    return hashlib.sha256(text.encode()).digest()
