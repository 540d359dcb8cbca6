"""Pins the documentation site: how a notebook becomes a page, that the reference is whole and right, that links lead
somewhere and nothing is fetched from outside."""

import base64
import functools
import importlib
import inspect
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest_plugins = ["browser"]
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))

# Where a link of the site may lead. A new host is a decision, and this list is the place to make it.
HOSTS = {
    "github.com",
    "colab.research.google.com",
    "arxiv.org",
    "huggingface.co",
    "semver.org",
    "research.ics.aalto.fi",
    "llmfact-nb.github.io",
    "pradyunsg.me",
    "www.sphinx-doc.org",
    "doi.org",
    "en.wikipedia.org",
    "py-filelock.readthedocs.io",
}
LIMIT = 15e6  # bytes


@pytest.fixture(scope="module")
def pages():
    "The modules that make pages; the test is skipped where nbdev is missing."
    pytest.importorskip("nbdev")
    import make_site

    return make_site


class Page(HTMLParser):
    "What a built page links to, shows and names."

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.fetched, self.images, self.text, self.skip = [], [], [], [], [], 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"]] if tag == "a" and "href" in attrs else []
        self.fetched += [attrs[k] for k in ("src", "srcset", "data", "poster") if attrs.get(k)] + (
            [attrs["href"]]
            if tag == "link" and attrs.get("rel") not in ("canonical", "index", "search", "next", "prev")
            else []
        )
        self.images += [attrs] if tag == "img" else []
        self.skip += tag in ("script", "style", "code", "pre", "math")

    def handle_endtag(self, tag):
        self.skip -= tag in ("script", "style", "code", "pre", "math")

    def handle_data(self, data):
        self.text += [] if self.skip else [data]


@pytest.fixture(scope="module")
def built(site):
    "Address in the site -> parsed page."
    return {p.relative_to(site).as_posix(): Page(p) for p in site.rglob("*.html") if "_static" not in p.parts}


def notebook(folder, cells, name="04_room.ipynb"):
    "A notebook with these cells: text of a Markdown cell, or (code, outputs)."
    made = [
        {"cell_type": "markdown", "id": f"c{i}", "metadata": {}, "source": c}
        if isinstance(c, str)
        else {
            "cell_type": "code",
            "id": f"c{i}",
            "metadata": {},
            "execution_count": None,
            "source": c[0],
            "outputs": list(c[1:]),
        }
        for i, c in enumerate(cells)
    ]
    path = folder / name
    path.write_text(
        json.dumps(
            {
                "cells": made,
                "metadata": {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}},
                "nbformat": 4,
                "nbformat_minor": 5,
            }
        )
    )
    return path


def printed(text, name="stdout"):
    return {"output_type": "stream", "name": name, "text": text}


def drawn():
    return {
        "output_type": "display_data",
        "metadata": {},
        "data": {"image/png": base64.b64encode(b"\x89PNG").decode(), "text/plain": "<Figure>"},
    }


def converted(pages, folder, *cells, library=None):
    made = pages.Notebook(notebook(folder, ["# room\n\n> What it is for.", *cells]), folder)
    return pages.page_markdown(
        made,
        library or {},
        lambda d, level, page: f"{'#' * level} entry of {d.name}",
        lambda text, page: text,
        "header",
    )


def test_directives_decide_what_is_shown(pages, tmp_path):
    text, _ = converted(
        pages, tmp_path, "## One\n\nProse.",
        ("shown = 1", printed("printed one")),
        ("#| hide\nhidden = 1", printed("printed hidden")),
        ("#| echo: false\nsilent = 1", printed("printed silent")),
        ("#| output: false\nquiet = 1", printed("printed quiet")),
        ("#| include: false\nleft_out = 1", printed("printed left out")),
        ("#| code-fold: true\n#| code-summary: How\nfolded = 1", printed("printed folded")),
        ("noisy = 1", printed("a warning", "stderr")),
    )  # fmt: skip
    seen = {
        word
        for word in ("shown = 1", "hidden = 1", "silent = 1", "quiet = 1", "left_out = 1", "folded = 1", "noisy = 1")
        if word in text
    }
    assert seen == {"shown = 1", "quiet = 1", "folded = 1", "noisy = 1"}
    assert re.findall(r"printed [\w ]+", text) == ["printed one", "printed silent", "printed folded"]
    assert "a warning" not in text and "#|" not in text
    assert text.index("<summary>How</summary>") < text.index("folded = 1") < text.index("</details>")
    assert text.startswith("# room\n") and "What it is for." in text and "> What" not in text


