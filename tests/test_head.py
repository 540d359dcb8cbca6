"""Pins the classification head on small random models: found where it is, fitted to the optimum, equal in any batch,
masked like any model, and refusals."""

import families
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value

from llmfact_nb.evaluate import paired_accuracy
from llmfact_nb.scores.head import linear_head, classifier_accuracy, fit_classifier, solve_head
from llmfact_nb.masked_model import MaskedModel
from llmfact_nb.masks import NeuronMask

# The last word decides: w4 is label 0, w5 label 1, w6 label 2; what stands before is noise of unequal length.
DATA = [(f"{families.words(1 + i % 7, i)} w{4 + i % 3}", i % 3) for i in range(36)]


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom", "gemma3_text"])
def test_a_head_is_fitted_and_judged_in_any_batch(family, tiny_model, tiny_tokenizer):
    model, tokenizer = tiny_model(family, "classification"), tiny_tokenizer(side="left")
    model.train()
    before, body = families.state(model), {n: p.clone() for n, p in model.base_model.named_parameters()}
    fit = fit_classifier(model, tokenizer, DATA, l2=1e-4)
    assert fit.n == 36 and fit.accuracy > 0.9 and fit.losses == () and families.state(model) == before
    assert all(torch.equal(p, body[n]) for n, p in model.base_model.named_parameters())  # the head alone has changed
    results = [classifier_accuracy(model, tokenizer, DATA, batch_size=b) for b in ("auto", 1, 5)]
    assert (
        results[0].accuracy == fit.accuracy
        and results[0].chance == results[0].majority == 1 / 3
        and results[0].compare == "head"
    )
    for i, (text, _) in enumerate(DATA[:6]):  # each text alone, by the model's own forward
        with torch.no_grad():
            expected = model.eval()(torch.tensor([tokenizer(text)["input_ids"]])).logits[0].log_softmax(0)
        for r in results:
            assert torch.allclose(r.log_likelihoods[i], expected, atol=1e-4)


def test_an_encoder_reads_its_first_token(tiny_model, tiny_tokenizer):
    model, tokenizer = tiny_model("bert", "classification"), tiny_tokenizer(special=True)
    fit = fit_classifier(model, tokenizer, DATA, l2=1e-4)
    assert (
        classifier_accuracy(model, tokenizer, DATA).accuracy == fit.accuracy > 0.6
        and linear_head(model) is model.classifier
    )
    with pytest.raises(NotImplementedError):
        fit_classifier(tiny_model("roberta", "classification"), tokenizer, DATA)
    assert (
        len(fit_classifier(tiny_model("roberta", "classification"), tokenizer, DATA, trains="all", steps=2).losses) == 2
    )


def test_everything_can_be_trained_and_seeds_decide(tiny_model, tiny_tokenizer):
    fits, weights = [], []
    models = [tiny_model("llama", "classification", attention_dropout=0.3) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1)):
        torch.rand(3)  # what others draw does not matter
        state = torch.get_rng_state()
        fits.append(
            fit_classifier(model, tiny_tokenizer(), DATA, trains="all", steps=12, lr=3e-3, texts_per_step=12, seed=seed)
        )
        weights.append(model.model.layers[0].mlp.down_proj.weight.detach().clone())
        assert (
            torch.equal(state, torch.get_rng_state())
            and not model.training
            and all(p.grad is None for p in model.parameters())
        )
    assert (
        fits[0] == fits[1] != fits[2]
        and torch.equal(weights[0], weights[1])
        and not torch.equal(weights[0], weights[2])
    )
    assert len(fits[0].losses) == 12 and sum(fits[0].losses[-3:]) < sum(fits[0].losses[:3])


