"""The checks, in the order of their dependencies."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...replicas.errors import ConfigError, ServingError
from ..resources import cpu_share, replica_request, resources_here, resources_of_nodes, visible_gpus
from . import devices, peers, placement, ray_cluster, serve_file
from .finding import Finding, Status
from .haproxy import check_haproxy
from .limits import check_open_files
from .memory import check_shared_memory
from .network import check_network
from .pairs import check_pairs
from .process import run_probe
from .settings import check_settings
from .versions import check_versions

NO_RAY = "none"


@dataclass(frozen=True, slots=True)
class Subject:
    """What to check.

    config: a Serve configuration file. address: of a Ray; "auto" finds one on this machine,
    "none" looks for none. host, port: where the server will listen; None: as the file says,
    else 127.0.0.1:8000.
    """

    config: Path | None = None
    address: str = "auto"
    host: str | None = None
    port: int | None = None
    limit_s: float = 120.0  # of one probe


def examine(subject: Subject) -> Iterator[Finding]:
    """Yield every finding as it comes. Raises nothing."""
    content: dict[str, Any] = {}
    host, port = "127.0.0.1", 8000
    if subject.config is not None:
        try:
            content = serve_file.read(subject.config)
            host, port = serve_file.listens(content)
        except ConfigError as error:
            yield _refused(error)
    host, port = subject.host or host, subject.port or port
    for name, check in (
        ("versions", check_versions),
        ("settings", check_settings),
        ("shared memory", check_shared_memory),
        ("open files", check_open_files),
        ("network", partial(check_network, host, port)),
        ("haproxy", check_haproxy),
        ("gpus", partial(_check_devices, subject.limit_s)),
        ("ray", partial(_check_ray, subject, content)),
    ):
        yield from guarded(name, check)


def guarded(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """The findings of a check; its own failure is a finding too."""
    try:
        return check()
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        message = f"the check failed: {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        return [
            Finding(name, Status.WRONG, message, "this is a fault of the doctor's, or of a machine it does not know")
        ]


def _check_devices(limit_s: float) -> list[Finding]:
    outcome = run_probe("probe_gpus", limit_s=limit_s)
    num_gpus = sum("device" in line for line in outcome.lines)
    copies = devices.copies(outcome.lines)
    return [
        *devices.findings(outcome, visible_gpus(), devices.driver_version()),
        *peers.findings(copies),
        *guarded("pairs", partial(check_pairs, num_gpus, copies, limit_s)),
    ]


def _check_ray(subject: Subject, content: dict[str, Any]) -> list[Finding]:
    found: list[Finding] = []
    nodes: list[dict[str, float]] = []
    if subject.address == "auto" and not os.environ.get("RAY_ADDRESS") and ray_cluster.only_own():
        message = "the Ray that runs here belongs to a `shoal serve` and cannot be joined"
        found.append(Finding("ray", Status.SKIPPED, message))
    elif subject.address != NO_RAY:
        outcome = run_probe("probe_ray", subject.address, limit_s=subject.limit_s)
        found += ray_cluster.findings(outcome, wanted=subject.address != "auto")
        nodes = ray_cluster.nodes_of(outcome)
    if content:
        found += guarded("placement", partial(_check_placement, content, nodes))
    return found


def _check_placement(content: dict[str, Any], nodes: list[dict[str, float]]) -> list[Finding]:
    where, available = "this machine", resources_here()
    if nodes:
        where = "this Ray, were it empty"
        available = resources_of_nodes({"Alive": True, "Resources": node} for node in nodes)
    try:
        plans = serve_file.plans_of(content, device="cuda" if available.gpus else "cpu")
    except ServingError as error:
        return [_refused(error)]
    share = cpu_share(plans, available)
    requests = [(plan, replica_request(plan, available, share)) for plan in plans]
    return placement.findings(requests, nodes or [{"CPU": available.node_cpus, "GPU": available.gpus}], where)


def _refused(error: ServingError) -> Finding:
    return Finding("configuration", Status.WRONG, error.message, "correct the file; Serve would start nothing of it")
