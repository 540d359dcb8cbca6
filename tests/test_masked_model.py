"""Pins what masking does: for every family and both sites the model answers as one with independent hooks, or with the
columns of its weights zeroed by hand; in batches, under padding, with a cache, nested, differentiated, baked; and
nothing stays behind."""

import copy
import inspect
import warnings
from contextlib import ExitStack, contextmanager

import families
import numpy as np
import pytest
import torch
from families import D, FAMILIES, HIDDEN, LAYERS, VARIED
from refusals import refused

from llmfact_nb.activations import capture
from llmfact_nb.masked_model import MaskedModel, made_biases
from llmfact_nb.masks import NeuronMask

SITES = ("mlp_out", "mlp_hidden")
IDS = torch.tensor([[5, 9, 17, 30, 8, 41], [7, 7, 22, 3, 46, 12]])


def width(name, site):
    return D if site == "mlp_out" else FAMILIES[name].hidden


def random_mask(name, site, seed=0, share=0.3, depths=None):
    rng = np.random.default_rng(seed)
    rows = [rng.random(width(name, site)) < share for _ in depths or range(LAYERS)]
    return NeuronMask.from_layers(rows, site, depths)


@contextmanager
def plain_hooks(name, model, rows, site, change=lambda x, layer: torch.zeros_like(x), spared=None):
    """An independent version of masking: one hook on each module of the table; torch.where on whole activations.
    `spared`: (rows, positions) bool."""

    def replaced(x, i):
        chosen = rows[i] if spared is None else rows[i] & ~spared[..., None]
        return torch.where(chosen, change(x, i).to(x.dtype), x)

    with ExitStack() as stack:
        for i, (_, module) in enumerate(families.down_projections(name, model)):
            if site == "mlp_out":
                handle = module.register_forward_hook(lambda m, a, out, i=i: replaced(out, i))
            else:
                handle = module.register_forward_pre_hook(lambda m, a, i=i: (replaced(a[0], i), *a[1:]))
            stack.callback(handle.remove)
        yield


def answer(model, ids=IDS, **kw):
    with torch.no_grad():
        out = model(input_ids=ids, **kw)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def by_weights(name, model, rows, site):
    "A copy with the columns (mlp_hidden) or rows (mlp_out) of each down projection zeroed by hand."
    model = copy.deepcopy(model)
    with torch.no_grad():
        for row, (_, module) in zip(rows, families.down_projections(name, model)):
            conv = type(module).__name__ == "Conv1D"  # (in, out) instead of (out, in)
            if (site == "mlp_hidden") != conv:
                module.weight[:, row] = 0
            else:
                module.weight[row] = 0
            if site == "mlp_out" and module.bias is not None:
                module.bias[row] = 0
    return model


def has_bias(name):
    return families.down_projections(name, families.build(name))[0][1].bias is not None


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name, share", [*((name, 0.2) for name in FAMILIES), *((name, 0.8) for name in VARIED)])
def test_ablate_and_keep(name, site, share):
    model, mask = families.build(name), random_mask(name, site, share=share)
    before, plain, mm = families.state(model), answer(model), MaskedModel(model)
    with plain_hooks(name, model, mask.layers, site):
        expected = answer(model)
    with mm.ablate(mask) as counts:
        got = answer(model)
        assert torch.equal(answer(mm), got)
    assert counts == mask.counts and torch.equal(got, expected) and (got - plain).abs().max() > 1e-2
    torch.testing.assert_close(got, answer(by_weights(name, model, mask.layers, site)), rtol=1e-4, atol=1e-4)
    with mm.keep(~mask) as counts:
        assert torch.equal(answer(model), expected)
    assert counts == mask.counts and families.state(model) == before and torch.equal(answer(model), plain)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", VARIED)
def test_values_means_and_amplification(name, site):
    model, mask, n = (families.build(name), random_mask(name, site), LAYERS * width(name, site))
    values, gains = (torch.randn(n, generator=torch.Generator().manual_seed(1)), torch.linspace(-1, 3, n))
    mm = MaskedModel(model).fit_means(
        capture(model, families.tokenizer(), [families.words(20, i) for i in range(3)], site, progress=False)
    )
    per_layer = lambda t: t.split(mask.widths)
    arms = [
        (mm.ablate(mask, replace=values), lambda x, i: per_layer(values)[i].expand_as(x)),
        (mm.ablate(mask, replace="mean"), lambda x, i: per_layer(mm.means)[i].expand_as(x)),
        (mm.amplify(mask, gain=1.7), lambda x, i: 1.7 * x),
        (mm.amplify(mask, add=1.0), lambda x, i: x + 1),
        (mm.amplify(mask, gain=gains, add=values), lambda x, i: per_layer(gains)[i] * x + per_layer(values)[i]),
    ]
    plain = answer(model)
    for arm, change in arms:
        with plain_hooks(name, model, mask.layers, site, change):
            expected = answer(model)
        with arm as counts:
            torch.testing.assert_close(answer(model), expected, rtol=1e-5, atol=1e-5)
        assert counts == mask.counts and (expected - plain).abs().max() > 1e-3
    for share in (0.0, 0.1, 0.9, 1.0):  # keep, from none to all, with values
        kept = random_mask(name, site, 3, share)
        with plain_hooks(name, model, [~row for row in kept.layers], site, arms[0][1]):
            expected = answer(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if share == 1.0 else "error")
            with mm.keep(kept, replace=values):
                assert torch.equal(answer(model), expected)


