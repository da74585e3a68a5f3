"""Write docs/grpc.md: every call, message, field and enum of the protocol with the comments of the .proto files.

`python client/generate.py` calls it; a test compares the page with what it would be now.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

Files = list[descriptor_pb2.FileDescriptorProto]
Kind = descriptor_pb2.FieldDescriptorProto
Location = tuple[int, ...]
ORDER = ("service", "admin", "messages")
"""Files by what a reader wants first; others follow."""
SERVICE, MESSAGE, ENUM, FIELD, VALUE, METHOD, ONEOF = (6,), (4,), (5,), (2,), (2,), (2,), (8,)
"""Where a part stands in the part around it: field numbers of descriptor.proto."""
HEAD = """<!-- Written by `python client/generate.py` from client/proto. Do not edit. -->
# gRPC API

Package `manta.v1`. The `.proto` files are in `client/proto/manta/v1`. The server also supports reflection (`grpcurl
HOST:PORT list`) and `grpc.health.v1.Health`. The Python client library is described in
[client/README.md](../client/README.md).

A failed call has a canonical status. The trailer `grpc-status-details-bin` holds a `google.rpc.Status` with an
`ErrorInfo` (domain `manta`, a `reason` in capitals), a `BadRequest` that names the invalid field, a `RetryInfo` if a
retry makes sense, a `QuotaFailure` if a quota is used up, and a `RequestInfo`. A stream also reports the error as its
last event. The error codes are in the [HTTP reference](http.md#errors).

If a field marked *optional* is not set, the server uses the model's own default.
"""


def read(proto: Path) -> Files:
    """The files below ``proto`` with their comments."""
    protos = sorted(str(path.relative_to(proto)) for path in proto.rglob("*.proto"))
    well_known = Path(protoc.__file__).parent / "_proto"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "files.binpb"
        command = ["protoc", f"-I{proto}", f"-I{well_known}", f"--descriptor_set_out={output}", "--include_source_info", *protos]
        if protoc.main(command):
            raise ValueError("the .proto files cannot be compiled; the compiler's message is above")
        return list(descriptor_pb2.FileDescriptorSet.FromString(output.read_bytes()).file)


def page(files: Files) -> str:
    """The page."""
    rank = {f"manta/v1/{name}.proto": place for place, name in enumerate(ORDER)}
    ordered = [Described(file) for file in sorted(files, key=lambda file: rank.get(file.name, len(rank)))]
    parts = [HEAD]
    parts += [part for file in ordered for part in file.services()]
    parts.append("## Messages\n")
    parts += [part for file in ordered for part in file.messages()]
    parts.append("## Enums\n")
    parts += [part for file in ordered for part in file.enums()]
    return "\n".join(parts)


class Described:
    """One file, and what its comments say of each part."""

    def __init__(self, file: descriptor_pb2.FileDescriptorProto) -> None:
        self._file = file
        self._comments = {tuple(place.path): _text(place.leading_comments) for place in file.source_code_info.location}

    def services(self) -> Iterator[str]:
        for number, service in enumerate(self._file.service):
            at = (*SERVICE, number)
            yield f"## {service.name}\n\n{self._says(at)}\n\n| Call | Request | Response | Description |\n|---|---|---|---|"
            for place, method in enumerate(service.method):
                gives = f"{'stream of ' if method.server_streaming else ''}{_link(method.output_type)}"
                yield f"| `{method.name}` | {_link(method.input_type)} | {gives} | {self._says((*at, *METHOD, place))} |"
            yield ""

    def messages(self) -> Iterator[str]:
        for number, message in enumerate(self._file.message_type):
            at = (*MESSAGE, number)
            yield f"### {message.name}\n\n{self._says(at)}\n"
            if message.field:
                yield "| | Field | Type | Description |\n|---|---|---|---|"
            for place, field in enumerate(message.field):
                yield f"| {field.number} | `{field.name}` | {_type(message, field)} | {self._says((*at, *FIELD, place))} |"
            yield ""

    def enums(self) -> Iterator[str]:
        for number, enum in enumerate(self._file.enum_type):
            at = (*ENUM, number)
            yield f"### {enum.name}\n\n{self._says(at)}\n\n| | Value | Description |\n|---|---|---|"
            for place, value in enumerate(enum.value):
                yield f"| {value.number} | `{value.name}` | {self._says((*at, *VALUE, place))} |"
            yield ""

    def _says(self, at: Location) -> str:
        return self._comments.get(at, "")


def _text(comment: str) -> str:
    return " ".join(comment.split()).replace("|", "\\|").replace("<", "&lt;")


def _type(message: descriptor_pb2.DescriptorProto, field: descriptor_pb2.FieldDescriptorProto) -> str:
    entry = next((each for each in message.nested_type if field.type_name.endswith(f".{message.name}.{each.name}")), None)
    if entry is not None and entry.options.map_entry:
        key, value = entry.field
        return f"map of {_name(key)} to {_name(value)}"
    if field.label == Kind.LABEL_REPEATED:
        return f"repeated {_name(field)}"
    if field.proto3_optional:
        return f"optional {_name(field)}"
    if field.HasField("oneof_index"):
        return f"{_name(field)}, one of `{message.oneof_decl[field.oneof_index].name}`"
    return _name(field)


def _name(field: descriptor_pb2.FieldDescriptorProto) -> str:
    return _link(field.type_name) if field.type_name else Kind.Type.Name(field.type).removeprefix("TYPE_").lower()


def _link(type_name: str) -> str:
    name = type_name.removeprefix(".")
    own = name.removeprefix("manta.v1.")
    return f"[{own}](#{own.lower()})" if own != name else f"`{name}`"
