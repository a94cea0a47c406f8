"""The choice of device and of CPU threads."""

from __future__ import annotations

import os

import pytest
import torch

from shoal.replicas.device import choose_device, set_cpu_threads, usable_cores
from shoal.replicas.errors import ConfigError


@pytest.mark.parametrize(("there", "auto"), [(True, "cuda"), (False, "cpu")])
def test_auto_takes_cuda_where_there_is_one(there, auto, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert choose_device("auto") == auto
    assert choose_device("cpu") == "cpu"


def test_a_cuda_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device"):
        choose_device("cuda")
    with pytest.raises(ConfigError, match="'tpu' is not supported"):
        choose_device("tpu")


def test_threads_are_set_whatever_the_environment_says():
    before = torch.get_num_threads()
    try:
        assert set_cpu_threads(2) == torch.get_num_threads() == 2
        assert set_cpu_threads(None) == torch.get_num_threads() == max(1, usable_cores() - 1)
        assert set_cpu_threads(None, 2) == torch.get_num_threads() == max(1, (usable_cores() - 1) // 2)
        assert set_cpu_threads(3, 2) == 3, "what a user says is of each rank"
        with pytest.raises(ConfigError, match="num_threads is 0"):
            set_cpu_threads(0)
    finally:
        torch.set_num_threads(before)


def test_usable_cores_are_those_of_the_affinity_mask():
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
