"""The arithmetic of `shoal bench`: percentiles, goodput, arrivals, limits, and what is read out of a trace."""

from __future__ import annotations

import asyncio
import json
import math
import time
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from shoal.deploy.bench.http_client import Answer, Target, closed_loop, complete, open_loop
from shoal.deploy.bench.latency import Timing
from shoal.deploy.bench.limits import Dense, Rates
from shoal.deploy.bench.serving_metrics import Objectives, figures, poisson_offsets
from shoal.deploy.bench.shapes import SHAPES, open_model, write_shape
from shoal.deploy.bench.trace import _waiting_time, family_of, summary
from shoal.deploy.bench.workload import Workload, mixed_lengths
from shoal.replicas.errors import ConfigError
from shoal.replicas.host_copy import HostCopy
from shoal.replicas.models.checkpoint import read_model_facts
from shoal.replicas.text.tokenizer import Tokenizer

H200 = Rates(4.3e12, 794e12)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("shapes")
    return {name: write_shape(name, folder / name) for name in SHAPES}


# ---- a server's figures


def answer(due: float, ttft: float, gaps: list[float]) -> Answer:
    times = np.cumsum([due + ttft, *gaps])
    return Answer(due, tuple(times.tolist()), len(times))


def test_figures_are_those_of_numpy() -> None:
    draw = np.random.default_rng(3)
    answers = [
        answer(i * 0.1, float(draw.uniform(0.01, 0.2)), draw.uniform(0.001, 0.05, 9).tolist()) for i in range(40)
    ]
    row = figures([*answers, Answer(0.0, error="no connection")])
    assert (row["requests"], row["failed"]) == (41, 1)
    ttft = np.array([a.event_times[0] - a.due for a in answers]) * 1e3
    itl = np.concatenate([np.diff(a.event_times) for a in answers]) * 1e3
    tpot = np.array([np.diff(a.event_times).mean() for a in answers]) * 1e3
    e2e = np.array([a.event_times[-1] - a.due for a in answers]) * 1e3
    for name, values in (("TTFT", ttft), ("ITL", itl), ("TPOT", tpot), ("E2E", e2e)):
        for share in (50, 90, 99):
            assert row[f"{name} p{share}"] == pytest.approx(np.percentile(values, share))
    seconds = max(a.event_times[-1] for a in answers)
    assert row["output tok/s"] == pytest.approx(400 / seconds)
    assert row["req/s"] == pytest.approx(40 / seconds)


def test_goodput_counts_requests_that_keep_every_objective() -> None:
    answers = [answer(0.0, 0.1, [0.01]), answer(0.0, 0.3, [0.01]), answer(0.0, 0.1, [0.5]), answer(0.0, 0.1, [0.02])]
    seconds = 0.6
    for objectives, kept in [
        (Objectives(), 4),
        (Objectives(ttft=200), 3),
        (Objectives(ttft=200, tpot=50), 2),
        (Objectives(ttft=200, tpot=50, e2e=115), 1),
    ]:
        assert figures(answers, objectives)["goodput req/s"] == pytest.approx(kept / seconds)


def test_streams_of_one_token_have_no_gaps() -> None:
    row = figures([answer(0.0, 0.1, [])])
    assert row["ITL p50"] is None
    assert row["TPOT p50"] == 0


def test_poisson_arrivals() -> None:
    offsets = poisson_offsets(50.0, 20_000, seed=1)
    gaps = np.diff(offsets)
    assert offsets[0] == 0.0
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.03)  # as an exponential's
    assert (gaps > 1 / 50).mean() == pytest.approx(math.exp(-1), abs=0.01)
    assert poisson_offsets(50.0, 10, seed=1) == offsets[:10]
    assert poisson_offsets(50.0, 10, seed=2) != offsets[:10]


# ---- the client


EVENT = b'data: {"choices":[{"text":"x"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":2,"completion_tokens": 3,"total_tokens":5}}\n\n'
DONE = b"data: [DONE]\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
WHOLE = HEAD + chunk(EVENT) * 3 + chunk(USAGE) + chunk(DONE) + b"0\r\n\r\n"


