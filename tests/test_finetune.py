"""Pins selective fine-tuning: what is frozen stays bit for bit under every optimizer, what trains trains as it would
densely, and a model comes back plain; one test for each trap of training parts of a tensor."""

import copy
import gc
import warnings
import weakref

import families
import pytest
import torch

from llmfact_nb.activations import capture
from llmfact_nb.base.arguments import ArgumentError
from llmfact_nb.finetune import (
    NeuronTuningConfig,
    get_neuron_model,
    merge_and_unload,
    neuron_parameters,
    neuron_training,
)
from llmfact_nb.masked_model import MaskedModel
from llmfact_nb.masks import NeuronMask
from llmfact_nb.sites import neuron_sites

TUNABLE = ["gpt2", "llama", "mistral", "qwen2", "gemma3_text", "gpt_neox", "opt", "phi3"]
OPTIMIZERS = {
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "Adam L2": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
}


def draw(model, share=0.3, seed=0, layers=None):
    widths, generator = neuron_sites(model, "mlp_hidden").widths, torch.Generator().manual_seed(seed)
    rows = [torch.rand(w, generator=generator) < share * (layers is None or i in layers) for i, w in enumerate(widths)]
    return NeuronMask.from_layers(rows, site="mlp_hidden")


def tokens(seed=0, rows=2, length=9):
    return torch.randint(4, families.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".neurons." not in n}


def train(model, optimizer, steps=3, first=0):
    for step in range(first, first + steps):
        ids = tokens(step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def inside(model, mask):
    "Which entries of which parameter belong to the mask's neurons."
    entries = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    for part in neuron_parameters(model, mask):
        entries[part.name].index_fill_(part.axis, part.index, True)
    return entries


@pytest.mark.parametrize(
    "family, optimizer",
    [*((f, "AdamW foreach") for f in TUNABLE), *((f, o) for f in ("gpt2", "llama") for o in list(OPTIMIZERS)[1:])],
)
@pytest.mark.parametrize("mode", ["selected", "rest"])
def test_frozen_weights_do_not_move_by_a_bit(family, optimizer, mode):
    model = families.build(family)
    mask, before = draw(model), weights(model)
    entries = inside(model, mask)
    get_neuron_model(model, NeuronTuningConfig(mode, mask), verbose=False)
    train(
        model, OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad]), 50 if family == "llama" else 8
    )
    merge_and_unload(model)
    for n, p in model.named_parameters():
        frozen = ~entries[n] if mode == "selected" else entries[n]
        assert torch.equal(p[frozen], before[n][frozen]), n
        if entries[n].any():  # and the neurons' own weights did learn, or the others did
            assert not torch.equal(p, before[n]), n


def dense_reference(model, mask, make, steps):
    "Training in which only the mask's entries may move, with everything else put back by hand."
    entries, before = inside(model, mask), weights(model)
    optimizer = make(list(model.parameters()))
    for step in range(steps):
        ids = tokens(step)
        model(input_ids=ids, labels=ids).loss.backward()
        for n, p in model.named_parameters():
            p.grad.masked_fill_(~entries[n], 0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(torch.where(entries[n], p, before[n]))
    return model


@pytest.mark.parametrize(
    "family, optimizer", [*((f, "AdamW foreach") for f in TUNABLE), *((f, "SGD momentum") for f in ("gpt2", "llama"))]
)
def test_selected_trains_as_a_dense_model_would(family, optimizer):
    make = lambda p: {
        "AdamW foreach": torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
        "SGD momentum": torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=0.1),
    }[optimizer]
    expected = dense_reference(families.build(family), draw(families.build(family)), make, 10)
    model = get_neuron_model(
        families.build(family), NeuronTuningConfig("selected", draw(families.build(family))), verbose=False
    )
    train(model, make([p for p in model.parameters() if p.requires_grad]), 10)
    merge_and_unload(model)
    for (n, p), (_, q) in zip(model.named_parameters(), expected.named_parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6, msg=lambda m: f"{n}: {m}")


