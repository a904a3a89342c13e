"""Tokenizer, chat template, advice on sampling and end tokens of a Hugging Face folder."""

import json
import logging

import pytest

from jaxinfer import weights
from jaxinfer.errors import CheckpointError
from jaxinfer.host.request import SamplingParams
from tests.weights import folders


@pytest.fixture
def describe(tmp_path):
    """Writes some JSON files beside a tiny model and describes the folder."""

    def call(**files):
        folders.write_hf(tmp_path)
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return weights.describe(tmp_path)

    return call


def test_a_bare_folder_has_a_tokenizer_and_nothing_else(describe):
    source = describe()
    assert json.loads(source.text.tokenizer_json) == folders.TOKENIZER
    assert source.text.chat_template is source.text.bos_token is source.text.eos_token is None
    assert not source.text.add_bos
    assert source.sampling == SamplingParams()


def test_special_tokens_are_strings_or_objects(describe):
    text = describe(
        tokenizer_config={"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    ).text
    assert (text.bos_token, text.eos_token) == ("<s>", "</s>")


@pytest.mark.parametrize(
    "template",
    ["hello", [{"name": "tool", "template": "no"}, {"name": "default", "template": "hello"}]],
)
def test_a_chat_template_is_a_string_or_the_default_of_a_list(describe, template):
    assert describe(tokenizer_config={"chat_template": template}).text.chat_template == "hello"


def test_a_template_file_wins(describe, tmp_path):
    (tmp_path / "chat_template.jinja").write_text("from the file")
    text = describe(tokenizer_config={"chat_template": "from the config"}).text
    assert text.chat_template == "from the file"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"tokenizer_config": {"chat_template": [{"name": "tool", "template": "x"}]}}, "default"),
        ({"tokenizer_config": {"chat_template": [3]}}, "a name and a template"),
        ({"tokenizer_config": {"chat_template": 3}}, "chat_template is 3"),
        ({"tokenizer_config": {"bos_token": 1}}, "bos_token is 1"),
        ({"tokenizer_config": []}, "must be an object"),
        ({"generation_config": {"temperature": "hot"}}, "temperature is 'hot'"),
        ({"generation_config": {"top_k": 0.5}}, "top_k is 0.5"),
        ({"generation_config": {"do_sample": "yes"}}, "do_sample is 'yes'"),
        ({"generation_config": {"eos_token_id": 48}}, "end token 48 is outside"),
        (
            {"tokenizer": {"added_tokens": 3}, "tokenizer_config": {"eos_token": "</s>"}},
            "tokenizer.json is not the JSON of a tokenizer",
        ),
    ],
)
def test_a_wrong_file_is_named(describe, files, says):
    with pytest.raises(CheckpointError, match=says):
        describe(**files)


@pytest.mark.parametrize(
    ("advice", "expected"),
    [
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1},
            SamplingParams(temperature=0.6, top_p=0.9, top_k=20, min_p=0.1),
        ),
        ({"temperature": 0.6}, SamplingParams(temperature=0.6)),
        ({"do_sample": False, "top_k": 20}, SamplingParams(temperature=0.0)),
        ({"do_sample": None, "eos_token_id": 2}, SamplingParams()),
    ],
)
def test_advice_on_sampling(describe, advice, expected):
    assert describe(generation_config=advice).sampling == expected


def test_advice_that_is_not_applied_is_logged(describe, caplog):
    with caplog.at_level(logging.WARNING):
        describe(generation_config={"repetition_penalty": 1.05, "typical_p": 1.0})
    assert "repetition_penalty = 1.05 is not applied" in caplog.text
    assert "typical_p" not in caplog.text


def test_end_tokens_come_from_all_three_places(describe):
    source = describe(
        generation_config={"eos_token_id": [2, 7]}, tokenizer_config={"eos_token": "<|im_end|>"}
    )
    assert source.config.eos_token_ids == (2, 7, 5)
