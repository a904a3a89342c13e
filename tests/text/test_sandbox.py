"""Templates of a hostile checkpoint: none gets out, and none takes more than a chat needs."""

import inspect
import itertools
import time

import pytest

from jaxinfer.errors import InvalidRequest
from jaxinfer.text import chat
from jaxinfer.text.assets import TextAssets
from jaxinfer.text.sandbox import RENDER_S, TooMuch, bounded

ESCAPES = tuple(
    f"{{{{ {start}{path} }}}}"
    for start in ("''", "()", "messages", "cycler", "self", "range", "namespace", "strftime_now")
    for path in (
        ".__class__.__mro__[1].__subclasses__()",
        ".__init__.__globals__",
        ".__class__.__base__.__subclasses__()[0].__init__.__globals__['__builtins__']",
        "|attr('__class__')|attr('__mro__')",
        "['__class__']['__mro__'][0]",
        ".format.__self__.__class__.__init__.__globals__",
    )
)
LOOP = "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}"
BOMBS = (
    "{{ 'a' * 10**9 }}",
    "{{ (9**9) ** (9**9) }}",
    "{{ [1] * 10**9 }}",
    "{{ 10 ** 100000 }}",
    "{{ range(10**10) | list }}",
    "{{ 'a' | center(10**9) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ '%999999999d' | format(1) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 999999999) }}",
    "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "{{ ('a' * 4000000) | wordwrap(1, true, 'b' * 90000) }}",
    "{{ ('\\n' * 100000) | indent(90000) }}",
    "{{ messages | tojson(indent=99999999) }}",
    "{{ ('a' * 3000000).join(range(100000) | map('string') | list) }}",
    "{{ range(99999) | map('center', 90000) | join }}",
    LOOP + "{% set n.x = n.x ~ n.x %}{% endfor %}",
    LOOP + "{% set n.x = n.x + n.x %}{% endfor %}",
    LOOP + "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}",
)


COSTLY = (
    "{{ range(99999) | list | sort | length }}" * 40,
    "{{ ['ab' * 500000] | map('replace', 'a', 'c') | join | length }}" * 40,
    "{% set x = 'ab' * 1900000 %}" + "{{ (x + 'c') | length }}" * 40,
    "{{ ('ab' * 500000).replace('a', 'c') | length }}" * 40,
    "{% for i in range(5000) %}{% if 'q' in messages %}{% endif %}{% endfor %}",
    "{% for i in range(900) %}{{ i }}{% endfor %}",
)
"""None makes much text or many turns; together they take long."""


def render(template: str) -> str:
    return chat.render(TextAssets("{}", template), [{"role": "user", "content": "{{ 7*7 }}"}])


@pytest.mark.parametrize("template", ESCAPES)
def test_no_template_reaches_pythons_own_objects(template: str) -> None:
    try:
        text = render(template)
    except InvalidRequest as error:
        text = str(error)
    for word in ("<class", "__", "builtin", "0x", "object at"):
        assert word not in text.replace(template, ""), text


@pytest.mark.parametrize("template", BOMBS)
def test_every_bomb_is_a_refused_request(template: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render(template)
    assert caught.value.field == "messages" and len(str(caught.value)) < 300


def test_what_a_chat_needs_is_let_through() -> None:
    assert render("{{ messages[0].content }}") == "{{ 7*7 }}"
    assert render("{{ 'x' * 3 ~ (1 + 2) }}{{ '%s of %d' % ('a', 5) }}") == "xxx3a of 5"
    assert render("{{ 'Today is the {}'.format('20261121') }}") == "Today is the 20261121"
    assert render("{{ [1, 2] | join('-') }}{{ 1234567 | string }}") == "1-21234567"
    assert render("{{ ['a', 'b'] | map('upper') | join }}{{ ', '.join(['x', 'y']) }}") == "ABx, y"
    assert render("{% for i in range(9) if i > 6 %}{{ loop.index }}{{ i }}{% endfor %}") == "1728"


@pytest.mark.parametrize("template", COSTLY)
def test_processor_time_is_bounded_whatever_it_is_spent_on(template: str) -> None:
    looks = itertools.count()

    def clock() -> float:
        return next(looks) * RENDER_S / 20  # the twentieth look comes too late

    with pytest.raises(TooMuch, match="s of processor time"):
        bounded(chat._compile(template), {"messages": [{}]}, clock=clock)
    assert next(looks) < 30


def test_long_conversations_may_take_longer() -> None:
    template = chat._compile("{% for m in messages %}{{ m }}{% endfor %}")

    def render_with(num_messages: int, spent_s: float) -> str:
        times = itertools.chain([0.0], itertools.repeat(spent_s))
        return bounded(template, {"messages": ["x"] * num_messages}, clock=lambda: next(times))

    assert render_with(4000, 0.5) == "x" * 4000
    with pytest.raises(TooMuch):
        render_with(400, 0.5)


def test_the_clock_is_that_of_the_threads_own_work() -> None:
    assert inspect.signature(bounded).parameters["clock"].default is time.thread_time
