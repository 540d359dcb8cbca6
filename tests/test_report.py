"""The report page: one file that asks for nothing, in which no text from data can become markup; the same summary as the terminal's table."""

import base64
import io
import re
from html.parser import HTMLParser

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from llmfact_nb.show.report import results_table, write_report

EVIL = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", '"><svg onload=alert(1)>', "' onmouseover='alert(1)", "</title></style></table><script>", "javascript:alert(1)",
    "<!-- ", "]]>", "$title ${style} $$", "&lt;b&gt; &amp;", "{0} %s", "\x00\x1b[2J\x9b", "\u202eabc", "</blockquote><iframe src=https://example.org>", "a\r\nb",
]  # fmt: skip
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    "Elements with their attributes, text by element, and a complaint about every wrong nesting."

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text, self.errors = [], [], [], []
        self.feed(text)
        self.close()
        self.errors += [f"{tag} is never closed" for tag in self.open]

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if len(dict(attrs)) != len(attrs):
            self.errors.append(f"{tag} has an attribute twice")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.errors.append(f"</{tag}> closes something else")

    def handle_comment(self, data):
        self.errors.append(f"comment {data!r}")

    def handle_data(self, data):
        self.text.append((tuple(self.open), data))

    def all(self, tag):
        return [attrs for t, attrs in self.elements if t == tag]

    def inside(self, tag):
        return "".join(data for path, data in self.text if tag in path)


def results(condition="mean, after the first token", arm="key"):
    rows = []
    for c in (condition, "zero, everywhere"):
        for a, seeds, units, damage in (
            ("unmasked", 1, 0, 0.0),
            (arm, 2, 461, 1.0),
            ("random", 5, 461, 0.05),
            ("all off", 1, 46080, 11.0),
        ):
            for seed in range(seeds):
                d, bounds = damage * (1 + 0.1 * seed), units > 0
                rows.append({"condition": c, "replace": "mean", "positions": "all", "arm": a, "seed": seed if seeds > 1 else None, "units": units, "share": units / 46080, "nats": 3 + d, "damage": d,
                             "ci_low": 0.9 * d if bounds else None, "ci_high": 1.2 * d if bounds else None, "perplexity": np.exp(3 + d), "broken": d > 10, "counts": "1 2 3"})  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture
def picture(tmp_path):
    fig = plt.figure(figsize=(3, 2))
    fig.savefig(tmp_path / "p.png", dpi=50)
    plt.close(fig)
    return tmp_path / "p.png"


def page_with(text, path, picture):
    "A report in which every input is `text`."
    write_report(
        path, text, [text, text], results(condition=text, arm=text), figures=[(picture, text, text)],
        facts={text: {text: [text, {"x": 1}], "deep": [{text: text}]}, "none": None, "list": []},
        networks=pd.DataFrame({text: [text], "units": [3]}), samples=[(text, text)],
    )  # fmt: skip
    return Page(path.read_text(encoding="utf-8"))


def shape(page):
    "The page without anything that may come from data."
    return [(tag, {k: v for k, v in attrs.items() if k != "alt"}) for tag, attrs in page.elements]


@pytest.mark.parametrize("evil", EVIL)
def test_text_from_data_never_becomes_markup(evil, tmp_path, picture):
    harmless, page = page_with("harmless", tmp_path / "a.html", picture), page_with(evil, tmp_path / "b.html", picture)
    assert not page.errors
    assert shape(page) == shape(harmless)  # not one element or attribute more, less or different
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "svg", "iframe", "object", "link", "form", "base"})
    shown = "".join(
        "\ufffd"
        if c not in "\n\t" and (ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 or c == "\u202e")
        else c
        for c in evil.replace("\r\n", "\n")
    )
    for where in ("title", "h1", "li", "figcaption", "blockquote", "dt", "dd", "th", "td", "h3"):
        assert shown in page.inside(where), where
    assert shown in page.all("img")[0]["alt"]


