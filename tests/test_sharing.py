"""Tuned neurons in a file: bit for bit the same after loading, refused for another base, and the same function as a
LoRA in stock PEFT."""

import json
import sys
import warnings

import families
import pytest
import torch
from safetensors.torch import save_file

from llmfact_nb.base.files import digest, load_tensors, save_tensors
from llmfact_nb.finetune import NeuronTuningConfig, get_neuron_model, merge_and_unload
from llmfact_nb.masks import NeuronMask
from llmfact_nb.tuning.sharing import describe_base, load_neurons, save_neurons, to_peft_lora
from llmfact_nb.sites import neuron_sites

BUILDS = [
    "gpt2",
    "llama",
    "gpt_neox",
    "opt",
    "phi3",
]  # Conv1D with biases, gated, parallel block with biases, OPT's names, gate and up in one matrix
IDS = torch.tensor([[5, 9, 14, 33, 8, 21, 40, 7], [11, 30, 6, 19, 25, 44, 13, 9]])


def networks(model, k=2, share=0.3):
    "k disjoint random masks; none has a neuron in layer 0."
    widths = neuron_sites(model, "mlp_hidden").widths
    draw = torch.rand(sum(widths), generator=torch.Generator().manual_seed(1))
    draw[: widths[0]] = 1
    return {
        f"net {i}": NeuronMask.from_flat((draw < share) & (torch.arange(len(draw)) % k == i), widths, site="mlp_hidden")
        for i in range(k)
    }


def train(model, steps=3, lr=1e-2):
    optimizer = torch.optim.AdamW(model.neuron_tuning.param_groups(weight_decay=0.1, lr=lr))
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def tuned(model, masks=None, **options):
    get_neuron_model(model, NeuronTuningConfig(masks=networks(model) if masks is None else masks), verbose=False)
    train(model, **options)
    return model


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def parameters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def untouched(model, name, **changes):
    fresh = families.build(name, **changes).to(model.dtype)
    return families.state(model) == families.state(fresh) and not hasattr(model, "neuron_tuning")


# --- the same after loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BUILDS)
def test_loaded_neurons_are_the_saved_ones_bit_for_bit(name, dtype, tmp_path):
    model = tuned(families.build(name).to(dtype), lr=1e-3)
    expected = logits(model)
    assert not torch.equal(expected, logits(families.build(name).to(dtype)))
    save_neurons(model, tmp_path / "n.safetensors")
    loaded = load_neurons(families.build(name).to(dtype), tmp_path / "n.safetensors", verbose=False)
    assert torch.equal(logits(loaded), expected)
    told = []
    for m in (model, loaded):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            merge_and_unload(m)
        told.append([str(w.message) for w in caught])  # of changes lost in rounding: bfloat16 only
    assert told[0] == told[1] and (dtype == torch.bfloat16 or not told[0])
    assert same(parameters(model), parameters(loaded))
    assert not same(parameters(model), parameters(families.build(name).to(dtype)))


def test_float32_slices_survive_beside_a_bfloat16_base(tmp_path):
    model = tuned(families.build("llama").to(torch.bfloat16), lr=1e-5)  # changes far below bfloat16's grain
    save_neurons(model, tmp_path / "n")
    loaded = load_neurons(families.build("llama").to(torch.bfloat16), tmp_path / "n", verbose=False)
    slices = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in slices.values()} == {torch.float32} and any(
        not torch.equal(p, p.bfloat16().float()) for p in slices.values()
    )
    assert same(slices, {n: p for n, p in loaded.named_parameters() if p.requires_grad})


def test_saving_leaves_the_model_in_tuning(tmp_path):
    model = tuned(families.build("gpt2"))
    before, state = parameters(model), families.state(model)
    save_neurons(model, tmp_path / "n")
    to_peft_lora(model, tmp_path / "lora")
    assert same(parameters(model), before) and families.state(model) == state
    train(model, 1)
    assert not same(parameters(model), before)


