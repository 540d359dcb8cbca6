"""Pins the localizer study: a contrast as an evaluation set, the network of a contrast, and planted neurons that
matter more than their variance-matched draws while a null selection does not."""

import families
import planted
import pytest
import torch

from llmfact_nb.ablation import ScoreCache, Settings, find_networks, loss_on
from llmfact_nb.evaluate import EvalSet
from llmfact_nb.masks import NeuronMask
from llmfact_nb.scores.contrast import ContrastPair, ContrastSet, contrast_accuracy, localize
from llmfact_nb.study.contrasts import contrasts
from llmfact_nb.study.localizers import best_network, contrast_on, localizer_study, unseen_pairs


@pytest.fixture(scope="module")
def given():
    model, tokenizer, texts = planted.model(), families.tokenizer(), planted.texts(40)
    settings = Settings(fit_tokens=800, fit_length=40, n_components=8, n_init=2, exclude="first", fraction=0.05)
    return model, tokenizer, find_networks(model, tokenizer, texts, settings)


def topic(i: int) -> ContrastSet:
    "Texts of topic i against texts of the next one; the answers are words of either topic."
    word = lambda t, j: f"w{4 + planted.WORDS * t + j % planted.WORDS}"
    some = [(" ".join(word(t, j + k) for k in range(6)) for t in (i, i + 1)) for j in range(10)]
    answers = [f" {word(t, 0)}" for t in (i, i + 1)]
    return ContrastSet(f"topic {i}", tuple(ContrastPair(a, b, *answers) for a, b in some))


def test_a_contrast_is_scored_by_pairs(given):
    model, tokenizer, _ = given
    scores, by_hand = (
        contrast_on("two", tokenizer, topic(0)).score(model),
        contrast_accuracy(model, tokenizer, topic(0)),
    )
    assert scores.mean("accuracy") == pytest.approx(by_hand.accuracy)
    expected = torch.log1p((-by_hand.margins.double()).exp()).mean().item()
    assert scores.mean("label nats") == pytest.approx(expected)
    assert contrast_on("two", tokenizer, topic(0)).fingerprint != contrast_on("two", tokenizer, topic(1)).fingerprint


def test_the_network_of_a_contrast_holds_its_planted_neurons(given):
    model, tokenizer, found = given
    _, mask = best_network(model, tokenizer, found, topic(2), 6)
    units = [int(u) for row in mask.layers for u in row.nonzero()]
    of = {2 * planted.UNITS, 2 * planted.UNITS + 1, 3 * planted.UNITS, 3 * planted.UNITS + 1}  # of either topic
    assert len(set(units) & of) >= 2


def test_planted_neurons_lie_beyond_their_draws_and_idle_ones_do_not(given, tmp_path):
    model, tokenizer, found = given
    layout, column = found.networks.layout, torch.arange(found.networks.layout.n_neurons) % planted.WIDTH
    useful = NeuronMask.from_flat(column < planted.PLANTED, layout)
    idle = NeuronMask.from_flat((column >= 60) & (column < 60 + planted.PLANTED), layout)
    held_out = loss_on("held out", EvalSet(tokenizer, planted.texts(10, seed=5), 40))
    cache = ScoreCache(model, tmp_path, progress=False)
    table = localizer_study(cache, found, {"useful": useful, "idle": idle}, [held_out])
    rows = contrasts(table, cache, ["localized"]).set_index(["setting", "against"])
    assert rows.p["useful", "random"] == 0.05 and rows.ci_low["useful", "random"] > 0
    assert abs(rows.damage["idle", "random"]) < 0.1 * rows.damage["useful", "random"]
    assert localize(model, tokenizer, topic(0)).mask(n=4).n == 4


def test_sentences_of_held_out_texts_are_left_out():
    pairs = ContrastSet("p", tuple(ContrastPair(t, "x") for t in ("one two", "two three", "four five")))
    assert [p.a for p in unseen_pairs(pairs, ["Zero, one (two) three."], 5).pairs] == ["four five"]
