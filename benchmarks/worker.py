"""An engine in its own process, which runs workloads from a pipe and answers with their times.

    python -P benchmarks/worker.py shoal|vllm

One JSON object per line. In: first the settings ({"model", "max_model_len", "max_num_seqs", "kv_cache_memory_bytes",
"load_format", "tensor_parallel_size", ...}), then workloads ({"prompts", "num_new_tokens", "temperature"})
or {"rates": dtype}. Out: {"engine", "device"} once loaded, then {"seconds"} or {"bytes_per_s", "flops"}, or {"error"}.
It ends when its input closes. -P keeps this repository out of vLLM's imports.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any

Answer = dict[str, Any]
Engine = Callable[[dict[str, Any]], Answer]


def load_shoal(settings: dict[str, Any]) -> tuple[Engine, Answer]:
    """Shoal as `build_engine` makes it."""
    from dataclasses import asdict
    from pathlib import Path

    import torch

    from shoal.deploy.bench.engines import engine_config
    from shoal.deploy.bench.rates import measure_rates
    from shoal.deploy.bench.report import device_name
    from shoal.deploy.bench.workload import Workload, engine_run
    from shoal.replicas.offline import build_engine

    folder = Path(settings.pop("model"))
    engine = build_engine(engine_config(folder, settings, dummy=False))
    atexit.register(engine.shutdown)  # ranks in their own processes end first
    run, device = engine_run(engine), engine.config.device

    def answer(order: dict[str, Any]) -> Answer:
        if "rates" in order:
            return asdict(measure_rates(device, getattr(torch, order["rates"])))
        return {"seconds": run(Workload(**order))}

    return answer, {"engine": "Shoal", "device": device_name(device)}


def load_vllm(settings: dict[str, Any]) -> tuple[Engine, Answer]:
    """vLLM's offline class, configured for a fair comparison: no prefix cache, no detokenizing."""
    import torch

    vllm: Any = import_module("vllm")  # by name: vLLM is no requirement of this project
    if settings.get("tensor_parallel_size", 1) > 1:
        settings["distributed_executor_backend"] = "mp"  # processes instead of Ray actors
    llm = vllm.LLM(
        **settings,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enable_prefix_caching=False,
        seed=0,
        gpu_memory_utilization=0.45,  # must be free at the start; the cache size is fixed
    )

    def answer(order: dict[str, Any]) -> Answer:
        lengths, temperature = order["num_new_tokens"], order["temperature"]
        prompts = [{"prompt_token_ids": prompt} for prompt in order["prompts"]]
        sampling = [
            vllm.SamplingParams(max_tokens=length, ignore_eos=True, temperature=temperature, detokenize=False)
            for length in lengths
        ]
        begin = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        elapsed = time.perf_counter() - begin
        if [len(output.outputs[0].token_ids) for output in outputs] != lengths:
            raise RuntimeError("a sequence has the wrong length")
        return {"seconds": elapsed}

    return answer, {"engine": f"vLLM {vllm.__version__}", "device": torch.cuda.get_device_name()}


def main() -> None:
    load = {"shoal": load_shoal, "vllm": load_vllm}[sys.argv[1]]
    # Output of libraries and their processes goes to the log.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(answer: Answer) -> None:
        out.write(json.dumps(answer) + "\n")

    try:
        engine, ready = load(json.loads(sys.stdin.readline()))
        say(ready)
        for line in sys.stdin:
            say(engine(json.loads(line)))
    except Exception:
        say({"error": traceback.format_exc()})
        raise


if __name__ == "__main__":
    main()
