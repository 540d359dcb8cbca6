"""Pins what happens in a real `transformers.Trainer`: what is frozen stays bit for bit, what trains moves as it would
by hand, networks begin at their step with fresh optimizer state, resumed runs equal uninterrupted ones, and
ablation during training is ablation and leaves no hooks. Run as a script it is the worker of the two-process tests."""

import gc
import json
import math
import os
import subprocess
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path

import families
import pytest
import torch
from families import HIDDEN, LAYERS, VOCAB
from safetensors.torch import load_file, save_file
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from llmfact_nb.base.arguments import ArgumentError
from llmfact_nb.finetune import NeuronTuningConfig, get_neuron_model, merge_and_unload
from llmfact_nb.masked_model import MaskedModel
from llmfact_nb.masks import NeuronMask
from llmfact_nb.tuning.schedules import FrozenGuardCallback, NetworkActivateCallback, NetworkUnfreezeCallback

MODES = ("selected", "rest", "full")
WIDTHS = (HIDDEN,) * LAYERS
# Where neuron j is, written down by hand: parameter -> (axis, how many times it occurs along it).
NEURON = {
    "gpt2": ("transformer.h.{}.mlp.", {"c_fc.weight": (1, 1), "c_fc.bias": (0, 1), "c_proj.weight": (0, 1)}),
    "llama": (
        "model.layers.{}.mlp.",
        {"gate_proj.weight": (0, 1), "up_proj.weight": (0, 1), "down_proj.weight": (1, 1)},
    ),
    "phi3": ("model.layers.{}.mlp.", {"gate_up_proj.weight": (0, 2), "down_proj.weight": (1, 1)}),
}
STILL = dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)  # GPT-2 without dropout


def networks(site="mlp_hidden", **shares):
    "Disjoint random networks; the same share of every layer for each name."
    generator, start, found = torch.Generator().manual_seed(5), 0, {}
    places = [torch.randperm(w, generator=generator) for w in WIDTHS]
    for name, share in (shares or dict(a=0.15, b=0.2)).items():
        count = round(share * HIDDEN)
        found[name] = NeuronMask.from_layers([(p >= start) & (p < start + count) for p in places], site)
        start += count
    return found


def union(masks):
    first, *others = masks.values() if isinstance(masks, dict) else masks
    for m in others:
        first = first | m
    return first


def inside(name, model, mask):
    "By parameter, the entries that belong to the mask's neurons."
    prefix, parts = NEURON[name]
    entries = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    for layer, chosen in enumerate(mask.layers):
        for ending, (axis, times) in parts.items():
            units = torch.cat([chosen.nonzero()[:, 0] + HIDDEN * i for i in range(times)])
            entries[prefix.format(layer) + ending].index_fill_(axis, units, True)
    return entries


def clones(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def check(name, model, before, mask, mode):
    "The merged model differs from the clones exactly where it may, and there nearly everywhere."
    entries = inside(name, model, mask)
    for n, p in model.named_parameters():
        may = {"selected": entries[n], "rest": ~entries[n], "full": torch.ones_like(entries[n])}[mode]
        assert torch.equal(p[~may], before[n][~may]), f"{n} is frozen and moved"
        assert not may.any() or (p[may] != before[n][may]).float().mean() > 0.9, f"{n} shall train and stood still"


def rows(n=4, length=12, seed=0):
    "Random token sequences. The first has no label: nothing predicts it, and some versions of the Trainer count it."
    tokens = torch.randint(4, VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))
    labels = torch.cat([torch.full((n, 1), -100), tokens[:, 1:]], 1)
    return [{"input_ids": r, "labels": label, "attention_mask": torch.ones_like(r)} for r, label in zip(tokens, labels)]


def trainer_of(model, folder, *callbacks, data=None, evaluation=None, **options):
    settings = dict(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        max_grad_norm=0.2,
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**{**settings, **options}),
        train_dataset=data or rows(),
        eval_dataset=evaluation,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def history(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def tuned(name, mode, masks, **changes):
    return get_neuron_model(families.build(name, **changes), NeuronTuningConfig(mode, masks), verbose=False)


def hooks(model):
    "How many hooks there are on a Llama's down projections, besides that of their slices."
    maps = [m for _, m in families.down_projections("llama", model)]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) - hasattr(m, "neurons") for m in maps)


class At(TrainerCallback):
    "Call a function of (model, optimizer) after the given step; every=True: after every step from there on."

    def __init__(self, step, function, every=False):
        self.step, self.function, self.every = step, function, every

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == self.step or self.every and state.global_step > self.step:
            self.function(model, optimizer)


# ---- the three modes in an untouched Trainer

SETTINGS = {
    "plain": {},
    "accumulated": dict(per_device_train_batch_size=2, gradient_accumulation_steps=2),
    "checkpointed": dict(gradient_checkpointing=True),
    "bf16": dict(bf16=True),
}


