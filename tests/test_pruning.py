"""Pins that pruning is ablation without the cost: the pruned model answers and trains as the ablated one; on leaving,
the model is whole and the removed neurons have not moved by a bit; a saved pruned model comes back bit for bit;
what cannot be cut is refused before anything is touched."""

import copy
import json

import families
import pytest
import torch
from families import D, FAMILIES, HIDDEN, LAYERS
from torch.nn.utils import prune as torch_pruning

from llmfact_nb.finetune import neuron_parameters
from llmfact_nb.masked_model import MaskedModel, made_biases
from llmfact_nb.masks import NeuronMask
from llmfact_nb.tuning.pruning import load_pruned, prune, pruned_training, pruning_mask, save_pruned
from llmfact_nb.sites import neuron_sites

IDS = torch.tensor([[5, 9, 17, 30, 8, 41], [7, 7, 22, 3, 46, 12]])
BUILDS = ["gpt2", "llama", "gpt_neox", "opt", "phi3", "gemma3_text"]
FURTHER = [
    "bloom",
    "mistral",
    "qwen2",
    "falcon",
    "mpt",
    "phi",
    "starcoder2",
    "olmo2",
    "glm4",
    "codegen",
    "nemotron",
    "exaone4",
    "apertus",
    "lfm2",
]


def drawn(name="llama", shares=(0.2, 0.5, 0.7), seed=0):
    "Neurons to remove, a different number in each layer."
    generator = torch.Generator().manual_seed(seed)
    return NeuronMask.from_layers(
        [torch.rand(FAMILIES[name].hidden, generator=generator) < s for s in shares], site="mlp_hidden"
    )


def built(name, **options):
    "A model without dropout, so that two trainings can be compared."
    off = {"gpt2": dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), "opt": dict(dropout=0.0)}.get(name, {})
    return families.build(name, **off, **options)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_whole(model, before, state, plain=None):
    "The model is as it was."
    assert [n for n, _ in model.named_parameters()] == list(before) and all(
        torch.equal(p, before[n]) for n, p in model.named_parameters()
    )
    assert families.state(model) == state and not hasattr(model, "neuron_pruning")
    assert neuron_sites(model, "mlp_hidden").widths == (before_width(model),) * LAYERS
    if plain is not None:
        assert torch.equal(logits(model), plain)


def before_width(model):
    return {"bloom": 4 * D, "falcon": 4 * D, "mpt": 4 * D}.get(model.config.model_type, HIDDEN)


@pytest.mark.parametrize("name", BUILDS + FURTHER)
def test_pruned_is_ablated_and_restored_is_the_old_model(name):
    model, mask = families.build(name), drawn(name)
    before, state, plain, objects = (
        weights(model),
        families.state(model),
        logits(model),
        [id(p) for p in model.parameters()],
    )
    with MaskedModel(model).ablate(mask):
        expected = logits(model)
    handle = prune(model, mask, verbose=False)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain).abs().max() > 1e-2
    assert (
        handle.mask == mask
        and handle.widths == tuple(w - n for w, n in zip(mask.widths, mask.counts))
        and model.neuron_pruning is handle
    )
    assert neuron_sites(model, "mlp_hidden").widths == handle.widths
    of = sum(p.numel() for p in model.parameters())
    assert of == sum(p.numel() for p in before.values()) - sum(
        len(p.index) * before[p.name].numel() // before[p.name].shape[p.axis]
        for p in neuron_parameters(families.build(name), mask)
    )
    assert handle.restore() is model
    assert_whole(model, before, state, plain)
    assert [id(p) for p in model.parameters()] == objects  # the same parameters, for whoever holds them