def test_networks_keep_their_names_order_and_neurons(tmp_path):
    first, second = networks(families.build("llama")).values()
    masks = {"zeta": second, "Ärger/0": first, "empty": NeuronMask.empty(first.widths, site="mlp_hidden")}
    with pytest.warns(UserWarning):
        model = tuned(families.build("llama"), masks)
    save_neurons(model, tmp_path / "n")
    with pytest.warns(UserWarning):
        loaded = load_neurons(families.build("llama"), tmp_path / "n", verbose=False)
    assert list(loaded.neuron_tuning.networks.items()) == list(masks.items())
    loaded.neuron_tuning.set_active(["Ärger/0"])
    before = {n: [p.detach().clone() for p in loaded.neuron_tuning.parameters_of(n)] for n in masks}
    train(loaded)
    moved = {n: not all(map(torch.equal, before[n], loaded.neuron_tuning.parameters_of(n))) for n in masks}
    assert moved == {"zeta": False, "Ärger/0": True, "empty": False}


def test_overlapping_networks_are_kept_as_they_trained(tmp_path):
    first, second = networks(families.build("llama")).values()
    with pytest.warns(UserWarning):
        model = tuned(families.build("llama"), {"a": first, "b": first | second})
    save_neurons(model, tmp_path / "n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_neurons(families.build("llama"), tmp_path / "n", verbose=False)
    assert loaded.neuron_tuning.networks == {"a": first, "b": second}
    assert torch.equal(logits(loaded), logits(model))


def test_masks_of_some_layers_and_of_unknown_site(tmp_path):
    mask = NeuronMask.from_layers([torch.arange(families.HIDDEN) < 4] * 2, depths=(0, 2))
    model = tuned(families.build("llama"), mask)
    save_neurons(model, tmp_path / "n")
    loaded = load_neurons(families.build("llama"), tmp_path / "n", verbose=False)
    assert loaded.neuron_tuning.networks == {"neurons": mask} and torch.equal(logits(loaded), logits(model))


def test_training_goes_on_as_if_never_saved(tmp_path):
    model = tuned(families.build("gpt2"))
    save_neurons(model, tmp_path / "n")
    loaded = load_neurons(families.build("gpt2"), tmp_path / "n", verbose=False)
    base = describe_base(loaded)
    here, there = train(loaded, 5), train(model, 5)
    assert here == there and here[-1] < here[0]
    assert same(parameters(loaded), parameters(model))
    assert describe_base(loaded) == base == describe_base(families.build("gpt2"))


def test_loading_says_what_trains(tmp_path, capsys):
    model = tuned(families.build("llama"))
    save_neurons(model, tmp_path / "n")
    load_neurons(families.build("llama"), tmp_path / "n")
    assert capsys.readouterr().out.strip() == str(model.neuron_tuning)
    load_neurons(families.build("llama"), tmp_path / "n", verbose=False)
    assert not capsys.readouterr().out


def test_saving_again_replaces_the_file(tmp_path):
    model = tuned(families.build("llama"))
    save_neurons(model, tmp_path / "n")
    train(model)
    assert save_neurons(model, str(tmp_path / "n")) == tmp_path / "n"
    assert torch.equal(logits(load_neurons(families.build("llama"), tmp_path / "n", verbose=False)), logits(model))
    assert [p.name for p in tmp_path.iterdir()] == ["n"]


def test_the_file_runs_no_code_and_names_what_it_holds(tmp_path):
    model = tuned(families.build("gpt2"))
    tensors, meta = load_tensors(save_neurons(model, tmp_path / "n"), "set of tuned neurons")
    expected = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert same(expected, {n: t for n, t in tensors.items() if n in expected})
    for name in expected:  # each slice stands beside the places it belongs to
        linear, number = name.split(".neurons.")[0], name.split(".neurons.")[1][0]
        index = tensors[f"{linear}.neurons.{number}.index"]
        layer = int(linear.split(".")[2])
        assert index.tolist() == model.neuron_tuning.networks[f"net {number}"].layers[layer].nonzero()[:, 0].tolist()
        assert len(index) == len(expected[name])
    assert (
        meta["base"]["model_type"] == "gpt2"
        and meta["base"]["dtype"] == "float32"
        and meta["base"]["widths"] == [families.HIDDEN] * families.LAYERS
    )


# --- parts that train as a whole


def classifier(seed=0, dtype=torch.float32):
    "A model with a head of its own, as everybody who starts to classify has another one."
    model = families.build("llama", "classification").to(dtype)
    with torch.no_grad():
        model.score.weight.copy_(torch.randn(model.score.weight.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def tuned_classifier(**options):
    model = classifier(**options)
    get_neuron_model(model, NeuronTuningConfig(masks=networks(model), also=["score"]), verbose=False)
    optimizer = torch.optim.AdamW(model.neuron_tuning.param_groups(lr=1e-2))
    for _ in range(3):
        model(IDS, labels=torch.tensor([2, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_head_goes_with_the_neurons(dtype, tmp_path):
    model = tuned_classifier(dtype=dtype)
    assert not torch.equal(model.score.weight, classifier(dtype=dtype).score.weight)
    save_neurons(model, tmp_path / "n")
    loaded = load_neurons(classifier(seed=1, dtype=dtype), tmp_path / "n", verbose=False)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.score.weight.requires_grad and not loaded.model.norm.weight.requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rounding to bfloat16
        assert same(parameters(merge_and_unload(loaded)), parameters(merge_and_unload(model)))


def test_all_but_a_trained_head_must_be_the_base(tmp_path):
    save_neurons(tuned_classifier(), tmp_path / "n")
    wrong = classifier(seed=1)
    with torch.no_grad():
        wrong.model.norm.weight[0] += 1e-6
    before = parameters(wrong)
    with pytest.raises(ValueError):
        load_neurons(wrong, tmp_path / "n")
    with pytest.raises(ValueError):
        load_neurons(families.build("llama", "classification", num_labels=2), tmp_path / "n")
    assert same(parameters(wrong), before)  # its own head included


def test_a_file_with_a_bad_head_leaves_the_head_alone(tmp_path):
    path = save_neurons(tuned_classifier(), tmp_path / "n")
    base = classifier(seed=1)
    before, state = parameters(base), families.state(base)
    for bad in (lambda t: t.double(), lambda t: t[:2].clone(), lambda t: t * float("inf")):
        good = path.read_bytes()
        forge(path, put("also.score.weight", bad))
        with pytest.raises(ValueError):
            load_neurons(base, path)
        path.write_bytes(good)
    assert same(parameters(base), before) and families.state(base) == state


def test_peft_gets_the_trained_head_too(tmp_path):
    model = tuned_classifier()
    loaded = in_peft(classifier(seed=1), to_peft_lora(model, tmp_path))
    assert (logits(loaded) - logits(model)).abs().max() <= 1e-6
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(classifier(seed=1)))
    merged = logits(loaded.merge_and_unload())
    assert (merged - logits(model)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("name", "head", "also", "why"),
    [
        ("gpt2", "causal", ["transformer.wte", "lm_head"], "tied to lm_head.weight"),
        ("llama", "base", ["norm"], "cannot be told from layers.0.input_layernorm"),
        ("gpt2", "causal", ["transformer.ln_f.bias"], "single parameter"),
    ],
)
def test_parts_that_peft_would_get_wrong_are_refused(name, head, also, why, tmp_path):
    model = families.build(name, head)
    get_neuron_model(model, NeuronTuningConfig(masks=networks(model), also=also), verbose=False)
    with pytest.raises(ValueError):
        to_peft_lora(model, tmp_path / "lora")
    with torch.no_grad():
        for n in model.neuron_tuning.also:
            model.get_parameter(n).add_(0.5)
    loaded = load_neurons(families.build(name, head), save_neurons(model, tmp_path / "n"), verbose=False)
    with torch.no_grad():
        assert torch.equal(loaded(IDS)[0], model(IDS)[0]) and not torch.equal(
            loaded(IDS)[0], families.build(name, head)(IDS)[0]
        )


# --- which base


def test_the_description_of_a_base_counts_names_shapes_dtypes_and_bytes():
    model = families.build("gpt2")
    own = describe_base(model)
    assert own == describe_base(families.build("gpt2")) and len(own["parameters"]) == len(
        list(model.named_parameters())
    )
    assert (
        model.lm_head.weight is model.transformer.wte.weight and "lm_head.weight" not in own["parameters"]
    )  # tied: once
    with torch.no_grad():
        model.transformer.ln_f.bias[3] += 1e-6
    other = describe_base(model)
    assert [n for n in own["parameters"] if own["parameters"][n] != other["parameters"][n]] == [
        "transformer.ln_f.bias"
    ] and own["checksum"] != other["checksum"]
    flat = families.build("gpt2")
    flat.transformer.wpe.weight = torch.nn.Parameter(
        flat.transformer.wpe.weight.detach().reshape(families.D, -1)
    )  # the same bytes in another shape
    assert describe_base(flat)["checksum"] != own["checksum"]


def nudged():
    model = families.build("llama")
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-6
    return model


WRONG = {
    "weights": (nudged, "values of model.norm.weight"),
    "dtype": (lambda: families.build("llama").to(torch.bfloat16), "dtype: saved float32, here bfloat16"),
    "architecture": (lambda: families.build("mistral"), "model type: saved llama, here mistral"),
    "widths": (
        lambda: families.build("llama", intermediate_size=32),
        r"neurons per layer: saved \[24, 24, 24\], here \[32, 32, 32\]",
    ),
    "shape": (
        lambda: families.build("llama", vocab_size=50),
        r"model.embed_tokens.weight: saved \['float32', \[48, 16\]\], here \['float32', \[50, 16\]\]",
    ),
    "head": (lambda: families.build("llama", "classification"), "score.weight, which only this model has"),
}


@pytest.mark.parametrize("case", WRONG)
def test_another_base_is_refused_and_named(case, tmp_path):
    make, message = WRONG[case]
    save_neurons(tuned(families.build("llama")), tmp_path / "n")
    wrong = make()
    before, state = parameters(wrong), families.state(wrong)
    with pytest.raises(ValueError):
        load_neurons(wrong, tmp_path / "n")
    assert same(parameters(wrong), before) and families.state(wrong) == state and not hasattr(wrong, "neuron_tuning")


def test_a_base_of_the_same_weights_but_another_model_type_is_refused(tmp_path):
    save_neurons(tuned(families.build("llama")), tmp_path / "n")
    twin = families.build("mistral")
    twin.load_state_dict(families.build("llama").state_dict())
    with pytest.raises(ValueError):
        load_neurons(twin, tmp_path / "n")


def test_a_base_in_tuning_or_no_model_at_all_is_refused(tmp_path):
    model = tuned(families.build("llama"))
    save_neurons(model, tmp_path / "n")
    with pytest.raises(ValueError):
        load_neurons(model, tmp_path / "n")
    with pytest.raises(TypeError):
        load_neurons("llama", tmp_path / "n")


def test_a_base_that_is_not_there_whole_is_refused(tmp_path):
    model = tuned(families.build("gpt2"))
    model.transformer.wpe.weight = torch.nn.Parameter(model.transformer.wpe.weight.to("meta"), requires_grad=False)
    with pytest.raises(ValueError):
        save_neurons(model, tmp_path / "n")
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize("write", [save_neurons, to_peft_lora])
def test_only_slices_can_be_saved(write, tmp_path):
    model = families.build("llama")
    with pytest.raises(ValueError):
        write(model, tmp_path / "n")
    for mode in ("rest", "full"):
        get_neuron_model(model, NeuronTuningConfig(mode, None if mode == "full" else networks(model)), verbose=False)
        with pytest.raises(ValueError):
            write(model, tmp_path / "n")
        merge_and_unload(model)
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize("write", [save_neurons, to_peft_lora])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_diverged_training_is_not_written(write, bad, tmp_path):
    model = tuned(families.build("gpt2"))
    with torch.no_grad():
        model.neuron_tuning.parameters_of("net 1")[-1].view(-1)[0] = bad
    with pytest.raises(ValueError):
        write(model, tmp_path / "n")
    assert not (tmp_path / "n").exists() or not list((tmp_path / "n").iterdir())


# --- files that are not what they should be


@pytest.mark.parametrize("write", [save_neurons, to_peft_lora])
def test_a_path_that_cannot_be_written(write, tmp_path):
    model = tuned(families.build("llama"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        write(model, tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_folder_is_no_file(tmp_path):
    model = tuned(families.build("llama"))
    with pytest.raises(OSError):
        save_neurons(model, tmp_path)
    with pytest.raises(FileNotFoundError):
        load_neurons(families.build("llama"), tmp_path)


def damage(path, case):
    data = path.read_bytes()
    if case == "cut in the tensors":
        path.write_bytes(data[:-100])
    elif case == "cut in the header":
        path.write_bytes(data[:200])
    elif case == "empty":
        path.write_bytes(b"")
    elif case == "one bit of a slice":
        path.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    elif case == "one letter of a name":
        assert data.count(b"net 1") == 1
        path.write_bytes(data.replace(b"net 1", b"nut 1"))
    elif case == "text":
        path.write_text("the neurons are in another castle\n" * 50)
    elif case == "of another program":
        save_file({"weight": torch.zeros(3)}, path)
    elif case == "a mask":
        NeuronMask.empty((4,)).save(path)
    elif case == "no list of tensors":
        save_tensors(path, {}, "set of tuned neurons")
    else:
        path.unlink()


@pytest.mark.parametrize(
    "case",
    [
        "cut in the tensors",
        "cut in the header",
        "empty",
        "one bit of a slice",
        "one letter of a name",
        "text",
        "of another program",
        "a mask",
        "no list of tensors",
        "none",
    ],
)
def test_damaged_and_foreign_files_are_refused(case, tmp_path):
    path = save_neurons(tuned(families.build("llama")), tmp_path / "n")
    damage(path, case)
    base = families.build("llama")
    with pytest.raises(FileNotFoundError if case == "none" else ValueError):
        load_neurons(base, path)
    assert untouched(base, "llama")


def forge(path, change):
    "Write the file anew with `change(tensors, header)`, and checksums that fit."
    tensors, meta = load_tensors(path, "set of tuned neurons")
    change(tensors, meta)
    about = json.dumps(
        [{k: meta.get(k) for k in ("networks", "widths", "depths", "also", "base")}, sorted(tensors)], sort_keys=True
    ).encode()
    meta["content"] = digest(
        torch.frombuffer(bytearray(about), dtype=torch.uint8), *(tensors[n] for n in sorted(tensors))
    )
    save_tensors(path, tensors, "set of tuned neurons", meta)


INDEX, WEIGHT = "model.layers.1.mlp.up_proj.neurons.0.index", "model.layers.1.mlp.up_proj.neurons.0.weight"


def put(name, function):
    return lambda tensors, meta: tensors.__setitem__(name, function(tensors[name]))


def header(**entries):
    return lambda tensors, meta: meta.update(entries)


def spoiled(t):
    t = t.clone()
    t[1, 2] = float("nan")
    return t


HOSTILE = {
    "neuron out of range": put("networks.0", lambda t: torch.cat([t, torch.tensor([72])])),
    "negative neuron": put("networks.0", lambda t: torch.cat([torch.tensor([-1]), t])),
    "neuron twice": put("networks.0", lambda t: torch.cat([t[:1], t])),
    "neurons in disorder": put("networks.0", lambda t: t.flip(0)),
    "neurons in two dimensions": put("networks.0", lambda t: t[None]),
    "neurons that are not whole": put("networks.0", lambda t: t.double()),
    "a neuron more": put("networks.1", lambda t: torch.cat([t, torch.tensor([71])]).unique()),
    "a neuron less": put("networks.0", lambda t: t[1:]),
    "the neurons of the other network": put("networks.0", lambda t: t + 1),
    "no neuron": lambda tensors, meta: tensors.update(
        {"networks.0": torch.zeros(0, dtype=torch.int64), "networks.1": torch.zeros(0, dtype=torch.int64)}
    ),
    "all neurons": put("networks.0", lambda t: torch.arange(72)),
    "place out of range": put(INDEX, lambda t: t + 1000),
    "place twice": put(INDEX, lambda t: t[:1].expand(len(t)).contiguous()),
    "another place": put(INDEX, lambda t: t.flip(0)),
    "places of another type": put(INDEX, lambda t: t.int()),
    "a row more": put(WEIGHT, lambda t: torch.cat([t, t[:1]])),
    "transposed": put(WEIGHT, lambda t: t.T.contiguous()),
    "whole numbers": put(WEIGHT, lambda t: t.long()),
    "finer numbers": put(WEIGHT, lambda t: t.double()),
    "complex numbers": put(WEIGHT, lambda t: t.to(torch.complex64)),
    "nan": put(WEIGHT, spoiled),
    "a slice missing": lambda tensors, meta: tensors.pop(WEIGHT),
    "a network's neurons missing": lambda tensors, meta: tensors.pop("networks.1"),
    "a slice too many": lambda tensors, meta: tensors.update(
        {WEIGHT.replace("layers.1", "layers.0"): torch.zeros(2, families.D)}
    ),
    "one network less": lambda tensors, meta: meta["networks"].pop(),
    "one name twice": lambda tensors, meta: meta["networks"][1].update(name="net 0"),
    "a name that is none": lambda tensors, meta: meta["networks"][1].update(name=7),
    "networks without names": header(networks=["net 0", "net 1"]),
    "a number of networks": header(networks=2),
    "no networks": header(networks=[]),
    "other site": lambda tensors, meta: [n.update(site="mlp_out") for n in meta["networks"]],
    "site that is none": lambda tensors, meta: [n.update(site={"a": 1}) for n in meta["networks"]],
    "huge layers": header(widths=[10**15] * 3),
    "other layers": header(depths=[0, 1, 7]),
    "layers that are none": header(depths=[[0], [1], [2]]),
    "one layer three times": header(depths=[0, 0, 0]),
    "widths that are none": header(widths="wide"),
    "a base without a name": header(base=None),
    "other parts that are none": header(also="score"),
    "a number of other parts": header(also=3),
    "other parts that the model lacks": header(also=["adapter"]),
    "other parts that are the neurons' own": header(also=["model.layers.1.mlp"]),
    "other parts that are not in the file": header(also=["model.norm"]),
    "other parts that are not said to train": lambda tensors, meta: tensors.update(
        {"also.model.norm.weight": torch.zeros(families.D)}
    ),
    "other parts without names": header(also=[3]),
    "a base of nothing": header(base={}),
    "a base whose parameters are none": lambda tensors, meta: meta["base"].update(checksum="0", parameters=3),
    "a base whose list is another's": lambda tensors, meta: meta["base"].update(checksum="0"),
}


def test_forging_alone_changes_nothing(tmp_path):
    model = tuned(families.build("llama"))
    forge(save_neurons(model, tmp_path / "n"), lambda tensors, meta: None)
    assert torch.equal(logits(load_neurons(families.build("llama"), tmp_path / "n", verbose=False)), logits(model))


@pytest.mark.parametrize("case", HOSTILE)
def test_untrue_files_are_refused_and_leave_the_base_alone(case, tmp_path):
    path = save_neurons(tuned(families.build("llama")), tmp_path / "n")
    base = families.build("llama")
    before = parameters(base)
    forge(path, HOSTILE[case])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of networks without neurons, on the way to the refusal
        with pytest.raises(ValueError):
            load_neurons(base, path)
    assert untouched(base, "llama") and same(parameters(base), before)


# --- PEFT


def in_peft(base, folder):
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing keys
        return PeftModel.from_pretrained(base, str(folder))


@pytest.mark.parametrize("name", BUILDS)
def test_stock_peft_computes_the_tuned_model(name, tmp_path):
    model = tuned(families.build(name))
    expected = logits(model)
    assert not torch.allclose(expected, logits(families.build(name)), atol=1e-2)
    loaded = in_peft(families.build(name), to_peft_lora(model, tmp_path))
    assert (logits(loaded) - expected).abs().max() <= 1e-6
    wrapped = {n.removeprefix("base_model.model.") for n, m in loaded.named_modules() if hasattr(m, "lora_A")}
    assert wrapped == set(model.neuron_tuning.slices())  # layer 0 has no chosen neuron
    merge_and_unload(model)
    merged = parameters(loaded.merge_and_unload())
    assert merged.keys() == parameters(model).keys()
    assert all((p - merged[n]).abs().max() <= 1e-6 for n, p in parameters(model).items())
    assert not any(".0." in n for n in wrapped)


def test_peft_tells_layer_1_from_layer_11(tmp_path):
    counts = [0, 3, 1, 2, 4, 1, 2, 3, 5, 1, 0, 7]
    model = families.build("gpt2", "base", n_layer=12)
    mask = NeuronMask.from_layers([torch.arange(families.HIDDEN) < n for n in counts], site="mlp_hidden")
    get_neuron_model(model, NeuronTuningConfig(masks=mask), verbose=False)
    with torch.no_grad():
        for p in model.neuron_tuning.parameters_of("neurons"):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
        loaded = in_peft(families.build("gpt2", "base", n_layer=12), to_peft_lora(model, tmp_path))
        assert (loaded(IDS).last_hidden_state - model(IDS).last_hidden_state).abs().max() <= 1e-6
    ranks = {
        n.removeprefix("base_model.model."): m.r["default"] for n, m in loaded.named_modules() if hasattr(m, "lora_A")
    }
    assert ranks == {f"h.{i}.mlp.{c}": n for i, n in enumerate(counts) if n for c in ("c_fc", "c_proj")}


@pytest.mark.parametrize(
    ("name", "head"), [("llama", "classification"), ("gpt2", "classification"), ("distilbert", "masked")]
)
def test_peft_takes_models_with_other_heads(name, head, tmp_path):
    model = families.build(name, head)
    get_neuron_model(model, NeuronTuningConfig(masks=networks(model)), verbose=False)
    with torch.no_grad():
        for p in model.neuron_tuning.parameters_of("net 0"):
            p.mul_(1.5)
    loaded = in_peft(families.build(name, head), to_peft_lora(model, tmp_path))
    assert not torch.allclose(logits(model), logits(families.build(name, head)), atol=1e-3)
    assert (logits(loaded) - logits(model)).abs().max() <= 1e-6


def test_the_lora_is_written_without_peft_and_names_no_folder(tmp_path, monkeypatch):
    families.build("llama").save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    model = tuned(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    monkeypatch.setitem(sys.modules, "peft", None)
    to_peft_lora(model, tmp_path / "lora")
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None and str(tmp_path) not in json.dumps(config)
    model.name_or_path = "some-org/Some-Llama.1"
    assert (
        json.loads((to_peft_lora(model, tmp_path / "lora") / "adapter_config.json").read_text())[
            "base_model_name_or_path"
        ]
        == "some-org/Some-Llama.1"
    )


def test_an_interrupted_export_leaves_the_old_one_whole(tmp_path, monkeypatch):
    import safetensors.torch

    model = tuned(families.build("llama"))
    to_peft_lora(model, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    train(model)
    with pytest.raises(OSError):
        to_peft_lora(model, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_biases_of_only_some_maps_are_said_to_hinder_merging(tmp_path):
    def uneven():
        model = families.build("llama", mlp_bias=True)
        for layer in model.model.layers:
            layer.mlp.down_proj.bias = None
        return model

    model = tuned(uneven())
    with pytest.warns(UserWarning):
        to_peft_lora(model, tmp_path)
    from peft import PeftModel

    with pytest.warns(UserWarning):
        loaded = PeftModel.from_pretrained(uneven(), str(tmp_path))
    assert (logits(loaded) - logits(model)).abs().max() <= 1e-6


# --- merged models


@pytest.mark.parametrize("name", BUILDS)
def test_a_merged_model_reloads_with_no_key_missing_or_unknown(name, tmp_path):
    from transformers import AutoModelForCausalLM

    model = merge_and_unload(tuned(families.build(name)))
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert describe_base(loaded) == describe_base(model)
    assert torch.equal(logits(loaded.eval()), logits(model))
