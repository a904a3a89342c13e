"""A tokenizer rebuilt from the metadata of a GGUF file, in the JSON of `tokenizers`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from jaxinfer.errors import CheckpointError, UnsupportedModel
from jaxinfer.text.assets import TextAssets
from jaxinfer.text.pretokenizers import PRE_TOKENIZERS, PreTokenizer

PREFIX = "tokenizer.ggml."
SPACE_MARK = "▁"  # how SentencePiece writes a space


class TokenType(IntEnum):
    """What GGUF says about one token."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Vocabulary(NamedTuple):
    """The tokens of a file and the ids that have a role."""

    tokens: list[str]
    types: list[TokenType]
    bos_token: str | None
    eos_token: str | None
    unknown_token: str | None


def from_metadata(metadata: Mapping[str, Any]) -> TextAssets:
    """Rebuilds the tokenizer that a GGUF file's metadata describes.

    The byte-level kind ("gpt2") and the SentencePiece kind ("llama") are known; anything else
    raises UnsupportedModel, and lists that don't fit together raise CheckpointError.
    """
    kind = _text(metadata, PREFIX + "model")
    if _flag(metadata, "add_eos_token", default=False):
        raise UnsupportedModel(
            f"{PREFIX}add_eos_token is true; jaxinfer can't continue a text that is ended"
        )
    vocabulary = _vocabulary(metadata)
    if kind == "gpt2":
        pre = _pre_tokenizer(metadata)
        tokenizer, add_bos = _byte_level(metadata, vocabulary, pre), pre.add_bos
    elif kind == "llama":
        tokenizer, add_bos = _sentence_piece(metadata, vocabulary), True
    else:
        raise UnsupportedModel(
            f"{PREFIX}model is {kind!r}; jaxinfer rebuilds 'gpt2' (byte-level BPE) and 'llama' "
            "(SentencePiece BPE)"
        )
    template = metadata.get("tokenizer.chat_template")
    return TextAssets(
        tokenizer_json=json.dumps(tokenizer, ensure_ascii=False),
        chat_template=None if template is None else str(template),
        bos_token=vocabulary.bos_token,
        eos_token=vocabulary.eos_token,
        add_bos=_flag(metadata, "add_bos_token", default=add_bos)
        and vocabulary.bos_token is not None,
    )


def _vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    tokens = _list(metadata, "tokens")
    if not all(isinstance(token, str) for token in tokens):
        raise CheckpointError(f"{PREFIX}tokens holds something that is no text")
    if len(set(tokens)) != len(tokens):
        seen: set[str] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))
        raise CheckpointError(f"{PREFIX}tokens holds {twice!r} twice")
    codes = _list(metadata, "token_type", of_length=len(tokens), default=TokenType.NORMAL)
    unknown_codes = set(map(int, codes)) - set(TokenType)
    if unknown_codes:
        raise CheckpointError(f"{PREFIX}token_type holds {min(unknown_codes)}; known are 1 to 6")
    return Vocabulary(
        tokens=tokens,
        types=[TokenType(int(code)) for code in codes],
        bos_token=_token(metadata, "bos_token_id", tokens),
        eos_token=_token(metadata, "eos_token_id", tokens),
        unknown_token=_token(metadata, "unknown_token_id", tokens),
    )