@pytest.mark.parametrize("name", BUILDS)
def test_training_moves_the_survivors_as_under_ablation_and_nothing_of_the_removed(name):
    ends = {}
    for arm in ("pruned", "ablated"):
        model, mask = built(name).train(), drawn(name)
        start = weights(model)
        with pruned_training(model, mask, verbose=False) if arm == "pruned" else MaskedModel(model).ablate(mask):
            optimizer = torch.optim.AdamW(
                model.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-4, fused=True
            )  # keys' biases have gradients of rounding noise only: not to be blown up
            for _ in range(10):
                model(IDS, labels=IDS).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            answers = logits(model)
        ends[arm] = model
        if arm == "pruned":
            for part in neuron_parameters(model, mask):
                assert torch.equal(part.of(model), start[part.name].index_select(part.axis, part.index))
            for part in neuron_parameters(model, ~mask):
                assert (part.of(model) != start[part.name].index_select(part.axis, part.index)).all()
            with MaskedModel(model).ablate(mask):
                torch.testing.assert_close(logits(model), answers, rtol=1e-4, atol=1e-4)
            assert all(p.grad is None for p in model.parameters())
    inside = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in start.items()}
    for part in neuron_parameters(model, mask):
        inside[part.name].index_fill_(part.axis, part.index, True)
    for (n, p), q in zip(ends["pruned"].named_parameters(), ends["ablated"].parameters()):
        torch.testing.assert_close(p[~inside[n]], q[~inside[n]], rtol=1e-3, atol=1e-4)
    assert any(
        (q[inside[n]] != start[n][inside[n]]).any() for n, q in ends["ablated"].named_parameters()
    )  # the ablated ones do decay


@pytest.mark.parametrize(
    "options", [dict(optim="adamw_torch_fused", weight_decay=0.1), dict(optim="sgd", gradient_accumulation_steps=2)]
)
def test_in_the_trainer(options, tmp_path):
    from transformers import Trainer, TrainingArguments

    model, mask = built("gpt2"), drawn("gpt2")
    start, rows = weights(model), [{"input_ids": IDS[i % 2], "labels": IDS[i % 2]} for i in range(8)]
    with pruned_training(model, mask, verbose=False):
        arguments = TrainingArguments(
            str(tmp_path),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            save_steps=2,
            save_strategy="steps",
            **options,
        )
        Trainer(model, arguments, train_dataset=rows).train()
        whole = weights(model)
        again = Trainer(model, arguments, train_dataset=rows)  # resumes from what was saved in the pruned sizes
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert all(torch.equal(p, whole[n]) for n, p in model.named_parameters())
    for part in neuron_parameters(model, mask):
        assert torch.equal(part.of(model), start[part.name].index_select(part.axis, part.index))
    assert all(
        (part.of(model) != start[part.name].index_select(part.axis, part.index)).any()
        for part in neuron_parameters(model, ~mask)
    )


@pytest.mark.parametrize("then", ["restore", "keep"])
def test_an_exception_leaves_the_model_whole(then):
    model, mask = families.build("llama"), drawn()
    before, state, plain = weights(model), families.state(model), logits(model)
    with pytest.raises(KeyboardInterrupt):
        with pruned_training(model, mask, then=then, verbose=False):
            model(IDS, labels=IDS).loss.backward()
            raise KeyboardInterrupt
    assert_whole(model, before, state, plain)
    with pytest.raises(ZeroDivisionError):
        with pruned_training(model, mask, then=then, verbose=False):
            with torch.no_grad():
                model.model.layers[0].mlp.up_proj.weight += 1
            raise ZeroDivisionError
    kept = ~mask.layers[0]
    moved = model.model.layers[0].mlp.up_proj.weight - before["model.layers.0.mlp.up_proj.weight"]
    torch.testing.assert_close(moved[kept], torch.ones(int(kept.sum()), D))  # what the survivors learned stays
    assert not moved[~kept].any()


def test_keep_and_restore_later():
    model, mask = families.build("gpt2"), drawn("gpt2")
    before, state, plain = weights(model), families.state(model), logits(model)
    with pruned_training(model, mask, then="keep", verbose=False) as handle:
        inside = logits(model)
    assert torch.equal(logits(model), inside) and model.neuron_pruning is handle and handle.widths != mask.widths
    assert model.config.n_inner == HIDDEN  # the configuration is left alone
    twin = copy.deepcopy(model)
    handle.restore()
    assert_whole(model, before, state, plain)
    with pytest.raises(ValueError):
        handle.restore()
    assert torch.equal(logits(twin), inside)  # a copy is pruned on its own
    twin.neuron_pruning.restore()
    assert_whole(twin, before, state, plain)
    with pruned_training(model, mask, verbose=False) as handle:
        handle.restore()  # early: the block's end is no error
    assert_whole(model, before, state, plain)


def test_generate():
    model, mask = families.build("llama"), drawn()
    arguments = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=-1)
    plain = model.generate(IDS, **arguments)
    with MaskedModel(model).ablate(mask):
        expected = model.generate(IDS, **arguments)
    with pruned_training(model, mask, verbose=False):
        assert torch.equal(model.generate(IDS, **arguments), expected) and not torch.equal(expected, plain)