def test_means_are_those_without_sinks():
    model = families.build("gpt2")
    with torch.no_grad():
        model.transformer.wpe.weight[0] *= 100  # the first token stands out
    a = capture(
        model,
        families.tokenizer(),
        [families.words(20, i) for i in range(3)],
        "mlp_hidden",
        layers=[0, 2],
        progress=False,
    )
    mm = MaskedModel(model, "mlp_hidden").fit_means(a)
    torch.testing.assert_close(mm.means, a.values[~a.sinks].mean(0))
    assert (mm.means - a.values.mean(0)).abs().max() > 0.01
    mask = random_mask("gpt2", "mlp_hidden", depths=(0, 2))
    with mm.ablate(mask, "mean"):
        got = answer(model)
    rows = [mask.layers[0], torch.zeros(HIDDEN, dtype=torch.bool), mask.layers[1]]
    with plain_hooks("gpt2", model, rows, "mlp_hidden", lambda x, i: mm.means.split(HIDDEN)[i // 2].expand_as(x)):
        assert torch.equal(got, answer(model))
    with refused(argument="mask"):
        with mm.ablate(random_mask("gpt2", "mlp_hidden"), "mean"):
            pass


@pytest.mark.parametrize("site", SITES)
def test_distinct_rows_reach_distinct_layers(site):
    "The trap of the published code: 1, 2, 3 units asked for are 1, 2, 3 units masked, and the ones asked for."
    model, seen = families.build("gpt2", n_layer=4), {}
    n = width("gpt2", site)
    rows = [
        torch.arange(n) == 0,
        torch.arange(n) < 2,
        (torch.arange(n) >= 5) & (torch.arange(n) < 8),
        torch.arange(n) >= n - 4,
    ]
    mask = NeuronMask.from_layers(rows, site)
    with MaskedModel(model).ablate(mask) as counts:
        for i, block in enumerate(model.transformer.h):  # attached after the mask's hooks, so these see what it left
            if site == "mlp_out":
                block.mlp.c_proj.register_forward_hook(lambda m, a, out, i=i: seen.__setitem__(i, out))
            else:
                block.mlp.c_proj.register_forward_pre_hook(lambda m, a, i=i: seen.__setitem__(i, a[0]))
        answer(model)
    assert counts == (1, 2, 3, 4)
    assert [torch.equal((seen[i] == 0).all(1).all(0), rows[i]) for i in range(4)] == [True] * 4


@pytest.mark.parametrize("way", ["ablate", "keep", "amplify"])
def test_late_binding_replays_the_published_mistake(way):
    "[1, 2, 3, 4] becomes [4, 4, 4, 4]: the last layer's row everywhere, for keep as well."
    model, n = families.build("gpt2", n_layer=4), D
    mask = NeuronMask.from_layers([torch.arange(n) < k for k in (1, 2, 3, 4)], "mlp_out")
    last = NeuronMask.from_layers([mask.layers[-1]] * 4, "mlp_out")
    options = dict(gain=2.0) if way == "amplify" else {}
    with getattr(MaskedModel(model), way)(last, **options) as expected_counts:
        expected = answer(model)
    legacy = MaskedModel(model, legacy_late_binding=True)
    with getattr(legacy, way)(mask, **options) as counts:
        assert torch.equal(answer(model), expected)
    assert counts == expected_counts == ((n - 4,) * 4 if way == "keep" else (4, 4, 4, 4))
    if way == "ablate":
        torch.testing.assert_close(answer(legacy.bake(mask)), expected, rtol=1e-4, atol=1e-4)
    uneven = NeuronMask.from_layers([torch.ones(k, dtype=torch.bool) for k in (16, 16, 16, 15)])
    with pytest.raises(ValueError):
        with getattr(legacy, way)(uneven, **options):
            pass


def test_late_binding_with_a_full_last_row_keeps_everything():
    "Why five published scores equal the unmasked one in every digit."
    model = families.build("gpt2")
    mask = NeuronMask.from_layers(
        [torch.arange(D) < 2, torch.arange(D) < 3, torch.ones(D, dtype=torch.bool)], "mlp_out"
    )
    plain = answer(model)
    with pytest.warns(UserWarning):
        with MaskedModel(model, legacy_late_binding=True).keep(mask):
            assert torch.equal(answer(model), plain)
    with MaskedModel(model).keep(mask):
        assert not torch.allclose(answer(model), plain)


# the first token of each row


def padded(lists, side):
    n = max(map(len, lists))
    fill = lambda x, pad: [pad] * (n - len(x)) + x if side == "left" else x + [pad] * (n - len(x))
    return torch.tensor([fill(x, 0) for x in lists]), torch.tensor([fill([1] * len(x), 0) for x in lists])


LISTS = [[5, 9, 17, 30, 8, 41], [22, 46, 12], [33]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "name, positions", [*((name, "after-first") for name in FAMILIES), *((name, "all") for name in VARIED)]
)
def test_rows_of_a_padded_batch_are_those_alone(name, positions, side):
    "Forward pass: each row of a padded batch answers as it does alone, with its first real token spared or not."
    if side == "left" and FAMILIES[name].kind == "masked":
        pytest.skip("encoders count positions from the left edge, padding included")
    model, site = families.build(name), "mlp_hidden"
    mask = random_mask(name, site)
    alone = []
    for ids in LISTS:
        spared = torch.zeros(1, len(ids), dtype=torch.bool)
        spared[:, 0] = positions == "after-first"
        with plain_hooks(name, model, mask.layers, site, spared=spared):
            alone.append(
                answer(model, torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long))[0]
            )
    ids, attention = padded(LISTS, side)
    extra = (
        {"position_ids": (attention.cumsum(1) - 1).clamp(min=0)}
        if side == "left" and "position_ids" in inspect.signature(model.forward).parameters
        else {}
    )
    with MaskedModel(model).ablate(mask, positions=positions):
        batch = answer(model, ids, attention_mask=attention, **extra)
    for row, real, expected in zip(batch, attention.bool(), alone):
        torch.testing.assert_close(row[real], expected, rtol=1e-3, atol=1e-3)


def greedy_by_hand(name, model, mask, site, ids, n_new, positions):
    "Without batch, cache, `generate` or this package: the whole text again for every token."
    ids, scores = list(ids), []
    for _ in range(n_new):
        spared = torch.zeros(1, len(ids), dtype=torch.bool)
        spared[:, 0] = positions == "after-first"
        with plain_hooks(name, model, mask.layers, site, spared=spared):
            logits = answer(
                model, torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), use_cache=False
            )[0, -1]
        ids.append(int(logits.argmax()))
        scores.append(logits)
    return ids, torch.stack(scores)


