"""Every deliberate error of jaxinfer, as one tree.

    JaxinferError
    ├── InvalidRequest        the caller's request can't be served as asked   INVALID_ARGUMENT
    │   ├── UnknownModel      no model of that name here                      NOT_FOUND
    │   └── DuplicateRequest  a live request has that id already              ALREADY_EXISTS
    ├── Refused               a good request, at a bad moment
    │   ├── QueueFull         the waiting line is at its bound                RESOURCE_EXHAUSTED
    │   └── Draining          the engine takes no new requests                UNAVAILABLE
    ├── DeadlinePassed        the request's time ran out                      DEADLINE_EXCEEDED
    ├── ClientError           a call failed on its way, or for an unknown reason
    │   └── Unreachable       no server answers there, or it went away
    ├── ConfigError           a settings file, variable or flag is wrong
    ├── CheckpointError       weights, tokenizer or model settings are wrong
    │   └── UnsupportedModel  readable, but not something jaxinfer can run
    ├── DownloadError         the demo model can't be fetched
    ├── OutOfPages            asked the pool for more pages than are free
    ├── CompileAfterStart     a program was compiled after the engine was built
    ├── ProgramRefused        a stored program is damaged, foreign or stale
    ├── JournalRefused        a journal is damaged, or can't be run again as asked
    ├── SnapshotRefused       a snapshot of live requests is damaged or foreign
    └── EngineFailed          a step failed; the requests in it are lost      INTERNAL

A message says what was asked, what there was, and what to change.
"""


class JaxinferError(Exception):
    """The root: whatever jaxinfer raises on purpose."""


class InvalidRequest(JaxinferError, ValueError):
    """A request can't be served as asked; `field` names the part of it that is wrong."""

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class UnknownModel(InvalidRequest):
    """No model of that name is served here."""


class DuplicateRequest(InvalidRequest):
    """A live request has that id already."""


class Refused(JaxinferError):
    """A good request that can't be taken now; the same request may be taken later."""


class QueueFull(Refused):
    """The waiting line is at its bound."""


class Draining(Refused):
    """The engine is finishing what it has and takes nothing new."""


class DeadlinePassed(JaxinferError, TimeoutError):
    """The request's time ran out before it was finished."""


class ClientError(JaxinferError):
    """A call failed, and not by an answer of jaxinfer's; `code` is the gRPC status."""

    def __init__(self, message: str, *, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class Unreachable(ClientError):
    """No server answers at that address, or it went away in the middle of a call."""


class ConfigError(JaxinferError, ValueError):
    """A settings file, environment variable or flag is wrong."""


class CheckpointError(JaxinferError, ValueError):
    """Weights, tokenizer or model settings are damaged or don't fit together."""


class UnsupportedModel(CheckpointError):
    """A model that can be read but not run."""


class DownloadError(JaxinferError):
    """The demo model can't be fetched or isn't what it should be."""


class OutOfPages(JaxinferError):
    """The page pool has fewer free pages than were asked for."""


class CompileAfterStart(JaxinferError):
    """A program was traced or compiled after the engine was built."""


class ProgramRefused(JaxinferError):
    """A stored program or manifest is damaged, foreign or stale; compiling makes a new one."""


class JournalRefused(JaxinferError):
    """A journal is damaged, of another format, or can't be run again as asked."""


class SnapshotRefused(JaxinferError):
    """A snapshot of live requests is damaged, of another format, or of another model."""


class EngineFailed(JaxinferError):
    """A step failed on the device."""