async def ask(pieces: list[bytes], num: int = 1) -> list[Answer]:
    """Answers of a server that sends these pieces and, as it is asked to, hangs up then."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length"))
        body = json.loads(await reader.readexactly(length))
        assert body["prompt"] == [1, 2]
        assert body["stream_options"] == {"include_usage": True}
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if b"\r\nConnection: close\r\n" not in head:
            await reader.read()  # for as long as its client likes, or some 90 s
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    target = Target("127.0.0.1", server.sockets[0].getsockname()[1], "m", "key")
    request = target.completion([1, 2], 3)
    assert b"Authorization: Bearer key\r\n" in request
    async with server, asyncio.timeout(20):
        return await closed_loop(lambda one: complete(target, one), [request] * num, 2)


@pytest.mark.parametrize("size", [1, 7, 40, 4096])
def test_events_are_counted_wherever_they_are_cut(size: int) -> None:
    pieces = [WHOLE[i : i + size] for i in range(0, len(WHOLE), size)]
    (got,) = asyncio.run(ask(pieces))
    assert got.error is None
    assert got.num_tokens == 3
    assert len(got.event_times) == 3
    assert list(got.event_times) == sorted(got.event_times)


def test_closed_loop_sends_every_request() -> None:
    answers = asyncio.run(ask([WHOLE], num=5))
    assert [one.num_tokens for one in answers] == [3] * 5


@pytest.mark.parametrize(
    "sent",
    [WHOLE[:-40], b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\nbusy", HEAD + chunk(EVENT), b""],
    ids=["cut", "refused", "hung up", "nothing"],
)
def test_an_answer_that_is_not_whole_is_an_error(sent: bytes) -> None:
    (got,) = asyncio.run(ask([sent]))
    assert got.error is not None
    assert got.event_times == ()


def test_no_connection_is_an_error() -> None:
    got = asyncio.run(complete(Target("127.0.0.1", 1, "m"), b"x"))
    assert "no connection" in str(got.error)


def test_open_loop_counts_from_when_a_request_is_due() -> None:
    sent: list[tuple[bytes, float]] = []

    async def send(request: bytes, due: float) -> Answer:
        sent.append((request, due))
        return Answer(due)

    answers = asyncio.run(open_loop(send, [b"a", b"b", b"c"], [0.0, 0.001, 0.002]))
    dues = [one.due for one in answers]
    assert np.diff(dues) == pytest.approx([0.001, 0.001])
    assert sorted(sent) == sorted(zip([b"a", b"b", b"c"], dues, strict=True))


# ---- limits


@pytest.mark.parametrize(
    ("shape", "num_ranks", "batch", "context", "milliseconds"),
    [
        *[("8b", 1, batch, 1024, ms) for batch, ms in ((1, 3.52), (32, 4.49), (128, 7.49), (256, 12.9))],
        *[("8b", 1, batch, 8192, ms) for batch, ms in ((1, 3.74), (32, 11.5))],
        *[("70b", 4, batch, 1024, ms) for batch, ms in ((1, 8.1), (32, 8.7), (128, 10.6), (256, 16.3))],
        *[("1b", 1, batch, 1024, ms) for batch, ms in ((1, 0.58), (32, 0.82), (256, 2.79))],
    ],
)
def test_decode_limits_of_an_h200(
    shapes: dict[str, Path], shape: str, num_ranks: int, batch: int, context: int, milliseconds: float
) -> None:
    limit = Dense.of(shapes[shape], "bfloat16", num_ranks).decode_s(batch, context, H200)
    assert limit * 1e3 == pytest.approx(milliseconds, rel=0.01)


def test_two_ranks_of_the_halved_shape_do_what_two_of_four_do(shapes: dict[str, Path]) -> None:
    assert Dense.of(shapes["70b-half"], num_ranks=2) == Dense.of(shapes["70b"], num_ranks=4)


def test_prefill_limit_of_an_h200(shapes: dict[str, Path]) -> None:
    model = Dense.of(shapes["8b"])
    assert 8192 / model.prefill_s(8192, H200) == pytest.approx(49e3, rel=0.01)
    halves = model.prefill_s(4096, H200) + model.prefill_s(4096, H200, context=4096)
    assert halves == pytest.approx(model.prefill_s(8192, H200))


def test_experts_have_no_limit(tmp_path: Path) -> None:
    config = SHAPES["1b"] | {"num_local_experts": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="mixture of experts"):
        Dense.of(tmp_path)


def test_a_step_is_what_further_tokens_cost() -> None:
    timing = Timing(4, 100, num_decoded=8, first_s=[0.5, 0.4], all_s=[1.3, 1.2])
    assert timing.decode_s == pytest.approx(0.1)
    assert timing.prefill_rate == pytest.approx(1000)


# ---- shapes and workloads


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_models_to_transformers_and_to_us(shapes: dict[str, Path], name: str) -> None:
    facts, config = read_model_facts(shapes[name]), AutoConfig.from_pretrained(shapes[name])
    assert (facts.num_layers, facts.head_dim) == (config.num_hidden_layers, config.head_dim)
    assert facts.vocab_size == config.vocab_size == SHAPES[name]["vocab_size"]
    assert config.rope_parameters["rope_theta"] == 500_000


def test_every_token_of_a_shape_has_a_text(shapes: dict[str, Path]) -> None:
    tokenizer = Tokenizer.from_folder(shapes["1b"])
    assert tokenizer.vocab_size == 128_256
    ids = [5, 4096, 100_000, 128_255]
    assert all(tokenizer.token_text(i) for i in ids)
    assert len({tokenizer.token_text(i) for i in range(4096, 128_256)}) == 128_256 - 4096


def test_a_shapes_folder_is_gone_afterwards() -> None:
    with open_model("1b") as (folder, dummy):
        assert dummy
        assert (folder / "config.json").exists()
    assert not folder.exists()


def test_mixed_lengths_are_the_same_for_the_same_seed() -> None:
    one, other = mixed_lengths(50, 3, 9, 100), mixed_lengths(50, 3, 9, 100)
    assert one == other != mixed_lengths(50, 3, 9, 100, seed=2)
    lengths = [*map(len, one.prompts), *one.num_new_tokens]
    assert (min(lengths), max(lengths)) == (3, 9)
    assert Workload([[1, 2], [3]], [4, 5]).num_output_tokens == 9


# ---- traces


def test_the_time_in_which_the_host_waits_is_told_apart() -> None:
    class Steps:
        def synchronize(self) -> None:
            time.sleep(0.02)

    copy = HostCopy([], cast(torch.cuda.Event, Steps()))
    with _waiting_time() as waited:
        copy.wait()
    copy.wait()
    assert len(waited) == 1
    assert waited[0] >= 0.02


def event(name: str, cat: str, ts: float, dur: float, tid: int = 1) -> dict[str, object]:
    return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur, "tid": tid}


def test_summary_of_a_trace() -> None:
    events = [
        {"ph": "M", "name": "process_name"},
        event("shoal.bench steps", "user_annotation", 100, 100),
        event("cudaGraphLaunch", "cuda_runtime", 105, 5),
        event("cudaEventSynchronize", "cuda_runtime", 120, 60),
        event("nvjet_tst", "kernel", 90, 30, tid=7),  # half of it within
        event("_paged_decode_kernel", "kernel", 120, 40, tid=7),
        event("_rms_norm_kernel", "kernel", 150, 20, tid=7),  # started early: ten of its twenty were a wait
        event("Memcpy DtoH", "gpu_memcpy", 190, 10, tid=8),
        event("nvjet_tst", "kernel", 230, 10, tid=7),  # after the window
    ]
    figures = summary(events, num_steps=2)
    assert figures["profiled step us"] == 50
    assert figures["GPU idle %"] == pytest.approx(20)  # 170..190 of 100
    assert figures["kernels"] == 2
    shares = {name: figures[f"{name} %"] for name in ("GEMM", "attention", "norm", "copy")}
    assert shares == pytest.approx(
        {"GEMM": 100 * 30 / 90, "attention": 100 * 40 / 90, "norm": 100 / 9, "copy": 100 / 9}
    )


def test_without_a_gpu_operators_count_by_their_own_time() -> None:
    events = [
        event("shoal.bench steps", "user_annotation", 0, 100),
        event("aten::linear", "cpu_op", 10, 50),
        event("aten::copy_", "cpu_op", 20, 10),
        event("aten::bmm", "cpu_op", 60, 40),
    ]
    figures = summary(events, num_steps=1)
    assert figures["profiled step us"] == 100
    shares = {name: figures[f"{name} %"] for name in ("GEMM", "attention", "copy")}
    assert shares == pytest.approx({"GEMM": 100 * 4 / 9, "attention": 100 * 4 / 9, "copy": 100 / 9})


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("nvjet_sm90_tst_128x32_64x10_2x1_v_bz_TNT", "GEMM"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "GEMM"),
        ("_fma_kernel", "GEMM"),
        ("_mma_kernel", "GEMM"),
        ("_stream_kernel", "GEMM"),
        ("_paged_decode_kernel", "attention"),
        ("_paged_prefill_kernel", "attention"),
        ("_rms_norm_kernel", "norm"),
        ("_rope_kv_store_kernel", "rope and KV write"),
        ("_silu_mul_kernel", "activation"),
        ("_expand_plan_kernel", "inputs"),
        ("_sample_kernel", "sampling"),
        (
            "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<c10::BFloat16, at::native::ArgMaxOps<",
            "sampling",
        ),
        ("void at::native::(anonymous namespace)::indexSelectSmallIndex<", "embedding"),
        ("Memcpy DtoH (Device -> Pinned)", "copy"),
        ("_moe_gemm_kernel", "moe"),
        ("something_else", "other"),
    ],
)
def test_families(name: str, family: str) -> None:
    assert family_of(name) == family
