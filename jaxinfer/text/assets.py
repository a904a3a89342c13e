"""What a checkpoint says about text: its tokenizer and its chat template."""

from dataclasses import dataclass

from jaxinfer.errors import InvalidRequest


@dataclass(frozen=True)
class TextAssets:
    """Everything that a Tokenizer is built from; plain strings, so that it can be stored."""

    tokenizer_json: str
    """The JSON of the Hugging Face `tokenizers` library."""
    chat_template: str | None = None
    """Jinja source; None where the model has no chat format."""
    bos_token: str | None = None
    eos_token: str | None = None
    add_bos: bool = False
    """Put the first token before a text; only where the JSON has no post-processor that does."""


def check_unicode(text: str, *, field: str) -> None:
    """Raises InvalidRequest, naming the field, on a text that has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{field} has half a surrogate pair, {text[error.start]!r}, at character "
            f"{error.start}; it must be valid Unicode",
            field=field,
        ) from error
