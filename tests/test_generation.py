"""Pins what models write on small random ones of several families: equal to a plain loop in any batch and on any
padding, equal luck between arms, settings of the checkpoint out of the way; questions by hand."""

import math

import families
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import GenerationConfig

from llmfact_nb.evaluate import paired_accuracy
from llmfact_nb.base.statistics import wilson
from llmfact_nb.scores.generation import Continuation, distinct, generate_texts, generation_samples, generation_summary
from llmfact_nb.masked_model import MaskedModel
from llmfact_nb.masks import NeuronMask
from llmfact_nb.scores.questions import first_line, question_accuracy, random_word_level

PROMPTS = ["w4 w5 w6", "w7", "w8 w9 w10 w11 w12 w13 w14", "w20 w21 w22"]


def by_loop(model, ids, n, end=()):
    "Greedy tokens, the whole row through the model again at each step."
    ids, new = list(ids), []
    for _ in range(n):
        with torch.no_grad():
            token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in end:
            break
        ids.append(token)
        new.append(token)
    return new


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom", "opt", "gpt_neox", "gemma3_text"])
def test_greedy_texts_are_those_of_a_loop(family, tiny_model, tiny_tokenizer):
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    model.train()
    before = families.state(model), model.generation_config
    expected = [by_loop(model.eval(), tokenizer(p)["input_ids"], 9, end=(3,)) for p in PROMPTS]
    model.train()
    for batch_size in ("auto", 1, 2):
        found = generate_texts(model, tokenizer, PROMPTS, 9, batch_size=batch_size, progress=False)
        assert [list(c.tokens) for c in found] == expected
        assert [c.ended for c in found] == [len(e) < 9 for e in expected] and all(
            c.text == tokenizer.decode(c.tokens, skip_special_tokens=True) for c in found
        )
    assert families.state(model) == before[0] and model.generation_config is before[1]


def test_settings_of_the_checkpoint_are_out_of_the_way(tiny_model, tiny_tokenizer):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(side="right", pad=False)
    plain = generate_texts(model, tokenizer, PROMPTS, 8, progress=False)
    assert len({t for c in plain for t in c.tokens}) > 4
    end = plain[0].tokens[4]
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=2.0,
        repetition_penalty=5.0,
        min_new_tokens=8,
        no_repeat_ngram_size=1,
        num_beams=2,
        eos_token_id=[end],
    )
    ended = generate_texts(model, tokenizer, PROMPTS, 8, progress=False)[0]
    assert (
        ended.ended and ended.tokens == plain[0].tokens[: plain[0].tokens.index(end)]
    )  # its end tokens count, nothing else


def test_luck_belongs_to_seed_and_prompt(tiny_model, tiny_tokenizer):
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    state = torch.get_rng_state()
    draw = lambda seed, prompts=PROMPTS, **k: [
        c.tokens for c in generate_texts(model, tokenizer, prompts, 8, temperature=1.5, seed=seed, progress=False, **k)
    ]
    assert draw(0) == draw(0, batch_size=1) == draw(0, batch_size=3) != draw(1) and torch.equal(
        state, torch.get_rng_state()
    )
    assert draw(0)[:2] == draw(0, PROMPTS[:2]) and len(set(draw(0, ["w4"] * 8))) > 1
    cold = [c.tokens for c in generate_texts(model, tokenizer, PROMPTS, 8, temperature=1e-4, progress=False)]
    assert cold == [c.tokens for c in generate_texts(model, tokenizer, PROMPTS, 8, progress=False)]
    first = (
        torch.tensor([t[0] if t else 3 for t in draw(5, ["w4 w5"] * 3000, batch_size=3000)]).bincount(minlength=48)
        / 3000
    )
    with torch.no_grad():
        expected = (model(torch.tensor([tokenizer("w4 w5")["input_ids"]])).logits[0, -1] / 1.5).softmax(0)
    assert (first - expected).abs().max() < 0.04 and expected.max() < 0.9


