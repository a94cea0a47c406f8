"""Environment variables of NCCL, gloo and CUDA. Shoal sets none, so a rank sees these values."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping

from .finding import Finding, Status

_PREFIXES = ("NCCL_", "TORCH_NCCL_", "TORCH_SYMM_MEM_", "NVSHMEM_", "GLOO_")
_ALSO = ("CUDA_LAUNCH_BLOCKING", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS", "TORCH_DISTRIBUTED_DEBUG")
# Variable, the values that slow a server down, and what they do.
_SLOW = (
    ("NCCL_P2P_DISABLE", ("1",), "GPUs of a node exchange tensors by way of host memory"),
    ("NCCL_SHM_DISABLE", ("1",), "GPUs that do not reach each other exchange tensors by way of the network"),
    ("NCCL_DEBUG", ("TRACE",), "NCCL writes a line for every call"),
    ("CUDA_LAUNCH_BLOCKING", ("1",), "every kernel is waited for, and none is captured in a CUDA graph"),
    ("TORCH_DISTRIBUTED_DEBUG", ("DETAIL",), "every collective is checked by another one"),
    ("TORCH_NCCL_BLOCKING_WAIT", ("1",), "every collective is waited for on the host"),
)
_INTERFACES = ("NCCL_SOCKET_IFNAME",)  # gloo gets its address from Shoal and ignores GLOO_SOCKET_IFNAME


def check_settings() -> list[Finding]:
    """Findings about this process's environment."""
    return findings(os.environ, [name for _, name in socket.if_nameindex()])


def findings(environment: Mapping[str, str], interfaces: Iterable[str]) -> list[Finding]:
    """Findings about the variables, given this machine's network interfaces."""
    found = {name: value for name, value in sorted(environment.items()) if name.startswith(_PREFIXES) or name in _ALSO}
    interfaces = list(interfaces)
    problems = [
        Finding("settings", Status.WARNING, f"{name}={found[name]}: {what}", f"unset {name}")
        for name, slow, what in _SLOW
        if found.get(name, "").upper() in slow
    ]
    problems += [
        Finding(
            "settings",
            Status.WRONG,
            f"{name}={found[name]} names no network interface of this machine; it has {', '.join(interfaces)}",
            f"set {name} to the one that reaches the other nodes, or unset it",
        )
        for name in _INTERFACES
        if name in found and not any(matches(found[name], interface) for interface in interfaces)
    ]
    said = ", ".join(f"{name}={value}" for name, value in found.items())
    message = f"set are {said}" if said else "no variable of NCCL, gloo or CUDA is set"
    return [Finding("settings", Status.OK, message, figures=found), *problems]


def matches(pattern: str, interface: str) -> bool:
    """Whether NCCL_SOCKET_IFNAME selects an interface: prefixes, exact names after `=`, exclusions after `^`."""
    exclude, pattern = pattern.startswith("^"), pattern.removeprefix("^")
    exact, pattern = pattern.startswith("="), pattern.removeprefix("=")
    names = [name.strip() for name in pattern.split(",") if name.strip()]
    return any(interface == name if exact else interface.startswith(name) for name in names) != exclude
