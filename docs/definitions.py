"""What the library defines, read from its source without importing it: names, parameters with the comment beside each,
docstrings, methods."""

import ast
import io
import json
import re
import textwrap
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "llmfact_nb"

# The folders of nbs/ in reading order, and what the site calls them.
FOLDERS = {
    "": "The course",
    "tutorials": "Tutorials",
    "base": "Foundations",
    "across": "Across texts and models",
    "scores": "Further scores",
    "tuning": "Fine-tuning",
    "study": "Studies",
    "show": "Figures and pages",
    "command": "Behind the command",
}


@dataclass
class Parameter:
    "One parameter of a function, field of a dataclass, or what a function returns."

    name: str
    kind: str  # the type as written, "" if none
    default: str | None  # as written; None: must be given
    meaning: str  # the comment on its line


@dataclass
class Definition:
    "A public function, class, method or constant."

    name: str  # "NeuronMask", "NeuronMask.from_flat"
    module: str  # "masks"
    text: str  # its source
    kind: str  # "class", "function", "property", "constant"
    doc: str = ""
    parameters: list[Parameter] = field(default_factory=list)
    returns: Parameter | None = None
    members: list["Definition"] = field(default_factory=list)

    @property
    def summary(self) -> str:
        "The first sentence of the docstring, on one line."
        return first_sentence(self.doc)

    @property
    def call(self) -> str:
        "How it is called: names and defaults without types, one to a line if long."
        if self.kind in ("constant", "property"):
            return self.text if self.kind == "constant" else self.name
        parts = [p.name + ("" if p.default is None else f"={p.default}") for p in self.parameters]
        line = f"{self.name}({', '.join(parts)})"
        return line if len(line) <= 88 else f"{self.name}(\n" + "".join(f"    {p},\n" for p in parts) + ")"


def first_sentence(text: str) -> str:
    "The first sentence of `text`; a full stop inside a number or a name does not end it."
    return re.split(r"(?<=[.?!])\s+(?=[A-Z`(*])", " ".join(text.strip().split("\n\n")[0].split()), maxsplit=1)[0]


def _comments(text: str) -> dict[int, str]:
    "The comment on each line of `text` that has one, without its mark."
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {
        t.start[0]: re.sub(r"(\s*#)?\s*\bfmt: skip$", "", t.string.lstrip("# "))
        for t in tokens
        if t.type == tokenize.COMMENT
    }


def _written(node: ast.AST | None) -> str:
    "The code of `node` on one line, with double quotes as in the source; '' for None."
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return json.dumps(node.value, ensure_ascii=False)
    return "" if node is None else ast.unparse(node)


def _type(node: ast.AST | None) -> str:
    "A type as written; one in quotes loses them."
    return _written(node).strip("\"'")


def _parameters(node: ast.FunctionDef, comments: dict[int, str]) -> list[Parameter]:
    "Parameters of a function in order, without self and cls; starred ones with their stars."
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + list(a.defaults)
    rows = [(p.arg, p, d) for p, d in zip(plain, defaults)]
    rows += [(f"*{a.vararg.arg}", a.vararg, None)] if a.vararg else []
    rows += [(p.arg, p, d) for p, d in zip(a.kwonlyargs, a.kw_defaults)]
    rows += [(f"**{a.kwarg.arg}", a.kwarg, None)] if a.kwarg else []
    last_on = {
        p.end_lineno if d is None else d.end_lineno: name for name, p, d in rows
    }  # a comment belongs to the last parameter of its line
    where = {name: line for line, name in last_on.items()}
    return [
        Parameter(name, _type(p.annotation), None if d is None else _written(d), comments.get(where.get(name, 0), ""))
        for name, p, d in rows
        if name not in ("self", "cls")
    ]


def _default(value: ast.AST | None) -> str | None:
    "The default of a dataclass's field, as written; of `field(...)` what stands for it, or None if it has none."
    if isinstance(value, ast.Call) and ast.unparse(value.func) in ("field", "dataclasses.field"):
        given = {k.arg: k.value for k in value.keywords}
        return (
            _written(given["default"])
            if "default" in given
            else f"{_written(given['default_factory'])}()"
            if "default_factory" in given
            else None
        )
    return None if value is None else _written(value)


def _is_given(node: ast.AnnAssign) -> bool:
    "Whether a dataclass's field is a parameter: not private, and not field(init=False)."
    inner = node.value.keywords if isinstance(node.value, ast.Call) else []
    return not node.target.id.startswith("_") and not any(k.arg == "init" and not k.value.value for k in inner)


def _decorators(node: ast.AST) -> set[str]:
    return {name for d in node.decorator_list for name in re.findall(r"[\w.]+", ast.unparse(d))[:1]}


