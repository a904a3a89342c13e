"""Every deliberate error of jaxinfer, as one tree.

    JaxinferError
    ├── InvalidRequest        the caller's request can't be served as asked   INVALID_ARGUMENT
    │   ├── UnknownModel      no model of that name here                      NOT_FOUND
    │   ├── DuplicateRequest  a live request has that id already              ALREADY_EXISTS
    │   └── UnknownRequest    no request of that id is known                  NOT_FOUND
    ├── NeverFits             a request that can't ever be let in             FAILED_PRECONDITION
    ├── SlowReader            a client takes nothing of its stream            ABORTED
    ├── Refused               a good request, at a bad moment
    │   ├── QueueFull         the waiting line is at its bound                RESOURCE_EXHAUSTED
    │   ├── QuotaExceeded     the tenant has taken its share                  RESOURCE_EXHAUSTED
    │   └── Draining          the engine takes no new requests                UNAVAILABLE
    ├── Unauthenticated       no token, or not one of the server's            UNAUTHENTICATED
    ├── Forbidden             the token is not for that method                PERMISSION_DENIED
    ├── DeadlinePassed        the request's time ran out                      DEADLINE_EXCEEDED
    ├── EndedByOperator       an operator ended the request                   CANCELLED
    ├── OutOfTurn             an operator's call that does not fit the state  FAILED_PRECONDITION
    ├── ClientError           a call failed on its way, or for an unknown reason
    │   └── Unreachable       no server answers there, or it went away
    ├── ConfigError           a settings file, variable or flag is wrong
    ├── CheckpointError       weights, tokenizer or model settings are wrong
    │   ├── UnsupportedModel  readable, but not something jaxinfer can run
    │   └── QualityRefused    quantised weights that are too far from their reference
    ├── DownloadError         the demo model can't be fetched
    ├── OutOfPages            asked the pool for more pages than are free
    ├── CompileAfterStart     a program was compiled after the engine was built
    ├── ProgramRefused        a stored program is damaged, foreign or stale
    ├── JournalRefused        a journal is damaged, or can't be run again as asked
    ├── SnapshotRefused       a snapshot of live requests is damaged or foreign
    ├── GroupError            the processes that share a model can't go on together
    │   ├── GroupRefused      a process has another key, version or outcome than the others
    │   └── PeerLost          a process of the group is gone, or silent
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


class UnknownRequest(InvalidRequest):
    """No request of that id is live, or remembered."""


class NeverFits(JaxinferError):
    """A request larger than this server can ever let in, as it is set."""


class SlowReader(JaxinferError):
    """A client took nothing of its stream for too long; the request was ended."""


class Refused(JaxinferError):
    """A good request that can't be taken now; it may be taken in `retry_after_s`."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(Refused):
    """The waiting line is at its bound."""


class QuotaExceeded(Refused):
    """A tenant is at one of its quotas; `retry_after_s` says when to ask again."""

    def __init__(
        self, message: str, *, quota: str = "", tenant: str = "", retry_after_s: float = 1.0
    ) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.quota = quota
        self.tenant = tenant


class Draining(Refused):
    """The engine is finishing what it has and takes nothing new."""


class Unauthenticated(JaxinferError):
    """A call without a token, or with one that is not the server's."""


class Forbidden(JaxinferError):
    """A call whose token is not for that method."""


class DeadlinePassed(JaxinferError, TimeoutError):
    """The request's time ran out before it was finished."""


class EndedByOperator(JaxinferError):
    """An operator ended the request; asking again is no way around that."""


class OutOfTurn(JaxinferError):
    """An operator's call does not fit what the server does now."""


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


class QualityRefused(CheckpointError):
    """Quantised weights that are further from their reference than the settings allow."""


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


class GroupError(JaxinferError):
    """The processes that share a model can't go on together."""


class GroupRefused(GroupError):
    """A process has another key, version, setting or outcome than the rest of its group."""


class PeerLost(GroupError):
    """Another process of the group is gone, or says nothing any more."""


class EngineFailed(JaxinferError):
    """A step failed on the device."""
