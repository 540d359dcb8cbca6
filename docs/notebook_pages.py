"""From notebook to page: nbdev handles directives and links to names; what is left becomes plain MyST Markdown with
pictures beside it.

Nothing is executed. The outputs are those that were committed with the notebook."""

import ast
import base64
import html
import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from definitions import Definition, Module, first_sentence
from nbdev import processors
from nbdev.process import NBProcessor

EXECUTES_OR_DROPS = {
    "FrontmatterProc",
    "add_fold",
    "add_show_docs",
    "clean_show_doc",
    "exec_show_docs",
    "insert_warning",
    "mv_exports",
    "rm_export",
    "strip_hidden_metadata",
}
OPEN_LINES = 30  # exported code that documents no public name is shown unfolded up to this length


def slug(heading: str) -> str:
    "The anchor of a heading, as nbdev and pandoc form it: `NeuronMask.from_flat` keeps its dot."
    return re.sub(r"[^\w\s.-]", "", heading).strip().lower().replace(" ", "-")


def fence(text: str, language: str, style: str = "") -> str:
    "A block of code, fenced by more backticks than it has inside."
    marks = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{marks}{{code-block}} {language}\n:class: {style or 'input'}\n\n{text}\n{marks}"


def folded(summary: str, body: str) -> str:
    "A block that opens on a click, without a script."
    opening = f'<details class="fold"><summary>{html.escape(summary)}</summary>'
    return f"```{{raw}} html\n{opening}\n```\n\n{body}\n\n```{{raw}} html\n</details>\n```"


def joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


class Notebook:
    "A notebook after nbdev's processing, with its place on the site."

    def __init__(self, path: Path, folder: Path):
        self.path, relative = path, path.relative_to(folder)
        self.folder, self.source = relative.parent.as_posix().strip("."), f"nbs/{relative.as_posix()}"
        number, stem = re.match(r"(?:(\d+)_)?(.+)", path.stem).groups()  # the number goes, as in nbdev
        self.page = f"{self.folder}/{stem}".strip("/")  # "masks", "tutorials/quickstart"
        wanted = [p for p in processors.FilterDefaults().base_procs() if p.__name__ not in EXECUTES_OR_DROPS]
        processor = NBProcessor(path, wanted)
        processor.process()
        cells = processor.nb.cells
        named = [c.directives_["default_exp"][0] for c in cells if "default_exp" in c.directives_]
        self.module = named[0] if named else self.page.replace("/", ".")
        self.cells = [c for c in cells if "default_exp" not in c.directives_]
        first = self.cells[0].source
        title, summary = re.match(r"#\s+(.+)", first), re.search(r"^>\s+(.+)$", first, re.M)
        if title is None:
            raise ValueError(f"{self.source} must begin with a heading '# title'.")
        self.title, self.summary = title[1].strip(), summary[1].strip() if summary else ""
        self.cells[0].source = re.sub(r"^>\s+.+\n?", "", first[title.end() :], count=1, flags=re.M).strip()
        words = re.sub(r"\bica\b", "ICA", self.title.replace("_", " "))
        self.label = (f"{int(number)} · " if number and not self.folder else "") + words[:1].upper() + words[1:]

    @property
    def minutes(self) -> int:
        "How long it takes to read: 200 words of prose a minute, 20 lines of shown code a minute."
        words = sum(len(c.source.split()) for c in self.cells if c.cell_type == "markdown")
        shown = [c for c in self.cells if c.cell_type == "code" and option(c, "include") != "false"]
        return max(1, round(words / 200 + sum(len(code_of(c).splitlines()) for c in shown) / 20))

    def headings(self):
        "Pairs (cell, the text of the last heading above it)."
        last = ""
        for cell in self.cells:
            if cell.cell_type == "markdown":
                outside = re.sub(r"^```.*?^```", "", cell.source, flags=re.M | re.S)
                last = ([last] + re.findall(r"^#{1,6}\s+(.+?)\s*$", outside, re.M))[-1]
            yield cell, last


def exported(cell) -> bool:
    return cell.cell_type == "code" and bool({"export", "exports", "exporti"} & cell.directives_.keys())


def code_of(cell) -> str:
    "The cell's code without directives."
    return "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|")).strip()


def option(cell, name: str) -> str:
    "The value of a directive such as `#| fig-cap: words`, or ''."
    found = re.search(rf"^#\|\s*{name}:\s*(.+?)\s*$", cell.source, re.M)
    return found[1].strip("\"'") if found else ""


