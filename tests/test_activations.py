"""Pins what capture reads: for every family the rows of an independent hook, text by text, whatever the batch,
padding, dtype or device map; and that neither model nor disk keeps a trace of it."""

import io
import json
import warnings
from contextlib import ExitStack

import families
import numpy as np
import pytest
import torch
from families import D, FAMILIES, LAYERS, VARIED
from torch import nn

import llmfact_nb.activations as activations
from refusals import refused
from llmfact_nb.base.arguments import ArgumentError
from llmfact_nb.activations import Activations, capture, sink_tokens
from llmfact_nb.base.tokens import evaluation_mode, length_batches, text_list

SITES = ("mlp_out", "mlp_hidden")
TEXTS = [families.words(n, n) for n in (9, 3, 14, 1, 7)]
OPTIONS = dict(progress=False)


def by_hand(name, model, lists, site):
    "One text at a time, one hook per down projection from the table, nothing of the package but the table's."
    model.eval()
    rows, found = [], families.down_projections(name, model)
    for ids in lists:
        seen = {}
        with ExitStack() as stack, torch.no_grad():
            for i, (_, module) in enumerate(found):
                if site == "mlp_out":
                    handle = module.register_forward_hook(
                        lambda m, a, out, i=i: seen.__setitem__(i, out.detach().clone())
                    )
                else:
                    handle = module.register_forward_pre_hook(
                        lambda m, a, i=i: seen.__setitem__(i, a[0].detach().clone())
                    )
                stack.callback(handle.remove)
            model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long))
        rows.append(torch.cat([seen[i].reshape(len(ids), -1).float() for i in range(LAYERS)], 1))
    return rows


def lists_of(tokenizer, texts=TEXTS):
    return [tokenizer(t)["input_ids"] for t in texts]


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", list(FAMILIES))
def test_rows_are_those_of_a_plain_hook(name, site):
    model = families.build(name)
    before = families.state(model)
    for batch_size, side, pad in ((1, "right", True), (3, "left", True), ("auto", "right", False)):
        t = families.tokenizer(pad=pad, side=side, special=FAMILIES[name].kind == "masked")
        expected = by_hand(name, model, lists_of(t), site)
        a = capture(model, t, TEXTS, site, batch_size=batch_size, **OPTIONS)
        torch.testing.assert_close(a.values, torch.cat(expected), rtol=1e-4, atol=1e-4)
        assert (
            a.values.dtype == torch.float32
            and a.widths == ((D if site == "mlp_out" else FAMILIES[name].hidden),) * LAYERS
        )
        assert a.token_ids.tolist() == sum(lists_of(t), []) and a.text_ids.tolist() == [
            i for i, x in enumerate(lists_of(t)) for _ in x
        ]
        assert (
            a.positions.tolist() == [p for x in lists_of(t) for p in range(len(x))]
            and a.depths == tuple(range(LAYERS))
            and a.site == site
        )
    assert families.state(model) == before


@pytest.mark.parametrize("head", ["base", "classification"])
@pytest.mark.parametrize("name", VARIED)
def test_other_heads(name, head):
    model, t = families.build(name, head), families.tokenizer()
    for site in SITES:
        a = capture(model, t, TEXTS, site, batch_size=2, **OPTIONS)
        torch.testing.assert_close(a.values, torch.cat(by_hand(name, model, lists_of(t), site)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapter", ["LoraConfig", "LoHaConfig", "IA3Config"])
def test_adapters_count(adapter):
    "The output is that of the adapted module; the adapter is not left out."
    peft = pytest.importorskip("peft")
    options = {"IA3Config": dict(feedforward_modules=["down_proj"])}.get(adapter, {})
    model = peft.get_peft_model(
        families.build("llama"), getattr(peft, adapter)(target_modules=["down_proj"], **options)
    )
    families.shake(model, 1)
    t = families.tokenizer()
    a = capture(model, t, TEXTS, "mlp_out", batch_size=3, **OPTIONS)
    torch.testing.assert_close(
        a.values, torch.cat(by_hand("llama", model, lists_of(t), "mlp_out")), rtol=1e-4, atol=1e-4
    )
    with model.disable_adapter():
        plain = capture(model, t, TEXTS, "mlp_out", **OPTIONS)
    assert (plain.values - a.values).abs().max() > 0.1


def test_bloom_without_its_residual():
    "BLOOM's MLP returns the residual stream plus its output; only the second is the site."
    model, t = families.build("bloom"), families.tokenizer()
    a, seen = capture(model, t, TEXTS[:1], "mlp_out", **OPTIONS), {}
    for i, block in enumerate(model.transformer.h):
        block.mlp.register_forward_hook(lambda m, args, out, i=i: seen.__setitem__(i, (args[1], out)))
    model(**t(TEXTS[:1], return_tensors="pt"))
    for i, (residual, out) in seen.items():
        torch.testing.assert_close(a.layer(i), (out - residual)[0], rtol=1e-4, atol=1e-4)
        assert (a.layer(i) - out[0]).abs().max() > 0.1


class Flat(nn.Module):
    "The MLP sees (tokens, width), as in OPT's early days and in many ports."

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x.reshape(-1, x.shape[-1])).view(x.shape)


def test_flattened_positions():
    model, t = families.build("llama"), families.tokenizer()
    expected = capture(model, t, TEXTS, "mlp_hidden", **OPTIONS)
    for block in model.model.layers:
        block.mlp = Flat(block.mlp)
    a = capture(model, t, TEXTS, "mlp_hidden", batch_size=3, **OPTIONS)
    torch.testing.assert_close(a.values, expected.values)


@pytest.mark.parametrize("lengths", [(5, 3, 4), (3, 2, 3), (2, 2), (1, 1, 1)])
def test_positions_before_rows(lengths):
    """XLNet's blocks see (positions, rows, width): either read rightly or refused, never taken for (rows, positions,
    width), not even where both are equal."""
    from transformers import XLNetConfig, XLNetLMHeadModel

    model = families.shake(
        XLNetLMHeadModel(XLNetConfig(vocab_size=48, d_model=D, n_layer=LAYERS, n_head=2, d_inner=24))
    )
    t, texts = (families.tokenizer(), [families.words(n, n + i) for i, n in enumerate(lengths)])
    rows, found = [], [layer.ff.layer_2 for layer in model.transformer.layer]
    for ids in lists_of(t, texts):
        seen = {}
        handles = [
            m.register_forward_hook(lambda m, a, out, i=i: seen.__setitem__(i, out[:, 0].clone()))
            for i, m in enumerate(found)
        ]
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
        rows.append(torch.cat([seen[i] for i in range(LAYERS)], 1))
        [h.remove() for h in handles]
    try:
        a = capture(model, t, texts, "mlp_out", batch_size=len(texts), **OPTIONS)
    except (NotImplementedError, ValueError) as e:
        assert "layer_2" in str(e) or "xlnet" in str(e)
    else:
        torch.testing.assert_close(a.values, torch.cat(rows), rtol=1e-4, atol=1e-4)


class Backwards(nn.Module):
    "Runs the last block of its list first."

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, input_ids=None, attention_mask=None):
        x = self.embed(input_ids)
        for layer in reversed(self.layers):
            x = x + layer(x)
        return x


