"""Heads, attention and the residual stream: which units belong to which head, against queries zeroed by hand; masks of
whole heads and their controls; that every later step takes the sites; and what is refused."""

import dataclasses
import json
import warnings

import families
import numpy as np
import pytest
import torch
from architectures import Subject, answer, close
from safetensors.torch import safe_open, save_file
from small_runs import small_run, small_world

from llmfact_nb.activations import Activations, capture
from llmfact_nb.base.arguments import ArgumentError
from llmfact_nb.base.files import HEADER
from llmfact_nb.finetune import NeuronTuningConfig, get_neuron_model
from llmfact_nb.masked_model import MaskedModel
from llmfact_nb.masks import CONTROLS, Layout, NeuronMask, control
from llmfact_nb.sites import SITES, NeuronSites, attach, neuron_sites
from llmfact_nb.tuning.pruning import prune

TOKENIZER, TEXTS = families.tokenizer(), [families.words(12, i) for i in range(6)]
MOE = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "olmoe", "doge"]
QUERIES = {  # name: (the map that makes queries, which of its outputs), for four heads of four numbers
    "llama": "self_attn.q_proj",
    "opt": "self_attn.q_proj",
    "bert": "attention.self.query",
    "gpt2": "attn.c_attn",
    "gptj": "attn.q_proj",
}


@pytest.mark.parametrize("name", QUERIES)
def test_units_of_a_head_are_those_that_its_queries_move(name):
    "Queries of one head are zeroed in the weights: its units change, and no other head's do."
    more = dict(n_head=4) if name in ("gpt2", "gptj") else dict(num_attention_heads=4, num_key_value_heads=2)
    model = families.build(name, **{k: v for k, v in more.items() if name == "llama" or k != "num_key_value_heads"})
    sites = neuron_sites(model, "attn_heads")
    assert sites.heads == (4, 4, 4) and sites[0].key_heads == (2 if name == "llama" else 4)
    seen: dict[str, torch.Tensor] = {}

    def read(key):
        with torch.no_grad(), attach(sites[:1], lambda i, x: seen.update({key: x.clone()}), model):
            model(input_ids=torch.tensor([[5, 9, 17, 30, 8]]))
        return seen[key].view(5, 4, -1)

    before = read("before")
    width = before.shape[-1]
    block = sites[0].name.removesuffix(f".{families.ATTENTION[name]}")
    queries = model.get_submodule(f"{block}.{QUERIES[name]}")
    weight = queries.weight.T if type(queries).__name__ == "Conv1D" else queries.weight
    with torch.no_grad():
        weight[2 * width : 3 * width] = 0
        if queries.bias is not None:
            queries.bias[2 * width : 3 * width] = 0
    moved = (read("after") - before).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [False, False, True, False]


@pytest.mark.parametrize("name", MOE)
def test_mixtures_of_experts_have_attention_and_a_stream(name):
    model = families.build(name)
    for site in ("attn_heads", "attn_out", "residual"):
        seen, inner = {}, site == "attn_heads"
        path = "" if site == "residual" else f".{families.ATTENTION[name]}"
        modules = [model.get_submodule(f"layers.{i}{path}") for i in range(families.LAYERS)]
        first = lambda out: out if isinstance(out, torch.Tensor) else out[0]
        hooks = [
            m.register_forward_hook(lambda m, a, out, i=i: seen.update({i: (a[0] if inner else first(out)).clone()}))
            for i, m in enumerate(modules)
        ]
        ids = torch.tensor([TOKENIZER(TEXTS[0])["input_ids"]])
        with torch.no_grad():
            model(input_ids=ids)
        for h in hooks:
            h.remove()
        got = capture(model, TOKENIZER, TEXTS[:1], site, progress=False)
        assert close(got.values, torch.cat([seen[i][0] for i in range(families.LAYERS)], 1)), site


