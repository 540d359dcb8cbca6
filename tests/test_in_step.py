"""Pins that what is generated is what the notebooks say: the library, clean notebooks, the README, the version; and that the library needs no nbdev."""

import configparser
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
NOTEBOOKS = sorted(p.relative_to(ROOT) for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory):
    """A copy of the project in which notebooks were cleaned and the library exported afresh."""
    copy = tmp_path_factory.mktemp("project")
    for name in ("nbs", "llmfact_nb"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    shutil.copy(ROOT / "settings.ini", copy)
    for command in (["nbdev_clean", "--fname", "nbs"], ["nbdev_export"]):
        subprocess.run([BIN / command[0], *command[1:]], cwd=copy, check=True, capture_output=True, text=True)
    return copy


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=str)
def test_notebooks_are_clean(regenerated, notebook):
    assert json.loads((regenerated / notebook).read_text()) == json.loads((ROOT / notebook).read_text()), (
        f"run nbdev_clean on {notebook}"
    )


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=str)
def test_notebooks_stay_small(notebook):
    assert (ROOT / notebook).stat().st_size < 700_000, "draw fewer pixels, or quantise the pictures"


def test_library_is_exported(regenerated):
    ours = {p.name: p.read_text() for p in (ROOT / "llmfact_nb").glob("*.py")}
    fresh = {p.name: p.read_text() for p in (regenerated / "llmfact_nb").glob("*.py")}
    assert ours == fresh, "run nbdev_export"


def test_every_module_has_its_notebook():
    for module in (ROOT / "llmfact_nb").glob("*.py"):
        source = re.search(r"File to edit: \.\./(nbs/\S+\.ipynb)", module.read_text())
        assert source is None or (ROOT / source[1]).exists(), (
            f"{module.name} was generated from {source[1]}, which is gone"
        )


def test_notebooks_import_only_lower_numbers():
    order = {p.stem.split("_", 1)[1]: p.stem for p in (ROOT / "nbs").glob("[0-9]*.ipynb")}
    for notebook in (ROOT / "nbs").glob("[0-9]*.ipynb"):
        for cell in json.loads(notebook.read_text())["cells"]:
            source = "".join(cell["source"])
            if "#| export" in source:
                for room in re.findall(r"from llmfact_nb\.(\w+) import", source):
                    assert order[room] < notebook.stem, f"{notebook.name} imports {room}, which comes later"


def test_readme_is_the_home_page():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "docs" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "README.md").read_text() == module.readme(), "run make readme"


def test_version_is_that_of_the_settings():
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    assert f'__version__ = "{settings["DEFAULT"]["version"]}"' in (ROOT / "llmfact_nb" / "__init__.py").read_text()


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_import_is_light():
    assert (
        python(
            "import sys, llmfact_nb; print([m for m in ('torch', 'numpy', 'transformers', 'pandas', 'matplotlib') if m in sys.modules])"
        )
        == "[]"
    )


def test_help_needs_no_torch():
    code = "import sys\nfrom llmfact_nb.cli import app\nfrom typer.testing import CliRunner\nassert CliRunner().invoke(app, ['--help']).exit_code == 0\nprint('torch' in sys.modules)"
    assert python(code) == "False"


def test_every_public_name_is_there():
    code = "import llmfact_nb as m\nprint(all(getattr(m, n) is not None for n in m.__all__) and set(m.__all__) <= set(dir(m)))"
    assert python(code) == "True"
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(__import__("llmfact_nb"), "no_such_name")  # noqa: B009


def test_the_library_imports_no_nbdev():
    for module in (ROOT / "llmfact_nb").glob("*.py"):
        assert not re.search(r"^\s*(from|import)\s+(nbdev|fastcore|execnb)", module.read_text(), re.M), module.name
