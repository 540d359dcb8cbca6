"""Pins what a reader sees: the built site and a run's report in a headless browser, wide and narrow, light and dark.
Skipped where there is no browser."""

import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from browser import ROOT, contrast, overflow
from llmfact_nb.show.report import write_report

pytest_plugins = ["browser"]
sys.path.insert(0, str(ROOT / "docs"))
from definitions import FOLDERS  # noqa: E402

PHONE = 390  # pixels

# Of every picture that was loaded: its words, and whether there is a picture at all.
DRAWN = "({alt: i.alt, drawn: i.complete && i.naturalWidth > 20 && i.clientWidth > 20})"
PICTURES = f"[...document.querySelectorAll('article img, figure img')].map(i => {DRAWN})"


def test_from_the_first_page_to_a_chapter_and_back(served_site, browser_page):
    page = browser_page(served_site)
    assert page.title().startswith("llmfact_nb")
    contents = page.locator(".sidebar-tree")
    captions = [c.strip() for c in contents.locator(".caption-text").all_text_contents()]
    assert captions[:2] == ["The course", "Tutorials"] and captions[-2:] == ["Reference", "About"]
    assert set(captions[2:-2]) == set(list(FOLDERS.values())[2:])
    contents.get_by_role("link", name="3 · ICA", exact=True).first.click()
    page.wait_for_load_state()
    assert page.url == f"{served_site}/ica.html" and page.locator("h1").inner_text().startswith("ica")
    page.locator("a.next-page").click()
    page.wait_for_load_state()
    assert page.url == f"{served_site}/masks.html"
    page.locator("article").get_by_role("link", name="Reference", exact=True).click()
    page.wait_for_load_state()
    assert page.url == f"{served_site}/modules/masks.html"
    page.locator("article").get_by_role("link", name="NeuronMask", exact=True).first.click()
    page.wait_for_load_state()
    assert page.url == f"{served_site}/api/NeuronMask.html"
    page.go_back()
    page.wait_for_load_state()
    assert page.url == f"{served_site}/modules/masks.html"


@pytest.mark.parametrize("word, place", [("matched_random", "api/NeuronMask.html"), ("sink token", "glossary.html")])
def test_the_search_knows(served_site, browser_page, word, place):
    page = browser_page(served_site)
    page.locator(".sidebar-search").fill(word)
    page.locator(".sidebar-search").press("Enter")
    page.locator("#search-results ul.search a").first.wait_for()
    page.locator("#search-results .search-summary", has_text="found").wait_for()
    found = page.locator("#search-results ul.search a").evaluate_all("links => links.map(a => a.href)")
    assert any(place in address for address in found), found


def test_formulas_and_pictures_are_drawn(served_site, browser_page):
    page = browser_page(f"{served_site}/ica.html")
    sizes = page.eval_on_selector_all(
        "math",
        "all => all.map(m => [m.getBoundingClientRect().width, m.getBoundingClientRect().height, m.textContent])",
    )
    assert len(sizes) > 10 and all(width > 3 and height > 5 for width, height, _ in sizes)
    assert not [text for *_, text in sizes if "\\" in text or "$" in text]
    fractions = page.evaluate(
        """(() => { let m = document.querySelector('math msup'), top = e => e.getBoundingClientRect().top;
           return top(m.children[1]) < top(m.children[0]) })()"""
    )
    assert fractions  # an exponent stands above its base: the browser lays formulas out
    pictures = page.evaluate(PICTURES)
    assert len(pictures) >= 3 and all(p["drawn"] and len(p["alt"]) > 20 for p in pictures), pictures


@pytest.mark.parametrize(
    "name", ["index", "show/figures", "networks", "glossary", "traps", "api/FunctionalNetworks", "names"]
)
def test_a_phone_needs_no_sideways_scrolling(served_site, browser_page, name):
    page = browser_page(f"{served_site}/{name}.html", width=PHONE, height=800)
    assert overflow(page) <= 0
    widest = page.evaluate(
        """Math.max(...[...document.querySelectorAll('article p, article h1, article h2, article img, article dd')]
           .filter(e => !e.closest('table')).map(e => e.getBoundingClientRect().right))"""
    )
    assert widest <= PHONE  # tables alone may be wider, and scroll in themselves