def test_a_mask_of_heads_knows_its_heads(tmp_path):
    sites = neuron_sites(families.build("gpt2", n_head=4), "attn_heads")
    some = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = NeuronMask.from_heads(some, sites)
    assert torch.equal(mask.flat.view(3, 4, 4).float().mean(-1), some.float())
    assert mask == NeuronMask.from_heads(list(some.numpy()), sites)
    assert torch.equal(torch.stack(mask.head_shares), some.float()) and mask.as_heads().n == int(some.sum())
    mask.save(tmp_path / "m.safetensors")
    again = NeuronMask.load(tmp_path / "m.safetensors")
    assert again == mask and again.layout.heads == (4, 4, 4) and "heads" in repr(again)
    assert (~mask).as_heads().n == 12 - mask.as_heads().n
    assert (mask | NeuronMask.from_flat(torch.arange(48) == 1, mask.layout)).as_heads() is None or some[0, 0]
    plain = NeuronMask.from_flat(mask.flat, mask.widths, "attn_heads")
    assert plain == mask and hash(plain) == hash(mask) and plain.as_heads() is None and plain.head_shares == ()


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_of_heads_are_heads(name):
    layout = Layout((36, 36), site="attn_heads", heads=(9, 9))
    g = np.random.default_rng(0)
    score = torch.from_numpy(np.repeat(g.random(18), 4) + 0.01 * g.random(72))
    heads = [np.arange(9) < 2, np.arange(9) == 5]
    mask = NeuronMask.from_flat(np.concatenate([np.repeat(h, 4) for h in heads]), layout)
    drawn = control(name, mask, 3, score, score)
    assert drawn.as_heads().counts == (2, 1) and drawn.layout == layout and drawn.layout.heads == (9, 9)
    if name in ("random", "matched random"):
        assert (drawn & mask).n == 0
    means = score.view(18, 4).mean(1)
    if name == "top variance":
        assert drawn.as_heads().layers[1].nonzero().item() == int(means[9:].argmax())
    if name == "least active":
        assert drawn.as_heads().layers[1].nonzero().item() == int(means[9:].argmin())


