"""The interactive page of networks: it shows the numbers of the fit, works by mouse and keyboard in a real browser
without a single request, and no token can become markup."""

import base64
import copy
import hashlib
import json
import re
from html.parser import HTMLParser

import pandas as pd
import pytest
import torch
from browser import overflow
from hostile_text import EVIL

from llmfact_nb.activations import Activations
from llmfact_nb.across.group import GroupICA
from llmfact_nb.base.arguments import ArgumentError
from llmfact_nb.show.network_page import context, token_pieces, whole_words, write_network_page
from llmfact_nb.masks import Layout
from llmfact_nb.networks import FunctionalNetworks, Threshold, gaussian_union, z_scores

pytest_plugins = ["browser"]  # the fixture chromium: two Playwrights do not run in one process
WIDTHS, DEPTHS = (150, 100), (2, 5)
EVIL = [*EVIL, "\ud800"]  # a lone surrogate, which tokenizers may give
WORDS = [" the", " city", " river", "ing"]


def planted(seed=0, k=4, n_tokens=240):
    """Activations of four networks, as in the notebook: heavy-tailed courses, twelve units each, sink tokens at the
    head of each of three texts."""
    g = torch.Generator().manual_seed(seed)
    n = sum(WIDTHS)
    maps = torch.zeros(k, n).scatter_(1, torch.randperm(n, generator=g)[: 12 * k].view(k, 12), 1.0)
    courses = torch.distributions.Laplace(0.0, 1.0).icdf(torch.rand(n_tokens, k, generator=g).clamp(1e-4, 1 - 1e-4))
    values = courses @ maps + 0.3 * torch.randn(n_tokens, n, generator=g)
    positions = torch.arange(n_tokens) % (n_tokens // 3)
    values[positions == 0] += 300 * torch.randn(3, n, generator=g)
    tokens = torch.randint(len(EVIL) + len(WORDS), (n_tokens,), generator=g)
    return Activations(
        values,
        torch.arange(n_tokens) // (n_tokens // 3),
        positions,
        tokens,
        positions == 0,
        WIDTHS,
        DEPTHS,
        "mlp_hidden",
        "<b>tiny</b>",
    )


class Hostile:
    "A tokenizer whose vocabulary is an attack."

    def decode(self, ids):
        return "".join((EVIL + WORDS)[i] for i in ids)


@pytest.fixture(scope="module")
def fitted():
    acts = planted()
    return FunctionalNetworks(4, exclude="sinks", n_init=3).fit(acts), acts


@pytest.fixture(scope="module")
def written(fitted, tmp_path_factory):
    networks, acts = fitted
    return write_network_page(networks, tmp_path_factory.mktemp("page") / "networks.html", acts, Hostile())


def data_of(path):
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)[
            1
        ]
    )


def rules_of(path):
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', path.read_text(encoding="utf-8"))[1]
    return dict(rule.strip().split(" ", 1) for rule in policy.split(";"))


def units_of(network):
    return torch.tensor(network["steps"]).cumsum(0), torch.tensor(network["z"]) / 1000


@pytest.mark.parametrize("threshold", [None, Threshold(2.5004), Threshold(3.6, tail="raw"), Threshold(fraction=0.02)])
def test_the_page_counts_exactly_the_units_of_the_networks(fitted, tmp_path, threshold):
    networks, _ = fitted
    data = data_of(write_network_page(networks, tmp_path / "p.html", threshold=threshold))
    assert data["widths"] == list(WIDTHS) and data["depths"] == list(DEPTHS) and data["floor"] == 1.9
    asked = threshold or Threshold(fraction=0.01)
    cut, own = networks.at_alpha(asked), data["own"]
    assert own["text"] == f"{cut.alpha:.3f}" and own["at"] <= cut.alpha < own["at"] + 0.001
    turn = networks.sign_ if cut.tail == "raw" else torch.ones(4)
    for network, row, mask in zip(data["networks"], networks.maps_ * turn[:, None], networks.masks(threshold=asked)):
        units, z = units_of(network)
        assert units.tolist() == (row.abs() >= 1.9).nonzero()[:, 0].tolist()
        assert (z.abs() <= row[units].abs() + 1e-6).all() and (row[units] - z).abs().max() < 0.0021
        passing = units[(z.abs() if own["tail"] == "both" else z) >= own["at"] - 1e-9]
        assert passing.tolist() == mask.flat.nonzero()[:, 0].tolist()
    assert [network["stability"] for network in data["networks"]] == [round(float(s), 3) for s in networks.stability_]
    assert data["gaussian"][17] == pytest.approx(gaussian_union(1, 3.6))
    assert own["gaussian"] == pytest.approx(gaussian_union(1, cut.alpha))


