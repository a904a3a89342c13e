"""What is sent: the requests of a recipe, each with its time, its prompt and its answer's length.

The same recipe and seed give the same calls, to the last token.
"""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from jaxinfer.bench.load import arrivals
from jaxinfer.bench.load.arrivals import Pattern
from jaxinfer.bench.load.lengths import Lengths
from jaxinfer.host.workload import Arrival, Workload

Prompt = str | tuple[int, ...]
BLOCK = 512
"""Tokens of a block that traces with hash_ids name."""
WORDS = (
    *("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world"),
    *("school", "state", "family", "student", "group", "country", "problem", "hand", "part"),
    *("place", "case", "week", "company", "system", "program", "question", "work", "number"),
    *("night", "point", "home", "water", "room", "mother", "area", "money", "story", "fact"),
    *("month", "lot", "right", "study", "book", "eye", "job", "word", "business", "issue", "side"),
    *("kind", "head", "house", "service", "friend", "father", "power", "hour", "game", "line"),
)
"""Plain words that most tokenizers know as one token each."""


@dataclass(frozen=True)
class Item:
    """A request as a workload has it; what is not given is made up from the seed."""

    arrival: Arrival
    prompt: Prompt | None = None
    blocks: tuple[int, ...] = ()
    """Names of the prompt's blocks of 512 tokens: equal names are equal tokens."""


@dataclass(frozen=True)
class Recipe:
    """How a workload is made; with a concurrency its times are left aside."""

    prompt: Lengths = Lengths(20, 60)
    output: Lengths = Lengths(16, 48)
    num_requests: int = 64
    rate_per_s: float | None = None
    concurrency: int | None = None
    pattern: Pattern = Pattern()
    num_shared_tokens: int = 0
    num_groups: int = 1
    """Groups of prompts, each with first tokens of its own in common."""
    seed: int = 0
    rows: tuple[Item, ...] = ()
    """Of a file; empty where all is made up."""
    has_times: bool = False
    """Whether the rows' own times count."""
    is_exact: bool = False
    """Whether drawn times are stretched, so that few requests have the mean rate too."""


@dataclass(frozen=True)
class Call:
    """One request, ready to send."""

    number: int
    at_s: float
    prompt: Prompt
    num_output_tokens: int
    priority: int = 0


def at_rate(recipe: Recipe, rate_per_s: float, *, seconds: float | None = None) -> Recipe:
    """The recipe in an open loop of exactly this rate, and as many requests as last so long."""
    count = recipe.num_requests if seconds is None else max(1, math.ceil(rate_per_s * seconds))
    return replace(
        recipe,
        rate_per_s=rate_per_s,
        concurrency=None,
        has_times=False,
        is_exact=True,
        num_requests=count,
    )


def calls_of(
    recipe: Recipe, *, vocab_size: int | None, prompt_seed: int | None = None
) -> list[Call]:
    """All calls, by their times.

    Made-up prompts are tokens below `vocab_size`, or words where the server counts tokens itself.
    Another `prompt_seed` gives the same lengths and times with other made-up prompts.
    """
    seed = recipe.seed if prompt_seed is None else prompt_seed
    items = items_of(recipe)
    calls = [
        Call(
            number,
            item.arrival.at_s,
            item.prompt if item.prompt is not None else _made_up(item, number, vocab_size, seed),
            item.arrival.num_output_tokens,
            item.arrival.priority,
        )
        for number, item in enumerate(items)
    ]
    return sorted(calls, key=lambda call: call.at_s)


def items_of(recipe: Recipe) -> list[Item]:
    """The requests with their times and lengths; their prompts may still be missing."""
    rng = random.Random(recipe.seed)
    pairs = ((recipe.prompt.draw(rng), recipe.output.draw(rng)) for _ in itertools.count())
    if recipe.rows and recipe.has_times:
        count = min(recipe.num_requests, len(recipe.rows))
    else:
        count = recipe.num_requests
    rows: Iterator[Item] = itertools.cycle(recipe.rows or (Item(Arrival(0.0, 0, 0)),))
    groups = random.Random(f"groups {recipe.seed}")
    items = [
        _filled(row, pair, recipe, groups.randrange(recipe.num_groups))
        for row, pair in zip(itertools.islice(rows, count), pairs, strict=False)
    ]
    if recipe.rate_per_s is None:
        return items
    at_s = arrivals.times(
        recipe.pattern, rate_per_s=recipe.rate_per_s, count=count, seed=recipe.seed
    )
    if recipe.is_exact and at_s[-1] > 0:
        stretch = (count - 1) / recipe.rate_per_s / at_s[-1]
        at_s = [one * stretch for one in at_s]
    return [
        replace(item, arrival=replace(item.arrival, at_s=one))
        for item, one in zip(items, at_s, strict=True)
    ]


def prompts_of(workload: Workload, *, vocab_size: int, seed: int) -> list[list[int]]:
    """Random tokens for every request; the first ones are those of its group."""
    return [
        list(_tokens(arrival, number, vocab_size, seed))
        for number, arrival in enumerate(workload.arrivals)
    ]


def _filled(row: Item, pair: tuple[int, int], recipe: Recipe, group: int) -> Item:
    """A row with the lengths it lacks; 0 stands for a length that a row doesn't say."""
    arrival = row.arrival
    num_prompt, num_output = pair
    if not recipe.rows:
        arrival = replace(arrival, num_shared_tokens=recipe.num_shared_tokens, group=group)
    arrival = replace(
        arrival,
        num_prompt_tokens=arrival.num_prompt_tokens or num_prompt,
        num_output_tokens=arrival.num_output_tokens or num_output,
    )
    return replace(row, arrival=arrival)


def _made_up(item: Item, number: int, vocab_size: int | None, seed: int) -> Prompt:
    if item.blocks:
        tokens = _block_tokens(item, vocab_size or len(WORDS), seed)
    else:
        tokens = _tokens(item.arrival, number, vocab_size or len(WORDS), seed)
    return tokens if vocab_size is not None else " ".join(WORDS[token] for token in tokens)


def _tokens(arrival: Arrival, number: int, vocab_size: int, seed: int) -> tuple[int, ...]:
    group = random.Random(f"group {seed} {arrival.group}")
    own = random.Random(f"own {seed} {number}")
    num_shared = min(arrival.num_shared_tokens, arrival.num_prompt_tokens)
    shared = [group.randrange(vocab_size) for _ in range(num_shared)]
    rest = range(arrival.num_prompt_tokens - num_shared)
    return (*shared, *(own.randrange(vocab_size) for _ in rest))


def _block_tokens(item: Item, vocab_size: int, seed: int) -> tuple[int, ...]:
    rngs = [random.Random(f"block {seed} {name}") for name in item.blocks]
    tokens = (rng.randrange(vocab_size) for rng in rngs for _ in range(BLOCK))
    return tuple(itertools.islice(tokens, item.arrival.num_prompt_tokens))