def test_a_score_match_of_heads_is_by_bins():
    "The variance-matched head comes from the mask's own third of the layer."
    layout = Layout((36,), site="attn_heads", heads=(9,))
    score = torch.arange(9.0).repeat_interleave(4) + 1
    mask = NeuronMask.from_flat(torch.arange(36) // 4 == 7, layout)
    found = {int(control("matched random", mask, s, score).as_heads().flat.nonzero()) for s in range(20)}
    assert found == {6, 8}


@pytest.mark.parametrize("site", ["attn_heads", "attn_out", "residual"])
def test_a_run_takes_the_site(site, tmp_path):
    "Networks, arms, controls, scores and pages of a whole run."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = small_run(small_world(tmp_path), tmp_path / "run", site=site)
    networks = run.found.networks
    assert networks.site == site and networks.layout.heads == ((2, 2, 2) if site == "attn_heads" else ())
    damaged = run.results[(run.results.arm == "key") & (run.results.measure == "nats")]
    assert damaged.value.notna().all() and (damaged.value != damaged.unmasked).all()
    assert site in (tmp_path / "run" / "networks.html").read_text(encoding="utf-8")


def test_activations_keep_the_heads_and_older_files_are_read(tmp_path):
    acts = capture(families.build("llama"), TOKENIZER, TEXTS, "attn_heads", progress=False)
    path = acts.save(tmp_path / "a.safetensors")
    assert Activations.load(path).layout.heads == (2, 2, 2) == acts.layout.heads
    with safe_open(path, "pt") as f:
        meta, tensors = json.loads(f.metadata()[HEADER]), {k: f.get_tensor(k) for k in f.keys()}
    del meta["heads"]
    save_file(tensors, path, {HEADER: json.dumps(meta)})
    assert Activations.load(path).layout.heads == ()


@pytest.mark.parametrize("peft_target", ["o_proj", "all-linear"])
def test_the_sites_are_found_under_adapters(peft_target):
    peft = pytest.importorskip("peft")
    targets = peft_target if peft_target == "all-linear" else [peft_target]
    model = peft.get_peft_model(families.build("llama"), peft.LoraConfig(r=2, target_modules=targets))
    assert all(hasattr(s.module, "base_layer") for s in neuron_sites(model, "attn_heads"))
    assert [s.name.rpartition(".")[2] for s in neuron_sites(model, "residual")] == ["0", "1", "2"]


@pytest.mark.parametrize("what", ["rwkv", "recurrent_gemma", "mamba", "lfm2"])
def test_models_without_heads_in_every_layer_are_refused_by_name(what):
    for site in ("attn_heads", "attn_out"):
        with pytest.raises(NotImplementedError) as e:
            neuron_sites(families.build(what), site)
        assert repr(what) in str(e.value) and "candidates" in str(e.value)


@pytest.mark.parametrize("what", ["t5", "bart", "albert", "xlm"])
def test_a_stream_that_is_not_one_is_refused_by_name(what):
    with pytest.raises(NotImplementedError) as e:
        neuron_sites(families.build(what), "residual")
    assert repr(what) in str(e.value) and "candidates" in str(e.value)


def test_heads_that_do_not_divide_the_units_are_refused():
    model = families.build("llama")
    model.config.num_attention_heads = 3
    with pytest.raises(NotImplementedError) as e:
        neuron_sites(model, "attn_heads")
    assert "'llama'" in str(e.value) and "attn_out" in str(e.value)


@pytest.mark.parametrize("given", [(), (None,), ("text",)])
def test_a_block_that_gives_no_tensor_first_is_refused(given):
    model = families.build("llama")
    sites = neuron_sites(model, "residual")

    class Odd(torch.nn.Module):
        def forward(self, x):
            return given

    odd = Odd()
    with attach(NeuronSites([dataclasses.replace(sites[0], module=odd)], "residual"), lambda i, x: None):
        with pytest.raises(NotImplementedError) as e:
            odd(torch.zeros(1))
    assert sites[0].name in str(e.value)


def test_a_block_of_another_width_is_refused():
    model = families.build("llama")
    model.config.hidden_size = 12
    with pytest.raises(ValueError) as e:
        capture(model, TOKENIZER, TEXTS[:1], "residual", progress=False)
    assert "model.layers.0" in str(e.value)


@pytest.mark.parametrize("site", ["attn_heads", "attn_out", "residual", "mlp_out"])
def test_what_has_no_weights_of_its_own_is_neither_tuned_nor_pruned(site):
    subject = Subject("llama", families.build("llama"))
    mask, before = subject.mask(site), answer(subject.model)
    for call in (prune, lambda model, m: get_neuron_model(model, NeuronTuningConfig("selected", m))):
        with pytest.raises(ArgumentError) as e:
            call(subject.model, mask)
        assert e.value.argument == "mask" and site in str(e.value)
    assert torch.equal(answer(subject.model), before)


@pytest.mark.parametrize(
    "call, argument",
    [
        (lambda s: NeuronMask.from_heads(torch.ones(3, 2, dtype=torch.bool), s("mlp_hidden")), "sites"),
        (lambda s: NeuronMask.from_heads(torch.ones(3, 3, dtype=torch.bool), s("attn_heads")), "heads"),
        (lambda s: NeuronMask.from_heads(torch.ones(2, 2, dtype=torch.bool), s("attn_heads")), "heads"),
        (lambda s: Layout((16,), heads=(3,)), "heads"),
        (lambda s: Layout((16, 16), heads=(2,)), "heads"),
        (lambda s: Layout((16,), heads=(0,)), "heads"),
        (lambda s: s("heads"), "site"),
    ],
)
def test_bad_heads_are_named(call, argument):
    model = families.build("llama")
    with pytest.raises(ArgumentError) as e:
        call(lambda site: neuron_sites(model, site))
    assert e.value.argument == argument


def test_the_tables_agree():
    "The command's --site, the tests' table and the rules name the same sites."
    from llmfact_nb import cli

    assert set(cli.SETTINGS["site"].accepted) == set(families.SITES) == set(SITES)


def test_baked_streams_are_refused_and_values_of_heads_go_into_the_bias():
    model = families.build("gpt2")
    mask = NeuronMask.full((16,) * 3, "residual")
    with pytest.raises(ArgumentError) as e:
        MaskedModel(model).bake(mask)
    assert e.value.argument == "mask"
    values = torch.linspace(-1, 1, 48)
    for name in ("gpt2", "llama"):  # GPT-2's projection has a bias that can carry them, Llama's is given one
        model = families.build(name)
        heads = Subject(name, model).mask("attn_heads")
        with MaskedModel(model).ablate(heads, values):
            expected = answer(model)
        assert close(answer(MaskedModel(model).bake(heads, values)), expected)