def test_shares_of_untrained_models_stand_in_the_table_if_they_are_given(fitted, written, tmp_path):
    networks, acts = fitted
    beside = pd.DataFrame({"network": range(4), "r": [0.91, 0.82, 0.73, 0.64], "permuted": [0.015, 0.13, 0.57, 0.88]})
    page = write_network_page(networks, tmp_path / "p.html", acts, Hostile(), untrained=beside)
    rows = lambda path: re.findall(r"<tr>.*?</tr>", path.read_text(encoding="utf-8"), re.S)
    added = [new for old, new in zip(rows(written), rows(page)) if old != new]
    assert len(added) == 5 and all(f"{share:.0%}" in row for share, row in zip(beside.permuted, added[1:]))
    with pytest.raises(ArgumentError) as e:
        write_network_page(networks, tmp_path / "p.html", acts, Hostile(), untrained=beside[:2])
    assert e.value.argument == "untrained"


def test_strongest_tokens_are_those_of_the_time_course_and_sinks_stand_apart(fitted, written):
    networks, acts = fitted
    courses = networks.transform(acts)
    ordinary = courses[~acts.sinks]
    courses = (courses - ordinary.mean(0)) / ordinary.std(0, correction=0)
    for i, network in enumerate(data_of(written)["networks"]):
        free, sunk = [t for t in network["strongest"] if not t["sink"]], [t for t in network["strongest"] if t["sink"]]
        expected = sorted((~acts.sinks).nonzero()[:, 0].tolist(), key=lambda t: -float(courses[t, i]))[:12]
        assert [t["row"] for t in free] == expected and [t["z"] for t in free] == pytest.approx(
            [float(courses[t, i]) for t in expected], abs=0.02
        )
        assert sorted(t["row"] for t in sunk) == [0, 80, 160]
        assert all(t["text"] == t["row"] // 80 for t in network["strongest"])
        assert all(t["before"] == "" for t in sunk)  # a text's first token has no words of the text before it


def test_texts_on_the_page_are_whole_and_in_order(fitted, tmp_path):
    networks, acts = fitted
    texts = data_of(write_network_page(networks, tmp_path / "p.html", acts, None, max_tokens=160))["texts"]
    assert [(t["text"], t["row"], len(t["tokens"]), t["cut"], t["sinks"]) for t in texts] == [
        (0, 0, 80, 0, [0]),
        (1, 80, 80, 0, [0]),
    ]
    assert texts[1]["tokens"] == [f" #{t}" for t in acts.token_ids[80:160].tolist()]
    cut = data_of(write_network_page(networks, tmp_path / "p.html", acts, None, max_tokens=30))["texts"]
    assert [(len(t["tokens"]), t["cut"]) for t in cut] == [(30, 50)]
    courses = networks.transform(acts)
    courses = (courses - courses[~acts.sinks].mean(0)) / courses[~acts.sinks].std(0, correction=0)
    assert torch.tensor(texts[1]["courses"]).div(10).sub(courses[80:160].T).abs().max() < 0.06


def test_pieces_joined_are_the_text(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    ids = torch.tensor(tokenizer(" ".join(sorted(tokenizer.get_vocab())[5:25]))["input_ids"])
    assert "".join(token_pieces(tokenizer, ids)) == tokenizer.decode(ids.tolist())
    twice = token_pieces(tokenizer, ids.repeat(2), torch.arange(2).repeat_interleave(len(ids)))
    assert twice[len(ids) :] == token_pieces(tokenizer, ids)  # a text begins anew


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, *(k for k, v in attrs)))

    def handle_comment(self, data):
        self.tags.append(("comment", data))


class One:
    "A tokenizer with one word."

    def __init__(self, word):
        self.word = word

    def decode(self, ids):
        return self.word * len(ids)


def test_text_from_data_never_becomes_markup(fitted, tmp_path):
    networks, acts = fitted
    networks = copy.copy(networks)

    def page(word):
        networks.model = word
        path = write_network_page(networks, tmp_path / "p.html", acts, One(word), title=word)
        return Tags(path.read_text(encoding="utf-8")).tags, data_of(path)["texts"][0]["tokens"][0]

    harmless, _ = page("harmless")
    for word in EVIL:
        tags, token = page(word)
        assert tags == harmless, word
        assert token == re.sub("[\x00\x1b\x9b\u202e\ud800]", "\ufffd", word.replace("\r\n", "\n"))