GREEDY = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)


def generator_of(name, **changes):
    model = families.build(name, **changes)
    model.generation_config.eos_token_id = None  # all rows to full length
    return model


@pytest.mark.parametrize(
    "name, positions", [*((name, "after-first") for name in families.CAUSAL), ("gpt2", "all"), ("llama", "all")]
)
def test_generation_with_cache_and_left_padding(name, positions):
    "Greedy text of a padded batch with a cache is that of each row alone, step by step and without a cache."
    model, site = generator_of(name), "mlp_hidden"
    mask = random_mask(name, site)
    ids, attention = padded(LISTS, "left")
    with MaskedModel(model).ablate(mask, positions=positions):
        out = model.generate(
            input_ids=ids, attention_mask=attention, output_logits=True, return_dict_in_generate=True, **GREEDY
        )
    for i, row in enumerate(LISTS):
        expected, scores = greedy_by_hand(name, model, mask, site, row, 5, positions)
        torch.testing.assert_close(torch.stack([s[i] for s in out.logits]), scores, rtol=1e-3, atol=1e-3)
        assert out.sequences[i, -5:].tolist() == expected[-5:]


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("positions", ["all", "after-first"])
@pytest.mark.parametrize(
    "way",
    [
        dict(num_beams=3),
        dict(num_beams=2, num_return_sequences=2),
        dict(prompt_lookup_num_tokens=2),
        dict(prefill_chunk_size=2),
        dict(cache_implementation="dynamic"),
    ],
)
def test_other_ways_of_decoding(site, positions, way):
    "Beams, speculation and chunks use the cache differently; the text is that without a cache."
    model, differ = generator_of("gpt2"), []
    mask = random_mask("gpt2", site, share=0.5)
    beams = {k: v for k, v in way.items() if "beams" in k or "sequences" in k}
    for lists in [[x] for x in LISTS] if "prompt_lookup_num_tokens" in way else [LISTS]:  # speculation takes one row
        ids, attention = padded(lists, "left")
        options = dict(input_ids=ids, attention_mask=attention, **GREEDY)
        with MaskedModel(model, site).ablate(mask, positions=positions) as counts:
            expected = model.generate(use_cache=False, **beams, **options)
            assert torch.equal(model.generate(**way, **options), expected) and counts == mask.counts
        differ.append(not torch.equal(model.generate(use_cache=False, **beams, **options), expected))
    assert any(differ)  # the mask says something


def test_static_cache_is_right_or_refused():
    model = generator_of("llama")
    mask, (ids, attention) = random_mask("llama", "mlp_hidden"), padded(LISTS, "left")
    for positions in ("all", "after-first"):
        with MaskedModel(model).ablate(mask, positions=positions):
            expected = model.generate(input_ids=ids, attention_mask=attention, **GREEDY)
            try:
                got = model.generate(
                    input_ids=ids,
                    attention_mask=attention,
                    cache_implementation="static",
                    disable_compile=True,
                    **GREEDY,
                )
            except ValueError as e:
                assert positions == "after-first" and "positions" in str(e)
            else:
                assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["gpt2", "bloom", "gemma3_text", "mistral"])
def test_a_cache_in_the_callers_hands(name):
    "A text passed in three pieces through one cache answers as in one piece, first token spared once."
    from transformers import DynamicCache

    model = families.build(name)
    mask, cache = random_mask(name, "mlp_hidden"), DynamicCache(config=model.config)
    with MaskedModel(model).ablate(mask, positions="after-first"):
        whole = answer(model)
        for start, stop in ((0, 1), (1, 4), (4, 6)):
            piece = answer(
                model,
                IDS[:, start:stop],
                past_key_values=cache,
                use_cache=True,
                attention_mask=torch.ones(2, stop, dtype=torch.long),
            )
            torch.testing.assert_close(piece, whole[:, start:stop], rtol=1e-3, atol=1e-3)