def test_masks_act_on_fit_and_judgement(tiny_model, tiny_tokenizer):
    model, tokenizer = tiny_model("llama", "classification"), tiny_tokenizer()
    fit_classifier(model, tokenizer, DATA, l2=1e-4)
    mask = NeuronMask.full((24,) * 3, site="mlp_hidden")
    whole, masked = classifier_accuracy(model, tokenizer, DATA), MaskedModel(model)
    with masked.ablate(mask):
        less = classifier_accuracy(model, tokenizer, DATA)
    baked = classifier_accuracy(masked.bake(mask), tokenizer, DATA)
    assert torch.allclose(less.log_likelihoods, baked.log_likelihoods, atol=1e-5) and not torch.allclose(
        less.log_likelihoods, whole.log_likelihoods, atol=1e-2
    )
    assert paired_accuracy(less, whole).difference == pytest.approx(less.accuracy - whole.accuracy)


def test_the_penalised_optimum():
    """At the solution the gradient of mean cross-entropy and of the penalty cancel; with three labels and an intercept
    too."""
    x, y = (
        torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10, 0.1, 1]),
        [i % 3 for i in range(50)],
    )
    weight, bias = solve_head(x, y, 3, l2=0.05, bias=True)
    logits = (x @ weight.T + bias).requires_grad_()
    pull = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, torch.tensor(y)), logits)[0]
    variance = x.std(0, correction=0) ** 2
    assert torch.allclose(
        (pull.T @ x + 0.05 * weight * variance) / variance.sqrt(), torch.zeros(3, 4), atol=1e-3
    ) and torch.allclose(pull.sum(0), torch.zeros(3), atol=1e-3)


def test_too_long_texts_are_counted(tiny_model, tiny_tokenizer):
    model, tokenizer = tiny_model("llama", "classification"), tiny_tokenizer()
    with pytest.warns(UserWarning):
        fit = fit_classifier(model, tokenizer, [*DATA, (families.words(65), 0)])
    with pytest.warns(UserWarning):
        result = classifier_accuracy(model, tokenizer, [DATA[0], (families.words(65), 0), DATA[1]])
    assert (fit.n, fit.n_too_long, result.n, result.n_too_long, result.items) == (36, 1, 2, 1, (0, 2))


@pytest.mark.parametrize(
    "call, error, argument",
    [
        (lambda m, t: fit_classifier(m, t, [d for d in DATA if d[1] != 1]), ValueError, None),
        (lambda m, t: fit_classifier(m, t, [("w4", 3)]), ValueError, None),
        (lambda m, t: classifier_accuracy(m, t, [("w4", -1)]), ValueError, None),
        (lambda m, t: classifier_accuracy(m, t, []), ValueError, "texts"),
        (lambda m, t: classifier_accuracy(m, t, [("w4", 0), ("", 1)]), ValueError, None),
        (lambda m, t: classifier_accuracy(m, t, [("w4", "good")]), TypeError, None),
        (lambda m, t: classifier_accuracy(m.model, t, DATA), TypeError, None),
        (lambda m, t: fit_classifier(m, t, DATA, trains="body"), ValueError, "trains"),
        (lambda m, t: fit_classifier(m, t, DATA, l2=0), ValueError, "l2"),
        (lambda m, t: fit_classifier(m, t, DATA, trains="all", steps=0), ValueError, "steps"),
    ],
)
def test_refusals(tiny_model, tiny_tokenizer, call, error, argument):
    model, tokenizer = tiny_model("llama", "classification"), tiny_tokenizer()
    before = families.state(model)
    with pytest.raises(error) as e:
        call(model, tokenizer)
    assert getattr(e.value, "argument", None) == argument
    assert families.state(model) == before


def test_class_names_must_be_as_many_as_the_head_has(tiny_model, tiny_tokenizer):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["good", "bad"])})
    data = Dataset.from_dict({"text": ["w4", "w5"], "label": [0, 1]}, features)
    with pytest.raises(ValueError):
        classifier_accuracy(tiny_model("llama", "classification"), tiny_tokenizer(), data)
    model = tiny_model("llama", "classification", num_labels=2)
    fit_classifier(model, tiny_tokenizer(), data)
    result = classifier_accuracy(model, tiny_tokenizer(), data)
    assert result.label_words == ("good", "bad") and result.accuracy == 1
    model.config.pad_token_id = None
    with pytest.raises(ValueError):
        classifier_accuracy(model, tiny_tokenizer(), data)
