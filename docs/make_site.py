"""Write the documentation site: notebooks, reference and pages become Markdown in _proc/site, which Sphinx renders into _docs.

Nothing is executed and nothing is fetched."""

import argparse
import configparser
import os
import re
import shutil
import sys
from io import BytesIO
from pathlib import Path

from definitions import Definition, Module, exposed_names, read_library
from notebook_pages import Notebook, page_markdown, relinked, slug
from PIL import Image
from reference_pages import entry, example_block, examples, prose

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS, SOURCE, SITE = ROOT / "nbs", ROOT / "_proc" / "site", ROOT / "_docs"

PARTS = (
    ("Foundations", 2),
    ("Finding networks", 5),
    ("Using them", 9),
    ("Fine-tuning", 10),
    ("Figures and the command line", 99),
)  # title, last number
TUTORIALS = (
    "quickstart",
    "functional_networks",
    "paper_figures",
    "selective_finetuning",
    "coming_from_llmfact",
)  # in reading order; others follow


def read_settings() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


class Site:
    "Everything the pages are made of, and who links to what."

    def __init__(self, root: Path = ROOT):
        settings = read_settings()
        self.repository, self.home = settings["git_url"], settings["doc_host"] + settings["doc_baseurl"]
        self.rooms, self.exposed = read_library(root / "llmfact_nb"), exposed_names(root / "llmfact_nb" / "__init__.py")
        folder = root / "nbs"
        self.index = Notebook(folder / "index.ipynb", folder)
        self.chapters = [Notebook(p, folder) for p in sorted(folder.glob("[0-9]*.ipynb"))]
        known = {name: i for i, name in enumerate(TUTORIALS)}
        paths = sorted(folder.glob("tutorials/*.ipynb"), key=lambda p: (known.get(p.stem, len(known)), p.stem))
        self.tutorials = [Notebook(p, folder) for p in paths]
        self.examples = examples([*self.chapters, *self.tutorials, self.index], self.rooms)
        self.pages = {n.page.split("/")[-1]: n.page for n in [*self.chapters, *self.tutorials, self.index]}

    def place(self, module: str, name: str, page: str) -> str:
        "Link from `page` to where a definition of `module`, or a method of one, is documented."
        first, _, rest = name.partition(".")
        if self.exposed.get(first) == module:
            return f"{'../' * page.count('/')}api/{first}.md" + (f"#{slug(name)}" if rest else "")
        return f"{'../' * page.count('/')}modules/{module}.md#{slug(name)}"

    def target(self, name: str, page: str) -> str:
        """What `name` means on `page`, as a link; '' for a word that means no name there.

        A name of the page's own module, one that `llmfact_nb` exposes, or one that no plain word looks like."""
        first, _, rest = name.partition(".")
        own = page.split("/")[-1]
        modules = [
            m
            for m in (own, self.exposed.get(first), *(self.rooms if "_" in first or first[:1].isupper() else ()))
            if m in self.rooms
        ]
        module = next((m for m in modules if first in self.rooms[m].definitions), None)
        if module is None or rest and name not in {m.name for m in self.rooms[module].definitions[first].members}:
            return ""
        return self.place(module, name, page)

    def relink(self, text: str, page: str) -> str:
        return relinked(text, page, self.target, self.pages, self.home)

    def link_names(self, page: str):
        "Function that links the names in a docstring as seen from `page`; names a method of the same class by its last part are left alone."

        def linked(match):
            place = self.target(match[1].removesuffix("()"), page)
            return f"[`{match[1]}`]({place})" if place and not place.endswith(f"/{page}.md") else match[0]

        return lambda text: re.sub(r"`([\w.]+(?:\(\))?)`", linked, text)

    def chapter_entry(self, d: Definition, level: int, page: str) -> str:
        "A definition on its chapter's page; its methods are on the reference page."
        place = self.place(d.module, d.name, page)
        names = [f"[`{m.name.split('.', 1)[1]}`]({place.split('#')[0]}#{slug(m.name)})" for m in d.members]
        return entry(
            d,
            level,
            self.link_names(page),
            members=f"{{.members}}\nMethods and properties: {', '.join(names)}" if names else "",
        )

    def notebook_page(self, notebook: Notebook) -> tuple[str, dict[str, bytes]]:
        blob = f"{self.repository.removeprefix('https://github.com/')}/blob/main/{notebook.source}"
        parts = [f"[Notebook](https://github.com/{blob})"]
        if not any(
            "colab.research.google.com" in cell.source for cell in notebook.cells
        ):  # tutorials say it themselves
            parts.append(f"[Open in Colab](https://colab.research.google.com/github/{blob})")
        if notebook.page in self.rooms:
            parts = [f"Module `llmfact_nb.{notebook.page}`", f"[Reference](modules/{notebook.page}.md)", *parts]
        header = "" if notebook is self.index else "{.where}\n" + " · ".join(parts)
        return page_markdown(notebook, self.rooms, self.chapter_entry, self.relink, header)

    def full_entry(self, d: Definition, level: int, page: str, title: str | None = None) -> str:
        "A definition with its methods, example and place in the chapters."
        up, link = "../" * page.count("/"), self.link_names(page)
        blocks = [entry(d, level, link, title), example_block(self.examples.get((d.module, d.name)), up)]
        has_section = d.kind in ("class", "function")
        blocks.append(
            f"{{.where}}\nExplained in the chapter [{d.module}]({up}{d.module}.md{'#' + slug(d.name) if has_section else ''})"
        )
        for member in d.members:
            blocks.append(entry(member, level + 1, link))
        return "\n\n".join(b for b in blocks if b)

    def name_page(self, name: str) -> str:
        d = self.rooms[self.exposed[name]].definitions[name]
        page = f"api/{name}"
        head = f"---\norphan: true\n---\n\n# {name}\n\n{{.where}}\n[`llmfact_nb.{d.module}`](../modules/{d.module}.md) · `from llmfact_nb import {name}`"
        body = self.full_entry(d, 1, page)
        return head + "\n\n" + body.split("\n", 1)[1].strip() + "\n"  # the page's title stands for the entry's

    def module_page(self, module: Module) -> str:
        page = f"modules/{module.name}"
        chapter = f"../{module.name}.md" if module.name in self.pages else None
        blocks = [
            f"# {module.name}",
            f"{{.lead}}\n{module.summary}",
            f"{{.where}}\n`llmfact_nb.{module.name}`"
            + (f" · explained in the chapter [{module.name}]({chapter})" if chapter else ""),
        ]
        own = [n for n in module.definitions if self.exposed.get(n) == module.name]
        rest = [d for d in module.definitions.values() if d.name not in own]
        link = self.link_names(page)
        if own:
            blocks.append(
                "\n\n".join(
                    f"[`{n}`](../api/{n}.md)\n: {prose(module.definitions[n].summary, link) or '&nbsp;'}" for n in own
                )
            )
        if own and rest:
            blocks.append("## Further names\n\nUsed by other rooms of the package, or for those who build on it.")
        blocks += [self.full_entry(d, 3 if own else 2, page) for d in rest]
        return "\n\n".join(blocks) + "\n"

    def index_page(self) -> tuple[str, dict[str, bytes]]:
        text, files = self.notebook_page(self.index)

        def tree(caption, pages):
            return f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(pages) + "\n```" if pages else ""

        trees, low = [tree("Tutorials", [n.page for n in self.tutorials])], -1
        for title, high in PARTS:
            trees.append(
                tree(title, [n.page for n in self.chapters if low < int(re.match(r"\d+", n.path.stem)[0]) <= high])
            )
            low = high
        trees += [
            tree("Reference", ["names", *(f"modules/{m}" for m in self.rooms)]),
            tree("About", ["architectures", "glossary", "traps", "cite", "changelog"]),
        ]
        return "\n\n".join([text, *filter(None, trees)]) + "\n", files

    def names_page(self) -> str:
        "All names of the package by alphabet."
        rows = []
        for name, module in sorted(
            ((d.name, m.name) for m in self.rooms.values() for d in m.definitions.values()),
            key=lambda pair: (pair[0].lower(), pair[1]),
        ):
            place = f"api/{name}.md" if self.exposed.get(name) == module else f"modules/{module}.md#{slug(name)}"
            if self.exposed.get(name) == module:
                rows.append(f"- [**`{name}`**]({place}) {module}")
            else:
                rows.append(f"- [`{name}`]({place}) {module}")
        return (
            "# All names\n\n{.lead}\nEvery public name and its module. Those in bold can be imported from `llmfact_nb` itself.\n\n{.names}\n"
            + "\n".join(rows)
            + "\n"
        )

    def everything(self) -> dict[str, bytes]:
        "Every file of the Sphinx source: name -> content."
        files: dict[str, bytes] = {}
        for notebook in [*self.chapters, *self.tutorials]:
            text, pictures = self.notebook_page(notebook)
            files[f"{notebook.page}.md"] = text.encode()
            files.update({f"figures/{name}": data for name, data in pictures.items()})
        text, pictures = self.index_page()
        files["index.md"] = text.encode()
        files.update({f"figures/{name}": data for name, data in pictures.items()})
        files["names.md"] = self.names_page().encode()
        for module in self.rooms.values():
            files[f"modules/{module.name}.md"] = self.module_page(module).encode()
        for name in self.exposed:
            files[f"api/{name}.md"] = self.name_page(name).encode()
        for path in (ROOT / "docs" / "pages").glob("*.md"):
            files[path.name] = self.relink_page(path).encode()
        files["changelog.md"] = (ROOT / "CHANGELOG.md").read_bytes()
        for path in (ROOT / "nbs" / "images").glob("*.png"):
            files[f"images/{path.name}"] = path.read_bytes()
        return {name: smaller(data) if name.endswith(".png") else data for name, data in files.items()}

    def relink_page(self, path: Path) -> str:
        "A hand-written page with the names in it linked."
        link, fenced = self.link_names(path.stem), False
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines():
            fenced ^= line.startswith("```")
            lines.append(line if fenced or line.startswith("#") else link(line))
        return "\n".join(lines) + "\n"


