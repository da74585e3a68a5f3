"""Certificates that only a test trusts, made with openssl."""

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Identity:
    """Two PEM files."""

    certificate: Path
    key: Path


class Authority:
    """Signs certificates. `openssl` must be there."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.identity = Identity(folder / "ca.pem", folder / "ca-key.pem")
        self._openssl("req", "-x509", *self._new_key("ca"), "-subj", "/CN=test authority", "-days", "1", "-out", "ca.pem")

    @property
    def certificate(self) -> Path:
        return self.identity.certificate

    def signs(self, name: str, *, host: str = "localhost") -> Identity:
        """A new certificate for ``host``; ``name`` is of its files."""
        (self._folder / f"{name}.ext").write_text(f"subjectAltName=DNS:{host}\n")
        self._openssl("req", *self._new_key(name), "-subj", f"/CN={host}", "-out", f"{name}.csr")
        sign = ["-CA", "ca.pem", "-CAkey", "ca-key.pem", "-CAcreateserial", "-days", "1", "-extfile", f"{name}.ext"]
        self._openssl("x509", "-req", "-in", f"{name}.csr", *sign, "-out", f"{name}.pem")
        return Identity(self._folder / f"{name}.pem", self._folder / f"{name}-key.pem")

    def _new_key(self, name: str) -> list[str]:
        return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}-key.pem"]

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=self._folder)