def alt_text(cell, heading: str, prose: str, library: dict[str, Module]) -> str:
    """What a picture shows, for those who do not see it.

    The author's words where the cell has `#| fig-alt` or `#| fig-cap`. Else what is certain: the section, what the
    drawing function says it draws, the titles and axes named in the code; and if there is none of these, the
    sentence that leads up to the picture."""
    given = option(cell, "fig-alt") or option(cell, "fig-cap")
    if given:
        return given
    code = code_of(cell)
    drawn = [
        d
        for m in library.values()
        for d in m.definitions.values()
        if d.name.startswith("plot_") and re.search(rf"\b{d.name}\(", code)
    ]
    parts = [
        re.sub(
            r",? and returns? the \w+(?= ?\.)|[`*]", "", re.sub(r"^(Draw|Plot) (\w)", lambda m: m[2].upper(), d.summary)
        )
        for d in drawn[:2]
    ]
    labels = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            named = {k.arg: k.value for k in node.keywords} if node.func.attr == "set" else {}
            if node.func.attr in ("set_title", "set_xlabel", "set_ylabel", "suptitle") and node.args:
                named = {node.func.attr.removeprefix("set_"): node.args[0]}
            for kind in ("suptitle", "title", "xlabel", "ylabel"):
                if isinstance(named.get(kind), ast.Constant) and isinstance(named[kind].value, str):
                    labels.setdefault(kind, []).append(" ".join(named[kind].value.split()))
    for kind, words in (
        ("suptitle", "Title"),
        ("title", "Panels" if len(labels.get("title", [])) > 1 else "Title"),
        ("xlabel", "Horizontal axis"),
        ("ylabel", "Vertical axis"),
    ):
        if labels.get(kind):
            parts.append(f"{words}: {'; '.join(dict.fromkeys(labels[kind]))}.")
    if not parts and prose:
        said = first_sentence(re.sub(r"\$[^$]+\$", "(formula)", prose.split("\n\n")[-1]))
        parts.append(re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", said))
    return " ".join([f"Figure in the section {heading}.".replace("`", "") if heading else "Figure.", *parts])


@dataclass
class Output:
    "What a cell printed, drew or returned: Markdown for the page, and files that go with it."

    markdown: str
    files: dict[str, bytes]


def outputs(cell, stem: str, alt: str) -> Output:
    "The cell's outputs in order. What went to stderr is left out."
    blocks, files, printed = [], {}, ""

    def flush(text):
        if text.strip():
            blocks.append(fence(text.rstrip("\n"), "text", "output"))

    for output in cell.get("outputs", []):
        kind = output["output_type"]
        if kind == "stream":
            printed += joined(output["text"]) if output["name"] == "stdout" else ""
            continue
        flush(printed)
        printed = ""
        data = output.get("data", {})
        if kind == "error":
            flush("\n".join(output["traceback"]))
        elif "image/png" in data or "image/svg+xml" in data:
            kind = "image/png" if "image/png" in data else "image/svg+xml"
            name = f"{stem}-{len(files)}.{'png' if kind == 'image/png' else 'svg'}"
            files[name] = base64.b64decode(joined(data[kind])) if kind == "image/png" else joined(data[kind]).encode()
            caption = option(cell, "fig-cap")
            block = "figure" if caption else "image"
            blocks.append(
                f"```{{{block}}} /figures/{name}\n:alt: {' '.join(alt.split())}\n:class: figure\n"
                + (f"\n{caption}\n" if caption else "")
                + "```"
            )
        elif "text/html" in data:
            page = re.sub(r"<style.*?</style>", "", joined(data["text/html"]), flags=re.S)
            page = "\n".join(line for line in page.splitlines() if line.strip())
            blocks.append(f'````{{raw}} html\n<div class="output rich">\n{page}\n</div>\n````')
        elif "text/markdown" in data:
            blocks.append(joined(data["text/markdown"]))
        elif "text/plain" in data:
            flush(joined(data["text/plain"]))
    flush(printed)
    return Output("\n\n".join(blocks), files)


def relinked(
    text: str,
    page: str,
    source: str,
    target: Callable[[str, str], str],
    pages: dict[str, str],
    home: str,
    repository: str,
) -> str:
    """Links as the site needs them: nbdev's addresses of names go to the reference, links to notebooks to their pages.

    nbdev links every word in backticks that is also a name somewhere in the library. Common words such as `run` are
    names too, so a link stays only where `target` knows a place for it on this page. `source` is the notebook's file,
    `pages` the page of each notebook's file."""

    def name_link(match):
        place = target(match[1].removesuffix("()"), page)
        return f"[`{match[1]}`]({place})" if place else f"`{match[1]}`"

    def page_link(match):
        found = pages.get(posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1])))
        return f"]({'../' * page.count('/')}{found}.md{match[2] or ''})" if found else match[0]

    text = re.sub(rf"\[`([^`\n]+)`\]\({re.escape(home)}[^)\s]*\)", name_link, text)
    text = re.sub(r"\]\((?!https?:)([\w./-]+\.ipynb)(#[^)]*)?\)", page_link, text)
    text = re.sub(r"\]\((?:\.\./)+docs/pages/(\w+\.md)", rf"]({'../' * page.count('/')}\1", text)
    text = re.sub(r"\]\((?:\.\./)+\.github/CONTRIBUTING\.md", rf"]({'../' * page.count('/')}contributing.md", text)
    text = re.sub(r"\]\((?:\.\./)+benchmarks/", rf"]({repository}/blob/main/benchmarks/", text)
    return re.sub(r"\]\((?:\.\./)*images/", "](/images/", text)