def test_exported_code_is_documented_and_folded(pages, tmp_path):
    from definitions import Definition, Module

    library = {"room": Module("room", "", "04_room", {"public": Definition("public", "room", "", "function")})}
    code = "#| export\ndef public():\n    return 1"
    text, _ = converted(
        pages,
        tmp_path,
        "## One",
        ("#| export\nimport os\nimport re",),
        (code,),
        ("#| export\ndef _private():\n    return 2",),
        library=library,
    )
    assert (
        text.index("<summary>Imports</summary>")
        < text.index("### entry of public")
        < text.index("<summary>Source</summary>")
        < text.index("def public()")
        < text.index("def _private()")
    )
    assert text.count("<details") == 2  # short private code stands open: it is what the prose speaks of
    text, _ = converted(pages, tmp_path, (code,), ("show_doc(public)",), library=library)
    assert text.count("entry of public") == 1 and text.index("def public()") < text.index("entry of public")


def test_code_with_fences_inside_stays_code(pages, tmp_path):
    text, _ = converted(pages, tmp_path, ('x = """\n```\n# no heading\n```\n"""',), ("y = 1", printed("````\n")))
    assert "````{code-block} python" in text and "`````{code-block} text" in text


@pytest.mark.parametrize("directive, code, words", [
    ("#| fig-alt: What one sees.", "plt.plot(x)", "What one sees."),
    ("#| fig-cap: A caption.", "plt.plot(x)", "A caption."),
    ("", "plot_maps(x);", "Figure in the section The maps. Maps by layer."),
    ("", 'ax.set(title="smollm2", xlabel="tokens", ylabel="z-score")',
     "Figure in the section The maps. Title: smollm2. "
     "Horizontal axis: tokens. Vertical axis: z-score."),
    ("", "plt.plot(x)", "Figure in the section The maps. Each curve is a network."),
])  # fmt: skip
def test_pictures_are_described(pages, tmp_path, directive, code, words):
    from definitions import Definition, Module

    library = {
        "figures": Module(
            "figures",
            "",
            "11_figures",
            {
                "plot_maps": Definition(
                    "plot_maps", "figures", "", "function", "Draw maps by layer, and return the Figure. Raises nothing."
                )
            },
        )
    }
    text, files = converted(
        pages,
        tmp_path,
        "## The `maps`",
        "Each curve is a network. The rest is prose.",
        (f"{directive}\n{code}", drawn()),
        library=library,
    )
    assert f":alt: {words}\n" in text and list(files.values()) == [b"\x89PNG"]
    assert all(name in text for name in files)


def test_a_notebook_without_a_title_is_refused(pages, tmp_path):
    with pytest.raises(ValueError):
        pages.Notebook(notebook(tmp_path, ["no title"]), tmp_path)


def test_links_to_names_and_notebooks_find_their_pages(pages):
    def target(name, page):
        return {"NeuronMask": "../api/NeuronMask.md"}.get(name, "")

    home = "https://host/package"
    text = (
        f"[`NeuronMask`]({home}/masks.html#neuronmask) [`run`]({home}/cli.html#run) [a](../05_networks.ipynb) "
        "[b](other.ipynb) [c](https://x.org/05_networks.ipynb) ![d](images/p.png) "
        "[e](../../docs/pages/glossary.md#map) [f](../../benchmarks/README.md)"
    )
    made = pages.relinked(
        text,
        "tutorials/quickstart",
        "nbs/tutorials/quickstart.ipynb",
        target,
        {"nbs/05_networks.ipynb": "networks", "nbs/tutorials/other.ipynb": "tutorials/other"},
        home,
        "https://host/repository",
    )
    assert made == (
        "[`NeuronMask`](../api/NeuronMask.md) `run` [a](../networks.md) [b](../tutorials/other.md) "
        "[c](https://x.org/05_networks.ipynb) ![d](/images/p.png) [e](../glossary.md#map) "
        "[f](https://host/repository/blob/main/benchmarks/README.md)"
    )


