"""Pins the study of a model that was fine-tuned first: the copy learns, the model given stays, a seed decides all, a
model with a head is measured like any other, and the rules read the loss of the right label."""

from dataclasses import replace

import families
import pytest
import torch

from llmfact_nb.ablation import ScoreCache, Settings, answers_on, find_networks
from llmfact_nb.base.arguments import ArgumentError
from llmfact_nb.evaluate import label_accuracy
from llmfact_nb.masked_model import MaskedModel
from llmfact_nb.scores.head import classifier_accuracy
from llmfact_nb.study.tuned import head_answers_on, taught, tuned_study, tuned_verdicts
from llmfact_nb.study.verdicts import SUPPORTED, UNDECIDED

TOKENIZER = families.tokenizer()
WORDS, TEMPLATE = ["w10", "w11"], "{text} w12"


def labelled(n, seed=0):
    "Texts whose first word says the label."
    return [(f"w{20 + i % 2} {families.words(3, seed=seed + i)}", i % 2) for i in range(n)]


@pytest.fixture(scope="module")
def models():
    before = families.build("llama", num_hidden_layers=2)
    kept = {name: p.clone() for name, p in before.state_dict().items()}
    after = taught(before, TOKENIZER, labelled(16), TEMPLATE, WORDS, steps=40, lr=5e-3, texts_per_step=8)
    assert all(torch.equal(p, kept[name]) for name, p in before.state_dict().items())
    return before, after


def test_the_copy_learns_what_the_model_did_not_know(models):
    new = labelled(20, 100)
    accuracy = [label_accuracy(m, TOKENIZER, new, TEMPLATE, WORDS, progress=False).accuracy for m in models]
    assert accuracy[1] >= 0.9 > accuracy[0] + 0.2 and not models[1].training


def test_two_copies_of_one_seed_are_equal_also_with_dropout():
    model = families.build("gpt2", resid_pdrop=0.3, embd_pdrop=0.3)
    model.transformer.wte.weight.requires_grad_(False)
    twice = [taught(model, TOKENIZER, labelled(8), TEMPLATE, WORDS, steps=2, seed=seed) for seed in (3, 3, 4)]
    assert all(torch.equal(m.transformer.wte.weight, model.transformer.wte.weight) for m in twice), "it is frozen"
    a, b, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in twice)
    assert torch.equal(a, b) and not torch.equal(a, other)


def test_labels_need_words(models):
    with pytest.raises(ArgumentError) as e:
        taught(models[0], TOKENIZER, labelled(4), TEMPLATE)
    assert e.value.argument == "label_words"


def test_the_rules_read_the_loss_of_the_right_label(models):
    after = models[1]
    settings = Settings(fit_tokens=120, fit_length=8, n_components=2, n_init=1, exclude="first", fraction=0.1)
    found = find_networks(after, TOKENIZER, [text for text, _ in labelled(40)], settings)
    answers = answers_on("x", TOKENIZER, labelled(12, 200), TEMPLATE, WORDS)
    tables = tuned_study(ScoreCache(after, progress=False), found, answers, draws=19)
    verdicts = tuned_verdicts(tables).set_index("id")
    assert list(verdicts.index) == ["T6", "T6b", "T9"] and verdicts.verdict["T9"] == UNDECIDED
    rows = tables["contrasts"].set_index(["against", "measure"])
    assert verdicts.here["T6"] == pytest.approx(rows.difference["random", "label nats"])
    assert verdicts.here["T6b"] == pytest.approx(rows.difference["matched permuted", "label nats"])
    assert (rows.seeds == 19).all()
    invented = {name: table.copy() for name, table in tables.items()}
    row = (invented["contrasts"].measure == "label nats") & (invented["contrasts"].against == "random")
    numbers = {"damage": 0.9, "against_damage": 0.1, "difference": 0.8, "ci_low": 0.7, "ci_high": 0.9, "p": 0.05}
    invented["contrasts"].loc[row, list(numbers)] = list(numbers.values())
    assert tuned_verdicts(invented).set_index("id").verdict["T6"] == SUPPORTED


def test_a_model_with_a_head_is_measured_like_any_other(tiny_model, tiny_tokenizer):
    "The loss and the accuracy are those of the head, and the union of few networks is kept."
    model, tokenizer, texts = tiny_model("llama", "classification"), tiny_tokenizer(side="left"), labelled(12, 200)
    settings = Settings(fit_tokens=120, fit_length=8, n_init=1, exclude="first", alpha=0.5, fraction=None)
    read = [text for text, _ in labelled(40)]
    at_k = {k: find_networks(model, tokenizer, read, replace(settings, n_components=k)) for k in (2, 3)}
    answers, cache = head_answers_on("x", tokenizer, texts, 3), ScoreCache(model, progress=False)
    tables = tuned_study(cache, at_k[3], answers, draws=1, at_k=at_k)
    unmasked = tables["union"].query("arm == 'unmasked'").set_index("measure").value
    own = classifier_accuracy(model, tokenizer, texts)
    assert unmasked["accuracy"] == own.accuracy and tables["union"].chance.iloc[0] == own.chance == 1 / 3
    right = own.log_likelihoods[range(12), own.labels]
    assert unmasked["label nats"] == pytest.approx(float(-right.mean()), abs=1e-5)
    kept = tables["preservation"].query("arm == 'keep key' and not late_binding")
    assert set(kept.k) == {2, 3} and kept.recovered.notna().any()
    with MaskedModel(model).keep(at_k[2].key, "zero"):
        masked = classifier_accuracy(model, tokenizer, texts)
    at = kept[kept.k == 2].set_index("measure").value
    right = masked.log_likelihoods[range(12), masked.labels]
    assert at["accuracy"] == masked.accuracy
    assert at["label nats"] == pytest.approx(float(-right.mean()), abs=1e-5)
    assert at["label nats"] != pytest.approx(unmasked["label nats"], abs=1e-4), "the mask does something"
    row = kept[(kept.k == 3) & (kept.measure == "label nats")].iloc[0]
    assert tuned_verdicts(tables).set_index("id").here["T9"] == pytest.approx(row.recovered)
