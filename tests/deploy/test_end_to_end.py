"""`shoal serve tiny`, the real thing, as its users start, use and stop it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from tests.support.served import Served, listeners_of, processes_of, ray_folder, start, wait_until

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = start()
    yield server
    server.http.close()
    server.openai.close()
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGINT)
        try:
            server.process.wait(120)
        except subprocess.TimeoutExpired:
            os.killpg(server.process.pid, signal.SIGKILL)
            raise


def test_what_it_says_when_it_is_ready(served: Served) -> None:
    assert "curl http://127.0.0.1:" in served.output
    tokens = re.search(r"KV cache capacity: ([\d,]+) tokens", served.output)
    concurrency = re.search(r"requests of 1,024 tokens: ([\d.]+)x", served.output)
    assert tokens is not None
    assert concurrency is not None
    assert int(tokens[1].replace(",", "")) / 1024 == pytest.approx(float(concurrency[1]), abs=0.01)
    started = re.search(r"started in ([\d.]+) s: Ray ([\d.]+) s, Serve and models ([\d.]+) s", served.output)
    assert started is not None
    assert re.search(r"start of a replica: weights [\d.]+ s, .*KV cache [\d.]+ s", served.output)
    whole, *stages = map(float, started.groups())
    assert sum(stages) == pytest.approx(whole, abs=0.11)


def test_the_log_of_a_replica_tells_of_its_start_once(served: Served) -> None:
    logs = ray_folder(served.process.pid).glob("session_2*/logs/serve/replica_shoal_Replica-tiny_*.log")
    lines = "".join(log.read_text() for log in logs)
    ready = r"^INFO .* shoal_Replica-tiny \w+ -- .+/tiny is ready on cpu with 2048 KV blocks: weights [\d.]+ s, "
    assert len(re.findall(ready, lines, re.MULTILINE)) == lines.count("is ready") == 1, lines


def test_completions_stream_and_repeat(served: Served) -> None:
    def text(**options: object) -> str:
        chunks = served.openai.completions.create(
            model="tiny", prompt="def main():\n", max_tokens=32, stream=True, extra_body=options
        )
        return "".join(chunk.choices[0].text for chunk in chunks)

    greedy = text(temperature=0)
    assert greedy == text(temperature=0)
    assert text(seed=5) == text(seed=5)
    whole = served.openai.completions.create(model="tiny", prompt="def main():\n", max_tokens=32, temperature=0)
    assert whole.choices[0].text == greedy


def test_chat_streams(served: Served) -> None:
    stream = served.openai.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=16,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert last.usage is not None
    assert 0 < last.usage.completion_tokens <= 16


def test_logprobs_are_the_models_own(served: Served) -> None:
    """Scoring a greedy answer as a prompt gives the log-probabilities with which it was generated."""
    prompt = served.http.post("/tokenize", json={"prompt": "import os\n"}).json()["tokens"]
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 1, "return_token_ids": True}
    [answer] = served.http.post("/v1/completions", json=body).json()["choices"]
    scored = {"prompt": [prompt + answer["token_ids"]], "echo": True, "logprobs": 1, "max_tokens": 0}
    [echo] = served.http.post("/v1/completions", json=scored).json()["choices"]
    assert echo["logprobs"]["tokens"][len(prompt) :] == answer["logprobs"]["tokens"]
    again = echo["logprobs"]["token_logprobs"][len(prompt) :]
    assert again == pytest.approx(answer["logprobs"]["token_logprobs"], abs=1e-4)


def test_a_fork_uses_its_prompts_blocks_once(served: Served) -> None:
    """Eight sequences of a prompt of 512 tokens: its 32 blocks of 16 are shared, seen from outside as they run."""
    body = {"prompt": [[7] * 512], "n": 8, "max_tokens": 500, "ignore_eos": True, "stream": True}
    report = {"shared": 0, "private": 0, "copied": 0}

    def shared() -> bool:
        [replica] = served.http.get("/debug/blocks").json()["tiny"]
        for request in replica["requests"].values():
            report.update(request)
        return report["shared"] > 0 and report["private"] > 0

    with served.http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        assert wait_until(shared)
    assert report["shared"] == 32
    # Closing the stream ends its sequences and frees all blocks.
    [before] = served.http.get("/debug/blocks").json()["tiny"]

    def idle() -> bool:
        [replica] = served.http.get("/debug/blocks").json()["tiny"]
        return replica["requests"] == {} and replica["num_free_blocks"] == before["num_blocks"]

    assert wait_until(idle)


def test_prefixes_are_found_again(served: Served) -> None:
    body = {"prompt": [list(range(100, 260))], "max_tokens": 1}
    cached = [
        served.http.post("/v1/completions", json=body).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        for _ in range(2)
    ]
    assert cached == [0, 144]  # nine whole blocks of the ten: the last token is always computed
    assert served.http.post("/admin/reset_prefix_cache").json() == {"tiny": True}


def test_many_at_once(served: Served) -> None:
    def ask(i: int) -> str:
        answer = served.openai.completions.create(model="tiny", prompt=f"x{i} = ", max_tokens=16, temperature=0)
        return answer.choices[0].text

    alone = [ask(i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == alone


def test_metrics_count(served: Served) -> None:
    text = served.http.get("/metrics").text
    names = ("vllm:num_requests_running", "vllm:kv_cache_usage_perc", "shoal_kv_blocks_shared", "shoal_num_shards")
    for name in (*names, "shoal_num_steps_total", "shoal_shard_step_seconds_sum", "shoal_router_replicas_lost_total"):
        assert f"\n{name}{{" in text
    finished = re.findall(r'^vllm:request_success_total{.*finished_reason="length".*} (\S+)', text, re.M)
    assert sum(map(float, finished)) >= 10
    assert re.search(r"^vllm:generation_tokens_total{.*} [1-9]", text, re.M)


def test_what_listens(served: Served) -> None:
    """Nothing answers other machines: what Serve opens to all of them asks for the token of this Ray."""
    listeners = listeners_of(served.process.pid)
    assert listeners[served.http.base_url.port or 0]
    for port in [port for port, loopback in listeners.items() if not loopback]:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as refusal:
                call(b"", timeout=30)
        assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED  # pyright: ignore[reportAttributeAccessIssue]


def test_errors_come_through_the_proxy(served: Served) -> None:
    """Serve's own proxy stands before the application: statuses, ids and error objects pass it unchanged."""
    for method, path, body, status in (
        ("GET", "/nope", None, 404),
        ("GET", "/v1/completions", None, 405),
        ("POST", "/v1/completions", b'{"prompt": NaN}', 400),
        ("POST", "/v1/completions", b'{"prompt": "\xff"}', 400),
        ("POST", "/v1/completions", b'{"prompt": "x", "model": "other"}', 404),
        ("POST", "/v1/completions", b'{"prompt": "x", "max_tokens": 5000}', 400),
        ("POST", "/v1/completions", b'{"prompt": "x", "n": 100, "max_tokens": 1000}', 400),
        ("POST", "/v1/completions", b" " * (9 << 20), 413),
    ):
        headers = {"content-type": "application/json", "x-request-id": "mine"}
        response = served.http.request(method, path, content=body, headers=headers)
        assert response.status_code == status, response.text
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert response.headers.get_list("x-request-id") == ["mine"]


def test_the_example_runs(served: Served) -> None:
    env = {**os.environ, "OPENAI_BASE_URL": str(served.openai.base_url)}
    command = [sys.executable, str(REPOSITORY / "examples" / "openai_client.py")]
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "def read_lines(path):" in result.stdout
    assert "tokens]" in result.stdout


def stop_and_look(server: Served, number: signal.Signals) -> None:
    """Stop the server while a stream runs, and see that no process and no folder of it is left."""
    session = server.process.pid
    folder = ray_folder(session)
    body = {"prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_bytes())
        server.process.send_signal(number)
        assert server.process.wait(120) == 0
    assert wait_until(lambda: processes_of(session) == []), processes_of(session)
    assert not folder.exists()


def test_sigint_leaves_nothing_behind(served: Served) -> None:
    """Last of those that use the server."""
    stop_and_look(served, signal.SIGINT)


@pytest.mark.slow
def test_sigterm_leaves_nothing_behind() -> None:
    stop_and_look(start(), signal.SIGTERM)