def test_arms_in_one_table(tiny_model, tiny_tokenizer):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    mask = NeuronMask.from_layers([torch.arange(24) % 2 == 0] * 3, "mlp_hidden")
    masked = MaskedModel(model)
    arms = {
        "whole": None,
        "half off": lambda: masked.ablate(mask, positions="after-first"),
        "nothing": lambda: masked.amplify(mask, gain=1.0),
    }
    frame = generation_samples(model, tokenizer, PROMPTS, arms, 6, progress=False)
    assert (
        frame.arm.tolist() == [a for a in arms for _ in PROMPTS]
        and frame.prompt.tolist() == PROMPTS * 3
        and frame.item.tolist() == [0, 1, 2, 3] * 3
    )
    texts = frame.groupby("arm").text.apply(list)
    assert (
        texts["whole"]
        == texts["nothing"]
        == [c.text for c in generate_texts(model, tokenizer, PROMPTS, 6, progress=False)]
        != texts["half off"]
    )
    with masked.ablate(mask, positions="after-first"):  # one by one, without any padding
        assert texts["half off"] == [generate_texts(model, tokenizer, [p], 6, progress=False)[0].text for p in PROMPTS]
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    drawn = generation_samples(model, tokenizer, PROMPTS, arms, 6, temperature=1.0, seeds=(0, 1, 2), progress=False)
    assert (
        len(drawn) == 36 and drawn[drawn.arm == "whole"].text.tolist() == drawn[drawn.arm == "nothing"].text.tolist()
    )  # equal models, equal luck
    summary = generation_summary(drawn).set_index("arm")
    whole = drawn[drawn.arm == "whole"]
    assert (
        list(summary.index) == list(arms)
        and summary.loc["whole", "n"] == 12
        and summary.loc["whole", "looping"] == whole.looping.mean()
    )
    assert (summary.loc["whole", "empty_low"], summary.loc["whole", "empty_high"]) == wilson(
        float(whole.groupby("item")["empty"].mean().sum()), 4
    ).ci
    assert (
        summary.loc["whole", "distinct_2_low"]
        <= summary.loc["whole", "distinct_2"]
        <= summary.loc["whole", "distinct_2_high"]
    )


def test_measures_by_hand():
    assert distinct([1, 2, 3, 1, 2], 2) == 0.75 and distinct([1, 1, 1], 1) == 1 / 3 and math.isnan(distinct([1, 2], 3))


def test_too_long_prompts_are_counted(tiny_model, tiny_tokenizer):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with pytest.warns(UserWarning):
        frame = generation_samples(
            model, tokenizer, [families.words(56), families.words(55)], max_new_tokens=10, progress=False
        )
    assert (
        frame.too_long.tolist() == [True, False]
        and frame.tokens[1] > 0
        and generation_summary(frame).n_too_long[0] == 1
        and generation_summary(frame).n[0] == 1
    )
    with pytest.raises(ValueError):
        generate_texts(model, tokenizer, [families.words(56)], 10, progress=False)


@pytest.mark.parametrize(
    "call, error, argument",
    [
        (lambda m, t: generate_texts(m, t, []), ValueError, "prompts"),
        (lambda m, t: generate_texts(m, t, ["w4", ""]), ValueError, None),
        (lambda m, t: generate_texts(m, t, ["w4"], 0), ValueError, "max_new_tokens"),
        (lambda m, t: generate_texts(m, t, ["w4"], temperature=-1), ValueError, "temperature"),
        (lambda m, t: generate_texts(m, t, ["w4"], chat=True), ValueError, "chat"),
        (lambda m, t: generate_texts(m.model, t, ["w4"]), TypeError, None),
        (lambda m, t: generation_samples(m, t, ["w4"], {}), ValueError, "arms"),
        (lambda m, t: generation_samples(m, t, ["w4"], seeds=(0, 1)), ValueError, "seeds"),
        (lambda m, t: question_accuracy(m, t, []), ValueError, "contexts"),
        (lambda m, t: question_accuracy(m, t, [("w4", "w5", "w6")], template="{context}"), ValueError, "template"),
        (lambda m, t: question_accuracy(m, t, [("w4", "w5", 6)]), TypeError, None),
    ],
)
def test_refusals(tiny_model, tiny_tokenizer, call, error, argument):
    model = tiny_model("llama")
    with pytest.raises(error) as e:
        call(model, tiny_tokenizer())
    assert getattr(e.value, "argument", None) == argument


def test_where_an_answer_is_found():
    assert (
        first_line(" Paris \n\nQuestion", False) == "Paris"
        and first_line("Paris", True) == "Paris"
        and first_line("\n \n東京\n", False) == "東京"
    )
    assert first_line("Paris and", False) is first_line("", True) is first_line("-- !\nParis", True) is None


