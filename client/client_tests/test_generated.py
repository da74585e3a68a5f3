"""What is generated and committed is what its sources say now."""

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf import descriptor_pb2
from grpc_tools import protoc

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
CLIENT = Path(__file__).resolve().parents[1]
PRINT_DESCRIPTORS = """
import importlib, sys
for name in sys.argv[2:]:
    print(importlib.import_module(f"{sys.argv[1]}.{name}").DESCRIPTOR.serialized_pb.hex())
"""


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"client_{name}", CLIENT / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sys.path.insert(0, str(CLIENT))
describe, generate, unasync = script("describe"), script("generate"), script("unasync")
sys.path.remove(str(CLIENT))
STUBS = sorted(f"{path.stem}_pb2" for path in generate.PROTO.rglob("*.proto"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, descriptor_pb2.FileDescriptorProto]:
    """The .proto files as the installed compiler reads them, by name."""
    output = tmp_path_factory.mktemp("protoc") / "files.binpb"
    well_known = Path(protoc.__file__).parent / "_proto"
    protos = [str(path.relative_to(generate.PROTO)) for path in generate.PROTO.rglob("*.proto")]
    assert protoc.main(["protoc", f"-I{generate.PROTO}", f"-I{well_known}", f"--descriptor_set_out={output}", *protos]) == 0
    files = descriptor_pb2.FileDescriptorSet.FromString(output.read_bytes()).file
    return {file.name: plain(file) for file in files}


def plain(file: descriptor_pb2.FileDescriptorProto) -> descriptor_pb2.FileDescriptorProto:
    """Without what is derived or only for readers, and not in stubs."""
    bare = descriptor_pb2.FileDescriptorProto.FromString(file.SerializeToString())
    bare.ClearField("source_code_info")
    bare.DiscardUnknownFields()  # buf's own notes
    for message in bare.message_type:
        for field in (field for each in (message, *message.nested_type) for field in each.field):
            field.ClearField("json_name")
    return bare


@pytest.mark.parametrize("package", generate.COPIES)
def test_the_stubs_say_what_the_protocol_says(package: str, compiled) -> None:
    command = [sys.executable, "-c", PRINT_DESCRIPTORS, package, *STUBS]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=CLIENT.parent).stdout.split()
    stubs = [descriptor_pb2.FileDescriptorProto.FromString(bytes.fromhex(line)) for line in printed]
    assert {stub.name: stub for stub in stubs} == compiled


@pytest.mark.parametrize("package", generate.COPIES)
def test_the_stubs_have_every_method(package: str, compiled) -> None:
    for name in ("service", "admin"):
        (service,) = compiled[f"manta/v1/{name}.proto"].service
        text = (generate.COPIES[package] / f"{name}_pb2_grpc.py").read_text()
        assert set(re.findall(rf"'/manta\.v1\.{service.name}/(\w+)'", text)) == {method.name for method in service.method}


@pytest.mark.slow
def test_the_stubs_are_byte_for_byte_what_the_pinned_tool_writes(tmp_path: Path) -> None:
    stubs = generate.generate(tmp_path)
    for package, folder in generate.COPIES.items():
        for name, text in stubs.items():
            assert (folder / name).read_text() == generate.rehome(text, package), f"{folder / name}: run python client/generate.py"


def test_the_synchronous_client_is_what_the_asynchronous_one_says() -> None:
    command = [sys.executable, str(CLIENT / "unasync.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0
    sources, twins = ({path.name for path in folder.glob("*.py")} for folder in (unasync.SOURCE, unasync.TARGET))
    assert sources == twins


def test_nothing_asynchronous_is_left_in_the_synchronous_client() -> None:
    for path in unasync.TARGET.glob("*.py"):
        code = path.read_text().split("\n", 1)[1]
        assert not re.search(r"\b(async|await|asyncio|aio|a(iter|next))\b|Async", code), path


def test_the_protocol_passes_buf_lint() -> None:
    result = subprocess.run([generate.buf(), "lint"], cwd=generate.PROTO, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "")


def test_the_kept_descriptor_is_what_the_protocol_says(compiled) -> None:
    kept = descriptor_pb2.FileDescriptorSet.FromString(generate.COMMITTED.read_bytes())
    said = {file.name: plain(file) for file in kept.file if file.name.startswith("manta/")}
    assert said == compiled, "run python client/generate.py"


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("service.proto", "string model = 1;", "string model_name = 1;"),
        ("service.proto", "rpc Detokenize(DetokenizeRequest) returns (DetokenizeResponse);", ""),
        ("messages.proto", "optional double top_p = 2;", "optional double top_p = 92;"),
        ("messages.proto", "optional int32 top_k = 3;", "optional string top_k = 3;"),
    ],
)
def test_a_change_that_breaks_clients_is_noticed(tmp_path: Path, file: str, old: str, new: str) -> None:
    assert generate.breaking(generate.PROTO, generate.COMMITTED) == ""
    shutil.copytree(generate.PROTO, tmp_path / "proto")
    changed = tmp_path / "proto/manta/v1" / file
    text = changed.read_text()
    assert old in text
    changed.write_text(text.replace(old, new, 1))
    assert file in generate.breaking(tmp_path / "proto", generate.COMMITTED)


def test_the_page_of_the_protocol_is_what_its_comments_say() -> None:
    page = describe.page(describe.read(generate.PROTO))
    assert generate.PAGE.read_text() == page, "run python client/generate.py"
    assert "| `Drain` |" in page


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools writes beside what it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(CLIENT, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__", ".*"))
    command = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, folder / "source"]
    subprocess.run(command, check=True)
    (built,) = folder.glob("manta_client-*.whl")
    return built


def test_the_wheel_is_small_and_has_what_belongs_there(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.stat().st_size < 200_000
    assert {"manta_client/py.typed", "manta_client/_generated/messages_pb2.pyi", "manta_client/testing/fixtures.py"} <= set(names)
    assert not any("client_tests" in name or "proto/" in name for name in names)


@pytest.mark.slow
def test_the_client_installs_alone(tmp_path: Path, wheel: Path) -> None:
    """A clean environment gets it from its wheel, with nothing but what the wheel asks for."""
    python = tmp_path / "venv/bin/python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run([python, "-m", "pip", "--disable-pip-version-check", "-q", "install", wheel], check=True)
    installed = subprocess.run([python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True).stdout
    names = {line.split("==")[0].lower().replace("_", "-") for line in installed.split()}
    assert names <= {"manta-client", "grpcio", "protobuf", "googleapis-common-protos", "typing-extensions", "pip", "setuptools"}
    check = "import manta_client.testing; client = manta_client.Client(); client.close(); manta_client.AsyncClient"
    subprocess.run([python, "-I", "-c", check], check=True, cwd=tmp_path)
