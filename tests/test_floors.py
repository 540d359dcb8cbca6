"""Pins who may import whom: wings only look down, within a folder only at lower numbers, and nobody at another's
private names."""

import ast
import functools
import re
from pathlib import Path

import pytest

LIBRARY = Path(__file__).resolve().parent.parent / "llmfact_nb"

# From below. A part is a module of the course or a folder.
FLOORS = [
    {"base"},
    {"sites", "ica", "masks"},
    {"activations"},
    {"networks", "masked_model", "connectivity", "evaluate", "finetune"},
    {"ablation", "across", "scores", "tuning"},
    {"study"},
    {"show"},
    {"command", "paper"},
    {"cli"},
]
FLOOR_OF = {part: height for height, parts in enumerate(FLOORS) for part in parts}


def modules(library: Path) -> dict[str, Path]:
    "Dotted name -> file of every generated module."
    found = {".".join(p.relative_to(library).with_suffix("").parts): p for p in library.rglob("*.py")}
    return {name: p for name, p in found.items() if not name.split(".")[-1].startswith("_")}


def imported(name: str, tree: ast.AST, known: set[str]):
    "Pairs (module, names taken from it) of every import in `tree`, also those inside functions; `name` imports them."
    package = name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("llmfact_nb."):
                    yield alias.name.removeprefix("llmfact_nb."), []
        elif isinstance(node, ast.ImportFrom):
            inside = node.level or (node.module or "").split(".")[0] == "llmfact_nb"
            if not inside:
                continue
            base = package[: len(package) - node.level + 1] if node.level else []
            rest = node.module.split(".") if node.module else []
            target = ".".join([*base, *(rest if node.level else rest[1:])])
            names = [a.name for a in node.names]
            taken = {n for n in names if ".".join(filter(None, [target, n])) in known}  # `from . import masks`
            for module in taken:
                yield ".".join(filter(None, [target, module])), []
            if target and set(names) - taken:
                yield target, [n for n in names if n not in taken]


def number(library: Path, name: str, path: Path) -> str:
    "The number of a module's notebook."
    notebook = re.search(r"File to edit: \S*?(\d+)_\w+\.ipynb", path.read_text(encoding="utf-8"))
    return notebook[1] if notebook else ""


def faults(library: Path = LIBRARY) -> set[str]:
    "Every import that looks up or sideways, and every use of another module's private name."
    paths = modules(library)
    numbers = {name: number(library, name, path) for name, path in paths.items()}
    found = set()
    for name, path in paths.items():
        tree, part = ast.parse(path.read_text(encoding="utf-8")), name.split(".")[0]
        aliases = set()
        for target, names in imported(name, tree, set(paths)):
            other = target.split(".")[0]
            if not names:
                aliases.add(target.split(".")[-1])
            found |= {f"{name} takes {target}.{n}" for n in names if n.startswith("_") and n != "__version__"}
            if other == part and "." in name:  # the same wing
                wrong = numbers.get(target, "") >= numbers[name]
            elif FLOOR_OF[other] == FLOOR_OF[part]:  # the same floor: the course by its numbers, a wing not at all
                wrong = "." in name or "." in target or numbers.get(target, "") >= numbers[name]
            else:
                wrong = FLOOR_OF[other] > FLOOR_OF[part]
            if wrong:
                found.add(f"{name} imports {target}")
        found |= {f"{name} reads {use}" for use in private_uses(tree, aliases)}
    return found


def private_uses(tree: ast.AST, aliases: set[str]) -> set[str]:
    "Private attributes that this module reads and defines nowhere itself, and those of modules it has imported."
    own = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    own |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    own |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.keyword | ast.arg) and n.arg}
    own |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    written = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not re.match(r"_[a-z]", node.attr):
            continue
        of = ast.unparse(node.value)
        if of in aliases or node.attr in defined_here() - own - written:
            found.add(f"{of}.{node.attr}")
    return found


@functools.cache
def defined_here() -> set[str]:
    "Private names that some module of the library defines; others belong to libraries whose ways we must follow."
    found = set()
    for path in modules(LIBRARY).values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return found


def test_every_part_has_a_floor():
    assert {name.split(".")[0] for name in modules(LIBRARY)} == set(FLOOR_OF)


def test_modules_import_only_from_below():
    assert faults() == set()


@pytest.mark.parametrize(
    "module, code",
    [
        ("masks", "from .networks import FunctionalNetworks"),
        ("masks", "def f():\n    from .study.verdicts import verdict_table"),
        ("base.files", "from ..masks import NeuronMask"),
        ("across.group", "from ..scores.head import fit_classifier"),
        ("sites", "from llmfact_nb.masks import NeuronMask"),
        ("networks", "from .masks import _bins"),
        ("networks", "from . import masks\nmasks._bins"),
        ("networks", "import llmfact_nb.study.verdicts"),
    ],
)
def test_a_planted_fault_is_seen(tmp_path, module, code):
    (tmp_path / "base").mkdir()
    names = {"sites": "01_sites", "masks": "04_masks", "networks": "05_networks", "base.files": "base/01_files"}
    names |= {"study.verdicts": "study/06_verdicts", "scores.head": "scores/03_head", "across.group": "across/01_group"}
    for name, notebook in names.items():
        path = tmp_path / (name.replace(".", "/") + ".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# AUTOGENERATED! DO NOT EDIT! File to edit: ../nbs/{notebook}.ipynb.\n")
    assert faults(tmp_path) == set()
    path = tmp_path / (module.replace(".", "/") + ".py")
    path.write_text(path.read_text() + code + "\n")
    assert len(faults(tmp_path)) == 1
