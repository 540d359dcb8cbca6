"""What all tests share: tiny models and tokenizers built offline, and a guard that a test leaves the process as it found it."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the tests may reach for a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # threads that spin while they wait make tiny models ten times slower on a busy machine

import families
import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; left out by `make test`, run by `make slow`")


@pytest.fixture
def tiny_model():
    "Function (family, head=None, **configuration) -> a fresh random model of three layers; see families.py."
    return families.build


@pytest.fixture
def tiny_tokenizer():
    "Function (pad=True, side='right', special=False) -> a word-level tokenizer."
    return families.tokenizer


@pytest.fixture(autouse=True)
def process_unchanged():
    "Global settings of torch are as before: a library that changes them changes its user's other results."
    from torch.nn.modules import module

    def settings():
        hooks = (module._global_forward_hooks, module._global_forward_pre_hooks, module._global_backward_hooks)
        return (
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            *map(len, hooks),
        )

    before = settings()
    yield
    assert settings() == before
