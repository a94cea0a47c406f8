"""Copies between host and device that overlap later work."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def send_ints(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """int64 [N] on the device, queued. torch.tensor(..., device=) would wait for the steps in
    flight.
    """
    host = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


class HostCopy:
    """Arrays that the device is filling."""

    def __init__(self, arrays: list[np.ndarray], done: torch.cuda.Event | None) -> None:
        self._arrays, self._done = arrays, done

    def wait(self) -> list[np.ndarray]:
        """Block, without the GIL, until the arrays are filled."""
        if self._done is not None:
            self._done.synchronize()
        return self._arrays


class HostCopier:
    """Starts copies; on CUDA in a stream of their own, so that the next step need not wait."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, tensors: Sequence[torch.Tensor]) -> HostCopy:
        """Copy `tensors` as the queued work leaves them. On CPU they are not copied."""
        if self._stream is None or not tensors:
            return HostCopy([tensor.numpy() for tensor in tensors], None)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        targets = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
        with torch.cuda.stream(self._stream):
            for target, tensor in zip(targets, tensors, strict=True):
                target.copy_(tensor, non_blocking=True)
                tensor.record_stream(self._stream)
            done = torch.cuda.Event()
            done.record(self._stream)
        return HostCopy([target.numpy() for target in targets], done)
