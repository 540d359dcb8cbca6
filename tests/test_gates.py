"""Pins that gates are what they say: open ones leave the model bit for bit, closed ones are ablated neurons, their
gradients are right through a frozen model; that training finds a planted set; that Trainer and plain loop agree;
and that nothing stays behind."""

import contextlib
import copy
import math
import warnings

import families
import numpy as np
import pytest
import torch
from families import D, FAMILIES, LAYERS

from llmfact_nb.base.arguments import ArgumentError
from llmfact_nb.tuning.gates import NeuronGate
from llmfact_nb.masked_model import MaskedModel
from llmfact_nb.masks import NeuronMask

IDS = torch.tensor([[5, 9, 17, 30, 8, 41], [7, 7, 22, 3, 46, 12]])
BUILDS = ["gpt2", "llama", "gpt_neox", "opt", "phi3", "gemma3_text", "bloom"]
SITES = ("mlp_out", "mlp_hidden")


def widths(name, site):
    return [D if site == "mlp_out" else FAMILIES[name].hidden] * LAYERS


def drawn(name="llama", site="mlp_hidden", share=0.3, seed=0):
    w = widths(name, site)
    return NeuronMask.from_flat(torch.rand(sum(w), generator=torch.Generator().manual_seed(seed)) < share, w, site=site)


def every(name="llama", site="mlp_hidden"):
    return NeuronMask.full(widths(name, site), site=site)


def chances(mask, p_open=0.9):
    "Starts at which exactly the mask's neurons are open."
    return torch.where(mask.flat, p_open, 1 - p_open)


