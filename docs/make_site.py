"""Write the documentation site: notebooks, reference and pages become Markdown in _proc/site, which Sphinx renders
into _docs.

Nothing is executed and nothing is fetched."""

import argparse
import configparser
import os
import re
import shutil
import sys
from io import BytesIO
from pathlib import Path

from definitions import FOLDERS, Definition, Module, exposed_names, read_library, reading_order
from notebook_pages import Notebook, page_markdown, plain_markdown, relinked, slug
from PIL import Image
from reference_pages import entry, example_block, examples, prose

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS, SOURCE, SITE = ROOT / "nbs", ROOT / "_proc" / "site", ROOT / "_docs"
TUTORIALS = (
    "quickstart",
    "functional_networks",
    "paper_figures",
    "selective_finetuning",
    "laptop_to_cluster",
    "coming_from_llmfact",
)
ABOUT = ("glossary", "traps", "architectures", "contributing", "cite", "changelog")


def read_settings() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def up(page: str) -> str:
    "The way from `page` to the top of the site."
    return "../" * page.count("/")


def order(path: Path) -> tuple:
    "Sorts notebooks as they are read; the tutorials have no numbers, so TUTORIALS says."
    if path.parent.name == "tutorials" and path.stem in TUTORIALS:
        path = path.with_name(f"{TUTORIALS.index(path.stem):02d}")
    return reading_order(path.relative_to(NOTEBOOKS).with_suffix("").as_posix())


