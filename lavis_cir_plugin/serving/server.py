"""Start a server: its socket, its token and its host names."""

from __future__ import annotations

import ipaddress
import math
import os
import secrets
import socket
from pathlib import Path
from typing import Any

import uvicorn

from lavis_cir_plugin.serving.app import create_app
from lavis_cir_plugin.serving.limits import Limits
from lavis_cir_plugin.serving.opened import Opened
from lavis_cir_plugin.serving.patience import patient

TOKEN_VARIABLE = "LAVIS_CIR_TOKEN"
SHORTEST_TOKEN = 16


def is_this_machine(host: str) -> bool:
    """Return whether nobody but this machine reaches an address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def token_for(host: str, file: str | None) -> str | None:
    """Return the token that a server at an address asks for.

    It comes from a file or from the variable ``LAVIS_CIR_TOKEN``. Where there is neither, a server that only this
    machine reaches asks for none, and any other one draws a new one.

    Raises:
        ValueError: the token is short.
        OSError: the file cannot be read.
    """
    given = Path(file).expanduser().read_text(encoding="utf-8").strip() if file else os.environ.get(TOKEN_VARIABLE)
    if given is not None and (len(given) < SHORTEST_TOKEN or not given.isascii() or not given.isprintable()):
        source = f"--token-file {file}" if file else TOKEN_VARIABLE
        raise ValueError(
            f"{source} must hold at least {SHORTEST_TOKEN} printable ASCII characters, and holds {len(given)}."
        )
    if given is None and not is_this_machine(host):
        return secrets.token_urlsafe(32)
    return given


def hosts_for(host: str) -> frozenset[str] | None:
    """Return the names that a request may call the server by; any where a token protects it anyway."""
    return frozenset({"localhost", "127.0.0.1", "::1", host.lower()}) if is_this_machine(host) else None


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        OSError: the address cannot be had, with one sentence.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"the server cannot listen at {host}, port {port} ({reason}); choose another --port or --host."
        ) from None


def server_for(
    indexes: dict[str, Opened], limits: Limits, token: str | None, hosts: frozenset[str] | None
) -> uvicorn.Server:
    """Return the server over an application with these indexes."""
    app: Any = create_app(indexes, limits, token, hosts)
    config = uvicorn.Config(
        app,
        http=patient(limits.seconds),
        ws="none",
        lifespan="off",
        limit_concurrency=limits.connections,
        timeout_keep_alive=min(15, math.ceil(limits.seconds)),
        timeout_graceful_shutdown=5,
        access_log=False,  # what people look for is nobody's business
        server_header=False,
        log_level="warning",
    )
    return uvicorn.Server(config)