def test_what_the_reference_says_of_parameters_is_what_python_says(pages):
    "The reference reads source and imports nothing; here the library is imported and asked the same."
    from definitions import exposed_names, read_library

    library, checked = read_library(), 0
    for name, module in exposed_names().items():
        thing = getattr(importlib.import_module(f"llmfact_nb.{module}"), name)
        if not callable(thing):
            continue
        said = library[module].definitions[name]
        for definition, real in [
            (said, thing),
            *((m, inspect.getattr_static(thing, m.name.split(".")[1])) for m in said.members),
        ]:
            if isinstance(real, property | functools.cached_property):
                assert definition.kind == "property", definition.name
                continue
            real = real.__func__ if isinstance(real, classmethod | staticmethod) else real
            stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
            expected = [
                (stars.get(p.kind, "") + n, p.default is not p.empty)
                for n, p in inspect.signature(real).parameters.items()
                if n not in ("self", "cls")
            ]
            assert [(p.name, p.default is not None) for p in definition.parameters] == expected, definition.name
            checked += 1
    assert checked > 100


def test_comments_beside_parameters_reach_the_reference(tmp_path):
    from definitions import read_module

    (tmp_path / "room.py").write_text('''"""Summary."""
# AUTOGENERATED! DO NOT EDIT! File to edit: ../nbs/04_room.ipynb.
__all__ = ["LIMIT", "Thing", "f"]
LIMIT = 3  # the limit
def f(
    a: "Thing",  # (T, N) what a is
    *rest: int,  # more
    b=(1, 2),  # pair  # fmt: skip
    **options,
) -> int:  # how many
    "Return it. Raises nothing."
class Thing:
    """A thing. It is long."""
    def __init__(self, x: int = 3):  # nothing
        pass
    @property
    def size(self) -> int:
        "Its size."
    @classmethod
    def made(cls, y): "Make one."
    def _private(self): pass
''')
    room = read_module(tmp_path / "room.py")
    f, thing = room.definitions["f"], room.definitions["Thing"]
    assert [(p.name, p.kind, p.default, p.meaning) for p in f.parameters] == [
        ("a", "Thing", None, "(T, N) what a is"),
        ("*rest", "int", None, "more"),
        ("b", "", "(1, 2)", "pair"),
        ("**options", "", None, ""),
    ]
    assert (f.returns.kind, f.returns.meaning) == ("int", "how many") and f.summary == "Return it."
    assert (room.summary, room.notebook, room.definitions["LIMIT"].doc) == ("Summary.", "04_room", "the limit")
    assert [(m.name, m.kind) for m in thing.members] == [("Thing.size", "property"), ("Thing.made", "function")] and [
        p.name for p in thing.parameters
    ] == ["x"]


def test_every_public_name_has_a_page_with_words_parameters_and_an_example(pages, built):
    made = pages.Site()
    for name, module in made.exposed.items():
        text = made.name_page(name)
        d = made.modules[module].definitions[name]
        assert f"api/{name}.html" in built and ("**Example**" in text or d.kind == "constant"), name
        for p in d.parameters:
            assert f"`{p.name}`" in text
    unshown = []
    for module in made.modules.values():
        text = made.module_page(module)
        for d in module.definitions.values():
            assert f"api/{d.name}.md" in text or f"# `{d.name}`" in text, d.name
            assert d.doc or d.kind == "constant", f"{module.name}.{d.name} has no docstring"
            if d.kind != "constant" and "**Example**" not in made.full_entry(d, 2, f"modules/{module.name}"):
                unshown.append(f"{module.name}.{d.name}")
    assert not unshown, "no notebook shows " + ", ".join(unshown)