def test_contexts_are_cut_between_words():
    pieces = [" The", " riv", "er", " rises", " in", " the", " hil", "ls", " near", " Bo", "log", "na", " and", " flo"]
    before, after = context([*pieces, "ws", " on", " and", " on", "ward", "s"], [0] * 20, 12)
    assert before == " rises in the hills near Bologna" and after == " flows on and"
    assert context(pieces, [0] * 7 + [1] * 7, 7) == ("", " near Bologna and flo")
    long = [f" {letter * 30}" for letter in "abcdefghijklmnopqrst"]  # more than there is room for
    before, after = context(long, [0] * 20, 12)
    assert {*before.split(), *after.split()} <= {piece.strip() for piece in long}
    assert 60 < len(before) <= 120 and 40 < len(after) <= 80
    assert whole_words("漢" * 99, 20) == "漢" * 20 and whole_words("漢" * 99, 20, end=True) == "漢" * 20


def test_the_policy_lets_this_script_run_and_nothing_else(fitted, written, tmp_path):
    text, rules = written.read_text(encoding="utf-8"), rules_of(written)
    script = re.search(r"<script>(.*?)</script>\s*</body>", text, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules["default-src"] == "'none'" and rules["script-src"] == f"'sha256-{digest}'"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)
    bare = write_network_page(fitted[0], tmp_path / "p.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)", bare)


def large(k: int) -> FunctionalNetworks:
    "Networks as large as those of the default model, with Gaussian maps."
    g = torch.Generator().manual_seed(0)
    networks = copy.copy(FunctionalNetworks(4, exclude="sinks").fit(planted()))
    networks.maps_, networks.layout = z_scores(torch.randn(k, 30 * 1536, generator=g)), Layout((1536,) * 30)
    networks.sign_, networks.stability_ = torch.ones(k), torch.ones(k)
    return networks


def test_a_page_of_32_networks_and_2000_tokens_is_small(tmp_path):
    acts = planted(n_tokens=2001)
    courses = torch.randn(2001, 32, generator=torch.Generator().manual_seed(0))
    path = write_network_page(large(32), tmp_path / "p.html", acts, courses=courses)
    assert path.stat().st_size < 1.7e6
    more = write_network_page(large(128), tmp_path / "q.html")
    assert more.stat().st_size < 1.7e6 and data_of(more)["floor"] > 1.9  # the floor rises instead


def test_a_refused_page_keeps_the_old_one(fitted, tmp_path):
    networks, acts = fitted
    path = tmp_path / "p.html"
    path.write_text("old")
    broken = copy.copy(networks)
    broken.maps_ = networks.maps_ * torch.nan
    infinite = torch.full((acts.n_tokens, 4), torch.inf)
    for args, of in (
        ((broken,), {"threshold": Threshold(2.0)}),
        ((FunctionalNetworks(3),), {}),
        ((networks,), {"tokenizer": Hostile()}),
        ((networks,), {"activations": acts, "courses": torch.zeros(3, 4)}),
        ((networks,), {"activations": acts, "courses": infinite}),
        ((networks,), {"max_tokens": 0}),
        ((large(128),), {"threshold": Threshold(1.0)}),
    ):
        with pytest.raises(ValueError):
            write_network_page(args[0], path, **of)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_networks_of_texts_centred_one_by_one_take_their_own_courses(tmp_path):
    acts = planted(seed=1)
    networks = GroupICA(4, exclude="sinks", center_texts=True).fit([acts]).networks()
    with pytest.raises(ValueError):
        write_network_page(networks, tmp_path / "p.html", acts)
    courses = torch.randn(acts.n_tokens, 4, generator=torch.Generator().manual_seed(0))
    assert data_of(write_network_page(networks, tmp_path / "p.html", acts, courses=courses))["texts"]


# In a browser.


@pytest.fixture(scope="module")
def opens(chromium):
    """Function (path, width) -> a page without a network; `wrong` collects every console message, dialog and request
    for anything but the page itself. One for all tests: pages are slow to open."""
    wrong, contexts = [], []

    def opened(path, width=1200):
        tab = chromium.new_context(viewport={"width": width, "height": 800}, offline=True)
        contexts.append(tab)
        page = tab.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda m: wrong.append(f"console {m.type}: {m.text}"))
        page.on("pageerror", lambda e: wrong.append(f"error {e}"))
        page.on("dialog", lambda d: (wrong.append(f"dialog {d.message}"), d.dismiss()))
        page.on("request", lambda r: r.url == path.as_uri() or wrong.append(f"request {r.url}"))
        page.goto(path.as_uri())
        return page

    opened.wrong = wrong
    yield opened
    for opened_one in contexts:
        opened_one.close()


