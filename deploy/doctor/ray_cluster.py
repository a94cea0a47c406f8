"""A running Ray: its nodes, versions, shared memory and clocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..environment import OWN_RAY_FOLDER
from . import memory
from .finding import Finding, Status
from .process import Outcome

# Shoal does not depend on equal clocks. But logs of several nodes cannot be compared, and
# certificates and tokens expire at the wrong time.
_SKEW_S = 1.0
_SESSION = "--session-dir="  # of Ray's gcs_server: the folder of its session


def only_own(processes: Path = Path("/proc")) -> bool:
    """Whether Rays run here, all started by `shoal serve` for itself.

    They listen on loopback only, and Ray takes minutes to report that it cannot find them.
    """
    sessions = list(_sessions(processes))
    return bool(sessions) and all(session.parent.name.startswith(OWN_RAY_FOLDER) for session in sessions)


def _sessions(processes: Path) -> Iterator[Path]:
    for file in processes.glob("[0-9]*/cmdline"):
        with suppress(OSError):  # a process may end meanwhile
            program, *arguments = file.read_text(errors="replace").split("\0")
            if Path(program).name == "gcs_server":
                yield from (Path(each.removeprefix(_SESSION)) for each in arguments if each.startswith(_SESSION))


def nodes_of(outcome: Outcome) -> list[dict[str, float]]:
    """Resources of every node; empty without a Ray."""
    return [line["resources"] for line in outcome.lines if "node" in line]


def findings(outcome: Outcome, *, wanted: bool) -> list[Finding]:
    """Findings from the Ray probe. wanted: the user gave an address, so a Ray must exist."""
    missing = next((line["missing"] for line in outcome.lines if "missing" in line), None)
    nodes = [line for line in outcome.lines if "node" in line]
    if missing is not None or (not nodes and outcome.failure is not None):
        return [_missing(missing, outcome.failure, wanted)]
    answers = {line["asked"]: line for line in outcome.lines if "asked" in line}
    total = {name: sum(node["resources"].get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
    message = f"Ray has {_nodes(len(nodes))} with {total['CPU']:g} CPUs and {total['GPU']:g} GPUs"
    found = [Finding("ray", Status.OK, message, figures={"nodes": len(nodes), **total})]
    for node in nodes:
        answer = answers.get(node["node"])
        if answer is None or "error" in answer:
            why = "it was not asked in time" if answer is None else answer["error"]
            remedy = "look at that node's logs (ray logs), and whether it has memory and processes to spare"
            found.append(Finding("ray", Status.WRONG, f"no worker on node {node['host']} answers: {why}", remedy))
    answered = [(node["host"], answers[node["node"]]) for node in nodes if "versions" in answers.get(node["node"], {})]
    found += _versions(answered)
    found += _shared_memory(answered)
    found += _clocks(answered)
    return found


def _missing(why: str | None, failure: str | None, wanted: bool) -> Finding:
    """why: Ray's own reason; failure: the probe's."""
    if wanted:
        remedy = "is it up, and is this its address? If it asks for a token, set RAY_AUTH_MODE=token"
        return Finding("ray", Status.WRONG, f"Ray cannot be joined: {why or failure}", remedy)
    here = "no Ray runs here" if why is not None else f"the Ray that runs here cannot be joined ({failure})"
    return Finding("ray", Status.SKIPPED, f"{here}; `shoal serve` starts one of its own")


def _versions(answered: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Finding]:
    """Ranks of a group need equal versions; Ray itself only checks Python and Ray."""
    by_versions: dict[str, list[str]] = {}
    for host, answer in answered:
        text = ", ".join(f"{name} {version}" for name, version in sorted(answer["versions"].items()))
        by_versions.setdefault(text, []).append(host)
    if len(by_versions) > 1:
        parts = [f"{', '.join(hosts)}: {text}" for text, hosts in by_versions.items()]
        message = f"nodes have different versions: {'; '.join(parts)}"
        return [Finding("ray", Status.WRONG, message, "install one environment on every node")]
    for text, hosts in by_versions.items():
        if "shoal" not in text:
            message = f"workers on {', '.join(hosts)} have no Shoal: {text}"
            return [Finding("ray", Status.WRONG, message, "install Shoal where Ray's workers run")]
    return []


def _shared_memory(answered: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Finding]:
    found = []
    for host, answer in answered:
        place = f"/dev/shm of node {host}"
        found += memory.findings(place, answer["shm_size_bytes"], answer["shm_free_bytes"])
    return [finding for finding in found if finding.status is not Status.OK]


def _clocks(answered: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Finding]:
    if not answered:
        return []
    ahead = {host: answer["ahead_s"] for host, answer in answered}
    known = {host: max(0.0, abs(answer["ahead_s"]) - answer["uncertain_s"]) for host, answer in answered}
    figures = {host: round(seconds, 4) for host, seconds in ahead.items()}
    far = [host for host, seconds in known.items() if seconds > _SKEW_S]
    if far:
        named = ", ".join(f"{host} by {ahead[host]:+.1f} s" for host in far)
        message = f"clocks differ from this machine's: {named}"
        return [Finding("clocks", Status.WARNING, message, "run an NTP client on every node (chronyd)", figures)]
    most = max(known.values())
    message = f"clocks of {_nodes(len(known))} differ from this machine's by at most {most:.3f} s, as measured"
    return [Finding("clocks", Status.OK, message, figures=figures)]


def _nodes(number: int) -> str:
    return "1 node" if number == 1 else f"{number} nodes"