@pytest.mark.parametrize("name", [n for n in BUILDS if n != "gpt2"])
def test_a_layer_without_neurons(name, tmp_path):
    model, mask = built(name).train(), drawn(name, (0.3, 1.0, 0.3))
    before, state = weights(model), families.state(model)
    with MaskedModel(model).ablate(mask):
        expected = logits(model)
    with pruned_training(model, mask, then="keep", verbose=False) as handle:
        assert handle.widths[1] == 0
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        assert model(IDS, labels=IDS).loss < loss
    again = load_pruned(save_pruned(model, tmp_path))
    assert torch.equal(logits(again), logits(model.eval()))
    handle.restore().train()
    assert families.state(model) == state
    for part in neuron_parameters(model, mask):
        assert torch.equal(part.of(model), before[part.name].index_select(part.axis, part.index))


def test_gpt2_refuses_a_layer_without_neurons():
    model = families.build("gpt2")
    before, state = weights(model), families.state(model)
    with pytest.raises(ValueError):
        prune(model, drawn("gpt2", (0.3, 1.0, 0.3)))
    assert_whole(model, before, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BUILDS)
def test_save_and_load(name, dtype, tmp_path):
    mask = drawn(name)
    families.build(name).save_pretrained(tmp_path / "whole")
    model = type(families.build(name)).from_pretrained(tmp_path / "whole", dtype=dtype)
    prune(model, mask, verbose=False)
    path = save_pruned(model, tmp_path / "deep" / "folder")
    assert {p.name for p in path.iterdir()} >= {"config.json", "model.safetensors", "pruning.json"}
    again = load_pruned(path)
    assert (
        type(again) is type(model)
        and not again.training
        and again.neuron_pruning.mask == mask
        and again.neuron_pruning.widths == model.neuron_pruning.widths
    )
    assert {n: (p.shape, p.dtype) for n, p in again.state_dict().items()} == {
        n: (p.shape, p.dtype) for n, p in model.state_dict().items()
    }
    assert torch.equal(logits(again), logits(model))
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) == (
        model.get_input_embeddings().weight is model.get_output_embeddings().weight
    )
    with pytest.raises(ValueError):
        again.neuron_pruning.restore()
    assert torch.equal(
        logits(load_pruned(save_pruned(again, tmp_path / "second"))), logits(model)
    )  # and so does a saved loaded one
    with pytest.raises((RuntimeError, ValueError)):
        type(model).from_pretrained(path)  # never silently with fresh MLPs


def test_tied_weights_stay_tied():
    model, mask = built("gpt2").train(), drawn("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    with pruned_training(model, mask, then="keep", verbose=False):
        assert model.lm_head.weight is model.transformer.wte.weight
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert model.lm_head.weight is model.transformer.wte.weight
    model.neuron_pruning.restore()
    assert model.lm_head.weight is model.transformer.wte.weight


def test_part_of_the_layers_and_no_site():
    model, mask = families.build("llama"), NeuronMask.from_layers([torch.arange(HIDDEN) % 3 == 0], depths=[1])
    plain = logits(model)
    with MaskedModel(model, "mlp_hidden").ablate(mask):
        expected = logits(model)
    with pruned_training(model, mask, verbose=False):
        assert neuron_sites(model, "mlp_hidden").widths == (HIDDEN, HIDDEN - mask.n, HIDDEN)
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model), plain)


def test_requires_grad_and_dtype_inside_the_block():
    model, mask = families.build("llama").requires_grad_(False), drawn()
    before = weights(model)
    with pruned_training(model, mask, verbose=False):
        assert not any(p.requires_grad for p in model.parameters())
        model.bfloat16()  # a change of type inside is carried out
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not any(
        p.requires_grad for p in model.parameters()
    )
    assert all(torch.equal(p, before[n].bfloat16()) for n, p in model.named_parameters())


def test_an_optimizer_from_before_is_refused():
    model, mask = families.build("llama"), drawn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError):
        with pruned_training(model, mask, verbose=False):
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
    before = weights(model)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()  # afterwards it holds the model's parameters again
    assert all((model.get_parameter(n) != p).any() for n, p in before.items() if "mlp" in n)