def smaller(png: bytes) -> bytes:
    "The same picture in 256 colours, half as large; as it is if that gains nothing or it is partly transparent."
    picture, out = Image.open(BytesIO(png)), BytesIO()
    if picture.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        return png
    picture.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
        out, "PNG", optimize=True
    )
    return min(png, out.getvalue(), key=len)


def without_ballast(page: str) -> str:
    "The same page without the theme's indentation, and without the icons that nothing on it uses."
    page = re.sub(
        r'<symbol id="([\w-]+)".*?</symbol>', lambda m: m[0] if f'"#{m[1]}"' in page else "", page, flags=re.S
    )
    return "".join(
        part if part.startswith(("<pre", "<script")) else re.sub(r"\s*\n\s*", "\n", part)
        for part in re.split(r"(<pre.*?</pre>|<script.*?</script>)", page, flags=re.S)
    )


def write_source(files: dict[str, bytes], folder: Path) -> None:
    "Make `folder` hold exactly these files; those that did not change keep their date, so that Sphinx renders only what did."
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
    return [*listed, ROOT / "settings.ini", ROOT / "CHANGELOG.md"]


def is_fresh(site: Path = SITE) -> bool:
    "Whether the site is there and newer than everything it is made from."
    mark = site / "index.html"
    return mark.exists() and mark.stat().st_mtime >= max(p.stat().st_mtime for p in inputs())