def _pre_tokenizer(metadata: Mapping[str, Any]) -> PreTokenizer:
    key = PREFIX + "pre"
    name = _text(metadata, key) if key in metadata else "default"
    if name not in PRE_TOKENIZERS:
        raise UnsupportedModel(
            f"{key} is {name!r}; jaxinfer knows {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    return PRE_TOKENIZERS[name]


def _byte_level(
    metadata: Mapping[str, Any], vocabulary: Vocabulary, pre: PreTokenizer
) -> dict[str, Any]:
    merges: list[list[str]] = []
    for merge in _list(metadata, "merges"):
        pair = str(merge).split(" ")
        if len(pair) != 2:
            raise CheckpointError(f"{PREFIX}merges holds {merge!r}; it must be two tokens")
        merges.append(pair)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    splits = [*pre.steps, {**byte_level, "use_regex": False}]
    return _tokenizer(
        model=_bpe(vocabulary.tokens, merges, ignore_merges=pre.ignore_merges),
        added=_added_tokens(vocabulary),
        normalizer=pre.normalizer,
        pre_tokenizer={"type": "Sequence", "pretokenizers": splits},
        decoder={**byte_level, "use_regex": True},
    )


def _sentence_piece(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    space_prefix = _flag(metadata, "add_space_prefix", default=True)
    scores = _list(metadata, "scores", of_length=len(vocabulary.tokens))
    # A file may spell the spaces of a user's token as spaces; merges only ever see marks.
    tokens = [
        token.replace(" ", SPACE_MARK) if kind is TokenType.USER_DEFINED else token
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
    ]
    tokens = tokens if len(set(tokens)) == len(tokens) else vocabulary.tokens
    has_bytes = TokenType.BYTE in vocabulary.types
    marks = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    spaces = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
    before = [{"type": "Prepend", "prepend": SPACE_MARK}] if space_prefix else []
    after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if space_prefix else []
    return _tokenizer(
        model=_bpe(
            tokens,
            _merges_from_scores(tokens, scores, vocabulary.types),
            unknown=vocabulary.unknown_token,
            byte_fallback=has_bytes,
        ),
        added=_added_tokens(vocabulary),
        normalizer={"type": "Sequence", "normalizers": [*before, marks]},
        pre_tokenizer=None,
        decoder={
            "type": "Sequence",
            "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *after],
        },
    )


def _merges_from_scores(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[TokenType]
) -> list[list[str]]:
    """Every way to make a token of two others, the best score first.

    SentencePiece keeps no merges: it joins the two neighbours whose token scores best.
    """
    ids = {token: place for place, token in enumerate(tokens)}
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, score, kind in zip(tokens, scores, types, strict=True):
        if kind is not TokenType.NORMAL:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append((-float(score), ids[left], ids[right], left, right))
    ranked.sort()
    return [[left, right] for _, _, _, left, right in ranked]


def _bpe(
    tokens: Sequence[str],
    merges: Sequence[Sequence[str]],
    *,
    unknown: str | None = None,
    byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": unknown is not None,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": {token: place for place, token in enumerate(tokens)},
        "merges": merges,
    }


def _added_tokens(vocabulary: Vocabulary) -> Iterator[dict[str, Any]]:
    """Tokens that a text is cut at before anything else; the special ones are not text."""
    ends = (vocabulary.bos_token, vocabulary.eos_token)
    for place, token in enumerate(vocabulary.tokens):
        kind = vocabulary.types[place]
        special = kind in (TokenType.CONTROL, TokenType.UNKNOWN) or token in ends
        if special or kind is TokenType.USER_DEFINED:
            rules = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            yield {"id": place, "content": token, **rules, "special": special}


def _tokenizer(
    *,
    model: dict[str, Any],
    added: Iterator[dict[str, Any]],
    normalizer: Mapping[str, Any] | None,
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def _text(metadata: Mapping[str, Any], key: str) -> str:
    value = metadata.get(key)
    if not isinstance(value, str):
        raise CheckpointError(f"{key} is {value!r}; it must be a text")
    return value


def _flag(metadata: Mapping[str, Any], name: str, *, default: bool) -> bool:
    return bool(metadata.get(PREFIX + name, default))


def _list(
    metadata: Mapping[str, Any], name: str, *, of_length: int | None = None, default: Any = None
) -> list[Any]:
    """A list of the metadata; where it is absent, `default` repeated to the length, if given."""
    key = PREFIX + name
    if key not in metadata and default is not None and of_length is not None:
        return [default] * of_length
    value = metadata.get(key)
    if value is None or isinstance(value, str) or not len(value):
        raise CheckpointError(f"{key} is missing or empty")
    if of_length is not None and len(value) != of_length:
        raise CheckpointError(f"{key} has {len(value)} entries for {of_length} tokens")
    return list(value)


def _token(metadata: Mapping[str, Any], name: str, tokens: Sequence[str]) -> str | None:
    key = PREFIX + name
    if key not in metadata:
        return None
    token_id = int(metadata[key])
    if not 0 <= token_id < len(tokens):
        raise CheckpointError(f"{key} is {token_id}, but there are {len(tokens)} tokens")
    return tokens[token_id]
