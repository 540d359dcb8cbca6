"""Pins that the built wheel works by itself: outside the repository, without nbdev, with settings.ini's metadata; and
that the public names stay few."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import llmfact_nb

ROOT = Path(__file__).resolve().parent.parent
USE = """
import sys, torch, llmfact_nb
from transformers import LlamaConfig, LlamaForCausalLM
assert llmfact_nb.__file__.startswith(sys.argv[1]), llmfact_nb.__file__
small = dict(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(**small))
mask = llmfact_nb.NeuronMask.from_flat(torch.arange(64) % 2 == 0, (32, 32), site="mlp_hidden")
ids = torch.arange(10)[None]
plain = model(ids).logits
with llmfact_nb.MaskedModel(model).ablate(mask):
    assert not torch.equal(model(ids).logits, plain)
assert torch.equal(model(ids).logits, plain)
assert not {"nbdev", "fastcore", "execnb"} & set(sys.modules)
print("works", llmfact_nb.__version__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\n")
    for name in filter(None, files):  # a copy without build leftovers
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "build", "-o", out, source], check=True, capture_output=True, text=True)
    assert len(list(out.glob("*.tar.gz"))) == 1, (
        "the wheel is built from the source distribution, so that one is whole too"
    )
    return next(out.glob("*.whl"))


def outside(folder: Path, *command, **environment) -> str:
    """Run a command in `folder` and return what it prints."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    return subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True, text=True).stdout


@pytest.mark.extra
def test_wheel_works_outside_the_repository(wheel, tmp_path):
    target = tmp_path / "site"
    outside(tmp_path, sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel))
    assert outside(tmp_path, sys.executable, "-c", USE, str(target), PYTHONPATH=str(target)).startswith("works")
    assert "run" in outside(tmp_path, sys.executable, str(target / "bin" / "llmfact"), "--help", PYTHONPATH=str(target))


@pytest.mark.extra
def test_wheel_holds_the_package_and_its_metadata(wheel):
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        metadata = z.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert {n.split("/")[0] for n in names if n.endswith(".py")} == {"llmfact_nb"}
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "llmfact_nb"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert {n for n in listed.stdout.split("\n") if n and (ROOT / n).exists()} == {
        n for n in names if n.startswith("llmfact_nb/")
    }
    assert any(n.endswith("LICENSE") for n in names)
    assert (
        "License: Apache-2.0" in metadata or "License-Expression: Apache-2.0" in metadata
    )  # setuptools changed its spelling
    for line in ("Requires-Python: >=3.11", "Requires-Dist: torch>=2.6", "Description-Content-Type: text/markdown"):
        assert line in metadata
    for version in ("3.11", "3.12", "3.13"):
        assert f"Classifier: Programming Language :: Python :: {version}" in metadata
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert not any(tool in line for tool in ("nbdev", "fastcore", "pytest") for line in required)


@pytest.mark.slow
def test_wheel_in_a_fresh_environment(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel], check=True, capture_output=True
    )
    assert outside(tmp_path, str(python), "-c", USE, str(tmp_path)).startswith("works")
    assert "run" in outside(tmp_path, str(python.with_name("llmfact")), "--help")


def test_few_names_are_public():
    public = []
    for path in (ROOT / "llmfact_nb").glob("**/[!_]*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                public += ast.literal_eval(node.value)
    assert 60 < len(public) <= 120 and 40 < len(llmfact_nb.__all__) <= 62