def build(site: Path = SITE, source: Path = SOURCE, fresh: bool = False) -> None:
    "Build the site. Raises RuntimeError if Sphinx has any warning; what it says goes to stderr."
    from sphinx.cmd.build import build_main

    if fresh:
        shutil.rmtree(source.parent, ignore_errors=True)
        shutil.rmtree(site, ignore_errors=True)
    os.chdir(ROOT)  # nbdev looks for settings.ini from here
    files = Site().everything()
    write_source(files, source)
    for page in [p for folder in ("api", "modules", "tutorials") for p in (site / folder).glob("*.html")]:
        if page.relative_to(site).with_suffix(".md").as_posix() not in files:
            page.unlink()  # of a name or notebook that is gone
    pages_read = source.parent / "doctrees"
    if build_main(
        [
            "-q",
            "-W",
            "--keep-going",
            "-b",
            "html",
            "-c",
            str(ROOT / "docs"),
            "-d",
            str(pages_read),
            str(source),
            str(site),
        ]
    ):
        (site / "index.html").unlink(missing_ok=True)
        shutil.rmtree(pages_read)  # so that the next build reads, and warns of, every page again
        raise RuntimeError("Sphinx had warnings; they stand above. The site counts as not built.")
    for path in site.rglob("*.html"):
        path.write_text(without_ballast(path.read_text(encoding="utf-8")), encoding="utf-8")
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
