"The card of one network: what its units write, against the weights; what it says of sinks; and what it refuses."

import dataclasses
import math
import warnings

import families
import pandas as pd
import pytest
import torch

from llmfact_nb.activations import capture
from llmfact_nb.base.arguments import ArgumentError
from llmfact_nb.show.network_cards import network_card, pushed_logits, written_direction
from llmfact_nb.networks import FunctionalNetworks, Threshold

TOKENIZER = families.tokenizer()
TEXTS = ["w1 w5 w9 w3 w7 w2 w8 w4 w6 w11 w12", "w2 w4 w8 w16 w1 w3 w9 w14", "w7 w7 w3 w5 w10 w6 w2 w13 w9"]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def world(request):
    torch.manual_seed(0)
    model = families.build(request.param)
    acts = capture(model, TOKENIZER, TEXTS, "mlp_hidden", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        networks = FunctionalNetworks(4, standardize=True, random_state=0).fit(acts)
    return request.param, model, acts, networks


def test_a_network_writes_what_its_columns_write(world):
    family, model, _, networks = world
    rise = networks.mixing_[1] * networks.scale_ * networks.time_courses_[:, 1].std(correction=0)
    by_hand, start = 0, 0
    for (_, module), width in zip(families.down_projections(family, model), networks.widths):
        weight = module.weight.detach() if family == "llama" else module.weight.detach().T  # (d, width)
        by_hand, start = by_hand + weight @ rise[start : start + width], start + width
    assert torch.allclose(written_direction(model, networks, 1), by_hand, atol=1e-5)
    some = torch.arange(len(rise)) % 3 == 0
    rest = written_direction(model, networks, 1, some) + written_direction(model, networks, 1, ~some)
    assert torch.allclose(rest, by_hand, atol=1e-5), "the units' parts add up"


def test_a_card_leaves_the_model_alone_and_reads_as_its_parts(world):
    _, model, acts, networks = world
    state = families.state(model)
    card = network_card(model, TOKENIZER, networks, 2, acts, Threshold(1.0), n=3)
    assert families.state(model) == state
    mask = networks.masks(1.0)[2]
    assert (card.units, card.counts) == (mask.n, mask.counts) and len(card.contexts) == 3
    assert [len(tokens) for tokens in card.pushes.values()] == [3, 3]
    ids = torch.nn.utils.rnn.pad_sequence([acts.token_ids[acts.text_ids == t] for t in range(3)], batch_first=True)
    real = torch.nn.utils.rnn.pad_sequence(
        [torch.ones(int((acts.text_ids == t).sum()), dtype=torch.long) for t in range(3)], batch_first=True
    )
    moved = pushed_logits(model, written_direction(model, networks, 2, mask.flat), ids, real)
    assert card.pushes["up"][0][1] == pytest.approx(float(moved[: len(TOKENIZER)].max()), abs=1e-5)
    assert card.pushes["down"][0][1] == pytest.approx(float(moved[: len(TOKENIZER)].min()), abs=1e-5)
    course = networks.transform(acts)[:, 2]
    ordinary = ~acts.sinks & (acts.positions > 0)
    best = int(course.masked_fill(~ordinary, -math.inf).argmax())
    assert card.contexts[0]["token"].strip() == TOKENIZER.decode([int(acts.token_ids[best])]).strip()
    assert f"{mask.n:,} (" in repr(card) and "<table>" in card._repr_html_()
    card.plot().draw_without_rendering()


def test_a_card_says_how_often_untrained_models_have_such_a_network(world):
    _, model, acts, networks = world
    beside = pd.DataFrame({"network": range(4), "r": [0.9, 0.8, 0.31, 0.6], "permuted": [0.0, 0.1, 0.47, 0.3]})
    make = lambda untrained: network_card(model, TOKENIZER, networks, 2, acts, n=2, untrained=untrained)
    plain, card = make(None), make(beside)
    assert card.untrained == {"r": 0.31, "permuted": 0.47} and not plain.untrained
    (more,) = set(card.facts) - set(plain.facts)
    for words in (card.facts[more], repr(card), card._repr_html_()):
        assert "47%" in words and "0.31" in words
    for wrong in (beside[:3], beside[::-1], beside.drop(columns="r")):
        with pytest.raises(ArgumentError) as e:
            make(wrong)
        assert e.value.argument == "untrained"


def test_a_component_that_is_a_sink_is_called_one(world):
    _, model, acts, networks = world
    energy = networks.transform(acts)[:, 0].double().square()
    loud = energy >= energy.sort().values[-3]
    acts = type(acts)(**{**acts.__dict__, "sinks": loud})
    card = network_card(model, TOKENIZER, networks, 0, acts, n=2)
    assert card.sink_energy == pytest.approx(float(energy[loud].sum() / energy.sum())) and card.artefact == (
        card.sink_energy > 0.5
    )
    networks.exclude, before = "sinks", networks.exclude
    assert not network_card(model, TOKENIZER, networks, 0, acts, n=2).artefact
    networks.exclude = before


@pytest.mark.parametrize(
    "change, error", [({"network": 4}, IndexError), ({"network": True}, IndexError), ({"n": 0}, ValueError)]
)
def test_what_is_refused(world, change, error):
    _, model, acts, networks = world
    given = {"model": model, "tokenizer": TOKENIZER, "networks": networks, "network": 0, "activations": acts}
    with pytest.raises(error):
        network_card(**(given | change))


def test_tokens_cannot_write_html(world):
    _, model, acts, networks = world
    card = network_card(model, TOKENIZER, networks, 0, acts, n=1)
    evil = dataclasses.replace(card, pushes={"up": (("<script>alert(1)</script>", 1.0),)})
    assert "<script" not in evil._repr_html_() and "<script" in repr(evil)
