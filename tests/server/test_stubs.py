"""The committed stubs say what the proto files say."""

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


@pytest.mark.skipif(
    shutil.which("buf") is None and not Path(sys.executable).with_name("buf").exists(),
    reason="buf is not installed",
)
def test_buf_lint_passes():
    buf = shutil.which("buf") or str(Path(sys.executable).with_name("buf"))
    result = subprocess.run([buf, "lint"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


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
