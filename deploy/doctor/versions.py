"""Whether the installed packages satisfy Shoal's requirements."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata

from packaging.requirements import Requirement

from .finding import Finding, Status

_SHOWN = ("shoal", "torch", "triton", "ray", "transformers")
# These wheels write the same libnccl.so.2: the last one installed wins, and may not fit torch.
_NCCL_WHEELS = ("nvidia-nccl-cu12", "nvidia-nccl-cu13")


def check_versions() -> list[Finding]:
    """Findings about this Python environment."""
    try:
        required = metadata.requires("shoal") or []
    except metadata.PackageNotFoundError:
        return [
            Finding(
                "versions",
                Status.SKIPPED,
                f"Shoal is not installed here, but runs from a folder; python {platform.python_version()}",
                "`pip install` it, so that its requirements are known",
            )
        ]
    installed = {name: version for name in _names(required) if (version := _version(name)) is not None}
    return [*findings(required, installed), *nccl_findings(_installed_of(_NCCL_WHEELS))]


def findings(required: Iterable[str], installed: Mapping[str, str]) -> list[Finding]:
    """Findings from a package's requirements and the installed versions."""
    wrong = []
    for text in required:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed.get(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            there = "is not installed" if version is None else f"is {version}"
            wanted = f"{requirement.name}{requirement.specifier}"
            remedy = f"{sys.executable} -m pip install '{wanted}'"
            wrong.append(Finding("versions", Status.WRONG, f"{requirement.name} {there}; needed is {wanted}", remedy))
    shown = [f"{name} {installed[name]}" for name in _SHOWN if name in installed]
    message = ", ".join([f"python {platform.python_version()}", *shown])
    return wrong or [Finding("versions", Status.OK, message, figures=dict(installed))]


def nccl_findings(wheels: Mapping[str, str]) -> list[Finding]:
    """Whether two wheels overwrite each other's NCCL."""
    if len(wheels) < 2:
        return []
    both = " and ".join(f"{name} {version}" for name, version in wheels.items())
    return [
        Finding(
            "versions",
            Status.WRONG,
            f"{both} are installed and write the same libnccl.so.2",
            "uninstall both, and install torch again with --force-reinstall",
        )
    ]


def _names(required: Iterable[str]) -> list[str]:
    return ["shoal", *(Requirement(text).name for text in required)]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _installed_of(names: Iterable[str]) -> dict[str, str]:
    return {name: version for name in names if (version := _version(name)) is not None}
