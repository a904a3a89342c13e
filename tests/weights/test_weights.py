"""What a model may be called, and what is said where there is none."""

import pytest

from jaxinfer import weights
from jaxinfer.errors import CheckpointError, UnknownModel
from tests.weights import folders


def test_an_unknown_name_gets_the_nearest_alias():
    with pytest.raises(UnknownModel, match="did you mean smollm2-135m") as caught:
        weights.load("smolm2-135", dtype="bfloat16")
    assert caught.value.field == "model"


@pytest.mark.parametrize("name", ["", "org/model", "missing.gguf", "zzz"])
def test_an_unknown_name_gets_the_aliases(name):
    with pytest.raises(UnknownModel, match=r"smollm2-135m.*Hugging Face folder.*GGUF"):
        weights.describe(name)


def test_an_empty_folder_is_no_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither a config\.json .* nor a model\.json"):
        weights.load(tmp_path, dtype="bfloat16")


def test_a_lone_safetensors_file_is_no_model(tmp_path):
    folders.write_hf(tmp_path)
    with pytest.raises(CheckpointError, match="give the folder around it"):
        weights.load(tmp_path / "model.safetensors", dtype="bfloat16")


def test_a_gguf_file_may_have_any_name(tmp_path):
    document = folders.config("qwen3")
    folders.write_gguf(tmp_path / "blob", document, folders.tensors(document))
    assert weights.describe(tmp_path / "blob").kind == "gguf"


def test_a_relative_path_is_a_model(tmp_path, monkeypatch):
    folders.write_hf(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    loaded = weights.load("tiny", dtype="bfloat16")
    weights.save(loaded, "saved")
    assert weights.load("./saved", dtype="bfloat16").name == "tiny"