def plain_markdown(notebook: Notebook) -> str:
    "The notebook as plain Markdown without pictures, for language models and the terminal."
    blocks = [f"# {notebook.title}", f"> {notebook.summary}"]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            blocks.append(cell.source)
        elif cell.cell_type == "code" and option(cell, "include") != "false" and "hide" not in cell.directives_:
            blocks.append(f"```python\n{code_of(cell)}\n```")
            said = [o for o in cell.get("outputs", []) if o["output_type"] == "stream" and o["name"] == "stdout"]
            blocks += [f"```\n{joined(o['text']).rstrip()}\n```" for o in said]
            values = [o["data"]["text/plain"] for o in cell.get("outputs", []) if o["output_type"] == "execute_result"]
            blocks += [f"```\n{joined(v)}\n```" for v in values]
    return "\n\n".join(b for b in blocks if b.strip()) + "\n"


def page_markdown(
    notebook: Notebook,
    library: dict[str, Module],
    entry: Callable[[Definition, int, str], str],  # documentation of one definition, at a heading level, on a page
    relink: Callable[[str, str], str],  # text, page -> text with the site's links
    header: str,  # line under the title
) -> tuple[str, dict[str, bytes]]:
    "Return the page's Markdown and the pictures it shows."
    module = library.get(notebook.module)
    blocks, files, level, prose = [f"# {notebook.title}"], {}, 1, ""
    if notebook.summary:
        blocks.append("{.lead}\n" + relink(notebook.summary, notebook.page))
    blocks.append(header)
    shown = {
        m
        for cell in notebook.cells
        if cell.cell_type == "code"
        for m in re.findall(r"^show_doc\((\w+)", cell.source, re.M)
    }
    for number, (cell, heading) in enumerate(notebook.headings()):
        if cell.cell_type == "markdown":
            outside = re.sub(r"^```.*?^```", "", cell.source, flags=re.M | re.S)
            level = ([level] + [len(marks) for marks in re.findall(r"^(#{1,5})\s", outside, re.M)])[-1]
            prose = re.sub(r"^#.*$", "", cell.source, flags=re.M).strip() or prose
            blocks.append(relink(cell.source, notebook.page))
            continue
        if cell.cell_type != "code" or option(cell, "include") == "false":
            continue
        code = code_of(cell)
        asked = re.match(r"show_doc\((\w+)", code)
        if asked:
            if module and asked[1] in module.definitions:
                blocks.append(entry(module.definitions[asked[1]], level + 1, notebook.page))
            continue
        if exported(cell):
            tree = ast.parse(code).body
            names = [n.name for n in tree if isinstance(n, ast.FunctionDef | ast.ClassDef)]
            public = [module.definitions[n] for n in names if module and n in module.definitions and n not in shown]
            blocks += [entry(d, level + 1, notebook.page) for d in public]
            if all(isinstance(n, ast.Import | ast.ImportFrom) for n in tree):
                blocks.append(folded("Imports", fence(code, "python")))
            elif public or len(code.splitlines()) > OPEN_LINES:
                blocks.append(folded("Source" if public else "Source: " + ", ".join(names), fence(code, "python")))
            else:
                blocks.append(fence(code, "python"))
        elif code and option(cell, "echo") != "false":
            fold, summary = option(cell, "code-fold"), option(cell, "code-summary") or "Code"
            blocks.append(folded(summary, fence(code, "python")) if fold == "true" else fence(code, "python"))
        if option(cell, "output") != "false":
            found = outputs(
                cell,
                f"{notebook.page.replace('/', '-')}-{number}",
                alt_text(cell, heading, prose, library) if cell.get("outputs") else "",
            )
            files.update(found.files)
            blocks.append(found.markdown)
    return "\n\n".join(b for b in blocks if b) + "\n", files
