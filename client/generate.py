"""Generate the protobuf and gRPC stubs of client and server, and docs/grpc.md, from `client/proto`: `python client/generate.py`.

The protocol that the stubs were last generated from is kept as `proto/committed.binpb`. A change that breaks its clients is refused
(`buf breaking`), except with `--breaking`.

The compiler is pinned here and installed into a temporary folder: generated code refuses a protobuf or grpcio older than the
compiler that made it, so an old compiler keeps the client installable beside many versions. Client and server have a copy each
(neither imports the other). Both register the same files with protobuf, which accepts the second registration.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import describe

TOOL = "grpcio-tools==1.73.1"
CLIENT = Path(__file__).resolve().parent
PROTO = CLIENT / "proto"
PACKAGE = "manta/v1"
COPIES = {
    "manta_client._generated": CLIENT / "src/manta_client/_generated",
    "serve.grpc.generated": CLIENT.parent / "serve/grpc/generated",
}
"""The folder of each copy, by its import name."""
COMMITTED = PROTO / "committed.binpb"
"""The .proto files from which the stubs were last generated, as a buf image."""
PAGE = CLIENT.parent / "docs/grpc.md"


def main() -> None:
    if COMMITTED.exists() and "--breaking" not in sys.argv:
        broken = breaking(PROTO, COMMITTED)
        if broken:
            sys.exit(f"this change breaks existing clients (use --breaking if that is intended):\n{broken}")
    with tempfile.TemporaryDirectory() as folder:
        stubs = generate(Path(folder))
    for package, target in COPIES.items():
        for name, text in stubs.items():
            (target / name).write_text(rehome(text, package))
        print(f"{len(stubs)} files in {target}")
    subprocess.run([buf(), "build", "-o", COMMITTED], check=True, cwd=PROTO)
    PAGE.write_text(describe.page(describe.read(PROTO)))
    print(f"{COMMITTED}\n{PAGE}")


def buf() -> str:
    """The buf command: beside the interpreter, where PyPI's buf-bin installs it, or on the path."""
    return shutil.which("buf", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))) or "buf"


def breaking(proto: Path, before: Path) -> str:
    """The changes in the folder `proto` that break clients of `before`; empty if there are none."""
    command = [buf(), "breaking", "--against", str(before)]
    result = subprocess.run(command, cwd=proto, capture_output=True, text=True, check=False)
    return "" if result.returncode == 0 else result.stdout or result.stderr


def generate(folder: Path) -> dict[str, str]:
    """Run the pinned compiler. Returns its output: text by file name."""
    tool, output = folder / "tool", folder / "output"
    output.mkdir()
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-warn-conflicts", "--target", tool, TOOL], check=True)
    protos = sorted(str(path.relative_to(PROTO)) for path in PROTO.rglob("*.proto"))
    outputs = [f"--{kind}_out={output}" for kind in ("python", "pyi", "grpc_python")]
    protoc = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}", *outputs, *protos]
    subprocess.run(protoc, check=True, env={**os.environ, "PYTHONPATH": str(tool)})
    with_services = [proto for proto in protos if re.search(r"^service ", (PROTO / proto).read_text(), re.MULTILINE)]
    wanted = [f"{Path(proto).stem}{end}" for proto in protos for end in ("_pb2.py", "_pb2.pyi")]
    wanted += [f"{Path(proto).stem}_pb2_grpc.py" for proto in with_services]
    return {name: (output / PACKAGE / name).read_text() for name in wanted}


def rehome(text: str, package: str) -> str:
    """Make a stub importable in `package`: for its imports of siblings, and for pickled messages (Ray pickles them)."""
    module = PACKAGE.replace("/", ".")
    text = re.sub(rf"^from {re.escape(module)} import", "from . import", text, flags=re.MULTILINE)
    return re.sub(rf"'{re.escape(module)}\.(\w+_pb2)'", rf"'{package}.\1'", text)


if __name__ == "__main__":
    main()
