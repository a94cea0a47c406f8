"""The doctor's findings on machines that a test cannot have: its checks, given what such a machine would report."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from shoal.deploy.config import LLMConfig, from_dict, plan_model
from shoal.deploy.doctor import (
    devices,
    limits,
    memory,
    network,
    pairs,
    peers,
    placement,
    ray_cluster,
    report,
    settings,
    versions,
)
from shoal.deploy.doctor.finding import Finding, Status
from shoal.deploy.doctor.process import Outcome
from shoal.deploy.doctor.run import guarded
from shoal.deploy.resources import ReplicaRequest, replica_request, resources_of_nodes

GIB = 1 << 30


def outcome(*lines: dict[str, Any], status: int | None = 0, last_words: str = "") -> Outcome:
    return Outcome(lines, status, last_words, 30.0)


def statuses(found: list[Finding]) -> list[str]:
    return [finding.status.value for finding in found]


def test_a_check_that_fails_is_a_finding() -> None:
    (finding,) = guarded("memory", lambda: [][0])
    assert (finding.check, finding.status) == ("memory", Status.WRONG)
    assert "IndexError" in finding.message


@pytest.mark.parametrize(
    ("size", "free", "status", "remedy"),
    [
        (64 << 20, 60 << 20, Status.WRONG, "--shm-size"),  # docker's own
        (GIB // 2, GIB // 2, Status.WARNING, "--shm-size"),
        (64 * GIB, 100 << 20, Status.WRONG, "have left in /dev/shm"),
        (64 * GIB, 60 * GIB, Status.OK, ""),
    ],
)
def test_shared_memory(size: int, free: int, status: Status, remedy: str) -> None:
    (finding,) = memory.findings("/dev/shm", size, free)
    assert finding.status is status
    assert remedy in finding.remedy
    assert bool(finding.remedy) == (status is not Status.OK)


@pytest.mark.parametrize(
    ("soft", "hard", "status", "remedy"),
    [
        (256, 1024, Status.WRONG, "the hard limit, 1024"),
        (4096, 1 << 20, Status.WARNING, "ulimit -n 8192 in the shell"),
        (65536, 65536, Status.OK, ""),
        (-1, -1, Status.OK, ""),
    ],
)
def test_open_files(soft: int, hard: int, status: Status, remedy: str) -> None:
    (finding,) = limits.findings(soft, hard)
    assert finding.status is status
    assert remedy in finding.remedy
    assert bool(finding.remedy) == (status is not Status.OK)


@pytest.mark.parametrize(("host", "why"), [("192.0.2.1", "cannot assign requested address"), ("::1", "not supported")])
def test_a_host_that_is_not_this_machines(host: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address of another one, and IPv6 where the kernel has none."""
    made = socket.socket

    def without_ipv6(family: int = -1, *options: int, **more: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        return made(family, *options, **more)

    monkeypatch.setattr(network.socket, "socket", without_ipv6)
    port, *others = network.check_network(host, 1025)
    assert (port.check, port.status) == ("ports", Status.WRONG)
    assert f"{host}:1025 cannot be listened on: " in port.message
    assert why in port.message
    assert statuses(others) == ["ok"] * 3


def test_versions_that_are_not_those_asked_for() -> None:
    required = [
        "torch>=2.11,<3",
        "ray[serve]>=2.60,<3",
        "triton>=3.6,<4; sys_platform == 'linux'",
        "ruff>=9; extra == 'dev'",
    ]
    (fine,) = versions.findings(required, {"torch": "2.11.0+cu130", "ray": "2.60.0", "triton": "3.6.0"})
    assert fine.status is Status.OK
    old, missing = versions.findings(required, {"torch": "2.10.0", "triton": "3.6.0"})
    assert (old.status, old.message) == (Status.WRONG, "torch is 2.10.0; needed is torch<3,>=2.11")
    assert "ray is not installed" in missing.message
    assert not versions.nccl_findings({"nvidia-nccl-cu13": "2.28"})
    (both,) = versions.nccl_findings({"nvidia-nccl-cu12": "2.27", "nvidia-nccl-cu13": "2.28"})
    assert "libnccl.so.2" in both.message


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("eth", ["eth0", "eth1"]),
        ("=eth1", ["eth1"]),
        ("lo,eth1", ["lo", "eth1"]),
        ("^lo,docker", ["eth0", "eth1"]),
        ("^=eth0", ["lo", "eth1", "docker0"]),
    ],
)
def test_interfaces_are_named_as_nccl_does(pattern: str, names: list[str]) -> None:
    assert [name for name in ("lo", "eth0", "eth1", "docker0") if settings.matches(pattern, name)] == names