class Site:
    "Everything the pages are made of, and who links to what."

    def __init__(self, root: Path = ROOT):
        settings = read_settings()
        self.repository, self.home = settings["git_url"], settings["doc_host"] + settings["doc_baseurl"]
        self.description = settings["description"]
        self.modules, self.exposed = read_library(root / "llmfact_nb"), exposed_names(root / "llmfact_nb/__init__.py")
        folder = root / "nbs"
        self.index = Notebook(folder / "index.ipynb", folder)
        paths = [p for f in FOLDERS for p in (folder / f).glob("*.ipynb") if p.stem != "index"]
        self.notebooks = [Notebook(p, folder) for p in sorted(paths, key=order)]
        self.examples = examples([*self.notebooks, self.index], self.modules)
        self.pages = {n.source: n.page for n in [*self.notebooks, self.index]}

    def parts(self) -> dict[str, list[Notebook]]:
        "Title of each part -> its notebooks, in reading order."
        return {title: [n for n in self.notebooks if n.folder == folder] for folder, title in FOLDERS.items()}

    def place(self, module: str, name: str, page: str) -> str:
        "Link from `page` to where a definition of `module`, or a method of one, is documented."
        first, _, rest = name.partition(".")
        if self.exposed.get(first) == module:
            return f"{up(page)}api/{first}.md" + (f"#{slug(name)}" if rest else "")
        return f"{up(page)}modules/{module}.md#{slug(name)}"

    def target(self, name: str, page: str) -> str:
        """What `name` means on `page`, as a link; '' for a word that means no name there.

        A name of the page's own module, one that `llmfact_nb` exposes, or one that no plain word looks like."""
        first, _, rest = name.partition(".")
        own = page.removeprefix("modules/").replace("/", ".")
        anywhere = self.modules if "_" in first or first[:1].isupper() else ()
        candidates = [m for m in (own, self.exposed.get(first), *anywhere) if m in self.modules]
        module = next((m for m in candidates if first in self.modules[m].definitions), None)
        if module is None or rest and name not in {m.name for m in self.modules[module].definitions[first].members}:
            return ""
        return self.place(module, name, page)

    def relink(self, text: str, page: str) -> str:
        source = next((s for s, p in self.pages.items() if p == page), page)
        return relinked(text, page, source, self.target, self.pages, self.home, self.repository)

    def link_names(self, page: str):
        "Function that links the names in a docstring as seen from `page`; those of the page itself are left alone."

        def linked(match):
            place = self.target(match[1].removesuffix("()"), page)
            return f"[`{match[1]}`]({place})" if place and not place.endswith(f"/{page}.md") else match[0]

        return lambda text: re.sub(r"`([\w.]+(?:\(\))?)`", linked, text)

    def chapter_entry(self, d: Definition, level: int, page: str) -> str:
        "A definition on its chapter's page; its methods are on the reference page."
        place = self.place(d.module, d.name, page).split("#")[0]
        names = [f"[`{m.name.split('.', 1)[1]}`]({place}#{slug(m.name)})" for m in d.members]
        members = f"{{.members}}\nMethods and properties: {', '.join(names)}" if names else ""
        return entry(d, level, self.link_names(page), members=members)

    def notebook_page(self, notebook: Notebook) -> tuple[str, dict[str, bytes]]:
        blob = f"{self.repository.removeprefix('https://github.com/')}/blob/main/{notebook.source}"
        parts = [f"[Notebook](https://github.com/{blob})"]
        if not any("colab.research.google.com" in cell.source for cell in notebook.cells):  # tutorials say it
            parts.append(f"[Open in Colab](https://colab.research.google.com/github/{blob})")
        if (name := notebook.module) in self.modules:
            reference = f"[Reference]({up(notebook.page)}modules/{name}.md)"
            parts = [f"Module `llmfact_nb.{name}`", reference, *parts]
        parts.append(f"{notebook.minutes} minutes to read")
        header = "" if notebook is self.index else "{.where}\n" + " · ".join(parts)
        return page_markdown(notebook, self.modules, self.chapter_entry, self.relink, header)

    def full_entry(self, d: Definition, level: int, page: str, title: str | None = None) -> str:
        "A definition with its methods, example and place in the notebooks."
        link = self.link_names(page)
        blocks = [entry(d, level, link, title), example_block(self.examples.get((d.module, d.name)), up(page))]
        anchor = "#" + slug(d.name) if d.kind in ("class", "function") else ""
        chapter = f"[{d.module}]({up(page)}{self.modules[d.module].page}.md{anchor})"
        blocks.append(f"{{.where}}\nExplained in {chapter}")
        blocks += [entry(member, level + 1, link) for member in d.members]
        return "\n\n".join(b for b in blocks if b)

    def name_page(self, name: str) -> str:
        "The page of a name that `llmfact_nb` exposes."
        d = self.modules[self.exposed[name]].definitions[name]
        module = f"[`llmfact_nb.{d.module}`](../modules/{d.module}.md)"
        head = f"---\norphan: true\n---\n\n# {name}\n\n{{.where}}\n{module} · `from llmfact_nb import {name}`"
        body = self.full_entry(d, 1, f"api/{name}")
        return head + "\n\n" + body.split("\n", 1)[1].strip() + "\n"  # the page's title stands for the entry's

    def module_page(self, module: Module) -> str:
        page = f"modules/{module.name}"
        where = f"`llmfact_nb.{module.name}` · explained in [{module.page}](../{module.page}.md)"
        blocks = [f"---\norphan: true\n---\n\n# {module.name}", f"{{.lead}}\n{module.summary}", f"{{.where}}\n{where}"]
        own = [n for n in module.definitions if self.exposed.get(n) == module.name]
        rest = [d for d in module.definitions.values() if d.name not in own]
        link = self.link_names(page)
        if own:
            rows = [f"[`{n}`](../api/{n}.md)\n: {prose(module.definitions[n].summary, link) or '&nbsp;'}" for n in own]
            blocks.append("\n\n".join(rows))
        if own and rest:
            blocks.append("## Further names\n\nUsed by other modules of the package, or for those who build on it.")
        blocks += [self.full_entry(d, 3 if own else 2, page) for d in rest]
        return "\n\n".join(blocks) + "\n"

    def modules_page(self) -> str:
        "All modules with their summaries, in reading order."
        link = self.link_names("modules")
        rows = [f"[`{m.name}`](modules/{m.name}.md)\n: {prose(m.summary, link)}" for m in self.modules.values()]
        return "# All modules\n\n{.lead}\nEvery module, in reading order.\n\n" + "\n\n".join(rows) + "\n"

    def names_page(self) -> str:
        "All names of the package by alphabet."
        rows = []
        for name, module in sorted(
            ((d.name, m.name) for m in self.modules.values() for d in m.definitions.values()),
            key=lambda pair: (pair[0].lower(), pair[1]),
        ):
            shown = f"**`{name}`**" if self.exposed.get(name) == module else f"`{name}`"
            rows.append(f"- [{shown}]({self.place(module, name, 'names')}) {module}")
        lead = "Every public name and its module. Those in bold can be imported from `llmfact_nb` itself."
        return f"# All names\n\n{{.lead}}\n{lead}\n\n{{.names}}\n" + "\n".join(rows) + "\n"

    def contents(self) -> str:
        "The card of contents on the home page: every notebook with what it is about and how long it takes to read."
        blocks = ["## Contents"]
        for title, notebooks in self.parts().items():
            total = sum(n.minutes for n in notebooks)
            blocks.append(f"### {title}\n\n{{.where}}\n{len(notebooks)} notebooks, about {duration(total)} of reading")
            rows = [f"[{n.label}]({n.page}.md)\n: {self.relink(n.summary, 'index')} {n.minutes} min" for n in notebooks]
            blocks.append("\n\n".join(rows))
        return "\n\n".join(blocks)

    def index_page(self) -> tuple[str, dict[str, bytes]]:
        text, files = self.notebook_page(self.index)

        def tree(caption, pages):
            return f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(pages) + "\n```"

        trees = [
            tree(title, [f"{n.label} <{n.page}>" for n in notebooks])
            for title, notebooks in self.parts().items()
            if notebooks
        ]
        trees += [tree("Reference", ["names", "modules"]), tree("About", ABOUT)]
        return "\n\n".join([text, self.contents(), *trees]) + "\n", files

    def everything(self) -> dict[str, bytes]:
        "Every file of the Sphinx source: name -> content."
        files: dict[str, bytes] = {}
        for notebook in self.notebooks:
            text, pictures = self.notebook_page(notebook)
            files[f"{notebook.page}.md"] = text.encode()
            files.update({f"figures/{name}": data for name, data in pictures.items()})
        text, pictures = self.index_page()
        files["index.md"] = text.encode()
        files.update({f"figures/{name}": data for name, data in pictures.items()})
        files["names.md"], files["modules.md"] = self.names_page().encode(), self.modules_page().encode()
        for module in self.modules.values():
            files[f"modules/{module.name}.md"] = self.module_page(module).encode()
        for name in self.exposed:
            files[f"api/{name}.md"] = self.name_page(name).encode()
        for path in (ROOT / "docs" / "pages").glob("*.md"):
            files[path.name] = self.relink_page(path).encode()
        files["changelog.md"] = (ROOT / "CHANGELOG.md").read_bytes()
        files["contributing.md"] = self.relink_page(ROOT / ".github" / "CONTRIBUTING.md").encode()
        for path in (ROOT / "nbs" / "images").glob("*.png"):
            files[f"images/{path.name}"] = path.read_bytes()
        return {name: smaller(data) if name.endswith(".png") else data for name, data in files.items()}

    def for_models(self) -> dict[str, str]:
        """llms.txt, which lists the pages for language models; the course as plain Markdown; llms-full.txt, all of
        that.

        The names are those that the llms.txt convention gives them."""
        course = [self.index, *(n for n in self.notebooks if n.folder in ("", "tutorials"))]
        files = {f"{n.page}.html.md": plain_markdown(n) for n in course}
        lines = [f"# {self.index.title}", f"> {self.description}"]
        for title, notebooks in self.parts().items():
            places = {n.page: ".html.md" if n in course else ".html" for n in notebooks}
            rows = [f"- [{n.label}]({self.home}/{n.page}{places[n.page]}): {n.summary}" for n in notebooks]
            lines.append(f"## {title}\n\n" + "\n".join(rows))
        rows = [f"- [{page.capitalize()}]({self.home}/{page}.html)" for page in (*ABOUT, "names")]
        lines.append("## Optional\n\n" + "\n".join(rows))
        full = "\n\n".join(files.values())
        return {**files, "llms.txt": "\n\n".join(lines) + "\n", "llms-full.txt": full}

    def relink_page(self, path: Path) -> str:
        "A hand-written page, whose links work on GitHub, with the site's links; its first paragraph is the lead."
        page, source, fenced, lines = path.stem.lower(), path.relative_to(ROOT).as_posix(), False, []
        link, text = self.link_names(page), path.read_text(encoding="utf-8")
        text = relinked(text, page, source, self.target, self.pages, self.home, self.repository)
        for line in text.splitlines():
            fenced ^= line.startswith("```")
            lines.append(line if fenced or line.startswith("#") else link(line))
        return re.sub(r"\A(# .+\n\n)", r"\1{.lead}\n", "\n".join(lines) + "\n")


