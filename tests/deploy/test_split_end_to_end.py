"""`shoal serve tiny -tp 2 -pp 2`, as anyone can run it on two cores: the same answers as those of one rank."""

from __future__ import annotations

import re
import signal

import pytest

from shoal.deploy.config import TINY_MODEL
from shoal.replicas.config import CacheConfig, EngineConfig, ModelConfig
from shoal.replicas.offline import build_engine, generate
from shoal.replicas.protocol import Request, SamplingParams
from shoal.replicas.text.tokenizer import Tokenizer
from tests.support.served import processes_of, ray_folder, start, wait_until

pytestmark = pytest.mark.slow

PROMPTS = ("import os\n", "def main():\n", "class Reader:\n    def __init__(self")
NEW_TOKENS = 40


def answers_of_one_rank() -> list[str]:
    tokenizer = Tokenizer.from_folder(TINY_MODEL)
    engine = build_engine(
        EngineConfig(ModelConfig(str(TINY_MODEL), max_model_len=1024), CacheConfig(num_blocks=256), num_threads=1)
    )
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    requests = [Request(prompt, tuple(tokenizer.encode(prompt)), sampling) for prompt in PROMPTS]
    completions = generate(engine, requests)
    engine.shutdown()
    return [tokenizer.decode(completions[prompt][0].token_ids) for prompt in PROMPTS]


@pytest.mark.parametrize("stages", [1, 2])
def test_ranks_answer_as_one_does_and_leave_nothing_behind(stages: int) -> None:
    expected = answers_of_one_rank()
    server = start("-tp", "2", "-pp", str(stages))
    try:
        assert f"1 replica of {2 * stages} ranks (tensor parallel 2, stages {stages})" in server.output
        body = {"max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
        answers = server.http.post("/v1/completions", json={**body, "prompt": list(PROMPTS)}).json()["choices"]
        assert [answer["text"] for answer in answers] == expected
        metrics = server.http.get("/metrics").text
        assert re.search(rf"^shoal_num_shards{{.*}} {2 * stages}\.0$", metrics, re.MULTILINE), metrics
        assert re.search(r"^shoal_num_steps_total{.*} [1-9]", metrics, re.MULTILINE), metrics
        assert re.search(r"^shoal_shard_step_seconds_count{.*} [1-9]", metrics, re.MULTILINE), metrics
        running = " ".join(processes_of(server.process.pid))
        folder = ray_folder(server.process.pid)
        assert len(re.findall(r"ray::shard \d of replica", running)) == 2 * stages, running
        logs = "".join(log.read_text() for log in folder.glob("session_2*/logs/worker-*.err"))
        ready = re.findall(r"^INFO .* shoal_Replica-tiny \w+ rank (\d) -- \S+ is ready on cpu", logs, re.MULTILINE)
        assert sorted(map(int, ready)) == list(range(2 * stages)), logs
    finally:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(120) == 0
    assert wait_until(lambda: processes_of(server.process.pid) == []), processes_of(server.process.pid)
    assert not folder.exists()
