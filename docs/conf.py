"""Sphinx's configuration. The pages come from make_site.py."""

import sys
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from pygments.filter import Filter
from pygments.lexers import PythonLexer
from pygments.token import Name, Operator, Punctuation, Text, Whitespace
from sphinx.util import logging

sys.path.insert(0, str(Path(__file__).resolve().parent))
from make_site import ROOT, read_settings

settings = read_settings()
project, version = settings["title"], settings["version"]
release, html_title = version, settings["title"]
copyright = settings["copyright"].removesuffix(", the llmfact_nb authors") + ", the llmfact_nb authors"
extensions = ["myst_parser", "sphinx_copybutton"]
myst_enable_extensions = ["attrs_block", "attrs_inline", "deflist", "dollarmath"]
smartquotes = False  # the quotes around "mlp_out" are part of the code
myst_dmath_allow_space = False
myst_dmath_allow_digits = False
myst_heading_anchors = 5
myst_heading_slug_func = "notebook_pages.slug"
myst_heading_anchors_html_ids = True

html_theme = "furo"
html_baseurl = f"{settings['doc_host']}{settings['doc_baseurl']}/"
html_static_path = [str(ROOT / "docs" / "static")]
html_css_files = ["site.css"]
html_favicon = str(ROOT / "docs" / "static" / "network.svg")
html_copy_source = html_show_sourcelink = html_show_sphinx = False
html_use_index = False
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "github-dark"
html_theme_options = {
    "source_repository": settings["git_url"],
    "top_of_page_buttons": [],
    "light_css_variables": {
        "color-brand-primary": "#0b5394",
        "color-brand-content": "#0b5394",
        "color-brand-visited": "#5b3a8c",
    },
    "dark_css_variables": {
        "color-brand-primary": "#8ab8ee",
        "color-brand-content": "#8ab8ee",
        "color-brand-visited": "#c3a6ee",
    },
}
copybutton_selector = "div.input pre"
html_math_renderer = "mathml"


def mathml(self, node: nodes.Element) -> None:
    "Write a formula as MathML, which browsers draw themselves."
    block = isinstance(node, nodes.math_block)
    formula = convert(node.astext(), display="block" if block else "inline")
    if "\\" in formula.replace("\\|", ""):
        logging.getLogger(__name__).warning("formula not understood: %s", node.astext(), location=node)
    self.body.append(f'<div class="formula">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def test_link(name, rawtext, text, lineno, inliner, options=None, content=None):
    "The role {test}`file.py::test_name`: a link to a test, which must exist."
    file, _, function = text.partition("::")
    path = ROOT / "tests" / file
    inliner.document.settings.env.note_dependency(str(path))  # the page is read again when the line has moved
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    number = next((i for i, line in enumerate(lines, 1) if line.startswith(f"def {function}(")), None)
    if number is None:
        return [], [inliner.reporter.warning(f"there is no test {text}", line=lineno)]
    address = f"{settings['git_url']}/blob/main/tests/{file}#L{number}"
    return [nodes.reference(rawtext, "", nodes.literal(function, function), refuri=address)], []


class Uncoloured(Filter):
    "Tokens that have the colour of plain text become plain text, which halves the pages."

    def filter(self, lexer, stream):
        for kind, text in stream:
            yield (Text if kind in (Name, Operator, Punctuation, Whitespace) else kind), text


class Python(PythonLexer):
    "Python with fewer coloured tokens."

    def __init__(self, **options):
        super().__init__(**options)
        self.add_filter(Uncoloured())


def setup(app) -> None:
    app.add_lexer("python", Python)
    app.add_role("test", test_link)
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