def test_empty_mask_warns_and_changes_nothing():
    model = families.build("llama")
    plain, before, state = logits(model), weights(model), families.state(model)
    with pytest.warns(UserWarning):
        with pruned_training(model, NeuronMask.empty([HIDDEN] * LAYERS, site="mlp_hidden"), verbose=False):
            assert torch.equal(logits(model), plain)
    assert_whole(model, before, state, plain)


def test_bad_masks():
    model = families.build("llama")
    before, state = weights(model), families.state(model)
    for mask, error in (
        (NeuronMask.full([HIDDEN] * LAYERS, site="mlp_hidden"), ValueError),
        (NeuronMask.full([D] * LAYERS, site="mlp_out"), ValueError),
        (NeuronMask.full([HIDDEN + 1] * LAYERS), ValueError),
        (NeuronMask.full([HIDDEN] * 9), ValueError),
        ([0, 1, 2], TypeError),
    ):
        for call in (lambda: prune(model, mask), lambda: pruned_training(model, mask).__enter__()):
            with pytest.raises(error):
                call()
    with pytest.raises(ValueError):
        pruned_training(model, drawn(), then="merge").__enter__()
    assert_whole(model, before, state)


def parametrised():
    model = families.build("llama")
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.down_proj)
    return model


def pruned_by_torch():
    model = families.build("llama")
    torch_pruning.l1_unstructured(model.model.layers[1].mlp.down_proj, "weight", amount=0.5)
    return model


def quantised():
    model = families.build("llama")
    model.is_quantized = True
    return model


def offloaded():
    model = families.build("llama")
    model.model.layers[1].mlp.up_proj.to("meta")
    return model


def compiled():
    model = families.build("llama")
    model.model.layers[0].compile()
    return model


def adapted():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(families.build("llama"), LoraConfig(target_modules=["down_proj"]))


def tuned():
    from llmfact_nb.finetune import NeuronTuningConfig, get_neuron_model

    return get_neuron_model(families.build("llama"), NeuronTuningConfig(masks=drawn()), verbose=False)


def gated():
    from llmfact_nb.tuning.gates import NeuronGate

    model = families.build("llama")
    NeuronGate(drawn()).attach(model)
    return model


def already():
    model = families.build("llama")
    prune(
        model,
        NeuronMask.from_layers([torch.arange(HIDDEN) == -1] * 2 + [torch.arange(HIDDEN) == 0], site="mlp_hidden"),
        verbose=False,
    )
    return model


def hooked():
    model = families.build("llama")
    model.model.layers[2].mlp.down_proj.register_forward_hook(lambda m, a, y: y)
    return model


def tied():
    model = families.build("llama")
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[2].mlp.gate_proj.weight
    return model


def normed():
    "A norm inside the MLP, over its neurons, as BitNet has it."
    model = families.build("llama")
    model.model.layers[1].mlp.norm = torch.nn.LayerNorm(HIDDEN)
    return model


@pytest.mark.parametrize(
    "make, error, named",
    [
        (quantised, ValueError, "quantised"),
        (offloaded, ValueError, "layers.1.mlp.up_proj"),
        (compiled, ValueError, "compiled"),
        (adapted, NotImplementedError, "layers.0.mlp"),
        (tuned, ValueError, "model.neuron_tuning"),
        (gated, ValueError, "model.neuron_gate"),
        (already, ValueError, "model.neuron_pruning"),
        (hooked, ValueError, "layers.2.mlp.down_proj"),
        (tied, ValueError, "layers.2.mlp.gate_proj"),
        (parametrised, ValueError, "layers.1.mlp.down_proj"),
        (pruned_by_torch, ValueError, "layers.1.mlp.down_proj"),
        (normed, NotImplementedError, "layers.1.mlp.norm.weight"),
        (lambda: families.build("mixtral"), NotImplementedError, "mixtral"),
        (lambda: families.build("bert"), NotImplementedError, "encoder.layer.0"),
    ],
    ids=lambda a: getattr(a, "__name__", None),
)
def test_models_that_cannot_be_cut(make, error, named):
    model = make()
    shapes = [p.shape for p in model.parameters()]
    with pytest.raises(error) as e:
        prune(model, drawn(), verbose=False)
    assert named in str(e.value)
    assert [p.shape for p in model.parameters()] == shapes
    if make is tuned:
        model.neuron_tuning.close()


def test_open_masks_are_refused():
    model = families.build("llama")
    with MaskedModel(model).ablate(drawn()):
        with pytest.raises(ValueError):
            prune(model, drawn(), verbose=False)
    prune(model, drawn(), verbose=False)
    with pytest.raises(ValueError):
        MaskedModel(model).ablate(drawn()).__enter__()


