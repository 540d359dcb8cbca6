"""Files that know their model: the card survives every way from a capture to a mask, another model is refused with both
names, damaged cards are named, and folders with a description go to the hub and back."""

import copy
import dataclasses
import json
import shutil
import types
import warnings

import families
import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmfact_nb.ablation import EvaluationSet, ScoreCache, Settings, find_networks
from llmfact_nb.activations import Activations, capture
from llmfact_nb.base.arguments import ArgumentError
from llmfact_nb.base.files import HEADER, read_header
from llmfact_nb.base.identity import IN_MEMORY, ModelCard, common_card, model_card, weights_checksum
from llmfact_nb.finetune import NeuronTuningConfig, get_neuron_model, merge_and_unload, neuron_training
from llmfact_nb.masked_model import MaskedModel
from llmfact_nb.masks import Layout, NeuronMask
from llmfact_nb.networks import FunctionalNetworks
from llmfact_nb.show.network_cards import network_card
from llmfact_nb.show.network_page import write_network_page
from llmfact_nb.sites import neuron_sites
from llmfact_nb.study.pruning import pruning_study
from llmfact_nb.study.studies import (
    amplification_study, cross_task_study, damage_curve, network_study, preservation_study, random_share_study,
    subtraction_study, union_study,
)  # fmt: skip
from llmfact_nb.tuning.gates import NeuronGate
from llmfact_nb.tuning.pruning import prune
from llmfact_nb.tuning.sharing import NeuronFile, load_neurons, save_neurons

TOKENIZER, TEXTS = families.tokenizer(), [families.words(20, i) for i in range(6)]


