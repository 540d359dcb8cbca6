"""What a notebook shows of an object: true facts, one picture that is well-formed and harmless, at once, whatever
state the object is in."""

import inspect
import time
from xml.etree import ElementTree

import pytest
import torch

from llmfact_nb.activations import Activations
from llmfact_nb.base.display import bars, card, dots, plain_text
from llmfact_nb.masked_model import MaskedModel
from llmfact_nb.masks import Layout, NeuronMask
from llmfact_nb.networks import FunctionalNetworks

EVIL = "</b><script>alert(1)</script><img src=x onerror=alert(1)>\u202e"


def activations(n_tokens=60, model="model", n_texts=3):
    g = torch.Generator().manual_seed(0)
    positions = torch.arange(n_tokens) % (n_tokens // n_texts)
    values = torch.distributions.Laplace(0.0, 1.0).icdf(torch.rand(n_tokens, 12, generator=g).clamp(1e-4, 1 - 1e-4))
    return Activations(
        values,
        torch.arange(n_tokens) // (n_tokens // n_texts),
        positions,
        torch.zeros(n_tokens).long(),
        positions == 0,
        (4, 8),
        (3, 7),
        "mlp_hidden",
        model,
        2,
    )


def parsed(markup):
    """The card as a tree; fails unless it is well formed and holds nothing but plain, inert elements in the reader's
    own colour."""
    tree = ElementTree.fromstring(markup.replace("&ensp;", " "))
    assert {e.tag for e in tree.iter()} <= {"div", "b", "svg", "rect", "circle", "path", "title"}
    names = {k for e in tree.iter() for k in e.attrib}
    assert not names & {"id", "class", "href", "src"} and not [k for k in names if k.startswith("on")]
    colours = {e.get(k) for e in tree.iter() for k in ("fill", "stroke", "color") if e.get(k)}
    assert colours <= {"currentColor"} and "#" not in "".join(e.get("style", "") for e in tree.iter())
    assert all(e.get("aria-label") for e in tree.iter("svg"))
    return tree


def heights(tree):
    return [float(e.get("height")) for e in tree.iter("rect") if e.get("opacity") == ".75"]


def said(tree):
    return "".join(tree.itertext())


def test_a_mask_shows_its_counts():
    mask = NeuronMask.from_layers(
        [[True, False, False], [True, True, False], [False] * 4], site=("a", "b", EVIL), depths=(2, 3, 9)
    )
    tree = parsed(mask._repr_html_())
    assert "3 of 10 units" in said(tree) and "30.00%" in said(tree)
    assert "site 3 modules" in said(tree) and "layers 2-3, 9" in said(tree)
    assert [e.text for e in tree.iter("title")] == ["layer 2, of 3: 1", "layer 3, of 3: 2", "layer 9, of 4: 0"]
    low, high, none = heights(tree)
    assert none == 0 and high == pytest.approx(2 * low, abs=0.11)
    assert parsed(NeuronMask.empty((2, 2))._repr_html_()) is not None


def test_activations_show_their_texts_and_never_trust_a_name():
    acts = activations(model=EVIL)
    assert "60 tokens x 12 neurons" in repr(acts) and "float32, 2.88 kB" in repr(acts) and "2 layers" in repr(acts)
    tree = parsed(acts._repr_html_())
    for fact in (
        "3 texts",
        "60 tokens x 12 neurons",
        "3 sink tokens",
        "float32, 2.88 kB",
        "2 texts were cut",
        plain_text(EVIL),
    ):
        assert fact in said(tree), fact
    assert len(heights(tree)) == 3
    many = parsed(activations(n_tokens=400, n_texts=200)._repr_html_())
    assert len(heights(many)) == 50 and "every 4 texts" in said(many)  # never wider than a page


def test_a_look_does_not_read_the_matrix(tmp_path):
    class Untouchable(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if getattr(func, "__name__", "") not in ("__get__", "size", "numel", "element_size"):
                raise AssertionError(f"the matrix was used: {func}")
            return super().__torch_function__(func, types, args, kwargs or {})

    acts = activations()
    sealed = Activations(**(vars(acts) | {"values": acts.values.as_subclass(Untouchable)}))
    assert "60 tokens" in said(parsed(sealed._repr_html_())) and "60 tokens" in repr(sealed)
    mapped = Activations.load(acts.save(tmp_path / "acts.safetensors"))
    assert repr(mapped) == repr(acts) and mapped._repr_html_() == acts._repr_html_()


def test_networks_show_where_key_neurons_lie_and_how_stable_they_are():
    acts = activations()
    for n_init, pictures in ((1, 1), (3, 2)):
        networks = FunctionalNetworks(3, n_init=n_init).fit(acts)
        tree = parsed(networks._repr_html_())
        assert (
            len(list(tree.iter("svg"))) == pictures
            and "3 networks of 12 neurons" in said(tree)
            and "60 of 60 tokens" in said(tree)
        )
        key = networks.key_neurons(fraction=0.01)
        assert [t.text for t in tree.iter("title")][:2] == [f"layer {d}: {n}" for d, n in zip(key.depths, key.counts)]
    assert (
        len(list(tree.iter("circle"))) == 3
        and "not fitted" in said(parsed(FunctionalNetworks(3)._repr_html_()))
        and "not fitted" in repr(FunctionalNetworks(3))
    )


def test_a_masked_model_shows_what_is_changed_now(tiny_model):
    masked = MaskedModel(tiny_model("llama"), "mlp_hidden")
    before = repr(masked)
    assert (
        "no unit changed now" in before
        and "no means fitted" in before
        and "no unit changed now" in said(parsed(masked._repr_html_()))
    )
    widths = [int(t.text.split(": ")[1]) for t in parsed(masked._repr_html_()).iter("title")]
    mask = NeuronMask.from_layers([torch.arange(w) < 2 + i for i, w in enumerate(widths)], "mlp_hidden")
    with masked.ablate(mask), masked.amplify(mask, gain=2.0):
        inside = parsed(masked._repr_html_())
        assert f"{mask.n} units changed now" in repr(masked) and "and 1 more open" in said(inside)
        assert [t.text for t in inside.iter("title")] == ["layer 0: 2", "layer 1: 3", "layer 2: 4"]
    with pytest.raises(RuntimeError), masked.ablate(mask):
        raise RuntimeError("on purpose")
    assert repr(masked) == before
    odd = MaskedModel(torch.nn.Linear(2, 2))  # not a model of a known kind: shown all the same
    assert "Linear" in repr(odd) and "6 parameters" in said(parsed(odd._repr_html_()))


@pytest.mark.parametrize("kind", [NeuronMask, Activations, FunctionalNetworks, MaskedModel])
def test_half_built_objects_can_be_looked_at(kind):
    half = kind.__new__(kind)
    assert repr(half).startswith(kind.__name__) and kind.__name__ in half._repr_html_()
    if kind is FunctionalNetworks:
        half = FunctionalNetworks(3)
        half.maps_ = torch.zeros(3, 4)  # a fit that stopped midway
    assert "incomplete: AttributeError" in repr(half) and "incomplete: AttributeError" in half._repr_html_()


@pytest.mark.parametrize("kind", [NeuronMask, Activations, FunctionalNetworks, MaskedModel])
def test_names_found_by_tab_are_documented(kind):
    names = [n for n in dir(kind) if not n.startswith("_")]
    assert len(names) > 4
    undocumented = [
        n for n in names if not inspect.getdoc(getattr(kind, n)) and n not in getattr(kind, "__dataclass_fields__", {})
    ]
    assert not undocumented


def test_a_large_mask_and_large_networks_are_shown_at_once():
    mask = NeuronMask.full((14_336,) * 80)
    networks = FunctionalNetworks(20)
    networks.__dict__ |= dict(
        maps_=torch.zeros(20, 80 * 1000), layout=Layout((1000,) * 80, site="mlp_out"), model="",
        rows_=torch.ones(10) > 0, method_="ica", converged_=True, n_iter_=3,
        stability_=torch.ones(20),
    )  # fmt: skip
    start = time.process_time()
    assert len(heights(parsed(mask._repr_html_()))) == 80 and len(heights(parsed(networks._repr_html_()))) == 80
    assert time.process_time() - start < 3


def test_pictures_of_odd_values():
    for svg in (
        bars([], [], "nothing"),
        dots([], [], "nothing"),
        bars([0, 0], "ab", "flat"),
        dots([float("nan"), -3, 7], "abc", "beyond", line=0.5),
        bars([1e9, 1], "ab", EVIL),
    ):
        parsed(card("kind", [EVIL], (svg, EVIL)))
    tree = parsed(bars([1e9, 1], "ab", "far apart"))
    assert min(heights(tree)) >= 1  # small is not nothing
    assert all(0 <= float(c.get("cy")) <= 34 for c in parsed(dots([-3.0, 7.0], "ab", "edges")).iter("circle"))