def test_settings_that_cost() -> None:
    found = settings.findings({"NCCL_P2P_DISABLE": "1", "NCCL_NVLS_ENABLE": "0", "HOME": "/"}, ["lo", "eth0"])
    assert statuses(found) == ["ok", "warning"]
    assert "NCCL_NVLS_ENABLE=0, NCCL_P2P_DISABLE=1" in found[0].message
    assert "HOME" not in found[0].message


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (None, "it had no answer within 30 s: Segmentation fault"),
        (-11, "it was killed by signal 11: Segmentation fault"),
        (3, "it ended with status 3: Segmentation fault"),
        (0, None),
    ],
)
def test_how_a_probe_ended(status: int | None, said: str | None) -> None:
    assert outcome(status=status, last_words="Segmentation fault").failure == said


# GPUs

TORCH = {"torch": "2.11.0+cu130", "cuda": "13.0", "driver_cuda": 13000, "available": True, "nccl": "2.28.9"}


def gpu(device: int, free: int = 139 * GIB, name: str = "H200") -> dict[str, Any]:
    return {"device": device, "name": name, "total_bytes": 140 * GIB, "free_bytes": free}


def test_gpus() -> None:
    found = devices.findings(outcome(TORCH, gpu(0), gpu(1)), 2, "580.95.05")
    assert statuses(found) == ["ok"] * 3
    assert "the driver 580.95.05 runs CUDA up to 13.0" in found[0].message
    assert "GPU 1, H200: 140.0 GiB, 139.0 GiB of it free" in found[2].message


def test_a_gpu_whose_memory_is_taken() -> None:
    _, _, taken = devices.findings(outcome(TORCH, gpu(0), gpu(1, free=70 * GIB)), 2, "580")
    assert taken.status is Status.WARNING
    assert "--gpu-memory-utilization 0.48" in taken.remedy
    full = devices.findings(outcome(TORCH, gpu(0, free=GIB)), 1, "580")[1]
    assert full.remedy == "end what else runs on it (nvidia-smi)"


def test_gpus_that_are_missing_or_different() -> None:
    found = devices.findings(outcome(TORCH, gpu(0), gpu(1, name="A100")), 4, "580")
    warnings = [finding.message for finding in found if finding.status is Status.WARNING]
    assert warnings[0] == "torch sees 2 of 4 GPUs"
    assert "A100, H200" in warnings[1]


@pytest.mark.parametrize(
    ("torch", "message"),
    [
        ({**TORCH, "cuda": None, "available": False}, "was built without CUDA"),
        (
            {**TORCH, "driver_cuda": 12040, "available": False},
            "runs CUDA up to 12.4, but torch 2.11.0+cu130, built for CUDA 13.0",
        ),
    ],
)
def test_a_torch_that_does_not_fit_the_driver(torch: dict[str, Any], message: str) -> None:
    (finding,) = devices.findings(outcome(torch), 8, "550.54")
    assert finding.status is Status.WRONG
    assert message in finding.message


def test_a_driver_that_fails_in_the_middle() -> None:
    found = devices.findings(
        outcome(TORCH, gpu(0), status=1, last_words="CUDA error: uncorrectable ECC error"), 2, "580"
    )
    assert found[-1].status is Status.WRONG
    assert "ECC" in found[-1].message


def pair(source: int, target: int, gb: float = 200.0, **more: Any) -> dict[str, Any]:
    return {"source": source, "target": target, "bytes_per_s": gb * 1e9, **more}


def test_peer_access() -> None:
    lines = [pair(0, 1, 380, access=True), pair(1, 0, 380, access=True)]
    (fine,) = peers.findings(devices.copies(lines))
    assert (fine.status, fine.figures) == (Status.OK, {"0-1": 380.0, "1-0": 380.0})
    (apart,) = peers.findings(devices.copies([lines[0], pair(1, 0, 11, access=False)]))
    assert apart.status is Status.WARNING
    assert "1 of 2 pairs of GPUs do not reach each other: 1 to 0" in apart.message
    assert peers.findings({}) == []


