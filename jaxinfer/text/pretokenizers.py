"""How the byte-level tokenizers that GGUF files name cut a text before merging."""

from collections.abc import Mapping
from typing import Any, NamedTuple

Step = Mapping[str, Any]


class PreTokenizer(NamedTuple):
    """What one value of `tokenizer.ggml.pre` means, as parts of a `tokenizers` JSON."""

    steps: tuple[Step, ...]
    normalizer: Step | None = None
    ignore_merges: bool = False  # a piece that is a token stays whole, whatever the merges say
    add_bos: bool = False  # where the file doesn't say


def _split(pattern: str) -> Step:
    """Cuts out every match; what lies between matches stays too."""
    rule = {"type": "Split", "pattern": {"Regex": pattern}}
    return {**rule, "behavior": "Isolated", "invert": False}


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_DEFAULT = PreTokenizer(
    (
        _split(r"[\p{P}\$\+<=>\^~\|]+"),
        _split(GPT2),
        _split(r"\p{N}+"),
        _split(r"[0-9][0-9][0-9]"),
    )
)
_GPT2 = PreTokenizer((_split(GPT2),))
_DIGITS = PreTokenizer(({"type": "Digits", "individual_digits": True}, _split(GPT2)))
_LLAMA3 = PreTokenizer((_split(LLAMA3),), ignore_merges=True, add_bos=True)
_QWEN2 = PreTokenizer((_split(QWEN2),), normalizer={"type": "NFC"})
_TEKKEN = PreTokenizer((_split(TEKKEN),), ignore_merges=True, add_bos=True)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "default": _DEFAULT,
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "olmo": _GPT2,
    "mpt": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "codeshell": _DIGITS,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "smaug-bpe": PreTokenizer((_split(LLAMA3),)),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
    "tekken": _TEKKEN,
}