@pytest.fixture(scope="module")
def plain_losses(tmp_path_factory):
    "Losses of the plain run, by family and mode."
    found = {}

    def of(name, mode, changes):
        if (name, mode) not in found:
            trainer = trainer_of(tuned(name, mode, networks(), **changes), tmp_path_factory.mktemp("plain"))
            trainer.train()
            found[name, mode] = history(trainer)
        return found[name, mode]

    return of


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_frozen_weights_stay_and_the_others_move(name, mode, setting, tmp_path, plain_losses):
    changes = STILL if name == "gpt2" else {}
    model = families.build(name, **changes)
    before = clones(model)
    get_neuron_model(model, NeuronTuningConfig(mode, networks()), verbose=False)
    trainer = trainer_of(model, tmp_path, FrozenGuardCallback(every=1), **SETTINGS[setting])
    trainer.train()
    assert trainer.args.optim == "adamw_torch_fused" and trainer.optimizer.param_groups[0]["fused"]
    assert max(history(trainer, "grad_norm")) > trainer.args.max_grad_norm, "clipping had nothing to do"
    expected = plain_losses(name, mode, changes)
    assert history(trainer) == pytest.approx(expected, abs=0.05 if setting == "bf16" else 1e-3)
    assert expected[-1] < expected[0] - 0.05, "nothing was learned"
    merge_and_unload(model)
    check(name, model, before, union(networks()), mode)


@pytest.mark.parametrize("mode", MODES)
def test_gate_and_up_in_one_matrix(mode, tmp_path):
    model = families.build("phi3")
    before = clones(model)
    get_neuron_model(model, NeuronTuningConfig(mode, networks()), verbose=False)
    trainer_of(model, tmp_path, FrozenGuardCallback(every=2)).train()
    merge_and_unload(model)
    check("phi3", model, before, union(networks()), mode)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_clipping_sees_the_gradient_without_the_frozen_part(name, tmp_path):
    "Trap 3: one step of plain SGD, so that the clipped gradient can be read from the weights."
    model = families.build(name, **(STILL if name == "gpt2" else {}))
    before, entries = clones(model), inside(name, model, union(networks()))
    batch = {k: torch.stack([r[k] for r in rows()]) for k in ("input_ids", "labels")}
    model(**batch).loss.backward()
    whole = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
    grads = {n: p.grad.masked_fill(entries[n], 0) for n, p in model.named_parameters()}
    norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
    model.zero_grad()
    assert whole > 1.01 * norm > 0.5

    get_neuron_model(model, NeuronTuningConfig("rest", networks()), verbose=False)
    trainer = trainer_of(
        model,
        tmp_path,
        max_steps=1,
        optim="sgd",
        weight_decay=0.0,
        max_grad_norm=0.1,
        learning_rate=0.1,
        lr_scheduler_type="constant",
    )
    trainer.train()
    assert history(trainer, "grad_norm") == pytest.approx([float(norm)], rel=1e-5)
    merge_and_unload(model)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[n] - 0.1 * grads[n] * 0.1 / norm, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_weight_decay_groups(name, tmp_path):
    "Trap 10: matrices decay, biases do not; and nothing but slices is in the optimizer."
    model = tuned(name, "selected", networks())
    trainer = trainer_of(model, tmp_path)
    trainer.create_optimizer()
    names = {id(p): n for n, p in model.named_parameters()}
    decay, none = ({names[id(p)] for p in g["params"]} for g in trainer.optimizer.param_groups)
    assert [g["weight_decay"] for g in trainer.optimizer.param_groups] == [0.1, 0.0]
    everything = {id(p) for n in networks() for p in model.neuron_tuning.parameters_of(n)}
    assert {names[i] for i in everything} == decay | none
    assert {n for n in decay | none if model.get_parameter(n).dim() == 1} == none
    assert len(none) == (LAYERS * 2 if name == "gpt2" else 0)  # c_fc's bias, per layer and network


# ---- networks that begin one after the other


def counts(model, optimizer):
    "Per network: the step counters in the optimizer's state, None where there is no state."
    tuning = model.neuron_tuning
    return {
        n: {int(optimizer.state[p]["step"]) if optimizer.state.get(p) else None for p in tuning.parameters_of(n)}
        for n in tuning.networks
    }


def slices(model):
    return {
        n: torch.cat([p.detach().flatten() for p in model.neuron_tuning.parameters_of(n)])
        for n in model.neuron_tuning.networks
    }


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_networks_begin_at_their_step(name, tmp_path):
    masks = networks(a=0.1, b=0.1, c=0.1)
    model = tuned(name, "selected", masks)
    seen, counters = [slices(model)], []
    look = At(0, lambda m, o: (seen.append(slices(m)), counters.append(counts(m, o))), every=True)
    guard = FrozenGuardCallback(every=1)
    trainer = trainer_of(
        model,
        tmp_path,
        NetworkUnfreezeCallback({"a": 0, "b": 3, "c": None}),
        look,
        guard,
        gradient_accumulation_steps=2,
        data=rows(8),
        per_device_train_batch_size=2,
        max_steps=6,
    )
    trainer.train()
    for step, (old, new) in enumerate(zip(seen, seen[1:])):
        for n, start in (("a", 0), ("b", 3), ("c", math.inf)):
            assert (not torch.equal(old[n], new[n])) == (step >= start), (n, step)
            assert counters[step][n] == ({step + 1 - start} if step >= start else {None}), (n, step)
    assert model.neuron_tuning.active == ("a", "b")
    state = [trainer.optimizer.state[p] for p in model.neuron_tuning.parameters_of("b")]
    assert all(s["exp_avg"].abs().sum() > 0 for s in state)
    assert history(trainer, "learning_rate") == pytest.approx(
        [1e-2 * (6 - i) / 6 for i in range(6)]
    )  # linear, as without any schedule of networks


