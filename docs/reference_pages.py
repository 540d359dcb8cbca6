"""The API reference: what each public name takes and gives, where it is explained, and the first place in the
notebooks that uses it."""

import ast
import re
from dataclasses import dataclass

from definitions import Definition, Module, Parameter
from notebook_pages import Notebook, code_of, exported, fence, joined, slug

EXAMPLE_LINES, OUTPUT_LINES = 24, 14


@dataclass
class Example:
    "Code from a notebook that uses a name."

    code: str
    output: str  # what it printed, if it is short
    page: str
    heading: str  # the section it stands in


def calls_in(code: str) -> set[str]:
    "Names that `code` uses, bare or after a dot."
    tree = ast.walk(ast.parse(code))
    return {n.id if isinstance(n, ast.Name) else n.attr for n in tree if isinstance(n, ast.Name | ast.Attribute)}


def imported_names(code: str) -> set[str]:
    "Names that `code` imports from the library."
    imports = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.ImportFrom)]
    return {a.name for n in imports if (n.module or "").startswith("llmfact_nb") for a in n.names}


def _shortened(code: str, name: str) -> str:
    "The statements of `code` that use `name`, up to the limit of lines."
    lines, kept = code.splitlines(), []
    for node in ast.parse(code).body:
        if name in calls_in(ast.unparse(node)):
            kept += lines[node.lineno - 1 : node.end_lineno]
        if len(kept) >= EXAMPLE_LINES // 2:
            break
    return "\n".join(kept[:EXAMPLE_LINES]) + ("\n..." if len(kept) > EXAMPLE_LINES else "")


def _example(cell, name: str, page: str, heading: str) -> Example:
    "What the cell does with `name`, and what it printed and returned if both are short."
    code, text = code_of(cell), ""
    if len(code.splitlines()) > EXAMPLE_LINES:
        return Example(_shortened(code, name), "", page, heading)
    for output in cell.get("outputs", []):
        if output["output_type"] == "stream" and output["name"] == "stdout":
            text += joined(output["text"])
        elif output["output_type"] == "execute_result" and "text/html" not in output["data"]:
            text += joined(output["data"]["text/plain"])
    return Example(code, text.strip("\n") if len(text.splitlines()) <= OUTPUT_LINES else "", page, heading)


def examples(notebooks: list[Notebook], library: dict[str, Module]) -> dict[tuple[str, str], Example]:
    """For each (module, name) its first use outside exported code: in its own chapter, else in a notebook that imports
    it.

    A class that no notebook names has that of the first function that returns it."""
    modules_of: dict[str, list[str]] = {}
    for module in library.values():
        for name in module.definitions:
            modules_of.setdefault(name, []).append(module.name)
    found: dict[tuple[str, str], Example] = {}
    for notebook in notebooks:
        own = library[notebook.module].definitions if notebook.module in library else {}
        code_cells = [(cell, heading) for cell, heading in notebook.headings() if cell.cell_type == "code"]
        imported = {name for cell, _ in code_cells for name in imported_names(cell.source)}
        for cell, heading in code_cells:
            if exported(cell) or not code_of(cell):
                continue
            for name in calls_in(code_of(cell)) & modules_of.keys():
                for module in modules_of[name]:
                    here, before = module == notebook.module, found.get((module, name))
                    if (
                        here
                        and (before is None or before.page != notebook.page)
                        or before is None
                        and name in imported
                        and name not in own
                    ):
                        found[module, name] = _example(cell, name, notebook.page, heading)
    everything = [d for module in library.values() for d in module.definitions.values()]
    for kind in [d for d in everything if d.kind == "class"]:
        makers = [
            d
            for d in everything
            if d.kind == "function" and d.returns and re.search(rf"\b{kind.name}\b", d.returns.kind)
        ]
        if first := next((found[d.module, d.name] for d in makers if (d.module, d.name) in found), None):
            found.setdefault((kind.module, kind.name), first)
    return found


def prose(doc: str, link) -> str:
    """A docstring as Markdown: what looks like markup or a formula to the renderer, but is meant as it stands, is
    escaped outside code."""
    parts = re.split(r"(`[^`]+`)", doc)
    return link("".join(p if i % 2 else re.sub(r"([<$])", r"\\\1", p) for i, p in enumerate(parts)))


def _row(p: Parameter, link) -> str:
    first = f"`{p.name}`" + (f" `{p.kind}`" if p.kind else "") + (f" = `{p.default}`" if p.default is not None else "")
    return f"{first}\n: {prose(p.meaning, link) or '&nbsp;'}"


def entry(d: Definition, level: int, link, title: str | None = None, members: str = "") -> str:
    "The documentation of one definition, its heading at `level`; `members` says something of a class's methods."
    blocks = [f"{'#' * min(level, 6)} {title or f'`{d.name}`'}"]
    blocks.append(fence(d.call, "python", "signature"))
    if d.doc:
        blocks.append(prose(d.doc, link))
    if d.parameters:
        blocks.append("\n\n".join(_row(p, link) for p in d.parameters))
    if d.returns and (d.returns.kind != "None" or d.returns.meaning):
        blocks.append(
            f"**{'Is' if d.kind == 'property' else 'Returns'}** `{d.returns.kind}`"
            + (f": {prose(d.returns.meaning, link)}" if d.returns.meaning else "")
        )
    return "\n\n".join([*blocks, members] if members else blocks)


def example_block(example: Example | None, up: str) -> str:
    if example is None:
        return ""
    anchor = f"#{slug(example.heading)}" if example.heading else ""
    section = ", " + example.heading.replace("`", "") if example.heading else ""
    place = f"[{example.page}{section}]({up}{example.page}.md{anchor})"
    blocks = [f"**Example**, from {place}", fence(example.code, "python")]
    return "\n\n".join(blocks + ([fence(example.output, "text", "output")] if example.output else []))