def test_depth_order_is_not_firing_order():
    from types import SimpleNamespace

    torch.manual_seed(0)
    model = Backwards(nn.ModuleList([nn.Sequential(nn.Linear(D, 24), nn.GELU(), nn.Linear(24, D)) for _ in range(3)]))
    model.embed = nn.Embedding(48, D)
    model.get_input_embeddings = lambda: model.embed
    config = SimpleNamespace(model_type="backwards", num_hidden_layers=3, hidden_size=D)
    config.get_text_config = lambda: config
    model.config = config
    t = families.tokenizer()
    a = capture(model, t, TEXTS, "mlp_out", batch_size=2, **OPTIONS)
    for row, ids in zip((a.values[a.text_ids == i] for i in range(len(TEXTS))), lists_of(t)):
        x, out = model.embed(torch.tensor(ids)), {}
        for i in (2, 1, 0):
            out[i] = model.layers[i](x)
            x = x + out[i]
        torch.testing.assert_close(row, torch.cat([out[i] for i in range(3)], 1))


def test_early_stop_skips_the_rest():
    model, t, calls = families.build("llama"), families.tokenizer(), []
    for part in ("model.layers.0", "model.layers.1", "model.layers.1.mlp", "model.layers.2", "model.norm", "lm_head"):
        model.get_submodule(part).register_forward_hook(lambda m, a, out, part=part: calls.append(part))
    capture(model, t, TEXTS[:1], "mlp_out", layers=[0, 1], **OPTIONS)
    whole = ["model.layers.0", "model.layers.1.mlp", "model.layers.1", "model.layers.2", "model.norm", "lm_head"]
    # one short pass is whole, to see that every site runs once; in the pass that reads, the MLP of block 1 was entered,
    # and neither it nor anything after it returned
    assert calls == [*whole, "model.layers.0"]


def test_stopping_leaves_no_state_in_transformers():
    "Hidden states and attentions asked for in the configuration are as complete after a capture as before."
    model, t = families.build("gpt2", output_hidden_states=True), families.tokenizer()
    ids = torch.arange(4, 12)[None]
    before = model(ids)
    capture(model, t, TEXTS, layers=[0], **OPTIONS)
    after = model(ids)
    assert len(after.hidden_states) == len(before.hidden_states) == LAYERS + 1
    assert all(torch.equal(a, b) for a, b in zip(after.hidden_states, before.hidden_states)) and torch.equal(
        after.logits, before.logits
    )


def test_layers():
    model, t = families.build("gpt2"), families.tokenizer()
    everything = capture(model, t, TEXTS, "mlp_hidden", **OPTIONS)
    some = capture(model, t, TEXTS, "mlp_hidden", layers=[2, 0], **OPTIONS)
    assert some.depths == (0, 2) and some.widths == (24, 24) and some.values.shape == (everything.n_tokens, 48)
    for layer in (0, 2):
        torch.testing.assert_close(some.layer(layer), everything.layer(layer))
    with refused(argument="layer"):
        some.layer(1)


