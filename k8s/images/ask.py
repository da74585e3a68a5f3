"""Ask every model a question over HTTP and over gRPC: `helm test` runs this in a pod of the image."""

import argparse
import json
import os
import sys
import urllib.request
from pathlib import Path

from manta_client import Client

QUESTION = "What is the capital of France?"
MAX_TOKENS = 20
TIMEOUT_S = 120.0


def over_http(base: str, model: str, key: str | None) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": MAX_TOKENS}
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(f"{base}/v1/chat/completions", json.dumps(body).encode(), headers)  # noqa: S310
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310  (an address that was given on the command line)
        text = json.load(answer)["choices"][0]["message"]["content"]
    return str(text)


def contents(file: Path) -> bytes | None:
    """The file's content; None if it does not exist: a Secret with a certificate from a public CA has no ca.crt."""
    return file.read_bytes() if file.exists() else None


def over_grpc(endpoint: str, model: str, key: str | None, tls: Path | None) -> str:
    """``tls``: folder with ca.crt, tls.crt and tls.key, as in a TLS Secret; also used as client certificate if the server requests one."""
    authority, chain, private = (contents(tls / name) if tls else None for name in ("ca.crt", "tls.crt", "tls.key"))
    with Client(
        endpoint,
        api_key=key,
        root_certificates=authority,
        client_certificate=chain,
        client_key=private,
        allow_insecure_key=True,  # within the cluster's network
    ) as client:
        answer = client.chat.create(model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=MAX_TOKENS, timeout=TIMEOUT_S)
    return answer.text


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--http", required=True, help="http://host:port")
    arguments.add_argument("--grpc", required=True, help="grpc://host:port or grpcs://host:port")
    arguments.add_argument("--model", action="append", required=True, help="may be given again")
    arguments.add_argument("--tls", type=Path, help="folder with ca.crt, tls.crt and tls.key for gRPC")
    given = arguments.parse_args()
    key = os.environ.get("MANTA_API_KEY")
    for model in given.model:
        for way, text in (("HTTP", over_http(given.http, model, key)), ("gRPC", over_grpc(given.grpc, model, key, given.tls))):
            print(f"{model} over {way}: {text!r}")
            if not text.strip():
                sys.exit(f"{model} answered nothing over {way}")


if __name__ == "__main__":
    main()
