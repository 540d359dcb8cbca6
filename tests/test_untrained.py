"""Pins untrained models: what each kind keeps and loses of the weights, that the model itself is left alone, and that
the study tells a planted structure from its absence and goes on where it stopped."""

from concurrent.futures import ThreadPoolExecutor

import families
import planted
import pytest
import torch

from llmfact_nb.across import untrained as module
from llmfact_nb.across.untrained import HOW, UntrainedSettings, as_reproducible, untrained, untrained_study
from llmfact_nb.base.arguments import ArgumentError

SOME = ["llama", "gpt2", "bert", "gemma2"]


@pytest.mark.parametrize("family", SOME)
def test_permuted_matrices_keep_their_entries_and_all_else_is_as_it_was(family):
    model = families.build(family)
    before = {n: p.clone() for n, p in model.named_parameters()}
    shuffled = dict(untrained(model, "permute").named_parameters())
    assert list(shuffled) == list(before)
    for name, p in before.items():
        assert torch.equal(dict(model.named_parameters())[name], p)
        if p.dim() > 1:
            assert torch.equal(shuffled[name].flatten().sort().values, p.flatten().sort().values)
            assert not torch.equal(shuffled[name], p)
        else:
            assert torch.equal(shuffled[name], p)


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("how", HOW)
def test_a_seed_decides_the_copy(family, how):
    model, ids = families.build(family), torch.tensor([[4, 9, 7, 5]])
    of = lambda seed: untrained(model, how, seed)(input_ids=ids)[0]
    state = torch.get_rng_state()
    assert torch.equal(of(0), of(0)) and not torch.equal(of(0), of(1))
    assert not torch.allclose(of(0), model(input_ids=ids)[0]) and torch.equal(state, torch.get_rng_state())


def test_shared_embeddings_stay_shared_and_mode_and_type_are_kept():
    model = families.build("llama", tie_word_embeddings=True).to(torch.bfloat16).train()
    for how in HOW:
        copy = untrained(model, how)
        assert copy.lm_head.weight is copy.model.embed_tokens.weight
        assert copy.training and copy.dtype == torch.bfloat16


def test_what_does_not_compute_with_its_matrices_is_refused():
    from peft import LoraConfig, get_peft_model
    from torch.nn.utils.parametrizations import weight_norm

    model = families.build("llama")
    for how in ("permuted", None):
        with pytest.raises(ArgumentError) as e:
            untrained(model, how)
        assert e.value.argument == "how"
    weight_norm(model.model.layers[0].mlp.down_proj)
    with pytest.raises(ValueError):
        untrained(model)
    adapted = get_peft_model(families.build("llama"), LoraConfig(target_modules=["down_proj"]))
    with pytest.raises(TypeError):
        untrained(adapted)
    with pytest.raises(ValueError):
        untrained(adapted.base_model.model, "permute")


def test_copies_made_in_several_threads_are_those_of_one():
    model = families.build("llama")
    digest = lambda seed: [p.sum().item() for p in untrained(model, "reinitialize", seed).parameters()]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(digest, range(24))) == [digest(seed) for seed in range(24)]


def test_a_row_that_is_missing_is_measured_again_and_stands_in_its_place(tmp_path, monkeypatch):
    model, tokenizer, texts = planted.model(), families.tokenizer(), planted.texts(16)
    settings = UntrainedSettings(n_components=4, n_init=1, n_splits=1, exclude="first", max_length=20)
    how = dict(sites=["mlp_hidden", "mlp_out"], seeds=(0, 0), settings=settings, folder=tmp_path, progress=False)
    table = untrained_study(model, tokenizer, texts, **how)
    assert list(table.site) == ["mlp_hidden"] * 3 + ["mlp_out"] * 3
    assert list(table.model) == ["trained", "reinitialized", "permuted"] * 2, "a seed that is named twice counts once"
    (tmp_path / "mlp_hidden-permuted-0.json").unlink()
    measured, measure = [], module._measured
    monkeypatch.setattr(module, "_measured", lambda *of: measured.append(of[4:]) or measure(*of))
    assert untrained_study(model, tokenizer, texts, **how).equals(table)
    assert measured == [("mlp_hidden", "permute", 0)]


def test_the_study_finds_planted_networks_again_in_the_trained_model(tmp_path, monkeypatch):
    model, tokenizer, texts = planted.model(), families.tokenizer(), planted.texts(40)
    settings = UntrainedSettings(n_components=8, n_init=2, n_splits=1, exclude="first", max_length=40)
    how = dict(sites=["mlp_hidden"], seeds=(0, 1), settings=settings, progress=False)
    table = untrained_study(model, tokenizer, texts, folder=tmp_path, **how)
    assert list(table.model) == ["trained"] + ["reinitialized"] * 2 + ["permuted"] * 2
    r = table.groupby("model").r
    assert r.min()["trained"] > 0.8 > 0.7 > r.max()["reinitialized"]
    assert table.purity[0] == 1 == table.specificity[0]  # every planted neuron follows the words of its topic

    def never(*_):
        raise AssertionError("known rows are not measured again")

    monkeypatch.setattr(module, "untrained", never)
    again = untrained_study(model, tokenizer, texts, folder=tmp_path, **how)
    assert again.equals(table)
    each = untrained_study(model, tokenizer, texts, folder=tmp_path, each=True, **how)
    medians = each.groupby(["model", "seed"], dropna=False, sort=False).r.median()
    assert medians.tolist() == pytest.approx(table.r.tolist()) and each.network.max() == 7
    beside = as_reproducible(each[each.model == "trained"].r, each)
    assert beside.loc[beside.r.idxmax(), "reinitialized"] == 0 and list(beside.network) == list(range(8))
    assert (as_reproducible([0.0], each).iloc[0][["reinitialized", "permuted"]] == 1).all()
    for wrong, site in ((table, "mlp_hidden"), (each, "mlp_out")):
        with pytest.raises(ArgumentError) as e:
            as_reproducible([0.5], wrong, site)
        assert e.value.argument == "table"
    with pytest.raises(ArgumentError):
        untrained_study(model, tokenizer, texts[:1], **how)