def test_a_late_network_takes_a_first_step_of_the_learning_rate(tmp_path):
    "Trap 5: with the step counter of an older parameter the first step would be about three times as large."
    moves, last = [], {}

    def look(model, optimizer):
        now = slices(model)["b"]
        moves.append(float((now - last["b"]).abs().median()))
        last["b"] = now

    model = tuned("llama", "selected", networks())
    last["b"] = slices(model)["b"]
    trainer_of(
        model,
        tmp_path,
        NetworkUnfreezeCallback({"a": 0, "b": 10}),
        At(0, look, every=True),
        max_steps=12,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        learning_rate=1e-3,
    ).train()
    assert moves[:10] == [0.0] * 10
    assert moves[10] == pytest.approx(1e-3, rel=0.02) and 0 < moves[11] < 1.1e-3


@pytest.mark.parametrize(
    "schedule, starts", [({"a": 0, "b": 1}, (0, 3)), ({"a": 1 / 3, "b": 4 / 3}, (1, 4)), ({"a": 2, "b": 0.5}, (6, 2))]
)
def test_networks_begin_at_their_epoch(schedule, starts, tmp_path):
    "Three steps make an epoch."
    model, seen = tuned("llama", "selected", networks()), []
    seen.append(slices(model))
    trainer_of(
        model,
        tmp_path,
        NetworkUnfreezeCallback(schedule, unit="epoch"),
        At(0, lambda m, o: seen.append(slices(m)), every=True),
        data=rows(12),
        max_steps=-1,
        num_train_epochs=3,
    ).train()
    assert len(seen) == 10
    for n, start in zip("ab", starts):
        assert [not torch.equal(old[n], new[n]) for old, new in zip(seen, seen[1:])] == [
            step >= start for step in range(9)
        ]


