"""Pins the search in many texts: what is counted shard by shard is what a whole capture says; a group is resumed."""

from dataclasses import replace

import families
import pytest
import torch

from llmfact_nb.ablation import Settings, find_networks
from llmfact_nb.activations import capture
from llmfact_nb.base.arguments import ArgumentError
from llmfact_nb.base.files import ClaimError
from llmfact_nb.base.ranks import LedRanks
from llmfact_nb.command.cost import grouped_needs, model_size, run_needs
from llmfact_nb.study.search import CountedTokens, TalliedShard, capture_shared, find_group, find_shared

ALONE = LedRanks(False)
TEXTS = [families.words(40, seed=i) for i in range(9)]
SMALL = Settings(n_components=3, n_init=2, fit_tokens=300, fit_length=40)
HOW = {"site": "mlp_hidden", "max_length": 40}


@pytest.fixture(scope="module")
def model():
    return families.build("llama")


@pytest.fixture(scope="module")
def whole(model):
    return capture(model, families.tokenizer(), TEXTS, progress=False, **HOW)


@pytest.fixture(scope="module")
def parts(model):
    return [TalliedShard(model, families.tokenizer(), tuple(TEXTS[i : i + 9]), HOW) for i in (0,)]


@pytest.mark.parametrize("exclude", [None, "first", "sinks"])
def test_counted_tokens_have_the_moments_of_the_capture(whole, parts, exclude):
    counted = CountedTokens.of(ALONE, parts, whole.widths)
    rows = {None: torch.ones_like(whole.sinks), "first": whole.positions != 0, "sinks": ~whole.sinks}[exclude]
    assert torch.equal(counted.used(exclude), rows) and torch.equal(counted.sinks, whole.sinks)
    for mine, theirs in zip(counted.moments(rows), whole.moments(rows)):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)
    assert counted.variance_share(~rows) == pytest.approx(whole.variance_share(~rows), abs=1e-4)
    assert (counted.n_tokens, counted.n_neurons, counted.n_cut) == (whole.n_tokens, whole.n_neurons, whole.n_cut)


@pytest.mark.filterwarnings("ignore")
def test_a_shared_search_on_one_rank_is_the_search(model):
    one = find_networks(model, families.tokenizer(), TEXTS, SMALL, progress=False)
    shared = find_shared(ALONE, model, families.tokenizer(), TEXTS, SMALL, progress=False)
    r = torch.corrcoef(torch.cat([one.networks.maps_, shared.networks.maps_]))[:3, 3:].abs()
    assert r.amax(1).min() > 0.999 and one.networks.card == shared.networks.card
    assert one.facts.keys() == shared.facts.keys() and torch.equal(one.networks.rows_, shared.networks.rows_)
    torch.testing.assert_close(shared.variance, one.variance, rtol=1e-3, atol=1e-6)


def test_more_ranks_than_texts_are_refused(model):
    many = LedRanks(False)
    many.size = 3
    with pytest.raises(ArgumentError) as e:
        capture_shared(many, model, families.tokenizer(), TEXTS[:2], **HOW)
    assert e.value.argument == "texts"


def test_spatial_networks_are_refused_on_ranks(model):
    with pytest.raises(ArgumentError) as e:
        find_shared(ALONE, model, families.tokenizer(), TEXTS, replace(SMALL, kind="spatial"), progress=False)
    assert e.value.argument == "kind"


@pytest.mark.filterwarnings("ignore")
def test_a_group_is_resumed_from_its_folder(model, tmp_path, capsys):
    one = find_networks(model, families.tokenizer(), TEXTS, SMALL, progress=False)
    group = lambda shards: find_group(ALONE, model, families.tokenizer(), TEXTS, SMALL, shards, tmp_path / "group")
    first = group(3)
    assert "group ICA: 6 of 6 shard (100%)" in capsys.readouterr().err, "each of three shards is read twice"
    same = ("texts", "tokens", "tokens used", "sink tokens", "neurons", "texts cut")
    assert {n: first.facts[n] for n in same} == {n: one.facts[n] for n in same}
    torch.testing.assert_close(first.variance, one.variance, rtol=1e-2, atol=1e-4)
    passes = []
    handle = model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        again = group(3)
    finally:
        handle.remove()
    assert "group ICA: 6 of 6 shard (100%)" in capsys.readouterr().err
    assert not passes and torch.equal(again.networks.maps_, first.networks.maps_)
    with pytest.raises(ClaimError):
        group(4)


def test_the_memory_of_a_group_grows_much_slower_than_its_texts():
    size, s = model_size("smollm2-135m"), replace(Settings(), fit_tokens=200_000)
    memory = grouped_needs(s, size, 0, 49).memory
    ten = grouped_needs(replace(s, fit_tokens=2_000_000), size, 0, 490).memory
    assert memory < 5e9 < run_needs(s, size).memory / 5 and ten < 2 * memory