@pytest.fixture
def shown(opens, written):
    "The page, freshly loaded in the one tab that these tests share."
    if not hasattr(opens, "tab"):
        opens.tab = opens(written)
    else:
        opens.tab.goto("about:blank")
        opens.tab.goto(written.as_uri())
    opens.wrong[:] = [w for w in opens.wrong if w != "request about:blank"]
    yield opens.tab
    assert opens.wrong == []


FIRST = "choose(0)"  # the page opens on a network with units; these tests begin with the first


def look(page, *wanted):
    "The text of elements, in one go."
    return page.evaluate("ids => ids.map(id => document.getElementById(id).textContent)", list(wanted))


def test_it_opens_on_a_network_that_has_units_at_the_threshold_with_its_digits(shown, fitted):
    networks, acts = fitted
    name, summary, union = look(shown, "name", "summary", "union")
    top, masks = Threshold(fraction=0.01), networks.masks(threshold=Threshold(fraction=0.01))
    first = next(i for i, mask in enumerate(masks) if mask.n)
    text = f"{networks.implied_alpha(0.01):.3f}"
    assert name == f"Network {first}" and f"{masks[first].n} of 250 units beyond {text}" in summary
    assert f"stability {networks.stability_[first]:.2f}" in summary
    assert f"{networks.key_neurons(threshold=top).n} units" in union and look(shown, "alpha-value") == [text]
    assert shown.locator("input[name=network]").count() == 4
    assert shown.locator("#tokens tbody tr").count() == 15 and shown.locator("#tokens .badge").count() == 3
    assert shown.locator("#words .sink").count() == 1 and shown.locator("#words > span").count() == 80
    assert shown.evaluate("[...document.querySelectorAll('svg[role=img]')].every(s => s.getAttribute('aria-label'))")


def test_another_network_by_keyboard_button_and_link(shown):
    shown.evaluate(FIRST)
    everything = "() => ['name', 'map', 'tokens', 'words', 'units'].map(id => document.getElementById(id).innerHTML)"
    first = shown.evaluate(everything)
    shown.locator("input[name=network]").first.focus()
    shown.keyboard.press("ArrowDown")
    second = shown.evaluate(everything)
    assert all(a != b for a, b in zip(first, second)) and look(shown, "name") == ["Network 1"]
    shown.locator("#next").click()
    assert (
        look(shown, "name") == ["Network 2"]
        and shown.evaluate("document.querySelector('input[name=network]:checked').value") == "2"
    )
    shown.locator("#previous").click()
    assert shown.evaluate(everything) == second
    near = shown.locator("#near tbody button").first
    other = near.text_content()
    near.click()
    assert look(shown, "name") == [f"Network {other}"]


def test_the_threshold_counts_as_the_library_does(shown, fitted):
    shown.evaluate(FIRST)
    networks, _ = fitted
    for alpha, tail in ((2.2, "both"), (3.0, "positive"), (1.9, "both")):
        shown.select_option("#tail", tail)
        shown.locator("#alpha").fill(str(alpha))
        summary, union = look(shown, "summary", "union")
        key = networks.key_neurons(alpha=alpha, tail=tail)
        assert (
            f"{networks.masks(alpha, tail)[0].n} of 250 units" in summary
            and f"hold {key.n} units ({100 * key.n / 250:.3g}" in union
        )
        assert float(re.search(r"noise would hold ([\d.]+)", union)[1]) == pytest.approx(
            100 * networks.expected_null(alpha, tail), rel=0.05
        )
    shown.locator("#own").click()
    assert look(shown, "alpha-value") == [f"{networks.implied_alpha(0.01):.3f}"]


