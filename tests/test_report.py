"""The report page: one file that asks for nothing, in which no text from data can become markup; the same summary as
the terminal's table."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hostile_text import EVIL
from small_runs import small_run, small_world

from llmfact_nb.show.report import headline, results_table, write_report

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
                made = {"condition": c, "replace": "mean", "positions": "all", "arm": a}
                made |= {"seed": seed if seeds > 1 else None, "units": units, "share": units / 46080}
                made |= {"value": 3 + d, "damage": d}
                made |= {"ci_low": 0.9 * d if bounds else None, "ci_high": 1.2 * d if bounds else None}
                rows.append(made | {"above_vocabulary": d > 10, "counts": "1 2 3"})
    return pd.DataFrame(rows)


def differences(condition="mean, after the first token", against="matched permuted", verdict="undecided"):
    row = {"condition": condition, "against": against, "seeds": 19, "difference": 0.021, "verdict": verdict}
    return pd.DataFrame([row | {"ci_low": -0.0801, "ci_high": 0.2, "p": 0.4}])


@pytest.fixture
def picture(tmp_path):
    fig = plt.figure(figsize=(3, 2))
    fig.savefig(tmp_path / "p.png", dpi=50)
    plt.close(fig)
    return tmp_path / "p.png"


def page_with(text, path, picture):
    "A report in which every input is `text`."
    facts = {text: {text: [text, {"x": 1}], "deep": [{text: text}]}, "none": None, "list": []}
    tables = (results(condition=text, arm=text), differences(text, text))
    networks = pd.DataFrame({text: [text], "units": [3]})
    write_report(path, text, [text, text], *tables, [(picture, text, text)], facts, networks)
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
    for where in ("title", "h1", "li", "figcaption", "dt", "dd", "th", "td"):
        assert shown in page.inside(where), where
    assert shown in page.all("img")[0]["alt"]


def test_text_that_utf8_cannot_hold_is_marked(tmp_path):
    write_report(tmp_path / "r.html", "\udc80", ["\ud800"], results(), facts={"texts": "a\udc80b"})
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.inside("h1").strip() == page.inside("li").strip() == "\ufffd"
    assert page.inside("dd").startswith("a\ufffdb") or "a\ufffdb" in page.inside("dd")


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
    assert len(page.all("caption")) == len(page.all("table")) == 4
    assert all(th.get("scope") in ("col", "row", "rowgroup") for th in page.all("th"))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in page.all("a")} | {
        a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a
    } <= set(ids)
    assert len(page.all("a")) == len(page.all("section")) == 5


def test_parts_without_content_are_left_out(tmp_path):
    write_report(tmp_path / "r.html", "t", [], results().to_dict("records"))
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert not page.errors and page.inside("h2") == "SummaryDamage"
    bare = results(arm="no key")
    write_report(tmp_path / "r.html", "t", [], bare)
    assert Page((tmp_path / "r.html").read_text(encoding="utf-8")).inside("h2") == "Damage"


def test_all_rows_are_folded_away_below_the_summary(tmp_path):
    table = results()
    write_report(tmp_path / "r.html", "t", [], table)
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert f"All {len(table)} rows" in page.inside("summary")
    assert page.inside("details").count("1 2 3") == len(table)
    summary = "".join(data for path, data in page.text if "tbody" in path and "details" not in path)
    assert "+1.05" in summary and "+0.90 to +1.32" in summary and "above vocab." in summary  # mean, hull of intervals
    assert table.equals(results())


def test_a_missing_picture_stops_the_report_and_keeps_the_old_one(tmp_path):
    (tmp_path / "r.html").write_text("old")
    with pytest.raises(FileNotFoundError) as e:
        write_report(tmp_path / "r.html", "t", [], results(), figures=[(tmp_path / "p.png", "c", "a")])
    assert "p.png" in str(e.value) and (tmp_path / "r.html").read_text() == "old"


def test_networks_without_units_are_named(tmp_path):
    said = {}
    for units in ([12, 0, 7, 0], [12, 1, 7, 2]):
        frame = pd.DataFrame({"network": range(4), "units": units})
        frame.attrs["title"] = "The networks: units beyond z = 2.844"
        write_report(tmp_path / "r.html", "t", [], results(), networks=frame)
        page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
        assert "beyond z = 2.844" in page.inside("caption")
        said[units[1]] = [text for path, text in page.text if path[-1:] == ("p",) and "1, 3" in text]
    assert len(said[0]) == 1 and not said[1]


def test_missing_columns_are_named(tmp_path):
    for call in (results_table, lambda r: write_report(tmp_path / "r.html", "t", [], r)):
        with pytest.raises(ValueError) as e:
            call(results().drop(columns=["ci_low", "value"]))
        assert all(column in str(e.value) for column in ("ci_low", "value"))
    assert not list(tmp_path.iterdir())


def test_terminal_table_says_how_many_how_much_and_how_sure():
    lines = results_table(results()).splitlines()
    start = lines.index("mean, after the first token")
    assert start < lines.index("zero, everywhere")
    rows = {line[:20].strip(): line for line in lines[start + 2 : start + 6]}
    assert list(rows) == ["unmasked", "key", "random", "all off"]
    said = {name: rows[name].split() for name in rows}
    ends = ["+1.05", "+1.00", "to", "+1.10", "+0.90", "to", "+1.32"]
    assert said["key"] == ["key", "461", "1.00%", "2", *ends, f"{np.exp(4.05):.2f}"]
    off = ["+11.00", "+9.90", "to", "+13.20", "above", "vocab."]
    assert said["all off"] == ["all", "off", "46,080", "100.00%", *off]
    assert said["unmasked"] == ["unmasked", "0", "0.00%", "+0.000", f"{np.exp(3):.2f}"]


def test_two_sentences_say_what_was_found_and_how_sure_it_is(tmp_path):
    found, sure = headline(results(), differences())
    assert all(part in found for part in ("461 key neurons", "1.0%", "1.05", "0.90 to", "5 draws"))
    assert "undecided" in sure and "-0.08 to +0.20" in sure and "19 draws of matched permuted" in sure
    above = headline(results(), differences(verdict="above"))[1]
    assert above != sure and "undecided" not in above
    without = [headline(results())[1], headline(results(), differences(condition="another"))[1]]
    assert all("undecided" in text for text in without), "what was not compared is not decided"
    assert headline(results(arm="PCA")) == []
    assert results_table(results(), differences()).splitlines()[:2] == [found, sure]
    write_report(tmp_path / "r.html", "t", ["the fit"], results(), differences())
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.inside("main").split("Summary")[1].strip().startswith(found)
    assert "matched permuted" in page.inside("tbody")


def test_conditions_are_worded_from_what_was_done():
    table = results().assign(condition=None)
    table = table.drop(columns="condition").assign(positions="after-first")
    assert "mean, after the first token" in results_table(table).splitlines()


def test_terminal_table_keeps_its_columns():
    table = results(condition="c" * 300, arm="an arm with a very long name indeed")
    table.loc[table.arm == "random", "above_vocabulary"] = [True, False, False, False, False] * 2
    table.loc[table.arm == "all off", ["units", "damage", "ci_low", "ci_high"]] = [1_234_567, -123.4567, -130.0, -120.0]
    text = results_table(table)
    assert max(map(len, text.splitlines())) <= 115 and text.isascii()
    assert "1/5 above vocab." in text and "-123.46" in text
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
    words = again.assign(above_vocabulary=again["above_vocabulary"].map(str))  # the text "False" is not true
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
    assert "<NA>" not in "".join(data for _, data in page.text) and page.inside("dd").count("–") == 2
    row = '<th scope="row">random</th><td>[^<]*</td><td>mean</td><td>all</td><td[^>]*>([^<]*)</td>'
    assert re.findall(row, (tmp_path / "r.html").read_text(encoding="utf-8")) == list("0123401234")


def test_a_row_without_condition_is_shown_too():
    table = results()
    for empty in (None, ""):
        lines = results_table(
            table.assign(condition=table["condition"].where(table.arm != "unmasked", empty))
        ).splitlines()
        assert lines[lines.index("reference") + 2].startswith("  unmasked")


@pytest.mark.parametrize("cut", [{"fraction": None, "alpha": 2.2345, "tail": "both"}, {"fraction": 0.05}])
def test_one_threshold_with_its_digits_in_csv_report_and_page(tmp_path, cut):
    out = tmp_path / "run"
    run = small_run(small_world(tmp_path), out, **cut)
    alpha = run.found.networks.at_alpha(run.found.threshold).alpha
    digits, networks = f"{alpha:.3f}", pd.read_csv(out / "networks.csv")
    assert networks["units"].tolist() == [mask.n for mask in run.found.network_masks()]
    report = Page((out / "report.html").read_text(encoding="utf-8"))
    assert f"The networks: units beyond {digits}" in report.inside("caption") and digits in report.inside("figcaption")
    page = (out / "networks.html").read_text(encoding="utf-8")
    assert f"Units beyond {digits}" in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    either = data["own"]["tail"] == "both"
    passing = lambda z: (abs(z) if either else z) / 1000 >= data["own"]["at"] - 1e-9
    assert [sum(map(passing, of["z"])) for of in data["networks"]] == networks["units"].tolist()
    in_report = re.findall(r'<th scope="row">(\d)</th><td class="number">(\d+)</td>', (out / "report.html").read_text())
    assert [int(n) for _, n in in_report[-3:]] == networks["units"].tolist()