def test_text_that_utf8_cannot_hold_is_marked(tmp_path):
    write_report(tmp_path / "r.html", "\udc80", ["\ud800"], results(), samples=[("\udfff", "a\udc80b")])
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.inside("h1") == page.inside("li") == "\ufffd" and page.inside("blockquote") == "a\ufffdb"


def test_asks_for_nothing(tmp_path, picture):
    path = tmp_path / "report.html"
    page = page_with("model https://example.org/model", path, picture)
    policies = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    rules = dict(rule.strip().split(" ", 1) for rule in policies[0].split(";"))
    assert (
        rules["default-src"] == "'none'"
        and rules["img-src"] == "data:"
        and rules["style-src"] == "'unsafe-inline'"
        and "script-src" not in rules
    )
    addresses = [
        v
        for _, attrs in page.elements
        for k, v in attrs.items()
        if k in ("src", "href", "srcset", "action", "poster", "style", "background")
    ]
    assert addresses and all(a.startswith(("data:image/png;base64,", "#")) for a in addresses)
    assert not re.search(r"url\(|@import|https?:", page.inside("style"))
    assert not [k for _, attrs in page.elements for k in attrs if k.startswith("on")]


def test_pictures_are_inside_with_size_and_words(tmp_path, picture):
    write_report(
        tmp_path / "r.html", "t", [], results(), figures=[(picture, "first", "one"), (str(picture), "second", "two")]
    )
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    images = page.all("img")
    assert [i["alt"] for i in images] == ["one", "two"]
    for i in images:
        data = base64.b64decode(i["src"].removeprefix("data:image/png;base64,"), validate=True)
        assert data == picture.read_bytes()
        assert plt.imread(io.BytesIO(data)).shape[:2] == (int(i["height"]), int(i["width"])) == (100, 150)
    assert len(page.all("figcaption")) == 2 and "Figure 2. second" in page.inside("figcaption")


def test_headings_tables_and_links_are_what_they_say(tmp_path, picture):
    page = page_with("name", tmp_path / "r.html", picture)
    assert len(page.all("h1")) == 1 and page.all("html")[0]["lang"] == "en"
    assert len(page.all("caption")) == len(page.all("table")) == 3
    assert all(th.get("scope") in ("col", "row", "rowgroup") for th in page.all("th"))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in page.all("a")} | {
        a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a
    } <= set(ids)
    assert len(page.all("a")) == len(page.all("section")) == 6


def test_parts_without_content_are_left_out(tmp_path):
    write_report(tmp_path / "r.html", "t", [], results().to_dict("records"))
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert not page.errors and page.inside("h2") == "Damage"


def test_all_rows_are_folded_away_below_the_summary(tmp_path):
    table = results()
    write_report(tmp_path / "r.html", "t", [], table)
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert f"All {len(table)} rows" in page.inside("summary")
    assert page.inside("details").count("1 2 3") == len(table)
    summary = "".join(data for path, data in page.text if "tbody" in path and "details" not in path)
    assert (
        "+1.050" in summary and "+0.900 to +1.320" in summary and "broken" in summary
    )  # mean of 1.0 and 1.1, hull of their intervals
    assert table.equals(results())