def test_a_text_is_read_by_mouse_and_keyboard(shown, fitted):
    shown.evaluate(FIRST)
    networks, acts = fitted
    courses = networks.transform(acts)
    z = (courses - courses[~acts.sinks].mean(0)) / courses[~acts.sinks].std(0, correction=0)
    value = lambda: float(re.search(r"”: (-?[\d.]+) SD", look(shown, "readout")[0])[1])
    shown.select_option("#text", "1")
    shown.locator("#words").focus()
    shown.keyboard.press("ArrowRight")
    assert value() == pytest.approx(float(z[80, 0]), abs=0.06) and "sink" in look(shown, "readout")[0]
    shown.keyboard.press("ArrowRight")
    assert value() == pytest.approx(float(z[81, 0]), abs=0.06) and "sink" not in look(shown, "readout")[0]
    shown.keyboard.press("End")
    assert value() == pytest.approx(float(z[159, 0]), abs=0.06)
    shown.locator("#words > span").nth(5).hover()
    assert value() == pytest.approx(float(z[85, 0]), abs=0.06)
    strongest = int(z[~acts.sinks, 0].argmax())
    row = (~acts.sinks).nonzero()[:, 0][strongest]
    shown.locator("#tokens tbody button").first.click()
    assert value() == pytest.approx(float(z[row, 0]), abs=0.06) and shown.locator("#text").input_value() == str(
        int(acts.text_ids[row])
    )


def test_hostile_tokens_stay_text(shown, opens):
    assert shown.evaluate("document.querySelectorAll('img, iframe, main script').length") == 0
    words = look(shown, "words")[0]
    assert [w for w in EVIL if len(w) > 5 and w.isascii() and w.isprintable() and w in words]
    assert shown.evaluate("document.title") == "Functional networks of <b>tiny</b>" and opens.wrong == []


def test_an_empty_network_is_called_empty_and_the_page_opens_on_one_with_units(opens, fitted, tmp_path):
    networks = copy.copy(fitted[0])
    networks.maps_ = networks.maps_.clone()
    networks.maps_[[0, 2]] = networks.maps_[[0, 2]].clamp(-1, 1)
    path = write_network_page(networks, tmp_path / "p.html", threshold=Threshold(2.5, tail="both"))
    tab = opens(path)
    assert look(tab, "name") == ["Network 1"]
    assert "2 of them have no unit beyond 2.500" in tab.locator("header").inner_text()
    table = tab.locator("table.all tbody tr").all_inner_texts()
    assert [row.split("\t")[1] for row in table].count("none") == 2 and "none" in table[0]
    tab.evaluate(FIRST)
    assert "No unit" in look(tab, "summary")[0] and opens.wrong == []
    tab.close()


CUT = """[...document.querySelectorAll('body *')].filter(e => {
  if (!e.getClientRects().length || e.closest('svg, option')) return false;
  const box = e.getBoundingClientRect(), look = getComputedStyle(e);
  return box.right > innerWidth + 0.5 || box.left < -0.5
    || (look.overflowX !== 'visible' && e.scrollWidth > e.clientWidth + 1);
}).map(e => `${e.tagName} ${e.id || e.className}: ${e.textContent.slice(0, 30)}`)"""


BROKEN = """(() => { const broken = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walk.nextNode();) for (const word of node.data.matchAll(/\\b[A-Za-z]{2,15}\\b/g)) {
    const range = document.createRange();
    range.setStart(node, word.index); range.setEnd(node, word.index + word[0].length);
    if (new Set([...range.getClientRects()].map(r => Math.round(r.top))).size > 1) broken.push(word[0]);
  }
  return broken })()"""


def test_on_a_phone_nothing_is_cut_nothing_off_screen_and_no_word_broken(opens, written, fitted, tmp_path):
    networks, acts = fitted
    wordy = One(" internationalisation-of-the-river")
    long = write_network_page(networks, tmp_path / "p.html", acts, wordy, title="a/rather-long-name-0.1B-instruct")
    for path in (long, written):
        tab = opens(path, 390)
        for i in (0, 1, 3):
            tab.evaluate(f"choose({i})")
            assert overflow(tab) <= 0 and tab.evaluate(CUT) == []
        if path == long:
            assert tab.evaluate(BROKEN) == []
            contexts = tab.locator("#tokens .context bdi").all_inner_texts()
            assert len(contexts) > 9 and all(set(text.split()) <= {wordy.word.strip()} for text in contexts)
            tab.add_style_tag(content="#summary { width: 3rem; overflow-wrap: anywhere } #tokens { min-width: 600px }")
            assert tab.evaluate(CUT) and tab.evaluate(BROKEN), "the test sees what is wrong"
        tab.close()


def test_nothing_sticks_out_on_a_narrow_screen(opens, written, fitted, tmp_path):
    tab = opens(written, width=320)
    assert overflow(tab) <= 0
    tab.close()
    maps_only = opens(write_network_page(fitted[0], tmp_path / "maps.html", title="maps"), width=320)
    assert overflow(maps_only) <= 0 and maps_only.evaluate("document.getElementById('reading').hidden")
    assert maps_only.locator("#near tbody tr").count() == 3
    assert opens.wrong == []