def test_after_first_however_the_model_is_called():
    model, site = families.build("llama"), "mlp_hidden"
    mask, spared = random_mask("llama", site), torch.zeros(2, 6, dtype=torch.bool)
    spared[:, 0] = True
    with plain_hooks("llama", model, mask.layers, site, spared=spared):
        expected = answer(model)
        base = model.model(IDS).last_hidden_state
    ones = torch.ones_like(IDS)
    with MaskedModel(model).ablate(mask, positions="after-first"), torch.no_grad():
        for got in (
            model(IDS),
            model(IDS, ones),
            model(input_ids=IDS),
            model(IDS, attention_mask=ones.bool()),
            model(inputs_embeds=model.get_input_embeddings()(IDS)),
        ):
            assert torch.equal(got.logits, expected)
        assert torch.equal(model.model(IDS).last_hidden_state, base)  # also when the backbone is called past the model
        with refused(argument="attention_mask"):
            model(IDS, attention_mask=torch.zeros(2, 1, 6, 6))
        assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("lists", [[[5, 9, 17], [22, 46, 12], [33, 4, 8]], LISTS])
def test_after_first_where_the_mlp_sees_positions_before_rows(lists):
    "XLNet: the first token of each row, not the first row; or a refusal."
    from transformers import XLNetConfig, XLNetLMHeadModel

    model = families.shake(
        XLNetLMHeadModel(XLNetConfig(vocab_size=48, d_model=D, n_layer=LAYERS, n_head=2, d_inner=HIDDEN))
    )
    mask, (ids, attention) = random_mask("llama", "mlp_hidden"), padded(lists, "right")
    seen = []
    try:
        with MaskedModel(model).ablate(mask, positions="after-first"):
            model.transformer.layer[0].ff.layer_2.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
            answer(model, ids, attention_mask=attention)
    except (NotImplementedError, ValueError) as e:
        assert "positions" in str(e) or "xlnet" in str(e)
    else:
        ablated = (seen[0][..., mask.layers[0]] == 0).all(-1)  # (positions, rows)
        assert not ablated[0].any() and ablated[1:].all()


@pytest.mark.parametrize("flat", [False, True])
def test_after_first_where_the_mlp_sees_flat_positions(flat):
    model = families.build("llama")
    mask, (ids, attention) = random_mask("llama", "mlp_hidden"), padded(LISTS, "left")
    with MaskedModel(model).ablate(mask, positions="after-first"):
        expected = answer(model, ids, attention_mask=attention)
        for block in model.model.layers:
            forward = block.mlp.forward
            block.mlp.forward = lambda x, forward=forward: forward(x.flatten(0, 1)).view(x.shape)
        torch.testing.assert_close(answer(model, ids, attention_mask=attention), expected)


# baking


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", list(FAMILIES))
def test_baked_equals_masked_or_is_refused(name, site):
    model, mask = families.build(name), random_mask(name, site)
    weights, before, mm = (
        {k: v.clone() for k, v in model.state_dict().items()},
        families.state(model),
        MaskedModel(model),
    )
    values = torch.randn(mask.n_neurons, generator=torch.Generator().manual_seed(2))
    for replace in ("zero", values):
        with mm.ablate(mask, replace):
            expected = answer(model)
        baked = mm.bake(mask, replace)
        torch.testing.assert_close(answer(baked), expected, rtol=1e-4, atol=1e-4)
        assert type(baked) is type(model) and (made_biases(baked) or families.state(baked) == before)
        made = {f"{path}.bias" for path in made_biases(baked)}
        assert set(baked.state_dict()) == set(weights) | made and not made & set(weights)
        assert bool(made) == (replace is values and not has_bias(name)) and not made_biases(model)
    assert families.state(model) == before and all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3_text", "falcon"])