def test_named_modules_as_site():
    model, t = families.build("llama"), families.tokenizer()
    names = ("model.layers.0.self_attn.o_proj", "model.layers.2.mlp.down_proj")
    a = capture(model, t, TEXTS, names[::-1], batch_size=2, **OPTIONS)
    assert a.site == names and a.widths == (D, D)
    torch.testing.assert_close(a.values[:, D:], capture(model, t, TEXTS, layers=[2], **OPTIONS).values)


# Encoder-decoders by name: down projections of the encoder, by layer, and one of the decoder.
STACKS = {
    "t5": ("encoder.block.{}.layer.1.DenseReluDense.wo", "decoder.block.1.layer.2.DenseReluDense.wo"),
    "bart": ("encoder.layers.{}.fc2", "decoder.layers.1.fc2"),
}


def two_stacks(family, head):
    "A tiny encoder-decoder, its encoder, the names of the encoder's down projections and of one in the decoder."
    import transformers

    model = (
        families.build(family)
        if head == "base"
        else families.shake(transformers.AutoModelForSeq2SeqLM.from_config(families.config_of(family)))
    )
    prefix = "model." if (family, head) == ("bart", "seq2seq") else ""
    encoder, decoder = STACKS[family]
    return (
        model,
        model.get_submodule(f"{prefix}encoder"),
        [prefix + encoder.format(i) for i in range(LAYERS)],
        prefix + decoder,
    )


@pytest.mark.parametrize("head", ["base", "seq2seq"])
@pytest.mark.parametrize("family", STACKS)
def test_an_encoder_is_read_and_its_decoder_is_refused(family, head, tmp_path):
    """The encoder's rows are those of a plain hook on it alone; the decoder does not run, and is refused, since its
    rows would stand beside the wrong tokens."""
    model, encoder, names, late = two_stacks(family, head)
    before, t, rows = families.state(model), families.tokenizer(side="left"), []
    for ids in lists_of(t):
        seen = {}
        with ExitStack() as stack, torch.no_grad():
            for n in names:
                stack.callback(
                    model.get_submodule(n)
                    .register_forward_hook(lambda m, a, out, n=n: seen.__setitem__(n, out.detach().clone()))
                    .remove
                )
            encoder(input_ids=torch.tensor([ids]))
        rows.append(torch.cat([seen[n].reshape(len(ids), -1) for n in names], 1))
    with ExitStack() as stack:
        stack.callback(
            model.get_submodule(late).register_forward_hook(lambda *a: pytest.fail("the decoder ran")).remove
        )
        torch.testing.assert_close(
            capture(model, t, TEXTS, names, batch_size=3, **OPTIONS).values, torch.cat(rows), rtol=1e-4, atol=1e-4
        )
    for wrong in ([late], [*names, late]):
        with pytest.raises(ArgumentError) as error:
            capture(model, t, TEXTS, wrong, path=tmp_path / "a.safetensors", **OPTIONS)
        assert error.value.argument == "site" and error.value.value == [late]
    assert families.state(model) == before and not list(tmp_path.iterdir())


def test_an_encoder_that_accelerate_placed(tmp_path):
    "There every module has to return, and the decoder, which would miss its own input, is not asked."
    accelerate = pytest.importorskip("accelerate")
    model, _, names, _ = two_stacks("t5", "seq2seq")
    expected = capture(model, families.tokenizer(), TEXTS, names, **OPTIONS)
    accelerate.disk_offload(model, tmp_path / "weights", execution_device="cpu")
    torch.testing.assert_close(capture(model, families.tokenizer(), TEXTS, names, **OPTIONS).values, expected.values)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16])
def test_half_precision_models_give_float32_rows(weights):
    model, t = families.build("llama").to(weights), families.tokenizer()
    for site in SITES:
        a = capture(model, t, TEXTS, site, batch_size=1, **OPTIONS)
        assert a.values.dtype == torch.float32
        torch.testing.assert_close(a.values, torch.cat(by_hand("llama", model, lists_of(t), site)))
    assert model.dtype == weights


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_disk", [False, True])
def test_large_values_stay_finite(stored, on_disk, tmp_path):
    "1e5 is infinite in float16, which the reference implementation stored."
    model, t = families.build("gpt2"), families.tokenizer()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.bias[3] = 1e5
    path = tmp_path / "a.safetensors" if on_disk else None
    a = capture(model, t, TEXTS, "mlp_out", path=path, dtype=stored, **OPTIONS)
    assert a.values.dtype == stored and torch.isfinite(a.values).all()
    torch.testing.assert_close(a.layer(1)[:, 3].float(), torch.full((a.n_tokens,), 1e5), rtol=0.01, atol=0)
    mean, variance = a.moments()
    assert (
        mean.dtype == variance.dtype == torch.float32 and torch.isfinite(mean).all() and torch.isfinite(variance).all()
    )


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disk_equals_memory(site, dtype, tmp_path):
    model, t = families.build("qwen2"), families.tokenizer()
    options = dict(site=site, batch_size=2, dtype=dtype, max_length=8, layers=[0, 2], **OPTIONS)
    memory, disk = (
        capture(model, t, TEXTS, **options),
        capture(model, t, TEXTS, path=tmp_path / "new" / "a.safetensors", **options),
    )
    again, loaded = (memory.save(tmp_path / "b.safetensors"), Activations.load(tmp_path / "new" / "a.safetensors"))
    for other in (disk, Activations.load(again), loaded):
        for part in ("values", "text_ids", "positions", "token_ids", "sinks"):
            mine, theirs = getattr(memory, part), getattr(other, part)
            assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype and mine.shape == theirs.shape, part
        assert all(getattr(memory, k) == getattr(other, k) for k in ("widths", "depths", "site", "model", "n_cut"))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.safetensors"]


