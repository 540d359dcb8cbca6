"""Pins the pruning study: scores against sums over the weights themselves, planted neurons that only some scores find,
arms that are pruned models, and comparisons that are paired."""

import families
import planted
import pytest
import torch

from llmfact_nb.ablation import ScoreCache, Settings, find_networks, loss_on
from llmfact_nb.evaluate import EvalSet, cloze_accuracy, perplexity
from llmfact_nb.study.pruning import SIMPLER, cloze_on, own_weights, pruning_contrasts, pruning_scores, pruning_study
from llmfact_nb.tuning.pruning import pruned_training, pruning_mask


@pytest.fixture(scope="module")
def given():
    model, tokenizer, texts = planted.model(), families.tokenizer(), planted.texts(40)
    settings = Settings(fit_tokens=800, fit_length=40, n_components=8, n_init=2, exclude="first", fraction=0.1)
    found = find_networks(model, tokenizer, texts, settings)
    return model, tokenizer, found, pruning_scores(model, tokenizer, found, texts, 800, 40, k=8)


def test_planted_neurons_are_kept_by_the_networks_and_not_by_variance(given):
    model, tokenizer, found, scores = given
    layout, where = found.networks.layout, torch.arange(found.networks.layout.n_neurons) % planted.WIDTH
    kept = lambda name: (~pruning_mask(scores[name], 0.8, layout)).flat[where < planted.PLANTED].float().mean()
    assert kept("networks, published") > 0.8 > 0.5 > kept("variance")


def test_own_weights_are_sums_of_squares():
    model = families.build("gpt2")
    from llmfact_nb.masks import NeuronMask

    like = NeuronMask.full([families.HIDDEN] * families.LAYERS, "mlp_hidden")
    whole, down = own_weights(model, like)
    mlp = model.transformer.h[1].mlp
    columns = mlp.c_proj.weight.square().sum(1)
    rows = mlp.c_fc.weight.square().sum(0) + mlp.c_fc.bias.square()
    of = slice(families.HIDDEN, 2 * families.HIDDEN)
    torch.testing.assert_close(down[of], columns.detach())
    torch.testing.assert_close(whole[of], (rows + columns).detach())


def test_arms_are_pruned_models_and_comparisons_are_paired(given, tmp_path):
    model, tokenizer, found, scores = given
    held_out = EvalSet(tokenizer, planted.texts(12, seed=7), 40)
    few = {name: scores[name] for name in ("networks", "networks, published", *SIMPLER[:-1], "random 0", "random 1")}
    cache = ScoreCache(model, tmp_path, progress=False)
    table = pruning_study(cache, found, few, [loss_on("planted", held_out)], shares=(0.5,))
    of = table[(table.arm == "Wanda") & (table.setting == "per layer") & (table["replace"] == "zero")]
    mask = pruning_mask(scores["Wanda"], 0.5, found.networks.layout)
    whole = perplexity(model, None, held_out, progress=False).nats
    with pruned_training(model, mask, verbose=False):
        pruned = perplexity(model, None, held_out, progress=False).nats
    assert of.damage.item() == pytest.approx(pruned - whole, abs=1e-5) and of.units.item() == mask.n
    compared = pruning_contrasts(table, cache)
    row = compared[(compared.against == "random") & (compared.arm == "networks")].iloc[0]
    damage = table[(table.setting == row.setting) & (table["replace"] == row["replace"])].groupby("arm").damage.mean()
    assert row.difference == pytest.approx(damage["networks"] - damage["random"], abs=1e-9)
    assert row.ci_low <= row.difference <= row.ci_high and set(compared.against) == set(SIMPLER)


def test_cloze_scores_are_those_of_the_accuracy(given):
    model, tokenizer, *_ = given
    pairs = [("w4 w5 w6", " w7"), ("w9 w10", " w12"), ("w20 w21 w22", " w4")]
    expected = cloze_accuracy(model, tokenizer, pairs, progress=False).accuracy
    assert cloze_on("few", tokenizer, pairs).score(model).mean("accuracy") == pytest.approx(expected)


def test_protected_layers_lose_nothing_and_the_share_stays(given, tmp_path):
    model, tokenizer, found, scores = given
    held_out = [loss_on("planted", EvalSet(tokenizer, planted.texts(4, seed=7), 20))]
    few, cache = {"variance": scores["variance"]}, ScoreCache(model, progress=False)
    table = pruning_study(cache, found, few, held_out, shares=(0.2,), protect=(1, 0))
    arms = table[table.arm == "variance"]
    assert all(counts.split()[0] == "0" for counts in arms.counts)
    assert arms.share.tolist() == pytest.approx([0.2] * len(arms), abs=0.01)
    assert not set(arms.setting) & set(pruning_study(cache, found, few, held_out, shares=(0.2,)).setting) - {"baseline"}