def test_means_are_baked(name):
    model, t = families.build(name), families.tokenizer()
    for site in SITES:
        mm = MaskedModel(model).fit_means(capture(model, t, [families.words(30)], site, progress=False))
        mask = random_mask(name, site)
        with mm.ablate(mask, "mean"):
            expected = answer(model)
        torch.testing.assert_close(answer(mm.bake(mask, "mean")), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_baked_half_precision(dtype):
    model, mask = families.build("gpt2").to(dtype), random_mask("gpt2", "mlp_hidden")
    with MaskedModel(model).ablate(mask):
        expected = answer(model)
    baked = MaskedModel(model).bake(mask)
    assert baked.dtype == dtype
    torch.testing.assert_close(answer(baked), expected, rtol=0.05, atol=0.05)


def test_baked_model_saves_loads_and_trains(tmp_path):
    from transformers import AutoModelForCausalLM

    model, mask = families.build("gpt2"), random_mask("gpt2", "mlp_out")
    baked = MaskedModel(model).bake(mask)
    assert baked.lm_head.weight is baked.transformer.wte.weight and baked.lm_head.weight is not model.lm_head.weight
    baked.save_pretrained(tmp_path)
    assert torch.equal(answer(AutoModelForCausalLM.from_pretrained(tmp_path)), answer(baked))
    baked.train()(IDS, labels=IDS).loss.backward()  # still trainable
    assert all(p.grad is not None for p in baked.parameters())


def test_baked_model_carries_no_hooks():
    "Neither those of another masking block open on the model, nor someone else's."
    model, calls = families.build("llama"), []
    first, second = (random_mask("llama", "mlp_hidden", 1), random_mask("llama", "mlp_hidden", 2))
    with MaskedModel(model).ablate(second):
        expected = answer(model)
    with MaskedModel(model).ablate(first):
        try:
            baked = MaskedModel(model).bake(second)
        except ValueError as e:
            assert "bake" in str(e)
        else:
            torch.testing.assert_close(answer(baked), expected, rtol=1e-4, atol=1e-4)
    model.model.layers[0].register_forward_hook(lambda m, a, out: calls.append(1))
    try:
        baked = MaskedModel(model).bake(second)
    except ValueError as e:
        assert "hook" in str(e)
    else:
        answer(baked)
        assert not calls


def test_what_weights_cannot_express_is_refused():
    peft = pytest.importorskip("peft")
    model, mask = families.build("llama"), random_mask("llama", "mlp_hidden")
    mm = MaskedModel(model)
    with refused(argument="positions"):
        mm.bake(mask, positions="after-first")
    with refused(argument="model"):
        MaskedModel(torch.compile(model)).bake(mask)
    adapted = peft.get_peft_model(families.build("llama"), peft.LoraConfig(r=2, target_modules=["down_proj"]))
    with refused(ValueError, "down_proj", argument="model"):
        MaskedModel(adapted).bake(mask)
    others = peft.get_peft_model(families.build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    families.shake(others, 5)
    with MaskedModel(others).ablate(mask):
        expected = answer(others)
    torch.testing.assert_close(answer(MaskedModel(others).bake(mask)), expected, rtol=1e-4, atol=1e-4)
    model.model.layers[1].mlp.down_proj.to("meta")
    with refused(ValueError, "layers.1", argument="model"):
        MaskedModel(model).bake(mask)


# manners


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("positions", ["all", "after-first"])
@pytest.mark.parametrize("share", [0.2, 0.8])
def test_activations_are_never_edited_in_place(site, positions, share):
    """A hook that looked before the mask still holds what the module gave; one that looks after it sees the masked
    values."""
    model, mask, before, after = (families.build("llama"), random_mask("llama", site, share=share), {}, {})
    mm, values = MaskedModel(model), torch.ones(LAYERS * width("llama", site))
    modules = [m for _, m in families.down_projections("llama", model)]

    def watch(store):
        for i, m in enumerate(modules):
            if site == "mlp_out":
                m.register_forward_hook(lambda m, a, out, i=i: store.__setitem__(i, (out, out.clone(), out._version)))
            else:
                m.register_forward_pre_hook(lambda m, a, i=i: store.__setitem__(i, (a[0], a[0].clone(), a[0]._version)))

    watch(before)
    for arm in (
        mm.ablate(mask, positions=positions),
        mm.ablate(mask, values, positions),
        mm.amplify(mask, gain=2.0, add=1.0, positions=positions),
    ):
        with arm:
            watch(after)
            answer(model)
        for i, row in enumerate(mask.layers):
            x, copied, version = before[i]
            assert torch.equal(x, copied) and x._version == version
            y = after[i][0]
            first = 1 if positions == "after-first" else 0
            assert torch.equal(y[..., ~row], x[..., ~row]) and torch.equal(y[:, :first], x[:, :first])
            assert (y[:, first:][..., row] != x[:, first:][..., row]).all()
    assert torch.equal(values, torch.ones_like(values))


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("share", [0.2, 0.8])
def test_what_has_overflowed_becomes_zero(site, value, share):
    "inf * 0 is nan: values are put in place, not multiplied away."
    model, mask = families.build("llama"), random_mask("llama", site, share=share)
    for row, (_, m) in zip(mask.layers, families.down_projections("llama", model)):
        unit = int(row.nonzero()[0])

        def overflow(x, unit=unit):
            x = x.clone()
            x[..., unit] = value
            return x

        if site == "mlp_out":
            m.register_forward_hook(lambda m, a, out, overflow=overflow: overflow(out))
        else:
            m.register_forward_pre_hook(lambda m, a, overflow=overflow: (overflow(a[0]),))
    assert not torch.isfinite(answer(model)).all()
    for positions in ("all", "after-first"):
        with MaskedModel(model).ablate(mask, positions=positions):
            finite = torch.isfinite(answer(model)).all(-1)
            assert finite.all() if positions == "all" else not finite[:, 0].any()  # a spared token keeps even that


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("positions", ["all", "after-first"])
def test_gradients_are_those_of_the_hand_made_version(site, checkpointing, positions):
    model, mask = families.build("llama"), random_mask("llama", site)
    spared = torch.zeros(2, 6, dtype=torch.bool)
    spared[:, 0] = positions == "after-first"
    values = torch.full((mask.n_neurons,), 0.5)

    def gradients():
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    model.train()  # no dropout in this family
    for arm, change in (
        (lambda mm: mm.ablate(mask, positions=positions), lambda x, i: torch.zeros_like(x)),
        (lambda mm: mm.ablate(mask, values, positions), lambda x, i: torch.full_like(x, 0.5)),
        (lambda mm: mm.amplify(mask, 2.0, 1.0, positions), lambda x, i: 2 * x + 1),
    ):
        with plain_hooks("llama", model, mask.layers, site, change, spared):
            expected = gradients()
        if checkpointing:
            model.gradient_checkpointing_enable(dict(use_reentrant=False))
        with arm(MaskedModel(model)):
            got = gradients()
        model.gradient_checkpointing_disable()
        for n in expected:
            torch.testing.assert_close(got[n], expected[n], rtol=1e-4, atol=1e-5, msg=n)


def checkpointed(reentrant):
    model = families.build("llama").train()
    model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    if reentrant:
        model.enable_input_require_grads()
    return model


OTHER = dict(attention_mask=torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]]))  # other first tokens