def test_adapters_elsewhere_are_no_hindrance(tmp_path):
    from peft import LoraConfig, get_peft_model

    model, mask = get_peft_model(families.build("llama"), LoraConfig(target_modules=["q_proj"])), drawn()
    plain = logits(model)
    with pruned_training(model, mask, verbose=False):
        assert not torch.allclose(logits(model), plain)
        with pytest.raises(TypeError):
            save_pruned(model, tmp_path)
    assert torch.equal(logits(model), plain)


def test_files_that_are_not_whole(tmp_path):
    model = families.build("llama")
    with pytest.raises(ValueError):
        save_pruned(model, tmp_path / "plain")
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(FileNotFoundError):
        load_pruned(tmp_path / "plain")
    prune(model, drawn(), verbose=False)
    path = save_pruned(model, tmp_path / "pruned")
    good = (path / "pruning.json").read_text()
    record = json.loads(good)
    other = {d: list(range(HIDDEN - w)) for d, w in zip(record["removed"], (5, 6, 7))}
    for changed in (
        "{",
        "{}",
        json.dumps({**record, "widths": record["widths"][:2]}),
        json.dumps({**record, "widths": [9, 9, 9]}),
        json.dumps({**record, "removed": {"0": [99], "1": [], "2": []}}),
        json.dumps({**record, "removed": other, "widths": [5, 6, 7]}),
        json.dumps({**record, "architecture": "NoSuchModel"}),
        json.dumps({**record, "biases made": ["model.layers.9.mlp.down_proj"]}),
        json.dumps({**record, "biases made": ["model.norm"]}),
        json.dumps({**record, "biases made": ["model.layers.1.mlp.down_proj"]}),
        json.dumps({**record, "removed": {}}),
    ):
        (path / "pruning.json").write_text(changed)
        with pytest.raises(ValueError) as e:
            load_pruned(path)
        assert str(path) in str(e.value)
    (path / "pruning.json").write_text(good)
    load_pruned(path)
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError):
        load_pruned(path)


def test_an_interrupted_save_is_no_pruned_model(tmp_path, monkeypatch):
    model, mask = families.build("llama"), drawn()
    with pruned_training(model, mask, then="keep", verbose=False):
        save_pruned(model, tmp_path)

    def broken(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(type(model), "save_pretrained", broken)
    with pytest.raises(OSError):
        save_pruned(model, tmp_path)
    with pytest.raises(FileNotFoundError):
        load_pruned(tmp_path)


def test_what_is_printed(capsys):
    model, mask = families.build("llama"), drawn()
    total = sum(p.numel() for p in model.parameters())
    handle = prune(model, mask)
    assert capsys.readouterr().out.strip() == str(handle)
    left = total - mask.n * 3 * D
    assert f"removed {mask.n} of 72 neurons" in str(handle) and f"{left:,} of {total:,} parameters" in str(handle)
    assert str(handle).endswith(" ".join(str(HIDDEN - n) for n in mask.counts))
    handle.restore()
    assert "restored" in str(handle)


def probe(name, model):
    "Means of random texts at mlp_hidden."
    from llmfact_nb.activations import capture

    texts = [families.words(20 + i, seed=i) for i in range(4)]
    return capture(model, families.tokenizer(), texts, "mlp_hidden", progress=False)


@pytest.mark.parametrize("exclude", [None, "sinks"])
@pytest.mark.parametrize("name", BUILDS)
def test_compensated_is_ablated_to_the_mean_and_restored_is_the_old_model(name, exclude, tmp_path):
    model, mask = built(name), drawn(name)
    before, state, plain, acts = weights(model), families.state(model), logits(model), probe(name, model)
    rows = ~acts.sinks if exclude else torch.ones_like(acts.sinks)
    means = acts.values[rows].double().mean(0).float()
    with MaskedModel(model).ablate(mask, replace=means):
        expected = logits(model)
    prune(model, mask, acts, exclude, verbose=False)
    assert (logits(model) - expected).abs().max() < 1e-4 < (plain - expected).abs().max()
    again = load_pruned(save_pruned(model, tmp_path / "pruned"))
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(load_pruned(save_pruned(again, tmp_path / "again"))), logits(model))
    model.neuron_pruning.restore()
    assert_whole(model, before, state, plain)


