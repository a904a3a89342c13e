"""Chat templates: what Hugging Face renders, and clear errors."""

import json
from datetime import datetime
from typing import Any

import pytest

from jaxinfer.errors import InvalidRequest
from jaxinfer.text import chat, sandbox
from jaxinfer.text.assets import TextAssets

HELLO = [{"role": "user", "content": "Hello"}]
PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


def render(template: str | None, messages: list[Any] = HELLO, **kwargs: Any) -> str:
    assets = TextAssets("{}", template, bos_token="<s>", eos_token="</s>")
    return chat.render(assets, messages, **kwargs)


def test_blocks_leave_no_blank_lines() -> None:
    template = (
        "{{ bos_token }}\n  {% for m in messages %}\n"
        "{{ m['content'] }}{{ eos_token }}\n  {% endfor %}\n"
    )
    assert render(template, HELLO * 2) == "<s>\nHello</s>\nHello</s>\n"


def test_loop_controls_and_generation_marks_are_accepted() -> None:
    template = (
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    assert render(template, HELLO * 3) == "HelloHello"


def test_json_is_not_escaped() -> None:
    tools = [{"name": "größer", "text": "<a & 'b'>"}]
    assert render("{{ tools | tojson }}", tools=tools) == json.dumps(tools, ensure_ascii=False)
    assert render("{{ tools | tojson(indent=2) }}", tools=tools) == json.dumps(
        tools, ensure_ascii=False, indent=2
    )


def test_tools_are_none_unless_given() -> None:
    assert render("{{ tools is none }} {{ documents is none }}") == "True True"


def test_the_generation_prompt_can_be_left_out() -> None:
    template = "{% if add_generation_prompt %}assistant:{% endif %}"
    assert render(template) == "assistant:"
    assert render(template, add_generation_prompt=False) == ""


def test_further_variables_reach_the_template() -> None:
    template = "{{ enable_thinking is defined and enable_thinking }}"
    assert render(template) == "False"
    assert render(template, variables={"enable_thinking": True}) == "True"


def test_a_token_that_is_not_set_is_not_defined() -> None:
    assert chat.render(TextAssets("{}", "{{ bos_token is defined }}"), HELLO) == "False"


def test_time_comes_in_as_data() -> None:
    day = datetime(2024, 7, 26)
    assert render("{{ strftime_now('%d %b %Y') }}", now=day) == "26 Jul 2024"
    assert render("{{ strftime_now('%Y') }}") >= "2024"


def test_a_templates_own_refusal_reaches_the_caller() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content.missing.deeper }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 // 0 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(999999) %}{% endfor %}",
        "{{ 'x' | no_such_filter }}",
        "{% for m in messages %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_a_failing_template_is_a_refused_request(template: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template") as caught:
        render(template)
    assert caught.value.field == "messages"


def test_no_template_is_a_refused_request() -> None:
    with pytest.raises(InvalidRequest, match="no chat template") as caught:
        render(None)
    assert caught.value.field == "messages"


def test_a_rendered_chat_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_CHARS", 1000)
    with pytest.raises(InvalidRequest, match="more than 1000 char"):
        render("{% for i in range(9999) %}{{ messages[0].content }}{% endfor %}")


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([], "messages is empty"),
        ([{"content": "hi"}], r"messages\[0\] has the role None"),
        ([*HELLO, {"role": "user"}], r"messages\[1\].content is null or absent"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content is a number"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"content\[0\] is of type 'image'"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\] must be an object"),
        ([{"role": "user", "content": ["hi"]}], r"content\[0\] must be an object"),
        ([{"role": "user", "content": "\udc00"}], "half a surrogate pair"),
    ],
)
def test_bad_messages_are_refused_by_place(messages: list[Any], text: str) -> None:
    with pytest.raises(InvalidRequest, match=text) as caught:
        render(PLAIN, messages)
    assert caught.value.field == "messages"


def test_content_may_be_absent_beside_tool_calls() -> None:
    call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    assert render("{{ messages[0].tool_calls[0].name }}", [call]) == "f"


def test_parts_reach_a_template_that_reads_them() -> None:
    template = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}"
        "{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
    )
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert render(template, [{"role": "user", "content": parts}]) == "onetwo"


def test_parts_are_joined_for_a_template_that_reads_text_only() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert render(PLAIN, [{"role": "user", "content": parts}]) == "[user] one\ntwo\n"


def test_messages_are_left_as_they_were() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "one"}]}]
    before = json.dumps(messages)
    render(PLAIN, messages)
    assert json.dumps(messages) == before
