"""Static checks: ruff's lint and format, mypy on the package, and that the installed packages fit each other. Their
settings lie in static/."""

import functools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ROOT / "tests" / "static"


def module(name: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", name, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_lint():
    module(
        "ruff",
        "check",
        "--no-cache",
        "--config",
        str(SETTINGS / "ruff.toml"),
        "llmfact_nb",
        "tests",
        "docs",
        "benchmarks",
    )


def test_format():
    "The notebooks', since nbdev lays out the modules."
    module(
        "ruff",
        "format",
        "--check",
        "--no-cache",
        "--config",
        str(SETTINGS / "ruff.toml"),
        "nbs",
        "tests",
        "docs",
        "benchmarks",
    )


@pytest.fixture(scope="module")
def types(tmp_path_factory):
    "mypy, with one cache of what it knows of the libraries."
    cache = str(tmp_path_factory.mktemp("cache"))
    return functools.partial(module, "mypy", "--config-file", str(SETTINGS / "mypy.ini"), "--cache-dir", cache)


def test_types(types):
    types("llmfact_nb")


def test_a_wrong_type_is_seen(types, tmp_path):
    "mypy reads our signatures, though it takes torch as it comes."
    shutil.copytree(ROOT / "llmfact_nb", tmp_path / "llmfact_nb", ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "llmfact_nb" / "sites.py", "a") as f:
        f.write("\nfrom .base.files import digest\nlength: int = digest()\n")
    with pytest.raises(AssertionError) as seen:
        types(str(tmp_path / "llmfact_nb" / "sites.py"))
    assert "sites.py" in str(seen.value)


def test_installed_packages_fit_each_other():
    module("pip", "check")
