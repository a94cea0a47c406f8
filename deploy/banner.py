"""What `shoal serve` prints when it is ready."""

from __future__ import annotations

from ..cluster.membership import ReplicaInfo
from .config import ServeConfig
from .launcher import Endpoint


def banner(endpoint: Endpoint, config: ServeConfig, infos: list[ReplicaInfo]) -> str:
    """The address, a line to try, and what each model has room for. `infos` are one replica of each model."""
    lines = ["", f"Shoal is ready at {endpoint.url}/v1"]
    for model, info in zip(config.models, infos, strict=True):
        replicas = model.deployment_config.num_replicas or 1
        lines += ["", *capacity_lines(model.name, info, replicas)]
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


def capacity_lines(name: str, info: ReplicaInfo, num_replicas: int) -> list[str]:
    """KV capacity in tokens and the number of full-length requests that fit it, over all replicas."""
    tokens = info.num_blocks * info.block_size * num_replicas
    copies = f", {num_replicas} replicas" if num_replicas > 1 else ""
    return [
        f"  {name}: {info.num_parameters / 1e6:,.1f} M parameters, {info.dtype}{copies}",
        f"  KV cache capacity: {tokens:,} tokens",
        f"  maximum concurrency for requests of {info.max_model_len:,} tokens: {tokens / info.max_model_len:.2f}x",
    ]
