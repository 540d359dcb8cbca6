"""Pins that what is generated is what the notebooks say: the library, clean notebooks, the README, the version; and
that the library needs no nbdev."""

import collections
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


def modules(folder: Path) -> dict[str, Path]:
    "Path inside the package -> file, of every module."
    return {p.relative_to(folder).as_posix(): p for p in (folder / "llmfact_nb").rglob("*.py")}


def test_library_is_exported(regenerated):
    ours, fresh = modules(ROOT), modules(regenerated)
    assert ours.keys() == fresh.keys()
    assert [name for name in ours if ours[name].read_text() != fresh[name].read_text()] == [], "run nbdev_export"


def exports(notebook: Path) -> str | None:
    "The module that a notebook exports to, such as study.verdicts."
    for cell in json.loads((ROOT / notebook).read_text(encoding="utf-8"))["cells"]:
        if found := re.match(r"#\|\s*default_exp\s+(\S+)", "".join(cell["source"])):
            return found[1]
    return None


def test_every_module_has_its_notebook_and_every_notebook_its_module():
    made = {f"llmfact_nb/{name.replace('.', '/')}.py" for n in NOTEBOOKS if (name := exports(n))}
    kept_by_hand = {"llmfact_nb/__init__.py", "llmfact_nb/__main__.py", "llmfact_nb/_modidx.py"}
    wings = {p for p in modules(ROOT) if p.endswith("/__init__.py") and not modules(ROOT)[p].read_text().strip()}
    assert set(modules(ROOT)) - kept_by_hand - wings == made


def test_a_notebook_stands_where_its_module_does():
    for notebook in NOTEBOOKS:
        if name := exports(notebook):
            assert notebook.parent == Path("nbs", *name.split(".")[:-1]), notebook


def test_no_number_stands_twice_in_a_folder():
    numbered = [n for n in NOTEBOOKS if n.name[0].isdigit()]
    seen = collections.Counter((n.parent, n.name.split("_")[0]) for n in numbered)
    assert [key for key, count in seen.items() if count > 1] == []
    assert len([n for n in numbered if n.parent == Path("nbs")]) == 12


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
            "import sys, llmfact_nb\n"
            "heavy = ('torch', 'numpy', 'transformers', 'pandas', 'matplotlib')\n"
            "print([m for m in heavy if m in sys.modules])"
        )
        == "[]"
    )


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom llmfact_nb.cli import app\nfrom typer.testing import CliRunner\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\nprint('torch' in sys.modules)"
    )
    assert python(code) == "False"


def test_every_public_name_is_there():
    there = "all(getattr(m, n) is not None for n in m.__all__)"
    code = f"import llmfact_nb as m\nprint({there} and set(m.__all__) <= set(dir(m)))"
    assert python(code) == "True"
    with pytest.raises(AttributeError):
        getattr(__import__("llmfact_nb"), "no_such_name")  # noqa: B009


def test_the_library_imports_no_nbdev():
    for name, path in modules(ROOT).items():
        assert not re.search(r"^\s*(from|import)\s+(nbdev|fastcore|execnb)", path.read_text(), re.M), name
