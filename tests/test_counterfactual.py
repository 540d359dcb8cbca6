"""Pins replacement by a counterfactual: an intervention gives neurons the values that hooks by hand read in the other
text, whatever the batch; and what has no counterpart is refused."""

import families
import pytest
import torch

from llmfact_nb.ablation import Counterparts, EvaluationSet, Intervention, ScoreCache, Scores
from llmfact_nb.base.arguments import ArgumentError
from llmfact_nb.masks import Layout, NeuronMask
from llmfact_nb.sites import neuron_sites

PAIRS = [([5, 6, 7, 8], [5, 9, 7, 8]), ([10, 11], [12, 11])]
FAMILIES = ["gpt2", "llama", "gemma3_text", "opt"]


def mask_of(model, seed=0, share=0.4):
    sites = neuron_sites(model, "mlp_hidden")
    chosen = torch.rand(sites.n_neurons, generator=torch.Generator().manual_seed(seed)) < share
    return NeuronMask.from_flat(chosen, Layout.of(sites))


def by_hand(model, name, text, other, mask, keep, spared):
    "Logits of one text, unpadded, with the chosen neurons of the other text."
    projections = [
        next(m for n, m in model.named_modules() if n.endswith(families.KNOWN[name].down.format(i)))
        for i in range(families.LAYERS)
    ]
    seen = {}
    handles = [
        m.register_forward_pre_hook(lambda m, a, i=i: seen.__setitem__(i, a[0].clone()))
        for i, m in enumerate(projections)
    ]
    model(input_ids=torch.tensor([other]))
    [h.remove() for h in handles]

    def swap(i):
        chosen = ~mask.layers[i] if keep else mask.layers[i]

        def hook(module, args):
            x = args[0].clone()
            old = seen[i].reshape(x.shape)  # some models flatten rows and positions
            new = torch.where(chosen, old, x)
            if spared:
                new.reshape(-1, new.shape[-1])[0] = x.reshape(-1, x.shape[-1])[0]
            return (new,)

        return hook

    handles = [m.register_forward_pre_hook(swap(i)) for i, m in enumerate(projections)]
    logits = model(input_ids=torch.tensor([text])).logits[0]
    [h.remove() for h in handles]
    return logits


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("operation, positions", [("ablate", "all"), ("keep", "all"), ("ablate", "after-first")])
@torch.no_grad()
def test_values_are_those_of_the_other_text_also_under_padding(name, operation, positions):
    model = families.build(name)
    before, mask = families.state(model), mask_of(model)
    change = Intervention("x", mask, operation=operation, replace=Counterparts(PAIRS), positions=positions)
    texts, others = [PAIRS[0][0], PAIRS[1][1]], [PAIRS[0][1], PAIRS[1][0]]
    ids, real = torch.tensor([texts[0], [*texts[1], 0, 0]]), torch.tensor([[1] * 4, [1, 1, 0, 0]])
    with change.on(model):
        logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits
        alone = model(input_ids=torch.tensor([texts[0]]), use_cache=False).logits
    for row, text, other in zip(logits, texts, others):
        expected = by_hand(model, name, text, other, mask, operation == "keep", positions == "after-first")
        torch.testing.assert_close(row[: len(text)], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone[0], logits[0], rtol=1e-4, atol=1e-5)
    assert families.state(model) == before


@torch.no_grad()
def test_all_neurons_kept_leave_the_model_as_it_is_and_the_same_text_changes_nothing():
    model = families.build("llama")
    whole, same = mask_of(model, share=2.0), Counterparts([(PAIRS[0][0], PAIRS[0][0])])
    ids = torch.tensor([PAIRS[0][0]])
    plain = model(input_ids=ids).logits
    for i in (
        Intervention("x", ~mask_of(model, share=-1.0), operation="keep", replace=Counterparts(PAIRS)),
        Intervention("x", whole, replace=same),
    ):
        with pytest.warns(UserWarning) if i.touched.n == 0 else torch.no_grad():
            with i.on(model):
                torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, plain)


def test_marks_tell_pairs_masks_and_operations_apart():
    model = families.build("llama")
    others, mask = Counterparts(PAIRS), mask_of(model)
    made = [
        Intervention("a", mask, replace=others),
        Intervention("a", mask, replace=Counterparts(PAIRS[:1])),
        Intervention("a", mask, operation="keep", replace=others),
        Intervention("a", mask_of(model, 1), replace=others),
        Intervention("a", mask),
    ]
    assert len({i.mark for i in made}) == len(made)
    assert Intervention("b", mask, seed=3, replace=Counterparts(PAIRS[::-1])).mark == made[0].mark
    assert made[0].described["replace"] == "counterfactual"
    ids = torch.tensor([PAIRS[0][0]])
    score = lambda m: Scores(
        {"nats": m(input_ids=ids, use_cache=False).logits[0, -1, :1].detach().numpy()}, ids[0, :1].numpy()
    )
    cache, e = ScoreCache(model, progress=False), EvaluationSet("x", ("nats",), "mark", 4, score)
    assert len({cache.scores(i, e).mean("nats") for i in made[:4]}) == 3  # one pair or two: the same for this text


def test_what_has_no_counterpart_is_refused_and_leaves_no_hook():
    model = families.build("llama")
    before = families.state(model)
    mask, others = mask_of(model), Counterparts(PAIRS)
    for bad in ([([5, 6], [5])], [([5], [6]), ([5], [7])], [([], [])], []):
        with pytest.raises(ArgumentError) as e:
            Counterparts(bad)
        assert e.value.argument == "pairs"
    for call, argument in (
        (dict(input_ids=torch.tensor([[7, 7, 7]])), "input_ids"),
        (dict(inputs_embeds=torch.zeros(1, 2, families.D)), "input_ids"),
    ):
        with pytest.raises(ArgumentError) as e, Intervention("x", mask, replace=others).on(model):
            model(**call, use_cache=False)
        assert e.value.argument == argument
    cache = model(input_ids=torch.tensor([PAIRS[0][0]]), use_cache=True).past_key_values
    with pytest.raises(ArgumentError) as e, Intervention("x", mask, replace=others).on(model):
        model(input_ids=torch.tensor([PAIRS[0][0]]), past_key_values=cache)
    assert e.value.argument == "past_key_values"
    with pytest.raises(ArgumentError) as e:
        Intervention("x", mask, operation="amplify", replace=others, gain=2.0)
    assert e.value.argument == "operation"
    with pytest.raises(ArgumentError):
        Intervention("x", mask, replace=others).change(torch.zeros(2, mask.n_neurons))
    assert families.state(model) == before
