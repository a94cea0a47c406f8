"""The text that `shoal serve` prints when it is ready."""

from __future__ import annotations

from ...cluster.wire.membership import ReplicaInfo
from ..config import ServeConfig
from .launcher import Endpoint


def banner(endpoint: Endpoint, config: ServeConfig, replicas: list[list[ReplicaInfo]]) -> str:
    """The address, a command to try, and each model's KV capacity."""
    lines = ["", f"Shoal is ready at {endpoint.url}/v1", ""]
    for model, infos in zip(config.models, replicas, strict=True):
        args = model.engine_kwargs
        split = args.tensor_parallel_size, args.pipeline_parallel_size
        lines += capacity_lines(model.name, infos, split)
    key = ' -H "authorization: Bearer $SHOAL_API_KEY"' if config.api_keys else ""
    name = config.models[0].name
    lines += [
        "",
        f"curl {endpoint.url}/v1/completions{key} -H 'content-type: application/json' \\",
        f"""  -d '{{"model": "{name}", "prompt": "def main():", "max_tokens": 48}}'""",
        "",
        "Ctrl-C stops it.",
    ]
    return "\n".join(lines)


def capacity_lines(name: str, infos: list[ReplicaInfo], split: tuple[int, int] = (1, 1)) -> list[str]:
    """KV capacity in tokens, and full-length requests, over a model's replicas.

    split: ranks per stage, and stages.
    """
    if not infos:
        return [f"  {name}: no replica is registered"]
    tokens = sum(info.num_blocks * info.block_size for info in infos)
    longest = infos[0].max_model_len
    slowest = max(infos, key=lambda info: sum(seconds for _, seconds in info.startup_seconds))
    count = f"{len(infos)} replicas" if len(infos) > 1 else "1 replica"
    if split != (1, 1):
        count += f" of {split[0] * split[1]} ranks (tensor parallel {split[0]}, stages {split[1]})"
    return [
        f"  {name}: {infos[0].num_parameters / 1e6:,.1f} M parameters, {infos[0].dtype}, {count}",
        f"  KV cache capacity: {tokens:,} tokens",
        f"  maximum concurrency for requests of {longest:,} tokens: {tokens / longest:.2f}x",
        "  start of a replica: " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in slowest.startup_seconds),
    ]