def test_a_class_has_the_example_of_the_function_that_returns_it(pages, tmp_path):
    from definitions import Definition, Module, Parameter

    find = Definition("find", "room", "", "function", returns=Parameter("returns", "list[Found]", None, ""))
    library = {
        "room": Module(
            "room",
            "",
            "04_room",
            {"find": find, **{name: Definition(name, "room", "", "class") for name in ("Found", "Foundry", "Shown")}},
        )
    }
    made = pages.Notebook(
        notebook(
            tmp_path, ["# room", ("#| export\nfind()",), ("found = find()\nlen(found)", printed("3\n")), ("Shown()",)]
        ),
        tmp_path,
    )
    shown = pages.examples([made], library)
    assert (
        shown["room", "Found"] is shown["room", "find"]
        and shown["room", "find"].output == "3"
        and shown["room", "Shown"].code == "Shown()"
    )
    assert ("room", "Foundry") not in shown


def test_no_notebook_speaks_the_renderers_dialect():
    "They stay plain Markdown, valid in JupyterLab, on GitHub and for nbdev_docs."
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        if ".ipynb_checkpoints" in path.parts:
            continue
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "markdown":
                assert not re.search(
                    r"^(```|~~~)\{|^:::|\{(ref|doc|term|test|numref)\}`|^\{[.#]", "".join(cell["source"]), re.M
                ), path.name
            assert not [o for o in cell.get("outputs", []) if o["output_type"] == "error"], (
                f"{path.name} was committed with an error in its outputs"
            )


def test_every_link_leads_somewhere(built, site):
    dead, strange = [], []
    for name, page in built.items():
        for link in page.links + page.fetched:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if (
                    parts.scheme not in ("https", "mailto", "data")
                    or parts.scheme == "https"
                    and (parts.hostname not in HOSTS or " " in link)
                ):
                    strange.append(f"{name}: {link}")
                continue
            path = (site / name).parent / unquote(parts.path) if parts.path else site / name
            target = path.resolve().relative_to(site.resolve()).as_posix() if path.exists() else None
            if (
                target is None
                or parts.fragment
                and target in built
                and unquote(parts.fragment) not in built[target].ids
            ):
                dead.append(f"{name}: {link}")
    assert not dead, "\n".join(dead[:20])
    assert not strange, "not https, or a host that HOSTS does not list:\n" + "\n".join(sorted(set(strange))[:20])


def test_nothing_is_fetched_from_outside(built, site):
    for name, page in built.items():
        assert not [
            f for f in page.fetched if not f.startswith("data:") and (urlsplit(f).scheme or urlsplit(f).netloc)
        ], name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import\s|url\(\s*['\"]?)(https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


def test_every_picture_has_words_and_every_anchor_is_one_place(built):
    for name, page in built.items():
        assert not [i for i in page.images if not i.get("alt", "").strip()], f"{name} has a picture without words"
        assert len(page.ids) == len(set(page.ids)), (name, {i for i in page.ids if page.ids.count(i) > 1})
    assert sum(len(p.images) for p in built.values()) > 25


def test_no_markup_is_left_in_the_text(built):
    left = re.compile(r"\$[^$\s][^$]*\\[a-z]+|\{\.[a-z]+\}|\]\([\w./]+\.(md|ipynb)|^#{1,4} |show_doc\(", re.M)
    found = {
        name: left.search("".join(page.text))[0] for name, page in built.items() if left.search("".join(page.text))
    }
    assert not found


def test_it_is_small(site):
    assert sum(p.stat().st_size for p in site.rglob("*") if p.is_file()) < LIMIT


def test_spelling(site):
    """Known misspellings in the pages, the hand-written ones and the notebooks' prose alike. A word that is right goes
    into docs/words.txt."""
    pytest.importorskip("codespell_lib")
    texts = sorted((ROOT / "_proc" / "site").rglob("*.md")) + [
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        ROOT / "benchmarks" / "README.md",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "codespell_lib", "--ignore-words", str(ROOT / "docs" / "words.txt"), *map(str, texts)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
