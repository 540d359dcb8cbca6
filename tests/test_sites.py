"""Pins where the neurons are: for every family, head and wrapping the module found is the one in a table written by
hand; what has no single MLP per layer is refused by name."""

import families
import pytest
import torch
from families import D, FAMILIES, LAYERS, REFUSED, VARIED
from torch import nn
from refusals import refused

from llmfact_nb.sites import attach, blocks, linear_shape, neuron_sites, refuse_compiled


def check(name, model, hidden):
    "Both sites of the model are those of the table."
    expected = families.down_projections(name, model)
    for site, where, width in (("mlp_out", "output", D), ("mlp_hidden", "input", hidden)):
        sites = neuron_sites(model, site)
        assert [s.name for s in sites] == [path for path, _ in expected]
        assert all(s.module is module for s, (_, module) in zip(sites, expected))
        assert sites.widths == (width,) * LAYERS and sites.depths == tuple(range(LAYERS)) and sites.site == site
        assert {s.where for s in sites} == {where} and sites.n_neurons == width * LAYERS


HEADS = [(n, h) for n, f in FAMILIES.items() for h in (f.kind, "base")]


@pytest.mark.parametrize("name, head", HEADS)
def test_found_where_the_table_says(name, head):
    check(name, families.build(name, head), FAMILIES[name].hidden)


def has_classifier(name):
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    return type(families.config_of(name)) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING


@pytest.mark.parametrize("name", [n for n in FAMILIES if has_classifier(n)])
def test_found_under_a_classification_head(name):
    check(name, families.build(name, "classification"), FAMILIES[name].hidden)


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.square])
def test_found_where_shapes_cannot_tell(name):
    "The hidden width equals the model's width."
    check(name, families.build(name, **FAMILIES[name].square), D)


@pytest.mark.parametrize("hidden", [D // 2, 2 * D, 3 * D])
@pytest.mark.parametrize("name", ["phi3", "glm4", "llama", "gpt_neox", "modernbert"])
def test_found_at_awkward_widths(name, hidden):
    "Widths at which a fused gate and up matrix, or the fused queries, keys and values, look like something else."
    check(name, families.build(name, intermediate_size=hidden), hidden)


@pytest.mark.parametrize(
    "name, adapted",
    [*((name, way) for name in FAMILIES for way in ("attention", "everything")), *((name, "down") for name in VARIED)],
)
def test_found_under_lora(name, adapted):
    peft = pytest.importorskip("peft")
    model = families.build(name)
    down = FAMILIES[name].down.rsplit(".", 1)[1]
    if adapted == "attention":
        ends = {p.rsplit(".", 1)[1] for p, m in model.named_modules() if linear_shape(m) and "att" in p.lower()}
        targets = sorted(ends - {down})  # BERT calls both "dense"
        if not targets:
            pytest.skip("attention and MLP share their names here")
    else:
        targets = [down] if adapted == "down" else "all-linear"
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    check(name, wrapped, FAMILIES[name].hidden)
    assert all(hasattr(s.module, "base_layer") == (adapted != "attention") for s in neuron_sites(wrapped))


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig", "IA3Config", "AdaLoraConfig"])
def test_found_under_other_adapters(kind):
    "The wrapper is the site, not the base layer inside it, whose output lacks what the adapter adds."
    peft = pytest.importorskip("peft")
    options = {"IA3Config": dict(feedforward_modules=["down_proj"]), "AdaLoraConfig": dict(total_step=10)}.get(kind, {})
    check(
        "llama",
        peft.get_peft_model(families.build("llama"), getattr(peft, kind)(target_modules=["down_proj"], **options)),
        FAMILIES["llama"].hidden,
    )


def test_encoder_alone_and_language_model_of_a_pair():
    import transformers

    encoder = transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=48, d_model=D, d_ff=24, num_layers=LAYERS, num_heads=2, d_kv=8)
    )
    assert [s.name for s in neuron_sites(encoder)] == [
        f"encoder.block.{i}.layer.1.DenseReluDense.wo" for i in range(LAYERS)
    ]
    text = families.config_of("gemma3_text").to_dict()
    vision = dict(
        hidden_size=D, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2, image_size=8, patch_size=4
    )
    both = transformers.AutoModelForImageTextToText.from_config(
        transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    )
    names = [s.name for s in neuron_sites(both, "mlp_hidden")]
    assert [n.split("language_model.")[1] for n in names] == [f"layers.{i}.mlp.down_proj" for i in range(LAYERS)]


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused_by_name(name):
    model = families.build(name)
    for site in ("mlp_out", "mlp_hidden"):
        with refused(NotImplementedError, repr(name)):
            neuron_sites(model, site)


def test_names_are_the_way_out_of_a_refusal():
    model = families.build("mamba")
    sites = neuron_sites(model, ["layers.2.mixer.out_proj", "layers.0.mixer.out_proj"])
    assert sites.site == ("layers.0.mixer.out_proj", "layers.2.mixer.out_proj")  # the model's order, not the list's
    assert [s.module for s in sites] == [
        model.layers[0].mixer.out_proj,
        model.layers[2].mixer.out_proj,
    ] and sites.widths == (D, D)


@pytest.mark.parametrize(
    "name, module",
    [
        ("convbert", "0.output.dense"),
        ("fnet", "0.output.dense"),
        ("nystromformer", "0.output.dense"),
        ("yoso", "0.output.dense"),
        ("big_bird", "0.output.dense"),
        ("xlnet", "0.ff.layer_2"),
    ],
)
def test_names_are_no_way_out_where_the_batch_would_count(name, module):
    "The reason lies in the family and not in finding its neurons; also where the model is a part of another."
    model = families.build(name)
    (path,) = [n for n, _ in model.named_modules() if n.endswith(f"layer.{module}")]
    for whole, prefix in ((model, ""), (nn.ModuleDict({"inner": model}), "inner.")):
        with refused(NotImplementedError, repr(name)):
            neuron_sites(whole, [prefix + path])