@pytest.mark.parametrize("family", TUNABLE)
def test_starts_where_the_model_was_and_merges_where_it_went(family):
    model, ids = families.build(family), tokens(99)
    untuned, names, flags = model(ids).logits, set(model.state_dict()), families.state(model)
    get_neuron_model(model, NeuronTuningConfig(masks=draw(model)), verbose=False)
    assert torch.equal(model(ids).logits, untuned)
    assert names <= set(model.state_dict())  # the base's names are as they were, so checkpoints load
    train(model, torch.optim.AdamW(model.neuron_tuning.param_groups(lr=1e-2)), 3)
    tuned = model(ids).logits
    assert not torch.allclose(tuned, untuned, atol=1e-3)
    assert merge_and_unload(model) is model and not hasattr(model, "neuron_tuning")
    torch.testing.assert_close(model(ids).logits, tuned, rtol=1e-4, atol=1e-4)
    assert set(model.state_dict()) == names and families.state(model) == flags
    assert all("forward" not in vars(m) for m in model.modules())


def test_several_networks_are_one_training_until_they_are_switched():
    one, many = families.build("llama"), families.build("llama")
    a, b = draw(one, seed=1), draw(one, seed=2)
    get_neuron_model(one, NeuronTuningConfig(masks=a | b), verbose=False)
    with pytest.warns(UserWarning):
        get_neuron_model(many, NeuronTuningConfig(masks=[a, b]), verbose=False)
    assert list(many.neuron_tuning.networks) == ["network 0", "network 1"]
    assert many.neuron_tuning.networks["network 0"] == a and many.neuron_tuning.networks["network 1"] == b - a
    for m in (one, many):
        train(m, torch.optim.AdamW(m.neuron_tuning.param_groups(lr=1e-3, weight_decay=0.1)), 5)
        merge_and_unload(m)
    for p, q in zip(one.parameters(), many.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_silent_network_has_no_gradient_no_state_and_a_fresh_start(optimizer):
    model = families.build("llama")
    a, b = draw(model, seed=1), draw(model, seed=2)
    get_neuron_model(model, NeuronTuningConfig(masks={"a": a, "b": b - a}), verbose=False)
    tuning = model.neuron_tuning
    made = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    late = {id(p): p.detach().clone() for p in tuning.parameters_of("b")}
    tuning.set_active(["a"])
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(not p.grad.any() for p in tuning.parameters_of("b"))  # counts in no norm
    assert any(p.grad.any() for p in tuning.parameters_of("a"))
    model.zero_grad()
    train(model, made, 4)
    assert all(torch.equal(p, late[id(p)]) and not made.state.get(p) for p in tuning.parameters_of("b"))
    tuning.set_active(["a", "b"])
    train(model, made, 1, first=4)
    assert all(not torch.equal(p, late[id(p)]) for p in tuning.parameters_of("b"))
    if optimizer.startswith("AdamW"):
        assert {int(made.state[p]["step"]) for p in tuning.parameters_of("b")} == {1}
        # a first step of Adam is the learning rate: one shared with older rows would take several times that
        decayed = {id(p): late[id(p)] * (1 - 1e-2 * 0.1) for p in tuning.parameters_of("b")}
        assert max(float((p.detach() - decayed[id(p)]).abs().max()) for p in tuning.parameters_of("b")) < 1.001e-2


def test_gradients_of_the_frozen_part_are_gone_before_anybody_clips():
    model, mask = families.build("gpt2"), draw(families.build("gpt2"))
    entries, ids = inside(model, mask), tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    expected = (
        torch.stack([p.grad.masked_fill(entries[n], 0).square().sum() for n, p in model.named_parameters()])
        .sum()
        .sqrt()
    )
    model.zero_grad()
    with neuron_training(model, mask, "rest", verbose=False):
        for _ in range(2):  # accumulated over two backward passes
            (model(input_ids=ids, labels=ids).loss / 2).backward()
        assert all(not p.grad[entries[n]].any() for n, p in model.named_parameters() if entries[n].any())
        torch.testing.assert_close(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3), expected)


def test_an_infinite_gradient_freezes_all_the_same():
    model, mask = families.build("llama"), draw(families.build("llama"))
    entries = inside(model, mask)
    with neuron_training(model, mask, "rest", verbose=False):
        (model(tokens()).logits.sum() * torch.inf).backward()
        assert all(not p.grad[entries[n]].any() for n, p in model.named_parameters() if entries[n].any())
        assert not model.lm_head.weight.grad.isfinite().all()
    with neuron_training(model, {"a": mask, "b": ~mask & draw(model, seed=3)}, verbose=False) as tuning:
        tuning.set_active(["a"])
        (model(tokens()).logits.sum() * torch.inf).backward()
        assert all(not p.grad.any() for p in tuning.parameters_of("b"))