def _names_of_bases(node: ast.ClassDef, known: Sequence[ast.ClassDef]) -> set[str]:
    "Names of the classes among `known` that `node` is made of."
    direct = [c for c in known if c.name in {ast.unparse(b) for b in node.bases}]
    return {c.name for c in direct}.union(*(_names_of_bases(c, known) for c in direct))


def _class_parameters(node: ast.ClassDef, comments: dict[int, str]) -> list[Parameter]:
    "What a class is made with: the parameters of __init__, or the fields of a dataclass."
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init:
        return _parameters(init, comments)
    if not _decorators(node) & {"dataclass", "dataclasses.dataclass"}:
        return []
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and _is_given(n)]
    return [
        Parameter(n.target.id, _type(n.annotation), _default(n.value), comments.get(n.end_lineno, "")) for n in fields
    ]


def _define(
    node: ast.AST,
    module: str,
    lines: list[str],
    comments: dict[int, str],
    owner: str = "",
    bases: Sequence[ast.ClassDef] = (),  # the module's classes; a class has the members of those it is made of
) -> Definition:
    "Read one function, class or assignment."
    start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    text = textwrap.dedent("\n".join(lines[start - 1 : node.end_lineno]))
    if isinstance(node, ast.Assign | ast.AnnAssign):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        shown = text if len(text.splitlines()) <= 12 else "\n".join(text.splitlines()[:10]) + "\n..."
        return Definition(target.id, module, shown, "constant", comments.get(node.lineno, ""))
    name, doc = owner + node.name, ast.get_docstring(node) or ""
    if isinstance(node, ast.ClassDef):
        found = Definition(name, module, text, "class", doc)
        found.parameters, members = [], {}
        for part in [*(c for c in bases if c.name in _names_of_bases(node, bases)), node]:
            found.parameters = _class_parameters(part, comments) or found.parameters
            functions = [n for n in part.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
            shown = [f for f in functions if f"{f.name}.setter" not in _decorators(f)]
            members |= {f.name: _define(f, module, lines, comments, f"{name}.") for f in shown}
        found.members = list(members.values())
        return found
    kind = (
        "property" if _decorators(node) & {"property", "functools.cached_property", "cached_property"} else "function"
    )
    found = Definition(name, module, text, kind, doc, _parameters(node, comments))
    line = max(
        [
            node.lineno,
            *(p.end_lineno for p in [*node.args.args, *node.args.kwonlyargs]),
            *([node.returns.end_lineno] if node.returns else []),
        ]
    )
    if node.returns is not None:
        beside = (
            comments.get(line, "")
            if line != node.lineno and not any(p.meaning == comments.get(line) for p in found.parameters)
            else ""
        )
        found.returns = Parameter("returns", _type(node.returns), None, beside)
    return found


@dataclass
class Module:
    """One module of the library: its one-line summary, the notebook it comes from, and its public definitions in order
    of appearance."""

    name: str  # "study.verdicts"
    summary: str
    notebook: str  # "study/06_verdicts"
    definitions: dict[str, Definition]

    @property
    def page(self) -> str:
        "The page of its notebook, without the number: study/verdicts."
        folder, _, stem = self.notebook.rpartition("/")
        return f"{folder}/{re.sub(r'^[0-9]+_', '', stem)}".strip("/")


def read_module(path: Path, name: str = "") -> Module:
    "Read one generated module."
    text, name = path.read_text(encoding="utf-8"), name or path.stem
    tree, comments, lines = ast.parse(text), _comments(text), text.splitlines()
    public, found = [], {}
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            public = ast.literal_eval(node.value)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            defined = node.name if target is None else getattr(target, "id", "")
            if defined in public:
                found[defined] = _define(node, name, lines, comments, bases=classes)
    notebook = re.search(r"File to edit: (?:\.\./)+nbs/(\S+)\.ipynb", text)
    return Module(name, ast.get_docstring(tree) or "", notebook[1] if notebook else "", found)


def reading_order(notebook: str) -> tuple[int, str]:
    "Sorts notebooks, named as study/06_verdicts, as they are read: the course, then folder after folder."
    return list(FOLDERS).index(notebook.rpartition("/")[0]), notebook


def read_library(folder: Path = LIBRARY) -> dict[str, Module]:
    "Every module that comes from a notebook, in the order in which the notebooks are read."
    paths = [p for p in folder.rglob("*.py") if not p.stem.startswith("_")]
    modules = [read_module(p, ".".join(p.relative_to(folder).with_suffix("").parts)) for p in paths]
    return {m.name: m for m in sorted((m for m in modules if m.notebook), key=lambda m: reading_order(m.notebook))}


def exposed_names(init: Path = LIBRARY / "__init__.py") -> dict[str, str]:
    "Name -> module for every name that `from llmfact_nb import` knows."
    for node in ast.parse(init.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "_NAMES":
            return {name: module for module, names in ast.literal_eval(node.value).items() for name in names.split()}
    raise ValueError(f"{init} has no table _NAMES of the names it exposes.")