def iou(a, b):
    return (a & b).n / (a | b).n


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("kind", ["straight-through", "sigmoid"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", BUILDS)
def test_all_open_is_the_model_bit_for_bit(name, site, kind):
    model = families.build(name)
    plain, before = logits(model), families.state(model)
    gate = NeuronGate(every(name, site), kind=kind, start=0.9, temperature=1e-6 if kind == "sigmoid" else 1.0)
    with torch.no_grad():
        gate.bias.fill_(1.0)  # at the lowest temperature a sigmoid of 1
    with gate.attached(model):
        assert torch.equal(logits(model), plain)
    assert families.state(model) == before and "neuron_gate" not in vars(model)


@pytest.mark.parametrize("values", ["zero", "own"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", BUILDS)
def test_gates_of_0_and_1_are_keep_and_ablate(name, site, values):
    model, kept = families.build(name), drawn(name, site, 0.6)
    replace = "zero" if values == "zero" else torch.randn(kept.n_neurons, generator=torch.Generator().manual_seed(1))
    mm, plain = MaskedModel(model), logits(model)
    with mm.keep(kept, replace=replace):
        expected = logits(model)
    with mm.ablate(~kept, replace=replace):
        assert torch.equal(logits(model), expected)
    assert (expected - plain).abs().max() > 1e-2
    for gate in (
        NeuronGate(every(name, site), start=chances(kept), replace=replace),
        NeuronGate(~kept, start=0.2, replace=replace),
        NeuronGate({"kept": kept, "rest": ~kept}, per="network", start=torch.tensor([0.7, 0.3]), replace=replace),
        NeuronGate(kept, others="closed", replace=replace),
        NeuronGate([kept], per="network", others="closed", replace=replace),
    ):
        assert gate.mask() == kept
        with gate.attached(model):
            assert torch.equal(logits(model), expected), gate
    assert torch.equal(logits(model), plain)


def test_straight_through_is_exact_in_these_brackets_only():
    gate = NeuronGate(
        every(), start=torch.rand(every().n, generator=torch.Generator().manual_seed(0)).clamp(0.01, 0.99)
    )
    x = torch.ones(1, FAMILIES["llama"].hidden)
    seen = torch.cat([gate(i, x)[0] for i in range(LAYERS)])
    p = gate.probabilities()
    hard = (p > 0.5).float()
    assert torch.equal(seen, hard) and 0 < hard.sum() < len(hard)
    assert not torch.equal((hard + p) - p.detach(), hard)  # the trap: else this test proves nothing


@pytest.mark.parametrize("kind", ["straight-through", "sigmoid"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", ["gpt2", "opt", "phi3"])
def test_values_and_gradients_through_a_frozen_model(name, site, kind):
    model = families.build(name).requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    start, values = (
        torch.rand(every(name, site).n, generator=generator) * 0.9 + 0.05,
        torch.randn(every(name, site).n, generator=generator),
    )
    gate = NeuronGate(every(name, site), kind=kind, start=start, replace=values, temperature=0.7)
    assert torch.allclose(gate.probabilities(), start, atol=1e-6)
    with gate.attached(model):
        loss = model(IDS, labels=IDS).loss
    loss.backward()

    theirs = gate.bias.detach().clone().requires_grad_()  # by hand: one hook per layer, the plain formula
    p = torch.sigmoid(theirs / 0.7)
    g = p if kind == "sigmoid" else (p > 0.5).float() + p - p.detach()
    handles = []
    for (_, module), row, value in zip(
        families.down_projections(name, model), g.split(gate.gated.widths), values.split(gate.gated.widths)
    ):
        if site == "mlp_out":
            handles.append(
                module.register_forward_hook(lambda m, a, y, row=row, value=value: y * row + value * (1 - row))
            )
        else:
            handles.append(
                module.register_forward_pre_hook(lambda m, a, row=row, value=value: (a[0] * row + value * (1 - row),))
            )
    expected = model(IDS, labels=IDS).loss
    expected.backward()
    for h in handles:
        h.remove()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gate.bias.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    assert (gate.bias.grad[gate.probabilities() < 0.5] != 0).any()  # a closed gate can open again
    assert all(p.grad is None for p in model.parameters())


def test_gradient_checkpointing_changes_nothing():
    grads = []
    for checkpointing in (False, True):
        model = families.build("llama").requires_grad_(False).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        gate = NeuronGate(every(), kind="sigmoid")
        with gate.attached(model):
            model(IDS, labels=IDS).loss.backward()
        grads.append(gate.bias.grad)
    torch.testing.assert_close(*grads)
    assert grads[0].abs().max() > 0


def test_reentrant_checkpointing_is_refused_in_a_block():
    "Its backward pass after the block would go past the gates; attached for longer, they are there."
    grads = []
    for reentrant in (False, True):
        model = families.build("llama").train()
        model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        model.enable_input_require_grads()
        gate = NeuronGate(every(), kind="sigmoid")
        if reentrant:
            with gate.attached(model), pytest.raises(ValueError):
                model(IDS, labels=IDS)
        gate.attach(model)
        model(IDS, labels=IDS).loss.backward()
        gate.detach()
        grads.append(gate.bias.grad)
    torch.testing.assert_close(*grads)
    assert grads[0].abs().max() > 0


@pytest.mark.parametrize("fails", ["register_forward_pre_hook", "register_forward_hook"])
def test_gates_that_could_not_be_put_in_leave_nothing(monkeypatch, fails):
    "At every hook that a block sets, one after the other."
    model, gate = families.build("llama"), NeuronGate(every())
    before, done = families.state(model), False
    for nth in range(99):
        set_so_far, real = iter(range(99)), getattr(torch.nn.Module, fails)

        def or_fail(self, *args, **kwargs):
            if next(set_so_far) == nth:
                raise OSError("no room")
            return real(self, *args, **kwargs)

        with monkeypatch.context() as m:
            m.setattr(torch.nn.Module, fails, or_fail)
            try:
                with gate.attached(model):
                    done = True
            except OSError:
                pass
        assert families.state(model) == before and not hasattr(model, "neuron_gate")
        if done:
            break
    assert 0 < nth < 99


@pytest.mark.parametrize("logit", [1e-3, -1e-3])
def test_half_precision_gates_are_open_where_the_forward_pass_says(logit):
    "Chances so close to a half are a half in bfloat16."
    model = families.build("llama").to(torch.bfloat16)
    gate = NeuronGate(every()).to(torch.bfloat16)
    with torch.no_grad():
        gate.bias.fill_(logit)
    x = torch.ones(1, 24, dtype=torch.bfloat16)
    n = int(sum(gate(i, x).sum() for i in range(LAYERS)))
    assert gate.mask().n == int((gate.probabilities() > 0.5).sum()) == n == (72 if logit > 0 else 0)
    gate.attach(model)
    gate.detach()
    assert gate.bias.dtype == torch.bfloat16 and gate.mask().n == n


def test_an_overflowing_neuron_behind_a_closed_gate():
    model = families.build("llama").requires_grad_(False)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = 1e25  # up and gate are finite, their product is not
        model.model.layers[1].mlp.gate_proj.weight[3] = 1e25
    assert not torch.isfinite(logits(model)).all()
    one = NeuronMask.from_layers(
        [torch.arange(24) == (3 if layer == 1 else -1) for layer in range(LAYERS)], site="mlp_hidden"
    )
    with MaskedModel(model).ablate(one):
        expected = logits(model)
    gate = NeuronGate(every(), start=chances(~one))
    with gate.attached(model):
        assert torch.equal(logits(model), expected) and torch.isfinite(expected).all()
        model(IDS, labels=IDS).loss.backward()
    assert torch.isfinite(gate.bias.grad).all() and (gate.bias.grad != 0).sum() > 60


def distilled(gate, model, ids, target, steps=60, lr=0.1, weight=0.0, coldest=None):
    "Train the gates to give the target logits."
    optimizer, warmest = torch.optim.Adam(gate.parameters(), lr=lr), gate.temperature
    with gate.attached(model):
        for step in range(steps):
            if coldest:
                gate.temperature = warmest * (coldest / warmest) ** (step / (steps - 1))
            loss = (model(ids).logits - target).square().mean() + weight * gate.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


TEXTS = torch.randint(4, families.VOCAB, (8, 16), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", ["straight-through", "sigmoid"])
@pytest.mark.parametrize("name, site", [("llama", "mlp_hidden"), ("phi3", "mlp_hidden"), ("llama", "mlp_out")])
def test_training_finds_the_planted_set(name, site, kind):
    model, lost = families.build(name).requires_grad_(False), drawn(name, site, 0.2, seed=5)
    weights = {n: p.clone() for n, p in model.named_parameters()}
    with MaskedModel(model).ablate(lost):
        target = logits(model, TEXTS)
    gate = NeuronGate(every(name, site), kind=kind)
    distilled(gate, model, TEXTS, target, coldest=0.1 if kind == "sigmoid" else None)
    chance = [iou(lost, lost.matched_random(seed, disjoint=False)) for seed in range(20)]
    assert iou(gate.gated - gate.mask(), lost) > 0.8 > 2 * max(chance)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


def test_the_penalty_closes_what_the_task_does_not_need():
    "The target is made by a fifth of the neurons; the others only add noise to it."
    model, needed = families.build("llama").requires_grad_(False), drawn(share=0.2, seed=6)
    with MaskedModel(model).keep(needed):
        target = logits(model, TEXTS)
    found = {}
    for weight in (0.0, 0.02, 50.0):
        gate = NeuronGate(every(), start=0.6)
        distilled(gate, model, TEXTS, target, weight=weight, steps=60)
        found[weight] = gate.mask()
    assert iou(found[0.02], needed) > 0.8 and found[0.0].n >= found[0.02].n
    assert found[50.0].n == 0  # and a penalty above everything closes all


def test_gates_on_networks_find_the_networks_that_are_missing():
    parts = torch.arange(72) * 7 % 5
    networks = {f"n{i}": NeuronMask.from_flat(parts == i, [24] * 3, site="mlp_hidden") for i in range(5)}
    model = families.build("llama").requires_grad_(False)
    with MaskedModel(model).ablate(networks["n1"] | networks["n3"]):
        target = logits(model, TEXTS)
    for kind, start in (("straight-through", 0.9), ("sigmoid", 0.5)):
        gate = NeuronGate(networks, per="network", kind=kind, start=start)
        assert len(gate.bias) == 5
        distilled(gate, model, TEXTS, target, coldest=0.2 if kind == "sigmoid" else None)
        assert ["n1", "n3"] == [name for name, p in zip(gate.networks, gate.probabilities()) if p < 0.5]
        assert gate.mask() == ~(networks["n1"] | networks["n3"])


def test_penalty_is_the_expected_share_of_open_neurons():
    a, b = drawn(share=0.5), ~drawn(share=0.5) & drawn(share=0.5, seed=1)
    gate = NeuronGate([a, b], per="network", start=torch.tensor([0.9, 0.2]))
    torch.testing.assert_close(gate.penalty(), torch.tensor((a.n * 0.9 + b.n * 0.2) / (a.n + b.n)))
    gate.penalty().backward()
    assert (gate.bias.grad > 0).all()
    alone = NeuronGate(a, start=0.3)
    torch.testing.assert_close(alone.penalty(), torch.tensor(0.3))
    with torch.no_grad():
        alone.bias.fill_(-1e4)
    assert alone.penalty() == 0


def test_export_round_trip(tmp_path):
    model, kept = families.build("gpt2"), drawn("gpt2", share=0.4)
    gate = NeuronGate(every("gpt2"), start=chances(kept))
    gate.mask().save(tmp_path / "open.safetensors")
    again = NeuronMask.load(tmp_path / "open.safetensors")
    assert again == kept and again.site == "mlp_hidden"
    with gate.attached(model):
        expected = logits(model)
    with MaskedModel(model).keep(again):
        assert torch.equal(logits(model), expected)
    assert NeuronGate(every("gpt2"), start=chances(again)).mask() == kept


def test_thresholds():
    gate = NeuronGate(every(), start=torch.linspace(0.01, 0.99, 72), kind="sigmoid")
    sizes = [gate.mask(t).n for t in (0, 0.25, 0.5, 0.75, 0.995)]
    assert sizes[0] == 72 and sizes[-1] == 0 and sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 5
    for bad in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError):
            gate.mask(bad)


def test_half_is_closed_in_the_mask_and_in_the_model():
    model, gate = families.build("llama"), NeuronGate(every(), start=0.5)
    assert gate.mask().n == 0
    with MaskedModel(model).ablate(every()):
        expected = logits(model)
    with gate.attached(model):
        assert torch.equal(logits(model), expected)


def test_layers_without_gates_have_no_hook():
    model, one = (
        families.build("llama"),
        NeuronMask.from_layers(
            [torch.arange(24) == (3 if layer == 1 else -1) for layer in range(LAYERS)], site="mlp_hidden"
        ),
    )
    hooked = lambda: [
        layer for layer, (_, m) in enumerate(families.down_projections("llama", model)) if m._forward_pre_hooks
    ]
    with NeuronGate(one).attached(model):
        assert hooked() == [1]
    with NeuronGate(one, others="closed").attached(model):
        assert hooked() == [0, 1, 2]


def test_temperature_limits():
    model, kept = families.build("llama").requires_grad_(False), drawn(share=0.5)
    with MaskedModel(model).keep(kept):
        expected = logits(model)
    gate = NeuronGate(every(), kind="sigmoid", start=chances(kept, 0.6))
    with gate.attached(model):
        assert not torch.allclose(logits(model), expected)
        gate.temperature = 1e-6
        assert torch.equal(logits(model), expected) and gate.mask() == kept
        model(IDS, labels=IDS).loss.backward()
        assert torch.isfinite(gate.bias.grad).all()
    gate.temperature = 1e9
    torch.testing.assert_close(gate.penalty(), torch.tensor(0.5))
    assert NeuronGate(every(), temperature=5.0, start=0.8).penalty().item() == pytest.approx(
        0.8
    )  # a start is a chance at any temperature
    for bad in (0, -1.0, 1e-9, math.inf, math.nan, True, "low", None):
        with pytest.raises(ValueError):
            gate.temperature = bad
        with pytest.raises(ValueError):
            NeuronGate(every(), temperature=bad)


def test_bfloat16():
    model, kept = families.build("llama").bfloat16().requires_grad_(False), drawn(share=0.5)
    plain = logits(model)
    with MaskedModel(model).keep(kept):
        expected = logits(model)
    with NeuronGate(every()).attached(model):
        assert torch.equal(logits(model), plain)
    gate = NeuronGate(every(), start=chances(kept))
    with gate.attached(model):
        assert torch.equal(logits(model), expected) and expected.dtype == torch.bfloat16
        model(IDS, labels=IDS).loss.backward()
    assert gate.bias.dtype == gate.bias.grad.dtype == torch.float32 and gate.bias.grad.abs().max() > 0
    gate.attach(model)
    model.to(torch.bfloat16)  # takes the gates along
    assert torch.equal(logits(model), expected) and 0 < gate.penalty() < 1
    gate.detach()


def test_autocast():
    model = families.build("llama").requires_grad_(False)
    gate = NeuronGate(every(), kind="sigmoid")
    with gate.attached(model):
        model(IDS, labels=IDS).loss.backward()
        exact, gate.bias.grad = gate.bias.grad, None
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(IDS, labels=IDS).loss
        loss.backward()
    assert (gate.bias.grad - exact).abs().max() < 0.1 * exact.abs().max()


def test_generate_as_under_keep():
    model, kept = families.build("gpt2"), drawn("gpt2", share=0.5)
    arguments = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=-1)
    plain = model.generate(IDS, **arguments)
    with MaskedModel(model).keep(kept):
        expected = model.generate(IDS, **arguments)
    with NeuronGate(every("gpt2"), start=chances(kept)).attached(model):
        assert torch.equal(model.generate(IDS, **arguments), expected) and not torch.equal(plain, expected)


def test_peft_models():
    from peft import LoraConfig, get_peft_model

    model, kept = families.build("llama"), drawn(share=0.5)
    with MaskedModel(model).keep(kept):
        expected = logits(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"]))
    gate = NeuronGate(every(), start=chances(kept)).attach(adapted, penalty=1.0)
    torch.testing.assert_close(logits(adapted), expected)
    adapted.train()
    with_penalty = adapted(input_ids=IDS, labels=IDS).loss
    gate.penalty_weight = 0.0
    assert (with_penalty - adapted(input_ids=IDS, labels=IDS).loss).item() == pytest.approx(
        gate.penalty().item(), rel=1e-3
    )
    gate.detach()


def test_beside_neuron_tuning():
    from llmfact_nb.finetune import NeuronTuningConfig, get_neuron_model, merge_and_unload

    model, kept = families.build("llama"), drawn(share=0.5)
    with MaskedModel(model).keep(kept):
        expected = logits(model)
    get_neuron_model(model, NeuronTuningConfig(masks=drawn(share=0.1, seed=4)), verbose=False)
    gate = NeuronGate(every(), start=chances(kept))
    with gate.attached(model):
        assert torch.equal(logits(model), expected)
        model(IDS, labels=IDS).loss.backward()
    assert gate.bias.grad.abs().max() > 0 and all(
        p.grad is not None for p in model.neuron_tuning.parameters_of("neurons")
    )
    merge_and_unload(model)


def test_attach_makes_a_child_and_detach_leaves_nothing():
    model = families.build("llama")
    before, names, plain = families.state(model), list(model.state_dict()), logits(model)
    gate = NeuronGate(every(), start=0.3)
    assert gate.attach(model) is gate and model.neuron_gate is gate
    assert any(p is gate.bias for p in model.parameters())
    assert set(model.state_dict()) - set(names) == {"neuron_gate.bias"}
    assert not torch.equal(logits(model), plain)
    gate.detach()
    assert (
        families.state(model) == before
        and list(model.state_dict()) == names
        and torch.equal(logits(model), plain)
        and not hasattr(model, "neuron_gate")
    )
    with pytest.raises(ValueError):
        gate.detach()
    gate.attach(model).detach()  # and again


def test_attached_keeps_its_parameters_to_itself_and_goes_with_an_exception():
    model, gate = families.build("llama"), NeuronGate(every(), start=0.3)
    before, plain = families.state(model), logits(model)
    with pytest.raises(KeyboardInterrupt):
        with gate.attached(model) as same:
            assert same is gate and model.neuron_gate is gate and "neuron_gate.bias" not in model.state_dict()
            assert not any(p is gate.bias for p in model.parameters())
            raise KeyboardInterrupt
    assert families.state(model) == before and torch.equal(logits(model), plain) and not hasattr(model, "neuron_gate")
    with gate.attached(model):
        gate.detach()  # early: the block's end is no error
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("way", ["attach", "attached"])
def test_a_second_gate_is_refused(way):
    model, other, gate, second = (
        families.build("llama"),
        families.build("llama", "base"),
        NeuronGate(every()),
        NeuronGate(drawn(), start=0.2),
    )
    plain = logits(model)
    put = (lambda g, m: g.attach(m)) if way == "attach" else (lambda g, m: g.attached(m).__enter__())
    gate.attach(model)
    for refused, target in ((second, model), (gate, model), (gate, other)):
        with pytest.raises(ValueError):
            put(refused, target)
    assert torch.equal(logits(model), plain)  # the refused ones left no hook
    gate.detach()
    with second.attached(model.model):  # gates in an inner model count
        with pytest.raises(ValueError):
            put(gate, model)
    assert torch.equal(logits(model), plain)


def test_copies():
    model, gate = families.build("llama"), NeuronGate(every(), start=0.3)
    for way in ("attach", "attached"):
        with gate.attached(model) if way == "attached" else contextlib.nullcontext(gate.attach(model)):
            for thing in (model, gate):
                with pytest.raises(TypeError):
                    copy.deepcopy(thing)
            gate.detach()
    twin = copy.deepcopy(gate)
    assert twin.mask() == gate.mask() and twin.bias is not gate.bias
    with twin.attached(copy.deepcopy(model)):
        pass


def test_models_that_do_not_fit():
    model = families.build("llama")
    gate, before = NeuronGate(every()), families.state(model)
    narrow, short = NeuronMask.full([8] * 3, site="mlp_hidden"), NeuronMask.full([24] * 2, site="mlp_hidden")
    for bad in (narrow, short, NeuronMask.full([24] * 3, site="mlp_out")):
        with pytest.raises(ValueError):
            NeuronGate(bad).attach(model)
    compiled = families.build("llama")
    compiled.model.layers[0].compile()
    with pytest.raises(ValueError):
        gate.attach(compiled)
    with pytest.raises(TypeError):
        gate.attach("smollm2")
    with pytest.raises(NotImplementedError):
        gate.attach(families.build("mixtral"))
    for bad in (-1, math.inf, math.nan, "much", True):
        with pytest.raises(ValueError):
            gate.attach(model, penalty=bad)
    assert families.state(model) == before
    with gate.attached(model):  # after all refusals it is free
        pass


@pytest.mark.parametrize(
    "arguments, argument",
    [
        (dict(networks=NeuronMask.empty([24] * 3)), "networks"),
        (dict(per="layer"), "per"),
        (dict(kind="hard"), "kind"),
        (dict(others="gated"), "others"),
        (dict(start=1.0), "start"),
        (dict(start=0), "start"),
        (dict(start=math.nan), "start"),
        (dict(start=torch.full((5,), 0.5)), "start"),
        (dict(replace="mean"), "replace"),
        (dict(replace=torch.zeros(5)), "replace"),
        (dict(replace=torch.full((72,), math.inf)), "replace"),
        (dict(replace=np.zeros(5)), "replace"),
        (dict(temperature=0), "temperature"),
        (dict(temperature=True), "temperature"),
    ],
)
def test_bad_arguments(arguments, argument):
    with pytest.raises(ArgumentError) as e:
        NeuronGate(**{"networks": drawn(), **arguments})
    assert e.value.argument == argument


@pytest.mark.parametrize("networks", [[], [1, 2], "network 0", [drawn(), drawn(site="mlp_out")]])
def test_networks_that_are_none(networks):
    with pytest.raises((TypeError, ValueError)):
        NeuronGate(networks)


def test_values_may_be_an_array():
    values = torch.randn(72, generator=torch.Generator().manual_seed(3))
    model = families.build("llama")
    found = []
    for replace in (values, values.numpy()):
        with NeuronGate(drawn(), start=0.2, replace=replace).attached(model):
            found.append(logits(model))
    assert torch.equal(*found)


def test_networks_that_overlap_or_are_empty():
    a, b = drawn(share=0.5), drawn(share=0.5, seed=1)
    with pytest.warns(UserWarning):
        gate = NeuronGate([a, b], per="network", start=torch.tensor([0.9, 0.1]))
    assert gate.mask() == ~(b - a) and list(gate.networks) == ["network 0", "network 1"]
    with pytest.warns(UserWarning):
        gate = NeuronGate([a, a & NeuronMask.empty([24] * 3), b - a], per="network")
    assert len(gate.bias) == 3
    gate.penalty().backward()
    assert gate.bias.grad[1] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # with one gate per neuron an overlap says nothing
        assert len(NeuronGate([a, b]).bias) == (a | b).n
        NeuronGate(a, per="network")


def test_the_loss_carries_the_penalty_in_training_only():
    model = families.build("llama")
    gate = NeuronGate(every(), start=0.8).attach(model, penalty=3.0)
    plain = model(IDS, labels=IDS).loss.item()
    model.train()
    out = model(IDS, labels=IDS)
    assert out.loss.item() == pytest.approx(plain + 2.4, rel=1e-5) and out["loss"] is out.loss is out[0]
    as_tuple = model(IDS, labels=IDS, return_dict=False)
    assert as_tuple[0].item() == out.loss.item() and torch.equal(as_tuple[1], out.logits)
    assert (
        torch.equal(model(IDS, return_dict=False)[0], out.logits) and model(IDS).loss is None
    )  # no loss, nothing to add to
    gate.penalty_weight = 1.0
    assert model(IDS, labels=IDS).loss.item() == pytest.approx(plain + 0.8, rel=1e-5)
    gate.detach()
    assert model(IDS, labels=IDS).loss.item() == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("head, labels, items", [("causal", IDS, 10), ("classification", torch.tensor([0, 2]), 2)])
def test_a_batch_carries_the_penalty_by_its_share_of_the_step(head, labels, items):
    """The Trainer says how many predicted tokens (or texts) the whole step has; the first token of a row is not
    predicted."""
    model = families.build("llama", head).train()
    gate = NeuronGate(every(), start=0.8).attach(model)
    for share, total in ((1.0, items), (0.25, 4 * items)):
        call = lambda: model(input_ids=IDS, labels=labels, num_items_in_batch=torch.tensor(total)).loss.item()
        gate.penalty_weight = 0.0
        plain = call()
        gate.penalty_weight = 3.0
        assert call() - plain == pytest.approx(3 * 0.8 * share, rel=1e-4)
    gate.detach()


class Rows(torch.utils.data.Dataset):
    "Random texts; as many as half of their labels are missing, or none."

    def __init__(self, labels=None, n=32, whole=False):
        self.whole = whole
        self.ids = torch.randint(4, families.VOCAB, (n, 16 if whole else 8), generator=torch.Generator().manual_seed(7))
        self.labels = self.ids if labels is None else labels(self.ids)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        labels = self.labels[i].clone()
        if not self.whole:
            labels[4 + i % 4 :] = -100
        return {"input_ids": self.ids[i], "labels": labels}


def trained(model, folder, data=None, resume=None, **options):
    from transformers import Trainer, TrainingArguments

    options = {
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 1,
        **options,
    }
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **options),
        train_dataset=data or Rows(),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_trainer_trains_the_gates_and_nothing_else(tmp_path):
    model, lost = families.build("llama").requires_grad_(False), drawn(share=0.2, seed=5)
    weights, before = {n: p.clone() for n, p in model.named_parameters()}, families.state(model)

    def best(ids):
        with MaskedModel(model).ablate(lost):
            answers = logits(model, ids).argmax(-1)
        return torch.cat([ids[:, :1], answers[:, :-1]], 1)

    gate = NeuronGate(every()).attach(model, penalty=0.05)
    trainer = trained(
        model, tmp_path, Rows(best, 256, whole=True), max_steps=60, per_device_train_batch_size=32, weight_decay=0.1
    )
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.1
    evaluated = trainer.evaluate(Rows(best, 64, whole=True))["eval_loss"]
    gate.penalty_weight = 100.0
    assert trainer.evaluate(Rows(best, 64, whole=True))["eval_loss"] == evaluated  # no penalty in evaluation
    gate.detach()
    model.eval()
    assert (
        iou(gate.gated - gate.mask(), lost)
        > 0.6
        > max(iou(lost, lost.matched_random(seed, disjoint=False)) for seed in range(20))
    )
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters()) and families.state(model) == before


def test_trainer_does_not_decay_the_gates(tmp_path):
    "Decay would pull them to the point between open and closed."
    for decay in (0.0, 10.0):
        model = families.build("llama").requires_grad_(False)
        gate = NeuronGate(every()).attach(model)
        trained(model, tmp_path, weight_decay=decay, max_steps=3)
        gate.detach()
        if decay == 0:
            expected = gate.bias.detach().clone()
    assert torch.equal(gate.bias, expected)


@pytest.mark.parametrize("name, options", [("llama", {}), ("opt", {"dropout": 0.0})])
def test_accumulation_counts_the_penalty_once(name, options, tmp_path):
    ends = []
    for batch, steps in ((8, 1), (2, 4)):
        model = families.build(name, **options).requires_grad_(False)
        gate = NeuronGate(every(name), kind="sigmoid", start=0.6).attach(model, penalty=50.0)
        trained(
            model,
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            optim="sgd",
            learning_rate=1.0,
            max_steps=2,
            max_grad_norm=0.0,
        )
        gate.detach()
        ends.append(gate.bias.detach())
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-4)
    assert (
        NeuronGate(every(name), start=0.6).bias - ends[0]
    ).min() > 0.2  # all of it from the penalty, about 50 / 72 * p * (1 - p) a step


def test_trainer_saves_and_resumes_the_gates(tmp_path):
    def run(folder, **options):
        model = families.build("llama").requires_grad_(False)
        gate = NeuronGate(every(), kind="sigmoid").attach(model, penalty=0.1)
        trained(model, folder, **options)
        gate.detach()
        return gate.bias.detach()

    whole = run(tmp_path / "a", max_steps=6)
    half = run(tmp_path / "b", max_steps=3, save_strategy="steps", save_steps=3)
    rest = run(tmp_path / "b", max_steps=6, resume=str(tmp_path / "b" / "checkpoint-3"))
    assert torch.equal(rest, whole) and not torch.equal(half, whole)


def test_representation():
    gate = NeuronGate([drawn(share=0.4)], per="network", kind="sigmoid", start=0.2)
    assert all(word in repr(gate) for word in ("1 gates", f"{drawn(share=0.4).n} of 72", "sigmoid", "0 open"))
