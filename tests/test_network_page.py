"""The interactive page of networks: it shows the numbers of the fit, works by mouse and keyboard in a real browser without a single request, and no token can become markup."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from browser import overflow

from llmfact_nb.activations import Activations
from llmfact_nb.across.group import GroupICA
from llmfact_nb.show.network_page import token_pieces, write_network_page
from llmfact_nb.networks import FunctionalNetworks, gaussian_union, z_scores

pytest_plugins = ["browser"]  # the fixture chromium: two Playwrights do not run in one process
WIDTHS, DEPTHS = (150, 100), (2, 5)
EVIL = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</script><script>alert(1)</script>", '"><svg onload=alert(1)>', "' onmouseover='alert(1)", "<!-- <script>", "]]>",
    "&lt;b&gt;", "$title ${data} $$", "\u2028\u2029", "\n", "\\u003cb\\u003e", "</title></style>", "\x00\x1b[2J", "\u202eabc", "\ud800", "\r\n", "w" * 90,
]  # fmt: skip
WORDS = [" the", " city", " river", "ing"]


def planted(seed=0, k=4, n_tokens=240):
    "Activations of four networks, as in the notebook: heavy-tailed courses, twelve units each, sink tokens at the head of each of three texts."
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
    return networks.to_html(tmp_path_factory.mktemp("page") / "networks.html", acts, Hostile())


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
    return torch.tensor(network["steps"]).cumsum(0), torch.tensor(network["z"]) / 100


def test_the_page_holds_the_units_that_stand_out(fitted, written):
    networks, _ = fitted
    data = data_of(written)
    assert data["widths"] == list(WIDTHS) and data["depths"] == list(DEPTHS) and data["floor"] == 1.9
    for network, row in zip(data["networks"], networks.maps_):
        units, z = units_of(network)
        assert units.tolist() == (row.abs() >= 1.9).nonzero()[:, 0].tolist()
        assert (z.abs() <= row[units].abs() + 1e-6).all() and (row[units] - z).abs().max() < 0.0101
    for alpha, tail in ((1.9, "both"), (2.5, "positive"), (3.6, "positive")):
        for network, mask in zip(data["networks"], networks.masks(alpha, tail)):
            units, z = units_of(network)
            assert int(((z.abs() if tail == "both" else z) >= alpha).sum()) == mask.n
    assert [network["stability"] for network in data["networks"]] == [round(float(s), 3) for s in networks.stability_]
    assert data["gaussian"][17] == pytest.approx(gaussian_union(1, 3.6)) and data["key"]["alpha"] == pytest.approx(
        networks.implied_alpha(0.01)
    )


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
    texts = data_of(networks.to_html(tmp_path / "p.html", acts, None, max_tokens=160))["texts"]
    assert [(t["text"], t["row"], len(t["tokens"]), t["cut"], t["sinks"]) for t in texts] == [
        (0, 0, 80, 0, [0]),
        (1, 80, 80, 0, [0]),
    ]
    assert texts[1]["tokens"] == [f" #{t}" for t in acts.token_ids[80:160].tolist()]
    cut = data_of(networks.to_html(tmp_path / "p.html", acts, None, max_tokens=30))["texts"]
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


def test_text_from_data_never_becomes_markup(tmp_path):
    def page(word):
        maps, courses = torch.arange(12.0).view(2, 6), torch.arange(6.0).view(3, 2)
        path = write_network_page(
            tmp_path / "p.html", maps, [2, 4], courses=courses, tokens=[word] * 3, title=word, facts={word: word}
        )
        return Tags(path.read_text(encoding="utf-8")).tags, data_of(path)["texts"][0]["tokens"][0]

    harmless, _ = page("harmless")
    for word in EVIL:
        tags, token = page(word)
        assert tags == harmless, word
        assert token == re.sub("[\x00\x1b\u202e\ud800]", "\ufffd", word.replace("\r\n", "\n"))


def test_the_policy_lets_this_script_run_and_nothing_else(written, tmp_path):
    text, rules = written.read_text(encoding="utf-8"), rules_of(written)
    script = re.search(r"<script>(.*?)</script>\s*</body>", text, re.S)[1]
    assert (
        rules["default-src"] == "'none'"
        and rules["script-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    )
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)
    bare = write_network_page(tmp_path / "p.html", torch.arange(6.0).view(2, 3), [3]).read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)", bare)


def test_a_page_of_32_networks_and_2000_tokens_is_small(tmp_path):
    g = torch.Generator().manual_seed(0)
    maps, courses = z_scores(torch.randn(32, 30 * 1536, generator=g)), torch.randn(2000, 32, generator=g)
    path = write_network_page(tmp_path / "p.html", maps, [1536] * 30, courses=courses, tokens=[" token"] * 2000)
    assert path.stat().st_size < 1.5e6
    more = write_network_page(tmp_path / "q.html", maps.repeat(4, 1), [1536] * 30)
    assert more.stat().st_size < 1.5e6 and data_of(more)["floor"] > 1.9  # the floor rises instead


def test_a_refused_page_keeps_the_old_one(fitted, tmp_path):
    networks, acts = fitted
    path = tmp_path / "p.html"
    path.write_text("old")
    good = dict(maps=networks.maps_, widths=WIDTHS, courses=torch.zeros(3, 4), tokens=["a", "b", "c"])
    for changes, words in (
        ({"widths": (150, 99)}, r"maps has shape \(4, 250\)"), ({"maps": networks.maps_ * torch.nan}, "nan or infinite"), ({"tokens": None}, "belong together"),
        ({"tokens": ["a"]}, "1 tokens"), ({"sinks": torch.zeros(2, dtype=torch.bool)}, "sinks"), ({"stability": [1.0]}, "stability has 1"), ({"alpha": 1.0}, "alpha=1.0"),
        ({"courses": torch.full((3, 4), torch.inf)}, "courses"), ({"max_tokens": 0}, "max_tokens=0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            write_network_page(path, **(good | changes))
    with pytest.raises(ValueError, match="not fitted"):
        FunctionalNetworks(3).to_html(path)
    with pytest.raises(ValueError, match="activations"):
        networks.to_html(path, tokenizer=Hostile())
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_networks_of_texts_centred_one_by_one_take_their_own_courses(tmp_path):
    acts = planted(seed=1)
    group = GroupICA(4, exclude="sinks", center_texts=True).fit([acts])
    networks = FunctionalNetworks.from_group(group)
    with pytest.raises(ValueError, match="GroupICA.transform"):
        networks.to_html(tmp_path / "p.html", acts)
    networks.to_html(
        tmp_path / "p.html", acts, courses=torch.randn(acts.n_tokens, 4, generator=torch.Generator().manual_seed(0))
    )
    assert data_of(tmp_path / "p.html")["texts"]


# In a browser.


@pytest.fixture(scope="module")
def opens(chromium):
    "Function (path, width) -> a page without a network; `wrong` collects every console message, dialog and request for anything but the page itself. One for all tests: pages are slow to open."
    wrong, contexts = [], []

    def opened(path, width=1200):
        context = chromium.new_context(viewport={"width": width, "height": 800}, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda m: wrong.append(f"console {m.type}: {m.text}"))
        page.on("pageerror", lambda e: wrong.append(f"error {e}"))
        page.on("dialog", lambda d: (wrong.append(f"dialog {d.message}"), d.dismiss()))
        page.on("request", lambda r: r.url == path.as_uri() or wrong.append(f"request {r.url}"))
        page.goto(path.as_uri())
        return page

    opened.wrong = wrong
    yield opened
    for context in contexts:
        context.close()


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


def look(page, *wanted):
    "The text of elements, in one go."
    return page.evaluate("ids => ids.map(id => document.getElementById(id).textContent)", list(wanted))


def test_it_loads_and_shows_the_first_network(shown, fitted):
    networks, acts = fitted
    name, summary, union = look(shown, "name", "summary", "union")
    data_alpha = float(shown.evaluate("data.alpha"))
    assert (
        name == "Network 0"
        and f"{networks.masks(data_alpha)[0].n} of 250 units beyond {data_alpha:.1f}" in summary
        and f"stability {networks.stability_[0]:.2f}" in summary
    )
    assert f"{networks.key_neurons(alpha=data_alpha).n} units" in union
    assert shown.locator("input[name=network]").count() == 4
    assert shown.locator("#tokens tbody tr").count() == 15 and shown.locator("#tokens .badge").count() == 3
    assert shown.locator("#words .sink").count() == 1 and shown.locator("#words > span").count() == 80
    assert shown.evaluate("[...document.querySelectorAll('svg[role=img]')].every(s => s.getAttribute('aria-label'))")


def test_another_network_by_keyboard_button_and_link(shown):
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
    shown.locator("#key").click()
    assert float(shown.locator("#alpha").input_value()) == pytest.approx(networks.implied_alpha(0.01), abs=0.051)


def test_a_text_is_read_by_mouse_and_keyboard(shown, fitted):
    networks, acts = fitted
    courses = networks.transform(acts)
    z = (courses - courses[~acts.sinks].mean(0)) / courses[~acts.sinks].std(0, correction=0)
    value = lambda: float(re.search(r"”: (-?[\d.]+) sd", look(shown, "readout")[0])[1])
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


def test_nothing_sticks_out_on_a_narrow_screen(opens, written, fitted, tmp_path):
    tab = opens(written, width=320)
    assert overflow(tab) <= 0
    tab.close()
    maps_only = opens(fitted[0].to_html(tmp_path / "maps.html", title="maps"), width=320)
    assert overflow(maps_only) <= 0 and maps_only.evaluate("document.getElementById('reading').hidden")
    assert look(maps_only, "name") == ["Network 0"] and maps_only.locator("#near tbody tr").count() == 3
    assert opens.wrong == []