@pytest.mark.parametrize("between", ["nothing", "evaluation", "training"])
def test_recomputing_with_the_first_tokens_of_another_pass_is_refused(between):
    """A layer that runs again does not know its pass: right with one backward() for each forward pass, also with
    evaluation in between, else an error."""
    mask, found = random_mask("llama", "mlp_hidden", share=0.6), []
    for model in (families.build("llama").train(), checkpointed(False)):
        with MaskedModel(model).ablate(mask, positions="after-first"):
            for more in (OTHER, {}):
                loss = model(IDS, labels=IDS, **more).loss
                if between == "evaluation":
                    model.eval()
                    answer(model), model(IDS, labels=IDS)
                    model.train()
                if between == "training":
                    loss = loss + model(IDS, labels=IDS).loss
                if between == "training" and found:
                    with refused(ValueError, "gradient_checkpointing_disable"):
                        loss.backward()
                    return
                loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", ["all", "after-first"])
def test_reentrant_checkpointing_is_refused(positions):
    "Its backward pass after the block would go through layers without a mask, and nothing would tell."
    model, mask = checkpointed(True), random_mask("llama", "mlp_hidden")
    with MaskedModel(model).ablate(mask, positions=positions):
        with refused(ValueError, "gradient_checkpointing_disable"):
            model(IDS, labels=IDS)
        with torch.no_grad():
            in_training = model(IDS).logits
        model.eval()
        model(IDS, labels=IDS).loss.backward()  # nothing is run again
        assert torch.equal(answer(model), in_training)
    model.train()
    model(IDS, labels=IDS).loss.backward()
    model.gradient_checkpointing_disable()
    with MaskedModel(model).ablate(mask, positions=positions):
        model(IDS, labels=IDS).loss.backward()


def test_backward_after_the_block_is_right_or_an_error():
    model, mask = checkpointed(False), random_mask("llama", "mlp_hidden")
    with MaskedModel(model).ablate(mask):
        loss = model(IDS, labels=IDS).loss
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()


@pytest.mark.parametrize("share", [0.3, 0.8])
@pytest.mark.parametrize("way", ["zero", "values", "amplify"])
def test_a_pass_in_inference_mode_leaves_nothing_that_gradients_cannot_use(way, share):
    model, mask = (families.build("llama"), random_mask("llama", "mlp_hidden", share=share))
    values = torch.rand(mask.n_neurons)

    def block():
        mm = MaskedModel(model)
        return (
            mm.amplify(mask, gain=values, add=values)
            if way == "amplify"
            else mm.ablate(mask, values if way == "values" else "zero")
        )

    grads = []
    for inference in (False, True):
        model.zero_grad()
        with block():
            if inference:
                with torch.inference_mode():
                    model(IDS)
            model(IDS, labels=IDS).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*grads)


def test_blocks_nest_and_the_inner_sees_what_the_outer_left():
    model, a, b = (families.build("gpt2"), random_mask("gpt2", "mlp_out", 1), random_mask("gpt2", "mlp_out", 2))
    mm, plain = MaskedModel(model), answer(model)

    def expected(change, mask=a):
        with plain_hooks("gpt2", model, mask.layers, "mlp_out", change):
            return answer(model)

    union, scaled_first, added_first = (
        expected(lambda x, i: torch.zeros_like(x), a | b),
        expected(lambda x, i: 2 * x + 1),
        expected(lambda x, i: 2 * (x + 1)),
    )
    with mm.ablate(a):
        outer = answer(model)
        with MaskedModel(model).ablate(b) as counts:  # another MaskedModel of the same model
            assert torch.equal(answer(model), union) and counts == b.counts
        assert torch.equal(answer(model), outer)
        with mm.ablate(a):  # the same once more
            assert torch.equal(answer(model), outer)
        assert torch.equal(answer(model), outer)
    with mm.amplify(a, gain=2.0), mm.amplify(a, add=1.0):
        torch.testing.assert_close(answer(model), scaled_first)
    with mm.amplify(a, add=1.0), mm.amplify(a, gain=2.0):
        torch.testing.assert_close(answer(model), added_first)
    hidden = random_mask("gpt2", "mlp_hidden", 3)
    with mm.ablate(hidden), mm.ablate(a, positions="after-first"):  # both sites of one module at once
        both = answer(model)
    with plain_hooks("gpt2", model, hidden.layers, "mlp_hidden"), mm.ablate(a, positions="after-first"):
        assert torch.equal(answer(model), both)
    assert torch.equal(answer(model), plain)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit, SystemExit])
@pytest.mark.parametrize("where", ["block", "forward"])
def test_nothing_stays_behind_after_an_error(error, where):
    model, mask, calls = (families.build("llama").train(), random_mask("llama", "mlp_hidden"), [])
    mm = MaskedModel(model)

    def breaks(m, a):
        if calls:
            raise error("here")

    model.model.layers[2].mlp.act_fn.register_forward_pre_hook(breaks)
    before, plain = families.state(model), answer(model)
    with pytest.raises(error):
        with mm.ablate(mask, positions="after-first"), mm.amplify(mask, gain=3.0):
            if where == "block":
                raise error("here")
            calls.append(1)
            answer(model)
    calls.clear()
    assert families.state(model) == before and torch.equal(answer(model), plain)
    with mm.ablate(mask):
        pass
    mm.bake(mask)  # not "open" any more


