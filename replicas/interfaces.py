"""Which network interface of this node reaches another one.

gloo listens on the address that the node's own name resolves to, and on many machines that is loopback (Debian's
127.0.1.1, most containers): ranks of other nodes then dial themselves. The way to rank 0 is known, so that is asked.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

from .errors import EngineError

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_SIOCGIFADDR = 0x8915
_IFREQ = struct.Struct("16sHH4s16x")  # interface's name; family, port and address of a sockaddr_in
_IPV6_ADDRESSES = Path("/proc/net/if_inet6")


def interface_towards(host: str) -> str:
    """The interface by which packets for `host`, an address or a name, leave; where `host` is here, the one it is on.

    Raises EngineError if there is no way there.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as sock:
            sock.connect(address)  # sends nothing: the kernel chooses a route and its source address
            source = ipaddress.ip_address(sock.getsockname()[0].partition("%")[0])
    except OSError as error:
        raise EngineError(f"there is no way from this node to {host}: {error}; check its address and routes") from error
    for name, known in _addresses().items():
        if source in known or (source.is_loopback and name == "lo"):
            return name
    raise EngineError(
        f"{host} is reached from {source}, which no network interface has as its first address; set GLOO_SOCKET_IFNAME"
    )


def _addresses() -> dict[str, set[_Address]]:
    """The addresses of every interface; of IPv4 the first one."""
    found: dict[str, set[_Address]] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            found[name] = set()
            try:
                answer = fcntl.ioctl(sock, _SIOCGIFADDR, _IFREQ.pack(name.encode(), socket.AF_INET, 0, bytes(4)))
            except OSError:  # it has no address of IPv4
                continue
            found[name].add(ipaddress.IPv4Address(_IFREQ.unpack(answer)[3]))
    if _IPV6_ADDRESSES.exists():
        for line in _IPV6_ADDRESSES.read_text().splitlines():
            digits, *_, name = line.split()
            found.setdefault(name, set()).add(ipaddress.IPv6Address(bytes.fromhex(digits)))
    return found