@pytest.mark.parametrize("passes", [1, 3])
def test_scaled_gradients_are_scaled_once(passes):
    model, ids = families.build("gpt2"), tokens()
    mask = draw(model)
    entries = inside(model, mask)
    model(input_ids=ids, labels=ids).loss.backward()
    expected = {n: torch.where(entries[n], p.grad * 0.25, p.grad) * passes for n, p in model.named_parameters()}
    model.zero_grad()
    with neuron_training(model, mask, "rest", grad_scale=0.25, verbose=False):
        for _ in range(passes):
            model(input_ids=ids, labels=ids).loss.backward()
        for n, p in model.named_parameters():
            torch.testing.assert_close(p.grad, expected[n])


def test_scaled_gradients_under_adam_are_called_what_they_are():
    model = families.build("llama")
    with neuron_training(model, draw(model), "rest", grad_scale=0.1, verbose=False):
        with pytest.warns(UserWarning):
            train(model, torch.optim.AdamW(model.parameters()), 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(model, torch.optim.SGD(model.parameters(), lr=1e-3), 1)


def test_two_optimizers_may_share_the_work():
    model = families.build("llama", "classification")
    with neuron_training(model, draw(model), also=["score"], verbose=False) as tuning:
        head, slices = (
            torch.optim.SGD(model.score.parameters(), lr=0.1),
            torch.optim.AdamW(list(tuning.parameters_of("neurons"))),
        )
        model(tokens()).logits.square().sum().backward()
        head.step()
        slices.step()


def test_one_whole_layer_may_train():
    model = families.build("llama")
    whole = NeuronMask.full((families.HIDDEN,), "mlp_hidden", (2,))
    with neuron_training(model, whole, verbose=False) as tuning:
        train(model, torch.optim.AdamW(tuning.param_groups(lr=1e-3)), 1)


def test_an_optimizer_from_before_is_refused():
    model = families.build("llama")
    early = torch.optim.AdamW(model.parameters())
    other = torch.nn.Linear(2, 2)
    get_neuron_model(model, NeuronTuningConfig(masks=draw(model)), verbose=False)
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()  # somebody else's optimizer is not our business
    with pytest.raises(RuntimeError):
        train(model, early, 1)


def test_biases_are_called_biases_and_nothing_is_shared():
    model = get_neuron_model(
        families.build("gpt2"), NeuronTuningConfig(masks=draw(families.build("gpt2"))), verbose=False
    )
    slices = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert slices and all(n.endswith("bias") == (p.dim() == 1) for n, p in slices.items())
    buffers = [b.data_ptr() for n, b in model.named_buffers() if n.endswith(".index")]
    assert len(set(buffers)) == len(buffers) > 0


def test_slices_of_other_neurons_are_not_loaded():
    model, mask = families.build("llama"), draw(families.build("llama"))
    get_neuron_model(model, NeuronTuningConfig(masks=mask), verbose=False)
    train(model, torch.optim.AdamW(model.neuron_tuning.param_groups(lr=1e-2)), 2)
    same, other = families.build("llama"), families.build("llama")
    get_neuron_model(same, NeuronTuningConfig(masks=mask), verbose=False).load_state_dict(model.state_dict())
    assert torch.equal(same(tokens()).logits, model(tokens()).logits)
    get_neuron_model(other, NeuronTuningConfig(masks=mask.matched_random(1)), verbose=False)
    with pytest.raises(RuntimeError):
        other.load_state_dict(model.state_dict(), strict=False)


def test_a_model_that_changes_its_dtype_keeps_its_slices_fine():
    model = get_neuron_model(
        families.build("llama"), NeuronTuningConfig(masks=draw(families.build("llama"))), verbose=False
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    model.to(torch.bfloat16)
    for n, p in model.named_parameters():
        assert p.dtype == (torch.float32 if n in before else torch.bfloat16)
        assert n not in before or torch.equal(p, before[n])
    assert model.to(torch.float64)(tokens()).logits.dtype == torch.float64
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "LBFGS"])
def test_a_silent_network_stays_still_in_a_step_with_a_closure(optimizer):
    model = families.build("llama")
    get_neuron_model(
        model,
        NeuronTuningConfig(masks={"a": draw(model, seed=1), "b": draw(model, seed=2) - draw(model, seed=1)}),
        verbose=False,
    )
    tuning = model.neuron_tuning
    made = {
        "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
        "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
        "LBFGS": lambda p: torch.optim.LBFGS(p, lr=1e-2, max_iter=3),
    }[optimizer]([p for p in model.parameters() if p.requires_grad])

    def closure():
        made.zero_grad()
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        return loss

    made.step(closure)
    tuning.set_active(["a"])
    still, moves = ([p.detach().clone() for p in tuning.parameters_of(name)] for name in "ba")
    for _ in range(3):
        made.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(tuning.parameters_of("b"), still))
    assert not all(torch.equal(p, q) for p, q in zip(tuning.parameters_of("a"), moves))


