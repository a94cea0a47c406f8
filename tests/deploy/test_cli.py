"""The command line: a wrong configuration is reported in one line with status 2, before torch or Ray are loaded."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from shoal import __version__
from shoal.deploy.cli import app
from shoal.deploy.cli_config import serve_config
from shoal.deploy.configuration_docs import PAGE, document
from shoal.deploy.vllm_options import WITHOUT_EFFECT
from shoal.replicas.device import automatic_threads

# Refuses the imports that a wrong configuration must not need, whatever the machine's speed.
GUARD = """
import sys
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "ray", "fastapi", "transformers"):
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, Guard())
from shoal.deploy.cli import main
main()
"""


def shoal(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", GUARD, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **env}, check=False)


def test_the_configuration_page_names_every_flag_of_serve() -> None:
    serve = typer.main.get_command(app).commands["serve"]  # pyright: ignore[reportAttributeAccessIssue]
    text = PAGE.read_text()
    flags = {
        option.name: (*option.opts, *option.secondary_opts)
        for option in serve.params
        if option.param_type_name == "option" and not option.hidden
    }
    assert len(flags) > 25
    assert [name for name, names in flags.items() if not all(f"`{flag}`" in text for flag in names)] == []


def test_the_configuration_page_is_current() -> None:
    assert PAGE.read_text() == document(), "run `make docs`"


def test_version() -> None:
    result = shoal("version")
    assert (result.returncode, result.stdout.strip()) == (0, __version__)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-modle-len", "5"], "--max-model-len"),
        (["--max-model-len", "many"], "--max-model-len"),
        (["--max-model-len", "5000"], "5000"),
        (["--max-model-len", "0"], "max_model_len"),
        (["--dtype", "flaot16"], "flaot16"),
        (["--block-size", "17"], "17"),
        (["-tp", "3"], "8 attention heads; this model takes 1, 2, 4, 8"),
        (["-tp", "0"], "tensor_parallel_size"),
        (["--tensor-parallel-size", "2", "-pp", "9"], "pipeline_parallel_size 9 is above the model's 8 layers"),
        (["-tp", "2", "--device", "cuda"], "2 GPUs are needed for a replica of tiny with tensor_parallel_size 2"),
        (["-tp", "2", "--all-reduce", "nccl"], "is for GPUs"),
        (["-tp", "2", "--all-reduce", "ring"], "all_reduce"),
        (["--all-reduce", "triton", "--disable-custom-all-reduce"], "exclude each other"),
        (["--num-replicas", "0"], "num_replicas"),
        (["-tp", "2", "--group-start-timeout-s", "0"], "deployment_config.group_start_timeout_s"),
        (["--step-limit-s", "0"], "engine_kwargs.step_limit_s"),
        (["--quantization", "awq"], "awq"),
        (["--port", "70000"], "--port"),
        (["--host", "203.0.113.7"], "203.0.113.7"),
        (["--tokenizer", "/nowhere"], "/nowhere"),
    ],
    ids=str,
)
def test_wrong_options(arguments: list[str], message: str) -> None:
    result = shoal("serve", "tiny", *arguments, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("changed", "split", "message"),
    [
        (
            {"architectures": ["Olmo2ForCausalLM"]},
            ["-tp", "8"],
            "8 is above the model's 4 kv heads, and one norm spans them all",
        ),
        (
            {"intermediate_size": 90},
            ["-tp", "4"],
            "the 90 intermediate features of the model's MLP; this model takes 1, 2",
        ),
        ({"num_key_value_heads": 3}, ["-tp", "2"], "num_attention_heads 8 is no multiple of num_key_value_heads 3"),
        (
            {"num_hidden_layers": 2},
            ["-pp", "3"],
            "3 is above the model's 2 layers, and every stage needs one; lower it",
        ),
    ],
    ids=str,
)
def test_splits_that_a_model_does_not_take(
    changed: dict[str, object], split: list[str], message: str, tmp_path: Path
) -> None:
    from shoal.deploy.config import TINY_MODEL

    for path in TINY_MODEL.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changed}))
    result = shoal("serve", str(tmp_path), *split, CUDA_VISIBLE_DEVICES="")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert message in result.stderr


def test_settings_of_vllm_without_effect_are_said(tmp_path: Path) -> None:
    # What is wrong beside them ends the command before anything starts.
    flags = ["-tp", "2", "-pp", "2", "--distributed-executor-backend", "mp", "--tokenizer", "/nowhere"]
    assert shoal("serve", "tiny", *flags).returncode == 2
    with pytest.warns(UserWarning, match="distributed_executor_backend has no effect"):
        serve_config({"model": "tiny", "host": "127.0.0.1", "distributed_executor_backend": "mp"})


@pytest.mark.parametrize(
    ("flags", "option"),
    [
        (["--trust-remote-code"], "trust_remote_code"),
        (["--disable-log-requests"], "disable_log_requests"),
        (["--swap-space", "4"], "swap_space"),
        (["--tokenizer-mode", "auto"], "tokenizer_mode"),
        (["--kv-cache-dtype", "auto"], None),
        (["--data-parallel-size", "1"], None),
    ],
    ids=str,
)
def test_options_of_vllm_are_accepted(flags: list[str], option: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    caught: list[str] = []

    def stop(settings: dict[str, object], _: object) -> None:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            serve_config(settings)
        caught.extend(str(warning.message) for warning in found)

    monkeypatch.setattr("shoal.deploy.cli._serve", stop)
    monkeypatch.setattr("shoal.deploy.cli.under_supervisor", lambda: None)
    result = CliRunner().invoke(app, ["serve", "tiny", *flags])
    assert result.exit_code == 0, result.output
    expected = [f"engine_kwargs.{option} has no effect in Shoal: {WITHOUT_EFFECT[option].reason}"] if option else []
    assert caught == expected


def test_values_of_vllms_options_that_are_not_available() -> None:
    result = shoal("serve", "tiny", "--data-parallel-size", "2", CUDA_VISIBLE_DEVICES="")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "data_parallel_size = 2 is not available yet: num_replicas sets the copies" in result.stderr


def test_ranks_share_the_cores_of_the_machine() -> None:
    settings = {"model": "tiny", "host": "127.0.0.1", "tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    [model] = serve_config(settings)[1].models
    assert model.engine_kwargs.num_threads == automatic_threads(4)
    [model] = serve_config({**settings, "num_threads": 3})[1].models
    assert model.engine_kwargs.num_threads == 3


def test_wrong_model_folders(tmp_path: Path) -> None:
    missing = shoal("serve", str(tmp_path / "nowhere"))
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "nowhere" in missing.stderr
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    unknown = shoal("serve", str(tmp_path))
    assert (unknown.returncode, unknown.stderr.count("\n")) == (2, 1)
    assert "GPT2LMHeadModel" in unknown.stderr


def test_truncated_weights(tmp_path: Path) -> None:
    from shoal.deploy.config import TINY_MODEL

    for path in TINY_MODEL.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4096])
    result = shoal("serve", str(tmp_path))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "model.safetensors" in result.stderr
    assert "tensor model." in result.stderr


def test_a_tokenizer_that_cannot_be_loaded(tmp_path: Path) -> None:
    from shoal.deploy.config import TINY_MODEL

    for path in TINY_MODEL.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer.json").write_text("{")
    result = shoal("serve", str(tmp_path))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert f"{tmp_path / 'tokenizer.json'} is not a tokenizer" in result.stderr


def test_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        result = shoal("serve", "tiny", "--port", port)
    assert result.returncode == 2
    assert f"127.0.0.1:{port}" in result.stderr


def test_options_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("max-model-len: 5000\nenforce_eager: true\n")
    result = shoal("serve", "tiny", "--config", str(path))
    assert result.returncode == 2
    assert "5000" in result.stderr
    assert "4999" in shoal("serve", "tiny", "--config", str(path), "--max-model-len", "4999").stderr
    path.write_text("max-modle-len: 1\n")
    assert "did you mean 'max_model_len'?" in shoal("serve", "tiny", "--config", str(path)).stderr
    path.write_text("a: [")
    assert shoal("serve", "tiny", "--config", str(path)).returncode == 2
    assert shoal("serve", "tiny", "--config", str(tmp_path / "none.yaml")).returncode == 2
