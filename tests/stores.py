"""Object stores on this machine, spoken to by the real libraries: S3 by moto's server, Google's by gcp-storage-emulator."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest

BUCKET = "models"
NO_KEYS = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing", "AWS_DEFAULT_REGION": "us-east-1"}
PLAIN_BUCKETS = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
"""Other kinds of buckets are asked about over gRPC, which the emulator does not speak."""


@dataclass(frozen=True)
class Store:
    scheme: str
    environment: dict[str, str]
    """By which the library of the scheme finds this store instead of the real one."""

    def put(self, folder: Path, name: str = "qwen2") -> str:
        """Upload a folder's files; the URL under which they are then."""
        with pytest.MonkeyPatch.context() as patch:
            self.use(patch)
            system = fsspec.filesystem(self.scheme)
            for file in folder.rglob("*"):
                if file.is_file():
                    system.put_file(str(file), f"{BUCKET}/{name}/{file.relative_to(folder)}")
        return f"{self.scheme}://{BUCKET}/{name}"

    def use(self, patch: pytest.MonkeyPatch) -> None:
        """Have this process use it."""
        for variable, value in self.environment.items():
            patch.setenv(variable, value)
        fsspec.config.set_conf_env(fsspec.config.conf)
        fsspec.get_filesystem_class(self.scheme).clear_instance_cache()


@contextmanager
def s3() -> Iterator[Store]:
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    store = Store("s3", {**NO_KEYS, "AWS_ENDPOINT_URL": f"http://{host}:{port}"})
    try:
        _make_bucket(store)
        yield store
    finally:
        server.stop()


@contextmanager
def gs() -> Iterator[Store]:
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in PLAIN_BUCKETS.items():
            patch.setenv(variable, value)  # read when gcsfs is imported
        pytest.importorskip("gcsfs")
    server = pytest.importorskip("gcp_storage_emulator.server").create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    server.start()
    host, port = server._api._httpd.server_address[:2]
    try:
        yield Store("gs", {"STORAGE_EMULATOR_HOST": f"http://{host}:{port}", "FSSPEC_GS_TOKEN": "anon", **PLAIN_BUCKETS})
    finally:
        server.stop()


STORES: dict[str, Callable[[], "contextmanager[Store]"]] = {"s3": s3, "gs": gs}


def _make_bucket(store: Store) -> None:
    with pytest.MonkeyPatch.context() as patch:
        store.use(patch)
        fsspec.filesystem(store.scheme).mkdir(BUCKET)
