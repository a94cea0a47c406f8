"""GPUs: present, visible to torch, and with free memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .finding import Finding, Status, gib
from .process import Outcome

# Engines take 0.9 of a GPU's memory by default (gpu_memory_utilization).
_FREE_SHARE = 0.9
_USEFUL_SHARE = 0.2


def findings(outcome: Outcome, present: int, driver: str | None) -> list[Finding]:
    """Findings from the GPU probe, with `present` device files and the driver's version `driver`."""
    about = next((line for line in outcome.lines if "torch" in line), None)
    if about is None:
        remedy = "python -c 'import torch; print(torch.cuda.is_available())' must answer; install torch again if not"
        return [Finding("gpus", Status.WRONG, f"torch could not be asked for GPUs: {outcome.failure}", remedy)]
    devices = [line for line in outcome.lines if "device" in line]
    if not about["available"]:
        return [_no_gpu(about, present, driver)]
    found = [_gpu(line) for line in devices]
    if outcome.failure is not None:
        remedy = "nvidia-smi shows GPUs that have failed; CUDA_VISIBLE_DEVICES leaves some out"
        found.append(Finding("gpus", Status.WRONG, f"{len(devices)} GPUs answered, then {outcome.failure}", remedy))
    elif len(devices) < present:
        message = f"torch sees {len(devices)} of {present} GPUs"
        found.append(Finding("gpus", Status.WARNING, message, "nvidia-smi shows which one has failed"))
    names = sorted({line["name"] for line in devices})
    if len(names) > 1:
        message = f"there are different GPUs: {', '.join(names)}; a shard group is as fast as its slowest"
        found.append(Finding("gpus", Status.WARNING, message, "give each model one kind: accelerator_type"))
    versions = f"torch {about['torch']} for CUDA {about['cuda']}, NCCL {about['nccl']}"
    message = f"{versions}; the driver{_named(driver)} runs CUDA up to {_cuda(about['driver_cuda'])}"
    return [Finding("gpus", Status.OK, message, figures=about), *found]


def driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The kernel module's version; None without one."""
    try:
        words = file.read_text().splitlines()[0].split()
    except (OSError, IndexError):
        return None
    return next((word for word in words if word[0].isdigit() and "." in word), None)


def _no_gpu(about: dict[str, Any], present: int, driver: str | None) -> Finding:
    if not present and driver is None and about["driver_cuda"] is None:
        message = "there is no NVIDIA GPU: models run on CPU; GPU memory, peer access and NCCL cannot be checked"
        return Finding("gpus", Status.SKIPPED, message, figures=about)
    there = f"there are {present} GPUs and a driver{_named(driver)} that runs CUDA up to {_cuda(about['driver_cuda'])}"
    if about["cuda"] is None:
        remedy = "install a torch that was built for CUDA, without constraints-cpu.txt"
        return Finding("gpus", Status.WRONG, f"{there}, but torch {about['torch']} was built without CUDA", remedy)
    remedy = "install a newer driver, or a torch built for a CUDA that this one runs; look at CUDA_VISIBLE_DEVICES"
    message = f"{there}, but torch {about['torch']}, built for CUDA {about['cuda']}, finds none"
    return Finding("gpus", Status.WRONG, message, remedy, about)


def _gpu(line: dict[str, Any]) -> Finding:
    total, free = line["total_bytes"], line["free_bytes"]
    message = f"GPU {line['device']}, {line['name']}: {gib(total)}, {gib(free)} of it free"
    if free >= _FREE_SHARE * total:
        return Finding("gpus", Status.OK, message, figures=line)
    remedy = "end what else runs on it (nvidia-smi)"
    if free > _USEFUL_SHARE * total:
        remedy += f", or serve with --gpu-memory-utilization {free / total - 0.02:.2f}"
    return Finding("gpus", Status.WARNING, message, remedy, line)


def _named(driver: str | None) -> str:
    return f" {driver}" if driver else ""


def _cuda(version: int | None) -> str:
    return "nothing" if version is None else f"{version // 1000}.{version % 1000 // 10}"


def copies(lines: Iterable[dict[str, Any]]) -> dict[tuple[int, int], dict[str, Any]]:
    """Lines of the probe about pairs, by source and target."""
    return {(line["source"], line["target"]): line for line in lines if "access" in line}