def nccl(*ranks: Outcome, copies: dict[tuple[int, int], float] | None = None) -> list[Finding]:
    return pairs.findings("nccl", len(ranks), ranks, copies or {})


def test_pairs_that_exchange() -> None:
    whole = {"sum": 2, "right": True, "bytes_per_s": 300e9}
    first = outcome({"begin": [0, 1]}, pair(1, 0, right=True), {"begin": "sum"}, whole)
    (fine,) = nccl(first, outcome(pair(0, 1, right=True), {"begin": [1, 0]}), copies={(0, 1): 380e9})
    assert fine.status is Status.OK
    assert fine.figures == {"1-0": 200.0, "0-1": 200.0, "sum": 300.0}


def test_symmetric_memory() -> None:
    exchanged = pair(1, 0, right=True), pair(0, 1, right=True)
    can, cannot = {"symmetric": True, "reason": ""}, {"symmetric": False, "reason": "rank 1 does not reach rank 0"}
    assert statuses(nccl(outcome(*exchanged, can), outcome())) == ["ok", "ok"]
    found = nccl(outcome(*exchanged, cannot), outcome())
    assert statuses(found) == ["ok", "warning"]
    assert "rank 1 does not reach rank 0" in found[1].message


def test_a_pair_that_hangs_is_named() -> None:
    silent = outcome({"begin": [0, 1]}, status=None)
    found = nccl(silent, outcome(status=None), outcome(status=None))
    (wrong,) = [finding for finding in found if finding.status is Status.WRONG]
    assert "failed while 0 to 1 exchanged tensors: it had no answer within 30 s" in wrong.message
    whole = nccl(
        outcome(pair(1, 0, right=True), {"begin": "sum"}, status=None), outcome(pair(0, 1, right=True), status=None)
    )
    assert "in a sum over all ranks" in whole[-1].message


def test_the_rank_that_failed_is_named_before_those_that_waited() -> None:
    (wrong,) = nccl(outcome(status=None), outcome(status=1, last_words="RuntimeError: no memory"))
    assert "rank 1 of 2 failed while the ranks met: it ended with status 1: RuntimeError: no memory" in wrong.message


def test_pairs_that_are_slow_or_damage_what_they_carry() -> None:
    lines = [pair(s, t, right=True) for s in range(3) for t in range(3) if s != t]
    lines[1] |= {"bytes_per_s": 20e9}  # 0 to 2
    found = nccl(outcome(*lines), outcome(), outcome())
    assert statuses(found) == ["ok", "warning"]
    assert "0 to 2 reach 20.0 GB/s and the median pair 200.0" in found[1].message
    found = nccl(outcome(pair(0, 1, 20, right=False)), outcome(pair(1, 0, 20, right=True)), copies={(0, 1): 380e9})
    assert statuses(found) == ["ok", "wrong", "warning"]
    assert "what came from 0 to 1 is not what was sent" in found[1].message
    assert "NCCL_P2P_DISABLE" in found[2].remedy


# Ray


def node(name: str, cpus: float = 8.0, gpus: float = 0.0) -> dict[str, Any]:
    return {"node": name, "host": f"10.0.0.{name}", "resources": {"CPU": cpus, "GPU": gpus}}


def answer(name: str, ahead: float = 0.0, shm: int = 8 * GIB, **changed: str) -> dict[str, Any]:
    installed = {"shoal": "0.1.0", "torch": "2.13.0", **changed}
    return {
        "asked": name,
        "ahead_s": ahead,
        "uncertain_s": 0.01,
        "versions": installed,
        "shm_free_bytes": shm,
        "shm_size_bytes": shm,
    }


def test_a_ray_of_two_nodes() -> None:
    said = outcome(node("1"), node("2", gpus=4), answer("1"), answer("2", 0.2))
    found = ray_cluster.findings(said, wanted=False)
    assert statuses(found) == ["ok", "ok"]
    assert found[0].message == "Ray has 2 nodes with 16 CPUs and 4 GPUs"
    assert "at most 0.190 s" in found[1].message