def test_other_peoples_hooks_survive():
    model, mask, calls = families.build("llama"), random_mask("llama", "mlp_hidden"), []
    down = model.model.layers[1].mlp.down_proj
    old = down.register_forward_pre_hook(lambda m, a: calls.append("old"))
    with MaskedModel(model).ablate(mask, positions="after-first"):
        new = down.register_forward_pre_hook(lambda m, a: calls.append("new"))
        gone = down.register_forward_hook(lambda m, a, out: calls.append("gone"))
        answer(model)
        gone.remove()
    answer(model)
    assert calls == ["old", "new", "gone", "old", "new"]
    old.remove(), new.remove()
    assert not down._forward_pre_hooks and not down._forward_hooks


def test_a_layer_without_masked_units_gets_no_hook():
    model = families.build("llama")
    rows = [torch.zeros(HIDDEN, dtype=torch.bool), torch.arange(HIDDEN) < 2, torch.zeros(HIDDEN, dtype=torch.bool)]
    with MaskedModel(model).ablate(NeuronMask.from_layers(rows, "mlp_hidden")) as counts:
        assert [len(m._forward_pre_hooks) for _, m in families.down_projections("llama", model)] == [
            0,
            1,
            0,
        ] and counts == (0, 2, 0)


@pytest.mark.parametrize("depths", [(1,), (0, 2), (1, 2)])
@pytest.mark.parametrize("site", SITES)
def test_masks_of_some_layers(site, depths):
    model, mask = families.build("llama"), random_mask("llama", site, depths=depths)
    rows = [
        mask.layers[depths.index(i)] if i in depths else torch.zeros(width("llama", site), dtype=torch.bool)
        for i in range(LAYERS)
    ]
    with plain_hooks("llama", model, rows, site):
        expected = answer(model)
    for mm in (MaskedModel(model), MaskedModel(model, site)):
        with mm.ablate(mask) as counts:
            assert torch.equal(answer(model), expected) and counts == mask.counts
        torch.testing.assert_close(answer(mm.bake(mask)), expected, rtol=1e-4, atol=1e-4)
    rest = [~row if i in depths else row for i, row in enumerate(rows)]
    with plain_hooks("llama", model, rest, site):
        expected = answer(model)
    with MaskedModel(model).keep(mask):  # of the layers the mask covers; it says nothing about the others
        assert torch.equal(answer(model), expected)