def test_file_is_plain_safetensors(tmp_path):
    "Another program can read it, also in the type it was stored in."
    from safetensors.torch import load_file

    model, t = families.build("llama"), families.tokenizer()
    a = capture(model, t, TEXTS, path=tmp_path / "a.safetensors", dtype=torch.bfloat16, **OPTIONS)
    tensors = load_file(tmp_path / "a.safetensors")
    assert set(tensors) == {"values", "text_ids", "positions", "token_ids", "sinks"} and torch.equal(
        tensors["values"], a.values
    )


def test_writing_to_a_loaded_capture_does_not_reach_the_file(tmp_path):
    model, t = families.build("llama"), families.tokenizer()
    a = capture(model, t, TEXTS, path=tmp_path / "a.safetensors", **OPTIONS)
    value = a.values[0, 0].item()
    a.values[0, 0] = value + 1
    assert Activations.load(tmp_path / "a.safetensors").values[0, 0] == value
    a.save(tmp_path / "a.safetensors")  # onto the file it is mapped from
    assert Activations.load(tmp_path / "a.safetensors").values[0, 0] == value + 1


@pytest.mark.parametrize("truncation_side", ["right", "left"])
@pytest.mark.parametrize("special", [False, True])
def test_windows(special, truncation_side):
    "Split, nothing lost, in the order of the text, each window with positions and special tokens of its own."
    model, t = (families.build("llama"), families.tokenizer(special=special, truncation_side=truncation_side))
    text = families.words(22, 1)
    inner = families.tokenizer()(text)["input_ids"]
    a = capture(model, t, [text, families.words(4, 2)], windows=True, max_length=8, **OPTIONS)
    windows = [
        part.tolist()
        for part in a.token_ids[a.text_ids == 0].tensor_split((a.positions[a.text_ids == 0] == 0).nonzero()[1:, 0])
    ]
    size = 8 - 2 * special
    if special:
        assert all(w[0] == 2 and w[-1] == 3 for w in windows)
        windows = [w[1:-1] for w in windows]
    assert sum(windows, []) == inner and max(map(len, windows)) == size
    assert a.n_cut == 0 and (a.text_ids == 1).sum() == 4 + 2 * special
    lists = [[2, *w, 3] if special else w for w in windows] + lists_of(t, [families.words(4, 2)])
    torch.testing.assert_close(a.values, torch.cat(by_hand("llama", model, lists, "mlp_out")), rtol=1e-4, atol=1e-4)


def test_cut_texts_are_counted():
    model, t = families.build("llama"), families.tokenizer()
    a = capture(model, t, TEXTS, max_length=7, **OPTIONS)  # of 9, 3, 14, 1, 7 tokens
    assert a.n_cut == 2 and a.n_tokens == 7 + 3 + 7 + 1 + 7
    assert a.token_ids.tolist() == sum([x[:7] for x in lists_of(t)], [])
    assert capture(model, t, TEXTS, max_length=14, **OPTIONS).n_cut == 0


def test_slow_tokenizers():
    "One without return_overflowing_tokens, as pure Python tokenizers are."

    class Slow:
        is_fast, pad_token_id = False, None

        def __call__(self, text):
            return {"input_ids": fast(text)["input_ids"]}

    model, fast = families.build("llama"), families.tokenizer()
    for windows in (False, True):
        a, b = (capture(model, t, TEXTS, max_length=5, windows=windows, **OPTIONS) for t in (Slow(), fast))
        torch.testing.assert_close(a.values, b.values)
        assert a.n_cut == b.n_cut and torch.equal(a.text_ids, b.text_ids) and torch.equal(a.positions, b.positions)


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "roberta", "mpt", "llama", "gptj"])
def test_texts_longer_than_the_model(name):
    "Cut at what the model can take, without the user knowing that number."
    model, t = families.build(name), families.tokenizer()
    a = capture(model, t, [families.words(200)], **OPTIONS)
    assert a.n_cut == 1 and families.CONTEXT - 2 <= a.n_tokens <= families.CONTEXT


