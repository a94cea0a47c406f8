"""Ports and sockets: the HTTP port, loopback, and the UNIX sockets of the step channel."""

from __future__ import annotations

import errno
import socket
from contextlib import closing
from pathlib import Path

from .finding import Finding, Status

_TIMEOUT_S = 5.0


def check_network(host: str, port: int) -> list[Finding]:
    """Findings about the server's port and about local sockets."""
    return [_check_port(host, port), _check_loopback(), _check_unix_sockets(), _check_free_ports()]


def _check_port(host: str, port: int) -> Finding:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with closing(socket.socket(family)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        why = "something listens there (a Shoal that runs?)" if taken else (error.strerror or str(error)).lower()
        return Finding(
            "ports",
            Status.WARNING if taken else Status.WRONG,
            f"{host}:{port} cannot be listened on: {why}",
            "choose another port or host: shoal serve --port, or http_options of the configuration file",
        )
    return Finding("ports", Status.OK, f"{host}:{port} is free")


def _check_loopback() -> Finding:
    try:
        with closing(socket.create_server(("127.0.0.1", 0))) as listener:
            listener.settimeout(_TIMEOUT_S)
            _exchange(socket.create_connection(listener.getsockname(), _TIMEOUT_S), listener)
    except OSError as error:
        remedy = "bring lo up (ip link set lo up), and let the firewall pass what stays on it"
        return Finding("loopback", Status.WRONG, f"127.0.0.1 does not reach itself: {error}", remedy)
    return Finding("loopback", Status.OK, "127.0.0.1 reaches itself")


def _check_unix_sockets() -> Finding:
    """Abstract UNIX sockets, which carry steps: they need no folder, but a sandbox may forbid them."""
    try:
        with closing(socket.socket(socket.AF_UNIX)) as listener:
            listener.bind("")
            listener.listen(1)
            listener.settimeout(_TIMEOUT_S)
            client = socket.socket(socket.AF_UNIX)
            client.connect(listener.getsockname())
            _exchange(client, listener)
    except OSError as error:
        remedy = "let the container's profile (AppArmor, seccomp) pass abstract UNIX sockets"
        return Finding("unix sockets", Status.WRONG, f"there can be no abstract UNIX socket: {error}", remedy)
    return Finding("unix sockets", Status.OK, "an abstract UNIX socket reaches itself")


def _check_free_ports(table: Path = Path("/proc/sys/net/ipv4/ip_local_port_range")) -> Finding:
    """Ephemeral ports: each router, replica, store and Ray worker takes some."""
    try:
        first, last = (int(number) for number in table.read_text().split())
    except (OSError, ValueError) as error:
        return Finding("free ports", Status.SKIPPED, f"{table} cannot be read: {error}")
    number = last - first + 1
    message = f"{number} ports ({first} to {last}) are for processes that take any"
    if number < 1000:
        return Finding("free ports", Status.WARNING, message, "sysctl net.ipv4.ip_local_port_range='32768 60999'")
    return Finding("free ports", Status.OK, message, figures={"first": first, "last": last})


def _exchange(client: socket.socket, listener: socket.socket) -> None:
    """Send a byte and receive it back."""
    with closing(client):
        server, _ = listener.accept()
        with closing(server):
            client.sendall(b"?")
            server.sendall(server.recv(1))
            client.recv(1)