def test_masks_of_named_modules():
    model = families.build("llama")
    names = ("model.layers.0.self_attn.o_proj", "model.layers.2.mlp.down_proj")
    mask = NeuronMask.from_layers([torch.arange(D) < 3, torch.arange(D) > 9], names)
    with MaskedModel(model).ablate(mask) as counts:
        got = answer(model)
    for name, row in zip(names, mask.layers):
        model.get_submodule(name).register_forward_hook(lambda m, a, out, row=row: torch.where(row, 0.0, out))
    assert torch.equal(got, answer(model)) and counts == (3, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("site", SITES)
def test_half_precision_stays(dtype, site):
    model = families.build("llama").to(dtype)
    mask, values = (
        random_mask("llama", site),
        torch.randn(LAYERS * width("llama", site), generator=torch.Generator().manual_seed(3)),
    )
    mm = MaskedModel(model).fit_means(capture(model, families.tokenizer(), [families.words(20)], site, progress=False))
    for arm, change in (
        (mm.ablate(mask), lambda x, i: torch.zeros_like(x)),
        (mm.ablate(mask, values), lambda x, i: values.split(mask.widths)[i].expand_as(x)),
        (mm.ablate(mask, "mean"), lambda x, i: mm.means.split(mask.widths)[i].expand_as(x)),
        (mm.amplify(mask, gain=2.0), lambda x, i: 2 * x),
        (mm.amplify(mask, gain=values), lambda x, i: values.split(mask.widths)[i].to(x) * x),
    ):
        with plain_hooks("llama", model, mask.layers, site, change):
            expected = answer(model)
        with arm:
            got = answer(model)
        assert got.dtype == dtype and torch.equal(got, expected)
    assert model.dtype == dtype


@pytest.mark.parametrize("positions", ["all", "after-first"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", VARIED)
def test_adapted_and_classifying_models(name, site, positions):
    peft = pytest.importorskip("peft")
    mask, spared = random_mask(name, site), torch.zeros(2, 6, dtype=torch.bool)
    spared[:, 0] = positions == "after-first"
    target = FAMILIES[name].down.rsplit(".", 1)[1]
    adapted = peft.get_peft_model(families.build(name), peft.LoraConfig(r=2, target_modules=[target]))
    for model in (families.shake(adapted, 4), families.build(name, "classification"), families.build(name, "base")):
        before, plain = families.state(model), answer(model)
        with plain_hooks(name, model, mask.layers, site, spared=spared):
            expected = answer(model)
        with MaskedModel(model).ablate(mask, positions=positions):
            assert torch.equal(answer(model), expected)
        assert (
            families.state(model) == before and torch.equal(answer(model), plain) and not torch.equal(plain, expected)
        )


def test_adapters_can_be_switched_inside_a_block():
    peft = pytest.importorskip("peft")
    plain, mask = families.build("llama"), random_mask("llama", "mlp_out")
    model = peft.get_peft_model(
        copy.deepcopy(plain), peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    )
    with MaskedModel(plain).ablate(mask):
        expected = answer(plain)
    with MaskedModel(model).ablate(mask):
        with model.disable_adapter():
            torch.testing.assert_close(answer(model), expected)
        assert not torch.allclose(answer(model), expected)


@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload"])
def test_offloaded_models(way, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, mask = generator_of("llama"), random_mask("llama", "mlp_hidden")
    ids, attention = padded(LISTS, "left")
    mm, options = (MaskedModel(model), dict(input_ids=ids, attention_mask=attention, **GREEDY))
    with mm.ablate(mask, positions="after-first"):
        expected, text = answer(model), model.generate(**options)
    where = [tmp_path / "w"] if way == "disk_offload" else []
    getattr(accelerate, way)(model, *where, execution_device="cpu")
    before = families.state(model)
    with mm.ablate(mask, positions="after-first"):
        torch.testing.assert_close(answer(model), expected)
        assert torch.equal(model.generate(**options), text)
    assert families.state(model) == before
    with pytest.raises(ValueError):
        mm.bake(mask)


def test_an_empty_mask_does_nothing_and_says_so():
    model = families.build("llama")
    empty, plain = NeuronMask.empty([HIDDEN] * LAYERS, "mlp_hidden"), answer(model)
    for arm in (lambda mm: mm.ablate(empty), lambda mm: mm.amplify(empty, gain=9.0), lambda mm: mm.keep(~empty)):
        with pytest.warns(UserWarning):
            with arm(MaskedModel(model)) as counts:
                assert torch.equal(answer(model), plain) and counts == (0, 0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with MaskedModel(model).keep(empty) as counts:  # keeping nothing is a lot
            assert counts == (HIDDEN,) * LAYERS and not torch.equal(answer(model), plain)


def not_opened(argument, mm, call):
    before = families.state(mm.model)
    with refused(ValueError if argument else TypeError, argument=argument):
        with call(mm):
            raise AssertionError("accepted")
    assert families.state(mm.model) == before


def test_misfits_are_refused_by_layer():
    mm, rows = (MaskedModel(families.build("llama")), lambda *widths: [torch.ones(w, dtype=torch.bool) for w in widths])
    hidden = lambda *widths: NeuronMask.from_layers(rows(*widths), "mlp_hidden")
    for way in ("ablate", "keep", "amplify"):
        for wrong in (hidden(24, 25, 24), hidden(24, 24)):
            not_opened("mask", mm, lambda mm: getattr(mm, way)(wrong))
        not_opened("layers", mm, lambda mm: getattr(mm, way)(hidden(24, 24, 24, 24)))
        for site in ("mlp_out", None):  # no site: mlp_out
            wrong = NeuronMask.from_layers(rows(24, 24, 24), site)
            not_opened("mask", mm, lambda mm: getattr(mm, way)(wrong))
        not_opened("mask", MaskedModel(mm.model, "mlp_out"), lambda mm: getattr(mm, way)(hidden(24, 24, 24)))
        not_opened(None, mm, lambda mm: getattr(mm, way)(torch.ones(72, dtype=torch.bool)))
    with MaskedModel(mm.model, "mlp_hidden").ablate(NeuronMask.from_layers(rows(24, 24, 24))):
        pass  # no site, checked by widths


def test_bad_arguments_are_named():
    model = families.build("llama")
    mm, mask = MaskedModel(model), random_mask("llama", "mlp_hidden")
    n = mask.n_neurons
    not_opened("replace", mm, lambda mm: mm.ablate(mask, "one"))
    not_opened("replace", mm, lambda mm: mm.ablate(mask, "mean"))
    not_opened("replace", mm, lambda mm: mm.ablate(mask, torch.zeros(n - 1)))
    not_opened("replace", mm, lambda mm: mm.ablate(mask, torch.full((n,), float("nan"))))
    not_opened("positions", mm, lambda mm: mm.ablate(mask, positions="first"))
    not_opened("gain", mm, lambda mm: mm.amplify(mask, gain=torch.zeros(3)))
    not_opened("add", mm, lambda mm: mm.amplify(mask, add=torch.full((n,), float("inf"))))
    for wrong in (float("nan"), float("inf")):
        not_opened("gain", mm, lambda mm: mm.amplify(mask, gain=wrong))
    with refused(argument="site"):
        MaskedModel(model, "mlp")
    with refused(NotImplementedError, "mixtral"):
        MaskedModel(families.build("mixtral"), "mlp_out")
    with refused(argument="replace"):
        mm.bake(mask, "one")
    out = capture(model, families.tokenizer(), [families.words(9)], "mlp_out", progress=False)
    with refused(argument="activations"):
        MaskedModel(model, "mlp_hidden").fit_means(out)
    not_opened("mask", mm.fit_means(out), lambda mm: mm.ablate(mask, "mean"))


def test_compiled_models_are_refused():
    model, mask = families.build("llama"), random_mask("llama", "mlp_hidden")
    for compiled in (torch.compile(model), model):
        if compiled is model:
            model.compile()
        with refused(argument="model"):
            with MaskedModel(compiled).ablate(mask):
                pass


def test_a_mask_follows_the_model():
    "Casting or moving the model between two blocks, or inside one, changes nothing about the mask."
    model, mask = families.build("llama"), random_mask("llama", "mlp_out")
    values = torch.randn(mask.n_neurons, generator=torch.Generator().manual_seed(3))
    mm = MaskedModel(model)
    with mm.ablate(mask, values):
        first = answer(model)
        model.double()
        torch.testing.assert_close(answer(model).float(), first, rtol=1e-3, atol=1e-3)
        assert answer(model).dtype == torch.float64