def duration(minutes: int) -> str:
    "Minutes in words: 45 minutes, 2.5 hours."
    return f"{minutes} minutes" if minutes < 90 else f"{round(minutes / 30) / 2:g} hours"


def smaller(png: bytes) -> bytes:
    "The same picture in 32 colours, a third as large; as it is if that gains nothing or it is partly transparent."
    picture, out = Image.open(BytesIO(png)), BytesIO()
    if picture.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        return png
    picture.convert("RGB").quantize(32, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
        out, "PNG", optimize=True
    )
    return min(png, out.getvalue(), key=len)


def without_ballast(page: str) -> str:
    "The same page without the theme's indentation, icons that nothing on it uses, and spans around words of code."
    page = re.sub(
        r'<symbol id="([\w-]+)".*?</symbol>', lambda m: m[0] if f'"#{m[1]}"' in page else "", page, flags=re.S
    )
    page = re.sub(r'<span class="pre">([^<]*)</span>', r"\1", page)
    return "".join(
        part if part.startswith(("<pre", "<script")) else re.sub(r"\s*\n\s*", "\n", part)
        for part in re.split(r"(<pre.*?</pre>|<script.*?</script>)", page, flags=re.S)
    )


def write_source(files: dict[str, bytes], folder: Path) -> None:
    """Make `folder` hold exactly these files; those that did not change keep their date, so that Sphinx renders only
    what did."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file() and path.relative_to(folder).as_posix() not in files:
            path.unlink()
    for name, data in files.items():
        path = folder / name
        if not path.exists() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def inputs() -> list[Path]:
    "Every file the site is made from."
    folders = (("nbs", "*.ipynb"), ("nbs", "*.png"), ("llmfact_nb", "*.py"), ("docs", "*"), ("tests", "test_*.py"))
    listed = [
        p
        for folder, pattern in folders
        for p in (ROOT / folder).rglob(pattern)
        if p.is_file()
        and not {"__pycache__", ".ipynb_checkpoints", "out", "words.txt"} & set(p.relative_to(ROOT).parts)
    ]
    return [*listed, ROOT / "settings.ini", ROOT / "CHANGELOG.md", ROOT / ".github" / "CONTRIBUTING.md"]


def is_fresh(site: Path = SITE) -> bool:
    "Whether the site is there and newer than everything it is made from."
    mark = site / "index.html"
    return mark.exists() and mark.stat().st_mtime >= max(p.stat().st_mtime for p in inputs())


def build(site: Path = SITE, source: Path = SOURCE, fresh: bool = False) -> None:
    "Build the site. Raises RuntimeError if Sphinx has any warning; what it says goes to stderr."
    from sphinx.cmd.build import build_main

    os.chdir(ROOT)  # nbdev looks for settings.ini from here
    pages = Site()
    files = pages.everything()
    before = {p.relative_to(source).as_posix() for p in source.rglob("*.md")}
    if fresh or before != {name for name in files if name.endswith(".md")}:  # every page lists all others beside it
        shutil.rmtree(source.parent, ignore_errors=True)
        shutil.rmtree(site, ignore_errors=True)
    write_source(files, source)
    pages_read = source.parent / "doctrees"
    options = ["-q", "-W", "--keep-going", "-b", "html", "-c", str(ROOT / "docs"), "-d", str(pages_read)]
    if build_main([*options, str(source), str(site)]):
        (site / "index.html").unlink(missing_ok=True)
        shutil.rmtree(pages_read)  # so that the next build reads, and warns of, every page again
        raise RuntimeError("Sphinx had warnings; they stand above. The site counts as not built.")
    for path in site.rglob("*.html"):
        path.write_text(without_ballast(path.read_text(encoding="utf-8")), encoding="utf-8")
    for name, text in pages.for_models().items():
        (site / name).write_text(text, encoding="utf-8")
    for path in site.rglob("*.map"):
        path.unlink()  # for those who change the theme's scripts and styles
    os.utime(site / "index.html")  # also when nothing on it changed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier build left")
    parser.add_argument(
        "--if-older", action="store_true", help="do nothing if the site is newer than everything it is made from"
    )
    wanted = parser.parse_args()
    try:
        if not (wanted.if_older and is_fresh()):
            build(fresh=wanted.fresh)
    except RuntimeError as e:
        sys.exit(str(e))
    print(f"{SITE}/index.html")