@pytest.mark.parametrize("spoil, error, words", [
    (lambda p: p.unlink(), FileNotFoundError, "p.png"),
    (lambda p: p.write_bytes(b"GIF89a"), ValueError, "p.png"),
    (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n"), ValueError, "p.png"),
])  # fmt: skip
def test_a_bad_picture_stops_the_report_and_keeps_the_old_one(tmp_path, picture, spoil, error, words):
    (tmp_path / "r.html").write_text("old")
    spoil(picture)
    with pytest.raises(error, match=words):
        write_report(tmp_path / "r.html", "t", [], results(), figures=[(picture, "c", "a")])
    assert (tmp_path / "r.html").read_text() == "old"


def test_missing_columns_are_named(tmp_path):
    for call in (results_table, lambda r: write_report(tmp_path / "r.html", "t", [], r)):
        with pytest.raises(ValueError, match="ci_low.*nats|nats.*ci_low"):
            call(results().drop(columns=["ci_low", "nats"]))
    assert not list(tmp_path.iterdir())


def test_terminal_table_says_how_many_how_much_and_how_sure():
    lines = results_table(results()).splitlines()
    start = lines.index("mean, after the first token")
    assert start < lines.index("zero, everywhere")
    rows = {line[:20].strip(): line for line in lines[start + 2 : start + 6]}
    assert list(rows) == ["unmasked", "key", "random", "all off"]
    assert rows["key"].split() == [
        "key",
        "461",
        "1.00%",
        "2",
        "+1.050",
        "+1.000",
        "to",
        "+1.100",
        "+0.900",
        "to",
        "+1.320",
        f"{np.exp(4.05):.2f}",
    ]
    assert rows["all off"].split() == [
        "all",
        "off",
        "46,080",
        "100.00%",
        "+11.000",
        "+9.900",
        "to",
        "+13.200",
        "broken",
    ]
    assert rows["unmasked"].split() == ["unmasked", "0", "0.00%", "+0.000", f"{np.exp(3):.2f}"]


def test_terminal_table_keeps_its_columns():
    table = results(condition="c" * 300, arm="an arm with a very long name indeed")
    table.loc[table.arm == "random", "broken"] = [True, False, False, False, False] * 2
    table.loc[table.arm == "all off", ["units", "damage", "ci_low", "ci_high"]] = [1_234_567, -123.4567, -130.0, -120.0]
    text = results_table(table)
    assert max(map(len, text.splitlines())) <= 110 and text.isascii()
    assert "1/5 broken" in text and "-123.457" in text
    starts = {line.index("perplexity") for line in text.splitlines() if line.startswith("  arm")}
    assert len(starts) == 1


def test_terminal_gets_no_control_characters():
    text = results_table(results(condition="\x1b[2Jc\nd", arm="\x1b]0;x\x07\rkey"))
    assert not [c for c in text if c != "\n" and ord(c) < 32]
    assert "\ufffd" not in results_table(results(condition="from\r\nanother system")), (
        "a line break of another system is a line break"
    )


def test_a_table_read_back_from_csv_says_the_same(tmp_path):
    table = results()
    table.to_csv(tmp_path / "r.csv", index=False)
    again = pd.read_csv(tmp_path / "r.csv")
    assert results_table(again) == results_table(table)
    words = again.assign(broken=again["broken"].map(str))  # the text "False" is not true
    assert results_table(words) == results_table(table)


@pytest.mark.parametrize(
    "seeds",
    [
        lambda s: s.astype("Int64"),
        lambda s: s.astype(float),
        lambda s: ["" if pd.isna(v) else str(int(v)) for v in s],
        lambda s: s,
    ],
)
def test_seeds_are_shown_as_whole_numbers_however_they_are_stored(tmp_path, seeds):
    table = results()
    table["seed"] = seeds(table["seed"])
    write_report(tmp_path / "r.html", "t", [], table, facts={"seed": pd.NA, "nan": float("nan")})
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "<NA>" not in "".join(data for _, data in page.text) and page.inside("dd") == "––"
    row = '<th scope="row">random</th><td>[^<]*</td><td>mean</td><td>all</td><td[^>]*>([^<]*)</td>'
    assert re.findall(row, (tmp_path / "r.html").read_text(encoding="utf-8")) == list("0123401234")


def test_a_row_without_condition_is_shown_too():
    table = results()
    for empty in (None, ""):
        lines = results_table(
            table.assign(condition=table["condition"].where(table.arm != "unmasked", empty))
        ).splitlines()
        assert lines[lines.index("reference") + 2].startswith("  unmasked")
