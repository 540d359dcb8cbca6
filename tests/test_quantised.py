"""Pins what a quantised base may and may not do: its neurons are read and masked, its chosen neurons train from the
dequantised values while the stored bytes stay as they are, and what weights of 8 or 4 bits cannot express is refused by
name. PyTorch's own 8-bit maps need no further package; torchao and bitsandbytes are in the tests marked `extra`."""

import importlib.util
import json
import subprocess
import sys
import warnings
from pathlib import Path

import accelerate
import families
import pytest
import torch
from torch import nn

from llmfact_nb.activations import capture
from llmfact_nb.across.untrained import untrained
from llmfact_nb.base.arguments import ArgumentError
from llmfact_nb.base.display import size_name
from llmfact_nb.base.identity import is_quantised, stored_tensors, weights_checksum
from llmfact_nb.base.quantised import bias_of, dequantised, gradients_through, quantised_maps, unpacked, unquantise
from llmfact_nb.finetune import NeuronTuningConfig, get_neuron_model, merge_and_unload, neuron_training
from llmfact_nb.masked_model import MaskedModel
from llmfact_nb.masks import NeuronMask
from llmfact_nb.networks import FunctionalNetworks
from llmfact_nb.sites import neuron_sites
from llmfact_nb.tuning.gates import NeuronGate
from llmfact_nb.tuning.pruning import prune
from llmfact_nb.tuning.sharing import load_neurons, save_neurons, to_peft_lora

IDS = torch.arange(4, 24)[None]
WIDE = dict(hidden_size=64, intermediate_size=128)  # 4-bit formats work in blocks of 64 weights


def int8(family="llama", **sizes):
    "A tiny model with PyTorch's own 8-bit maps."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but the one format that torch brings along
        return torch.ao.quantization.quantize_dynamic(families.build(family, **sizes), {nn.Linear}, dtype=torch.qint8)


def of_torchao(config="Int8WeightOnlyConfig"):
    from torchao import quantization

    model = families.build("llama", **WIDE)
    body = lambda m, name: isinstance(m, nn.Linear) and "lm_head" not in name
    quantization.quantize_(model, getattr(quantization, config)(), filter_fn=body)
    return model


def of_bitsandbytes(bits, dtype=torch.float32):
    sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
    try:
        from quantised import quantise
    finally:
        sys.path.pop(0)
    model = families.build("llama", **WIDE).to(dtype)
    quantise(model, f"{bits} bits")
    return model


KINDS = {
    "torchao, weights": of_torchao,
    "torchao, weights and inputs": lambda: of_torchao("Int8DynamicActivationInt8WeightConfig"),
    "bitsandbytes, 8 bits": lambda: of_bitsandbytes(8),
    "bitsandbytes, 4 bits": lambda: of_bitsandbytes(4),
    "bitsandbytes, 4 bits in bfloat16": lambda: of_bitsandbytes(4, torch.bfloat16),
}


@pytest.fixture(params=["torch", *(pytest.param(kind, marks=pytest.mark.extra) for kind in KINDS)])
def make(request):
    "A function that makes the same quantised model at every call."
    if request.param == "torch":
        return int8
    package = request.param.split(",")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'llmfact_nb[quantized]'")
    return KINDS[request.param]


def draw(model, share=0.2, layers=None):
    widths, generator = neuron_sites(model, "mlp_hidden").widths, torch.Generator().manual_seed(0)
    rows = [torch.rand(w, generator=generator) < share * (layers is None or i in layers) for i, w in enumerate(widths)]
    return NeuronMask.from_layers(rows, site="mlp_hidden")


def train(model, n=3, lr=1e-2):
    "Steps with everything that moves frozen weights elsewhere; return the loss before each, and after the last."
    optimizer = torch.optim.AdamW(model.neuron_tuning.param_groups(weight_decay=0.1, lr=lr))
    losses = []
    for _ in range(n):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return [*losses, model(IDS, labels=IDS).loss.item()]


def tuned(model, mask=None, **config):
    return get_neuron_model(
        model, NeuronTuningConfig(masks=draw(model) if mask is None else mask, **config), verbose=False
    )