def test_big_bird_beside_a_decoder_is_refused_too():
    from transformers import BigBirdPegasusConfig, BigBirdPegasusModel

    with torch.device("meta"):
        model = BigBirdPegasusModel(
            BigBirdPegasusConfig(
                vocab_size=48,
                d_model=D,
                encoder_layers=1,
                decoder_layers=1,
                encoder_ffn_dim=24,
                decoder_ffn_dim=24,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
            )
        )
    with refused(NotImplementedError, "'bigbird_pegasus'"):
        neuron_sites(model, ["encoder.layers.0.fc2"])


class Plain(nn.Module):
    "Blocks without a Hugging Face configuration."

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)) for _ in range(2)])


@pytest.mark.parametrize(
    "wrap", [lambda: Plain(), lambda: nn.DataParallel(families.build("llama")), lambda: nn.Linear(3, 3)]
)
def test_a_model_that_is_not_known_is_refused(wrap):
    "Not Hugging Face's, or wrapped by something that hides the configuration."
    with refused(NotImplementedError, "site="):
        neuron_sites(wrap())


def test_unclear_blocks_are_refused_with_candidates():
    model = families.build("llama")
    model.config.num_hidden_layers = 5
    with refused(NotImplementedError, "layers (3)"):
        blocks(model)
    model = families.build("llama")
    model.model.layers[1].extra = nn.Sequential(
        nn.Linear(D, 40), nn.Linear(40, D)
    )  # a second MLP in one block, both down projections by shape
    del model.model.layers[1].mlp.down_proj
    model.model.layers[1].mlp.other = nn.Linear(24, D)
    with refused(NotImplementedError, "'llama'", "layers.1", "40 -> 16"):
        neuron_sites(model)


def test_layers_that_share_their_module_are_refused():
    "A hook cannot know which of the two layers is calling: capture would mix their rows, and a mask would hit both."
    model = families.build("llama")
    model.model.layers[2].mlp = model.model.layers[0].mlp
    for site in ("mlp_out", "mlp_hidden"):
        with refused(NotImplementedError, "'llama'"):
            neuron_sites(model, site)


@pytest.mark.parametrize(
    "site", ["mlp", "MLP_OUT", "", [], ["model.layers.9.mlp.down_proj"], ["model.layers.0.mlp.down_proj", "nothing"]]
)
def test_unknown_site_is_a_value_error(site):
    with refused(argument="site"):
        neuron_sites(families.build("llama"), site)


def test_module_without_a_width_is_refused():
    with refused(NotImplementedError, "model.layers.0.mlp"):
        neuron_sites(families.build("llama"), ["model.layers.0.mlp"])


@pytest.mark.parametrize("thing", [None, "gpt2", torch.zeros(3)])
def test_no_model_is_a_type_error(thing):
    with refused(TypeError, type(thing).__name__):
        neuron_sites(thing)


def test_sites_are_a_sequence_of_hashable_values():
    model = families.build("gpt2")
    sites = neuron_sites(model, "mlp_hidden")
    assert len(set(sites)) == LAYERS and sites[0] in sites and list(sites[1:]) == list(sites)[1:]
    assert sites[1:].depths == (1, 2) and sites[-1].layer == LAYERS - 1
    assert sites.at([2, 0]).depths == (0, 2) and sites.at(None) is sites
    for wrong in ([], [3], [-1], [0, 99]):
        with refused(argument="layers"):
            sites.at(wrong)


def test_looking_changes_nothing():
    model = families.build("bert").train()
    before = families.state(model)
    neuron_sites(model, "mlp_out"), neuron_sites(model, "mlp_hidden")
    assert families.state(model) == before


def test_attach_removes_only_its_own_hooks_however_it_ends():
    model = families.build("llama")
    sites, calls = neuron_sites(model), []
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda m, a, o: calls.append("mine"))
    before = families.state(model)
    for ending in (RuntimeError, KeyboardInterrupt, GeneratorExit):
        with pytest.raises(ending):
            with attach(sites, lambda i, x: calls.append(i)):
                model(torch.arange(4, 8)[None])
                raise ending
        assert families.state(model) == before
    assert calls == [0, "mine", 1, 2] * 3 or calls == [0, 1, "mine", 2] * 3


def test_attach_replaces_whether_arguments_come_by_name_or_by_place():
    class Named(nn.Module):
        def forward(self, *, hidden, scale=1.0):
            return hidden * scale, "more"

    from llmfact_nb.sites import NeuronSite

    module, x = Named(), torch.ones(2, 3)
    with attach([NeuronSite(0, "n", module, 3, "input")], lambda i, x: x + 1):
        assert torch.equal(module(hidden=x, scale=3.0)[0], 3 * (x + 1))
    with attach([NeuronSite(0, "n", module, 3, "output")], lambda i, x: x + 1):
        assert torch.equal(module(hidden=x, scale=3.0)[0], 3 * x + 1) and module(hidden=x)[1] == "more"
    assert torch.equal(module(hidden=x)[0], x)


def test_compiled_models_are_refused():
    for compiled in (torch.compile(families.build("llama")), families.build("llama")):
        if not hasattr(compiled, "_orig_mod"):
            compiled.model.layers[1].compile()  # in place, and only a part
        with refused(argument="model"):
            refuse_compiled(compiled)
    refuse_compiled(families.build("llama"))