def test_a_network_that_never_learned_has_no_state_after_closures():
    model = families.build("llama")
    get_neuron_model(
        model,
        NeuronTuningConfig(masks={"a": draw(model, seed=1), "b": draw(model, seed=2) - draw(model, seed=1)}),
        verbose=False,
    )
    model.neuron_tuning.set_active(["a"])
    optimizer = torch.optim.AdamW(model.neuron_tuning.param_groups(lr=1e-2))

    def closure():
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    assert all(p not in optimizer.state for p in model.neuron_tuning.parameters_of("b"))
    assert all(p in optimizer.state for p in model.neuron_tuning.parameters_of("a"))


@pytest.mark.parametrize("mode", ["selected", "rest"])
def test_gradients_from_before_move_nothing(mode):
    model, ids = families.build("llama"), tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    before = weights(model)
    entries = inside(model, draw(model))
    get_neuron_model(model, NeuronTuningConfig(mode, draw(model)), verbose=False)
    train(
        model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1), 2
    )  # of all parameters, also the frozen ones
    merge_and_unload(model)
    for n, p in model.named_parameters():
        frozen = ~entries[n] if mode == "selected" else entries[n]
        assert torch.equal(p[frozen], before[n][frozen]), n


def test_what_is_left_of_a_tuning_disturbs_nobody():
    model = get_neuron_model(
        families.build("llama"), NeuronTuningConfig(masks=draw(families.build("llama"))), verbose=False
    )
    kept = model.neuron_tuning
    del model
    gc.collect()
    other = torch.nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert kept.model is None


def test_an_optimizer_with_copies_of_the_weights_is_noticed_and_undone():
    model, mask = families.build("llama").train(), draw(families.build("llama"))
    frozen = inside(model, mask)
    before = weights(model)
    get_neuron_model(model, NeuronTuningConfig("rest", mask), verbose=False)
    with torch.no_grad():  # what an optimizer does that is not torch's, or keeps master weights
        for p in model.parameters():
            p.mul_(0.99)
    with pytest.raises(RuntimeError):
        model(tokens())
    merge_and_unload(model)
    assert all(torch.equal(p[frozen[n]], before[n][frozen[n]]) for n, p in model.named_parameters())
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])


def test_decay_goes_to_matrices_alone():
    model = get_neuron_model(families.build("gpt2"), NeuronTuningConfig("full"), verbose=False)
    decayed, plain = model.neuron_tuning.param_groups(weight_decay=0.1, lr=0.5)
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0 and decayed["lr"] == plain["lr"] == 0.5
    assert {p.dim() for p in plain["params"]} == {1} and min(p.dim() for p in decayed["params"]) == 2
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_no_gradient_below_the_lowest_trained_layer():
    model, ids = families.build("llama"), tokens()
    get_neuron_model(model, NeuronTuningConfig(masks=draw(model, layers={2})), verbose=False)
    seen = []
    handle = model.model.layers[1].register_forward_hook(
        lambda m, args, out: seen.append((out[0] if isinstance(out, tuple) else out).requires_grad)
    )
    model(input_ids=ids, labels=ids).loss.backward()
    handle.remove()
    assert seen == [False]
    assert "lowest trained layer: 2" in str(
        model.neuron_tuning
    ) and f"0 0 {model.neuron_tuning.networks['neurons'].n}" in str(model.neuron_tuning)