@pytest.fixture(scope="module")
def world():
    model = families.build("llama")
    acts = capture(model, TOKENIZER, TEXTS, "mlp_hidden", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        networks = FunctionalNetworks(4, standardize=True, exclude="sinks", random_state=0).fit(acts)
    return model, acts, networks, networks.key_neurons(fraction=0.1)


def other_model(layer: int = 1):
    "The same shape and type, one weight of one neuron moved."
    model = families.build("llama")
    model.name_or_path = "somebody/else"
    with torch.no_grad():
        model.model.layers[layer].mlp.up_proj.weight[3, 3] += 1e-4
    return model


def test_a_card_goes_from_the_capture_to_the_mask(world, tmp_path):
    model, acts, networks, key = world
    own = model_card(model)
    assert own.name == IN_MEMORY and (own.type, own.layers, own.width) == ("llama", 3, 16)
    for thing in (acts, networks, key, *networks.masks(2.0), key | networks.masks(2.0)[0], ~key, key.matched_random(0)):
        assert thing.card.is_of(own) and thing.card.tokenizer and f"{len(TEXTS)} texts" in thing.card.texts
    assert key.card.settings["fraction"] == 0.1 and key.card.settings["n_components"] == 4
    assert (
        networks.masks(2.0)[2].card.settings["network"] == 2
        and "network" not in (networks.masks(2.0)[2] | networks.masks(2.0)[1]).card.settings
    )
    for thing, load in ((acts, Activations), (networks, FunctionalNetworks), (key, NeuronMask)):
        thing.save(tmp_path / "f.safetensors")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load.load(tmp_path / "f.safetensors").card == thing.card


def test_masks_of_heads_and_gates_have_cards(world):
    model, _, _, key = world
    heads = NeuronMask.from_heads(torch.ones(3, 2, dtype=torch.bool), neuron_sites(model, "attn_heads"))
    assert heads.card.is_of(model_card(model)) and neuron_sites(model).at([1]).card.is_of(model_card(model))
    assert NeuronGate(key).mask().card == key.card


def test_a_mask_rebuilt_over_a_layout_has_its_card(world, tmp_path):
    model, acts, networks, key = world
    key.to_csv(tmp_path / "m.csv")
    for layout in (acts.layout, networks.layout, key.layout, Layout.of(neuron_sites(model, "mlp_hidden"))):
        made = [NeuronMask.from_flat(key.flat, layout), NeuronMask.from_csv(tmp_path / "m.csv", layout)]
        for mask in (*made, NeuronMask.empty(layout), NeuronMask.full(layout)):
            assert mask.card is layout.card and mask.card.is_of(model_card(model))
            with pytest.raises(ArgumentError):
                MaskedModel(other_model()).ablate(mask)
        assert made == [key, key]
    assert NeuronMask.from_flat(key.flat, key.widths, key.site).card is None


STUDIES = {
    "union": lambda c, f, e: union_study(c, f, e, {"random": 1}),
    "damage": lambda c, f, e: damage_curve(c, f, e, (0.1,)),
    "preservation": lambda c, f, e: preservation_study(c, {4: f}, e),
    "amplification": lambda c, f, e: amplification_study(c, f, e, gains=(2.0,), adds=()),
    "networks": lambda c, f, e: network_study(c, f, e, control_seeds=1),
    "subtraction": lambda c, f, e: subtraction_study(c, f, e),
    "cross-task": lambda c, f, e: cross_task_study(c, {"here": f}, e),
    "random share": lambda c, f, e: random_share_study(c, f, e, 1),
    "pruning": lambda c, f, e: pruning_study(c, f, {"variance": f.variance}, e),
    "several processes": lambda c, f, e: union_study(c, f, e, {"random": 1}, n_jobs=2),
}


@pytest.mark.parametrize("study", STUDIES)
def test_studies_refuse_networks_of_another_model_before_they_measure(study, found):
    def never(model):
        raise AssertionError("measured")

    held_out = [EvaluationSet("none", ("nats",), "none", 10, never)]
    with pytest.raises(ArgumentError) as e:
        STUDIES[study](ScoreCache(other_model(), progress=False), found, held_out)
    assert e.value.argument == "interventions" and IN_MEMORY in str(e.value) and "somebody/else" in str(e.value)
    assert "any_model" not in str(e.value)  # a remedy that studies do not have
    with pytest.raises(AssertionError):
        STUDIES[study](ScoreCache(families.build("llama"), progress=False), found, held_out)


@pytest.fixture(scope="module")
def found():
    settings = Settings(n_components=4, n_init=1, fit_tokens=100, fit_length=20, fraction=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return find_networks(families.build("llama"), TOKENIZER, TEXTS, settings, progress=False)


REFUSALS = {
    "ablate": lambda m, w, **k: MaskedModel(m, **k).ablate(w[3]).__enter__(),
    "keep": lambda m, w, **k: MaskedModel(m, **k).keep(w[3]).__enter__(),
    "amplify": lambda m, w, **k: MaskedModel(m, **k).amplify(w[3], 2.0).__enter__(),
    "bake": lambda m, w, **k: MaskedModel(m, **k).bake(w[3]),
    "means": lambda m, w, **k: MaskedModel(m, **k).fit_means(w[1]),
    "tune": lambda m, w, **k: get_neuron_model(m, NeuronTuningConfig("selected", w[3]), False, **k),
    "training": lambda m, w, **k: neuron_training(m, w[3], verbose=False, **k).__enter__(),
    "prune": lambda m, w, **k: prune(m, w[3], verbose=False, **k),
    "card": lambda m, w, **k: network_card(m, TOKENIZER, w[2], 0, w[1], push_tokens=8, **k),
}


@pytest.mark.parametrize("how", REFUSALS)
def test_another_model_is_refused_with_both_names(how, world):
    with pytest.raises(ArgumentError) as e:
        REFUSALS[how](other_model(), world)
    assert IN_MEMORY in str(e.value) and "somebody/else" in str(e.value) and "any_model=True" in str(e.value)
    REFUSALS[how](other_model(), world, any_model=True)
    REFUSALS[how](families.build("llama"), world)


def test_the_page_refuses_activations_of_another_model(world, tmp_path):
    _, acts, networks, _ = world
    theirs = capture(other_model(), TOKENIZER, TEXTS, "mlp_hidden", progress=False)
    with pytest.raises(ArgumentError) as e:
        write_network_page(networks, tmp_path / "p.html", theirs, TOKENIZER)
    assert "somebody/else" in str(e.value) and not (tmp_path / "p.html").exists()
    write_network_page(networks, tmp_path / "p.html", theirs, TOKENIZER, any_model=True)
    write_network_page(networks, tmp_path / "q.html", acts, TOKENIZER)


def test_the_command_refuses_a_mask_of_another_model(world, tmp_path):
    from llmfact_nb.cli import chosen_neurons

    _, _, networks, key = world
    found = types.SimpleNamespace(networks=networks, key=key)
    theirs = capture(other_model(), TOKENIZER, TEXTS, "mlp_hidden", progress=False)
    NeuronMask.from_flat(theirs.values[0] > 0, theirs.layout).save(tmp_path / "theirs.safetensors")
    key.save(tmp_path / "ours.safetensors")
    assert chosen_neurons(found, file=tmp_path / "ours.safetensors")[1] == key
    with pytest.raises(ArgumentError) as e:
        chosen_neurons(found, file=tmp_path / "theirs.safetensors")
    assert "somebody/else" in str(e.value) and IN_MEMORY in str(e.value)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checksum_survives_saving_and_other_heads(name, dtype, tmp_path):
    model = families.build(name).to(dtype)
    checksum = weights_checksum(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert weights_checksum(again) == checksum and model_card(again).is_of(model_card(model))
    assert model_card(again).name == str(tmp_path) and model_card(again).public().name == tmp_path.name
    if name in ("llama", "gpt2"):
        base = families.build(name).base_model.to(dtype)
        assert weights_checksum(base) == checksum


CHANGES = {
    "one weight": lambda m: m.model.layers[2].self_attn.q_proj.weight.mul_(1.001),
    "behind torch's back": lambda m: m.model.layers[0].mlp.down_proj.weight.data.mul_(2),
    "one norm": lambda m: m.model.norm.weight[2].add_(0.01),
    "embedding": lambda m: m.model.embed_tokens.weight[7, 7].neg_(),
    "units of a norm trade places": lambda m: m.model.norm.weight.copy_(m.model.norm.weight.flip(0)),
    "half": lambda m: m.bfloat16(),
    "pruned": lambda m: prune(m, NeuronMask.from_layers([torch.arange(24) < 2] * 3, "mlp_hidden"), verbose=False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_another_model(change):
    model = families.build("llama")
    before = model_card(model)
    assert model_card(model).is_of(before)
    with torch.no_grad():
        CHANGES[change](model)
    assert not model_card(model).is_of(before)


def test_a_model_in_tuning_is_itself_and_a_tuned_one_another(world):
    _, _, networks, key = world
    model = families.build("llama")
    before = model_card(model)
    get_neuron_model(model, NeuronTuningConfig("selected", key), verbose=False)
    assert model_card(model).is_of(before), "slices in training are no part of it"
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    ids = torch.tensor([[5, 9, 17, 30, 8]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert model_card(model).is_of(before)
    with MaskedModel(model).ablate(key):
        pass
    assert not model_card(merge_and_unload(model)).is_of(before)
    gated = families.build("llama")
    NeuronGate(key).attach(gated)
    assert model_card(gated).is_of(before)


def test_an_offloaded_model_is_told_by_its_shape():
    with torch.device("meta"):
        empty = type(families.build("llama"))(families.config_of("llama"))
    assert model_card(empty).checksum == "" and model_card(empty).is_of(model_card(families.build("llama")))
    assert not model_card(empty).is_of(model_card(families.build("gpt2")))


def rewritten(path, change):
    "The same file with another description."
    header, tensors = read_header_of(path), load_file(path)
    change(header)
    save_file(tensors, path, {HEADER: json.dumps(header)})


def read_header_of(path):
    return read_header(path, {"m": "mask", "n": "networks", "a": "activations"}[path.name[0]])


def card_of(header):
    return header["learned"]["layout"] if "learned" in header else header


FILES = {"m.safetensors": NeuronMask, "n.safetensors": FunctionalNetworks, "a.safetensors": Activations}


@pytest.fixture
def files(world, tmp_path):
    _, acts, networks, key = world
    for thing, name in ((key, "m"), (networks, "n"), (acts, "a")):
        thing.save(tmp_path / f"{name}.safetensors")
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_a_file_without_a_card_is_read_with_a_warning(name, files):
    rewritten(files / name, lambda h: card_of(h).pop("card"))
    with pytest.warns(UserWarning) as told:
        found = FILES[name].load(files / name)
    assert any(name in str(w.message) for w in told)
    assert found.card is None
    if name == "m.safetensors":
        with MaskedModel(other_model()).ablate(found):
            pass


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c.pop("checksum"),
        lambda c: c.update(layers="3"),
        lambda c: c.update(layers=-1),
        lambda c: c.update(name=None),
        lambda c: c.update(settings=[1]),
        lambda c: c.update(colour="blue"),
        lambda c: c.clear(),
    ],
)
def test_a_damaged_card_is_named(name, damage, files):
    rewritten(files / name, lambda h: damage(card_of(h)["card"]))
    with pytest.raises(ValueError) as e:
        FILES[name].load(files / name)
    assert str(files / name) in str(e.value) and "card" in str(e.value)


@pytest.mark.parametrize("card", ["llama", 7, [], True])
def test_what_is_no_card_is_named(card, files):
    rewritten(files / "m.safetensors", lambda h: h.update(card=card))
    with pytest.raises(ValueError) as e:
        NeuronMask.load(files / "m.safetensors")
    assert "card" in str(e.value)


def test_what_two_models_share_has_no_card():
    a = ModelCard("llama", "a", 3, 16, "1" * 16, texts="x", settings={"k": 1, "z": 2})
    assert common_card([a, None, a.noted(k=2)]).settings == {"z": 2}
    assert common_card([None, None]) is None and common_card([a, dataclasses.replace(a, checksum="2" * 16)]) is None
    assert common_card([a, dataclasses.replace(a, texts="y")]).texts == ""
    mine, theirs = (NeuronMask.empty(Layout((4,), card=c)) for c in (a, dataclasses.replace(a, checksum="2" * 16)))
    assert (mine | theirs).card is None and mine == theirs and hash(mine) == hash(theirs)


layouts = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(lambda w: Layout(w, range(2, 2 + len(w))))


@settings(max_examples=30, deadline=None)
@given(layout=layouts, data=st.data())
def test_a_table_gives_back_the_mask(layout, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("csv") / "units.csv"
    bits = data.draw(st.lists(st.booleans(), min_size=layout.n_neurons, max_size=layout.n_neurons))
    mask = NeuronMask.from_flat(np.array(bits), layout)
    mask.to_csv(path)
    assert NeuronMask.from_csv(path, layout) == mask
    frame = pd.read_csv(path)
    assert list(frame.columns) == ["layer", "unit"] and len(frame) == mask.n
    frame.sample(frac=1, random_state=0)[["unit", "layer"]].assign(score=1.0).to_csv(path, index=False)
    assert NeuronMask.from_csv(path, layout.widths, depths=layout.depths) == mask


@pytest.mark.parametrize(
    "text, line",
    [
        ("layer,unit\n0,1\n0,24\n", "line 3"),
        ("layer,unit\n3,1\n", "line 2"),
        ("layer,unit\n0,-1\n", "line 2"),
        ("layer,unit\n0,1.5\n", "line 2"),
        ("layer,unit\n0\n", "line 2"),
        ("layer,unit\n\n0,x\n", "line 3"),
        ("a,b\n0,1\n", "columns"),
        ("", "columns"),
    ],
)
def test_a_bad_table_is_named_by_its_line(text, line, tmp_path):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError) as e:
        NeuronMask.from_csv(tmp_path / "t.csv", (24,) * 3)
    assert line in str(e.value) and "t.csv" in str(e.value)


RESULTS = pd.DataFrame(
    [
        dict(arm=a, seed=s, setting="zero, all tokens", units=8, measure="nats", damage=d, ci_low=d, ci_high=d)
        for a, s, d in (("unmasked", None, 0.0), ("key", None, 1.25), ("matched random", 1, 0.5))
    ]
)


def tuned_file(world, tmp_path):
    model = families.build("llama")
    get_neuron_model(model, NeuronTuningConfig("selected", world[3]), verbose=False)
    return NeuronFile(save_neurons(model, tmp_path / "neurons.safetensors"))


@pytest.mark.parametrize("what", ["mask", "networks", "neurons"])
def test_a_folder_holds_the_file_the_picture_and_the_controls(what, world, tmp_path):
    thing = {"mask": world[3], "networks": world[2]}.get(what)
    thing = tuned_file(world, tmp_path) if thing is None else thing
    folder = thing.save_pretrained(tmp_path / "out", results=RESULTS)
    assert {p.name for p in folder.iterdir()} == {"README.md", "config.json", "units.svg", thing.shared_file}
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert "matched random, seed 1" in page and "1.250" in page and "units.svg" in page and "unmasked" not in page
    assert "(in memory)" in page and "library_name" in huggingface_hub.ModelCard(page).data.to_yaml()
    assert (folder / "units.svg").read_text().startswith("<svg xmlns=")
    again = type(thing).from_pretrained(folder)
    if what == "mask":
        assert again == thing and again.card == thing.card
    elif what == "networks":
        assert torch.equal(again.maps_, thing.maps_) and again.card == thing.card
    else:
        base = families.build("llama")
        assert again.into(base, verbose=False) is base and hasattr(base, "neuron_tuning")


def test_folders_of_this_machine_are_not_told(tmp_path):
    families.build("llama").save_pretrained(tmp_path / "my-secret" / "tiny")
    model = type(families.build("llama")).from_pretrained(tmp_path / "my-secret" / "tiny")
    acts = capture(model, TOKENIZER, TEXTS, "mlp_hidden", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        networks = FunctionalNetworks(3, random_state=0).fit(acts)
    tuned = families.build("llama")
    for thing in (networks, networks.key_neurons(fraction=0.1)):
        folder = thing.save_pretrained(tmp_path / "out")
        assert all(b"my-secret" not in p.read_bytes() for p in folder.iterdir())
        assert type(thing).from_pretrained(folder).card.name == "tiny"
        shutil.rmtree(folder)
    get_neuron_model(model, NeuronTuningConfig("selected", networks.key_neurons(fraction=0.1)), verbose=False)
    assert b"my-secret" not in save_neurons(model, tmp_path / "n.safetensors").read_bytes()
    del tuned


class Hub:
    "What the mixin asks of the hub, kept in a folder."

    def __init__(self, place):
        self.place, self.calls = place, []

    def __call__(self, token=None):
        return self

    def create_repo(self, repo_id, private=None, exist_ok=False):
        self.calls.append(("create", repo_id, private))
        return types.SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, **options):
        self.calls.append(("upload", repo_id, options["commit_message"]))
        shutil.copytree(folder_path, self.place / repo_id)
        return f"https://hub.test/{repo_id}/commit/1"

    def download(self, repo_id, **options):
        self.calls.append(("download", repo_id, options))
        return str(self.place / repo_id)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    found = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", found)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found.download)
    one_file = lambda repo_id, filename, **options: f"{found.place}/{repo_id}/{filename}"
    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", one_file)
    return found


def test_pushed_and_read_from_the_hub(world, hub, tmp_path):
    key, networks, neurons = world[3], world[2], tuned_file(world, tmp_path)
    address = key.push_to_hub("user/mask", results=RESULTS, private=True, commit_message="key neurons")
    assert address.endswith("user/mask/commit/1")
    assert hub.calls == [("create", "user/mask", True), ("upload", "user/mask", "key neurons")]
    assert NeuronMask.from_pretrained("user/mask", revision="main") == key
    assert hub.calls[-1][:2] == ("download", "user/mask") and hub.calls[-1][2]["revision"] == "main"
    networks.push_to_hub("user/networks")
    assert torch.equal(FunctionalNetworks.from_pretrained("user/networks").maps_, networks.maps_)
    neurons.push_to_hub("user/neurons")
    base = families.build("llama")
    NeuronFile.from_pretrained("user/neurons").into(base, verbose=False)
    with pytest.raises(FileNotFoundError):
        NeuronMask.from_pretrained("user/empty")


def test_a_neuron_file_names_both_bases(world, tmp_path):
    file = tuned_file(world, tmp_path).path
    with pytest.raises(ValueError) as e:
        load_neurons(other_model(), file)
    assert IN_MEMORY in str(e.value) and "somebody/else" in str(e.value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_neurons(families.build("llama"), file, verbose=False)
    assert all(m.card.is_of(model_card(model)) for m in model.neuron_tuning.networks.values())


def test_a_pickled_and_copied_mask_keeps_its_card(world):
    import pickle

    key = world[3]
    assert pickle.loads(pickle.dumps(key)).card == copy.deepcopy(key).card == key.card