@pytest.mark.slow
def test_networks_begin_in_a_compiled_model(tmp_path):
    "torch.compile in the Trainer: the compiled code notices that a network begins."
    losses = []
    for options in ({}, dict(torch_compile=True, torch_compile_backend="eager")):
        model, seen = tuned("llama", "selected", networks()), []
        trainer = trainer_of(
            model,
            tmp_path,
            NetworkUnfreezeCallback({"a": 0, "b": 3}),
            At(0, lambda m, o: seen.append(slices(m)), every=True),
            learning_rate=1e-3,
            **options,
        )
        trainer.train()
        losses.append(history(trainer) + history(trainer, "grad_norm"))
        assert [not torch.equal(old["b"], new["b"]) for old, new in zip(seen, seen[1:])] == [
            False,
            False,
            True,
            True,
            True,
        ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_silent_network_counts_in_no_norm_and_changes_nothing(tmp_path):
    "Until b begins the run is, in every logged number and in a's slices, the run of a model that has no b."
    runs = []
    for masks, callbacks in ((networks(), [NetworkUnfreezeCallback({"a": 0, "b": 4})]), ({"a": networks()["a"]}, [])):
        model = tuned("llama", "selected", masks)
        trainer = trainer_of(model, tmp_path, *callbacks, At(4, lambda m, o: runs.append(slices(m)["a"])), max_steps=5)
        trainer.train()
        runs.append((history(trainer), history(trainer, "grad_norm")))
    a, (losses, norms), alone, (losses_alone, norms_alone) = runs
    torch.testing.assert_close(a, alone, rtol=1e-4, atol=1e-5)
    assert losses[:5] == pytest.approx(losses_alone, rel=1e-5)
    assert norms[:4] == pytest.approx(norms_alone[:4], rel=1e-4) and norms[4] > 1.001 * norms_alone[4]


def test_before_the_first_start_nothing_moves(tmp_path):
    model = tuned("gpt2", "selected", networks())
    before, seen = clones(model), []
    trainer = trainer_of(
        model,
        tmp_path,
        NetworkUnfreezeCallback({"a": 2, "b": 3}),
        At(2, lambda m, o: seen.append(clones(m))),
        max_steps=3,
    )
    trainer.train()
    assert same(seen[0], before) and not same(clones(model), before)
    assert history(trainer, "grad_norm")[:2] == [0.0, 0.0]


@pytest.mark.parametrize(
    "schedule, unit, argument",
    [
        ({"a": -1, "b": 0}, "step", "schedule['a']"),
        ({"a": 0, "b": 1.5}, "step", "schedule['b']"),
        ({"a": math.nan, "b": 0}, "epoch", "schedule['a']"),
        ({"a": math.inf, "b": 0}, "epoch", "schedule['a']"),
        ({"a": True, "b": 0}, "step", "schedule['a']"),
        ({"a": "soon", "b": 0}, "step", "schedule['a']"),
        ({"a": 0, "b": 0}, "steps", "unit"),
        ({}, "step", "schedule"),
        ([0, 1], "step", "schedule"),
    ],
)
@pytest.mark.parametrize("callback", [NetworkUnfreezeCallback, NetworkActivateCallback])
def test_senseless_schedules_are_refused(callback, schedule, unit, argument):
    with pytest.raises(ArgumentError) as e:
        callback(schedule, unit=unit)
    assert e.value.argument == argument


@pytest.mark.parametrize("schedule", [{"a": 0, "b": 1, "d": 2}, {"a": 0}])
def test_schedules_that_do_not_fit_the_model_are_refused(schedule, tmp_path):
    for train in (
        lambda: trainer_of(tuned("llama", "selected", networks()), tmp_path, NetworkUnfreezeCallback(schedule)).train(),
        lambda: trainer_of(tuned("llama", "full", networks()), tmp_path, NetworkActivateCallback(schedule)).train(),
        lambda: NetworkActivateCallback(schedule, masks=networks()),
    ):
        with pytest.raises(ArgumentError) as e:
            train()
        assert e.value.argument == "schedule"


def test_models_without_networks_to_unfreeze_are_refused(tmp_path):
    callback = NetworkUnfreezeCallback({"a": 0, "b": 1})
    with pytest.raises(ValueError):
        trainer_of(families.build("llama"), tmp_path, callback).train()
    for mode in ("rest", "full"):
        with pytest.raises(ValueError):
            trainer_of(tuned("llama", mode, networks()), tmp_path, callback).train()


def test_an_optimizer_without_a_network_is_refused(tmp_path):
    "Trap 4: parameters that never reach the optimizer train nothing, silently."
    model = tuned("llama", "selected", networks())
    optimizer = torch.optim.AdamW(model.neuron_tuning.parameters_of("a"))
    trainer = trainer_of(model, tmp_path, NetworkUnfreezeCallback({"a": 0, "b": 2}))
    trainer.optimizer = optimizer
    with pytest.raises(ValueError):
        trainer.train()


def test_shared_neurons_of_a_later_network_are_warned_of(tmp_path):
    a, b, c = networks(a=0.2, b=0.2, c=0.1).values()
    with pytest.warns(UserWarning):
        model = tuned("llama", "selected", {"a": a, "b": a | b, "c": c})
    with pytest.warns(UserWarning):
        trainer_of(model, tmp_path, NetworkUnfreezeCallback({"a": 2, "b": 0, "c": 0}), max_steps=1).train()
    with pytest.warns(UserWarning):
        trainer_of(model, tmp_path, NetworkUnfreezeCallback({"a": None, "b": 0, "c": 0}), max_steps=1).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # c shares nothing, and a is listed first
        trainer_of(model, tmp_path, NetworkUnfreezeCallback({"a": 0, "b": 2, "c": 0}), max_steps=1).train()


# ---- interrupted, evaluated, stopped early


def optimizer_state(trainer):
    "The state by position of the parameter, flattened to tensors."
    state = trainer.optimizer.state_dict()
    return {f"{i} {k}": torch.as_tensor(v) for i, entry in state["state"].items() for k, v in entry.items()} | {
        f"group {i} {k}": torch.tensor(float(g[k]))
        for i, g in enumerate(state["param_groups"])
        for k in ("lr", "weight_decay")
    }


@pytest.mark.parametrize(
    "name, mode",
    [("gpt2", "selected"), ("gpt2", "rest"), ("gpt2", "full"), ("gpt2", "activate"), ("llama", "selected")],
)
def test_a_resumed_run_equals_an_uninterrupted_one(name, mode, tmp_path):
    """With dropout (GPT-2), in the middle of an epoch; the second network begins after the first checkpoint and before
    the second."""

    def run(checkpoint=None):
        tuning = "rest" if mode == "activate" else mode
        model = tuned(name, tuning, networks())
        extra = {
            "selected": [NetworkUnfreezeCallback({"a": 0, "b": 4})],
            "activate": [NetworkActivateCallback({"a": 0, "b": 4})],
        }.get(mode, [])
        trainer = trainer_of(
            model,
            tmp_path,
            *extra,
            FrozenGuardCallback(every=2),
            data=rows(20),
            max_steps=7,
            save_strategy="steps",
            save_steps=3,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return clones(model), optimizer_state(trainer), history(trainer)[-1]

    weights, state, loss = run()
    for step in (3, 6):
        torch.manual_seed(step)  # whatever the process did in between
        again, state_again, loss_again = run(str(tmp_path / f"checkpoint-{step}"))
        assert same(again, weights) and same(state_again, state) and loss_again == loss
    assert not same(weights, clones(tuned(name, "selected" if mode == "selected" else "rest", networks())))


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_best_checkpoint_and_early_stopping(mode, tmp_path):
    """A learning rate far too high: the evaluation gets worse, training stops early, and the best checkpoint comes
    back with the frozen part intact."""
    name, model = "gpt2", families.build("gpt2", **STILL)
    before = clones(model)
    get_neuron_model(model, NeuronTuningConfig(mode, networks()), verbose=False)
    extra = [NetworkUnfreezeCallback({"a": 0, "b": 3})] if mode == "selected" else []
    evaluation = rows(4, seed=1)
    trainer = trainer_of(
        model,
        tmp_path,
        *extra,
        EarlyStoppingCallback(2),
        FrozenGuardCallback(every=3),
        evaluation=evaluation,
        max_steps=40,
        learning_rate=0.3,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        lr_scheduler_type="constant",
    )
    trainer.train()
    losses = history(trainer, "eval_loss")
    assert trainer.state.global_step < 40 and min(losses) < losses[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)
    best = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    now = clones(model)
    whole = {n: best[n].reshape(now[n].shape) for n in best if n in now}  # sliced maps have one more dimension there
    assert all(torch.equal(now[n], t) for n, t in whole.items()) and {*now} - {*best} <= {"lm_head.weight"}
    merge_and_unload(model)
    entries = inside(name, model, union(networks()))
    for n, p in model.named_parameters():
        frozen = {"selected": ~entries[n], "rest": entries[n], "full": torch.zeros_like(entries[n])}[mode]
        assert torch.equal(p[frozen], before[n][frozen])


# ---- the guard


def spoil(parameter, unit):
    def function(model, optimizer):
        with torch.no_grad():
            model.get_parameter(parameter)[unit] += 1e-6

    return function


@pytest.mark.parametrize("mode", ["selected", "rest"])
@pytest.mark.parametrize("every, noticed", [(1, 3), (2, 4), (500, 6)])
def test_the_guard_names_what_moved(mode, every, noticed, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    model = tuned("llama", mode, networks())
    unit = int(union(networks()).layers[1].nonzero()[0]) if mode == "rest" else 0
    with pytest.raises(RuntimeError):
        trainer_of(
            model, tmp_path, At(3, spoil(name, unit), every=True), FrozenGuardCallback(every)
        ).train()  # every step, since in mode rest the next one puts the weight back


def test_the_guard_lets_what_trains_move(tmp_path):
    "In mode rest only the neurons' part of a matrix is frozen; in mode full nothing is."
    unit = int((~union(networks())).layers[1].nonzero()[0])
    for mode in ("rest", "full"):
        trainer_of(
            tuned("llama", mode, networks()),
            tmp_path,
            At(3, spoil("model.layers.1.mlp.up_proj.weight", unit)),
            FrozenGuardCallback(1),
        ).train()
    trainer_of(
        get_neuron_model(families.build("llama"), NeuronTuningConfig("full"), verbose=False),
        tmp_path,
        FrozenGuardCallback(1),
        max_steps=1,
    ).train()


def test_the_guard_refuses_what_it_cannot_guard(tmp_path):
    with pytest.raises(ValueError):
        trainer_of(families.build("llama"), tmp_path, FrozenGuardCallback()).train()
    for bad in (0, -1, 2.5, True, "often"):
        with pytest.raises(ValueError):
            FrozenGuardCallback(bad)


# ---- ablation in the forward pass


def ablated_loss(name, model, mask, values=None, data=None):
    "Loss under independent hooks: torch.where on the input of each down projection of the table."
    data = data or rows()
    batch = {k: torch.stack([r[k] for r in data]) for k in ("input_ids", "labels")}
    with ExitStack() as stack:
        for i, (_, module) in enumerate(families.down_projections(name, model)):
            new = torch.tensor(0.0) if values is None else values.split(WIDTHS)[i]
            handle = module.register_forward_pre_hook(
                lambda m, args, chosen=mask.layers[i], new=new: (torch.where(chosen, new, args[0]),)
            )
            stack.callback(handle.remove)
        with torch.no_grad():
            return float(model(**batch).loss)


EMPTY = NeuronMask.empty(WIDTHS, "mlp_hidden")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("values", [None, torch.linspace(-1, 1, sum(WIDTHS))])
def test_networks_are_ablated_until_their_start(name, exclusive, values, tmp_path):
    "The learning rate is zero, so every step's loss is that of the untouched weights under the mask of that step."
    n = networks(a=0.2, b=0.2, c=0.1)
    masks = {"a": n["a"], "b": n["b"] | n["a"], "c": n["c"], "d": n["c"]}  # b has all of a and more, d is c again
    model = families.build(name, **(STILL if name == "gpt2" else {}))
    before = families.state(model)
    callback = NetworkActivateCallback(
        {"b": 2, "a": 4, "c": None, "d": 5}, masks, replace="zero" if values is None else values, exclusive=exclusive
    )
    seen = []
    trainer = trainer_of(
        model,
        tmp_path,
        callback,
        At(0, lambda m, o: seen.append(callback.active), every=True),
        learning_rate=0.0,
        weight_decay=0.0,
    )
    trainer.train()
    every = union(masks)
    off = [every] * 2 + [n["c"]] * 2 + ([every - n["a"], every - n["c"]] if exclusive else [n["c"], EMPTY])
    assert history(trainer) == pytest.approx([ablated_loss(name, model, m, values) for m in off], abs=1e-4)
    assert len({round(x, 3) for x in history(trainer)}) == (4 if exclusive else 3)
    assert seen == [(), (), ("b",), ("b",), *([("a",), ("d",)] if exclusive else [("b", "a"), ("b", "a", "d")])]
    model.eval(), model.zero_grad()
    assert callback.active is None and families.state(model) == before


def test_networks_that_begin_together_are_active_together(tmp_path):
    callback, seen = (
        NetworkActivateCallback({"a": 1, "b": 1, "c": 0}, networks(a=0.2, b=0.2, c=0.1), exclusive=True),
        [],
    )
    trainer_of(
        families.build("llama"),
        tmp_path,
        callback,
        At(0, lambda m, o: seen.append(callback.active), every=True),
        max_steps=3,
    ).train()
    assert seen == [("c",), ("a", "b"), ("a", "b")]


@pytest.mark.parametrize("setting", ["accumulated", "checkpointed", "bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_ablation_goes_with_every_mode_and_setting(mode, setting, tmp_path):
    "Masks are those of the model's tuning; a plain run and one with the setting lose the same."
    losses = []
    for options in ({}, SETTINGS[setting]):
        model = families.build("llama")
        before = clones(model)
        get_neuron_model(model, NeuronTuningConfig(mode, networks()), verbose=False)
        trainer = trainer_of(
            model,
            tmp_path,
            NetworkActivateCallback({"a": 0, "b": 3}),
            FrozenGuardCallback(1),
            learning_rate=1e-3,
            **options,
        )
        trainer.train()
        losses.append(history(trainer))
        assert hooks(model) == 0
        merge_and_unload(model)
        entries = inside("llama", model, union(networks()))
        frozen = {"selected": lambda e: ~e, "rest": lambda e: e, "full": torch.zeros_like}[mode]
        assert all(
            torch.equal(p[frozen(entries[n])], before[n][frozen(entries[n])]) for n, p in model.named_parameters()
        )
    assert losses[0] == pytest.approx(losses[1], abs=0.05 if setting == "bf16" else 1e-3)
    assert losses[0][0] == pytest.approx(ablated_loss("llama", families.build("llama"), networks()["b"]), abs=1e-4)


def test_masks_of_a_tuning_that_name_no_site_are_taken_at_its_site(tmp_path):
    "In a model whose two sites are of equal width nothing else would tell."
    widths = (families.D,) * LAYERS
    a, b = (NeuronMask.from_layers([torch.arange(families.D) % 3 == i] * LAYERS) for i in range(2))
    model = tuned("llama", "full", {"a": a, "b": b}, **families.FAMILIES["llama"].square)
    trainer = trainer_of(
        model, tmp_path, NetworkActivateCallback({"a": 1, "b": 0}), max_steps=1, learning_rate=0.0, weight_decay=0.0
    )
    trainer.train()
    assert a.widths == widths and history(trainer) == pytest.approx([ablated_loss("llama", model, a)], abs=1e-4)


def test_ablation_by_epoch_at_the_other_site_sparing_first_tokens(tmp_path):
    masks = {
        n: NeuronMask.from_flat(torch.arange(16 * LAYERS) % 5 == i, (16,) * LAYERS, "mlp_out")
        for i, n in enumerate("ab")
    }
    model = families.build("llama")
    callback = NetworkActivateCallback({"a": 0, "b": 1}, masks, unit="epoch", positions="after-first")
    trainer = trainer_of(
        model, tmp_path, callback, data=rows(8), max_steps=-1, num_train_epochs=2, learning_rate=0.0, weight_decay=0.0
    )
    trainer.train()
    batch = {k: torch.stack([r[k] for r in rows(8)]) for k in ("input_ids", "labels")}
    with torch.no_grad():
        plain = float(model(**batch).loss)
        with MaskedModel(model).ablate(masks["b"], positions="after-first"):
            expected = float(model(**batch).loss)
    losses = history(trainer)
    assert [sum(losses[:2]) / 2, sum(losses[2:]) / 2] == pytest.approx([expected, plain], abs=1e-4) and abs(
        expected - plain
    ) > 0.01


def test_ablation_by_means(tmp_path, tiny_tokenizer):
    from llmfact_nb.activations import capture

    model = families.build("llama")
    found = capture(
        model, tiny_tokenizer(), [families.words(20, seed=i) for i in range(4)], site="mlp_hidden", progress=False
    )
    means, _ = found.moments()
    trainer = trainer_of(
        model,
        tmp_path,
        NetworkActivateCallback({"a": 1, "b": 0}, networks(), replace="mean", activations=found),
        max_steps=1,
        learning_rate=0.0,
        weight_decay=0.0,
    )
    trainer.train()
    assert history(trainer) == pytest.approx([ablated_loss("llama", model, networks()["a"], means.float())], abs=1e-4)
    with pytest.raises(ValueError):
        NetworkActivateCallback({"a": 1, "b": 0}, networks(), replace="mean")


def test_evaluation_during_training_is_masked_and_afterwards_not(tmp_path):
    model, data = families.build("llama"), rows(4, seed=1)
    trainer = trainer_of(
        model,
        tmp_path,
        NetworkActivateCallback({"a": 0, "b": None}, networks()),
        evaluation=data,
        max_steps=2,
        learning_rate=0.0,
        weight_decay=0.0,
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
    )
    trainer.train()
    masked, plain = (
        ablated_loss("llama", model, networks()["b"], data=data),
        ablated_loss("llama", model, EMPTY, data=data),
    )
    assert history(trainer, "eval_loss") == pytest.approx([masked] * 3, abs=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain, abs=1e-4) and abs(masked - plain) > 0.01


def test_ablation_is_not_freezing(tmp_path):
    """Trap 7: under zeros the ablated neurons have no gradient and still shrink by weight decay; under other values
    the down projection has a gradient."""
    mask, name = networks()["a"], "gpt2"
    model = families.build(name, **STILL)
    before, entries, seen = clones(model), inside(name, model, mask), []

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.append(
                {n: float(p.grad[entries[n]].abs().max()) for n, p in model.named_parameters() if entries[n].any()}
            )

    def train(**options):
        trainer_of(
            model,
            tmp_path,
            NetworkActivateCallback({"a": None}, {"a": mask}, **options),
            Gradients(),
            lr_scheduler_type="constant",
            max_steps=5,
        ).train()

    train()
    assert len(seen) == 5 and not any(v for step in seen for v in step.values())
    for n, p in model.named_parameters():
        e = entries[n]
        torch.testing.assert_close(
            p[e], before[n][e] * (1 if n.endswith("bias") else (1 - 1e-2 * 0.1) ** 5), rtol=1e-5, atol=0
        )
        assert n.endswith("bias") or not e.any() or not torch.equal(p[e], before[n][e])
    seen.clear()
    train(replace=torch.full((sum(WIDTHS),), 0.5))
    down = {n for n in seen[0] if "c_proj" in n}
    assert all(v > 0 if n in down else v == 0 for step in seen for n, v in step.items()) and len(down) == LAYERS


def test_hooks_go_when_the_run_died(tmp_path):
    def fail(model, optimizer):
        raise KeyboardInterrupt

    model = families.build("llama")
    plain = ablated_loss("llama", model, EMPTY)
    callback = NetworkActivateCallback({"a": 0, "b": None}, networks())
    trainer = trainer_of(model, tmp_path, callback, At(2, fail), learning_rate=0.0, weight_decay=0.0)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert hooks(model) > 0 and callback.active == ("a",)
    callback.remove()
    callback.remove()
    assert hooks(model) == 0 and callback.active is None and ablated_loss("llama", model, EMPTY) == plain


def test_hooks_go_with_the_callback(tmp_path):
    model = families.build("llama")

    def die():
        trainer = trainer_of(
            model, tmp_path, NetworkActivateCallback({"a": 0, "b": None}, networks()), At(2, lambda m, o: 1 / 0)
        )
        try:
            trainer.train()
        except ZeroDivisionError:
            assert hooks(model) > 0

    die()
    gc.collect()
    assert hooks(model) == 0


def test_a_second_run_with_the_same_callback(tmp_path):
    "After a run that died, with another model: the old ablation goes and the new one comes."
    first, second = families.build("llama"), families.build("llama")
    callback = NetworkActivateCallback({"a": 0, "b": None}, networks())
    with pytest.raises(ZeroDivisionError):
        trainer_of(first, tmp_path, callback, At(2, lambda m, o: 1 / 0)).train()
    trainer = trainer_of(second, tmp_path, callback, max_steps=1, learning_rate=0.0, weight_decay=0.0)
    trainer.train()
    assert (
        history(trainer) == pytest.approx([ablated_loss("llama", second, networks()["b"])], abs=1e-4)
        and hooks(first) == hooks(second) == 0
    )


def test_masks_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError):
        trainer_of(families.build("llama"), tmp_path, NetworkActivateCallback({"a": 0})).train()
    with pytest.raises(ValueError):
        trainer_of(
            get_neuron_model(families.build("llama"), NeuronTuningConfig("full"), verbose=False),
            tmp_path,
            NetworkActivateCallback({"a": 0}),
        ).train()
    with pytest.raises(ValueError):
        trainer_of(
            families.build("llama"),
            tmp_path,
            NetworkActivateCallback({"neurons": 2}, NeuronMask.full((25,) * LAYERS, "mlp_hidden")),
        ).train()
    with pytest.raises(TypeError):
        NetworkActivateCallback({"a": 0}, masks="a")
    with pytest.raises(ValueError):
        trainer_of(
            families.build("llama"),
            tmp_path,
            NetworkActivateCallback({"network 0": 0}, [networks()["a"]]),
            torch_compile=True,
            torch_compile_backend="eager",
        ).train()


# ---- two processes


SCHEDULE = {"a": 0, "b": 3}


def run_trainer(mode, folder, size, **options):
    "Six steps of a global batch of four rows; `size` of them at a time in each process."
    model = tuned("llama", mode, networks())
    extra = [NetworkUnfreezeCallback(SCHEDULE)] if mode == "selected" else []
    trainer = trainer_of(
        model,
        folder,
        *extra,
        FrozenGuardCallback(every=2),
        data=rows(8),
        per_device_train_batch_size=size,
        learning_rate=1e-3,
        **options,
    )
    trainer.train()
    steps = counts(model, trainer.optimizer.optimizer) if mode == "selected" else {}
    merge_and_unload(model)
    return clones(model), {
        "grad_norm": history(trainer, "grad_norm"),
        "loss": history(trainer),
        "steps": {n: [*s] for n, s in steps.items()},
    }


def run_loop(model, mine=slice(None)):
    "A plain loop of four steps in which the second network begins at step 2; each process has its rows."
    optimizer = torch.optim.AdamW(model.neuron_tuning.param_groups(weight_decay=0.1, lr=1e-3))
    for step in range(4):
        if model.neuron_tuning.config.mode == "selected":
            model.neuron_tuning.set_active(["a", "b"] if step >= 2 else ["a"])
        batch = {k: torch.stack([r[k] for r in rows(4, seed=step)[mine]]) for k in ("input_ids", "labels")}
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def worker(folder):
    "What each of the two processes does."
    import torch.distributed as dist

    rank, results = int(os.environ["RANK"]), {}
    for mode, options in (("selected", {}), ("rest", dict(gradient_accumulation_steps=2))):
        weights, results[mode] = run_trainer(
            mode, folder / f"trainer-{rank}", 2 // options.get("gradient_accumulation_steps", 1), **options
        )
        save_file(weights, folder / f"{mode}-{rank}.safetensors")

    model = sharded(tuned("llama", "selected", networks()))
    before = model.neuron_tuning.frozen_digests()
    run_loop(model, slice(rank * 2, rank * 2 + 2))
    results["sharded digests"] = [len(before), model.neuron_tuning.frozen_digests() == before]
    save_file(
        {n: p.full_tensor().detach().contiguous() for n, p in model.named_parameters()},
        folder / f"sharded-{rank}.safetensors",
    )
    try:
        run_loop(sharded(tuned("llama", "rest", networks())))
        results["sharded rest"] = "accepted"
    except RuntimeError as e:
        results["sharded rest"] = str(e)
    (folder / f"results-{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    here = Path(__file__).resolve()
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(here),
        str(folder),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["selected", "rest"])
def test_two_processes_agree_with_one(mode, two_processes, tmp_path):
    first, second = (load_file(two_processes / f"{mode}-{rank}.safetensors") for rank in (0, 1))
    assert same(first, second)
    model = families.build("llama")
    before, entries = clones(model), inside("llama", model, union(networks()))
    for n, p in first.items():
        frozen = entries[n] if mode == "rest" else ~entries[n]
        assert torch.equal(p[frozen], before[n][frozen])
        assert frozen.all() or not torch.equal(p, before[n])
    weights, expected = run_trainer(mode, tmp_path, 4)
    assert max(float((weights[n] - first[n]).abs().max()) for n in weights) < 1e-5
    found = json.loads((two_processes / "results-0.json").read_text())[mode]
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4) and found["loss"] == pytest.approx(
        expected["loss"], rel=1e-4
    )
    assert found["steps"] == expected["steps"] == ({"a": [6], "b": [3]} if mode == "selected" else {})


@pytest.mark.slow
def test_sharded_slices_train_as_unsharded_ones(two_processes):
    "FSDP2, mode selected: frozen weights bit for bit, slices as in one process."
    first, second = (load_file(two_processes / f"sharded-{rank}.safetensors") for rank in (0, 1))
    model = tuned("llama", "selected", networks())
    before = clones(model)
    run_loop(model)
    expected = clones(model)
    assert same(first, second) and first.keys() == expected.keys()
    for n in first:
        if ".neurons." in n:
            assert not torch.equal(first[n], before[n])
            torch.testing.assert_close(first[n], expected[n], rtol=0, atol=1e-6)
        else:
            assert torch.equal(first[n], before[n])


@pytest.mark.slow
def test_the_guard_works_on_shards(two_processes):
    for rank in (0, 1):
        looked_at, same = json.loads((two_processes / f"results-{rank}.json").read_text())["sharded digests"]
        assert looked_at > 20 and same


@pytest.mark.slow
def test_sharded_rest_is_refused(two_processes):
    for rank in (0, 1):
        message = json.loads((two_processes / f"results-{rank}.json").read_text())["sharded rest"]
        assert ".mlp." in message and "mode='selected'" in message


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