def test_light_and_dark_are_both_readable(served_site, browser_page):
    shades = {}
    for dark in (False, True):
        page = browser_page(f"{served_site}/masks.html", dark=dark)
        shades[dark] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        for selector in (
            "article p",
            "div.input pre",
            "div.output pre",
            "dl.myst dt code",
            "details summary",
            ".where",
            "article p a",
        ):
            assert contrast(page, selector) >= 4.5, (dark, selector)
    assert shades[False] != shades[True]
    page.locator("button.theme-toggle:visible").first.click()
    assert page.evaluate("document.body.dataset.theme") in ("light", "dark")


def test_a_source_opens_on_a_click(served_site, browser_page):
    page = browser_page(f"{served_site}/masks.html")
    source = page.locator("details.fold", has_text="class NeuronMask").first
    code = source.locator("pre").first
    assert not code.is_visible()
    source.locator("summary").click()
    assert code.is_visible() and "class NeuronMask" in code.inner_text()


@pytest.fixture
def report(tmp_path):
    "The report of a small run."
    rows = [
        {
            "condition": c,
            "replace": "mean",
            "positions": "after-first",
            "arm": arm,
            "seed": seed,
            "units": 461,
            "share": 0.01,
            "value": 3 + d,
            "damage": d,
            "ci_low": 0.9 * d,
            "ci_high": 1.1 * d,
            "perplexity": np.exp(3 + d),
            "above_vocabulary": False,
            "counts": " ".join(["15"] * 30),
        }
        for c in ("mean, after the first token", "zero, all tokens")
        for arm, d in (("key", 1.1), ("random", 0.1))
        for seed in range(2)
    ]
    fig = plt.figure(figsize=(7, 3))
    fig.subplots().plot(np.arange(9))
    fig.savefig(tmp_path / "damage.png", dpi=80)
    plt.close(fig)
    networks = pd.DataFrame(
        {
            "network": range(3),
            "units": [12, 40, 7],
            "top tokens": ["a, river, <|im_start|>", "1990, 1991, 2004, 1066, 1789, 1848, 1917", "." * 60],
        }
    )
    write_report(
        tmp_path / "report.html",
        "Networks of a model with a rather long name/and-a-folder-0.1B-instruct-2026-11",
        ["Key neurons matter.", "x" * 90],
        pd.DataFrame(rows),
        figures=[(tmp_path / "damage.png", "Damage by arm", "Damage of the key neurons beside that of random ones")],
        facts={"model": {"name": "smollm2-135m", "file": "/a/very/long/path" * 6}},
        networks=networks,
    )
    return tmp_path / "report.html"


@pytest.mark.parametrize("width", [1280, PHONE])
@pytest.mark.parametrize("dark", [False, True])
def test_the_report_of_a_run(report, browser_page, width, dark):
    page = browser_page(report, width=width, dark=dark)
    assert overflow(page) <= 0
    pictures = page.evaluate(f"[...document.images].map(i => {DRAWN})")
    assert pictures == [{"alt": "Damage of the key neurons beside that of random ones", "drawn": True}]
    for selector in ("h1", "li", "td", "th", "figcaption", "dd", "a"):
        assert contrast(page, selector) >= 4.5, selector
    for link in page.locator("a").all():
        link.click()
        target = page.locator(link.get_attribute("href"))
        assert target.count() == 1 and target.bounding_box()["y"] < 900
    rows = page.locator("details td").first
    assert not rows.is_visible()
    page.locator("summary").first.click()
    assert rows.is_visible()


def test_the_watch_notices_what_goes_wrong(tmp_path, chromium):
    "The fixture's own check: each kind of trouble is written down."
    from browser import Watched

    (tmp_path / "page.html").write_text(
        "<img src='gone.png'><img src='http://127.0.0.1:9/x.png'>"
        "<script>console.error('said'); throw Error('thrown')</script><div style='width:2000px'>wide</div>"
    )
    watched = Watched(chromium)
    page = watched(tmp_path / "page.html", width=PHONE)
    page.wait_for_load_state("load")
    noted = "\n".join(watched.problems)
    assert all(word in noted for word in ("said", "thrown", "gone.png", "asked outside: http://127.0.0.1:9/x.png")), (
        noted
    )
    assert overflow(page) > 1000
    watched.close()