def test_nodes_that_do_not_fit_together() -> None:
    said = outcome(node("1"), node("2"), node("3"), answer("1"), answer("2", -3600.0, 64 << 20, torch="2.11.0"))
    messages = [
        finding.message for finding in ray_cluster.findings(said, wanted=True) if finding.status is not Status.OK
    ]
    assert "no worker on node 10.0.0.3 answers" in messages[0]
    assert "nodes have different versions" in messages[1]
    assert "/dev/shm of node 10.0.0.2 has 0.1 GiB" in messages[2]
    assert messages[3] == "clocks differ from this machine's: 10.0.0.2 by -3600.0 s"


def test_no_ray() -> None:
    assert statuses(ray_cluster.findings(outcome({"missing": "none"}), wanted=False)) == ["skipped"]
    assert statuses(ray_cluster.findings(outcome(status=None), wanted=True)) == ["wrong"]
    (silent,) = ray_cluster.findings(outcome(status=None), wanted=False)
    assert (silent.status, "no answer within 30 s" in silent.message) == (Status.SKIPPED, True)


@pytest.mark.parametrize(
    ("folders", "only_own"), [([], False), (["shoal-ray-1"], True), (["shoal-ray-1", "ray"], False), (["ray"], False)]
)
def test_a_ray_that_shoal_serve_has_for_itself(folders: list[str], only_own: bool, tmp_path: Path) -> None:
    """Ray would look for a way to join it for as long as it may."""
    programs = [f"/lib/ray/gcs_server\0--log_dir=/tmp\0--session-dir=/tmp/{folder}/session_1\0" for folder in folders]
    for pid, command in enumerate(["/bin/sh\0--session-dir=/tmp/ray/session_1\0", "", *programs], 1):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cmdline").write_text(command)
    assert ray_cluster.only_own(tmp_path) is only_own


def request(tp: int, pp: int, nodes: list[dict[str, float]], **more: Any) -> list[Finding]:
    kwargs = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    value = {"model_loading_config": {"model_id": "tiny"}, "engine_kwargs": kwargs, **more}
    plan = plan_model(from_dict(LLMConfig, value), device="cpu")
    room = resources_of_nodes({"Alive": True, "Resources": resources} for resources in nodes)
    return placement.findings([(plan, replica_request(plan, room, 1.0))], nodes, "this Ray")


def test_what_fits_the_nodes() -> None:
    two = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}]
    (split,) = request(4, 1, two)
    assert split.status is Status.WRONG
    assert "0 of 1 replicas fit this Ray; each needs 5 processes with 5 CPU, 4 GPU on one node" in split.message
    assert "this Ray has 16 CPU, 4 GPU" in split.remedy
    assert request(2, 2, two)[0].status is Status.OK, "stages may lie on two nodes"
    (copies,) = request(2, 1, two, deployment_config={"num_replicas": 3})
    assert "2 of 3 replicas fit" in copies.message


def test_strategies_of_placement() -> None:
    bundles = [{"CPU": 1.0}, {"CPU": 1.0}]
    for strategy, nodes, fits in (
        ("STRICT_SPREAD", [{"CPU": 4.0}], False),
        ("STRICT_SPREAD", [{"CPU": 1.0}, {"CPU": 1.0}], True),
        ("SPREAD", [{"CPU": 4.0}], True),
        ("PACK", [{"CPU": 1.0}, {"CPU": 1.0}], True),
        ("STRICT_PACK", [{"CPU": 1.0}, {"CPU": 1.0}], False),
    ):
        assert placement.place(ReplicaRequest({}, "cpu", bundles, strategy), nodes) is fits, strategy


def test_the_exit_status_and_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    fine, bad = Finding("a", Status.WARNING, "slow", "hurry"), Finding("b", Status.WRONG, "[red]broken", "mend it")
    assert (report.exit_status([fine]), report.exit_status([fine, bad])) == (0, 1)
    report.show([fine, bad])
    shown = capsys.readouterr().out
    assert "[red]broken" in shown
    assert "-> mend it" in shown
    assert shown.rstrip().endswith("1 warning, 1 wrong")