@pytest.mark.parametrize(
    "kind, limit, config",
    [
        (
            "ibert",
            63,
            dict(max_position_embeddings=64, pad_token_id=0),
        ),  # counts from behind the padding, in embeddings that are not torch's
        ("led", 64, dict(max_encoder_position_embeddings=64, max_decoder_position_embeddings=32)),
        ("rwkv", 64, dict(context_length=64)),
        ("bloom", 200, {}),  # no positions to run out of
    ],
)
def test_limits_under_other_names(kind, limit, config):
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        narrow = dict(
            hidden_size=D,
            num_hidden_layers=1,
            num_attention_heads=2,
            d_model=D,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
        )
        if kind == "rwkv":
            narrow = dict(hidden_size=D, num_hidden_layers=1)
        model = AutoModel.from_config(AutoConfig.for_model(kind, vocab_size=48, **narrow, **config))
    assert activations.longest_input(model, families.tokenizer(), 200) == limit


def test_no_family_runs_beyond_its_positions():
    "One real pass at the longest that is allowed."
    for name in [*families.KNOWN, "albert", "bart"]:
        model = families.build(name)
        n = activations.longest_input(model, families.tokenizer(), 200)
        with torch.no_grad():
            model(input_ids=torch.full((1, n), 5), attention_mask=torch.ones(1, n, dtype=torch.long))


def phi3_long(limit=20, **changes):
    "Positions turn by other frequencies in batches of more than `limit` tokens."
    longrope = dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[4.0] * 4)
    return families.build("phi3", original_max_position_embeddings=limit, rope_scaling=longrope, **changes)


@pytest.mark.parametrize("batch_size", [2, 5, "auto"])
def test_texts_on_either_side_of_longrope_do_not_share_a_batch(batch_size):
    model, t = phi3_long(), families.tokenizer()
    texts = [families.words(n, n) for n in (20, 40, 5, 21, 19, 1, 33)]
    expected = torch.cat(by_hand("phi3", model, lists_of(t, texts), "mlp_out"))
    for order in (1, -1):
        a = capture(model, t, texts[::order], batch_size=batch_size, **OPTIONS)
        for i, rows in enumerate(expected.split([20, 40, 5, 21, 19, 1, 33])):
            torch.testing.assert_close(a.values[a.text_ids == (i if order == 1 else 6 - i)], rows, rtol=1e-4, atol=1e-4)


def test_longrope_batches():
    for lengths in ([20, 40, 5, 21, 19, 1, 33], [1, 2], [30, 30, 30]):
        for batch_size in (1, 2, 3, "auto"):
            groups = length_batches(lengths, batch_size, 64, phi3_long())
            assert sorted(sum(groups, [])) == list(range(len(lengths)))
            assert all(len({lengths[i] > 20 for i in g}) == 1 for g in groups)
            if max(lengths) <= 20 or min(lengths) > 20:
                assert groups == length_batches(lengths, batch_size, 64)


def test_losses_under_longrope_are_those_of_each_text_alone():
    from llmfact_nb.evaluate import EvalSet, perplexity

    model, texts = (phi3_long(), EvalSet(families.tokenizer(), [families.words(n, n) for n in (20, 40, 5, 22, 19, 33)]))
    one, all_at_once = (perplexity(model, None, texts, batch_size=b, progress=False) for b in (1, 6))
    torch.testing.assert_close(all_at_once.token_nats, one.token_nats, rtol=1e-4, atol=1e-4)


def test_dynamic_positions_do_not_grow_within_what_is_read():
    """With 'dynamic' frequencies a batch beyond the model's positions would change those of later ones; none is that
    long."""
    model, t = (families.build("llama", rope_scaling=dict(rope_type="dynamic", factor=4.0)), families.tokenizer())
    before = [b.clone() for b in model.buffers()]
    a = capture(model, t, [families.words(n, n) for n in (200, 9, 64)], batch_size=2, **OPTIONS)
    assert a.n_tokens == 64 + 9 + 64 and all(torch.equal(x, y) for x, y in zip(before, model.buffers(), strict=True))
    torch.testing.assert_close(
        a.values[a.text_ids == 1], capture(model, t, [families.words(9, 9)], **OPTIONS).values, rtol=1e-4, atol=1e-4
    )


def test_max_length_below_the_special_tokens():
    "Either every pass is at most that long, or it is refused."
    model, t = families.build("bert"), families.tokenizer(special=True)
    try:
        a = capture(model, t, TEXTS, max_length=1, **OPTIONS)
    except ValueError as e:
        assert "max_length" in str(e)
    else:
        assert a.positions.max() == 0


def test_tokenizer_is_left_as_it_was():
    model, t = families.build("llama"), families.tokenizer(pad=False, side="left")
    before = (t(TEXTS[0])["input_ids"], t.padding_side, t.pad_token, t.truncation_side, t.model_max_length)
    capture(model, t, TEXTS, max_length=3, batch_size=2, **OPTIONS)
    assert (t(TEXTS[0])["input_ids"], t.padding_side, t.pad_token, t.truncation_side, t.model_max_length) == before


