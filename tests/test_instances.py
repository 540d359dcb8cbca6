"""What is known of one model is not believed of another of its class and configuration, nor of itself once changed."""

import itertools

import families
import numpy as np
import pytest
import torch

from llmfact_nb.activations import capture
from llmfact_nb.base.tokens import batches_agree, once_per_model, state_mark, token_lists
from llmfact_nb.evaluate import require_causal
from llmfact_nb.masked_model import MaskedModel
from llmfact_nb.masks import NeuronMask, control
from llmfact_nb.scores.generation import GumbelNoise, generates_alike
from llmfact_nb.sites import neuron_sites


def reads_both_ways(model, yes: bool = True):
    for layer in model.model.layers:
        layer.self_attn.is_causal = not yes
    return model


def sees_padding(model):
    for layer in model.model.layers:
        inner = layer.self_attn.forward
        layer.self_attn.forward = lambda *a, inner=inner, **k: inner(*a, **k | {"attention_mask": None})
    return model


def is_causal(model) -> bool:
    try:
        require_causal(model)
    except TypeError:
        return False
    return True


CHECKS = {
    "causal": (is_causal, reads_both_ways),
    "batches": (batches_agree, reads_both_ways),
    "generation": (generates_alike, sees_padding),
}


@pytest.mark.filterwarnings("ignore:.*padded batch")
@pytest.mark.parametrize("plain_first", [True, False])
@pytest.mark.parametrize("check", CHECKS)
def test_each_of_two_models_of_one_configuration_is_asked(check, plain_first):
    ask, change = CHECKS[check]
    plain, other = families.build("llama"), change(families.build("llama"))
    for model in (plain, other) if plain_first else (other, plain):
        assert ask(model) is (model is plain)


def test_a_changed_model_is_asked_again():
    model = families.build("llama")
    assert is_causal(model)
    assert not is_causal(reads_both_ways(model))
    assert is_causal(reads_both_ways(model, False))


def test_masks_do_not_hide_what_the_model_reads():
    model = reads_both_ways(families.build("llama"))
    model.model.layers[0].mlp.down_proj.weight.data.mul_(3)
    sites = neuron_sites(model, "mlp_out")
    everything = NeuronMask.full(sites.widths, "mlp_out")
    before = state_mark(model)
    with MaskedModel(model).ablate(everything):
        inside = [dict(m._forward_hooks) for m in model.modules()]
        assert state_mark(model) == before and not is_causal(model)
        assert [dict(m._forward_hooks) for m in model.modules()] == inside


def test_the_mark_knows_flags_functions_hooks_and_attention_but_no_mode():
    model = families.build("llama")
    marks = [state_mark(model)]
    model.train()
    assert state_mark(model) == marks[0]
    hook = model.register_forward_hook(lambda *a: None)
    marks.append(state_mark(model))
    hook.remove()
    assert state_mark(model) == marks[0]
    model.set_attn_implementation("eager" if model.config._attn_implementation != "eager" else "sdpa")
    marks.append(state_mark(model))
    marks.append(state_mark(reads_both_ways(model)))
    marks.append(state_mark(sees_padding(model)))
    assert all(a != b for a, b in itertools.combinations(marks, 2))


def test_a_function_at_the_address_of_one_that_is_gone_is_another():
    """Thirty functions one after the other, each set as the model's forward and let go; some of them stand where an
    earlier one stood in memory."""
    model = families.build("llama")
    asked, addresses = 0, set()
    for _ in range(30):
        embed, forward = model.get_input_embeddings(), type(model.get_input_embeddings()).forward
        embed.forward = lambda *args: forward(embed, *args)
        addresses.add(id(embed.forward))

        def look():
            nonlocal asked
            asked += 1

        once_per_model(model, "a question", look)
        del embed.forward
    assert len(addresses) < 30, "no address was used twice"
    assert asked == 30


def test_a_capture_does_not_depend_on_models_seen_before():
    tokenizer, texts = families.tokenizer(), [families.words(9, 1), families.words(3, 2)]
    capture(families.build("llama"), tokenizer, texts, progress=False)
    model = reads_both_ways(families.build("llama"))
    with pytest.warns(UserWarning):
        together = capture(model, tokenizer, texts, progress=False).values
    alone = capture(model, tokenizer, texts, batch_size=1, progress=False).values
    torch.testing.assert_close(together, alone)


def test_a_block_that_runs_twice_since_a_first_capture_is_refused():
    model, tokenizer, texts = families.build("llama"), families.tokenizer(), [families.words(5, 1)]
    capture(model, tokenizer, texts, progress=False)
    mlp = model.model.layers[-1].mlp
    once = mlp.forward
    mlp.forward = lambda x: once(x) + once(2 * x)
    with pytest.raises(ValueError):
        capture(model, tokenizer, texts, progress=False)


class Plain:
    "A slow tokenizer: each character is a token, and the given ids come first by itself."

    is_fast, pad_token_id, bos_token_id, eos_token_id, model_max_length = False, 0, 3, 3, 10**6

    def __init__(self, added=()):
        self.added = list(added)

    def __call__(self, text, **_):
        return {"input_ids": [*self.added, *(3 if c == "#" else 4 + ord(c) % 40 for c in text)]}


def test_only_a_start_that_the_tokenizer_added_is_dropped():
    model = families.build("llama")
    read = lambda tokenizer, text: capture(model, tokenizer, [text], progress=False).token_ids.tolist()
    for get in (lambda t, text: token_lists(t, [text])[0], read):
        assert get(Plain(), "##ab")[:2] == [3, 3] and len(get(Plain(), "##ab")) == 4
        assert len(get(Plain([3]), "#ab")) == 3 and len(get(Plain([3]), "ab")) == 3
        assert get(families.tokenizer(special=True), "<s> w5") == [2, 5, 3]
        assert get(families.tokenizer(), "<s> <s> w5") == [2, 2, 5]


def quantised(model):
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_model_is_causal_and_one_that_reads_both_ways_is_not():
    assert is_causal(quantised(families.build("llama")))
    assert not is_causal(quantised(reads_both_ways(families.build("llama"))))


def test_draws_of_a_seed_stay_what_they_were():
    seeds = [s.initial_seed() for s in GumbelNoise(1.0, 5, [0, 3]).sources]
    assert seeds == [int(np.random.SeedSequence([5, p]).generate_state(1, np.uint64)[0] >> 1) for p in (0, 3)]


def test_a_control_that_must_overlap_its_mask_says_so():
    mask = NeuronMask.from_flat(torch.arange(200) < 60, (100, 100), "mlp_hidden")
    for name in ("random", "matched random"):
        with pytest.warns(UserWarning) as said:
            drawn = control(name, mask, 0, variance=torch.rand(200))
        assert len(said) == 1 and (drawn & mask).n > 0


def test_a_matched_control_without_enough_partners_does_not_warn(recwarn):
    variance = torch.arange(200).float()
    mask = NeuronMask.from_flat((torch.arange(200) % 100) < 40, (100, 100), "mlp_hidden")
    control("matched random", mask, 0, variance=variance)
    assert not recwarn