def test_questions_by_hand(tiny_model, tiny_tokenizer, monkeypatch):
    "A model that writes what it is told: scores, parse rate and levels are those computed by hand."
    from llmfact_nb.scores import questions

    told = [
        Continuation("w4.\nmore", (), False),
        Continuation(" the w5 w6", (), True),
        Continuation("w7 w8", (), False),
        Continuation("...", (), True),
        Continuation("", (), False, too_long=True),
    ]
    asked = []
    monkeypatch.setattr(
        questions, "generate_texts", lambda model, tokenizer, prompts, n, **k: asked.append((prompts, n)) or told
    )
    data = [
        ("w4 w5", "w9 w9 {context}", "w4"),
        ("w5 w6", "q", ["w6", "w1"]),
        ("w7", "q", "w7 w8"),
        ("w8", "q", []),
        ("x", "q", "x"),
    ]
    result = question_accuracy(None, tiny_tokenizer(), data, "{context} ? {question} :", max_new_tokens=5)
    assert asked == [
        (["w4 w5 ? w9 w9 {context} :", "w5 w6 ? q :", "w7 ? q :", "w8 ? q :", "x ? q :"], 5)
    ]  # braces in a question stay
    assert (
        result.predictions == ("w4.", "the w5 w6", None, None)
        and result.items == (0, 1, 2, 3)
        and (result.n, result.n_too_long) == (4, 1)
    )
    assert result.correct.tolist() == [True, False, False, False] and result.scores.f1_each.tolist() == pytest.approx(
        [1, 2 / 3, 0, 0]
    )
    assert result.parse_rate == 0.5 and result.ci_parse_rate == wilson(2, 4).ci and result.exact_parsed == 0.5
    assert (result.chance, result.chance_f1) == random_word_level(
        ["w4 w5 w9 w9 {context}", "w5 w6 q", "w7 q", "w8 q"], [("w4",), ("w6", "w1"), ("w7 w8",), ("",)]
    )
    assert random_word_level(["w4 w5 w9 w9", "w7 q"], [("w4",), ("w7 w8",)]) == pytest.approx(
        ((1 / 4 + 0) / 2, (1 / 4 + (2 / 3) / 2) / 2)
    )
    for word in ("parse rate", "majority", "chance", "1 too long"):
        assert word in repr(result)


def test_questions_on_a_model_pair_between_arms(tiny_model, tiny_tokenizer):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    data = [("w4 w5", "w6", "w7"), ("w8", "w9", "w10")]
    settings = dict(
        template="{context} {question}",
        max_new_tokens=3,
        parse=lambda text, ended: text.split()[0] if text else None,
        progress=False,
    )
    own = [c.text.split()[0] for c in generate_texts(model, tokenizer, ["w4 w5 w6", "w8 w9"], 3, progress=False)]
    data = [(c, q, a) for (c, q, _), a in zip(data, own)]
    whole = question_accuracy(model, tokenizer, data, **settings)
    assert whole.scores.exact == whole.scores.f1 == whole.parse_rate == 1
    everything = NeuronMask.full((16,) * 3, site="mlp_out")
    with MaskedModel(model).ablate(everything):
        masked = question_accuracy(model, tokenizer, data, **settings)
    assert paired_accuracy(masked, whole).difference == masked.scores.exact - 1


SMALL_DECODER = dict(
    d_model=16, decoder_layers=2, encoder_layers=2, decoder_ffn_dim=24, encoder_ffn_dim=24, decoder_attention_heads=2,
    encoder_attention_heads=2, max_position_embeddings=64, is_encoder_decoder=False,
)  # fmt: skip
LEFT_PADDING_SHIFTS = {
    "rwkv": dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, context_length=64),
    **dict.fromkeys(["bart", "mbart", "marian", "pegasus", "trocr"], SMALL_DECODER),
}


@pytest.mark.parametrize("kind", [*LEFT_PADDING_SHIFTS, "llama", "gpt2"])
def test_texts_do_not_depend_on_the_batch(kind, tiny_model, tiny_tokenizer):
    "Where left padding changes what a model writes, prompts go one by one."
    torch.manual_seed(0)
    if kind in LEFT_PADDING_SHIFTS:
        config = AutoConfig.for_model(
            kind, vocab_size=48, pad_token_id=0, bos_token_id=2, eos_token_id=3, **LEFT_PADDING_SHIFTS[kind]
        )
        model = AutoModelForCausalLM.from_config(config).eval()
    else:
        model = tiny_model(kind)
    for p in model.parameters():
        if p.dim() > 1:
            p.data.normal_(0, 0.4)
    prompts = ["w5 w9 w17 w30 w8", "w7 w22", "w11 w4 w40"]
    options = dict(max_new_tokens=5, progress=False)
    alone, together = (generate_texts(model, tiny_tokenizer(), prompts, batch_size=n, **options) for n in (1, 3))
    assert alone == together


def test_positions_that_change_with_the_batch_do_not_change_a_text():
    "With longrope, a batch beyond the original length turns all its rows by other frequencies."
    turns = dict(rope_type="longrope", rope_theta=1e4, factor=2.0, short_factor=[1.0] * 4, long_factor=[4.0] * 4)
    how = {"original_max_position_embeddings": 6}
    model, t = families.build("phi3", rope_parameters=turns | how, **how), families.tokenizer()
    prompts = [families.words(n, n) for n in (9, 4, 23, 2)]
    alone = [c for p in prompts for c in generate_texts(model, t, [p], 4, progress=False)]
    assert generate_texts(model, t, prompts, 4, batch_size=4, progress=False) == alone
