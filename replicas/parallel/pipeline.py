"""Transfers between pipeline stages: hidden states forward, sampled tokens back to the first stage.

On a GPU transfers are queued and streams wait; the host never blocks. Three rules prevent a deadlock,
for any number of stages and of plans in flight:

- Every stage runs all plans in step order. Stage s of step n waits for stage s - 1 of step n and its
  own step n - 1. If the next stage receives slowly, it also waits for stage s + 1 of step n - 1.
- The first stage waits for tokens only right before the step that reads them.
- The last stage never waits for a token receive: it sends a copy on its own stream and communicator.
  So it can receive the hidden states that the first stage sends before waiting for tokens.

Each wait is for an earlier (step, stage), so the earliest unfinished one can always proceed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_TAG = 0


class PipelineLink(NamedTuple):
    """A connection to another rank; its own process group avoids queueing behind other transfers."""

    group: dist.ProcessGroup
    peer: int  # in the group


class PipelineLinks:
    """Links to the neighbouring stages, and from the last stage to the first, within one
    tp_rank.

    gloo on a CPU, NCCL on the current stream on a GPU.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        previous: PipelineLink | None,
        following: PipelineLink | None,
        first: PipelineLink | None,
        last: PipelineLink | None,
        max_in_flight: int,
    ) -> None:
        self._previous, self._following, self._first, self._last = previous, following, first, last
        self._on_cpu = device.type == "cpu"
        self._max_in_flight = max_in_flight
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()  # CPU sends that may be unfinished
        self._side = None if self._on_cpu or first is None else torch.cuda.Stream(device)

    @classmethod
    def connect(
        cls,
        open_group: Callable[[str, Sequence[int]], dist.ProcessGroup],
        device: torch.device,
        *,
        rank: int,
        tp_size: int,
        pp_size: int,
        max_in_flight: int,
    ) -> PipelineLinks:
        """Open the links of world rank `rank`; all ranks call it at the same time.

        open_group(name, ranks): waits for those ranks and returns their group. Each link is
        used once here, the first stage's first: NCCL blocks both hosts at a first transfer.
        """
        stage, tp_rank = divmod(rank, tp_size)
        is_first, is_last = stage == 0, stage == pp_size - 1

        def link(source: int, target: int) -> PipelineLink:
            ranks = [source * tp_size + tp_rank, target * tp_size + tp_rank]
            return PipelineLink(open_group(f"pipeline {ranks[0]} to {ranks[1]}", ranks), 1 - ranks.index(rank))

        previous = None if is_first else link(stage - 1, stage)
        following = None if is_last else link(stage, stage + 1)
        tokens = link(pp_size - 1, 0) if is_first or is_last else None
        links = cls(
            device,
            previous=previous,
            following=following,
            first=tokens if is_last else None,
            last=tokens if is_first else None,
            max_in_flight=max_in_flight,
        )
        probe = torch.zeros(1, dtype=torch.int64, device=device)
        if not is_first:
            links.receive_hidden(probe)
        if not is_last:
            links.send_hidden(probe)
        if is_last:
            links.return_tokens(probe)
        if is_first:
            links.receive_tokens(probe)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return links

    def send_hidden(self, x: Tensor) -> None:
        """Send contiguous x to the next stage; later work may overwrite it."""
        assert self._following is not None, "the last stage has no stage after it"
        self._send(x, self._following)

    def receive_hidden(self, out: Tensor) -> None:
        """Receive the next hidden states into contiguous `out` of their size."""
        assert self._previous is not None, "the first stage has no stage before it"
        _receive(out, self._previous)

    def return_tokens(self, tokens: Tensor) -> None:
        """Send tokens to the first stage, in parallel with later work, which may overwrite them."""
        assert self._first is not None, "tokens come from the last stage"
        if self._side is None:
            self._send(tokens, self._first)
            return
        copy = tokens.clone()
        self._side.wait_stream(torch.cuda.current_stream(copy.device))
        with torch.cuda.stream(self._side):
            copy.record_stream(self._side)
            self._send(copy, self._first)

    def receive_tokens(self, out: Tensor) -> None:
        """Receive the last stage's next tokens on the first stage."""
        assert self._last is not None, "tokens go to the first stage"
        _receive(out, self._last)

    def finish(self) -> None:
        """Wait until all sends are received (CPU only)."""
        while self._sent:
            self._sent.popleft()[0].wait()

    def _send(self, x: Tensor, link: PipelineLink) -> None:
        if not self._on_cpu:
            link.group.send([x], link.peer, _TAG).wait()  # the stream waits, not the host
            return
        copy = x.clone()
        self._sent.append((link.group.send([copy], link.peer, _TAG), copy))
        # One send per plan: at most max_in_flight sends are unreceived.
        while len(self._sent) > self._max_in_flight:
            self._sent.popleft()[0].wait()


def _receive(out: Tensor, link: PipelineLink) -> None:
    link.group.recv([out], link.peer, _TAG).wait()