def relative(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


def test_dequantised_weights_are_what_a_map_computes_with(make):
    model = make()
    maps = quantised_maps(model)
    assert len(maps) >= 3 * 7 and all(is_quantised(m) for m in maps.values())
    assert not any(is_quantised(m) for m in families.build("llama").modules())
    name, linear = next((n, m) for n, m in maps.items() if "down_proj" in n)
    plain = families.build("llama", **(WIDE if linear.in_features > families.HIDDEN else {})).get_submodule(name)
    assert relative(dequantised(linear), plain.weight) < 0.15  # 4 bits
    assert dequantised(linear).shape == (linear.out_features, linear.in_features) and bias_of(linear) is None
    assert dequantised(linear, torch.bfloat16).dtype == torch.bfloat16


def test_a_checksum_sees_every_stored_byte():
    one, other = int8(), int8()
    assert weights_checksum(one) == weights_checksum(other) != weights_checksum(families.build("llama"))
    rows = families.build("llama").model.layers[1].mlp.up_proj
    rows.weight.data[0, 0] += 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.model.layers[1].mlp.up_proj = torch.ao.quantization.quantize_dynamic(
            nn.Sequential(rows), {nn.Linear}, dtype=torch.qint8
        )[0]
    assert weights_checksum(one) != weights_checksum(other)


def test_gradients_pass_as_through_the_dequantised_weights(make):
    model = make().eval()

    def gradient(net):
        x = net.get_input_embeddings()(IDS).detach().requires_grad_()
        net(inputs_embeds=x, labels=IDS).loss.backward()
        return x.grad

    before = families.state(model)
    with gradients_through(model):
        passed = gradient(model)
    assert families.state(model)[: len(list(model.modules()))] == before[: len(list(model.modules()))]
    plain = unquantise(make().eval())
    assert not quantised_maps(plain)
    rounds_inputs = relative(model(IDS).logits, plain(IDS).logits)  # and straight-through gradients do not see it
    assert relative(passed, gradient(plain)) < (0.02 if model.dtype == torch.bfloat16 else 1e-3) + 5 * rounds_inputs


def test_reading_networks_and_masks_need_nothing_special(make):
    model = make().eval()
    texts, tokenizer = [families.words(12, i) for i in range(4)], families.tokenizer()
    seen = {}
    down = neuron_sites(model, "mlp_hidden")[1].module
    with torch.no_grad():
        handle = down.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
        model(torch.tensor([tokenizer(texts[0])["input_ids"]]))
        handle.remove()
    read = capture(model, tokenizer, texts, "mlp_hidden", batch_size=1, progress=False)
    torch.testing.assert_close(read.of_text(0).layer(1), seen["x"][0].float(), rtol=1e-3, atol=1e-4)
    assert FunctionalNetworks(3, max_iter=500).fit(read).key_neurons(fraction=0.1).n
    mask, every = draw(model), NeuronMask.full(neuron_sites(model, "mlp_hidden").widths, "mlp_hidden")
    with torch.no_grad():
        plain = model(IDS).logits
        with MaskedModel(model).ablate(mask):
            ablated = model(IDS).logits
        with MaskedModel(model).ablate(every):
            silent = model(IDS).logits
        down = neuron_sites(model, "mlp_out")
        handles = [s.module.register_forward_hook(lambda m, args, y: torch.zeros_like(y)) for s in down]
        by_hand = model(IDS).logits
        for h in handles:
            h.remove()
    assert not torch.equal(ablated, plain) and torch.equal(model(IDS).logits, plain)
    torch.testing.assert_close(silent, by_hand)


def test_chosen_neurons_train_and_the_stored_bytes_stay(make):
    model = make().train()
    mask, before = draw(model), {n: t.clone() for n, t in stored_tensors(model).items()}
    start = model(IDS).logits
    tuned(model, mask)
    assert torch.equal(model(IDS).logits, start)
    for owner, slices in model.neuron_tuning.slices().values():
        rows = dequantised(owner)[slices.index] if slices.side == "in" else dequantised(owner)[:, slices.index].T
        assert torch.equal(slices.joined("weight").detach(), rows.float())
    losses = train(model, 6)
    assert losses[-1] < losses[0] - 0.1
    after = stored_tensors(model)
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert {n for n in after if n not in before} == {n for n, _ in model.named_parameters() if ".neurons." in n}


def test_training_is_that_of_the_dequantised_model(make):
    model, plain = make().train(), unquantise(make()).train()
    off = relative(model(IDS).logits, plain(IDS).logits)
    ours, theirs = train(tuned(model), 5), train(tuned(plain), 5)
    assert abs(ours[-1] / theirs[-1] - 1) < 0.02 + off
    trained = lambda net: torch.cat([p.detach().float().flatten() for p in net.parameters() if p.requires_grad])
    assert relative(trained(model), trained(plain)) < 0.02 + off


def test_merging_is_refused_or_makes_the_model_plain(make, tmp_path):
    model = tuned(make()).train()
    train(model)
    with pytest.raises(ArgumentError) as e:
        merge_and_unload(model)
    assert e.value.argument == "model" and "layers.0" in e.value.value and hasattr(model, "neuron_tuning")
    before, plain_before = model(IDS).logits, unquantise(make()).train()(IDS).logits
    off = relative(make().train()(IDS).logits, plain_before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bfloat16 rounds
        assert merge_and_unload(model, dequantise=True) is model
    assert not quantised_maps(model) and not hasattr(model, "neuron_tuning")
    exact = 0.02 if model.dtype == torch.bfloat16 else 1e-4
    assert relative(model(IDS).logits, before) < exact + 3 * off
    assert relative(model(IDS).logits, plain_before) > 3 * relative(model(IDS).logits, before)  # the slices are in it
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=model.dtype)
    assert relative(again.eval()(IDS).logits, model.eval()(IDS).logits) < exact


def test_a_plain_model_may_be_merged_with_the_same_call():
    model = tuned(families.build("llama"))
    train(model)
    before = model(IDS).logits
    assert torch.allclose(merge_and_unload(model, dequantise=True)(IDS).logits, before, atol=1e-4)


@pytest.mark.parametrize("mode", ["rest", "full"])
def test_modes_that_change_the_base_are_refused(mode):
    model = int8()
    with pytest.raises(ArgumentError) as e:
        tuned(model, mode=mode)
    assert e.value.argument == "mode" and "layers.0" in e.value.accepted and not hasattr(model, "neuron_tuning")


def test_what_a_quantised_map_cannot_do_is_refused_by_name():
    model = int8()
    for argument, call in (
        ("also", lambda: tuned(model, also=["lm_head"])),
        ("also", lambda: tuned(model, also=["model.layers.0.self_attn"])),
        ("then", lambda: neuron_training(model, draw(model)).__enter__()),
        ("model", lambda: MaskedModel(model).bake(draw(model))),
    ):
        with pytest.raises(ArgumentError) as e:
            call()
        assert e.value.argument == argument, call
    for call in (lambda: prune(model, draw(model)), lambda: untrained(model), lambda: untrained(model, "permute")):
        with pytest.raises(ValueError):
            call()
    assert not hasattr(model, "neuron_tuning")
    tuned(model, also=["model.norm"])  # plain parts may train along
    norm = model.model.norm.weight.detach().clone()
    train(model)
    assert not torch.equal(model.model.norm.weight, norm)


class Packed(nn.Module):
    "A linear map in a format that nobody knows."

    def __init__(self, inputs, outputs):
        super().__init__()
        self.in_features, self.out_features, self.bias = inputs, outputs, None
        self.register_buffer("qweight", torch.zeros(inputs, outputs // 8, dtype=torch.int32))

    def forward(self, x):
        return x.new_zeros(*x.shape[:-1], self.out_features)


def with_integers(linear):
    "A map of whole numbers without a scale."
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)
    return linear


def misread(linear):
    from torch.ao.nn.quantized.dynamic import Linear

    class Twice(Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    linear.__class__ = Twice
    return linear


@pytest.mark.parametrize(
    "spoil",
    [lambda m: Packed(m.in_features, m.out_features), misread, lambda m: with_integers(nn.Linear(16, 24, bias=False))],
    ids=["unknown", "misread", "no scale"],
)
def test_a_format_that_cannot_be_read_is_refused_by_name(spoil):
    model = int8()
    model.model.layers[1].mlp.up_proj = spoil(model.model.layers[1].mlp.up_proj)
    for call in (quantised_maps, gradients_through, unquantise, tuned):
        with pytest.raises(ArgumentError) as e:
            call(model)
        assert e.value.argument == "model" and "model.layers.1.mlp.up_proj" in e.value.value
    assert not hasattr(model, "neuron_tuning") and is_quantised(model.lm_head)


@pytest.mark.parametrize("quantised", [False, True])
def test_a_device_map_that_splits_an_mlp_is_refused_by_its_name(quantised):
    model = int8() if quantised else families.build("llama")
    model.hf_device_map = {"model": 0, "model.layers.1.mlp.down_proj": 1, "lm_head": 1}
    with pytest.raises(ArgumentError) as e:
        tuned(model)
    assert e.value.argument == "model" and "model.layers.1.mlp " in e.value.value and "up_proj" not in e.value.value
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1, "model.layers.2": 0, "lm_head": "cpu"}
    tuned(model)


def test_a_device_map_by_blocks_changes_nothing():
    losses, logits = [], []
    for placed in (False, True):
        model, tokenizer = families.build("llama"), families.tokenizer()
        if placed:  # as `dispatch_model` does it on several devices
            parts = [f"model.layers.{i}" for i in range(families.LAYERS)]
            model.hf_device_map = {part: "cpu" for part in ("model.embed_tokens", *parts, "model.norm", "lm_head")}
            places = {"execution_device": model.hf_device_map, "offload": dict.fromkeys(model.hf_device_map, False)}
            accelerate.hooks.attach_align_device_hook_on_blocks(model, **places)
            assert "forward" in vars(model.model.layers[1])
        read = capture(model, tokenizer, [families.words(9)], "mlp_hidden", progress=False)
        losses.append(train(tuned(model)))
        merge_and_unload(model)
        with torch.no_grad(), MaskedModel(model).ablate(draw(model), torch.zeros(read.n_neurons)):
            logits.append(model(IDS).logits)
    assert losses[0] == losses[1] and torch.equal(*logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_of_base_slices_gradients_and_state_is_printed(dtype, capsys):
    model = int8()
    get_neuron_model(model, NeuronTuningConfig(masks=draw(model), dtype=dtype))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("memory: "))
    memory = model.neuron_tuning.memory()
    assert list(memory) == ["base", "slices", "gradients", "AdamW"]
    assert line == "memory: " + ", ".join(f"{what} {size_name(n)}" for what, n in memory.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_have_the_dtype_that_was_asked_for(dtype, tmp_path):
    model = tuned(int8(), dtype=dtype)
    losses = train(model, 5, lr=3e-2)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype} and losses[-1] < losses[0] - 0.1
    memory = model.neuron_tuning.memory()
    assert memory["gradients"] == sum(p.numel() for p in model.parameters() if p.requires_grad) * dtype.itemsize
    assert memory["AdamW"] == 2 * memory["gradients"] <= 2 * memory["slices"]
    assert memory["base"] == sum(t.nbytes for t in stored_tensors(int8()).values())
    save_neurons(model, tmp_path / "neurons.safetensors")
    again = load_neurons(int8(), tmp_path / "neurons.safetensors", verbose=False)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    with pytest.raises(ArgumentError) as e:
        NeuronTuningConfig(masks=draw(model), dtype=torch.float16)
    assert e.value.argument == "dtype"


def test_tuned_neurons_are_kept_in_a_file_and_only_for_this_base(make, tmp_path):
    model = tuned(make())
    train(model)
    save_neurons(model, tmp_path / "neurons.safetensors")
    again = load_neurons(make(), tmp_path / "neurons.safetensors", verbose=False)
    assert torch.equal(again.eval()(IDS).logits, model.eval()(IDS).logits)
    with pytest.raises(ValueError):
        load_neurons(unquantise(make()), tmp_path / "neurons.safetensors", verbose=False)


@pytest.mark.extra
@pytest.mark.parametrize("kind", KINDS)
def test_peft_applies_the_export_to_the_same_base(kind, tmp_path):
    peft = pytest.importorskip("peft")
    if importlib.util.find_spec(kind.split(",")[0]) is None:
        pytest.skip(f"{kind.split(',')[0]} is not installed: pip install 'llmfact_nb[quantized]'")
    model = tuned(KINDS[kind]())
    train(model)
    to_peft_lora(model, tmp_path)
    base = KINDS[kind]().eval()
    unpacked(base)  # else bitsandbytes computes in bfloat16 on some processors
    before = base(IDS).logits
    adapted = peft.PeftModel.from_pretrained(base, tmp_path).eval()(IDS).logits
    expected = model.eval()(IDS).logits
    assert relative(adapted, expected) < (0.05 if "bfloat16" in kind else 1e-4) < relative(before, expected)


def test_a_block_that_reverts_leaves_the_quantised_model_as_it_was(make):
    model = make().eval()
    before, stored = model(IDS).logits, {n: t.clone() for n, t in stored_tensors(model).items()}
    with neuron_training(model, draw(model), then="revert", verbose=False):
        losses = train(model)
    assert losses[-1] < losses[0] and torch.equal(model(IDS).logits, before)
    assert stored.keys() == stored_tensors(model).keys()


class Reordered(nn.Linear):
    "A map like a 4-bit one of bitsandbytes on a CPU with a faster kernel, after its first pass."

    def __init__(self):
        super().__init__(2, 2)
        self.support_avx512bf16_for_cpu, self.packed = True, True
        self.weight.quant_state = type("State", (), {"packing_format_for_cpu": True})()

    def _save_to_state_dict(self, *args):
        self.weight.quant_state.packing_format_for_cpu = self.packed = False


def test_bytes_that_were_reordered_are_put_back_and_stay_so():
    plain, model = nn.Linear(2, 2), nn.Sequential(Reordered(), nn.Linear(2, 2))
    unpacked(model)
    unpacked(plain)
    assert not model[0].packed and not model[0].support_avx512bf16_for_cpu
    model[0].packed = True
    unpacked(model)
    assert model[0].packed, "what cannot reorder its bytes is left alone"


def test_gates_learn_below_quantised_maps():
    found = []
    for model in (int8(), unquantise(int8())):
        for p in model.parameters():
            p.requires_grad_(False)
        gate = NeuronGate(NeuronMask.full(neuron_sites(model, "mlp_hidden").widths, "mlp_hidden"), kind="sigmoid")
        with gate.attached(model):
            model(IDS, labels=IDS).loss.backward()
        found.append(gate.bias.grad.clone())
    first = slice(0, families.HIDDEN)  # the lowest layer, below all other maps
    assert torch.nn.functional.cosine_similarity(found[0][first], found[1][first], 0) > 0.9


def test_attribution_of_a_quantised_model_is_that_of_its_dequantised_weights():
    from llmfact_nb.evaluate import EvalSet
    from llmfact_nb.study.selections import gradient_times_activation

    texts = EvalSet(families.tokenizer(), [families.words(20, i) for i in range(3)], max_length=20)
    ours, theirs = (gradient_times_activation(m.eval(), texts) for m in (int8(), unquantise(int8())))
    assert torch.corrcoef(torch.stack([ours, theirs]))[0, 1] > 0.98


@pytest.mark.extra
@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_is_loaded_quantised_by_load_model(bits, tmp_path):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed: pip install 'llmfact_nb[quantized]'")
    from transformers import BitsAndBytesConfig

    from llmfact_nb.base.models import load_model

    families.build("llama", **WIDE).save_pretrained(tmp_path)
    families.tokenizer().save_pretrained(tmp_path)
    how = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    model, tokenizer = load_model(tmp_path, quantization_config=how, device_map="auto")
    assert len(quantised_maps(model)) == families.LAYERS * 7 and model.is_quantized
    assert capture(model, tokenizer, [families.words(9)], "mlp_hidden", progress=False).n_tokens
    losses = train(tuned(model))
    assert losses[-1] < losses[0]
    merge_and_unload(model, dequantise=True).save_pretrained(tmp_path / "merged")
    plain, _ = load_model_of(tmp_path / "merged", tokenizer)
    torch.testing.assert_close(plain(IDS).logits, model.eval()(IDS).logits)


@pytest.mark.extra
def test_a_run_on_a_quantised_base_is_kept_and_verified(tmp_path):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed: pip install 'llmfact_nb[quantized]'")
    from small_runs import small_settings, small_world
    from transformers import BitsAndBytesConfig

    from llmfact_nb.command.run import run_experiment
    from llmfact_nb.command.verification import disagreements, verify_folder

    world = small_world(tmp_path)
    families.build("llama", **WIDE).save_pretrained(world / "model")
    how = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "dtype": torch.bfloat16}
    run = run_experiment(small_settings(world), tmp_path / "out", progress=False, **how)
    assert len(run.results) and json.loads((tmp_path / "out" / "settings.json").read_text())["dtype"] == "bfloat16"
    checks = verify_folder(tmp_path / "out", sample=3, progress=False)
    assert len(checks) and not len(disagreements(checks))


def load_model_of(folder, tokenizer):
    from llmfact_nb.base.models import load_model

    tokenizer.save_pretrained(folder)
    return load_model(folder)


@pytest.mark.extra
def test_a_tuning_step_on_8_bits_takes_little_more_than_half_the_memory():
    file = Path(__file__).parent.parent / "benchmarks" / "quantised.py"
    peak = {}
    for arm in ("float32", "int8 weights, torchao"):
        arguments = json.dumps(dict(arm=arm, family="1B", rows=2, length=32, share=0.02))
        out = subprocess.run(
            [sys.executable, file, "--child", arguments], stdout=subprocess.PIPE, text=True, check=True
        )
        peak[arm] = json.loads(out.stdout.splitlines()[-1])["peak_mb"]
    plain, rounded = peak.values()
    assert rounded < 0.55 * plain
