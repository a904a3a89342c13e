"""`jaxinfer demo`: a server of its own, six questions at once, and what it took."""

from jaxinfer.cli.options import COMMON, Common


def demo(*, prompt: str | None = None, max_tokens: int = 64, common: Common = COMMON) -> None:
    """Starts a server, asks six things at once over gRPC, shows the answers and what they took.

    Parameters
    ----------
    prompt
        Asks this one thing instead.
    max_tokens
        The length of an answer; 64 without it.
    """
    common.load()  # a wrong setting is said here, not by the server
    from jaxinfer import demo as show

    prompts = show.PROMPTS if prompt is None else (prompt,)
    show.run(prompts, max_tokens=max_tokens, arguments=common.arguments())