def test_it_says_what_trains(capsys):
    model = families.build("llama")
    mask = draw(model)
    n = mask.n * 3 * families.D
    get_neuron_model(model, NeuronTuningConfig(masks=mask))
    printed = capsys.readouterr().out
    total = sum(p.numel() for p in families.build("llama").parameters())
    assert f"{n:,} of {total:,} parameters train" in printed and " ".join(map(str, mask.counts)) in printed
    merge_and_unload(model)
    get_neuron_model(model, NeuronTuningConfig("rest", mask))
    assert f"{total - n:,} of {total:,} parameters train" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slices_of_a_coarse_base_are_fine_and_merging_says_what_it_loses(dtype):
    model, ids = families.build("llama").to(dtype), tokens()
    before = model(ids).logits
    get_neuron_model(model, NeuronTuningConfig(masks=draw(model)), verbose=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(model(ids).logits, before) and before.dtype == dtype
    train(model, torch.optim.SGD(model.neuron_tuning.param_groups(lr=1e-5)), 1)
    moved = [float(s.change(o, "weight").detach().abs().max()) for o, s in model.neuron_tuning.slices().values()]
    assert min(moved) > 0  # steps far below the base's rounding are kept
    with pytest.warns(UserWarning):
        merge_and_unload(model)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_autocast_and_checkpointing_train_the_same_slices():
    found = []
    for checkpointing in (False, True):
        model, ids = families.build("llama").train(), tokens()
        get_neuron_model(model, NeuronTuningConfig(masks=draw(model)), verbose=False)
        if checkpointing:
            model.gradient_checkpointing_enable()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys() and all(g is not None and g.any() for g in found[0].values())
    for n in found[0]:
        torch.testing.assert_close(found[0][n], found[1][n])


def test_other_rooms_see_the_tuned_model(tiny_tokenizer):
    model, texts = families.build("llama"), [families.words(12, 1), families.words(7, 2)]
    mask = draw(model)
    get_neuron_model(model, NeuronTuningConfig(masks=mask), verbose=False)
    train(model, torch.optim.AdamW(model.neuron_tuning.param_groups(lr=1e-2)), 3)
    values = capture(model, tiny_tokenizer(), texts, "mlp_hidden", progress=False).values
    with torch.no_grad(), MaskedModel(model).ablate(mask):
        ablated = model(tokens()).logits
    generated = model.generate(tokens(), max_new_tokens=4, do_sample=False)
    merge_and_unload(model)
    torch.testing.assert_close(
        values, capture(model, tiny_tokenizer(), texts, "mlp_hidden", progress=False).values, rtol=1e-4, atol=1e-5
    )
    with torch.no_grad(), MaskedModel(model).ablate(mask):
        torch.testing.assert_close(ablated, model(tokens()).logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(generated, model.generate(tokens(), max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("then", ["merge", "revert"])
@pytest.mark.parametrize("mode", ["selected", "rest", "full"])
def test_a_loop_ends_merged_or_as_before_also_after_an_error(mode, then):
    model = families.build("llama")
    before, flags = weights(model), families.state(model)
    with pytest.raises(KeyboardInterrupt):
        with neuron_training(model, draw(model), mode, then=then, verbose=False) as tuning:
            train(model, torch.optim.AdamW(tuning.param_groups(lr=1e-2)), 2)
            raise KeyboardInterrupt
    assert families.state(model) == flags
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()) == (then == "revert")


def test_an_abandoned_model_is_not_kept_alive():
    from torch.optim import optimizer

    model = get_neuron_model(
        families.build("llama"), NeuronTuningConfig(masks=draw(families.build("llama"))), verbose=False
    )
    assert optimizer._global_optimizer_post_hooks
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and not optimizer._global_optimizer_post_hooks and not optimizer._global_optimizer_pre_hooks


def test_copies_are_refused_not_left_unprotected():
    model = families.build("llama")
    with neuron_training(model, draw(model), "rest", verbose=False):
        with pytest.raises(TypeError):
            copy.deepcopy(model)
    copy.deepcopy(model)


def test_replaced_parameters_are_noticed_in_mode_rest():
    model = families.build("llama")
    first = neuron_parameters(model, draw(model))[0].name.rpartition(".")[0]
    with neuron_training(model, draw(model), "rest", verbose=False):
        owner = model.get_submodule(first)
        old, owner.weight = owner.weight, torch.nn.Parameter(owner.weight.detach().clone())
        with pytest.raises(RuntimeError):
            model(tokens())
        owner.weight = old


def test_digests_find_the_entry_that_moved():
    model = families.build("llama")
    for mode in ("selected", "rest"):
        with neuron_training(model, draw(model), mode, verbose=False, then="revert") as tuning:
            before = tuning.frozen_digests()
            part = neuron_parameters(model, draw(model))[0]
            name = part.name if mode == "rest" else next(iter(tuning.requires_grad))
            with torch.no_grad():
                index = int(part.index[0]) if mode == "rest" else 0
                model.get_parameter(name)[index] += 1e-3
            after = tuning.frozen_digests()
            assert [n for n in before if before[n] != after[n]] == [name]
        if mode == "selected":
            with torch.no_grad():
                model.get_parameter(name)[0] -= 1e-3


def refused(model, mask=None, mode="selected"):
    get_neuron_model(model, NeuronTuningConfig(mode, draw(model) if mask is None else mask), verbose=False)


def test_what_cannot_be_tuned_is_refused_by_name():
    model = families.build("llama")
    full = (families.HIDDEN,) * 3
    wrong = [
        NeuronMask.empty(full, site="mlp_hidden"),
        ~NeuronMask.empty(full, site="mlp_hidden"),
        NeuronMask.from_layers([torch.arange(families.D) < 3] * 3, site="mlp_out"),
        NeuronMask.from_layers([torch.arange(7) < 3] * 3, site="mlp_hidden"),
        NeuronMask.from_layers([torch.arange(families.HIDDEN) < 3] * 5, site="mlp_hidden"),
    ]
    before = families.state(model)
    for mask in wrong:
        with pytest.raises(ValueError):
            refused(model, mask)
    for masks, error in (("network 0", TypeError), ([1, 2], TypeError), (None, TypeError), ([], ValueError)):
        with pytest.raises(error):
            NeuronTuningConfig(masks=masks)
    for name, arguments in (
        ("mode", dict(mode="freeze")),
        ("grad_scale", dict(mode="selected", grad_scale=0.5)),
        ("grad_scale", dict(mode="rest", grad_scale=0)),
        ("grad_scale", dict(mode="rest", grad_scale=-1.0)),
        ("also", dict(mode="rest", also=["score"])),
        ("also", dict(also="score")),
    ):
        with pytest.raises(ArgumentError) as e:
            NeuronTuningConfig(masks=draw(model), **{"mode": "selected"} | arguments)
        assert e.value.argument == name
    with pytest.raises(TypeError):
        get_neuron_model(model, draw(model))
    with pytest.raises(ValueError):
        merge_and_unload(model)
    with pytest.raises(ArgumentError):
        neuron_training(model, draw(model), then="undo").__enter__()
    assert families.state(model) == before


def a_layer(model, i=1):
    return model.model.layers[i].mlp


def is_quantised(model):
    model.is_quantized, model.quantization_method = True, "bitsandbytes"


def has_integers(model):
    up = a_layer(model).up_proj
    up.weight = torch.nn.Parameter(up.weight.detach().to(torch.int8), requires_grad=False)


def is_offloaded(model):
    a_layer(model).down_proj.weight = torch.nn.Parameter(torch.empty(families.D, families.HIDDEN, device="meta"))


def has_a_forward_of_its_own(model):
    a_layer(model).down_proj.forward = a_layer(model).down_proj.forward


def has_a_new_parametrisation(model):
    torch.nn.utils.parametrizations.weight_norm(a_layer(model).down_proj)


def has_an_old_parametrisation(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(a_layer(model).up_proj)


def is_pruned_by_torch(model):
    from torch.nn.utils import prune

    prune.l1_unstructured(a_layer(model).gate_proj, "weight", amount=0.5)


def layers_share_a_weight(model):
    a_layer(model, 2).up_proj.weight = a_layer(model, 1).up_proj.weight


def layers_share_memory(model):
    a_layer(model, 2).down_proj.weight = torch.nn.Parameter(a_layer(model, 1).down_proj.weight.data)


def gate_and_up_share_a_weight(model):
    a_layer(model).gate_proj.weight = a_layer(model).up_proj.weight


def weights_overlap_in_one_flat_parameter(model):
    flat, size = torch.randn(2 * families.D * families.HIDDEN), families.D * families.HIDDEN
    a_layer(model, 1).up_proj.weight = torch.nn.Parameter(flat[:size].view(families.HIDDEN, families.D))
    a_layer(model, 2).up_proj.weight = torch.nn.Parameter(flat[9 : size + 9].view(families.HIDDEN, families.D))


def is_wrapped_by_peft(model):
    peft = pytest.importorskip("peft")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj"]))


def is_compiled(model):
    model.compile(backend="eager")


UNPLAIN = [
    is_quantised, has_integers, is_offloaded, has_a_forward_of_its_own, has_a_new_parametrisation,
    has_an_old_parametrisation, is_pruned_by_torch, layers_share_a_weight, layers_share_memory,
    gate_and_up_share_a_weight, weights_overlap_in_one_flat_parameter, is_wrapped_by_peft, is_compiled,
]  # fmt: skip


@pytest.mark.parametrize("spoil", UNPLAIN)
@pytest.mark.parametrize("mode", ["selected", "rest"])
def test_weights_that_are_not_the_whole_truth_are_refused_and_left_alone(spoil, mode):
    model = families.build("llama")
    mask = draw(model, 0.9)
    spoil(model)
    names, flags = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    with pytest.raises((ValueError, NotImplementedError)):
        refused(model, mask, mode)
    assert list(model.state_dict()) == names and [p.requires_grad for p in model.parameters()] == flags
    assert not hasattr(model, "neuron_tuning")


def test_models_that_cannot_be_tuned_are_refused_by_name():
    model = families.build("llama")
    refused(model)
    with pytest.raises(ValueError):
        refused(model)
    merge_and_unload(model)
    for spoil, name in ((has_integers, "layers.1.mlp.up_proj"), (is_offloaded, "layers.1.mlp.down_proj")):
        model = families.build("llama")
        spoil(model)
        with pytest.raises(ValueError) as e:
            refused(model)
        assert name in str(e.value)
    with pytest.raises(NotImplementedError) as unplaced:
        refused(families.build("bert"))
    assert "encoder.layer.0.output" in str(unplaced.value)


def test_weights_that_other_layers_share_do_not_matter():
    model = families.build("llama")
    a_layer(model, 2).up_proj.weight = a_layer(model, 1).up_proj.weight
    ids = tokens()
    with neuron_training(model, draw(model, layers={0}), verbose=False) as tuning:
        train(model, torch.optim.AdamW(tuning.param_groups(lr=1e-2)), 2)
        tuned = model(ids).logits
    torch.testing.assert_close(model(ids).logits, tuned, rtol=1e-4, atol=1e-5)
    assert a_layer(model, 2).up_proj.weight is a_layer(model, 1).up_proj.weight


def test_a_part_that_is_tied_trains_with_the_other_or_not_at_all():
    model = families.build("llama", tie_word_embeddings=True)
    for alone in (["lm_head"], ["model.embed_tokens"], ["lm_head.weight"]):
        with pytest.raises(ArgumentError) as e:
            get_neuron_model(model, NeuronTuningConfig(masks=draw(model), also=alone), verbose=False)
        assert e.value.argument == "also"
    before = model.lm_head.weight.detach().clone()
    with neuron_training(model, draw(model), also=["lm_head", "model.embed_tokens"], verbose=False) as tuning:
        train(model, torch.optim.AdamW(tuning.param_groups(lr=1e-2)), 2)
    assert not torch.equal(model.lm_head.weight, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_map_that_its_parent_does_not_call_is_an_error_that_names_it():
    class Reads(type(a_layer(families.build("llama")))):
        def forward(self, x):
            hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
            return torch.nn.functional.linear(hidden, self.down_proj.weight)

    model = families.build("llama")
    a_layer(model).__class__ = Reads
    with neuron_training(model, draw(model), verbose=False, then="revert"):
        with pytest.raises(RuntimeError) as e:
            model(tokens())
    assert "layers.1.mlp.down_proj" in str(e.value)
    with neuron_training(model, draw(model, layers={0, 2}), verbose=False):
        model(tokens())


def saved_by_the_model(model, folder):
    model.save_pretrained(folder)


def saved_by_the_trainer(model, folder):
    from transformers import Trainer, TrainingArguments

    Trainer(model, TrainingArguments(str(folder), report_to="none", use_cpu=True)).save_model(str(folder))


@pytest.mark.parametrize("save", [saved_by_the_model, saved_by_the_trainer])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_saved_model_in_tuning_is_never_taken_for_the_whole(family, save, tmp_path):
    from safetensors.torch import load_file

    model, ids = families.build(family), tokens()
    mask = draw(model)
    get_neuron_model(model, NeuronTuningConfig(masks=mask), verbose=False)
    train(model, torch.optim.AdamW(model.neuron_tuning.param_groups(lr=1e-2)), 3)
    save(model, tmp_path)
    with pytest.raises(RuntimeError):
        type(model).from_pretrained(tmp_path)
    assert any("merge_and_unload" in name for name in load_file(tmp_path / "model.safetensors"))  # in its report
    again = get_neuron_model(families.build(family), NeuronTuningConfig(masks=mask), verbose=False)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert torch.equal(again(ids).logits, model(ids).logits)  # nothing of the work is lost
    merge_and_unload(model)
    save(model, tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("wrap", ["data parallel", "copy of a part", "checkpointing", "compiled later", "accelerate"])
def test_wrappers_around_a_model_in_tuning_keep_its_slices(wrap):
    model, ids = families.build("llama").train(), tokens()
    get_neuron_model(model, NeuronTuningConfig(masks=draw(model)), verbose=False)
    train(model, torch.optim.AdamW(model.neuron_tuning.param_groups(lr=1e-2)), 2)
    expected, call = model.model(ids)[0], model.model
    if wrap == "data parallel":
        wrapped = torch.nn.DataParallel(model)
        expected, call = model(ids).logits, lambda ids: wrapped(ids).logits[None]
    elif wrap == "copy of a part":
        call = copy.deepcopy(model.model)
    elif wrap == "checkpointing":
        model.gradient_checkpointing_enable()
    elif wrap == "compiled later":
        torch._dynamo.reset()
        call = torch.compile(model.model, backend="eager")
    else:
        from accelerate import Accelerator

        prepared = Accelerator(cpu=True).prepare(model)
        expected, call = model(ids).logits, lambda ids: prepared(ids).logits[None]
    out = call(ids)[0]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    out.square().sum().backward()
    of = model.model if wrap != "copy of a part" else call
    assert all(p.grad is not None and p.grad.any() for n, p in of.named_parameters() if ".neurons." in n)


def test_a_refusal_leaves_the_model_alone():
    model = families.build("llama")
    model.model.layers[2].mlp.down_proj.forward = model.model.layers[2].mlp.down_proj.forward
    before, names = families.state(model), list(model.state_dict())
    with pytest.raises(ValueError):
        refused(model)
    assert families.state(model) == before and list(model.state_dict()) == names and not hasattr(model, "neuron_tuning")


def test_networks_left_empty_by_an_overlap_are_named():
    model = families.build("llama")
    mask = draw(model)
    with pytest.warns(UserWarning) as seen:
        get_neuron_model(model, NeuronTuningConfig(masks={"a": mask, "again": mask}), verbose=False)
    assert any("again" in str(w.message) for w in seen)
    train(model, torch.optim.AdamW(model.neuron_tuning.param_groups(lr=1e-3)), 1)


def test_tied_weights_stay_tied_and_unsliced():
    model = families.build("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for mode in ("selected", "rest", "full"):
        with neuron_training(model, draw(model), mode, verbose=False) as tuning:
            train(model, torch.optim.AdamW(tuning.param_groups(lr=1e-3)), 1)
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("head", ["base", "classification"])
def test_other_heads_train_too(head):
    model = families.build("llama", head)
    before = weights(model)
    with neuron_training(model, draw(model), verbose=False) as tuning:
        optimizer = torch.optim.AdamW(tuning.param_groups(lr=1e-2))
        model(tokens())[0].square().sum().backward()
        optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(".mlp." in n for n in moved)


def test_a_new_head_can_train_along():
    model = families.build("llama", "classification")
    before = weights(model)
    get_neuron_model(model, NeuronTuningConfig(masks=draw(model), also=["score"]), verbose=False)
    assert "also score" in str(model.neuron_tuning)
    frozen = model.neuron_tuning.frozen_digests()
    assert "score.weight" not in frozen and len(frozen) == len(before) - 1
    optimizer = torch.optim.AdamW(model.neuron_tuning.param_groups(lr=1e-2))
    model(tokens()).logits.square().sum().backward()
    optimizer.step()
    assert model.neuron_tuning.frozen_digests() == frozen
    merge_and_unload(model)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert "score.weight" in moved and all(".mlp." in n for n in moved - {"score.weight"})
    for also in (["head"], ["model.layers.0.mlp"]):
        with pytest.raises(ArgumentError) as e:
            get_neuron_model(model, NeuronTuningConfig(masks=draw(model), also=also))
        assert e.value.argument == "also"
    assert not hasattr(model, "neuron_tuning")
