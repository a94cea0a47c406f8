"""vLLM's options that Shoal does not have, each with a reason. Add one here and the command line accepts it."""

from __future__ import annotations

from typing import Any, NamedTuple


class WithoutEffect(NamedTuple):
    """An option that changes an engine's speed or logs, but no answer: accepted, with a warning."""

    reason: str
    kind: type = str  # of its value on the command line


class NotAvailable(NamedTuple):
    """An option that would change answers or the layout: an error, except for `harmless` values."""

    reason: str
    harmless: tuple[Any, ...]  # values that ask for nothing
    kind: type = str
    short: str | None = None


WITHOUT_EFFECT = {
    "api_server_count": WithoutEffect("num_routers sets the number of HTTP processes", int),
    "async_scheduling": WithoutEffect("steps always overlap", bool),
    "compilation_config": WithoutEffect("the kernels and CUDA graphs have no compiler options"),
    "cpu_offload_gb": WithoutEffect("weights stay on the device", float),
    "cuda_graph_sizes": WithoutEffect("the batch sizes of CUDA graphs are fixed"),
    "disable_frontend_multiprocessing": WithoutEffect("routers are processes of their own", bool),
    "disable_log_requests": WithoutEffect("requests are not logged", bool),
    "disable_log_stats": WithoutEffect("statistics are metrics, not log lines", bool),
    "disable_uvicorn_access_log": WithoutEffect("Ray Serve logs accesses", bool),
    "distributed_executor_backend": WithoutEffect("ranks are Ray actors"),
    "enable_log_requests": WithoutEffect("requests are not logged", bool),
    "max_parallel_loading_workers": WithoutEffect("each rank loads its own part of the weights", int),
    "max_seq_len_to_capture": WithoutEffect("CUDA graphs serve every context length", int),
    "num_scheduler_steps": WithoutEffect("steps always overlap", int),
    "scheduling_policy": WithoutEffect("requests are ordered by priority, then by arrival"),
    "speculative_config": WithoutEffect("there is no speculative decoding, which changes speed alone"),
    "swap_space": WithoutEffect("preempted sequences are recomputed, not swapped", float),
    "tokenizer_mode": WithoutEffect("the fast tokenizer is the only one"),
    "trust_remote_code": WithoutEffect("code that comes with a model never runs", bool),
    "uvicorn_log_level": WithoutEffect("Ray Serve sets the log level"),
}

NOT_AVAILABLE = {
    "chat_template": NotAvailable("the tokenizer's own template is used", (None,)),
    "data_parallel_size": NotAvailable("num_replicas sets the copies of a model", (1,), int),
    "decode_context_parallel_size": NotAvailable("a context is on one rank", (1,), int),
    "enable_auto_tool_choice": NotAvailable("tool calls are not parsed", (False,), bool),
    "enable_expert_parallel": NotAvailable("tensor parallelism splits every expert", (False,), bool),
    "enable_lora": NotAvailable("adapters are not supported", (False,), bool),
    "hf_overrides": NotAvailable("config.json is used as it is", (None,)),
    "kv_cache_dtype": NotAvailable("the KV cache has the model's dtype", ("auto",)),
    "lora_modules": NotAvailable("adapters are not supported", (None,)),
    "quantization": NotAvailable("quantized weights are not supported", (None,), short="-q"),
    "reasoning_parser": NotAvailable("reasoning is part of the text", (None,)),
    "ssl_certfile": NotAvailable("a proxy in front of the server has to add TLS", (None,)),
    "ssl_keyfile": NotAvailable("a proxy in front of the server has to add TLS", (None,)),
    "tool_call_parser": NotAvailable("tool calls are not parsed", (None,)),
}