def test_a_bias_keeps_what_it_learned_while_neurons_were_away():
    model = built("gpt2")
    bias = model.transformer.h[1].mlp.c_proj.bias
    old = bias.detach().clone()
    with pruned_training(model, drawn("gpt2"), compensate=probe("gpt2", model), verbose=False):
        with torch.no_grad():
            bias[3] += 1
    learned = bias.detach() - old
    assert learned[3] == pytest.approx(1, abs=1e-5) and (learned != 0).sum() == 1


@pytest.mark.parametrize("site", ["mlp_hidden", "mlp_out", "attn_heads"])
@pytest.mark.parametrize("name", BUILDS)
def test_baked_means_are_kept_in_a_file(name, site, tmp_path):
    "By load_pruned in every family; by from_pretrained alone where the configuration has a place for the biases."
    from transformers import AutoModelForCausalLM

    model, sites = built(name), neuron_sites(families.build(name), site)
    some = torch.rand(sites.n_neurons, generator=torch.Generator().manual_seed(3)) < 0.4
    values = torch.linspace(-1, 1, sites.n_neurons)
    baked = MaskedModel(model).bake(NeuronMask.from_flat(some, sites.widths, site), values)
    made = made_biases(baked)
    if not made:
        with pytest.raises(ValueError):
            save_pruned(baked, tmp_path / "one")
        return
    again = load_pruned(save_pruned(baked, tmp_path / "one"))
    twice = load_pruned(save_pruned(again, tmp_path / "two")) if made_biases(again) else again
    for other in (again, twice):
        assert type(other) is type(model) and not other.training
        torch.testing.assert_close(logits(other), logits(baked), rtol=1e-5, atol=1e-5)
    if name == "llama":
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "one").eval()
        torch.testing.assert_close(logits(plain), logits(baked), rtol=1e-5, atol=1e-5)
    assert not made_biases(model) and (logits(baked) - logits(model)).abs().max() > 1e-2


def test_a_baked_model_can_be_pruned_and_keeps_its_own_biases():
    model = built("llama")
    sites = neuron_sites(model, "mlp_hidden")
    first = NeuronMask.from_flat(torch.arange(sites.n_neurons) % 3 == 0, sites.widths, "mlp_hidden")
    baked = MaskedModel(model).bake(first, torch.ones(sites.n_neurons))
    before, made = logits(baked), made_biases(baked)
    prune(baked, first, torch.linspace(0, 1, sites.n_neurons), verbose=False).restore()
    assert torch.equal(logits(baked), before) and made_biases(baked) == made
    prune(model, first, torch.ones(sites.n_neurons), verbose=False)
    assert made_biases(model) == made
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    assert made_biases(model.neuron_pruning.restore()) == []


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi3"])
def test_equal_widths_with_compensation(name, tmp_path):
    "An ordinary checkpoint where the configuration has an option for biases of the MLP."
    from transformers import AutoModelForCausalLM

    model = built(name)
    acts = probe(name, model)
    prune(model, pruning_mask(acts.moments()[1], 0.25, acts.layout), acts, verbose=False)
    path = save_pruned(model, tmp_path)
    torch.testing.assert_close(logits(load_pruned(path)), logits(model), rtol=1e-5, atol=1e-5)
    assert json.loads((path / "pruning.json").read_text())["plain"] == (name == "llama")
    if name == "llama":
        plain = AutoModelForCausalLM.from_pretrained(path).eval()
        torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BUILDS)
def test_equal_widths_give_an_ordinary_checkpoint(name, tmp_path):
    from transformers import AutoModelForCausalLM

    model = built(name)
    layout = probe(name, model).layout
    scores = torch.rand(layout.n_neurons, generator=torch.Generator().manual_seed(1))
    prune(model, pruning_mask(scores, 0.25, layout), verbose=False)
    path = save_pruned(model, tmp_path)
    for again in (AutoModelForCausalLM.from_pretrained(path), load_pruned(path)):
        assert torch.equal(logits(again.eval()), logits(model))


def test_activations_of_other_neurons_are_refused_before_anything_is_cut():
    model = built("llama")
    before, state = weights(model), families.state(model)
    from llmfact_nb.activations import capture

    other = capture(model, families.tokenizer(), [families.words(20)], "mlp_out", progress=False)
    with pytest.raises(ValueError):
        prune(model, drawn(), other)
    assert_whole(model, before, state)
