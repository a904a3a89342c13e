"""The committed stubs say what the proto files say."""

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from jaxinfer.host.request import FinishReason, SamplingParams
from jaxinfer.server import translate
from jaxinfer.v1 import admin_pb2, model_pb2
from jaxinfer.v1 import inference_pb2 as pb

ROOT = Path(__file__).parents[2]
FILES = {
    "jaxinfer/v1/admin.proto": admin_pb2.DESCRIPTOR,
    "jaxinfer/v1/inference.proto": pb.DESCRIPTOR,
    "jaxinfer/v1/model.proto": model_pb2.DESCRIPTOR,
}
BUF = shutil.which("buf") or str(Path(sys.executable).with_name("buf"))
# File, what is changed there, into what, and the rule and word that must come of it.
PLANTS = [
    ("inference", r"optional int32 priority = 9;", "", ("FIELD_NO_DELETE", '"priority"')),
    ("inference", r"(optional bool token_ids =) 2;", r"\1 9;", ("FIELD_NO_DELETE", '"2"')),
    (
        "inference",
        r"optional int32( priority = 4;)",
        r"optional string\1",
        ("FIELD_SAME_TYPE", '"4"'),
    ),
    ("inference", r"repeated (int32 stop_token_ids)", r"\1", ("FIELD_SAME_CARDINALITY", '"4"')),
    (
        "inference",
        r"repeated int32 token_ids = 2;",
        "repeated int32 ids = 2;",
        ("FIELD_SAME_NAME", "ids"),
    ),
    ("inference", r"rpc Detokenize\([^;]*;", "", ("RPC_NO_DELETE", '"Detokenize"')),
    ("inference", r"FINISH_REASON_LENGTH = \d+;", "", ("ENUM_VALUE_NO_DELETE", "FinishReason")),
    (
        "model",
        r"rpc GetModel\(GetModelRequest\)",
        "rpc GetModel(ListModelsRequest)",
        ("RPC_SAME_REQUEST_TYPE", '"GetModel"'),
    ),
    ("model", r"message Capability ", "message Ability ", ("MESSAGE_NO_DELETE", '"Capability"')),
    ("model", r"repeated Capability ", "repeated Ability ", ("FIELD_SAME_TYPE", "Ability")),
]
needs_buf = pytest.mark.skipif(not Path(BUF).exists(), reason="buf is not installed")


def buf(*arguments, folder=ROOT):
    """What it says of the proto files in a folder."""
    return subprocess.run([BUF, *arguments], cwd=folder, capture_output=True, text=True)


@pytest.mark.skipif(find_spec("grpc_tools") is None, reason="grpcio-tools is not installed")
@pytest.mark.parametrize("name", FILES)
def test_stubs_match_the_proto(name, tmp_path):
    path = tmp_path / "set.bin"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={ROOT / 'proto'}"]
    subprocess.run([*command, f"--descriptor_set_out={path}", name], check=True)
    (wanted,) = descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes()).file
    found = descriptor_pb2.FileDescriptorProto()
    FILES[name].CopyToProto(found)
    # Compilers differ in whether they write json_name, so it is left out on both sides.
    for file in (wanted, found):
        for message in file.message_type:
            for field in message.field:
                field.ClearField("json_name")
    assert found == wanted, "run scripts/proto and commit what it writes"


def test_every_proto_file_is_covered():
    found = sorted(str(path.relative_to(ROOT / "proto")) for path in ROOT.glob("proto/**/*.proto"))
    assert found == sorted(FILES)


@needs_buf
def test_buf_lint_passes():
    result = buf("lint")
    assert result.returncode == 0, result.stdout + result.stderr


@needs_buf
def test_nothing_that_was_released_is_broken():
    result = buf("breaking", "--against", "proto/released.json")
    assert result.returncode == 0, result.stdout + result.stderr


@needs_buf
def test_every_kind_of_break_is_found(tmp_path):
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    for name, old, new, _ in PLANTS:
        path = tmp_path / f"proto/jaxinfer/v1/{name}.proto"
        text, count = re.subn(old, new, path.read_text(), count=1)
        assert count, f"{old} stands nowhere in {name}.proto"
        path.write_text(text)
    result = buf(
        "breaking", "--against", "proto/released.json", "--error-format=json", folder=tmp_path
    )
    assert result.returncode
    found = [(one["type"], one["message"]) for one in map(json.loads, result.stdout.splitlines())]
    for _, _, _, (kind, word) in PLANTS:
        assert any(kind == one and word in message for one, message in found), (kind, word, found)


def test_both_generate_requests_are_the_same():
    def shape(kind):
        return [
            (field.number, field.name, field.type, field.message_type)
            for field in kind.DESCRIPTOR.fields
        ]

    assert shape(pb.GenerateRequest) == shape(pb.GenerateStreamRequest)


def test_every_sampling_parameter_is_on_the_wire_and_no_other():
    kinds = (pb.Sampling, pb.Stopping)
    wire = {field.name for kind in kinds for field in kind.DESCRIPTOR.fields}
    assert wire == set(SamplingParams.__dataclass_fields__)


def test_every_finish_reason_is_on_the_wire_and_no_other():
    for reason in FinishReason:
        assert pb.FinishReason.Value(translate.to_reason(reason)) > 0
    assert len(pb.FinishReason.keys()) == len(FinishReason) + 1


def test_every_scalar_is_optional():
    for file in FILES.values():
        for message in file.message_types_by_name.values():
            for field in message.fields:
                repeated = field.default_value == []
                assert field.has_presence or repeated, field.full_name
