"""What all tests share: tiny models and tokenizers built offline, a guard that a test leaves the process as it found
it, and one that no test is skipped unnoticed."""

import os
import re
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the tests may reach for a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # threads that spin while they wait make tiny models ten times slower on a busy machine

import families
import pytest
import torch

# Reason of a skip, as a pattern -> why that may be. With `--skips expected`, which CI gives, any other fails the run.
EXPECTED_SKIPS = {
    "no GPU here": "the machines that run the tests have none",
    "a superuser writes everywhere": "containers run the tests as root",
    "/proc|/dev/full": "other systems than Linux have neither",
    "encoders count positions from the left edge": "left padding means nothing to them",
    "attention and MLP share their names here": "PEFT cannot be pointed at one of them alone",
}


def pytest_addoption(parser):
    parser.addoption("--skips", choices=["any", "expected"], default="any", help="expected: fail after any other skip")
    parser.addoption("--may-skip", action="append", default=[], help="pattern of a further reason that is expected")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; `make test` leaves it out, `make slow` runs it")
    config.addinivalue_line("markers", "gpu: needs a GPU, and is skipped without one; `make test-gpu` runs it")
    needs = "lm-eval, nilearn, dask, torchao or bitsandbytes"
    takes = "starts processes and kills some, or does the same again and again"
    config.addinivalue_line("markers", f"extra: needs {needs}, or {takes}; `make test-extras` runs it")


def pytest_terminal_summary(terminalreporter, config):
    "Name every unexpected skip, so that what is never run does not look as if it were fine."
    unexpected = unexpected_skips(terminalreporter, config)
    if unexpected:
        terminalreporter.section("unexpected skips (tests/conftest.py lists the expected ones)")
        terminalreporter.write_line("\n".join(unexpected))


def unexpected_skips(reporter, config) -> list[str]:
    expected = [*EXPECTED_SKIPS, *config.getoption("--may-skip")]
    reports = reporter.stats.get("skipped", []) if config.getoption("--skips") == "expected" else []
    said = [(r.nodeid, r.longrepr[2] if isinstance(r.longrepr, tuple) else str(r.longrepr)) for r in reports]
    return [f"{test}: {why}" for test, why in said if not any(re.search(p, why) for p in expected)]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and not hasattr(session.config, "workerinput") and unexpected_skips(reporter, session.config):
        session.exitstatus = session.exitstatus or 1


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


@pytest.fixture(scope="session")
def paper_study():
    "The tables of the study that lies beside the tutorial on the paper's figures, as `read_study` gives them."
    from llmfact_nb.study.whole import read_study

    return read_study(Path(__file__).parent.parent / "nbs" / "tutorials" / "paper")