@pytest.mark.parametrize("on_disk", [False, True])
def test_each_module_gets_its_own_mode_back(on_disk, tmp_path):
    model, t = (families.build("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train(), families.tokenizer())
    model.transformer.h[1].eval()
    model.transformer.h[2].mlp.eval()
    before = families.state(model)
    path = tmp_path / "a.safetensors" if on_disk else None
    a = capture(model, t, TEXTS, path=path, **OPTIONS)
    assert families.state(model) == before
    torch.testing.assert_close(
        a.values, torch.cat(by_hand("gpt2", model, lists_of(t), "mlp_out")), rtol=1e-4, atol=1e-4
    )  # no dropout


def test_evaluation_mode_survives_an_error():
    model = families.build("gpt2").train()
    before = families.state(model)
    with pytest.raises(KeyboardInterrupt):
        with evaluation_mode(model):
            assert not any(m.training for m in model.modules())
            raise KeyboardInterrupt
    assert families.state(model) == before


def test_gradients_stay_off_and_come_back():
    model, t = families.build("llama"), families.tokenizer()
    a = capture(model, t, TEXTS, **OPTIONS)
    assert not a.values.requires_grad and all(p.grad is None for p in model.parameters()) and torch.is_grad_enabled()
    model(torch.arange(4, 9)[None]).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("in_call", [1, 3])
def test_errors_in_the_forward_pass_leave_nothing(error, on_disk, in_call, tmp_path):
    model, t, calls = families.build("llama").train(), families.tokenizer(), []

    def breaks(module, args, kwargs):
        calls.append(1)
        if len(calls) == in_call:
            raise error("in the middle")

    model.model.layers[1].register_forward_pre_hook(breaks, with_kwargs=True)
    before = families.state(model)
    path = tmp_path / "deep" / "a.safetensors" if on_disk else None
    with refused(error, "in the middle"):
        capture(model, t, TEXTS, batch_size=1, path=path, **OPTIONS)
    assert families.state(model) == before
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    assert capture(model, t, TEXTS, batch_size=1, path=path, **OPTIONS).n_tokens == 34  # and now it works


@pytest.mark.parametrize("after", [0, 2, 6])
def test_full_disk_leaves_nothing(after, tmp_path, monkeypatch):
    model, t = families.build("llama"), families.tokenizer()
    path, before = tmp_path / "a.safetensors", families.state(model)
    old = capture(model, t, TEXTS[:1], path=path, **OPTIONS).values.clone()
    calls = []

    class Full(io.FileIO):
        def write(self, data):
            calls.append(1)
            if len(calls) > after + 1:  # the header is the first
                raise OSError(28, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(activations, "open", lambda path, mode: Full(path, mode), raising=False)
    with refused(OSError, "a.safetensors"):
        capture(model, t, TEXTS, batch_size=1, path=path, **OPTIONS)
    with refused(OSError, "a.safetensors"):
        capture(model, t, TEXTS, batch_size=1, **OPTIONS).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"] and families.state(model) == before
    assert torch.equal(Activations.load(path).values, old)  # what stood there before still stands


def test_folder_that_cannot_be_written(tmp_path):
    model, t = families.build("llama"), families.tokenizer()
    (tmp_path / "file").write_text("")
    with refused(OSError, "a.safetensors"):
        capture(model, t, TEXTS, path=tmp_path / "file" / "a.safetensors", **OPTIONS)


def device_state(model):
    return [(n, p.device) for n, p in model.named_parameters()], [
        (n, type(getattr(m, "_hf_hook", None)), id(m.__dict__.get("forward"))) for n, m in model.named_modules()
    ]


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("way", ["cpu_offload", "by block", "disk_offload", "dispatch"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_models_that_accelerate_placed(name, way, site, tmp_path):
    "Weights that come only when needed: read rightly, and away again afterwards."
    accelerate = pytest.importorskip("accelerate")
    model, t = families.build(name), families.tokenizer()
    expected = torch.cat(by_hand(name, model, lists_of(t), site))
    ids = torch.arange(4, 12)[None]
    answer = model(ids).logits
    if way == "cpu_offload":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif way == "by block":  # whole blocks come and go, so a pass that stops inside one would leave it behind
        accelerate.cpu_offload(
            model,
            execution_device="cpu",
            preload_module_classes=[
                type(b).__name__ for b in (model.transformer.h if name == "gpt2" else model.model.layers)
            ],
        )
    elif way == "disk_offload":
        accelerate.disk_offload(model, tmp_path / "weights", execution_device="cpu")
    else:
        parts = [n for n, m in model.named_children() if n != "lm_head"]
        accelerate.dispatch_model(model, {parts[0]: "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    before, hooks = device_state(model), families.state(model)
    for batch_size in (1, 3):
        a = capture(
            model, t, TEXTS, site, batch_size=batch_size, layers=None if batch_size == 1 else [0, 1, 2], **OPTIONS
        )
        torch.testing.assert_close(a.values, expected, rtol=1e-4, atol=1e-4)
    assert device_state(model) == before and families.state(model) == hooks
    torch.testing.assert_close(model(ids).logits, answer)
    assert way == "dispatch" or all(p.device.type == "meta" for n, p in model.named_parameters() if ".mlp." in n)


@pytest.mark.parametrize("site", SITES)
def test_a_device_map_that_leaves_layers_on_disk(site, tmp_path):
    "As users load what is too large for them: from_pretrained with a device map, the last layers on disk."
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    model, t = families.build("llama"), families.tokenizer()
    expected = torch.cat(by_hand("llama", model, lists_of(t), site))
    model.save_pretrained(tmp_path / "model")
    last = model.config.num_hidden_layers - 1
    places = {n: "cpu" for n in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")} | {
        f"model.layers.{i}": "disk" if i in (1, last) else "cpu" for i in range(last + 1)
    }
    placed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "weights"
    ).eval()
    assert {p.device.type for p in placed.parameters()} == {"cpu", "meta"}
    for path in (None, tmp_path / "acts.safetensors"):
        torch.testing.assert_close(
            capture(placed, t, TEXTS, site, path=path, **OPTIONS).values, expected, rtol=1e-4, atol=1e-4
        )
    assert {n for n, p in placed.named_parameters() if p.device.type == "meta"} == {
        n for n, _ in model.named_parameters() if n.startswith(("model.layers.1.", f"model.layers.{last}."))
    }


def test_compiled_models_are_refused():
    model, t = families.build("llama"), families.tokenizer()
    with refused(argument="model"):
        capture(torch.compile(model), t, TEXTS, **OPTIONS)
    model.compile()
    with refused(argument="model"):
        capture(model, t, TEXTS, **OPTIONS)


@pytest.mark.parametrize(
    "wrong, error",
    [
        (dict(texts=[]), ValueError),
        (dict(texts=""), TypeError),
        (dict(texts="one text"), TypeError),
        (dict(texts={"one", "two"}), TypeError),
        (dict(texts=["a", 3]), TypeError),
        (dict(texts=None), TypeError),
        (dict(texts=["", ""]), ValueError),
        (dict(site="mlp"), ValueError),
        (dict(layers=[99]), ValueError),
        (dict(layers=[]), ValueError),
        (dict(batch_size=0), ValueError),
        (dict(batch_size=2.5), ValueError),
        (dict(batch_size="all"), ValueError),
        (dict(max_length=0), ValueError),
        (dict(max_length=-3), ValueError),
        (dict(max_length=8.0), ValueError),
        (dict(dtype=torch.float16), ValueError),
        (dict(dtype="float32"), ValueError),
    ],
)
def test_bad_input_is_named(wrong, error, tmp_path):
    model, t = families.build("llama").train(), families.tokenizer()
    before = families.state(model)
    (name,) = wrong
    with refused(error, name, argument=name if error is ValueError else None):
        capture(model, t, path=tmp_path / "a.safetensors", **{"texts": TEXTS, **OPTIONS, **wrong})
    assert families.state(model) == before and not list(tmp_path.iterdir())


def test_texts_without_tokens_are_left_out_with_a_warning():
    model, t = families.build("llama"), families.tokenizer()
    with pytest.warns(UserWarning):
        a = capture(model, t, ["", "w5 w6", "   ", "w7"], **OPTIONS)
    assert a.text_ids.tolist() == [1, 1, 3] and a.token_ids.tolist() == [5, 6, 7]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        capture(model, t, TEXTS, **OPTIONS)  # and none when there is nothing to say


def test_texts_may_be_a_dataset():
    datasets = pytest.importorskip("datasets")
    assert text_list(datasets.Dataset.from_dict({"text": TEXTS, "label": range(5)})) == TEXTS
    with refused(argument="texts"):
        text_list(datasets.Dataset.from_dict({"label": [1]}))


def test_module_that_does_not_run_is_an_error():
    model, t = families.build("llama"), families.tokenizer()
    model.model.layers[1].mlp.forward = lambda x: x  # a fused kernel that goes around the projection
    before = families.state(model)
    with refused(ValueError, "layers.1.mlp.down_proj", argument="site"):
        capture(model, t, TEXTS, **OPTIONS)
    assert families.state(model) == before


def damaged(path, how):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if how == "truncated":
        path.write_bytes(data[:-100])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(2000))
    elif how == "pickle":
        torch.save({"values": torch.zeros(3)}, path)
    elif how == "foreign":
        from safetensors.torch import save_file

        save_file({"values": torch.zeros(3, 3)}, path)
    elif how == "mask":
        from llmfact_nb.masks import NeuronMask

        NeuronMask.full([3, 3]).save(path)
    else:  # a header of the right kind without what belongs in it
        del header["__metadata__"]["llmfact_nb"]
        header["__metadata__"]["llmfact_nb"] = '{"kind": "activations", "format": 1}'
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize("how", ["truncated", "empty", "noise", "pickle", "foreign", "mask", "incomplete"])
def test_damaged_and_foreign_files_are_refused(how, tmp_path):
    path = tmp_path / "a.safetensors"
    capture(families.build("llama"), families.tokenizer(), TEXTS, path=path, **OPTIONS)
    damaged(path, how)
    with refused(ValueError, "a.safetensors"):
        Activations.load(path)


def test_missing_file_is_named(tmp_path):
    for path in (tmp_path / "no.safetensors", tmp_path):
        with refused(FileNotFoundError, path.name):
            Activations.load(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_against_float64(dtype):
    "Also where the mean is much larger than the spread, and over any choice of rows."
    rng = np.random.default_rng(0)
    x = torch.from_numpy(
        rng.normal(size=(500, 12)) * 10.0 ** rng.integers(-3, 4, 12) + 10.0 ** rng.integers(-2, 4, 12)
    ).to(dtype)
    sinks, rows = (torch.from_numpy(rng.random(500) < 0.1), torch.from_numpy(rng.random(500) < 0.5))
    zeros = torch.zeros(500, dtype=torch.long)
    a = Activations(x, zeros, zeros, zeros, sinks, (5, 7), (1, 4), "mlp_out")
    for chosen, got in ((~sinks, a.moments()), (rows, a.moments(rows))):
        exact = x[chosen].double().numpy()
        np.testing.assert_allclose(got[0].numpy(), exact.mean(0), rtol=1e-5)
        np.testing.assert_allclose(got[1].numpy(), exact.var(0), rtol=1e-4)
        assert got[0].dtype == got[1].dtype == torch.float32
    with refused(argument="rows"):
        a.moments(torch.zeros(500, dtype=torch.bool))


def test_sinks_against_numpy():
    rng = np.random.default_rng(0)
    squares, positions = rng.gamma(2.0, size=300), np.tile(np.arange(30), 10)
    squares[positions == 0] *= 0.1  # first tokens are sinks whatever their norm
    squares[[17, 130]] = 1e4
    median = np.median(squares[positions > 0])
    got = sink_tokens(torch.from_numpy(squares).float(), torch.from_numpy(positions))
    assert got.tolist() == ((positions == 0) | (squares > 20 * median)).tolist() and got.sum() == 12
    assert sink_tokens(torch.ones(3), torch.zeros(3, dtype=torch.long)).all()  # texts of one token
    pairs = (
        torch.tensor([900.0, 1, 900, 1, 900, 1, 900, 30, 900, 1]),
        torch.arange(10) % 2,
    )  # first tokens do not take part in the median
    assert sink_tokens(*pairs).tolist() == [True, False, True, False, True, False, True, True, True, False]


@pytest.mark.parametrize("scale", [1e3, 1e18, 1e-18])
def test_sinks_do_not_depend_on_the_unit(scale):
    "Squared norms of large activations do not overflow into 'everything is a sink' or 'nothing is'."
    model, t = families.build("llama"), families.tokenizer()
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight.mul_(scale / 1e3 if scale == 1e3 else scale)
            block.post_attention_layernorm.weight.clamp_(-1, 1)
    a = capture(model, t, TEXTS, "mlp_hidden", **OPTIONS)
    assert torch.equal(a.sinks, sink_tokens(a.values.double().square().sum(1), a.positions))


def test_batches_hold_every_text_once_and_no_more_than_allowed():
    rng = np.random.default_rng(0)
    for n in (1, 2, 50):
        lengths = rng.integers(1, 400, n).tolist()
        for batch_size in (1, 3, "auto"):
            groups = length_batches(lengths, batch_size, 2048)
            assert sorted(sum(groups, [])) == list(range(n))
            if batch_size == "auto":
                assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= 2048 for g in groups)
            else:
                assert all(len(g) == batch_size for g in groups[:-1]) and 1 <= len(groups[-1]) <= batch_size


def test_disk_capture_holds_one_batch(tmp_path, monkeypatch):
    "Whatever the number of texts: no matrix larger than a batch is made, and none while another is still held."
    import weakref

    model, t = families.build("llama"), families.tokenizer()
    empty, made, alive, most = torch.empty, [], [], []

    def counted(*shape, dtype=torch.float32):
        if len(shape) == 1:
            return empty(*shape, dtype=dtype)
        array = np.empty(shape, np.float32)  # lives as long as any tensor that looks at it
        made.append(shape), alive.append(weakref.ref(array))
        most.append(sum(r() is not None for r in alive))
        return torch.from_numpy(array)

    monkeypatch.setattr(activations.torch, "empty", counted)
    a = capture(
        model, t, [families.words(10, i) for i in range(40)], batch_size=2, path=tmp_path / "a.safetensors", **OPTIONS
    )
    assert a.n_tokens == 400 and set(made) == {(10, a.n_neurons)} and max(most) == 2


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_long_texts_are_cut_at_their_end(side, special):
    """The beginning stays, whatever side the tokenizer prefers; also where words are long, where there are none, and
    around the length at which a text counts as cut."""
    model, t, plain = (
        families.build("llama"),
        families.tokenizer(special=special, truncation_side=side),
        families.tokenizer(special=special),
    )
    texts = [families.words(n, n) for n in (5, 6, 7, 8, 9, 10, 400)] + [
        " " * 5000 + "w5 w6 " * 9,
        "w7" + " " * 9000 + "w8",
        "w9" * 4000 + " w10",
        "w5 " + "x" * 5000,
    ]
    a = capture(model, t, texts, "mlp_out", max_length=8, **OPTIONS)
    expected = [plain(x, truncation=True, max_length=8)["input_ids"] for x in texts]
    assert [a.token_ids[a.text_ids == i].tolist() for i in range(len(texts))] == expected
    assert a.n_cut == sum(len(plain(x)["input_ids"]) > 8 for x in texts)
