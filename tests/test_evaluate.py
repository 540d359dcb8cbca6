"""Pins the measures on small random models of several families: equal to a plain loop whatever batch size, padding
side or order; intervals that cover; refusals; the model left as it was."""

import math
import warnings

import numpy as np
import pytest
import survey
import torch
from datasets import ClassLabel, Dataset, Features, Value
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from llmfact_nb.base.tokens import own_hook
from llmfact_nb.evaluate import EvalSet, Perplexity, cloze_accuracy, label_accuracy, paired_difference, perplexity

WORDS = "a b c d e f g h i j k l m n o p good bad is the capital of X Y : Review Sentiment".split()
SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=64,
)
FAMILIES = {
    "gpt2": dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "llama": SMALL | dict(num_key_value_heads=2),
    "gpt_neox": SMALL,
    "bloom": dict(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    "opt": SMALL | dict(ffn_dim=48, word_embed_proj_dim=32),
    "gemma3_text": SMALL | dict(num_key_value_heads=2, head_dim=8, sliding_window=8),
}
TEXTS = [
    "a b c d e",
    "f g",
    "h i j k l m n o p a b c d e f g h i j",
    "good bad good",
    "the capital of X is Y",
    "a a a a b b b b",
]


@pytest.fixture
def tokenizer():
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["?", *WORDS])}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?")  # no pad token


def build(family="llama", seed=0, **changes):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(FAMILIES[family] | changes)))
    with torch.no_grad():  # far from uniform, so that mistakes show
        for p in model.parameters():
            p.mul_(4)
    return model.eval()


def by_loop(model, tokenizer, texts, max_length=1024):
    "Token losses, one text at a time, no padding, float64 softmax."
    losses = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:max_length]])
        with torch.no_grad():
            log_p = model(ids).logits[0, :-1].double().log_softmax(-1)
        losses.append(-log_p.gather(1, ids[0, 1:, None])[:, 0])
    return losses


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_a_loop_for_every_batching(family, tokenizer):
    model = build(family)
    expected = torch.cat(by_loop(model, tokenizer, TEXTS))
    for batch_size in ("auto", 1, 2, 4, 100):
        for side in ("left", "right"):
            tokenizer.padding_side = side
            result = perplexity(model, tokenizer, TEXTS, batch_size=batch_size, progress=False)
            assert result.token_nats.dtype == torch.float32 and torch.allclose(
                result.token_nats.double(), expected, atol=2e-5, rtol=1e-5
            )
            assert math.isclose(result.nats, float(expected.mean()), abs_tol=1e-5) and math.isclose(
                result.value, math.exp(result.nats)
            )
            assert result.text_ids.tolist() == [i for i, t in enumerate(TEXTS) for _ in t.split()[1:]]
            assert (result.n_tokens, result.n_texts, result.n_cut, result.n_dropped) == (
                len(expected),
                len(TEXTS),
                0,
                0,
            )


def test_padding_is_on_the_right_and_masked(tokenizer):
    "Masks that spare the first real token of a row find it by the attention mask."
    model, fed = build(), []
    hook = model.model.register_forward_pre_hook(
        own_hook(lambda m, a, k: fed.append((k["input_ids"], k["attention_mask"]))), with_kwargs=True
    )
    perplexity(model, tokenizer, TEXTS, batch_size=3, progress=False)
    hook.remove()
    lengths = [len(t.split()) - 1 for t in TEXTS]
    assert sorted(n for _, mask in fed for n in mask.sum(1).tolist()) == sorted(lengths)
    for ids, mask in fed:
        assert (
            torch.equal(mask, (torch.arange(ids.shape[1]) < mask.sum(1, keepdim=True)).long())
            and ids.shape[1] == mask.sum(1).max()
            and not ids[mask == 0].any()
        )


def test_special_tokens_are_kept_and_a_chat_template_brings_its_own(tokenizer):
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    model = build()
    result = perplexity(model, tokenizer, ["a b", "c"], progress=False)
    assert result.n_tokens == 3 and result.n_dropped == 0  # after <s> the first word is scored too
    assert torch.allclose(result.token_nats.double(), torch.cat(by_loop(model, tokenizer, ["a b", "c"])), atol=2e-5)
    fed = []
    hook = model.model.register_forward_pre_hook(
        own_hook(lambda m, a, k: fed.append(k["input_ids"][0].tolist())), with_kwargs=True
    )
    cloze_accuracy(model, tokenizer, [("", "b")], progress=False)  # <s> stands before the answer
    tokenizer.chat_template = "{% for m in messages %}<s> {{ m['content'] }} {% endfor %}Sentiment : "
    asked = cloze_accuracy(model, tokenizer, [("a", "b")], chat=True, progress=False)
    hook.remove()
    bos, a, sentiment, colon = (tokenizer.convert_tokens_to_ids(t) for t in ("<s>", "a", "Sentiment", ":"))
    assert fed == [[bos], [bos, a, sentiment, colon]]
    with torch.no_grad():
        expected = model(torch.tensor([fed[1]])).logits[0, -1].log_softmax(-1)[tokenizer.convert_tokens_to_ids("b")]
    assert torch.allclose(asked.log_likelihoods[0], expected, atol=1e-5)  # the answer alone is scored


def test_a_tokenizer_with_settings_of_its_own(tokenizer):
    "Padding, truncation or a pad token left on by somebody else change nothing."
    model = build()
    plain = perplexity(model, tokenizer, TEXTS, progress=False)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer(TEXTS, padding="max_length", truncation=True, max_length=3)
    tokenizer.truncation_side = tokenizer.padding_side = "left"
    again = perplexity(model, tokenizer, TEXTS, progress=False)
    assert torch.equal(plain.token_nats, again.token_nats) and plain.fingerprint == again.fingerprint


def test_texts_as_list_data_set_or_eval_set(tokenizer):
    model = build()
    results = [
        perplexity(model, tokenizer, texts, progress=False)
        for texts in (TEXTS, Dataset.from_dict({"text": TEXTS}), EvalSet(tokenizer, TEXTS))
    ]
    results.append(perplexity(model, None, EvalSet(tokenizer, TEXTS), progress=False))
    assert all(
        torch.equal(r.token_nats, results[0].token_nats) and r.fingerprint == results[0].fingerprint for r in results
    )


def test_long_texts_are_cut_and_empty_ones_dropped_and_both_counted(tokenizer):
    model = build()
    with pytest.warns(UserWarning):
        result = perplexity(model, tokenizer, ["", "a b c", "a", "a b c d e f", "f g"], max_length=4, progress=False)
    assert (result.n_texts, result.n_cut, result.n_dropped, result.n_tokens) == (3, 1, 2, 6)
    assert result.text_ids.tolist() == [1, 1, 3, 3, 3, 4]
    expected = torch.cat(by_loop(model, tokenizer, ["a b c", "a b c d e f", "f g"], 4))
    assert torch.allclose(result.token_nats.double(), expected, atol=2e-5)


def test_bfloat16_model_is_scored_in_float32(tokenizer):
    model = build().bfloat16()
    result = perplexity(model, tokenizer, TEXTS[:1], progress=False)
    assert result.token_nats.dtype == torch.float32
    assert torch.allclose(
        result.token_nats.double(), by_loop(model, tokenizer, TEXTS[:1])[0], atol=1e-5
    )  # the loop takes the same bfloat16 logits to float64


def test_the_model_comes_back_as_it_was(tokenizer):
    model = build(attention_dropout=0.5)
    model.train()
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    seen = []
    hook = model.model.layers[0].mlp.register_forward_hook(
        lambda m, a, o: seen.append((m.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
    )
    random_state = torch.get_rng_state()
    first, second = (perplexity(model, tokenizer, TEXTS, progress=False) for _ in range(2))
    assert torch.equal(first.token_nats, second.token_nats)  # no dropout
    assert (
        set(seen) == {(False, False, False)}
        and torch.equal(random_state, torch.get_rng_state())
        and torch.is_grad_enabled()
    )
    assert [m.training for m in model.modules()] == modes
    hook.remove()

    def fail(module, args, output):
        raise RuntimeError("stop")

    hook = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError):
        perplexity(model, tokenizer, TEXTS, progress=False)
    hook.remove()
    assert [m.training for m in model.modules()] == modes and torch.is_grad_enabled()
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_logits_stay_small(tokenizer):
    """With a vocabulary of 80,000 a batch may hold 1,677 tokens (512 MB); the longest texts come first, similar
    lengths together."""
    model = build(vocab_size=80_000)
    perplexity(model, tokenizer, TEXTS, progress=False)  # looks once how the model reads batches
    shapes = []
    hook = model.register_forward_hook(own_hook(lambda m, a, o: shapes.append(tuple(o.logits.shape[:2]))))
    perplexity(
        model, tokenizer, [" ".join(["a", "b", "c"] * (1 + i % 20)) for i in range(120)], progress=False, n_boot=0
    )
    hook.remove()
    assert max(rows * length for rows, length in shapes) <= 1677 and len(shapes) < 6
    assert [length for _, length in shapes] == sorted((length for _, length in shapes), reverse=True)


def test_broken_is_said(tokenizer):
    model = build()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    result = perplexity(model, tokenizer, TEXTS, progress=False)
    assert result.above_vocabulary and result.value == math.inf
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    result = perplexity(model, tokenizer, TEXTS, progress=False)
    assert result.above_vocabulary and math.isnan(result.nats) and math.isnan(result.ci[0])
    with torch.no_grad():
        model.lm_head.weight.zero_()
    uniform = perplexity(model, tokenizer, TEXTS, progress=False)
    assert math.isclose(uniform.nats, math.log(64), rel_tol=1e-6)


def fake(token_nats, text_ids, fingerprint="f"):
    token_nats = torch.as_tensor(token_nats, dtype=torch.float32)
    return Perplexity(
        0.0,
        float(token_nats.mean()),
        (0, 0),
        len(token_nats),
        len(set(text_ids)),
        0,
        0,
        False,
        token_nats,
        torch.tensor(text_ids),
        fingerprint,
    )


def test_paired_difference_by_hand():
    a, b = fake([3, 3, 5, 1], [0, 0, 4, 4]), fake([1, 2, 3, 3], [0, 0, 4, 4])
    result = paired_difference(a, b)
    assert result.nats == 0.75 and (result.n_tokens, result.n_texts) == (4, 2)
    assert result.ci == (0.0, 1.5)  # two documents: means 1.5 and 0, drawn twice each in a quarter of the draws
    assert paired_difference(b, a).nats == -0.75
    assert all(math.isnan(x) for x in paired_difference(fake([1, 2], [3, 3]), fake([1, 1], [3, 3])).ci)
    ids = [
        i for i in range(40) for _ in range(1 if i % 2 else 99)
    ]  # every second document is long, and a does worse on the long ones only
    low, high = paired_difference(fake([4.0 - i % 2 for i in ids], ids), fake([3.0] * len(ids), ids)).ci
    assert 0.97 < low < 0.99 < high < 1  # tokens count, not documents
    with pytest.raises(ValueError):
        paired_difference(a, fake([1, 2, 3, 3], [0, 0, 4, 4], "g"))


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    "Documents of unequal length with effects of their own; 300 experiments of 40 documents, true mean difference 0.2."
    rng = np.random.default_rng(0)
    covered = widths = 0
    for seed in range(300):
        lengths = rng.integers(20, 200, 40)
        effects = np.repeat(0.2 + rng.normal(0, 0.5, 40), lengths)
        ids = np.repeat(np.arange(40), lengths).tolist()
        noise = rng.normal(3, 1, len(ids))
        low, high = paired_difference(fake(noise + effects, ids), fake(noise, ids), n_boot=400, seed=seed).ci
        covered += low < 0.2 < high
        widths += high - low
    assert 0.88 < covered / 300 < 0.98 and 0.2 < widths / 300 < 0.45


def test_seeds_fix_the_interval(tokenizer):
    model, texts = build(), EvalSet(tokenizer, TEXTS)
    a, b, c = (perplexity(model, tokenizer, texts, progress=False, seed=s).ci for s in (0, 0, 1))
    assert a == b != c


def reference_log_likelihood(model, tokenizer, prompt, answer):
    ids, n = tokenizer(f"{prompt} {answer}")["input_ids"], len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(log_p[i - 1, ids[i]]) for i in range(n, len(ids))), all(
        int(log_p[i - 1].argmax()) == ids[i] for i in range(n, len(ids))
    )


@pytest.mark.parametrize("words", [["good", "bad"], ["good", "bad bad"], ["good a", "good b", "bad"]])
@pytest.mark.parametrize("batch_size", ["auto", 1, 3])
def test_label_accuracy_against_single_forwards(tokenizer, words, batch_size):
    model = build("gpt2")
    texts = [t for t in TEXTS for _ in range(2)]
    labels = [i % len(words) for i in range(12)]
    template = "Review : {text} Sentiment :"
    result = label_accuracy(
        model, tokenizer, list(zip(texts, labels)), template, words, batch_size=batch_size, progress=False
    )
    expected = torch.tensor(
        [
            [reference_log_likelihood(model, tokenizer, template.replace("{text}", t), w)[0] for w in words]
            for t in texts
        ]
    )
    assert torch.allclose(result.log_likelihoods, expected, atol=2e-5, rtol=1e-5)
    assert torch.equal(result.predictions, expected.argmax(1)) and result.accuracy == float(
        (expected.argmax(1) == torch.tensor(labels)).double().mean()
    )
    assert (
        result.chance == 1 / len(words)
        and result.majority == max(labels.count(i) for i in range(len(words))) / 12
        and result.n == 12
    )
    assert result.ci[0] < result.accuracy < result.ci[1] or result.accuracy in (0, 1)
    for word in words:
        assert word in repr(result)


def test_one_token_labels_share_a_forward(tokenizer):
    model, rows = build(), []
    hook = model.register_forward_hook(own_hook(lambda m, a, o: rows.append(len(o.logits))))
    label_accuracy(model, tokenizer, [("a b", 0), ("c d", 1)], "{text} :", ["good", "bad"], progress=False)
    hook.remove()
    assert sum(rows) == 2


def test_class_names_and_their_words(tokenizer):
    model = build()
    features = Features({"text": Value("string"), "label": ClassLabel(names=["good", "bad"])})
    data = Dataset.from_dict({"text": ["a b {c} %s", "c d", "e"], "label": [0, 1, 1]}, features)
    by_names = label_accuracy(model, tokenizer, data, progress=False)
    by_list = label_accuracy(model, tokenizer, data, label_words=["good", "bad"], progress=False)
    swapped = label_accuracy(model, tokenizer, data, label_words={"bad": "good", "good": "bad"}, progress=False)
    assert (
        by_names.label_words == ("good", "bad")
        and torch.equal(by_names.log_likelihoods, by_list.log_likelihoods)
        and by_names.majority == 2 / 3
    )
    assert swapped.label_words == ("bad", "good") and torch.equal(
        swapped.log_likelihoods, by_list.log_likelihoods.flip(1)
    )


@pytest.mark.parametrize("batch_size", ["auto", 1, 2])
def test_cloze_against_single_forwards(tokenizer, batch_size):
    model = build("gpt_neox")
    data = [("the capital of X is", "Y"), ("the capital of Y is", "Y good"), ("a b", "c"), ("d", "Y")]
    for prompt, words in [("a b c d", 3), ("good", 2)]:  # answers the model gives itself
        ids = tokenizer(prompt)["input_ids"]
        for _ in range(words):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1, : len(WORDS)].argmax()))
        data.append((prompt, tokenizer.decode(ids[-words:])))
    result = cloze_accuracy(model, tokenizer, data, batch_size=batch_size, progress=False)
    for i, (prompt, answer) in enumerate(data):
        log_likelihood, greedy = reference_log_likelihood(model, tokenizer, prompt, answer)
        _, first = reference_log_likelihood(model, tokenizer, prompt, answer.split()[0])
        assert math.isclose(float(result.log_likelihoods[i]), log_likelihood, abs_tol=1e-4)
        assert bool(result.correct_full[i]) == greedy and bool(result.correct[i]) == first
    assert (
        result.accuracy == float(result.correct.double().mean())
        and result.full == float(result.correct_full.double().mean())
        and result.full <= result.accuracy
    )
    first_words = [answer.split()[0] for _, answer in data]
    assert result.majority == max(first_words.count(w) for w in first_words) / 6
    assert result.chance == 1 / 64
    spaced = cloze_accuracy(model, tokenizer, [(p, " " + a) for p, a in data], progress=False)
    assert torch.allclose(spaced.log_likelihoods, result.log_likelihoods, atol=1e-5)


def test_answers_that_merge_with_the_prompt():
    "With a tokenizer that joins across the boundary, the answer begins at the first token that differs."
    core = Tokenizer(
        models.BPE(
            {"?": 0, "i": 1, "s": 2, " ": 3, "P": 4, "s ": 5, "s P": 6}, [("s", " "), ("s ", "P")], unk_token="?"
        )
    )
    merging = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?")
    assert merging("is")["input_ids"] == [1, 2] and merging("is P")["input_ids"] == [1, 6]
    model = build()
    result = cloze_accuracy(model, merging, [("is", "P")], progress=False)
    with torch.no_grad():
        expected = model(torch.tensor([[1]])).logits[0, -1].log_softmax(-1)[6]
    assert torch.allclose(result.log_likelihoods, expected, atol=1e-5)


def test_chat_template(tokenizer):
    model = build()
    with pytest.raises(ValueError):
        cloze_accuracy(model, tokenizer, [("a", "b")], chat=True, progress=False)
    assert not cloze_accuracy(model, tokenizer, [("a", "b")], chat="auto", progress=False).chat
    tokenizer.chat_template = (
        "{% for m in messages %}Review {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}Sentiment : {% endif %}"
    )
    asked = cloze_accuracy(model, tokenizer, [("a", "b")], chat=True, progress=False)
    expected, _ = reference_log_likelihood(model, tokenizer, "Review a Sentiment :", "b")
    assert math.isclose(float(asked.log_likelihoods[0]), expected, abs_tol=1e-5)
    labelled = label_accuracy(model, tokenizer, [("a", 0), ("a", 1)], "{text}", ["b", "c"], chat="auto", progress=False)
    assert asked.chat and labelled.chat and "chat template" in repr(labelled)
    assert math.isclose(float(labelled.log_likelihoods[0, 0]), expected, abs_tol=1e-5)


def test_words_are_compared_as_asked(tokenizer):
    """Sum, mean and calibration, each against single forwards; an equal shift of the log-likelihoods of one word
    changes nothing when calibrated."""
    model, data, words, template = (
        build(),
        list(zip(TEXTS, [0, 1, 0, 1, 0, 1])),
        ["good", "bad bad bad"],
        "Review : {text} Sentiment :",
    )
    results = {
        c: label_accuracy(model, tokenizer, data, template, words, compare=c, no_content="X", progress=False)
        for c in ("sum", "mean", "calibrated")
    }
    sums = torch.tensor(
        [
            [reference_log_likelihood(model, tokenizer, template.replace("{text}", t), w)[0] for w in words]
            for t in [*TEXTS, "X"]
        ]
    )
    expected = {"sum": sums[:-1], "mean": sums[:-1] / torch.tensor([1, 3]), "calibrated": sums[:-1] - sums[-1]}
    for compare, result in results.items():
        assert torch.allclose(result.scores, expected[compare], atol=1e-4) and torch.allclose(
            result.log_likelihoods, sums[:-1], atol=1e-4
        )
        assert torch.equal(result.predictions, expected[compare].argmax(1)) and f"by {compare}" in repr(result)
    assert len({r.fingerprint for r in results.values()}) == 3


def test_too_long_prompts_are_left_out_and_counted(tokenizer):
    model, long = build(), "a " * 60
    with pytest.warns(UserWarning):
        some = label_accuracy(
            model,
            tokenizer,
            [("a", 0), (long, 1), ("b", 1), ("c", 0)],
            "the capital of {text} is X Y :",
            ["good", "bad"],
            progress=False,
        )
    fitting = label_accuracy(
        model,
        tokenizer,
        [("a", 0), ("b", 1), ("c", 0)],
        "the capital of {text} is X Y :",
        ["good", "bad"],
        progress=False,
    )
    assert (some.n, some.n_too_long, some.items) == (3, 1, (0, 2, 3)) and "1 too long" in repr(some)
    assert (
        torch.equal(some.log_likelihoods, fitting.log_likelihoods)
        and some.majority == 2 / 3
        and some.fingerprint == fitting.fingerprint
    )
    just = "a " * 58  # 58 + 6 words: all the positions there are
    assert (
        label_accuracy(
            model, tokenizer, [(just, 0), ("b", 1)], "the capital of {text} is X :", ["good", "bad"], progress=False
        ).n_too_long
        == 0
    )
    with pytest.warns(UserWarning):
        cloze = cloze_accuracy(model, tokenizer, [("a " * 65, "b"), ("a", "b"), ("a", "b " * 70)], progress=False)
    assert (cloze.n, cloze.n_too_long, cloze.items) == (1, 2, (1,))
    for call in (
        lambda: cloze_accuracy(model, tokenizer, [("a " * 65, "b")]),
        lambda: label_accuracy(model, tokenizer, [(long, 0), (long, 1)], "{text} is X Y Z Y", ["b", "c"]),
    ):
        with pytest.raises(ValueError):
            call()


def test_undecided_answers_are_wrong(tokenizer):
    "A model that gives all words the same, or no, likelihood must not score the share of the first label."
    model, data = build(), [(t, 0) for t in TEXTS]
    for weight in (0.0, math.nan):
        with torch.no_grad():
            model.lm_head.weight.fill_(weight)
        with pytest.warns(UserWarning):
            result = label_accuracy(model, tokenizer, data, label_words=["good", "bad"], progress=False)
        assert (
            result.accuracy == 0
            and result.majority == 1
            and (result.predictions == -1).all()
            and "undecided 6" in repr(result)
            and not result.correct.any()
        )


def test_a_masked_model_is_evaluated_like_any_other(tokenizer):
    from llmfact_nb.evaluate import paired_accuracy
    from llmfact_nb.masked_model import MaskedModel
    from llmfact_nb.masks import NeuronMask

    model = build()
    mask = NeuronMask.from_layers(
        [torch.rand(48, generator=torch.Generator().manual_seed(i)) < 0.5 for i in range(2)], "mlp_hidden"
    )
    baked, questions = MaskedModel(model).bake(mask), [("a b", "c"), ("d e f g", "h"), ("good", "X Y")]
    reviews = [("a", 0), ("b c d", 1), ("e f", 0), ("the capital", 1)]
    with MaskedModel(model).ablate(mask):
        masked = (
            cloze_accuracy(model, tokenizer, questions, progress=False),
            label_accuracy(model, tokenizer, reviews, label_words=["good", "bad"], progress=False),
        )
    plain = (
        cloze_accuracy(model, tokenizer, questions, progress=False),
        label_accuracy(model, tokenizer, reviews, label_words=["good", "bad"], progress=False),
    )
    for m, p, b in zip(
        masked,
        plain,
        (
            cloze_accuracy(baked, tokenizer, questions, progress=False),
            label_accuracy(baked, tokenizer, reviews, label_words=["good", "bad"], progress=False),
        ),
    ):
        assert torch.allclose(m.log_likelihoods, b.log_likelihoods, atol=1e-5) and not torch.allclose(
            m.log_likelihoods, p.log_likelihoods, atol=1e-3
        )
        assert m.fingerprint == p.fingerprint and paired_accuracy(m, p).n == m.n
    assert masked[1].correct.tolist() == (masked[1].labels == masked[1].predictions).tolist()


def encoder(auto, **kwargs):
    return auto.from_config(AutoConfig.for_model("bert", **SMALL, **kwargs))


@pytest.mark.parametrize(
    "make",
    [
        lambda: encoder(AutoModelForMaskedLM),
        lambda: encoder(AutoModelForCausalLM),
        lambda: encoder(AutoModelForSequenceClassification),
        lambda: AutoModel.from_config(AutoConfig.for_model("llama", **FAMILIES["llama"])),
        lambda: AutoModelForSequenceClassification.from_config(AutoConfig.for_model("gpt2", **FAMILIES["gpt2"])),
        lambda: torch.nn.Linear(2, 2),
    ],
)
def test_other_models_are_refused(tokenizer, make):
    model = make()
    for call in (
        lambda: perplexity(model, tokenizer, TEXTS),
        lambda: perplexity(model, tokenizer, EvalSet(tokenizer, TEXTS)),
        lambda: label_accuracy(model, tokenizer, [("a", 0)], label_words=["b", "c"]),
        lambda: cloze_accuracy(model, tokenizer, [("a", "b")]),
    ):
        with pytest.raises(TypeError):
            call()


def test_wrapped_and_decoder_models_are_accepted(tokenizer):
    peft = pytest.importorskip("peft")
    model = build()
    plain = perplexity(model, tokenizer, TEXTS, progress=False)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["down_proj"]))
    assert torch.allclose(perplexity(wrapped, tokenizer, TEXTS, progress=False).token_nats, plain.token_nats, atol=1e-5)
    assert (
        perplexity(encoder(AutoModelForCausalLM, is_decoder=True), tokenizer, TEXTS, progress=False).n_tokens
        == plain.n_tokens
    )


@pytest.mark.parametrize(
    "call, error, argument",
    [
        (lambda m, t: perplexity(m, t, []), ValueError, "texts"),
        (lambda m, t: perplexity(m, t, "a b"), TypeError, None),
        (lambda m, t: perplexity(m, t, ["a b", None]), TypeError, None),
        (lambda m, t: perplexity(m, t, ["", "a"]), ValueError, None),
        (lambda m, t: perplexity(m, t, Dataset.from_dict({"body": ["a b"]})), ValueError, "texts"),
        (lambda m, t: perplexity(m, t, ["a b"], max_length=1), ValueError, "max_length"),
        (lambda m, t: perplexity(m, t, EvalSet(t, ["a b"]), max_length=8), ValueError, "max_length"),
        (lambda m, t: perplexity(m, t, ["a b"], batch_size="big"), ValueError, "batch_size"),
        (lambda m, t: perplexity(m, t, ["a b"], batch_size=0), ValueError, "batch_size"),
        (lambda m, t: perplexity(m, t, ["a b"], seed=-1), ValueError, "seed"),
        (lambda m, t: perplexity(m, t, ["a " * 66]), ValueError, None),
        (lambda m, t: perplexity(build(vocab_size=20), t, ["Review good"]), ValueError, None),
        (lambda m, t: label_accuracy(m, t, [("a", 0)]), ValueError, "label_words"),
        (lambda m, t: label_accuracy(m, t, [("a", 2)], label_words=["b", "c"]), ValueError, "label_words"),
        (lambda m, t: label_accuracy(m, t, [("a", "good")], label_words=["b", "c"]), TypeError, None),
        (lambda m, t: label_accuracy(m, t, [("a", 0)], label_words=["b", "b"]), ValueError, "label_words"),
        (lambda m, t: label_accuracy(m, t, [("a", 0)], label_words={"good": "b"}), ValueError, "label_words"),
        (lambda m, t: label_accuracy(m, t, [("a", 0)], "say", ["b", "c"]), ValueError, "template"),
        (lambda m, t: label_accuracy(m, t, [("a", 0), ("a", 1)], label_words=["b", "b "]), ValueError, "label_words"),
        (
            lambda m, t: label_accuracy(m, t, [("a", 0), ("a", 1)], label_words=["unheard", "unseen"]),
            ValueError,
            "label_words",
        ),
        (lambda m, t: label_accuracy(m, t, [("", 0), ("a", 1)], "{text}", label_words=["b", "c"]), ValueError, None),
        (
            lambda m, t: label_accuracy(m, t, [("a", 0), ("a", 1)], label_words=["b", "c"], compare="max"),
            ValueError,
            "compare",
        ),
        (
            lambda m, t: label_accuracy(m, t, [("a", 0), ("a", 1)], label_words=["b", "c"], chat="yes"),
            ValueError,
            "chat",
        ),
        (lambda m, t: label_accuracy(m, t, [], label_words=["b", "c"]), ValueError, "texts"),
        (lambda m, t: cloze_accuracy(m, t, []), ValueError, "prompts"),
        (lambda m, t: cloze_accuracy(m, t, [("a", "")]), ValueError, None),
        (lambda m, t: cloze_accuracy(m, t, [("", "a")]), ValueError, None),
    ],
)
def test_refusals(tokenizer, call, error, argument):
    model = build()
    model.train()
    with pytest.raises(error) as e:
        call(model, tokenizer)
    assert getattr(e.value, "argument", None) == argument
    assert all(m.training for m in model.modules())


def test_nothing_is_warned_of_without_need(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        perplexity(build(), tokenizer, TEXTS, progress=False)


SEES_LATER_TOKENS = {
    "llama": dict(is_causal=False),
    "gemma3_text": dict(use_bidirectional_attention=True, num_key_value_heads=1, head_dim=8),
    "gemma": dict(use_bidirectional_attention=True, num_key_value_heads=1, head_dim=8),
    "bert-generation": {},
    "cpmant": dict(dim_ff=24, dim_head=8, prompt_types=4, prompt_length=4, segment_types=4),
}
TINY = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)


@pytest.mark.parametrize("kind", SEES_LATER_TOKENS)
def test_a_decoder_that_sees_later_tokens_is_refused(kind, tokenizer):
    "Judged by what it does: a later token moves earlier predictions. The same kind without the option is accepted."
    torch.manual_seed(0)
    size = (
        dict(TINY, initializer_range=0.5)
        if kind != "cpmant"
        else {k: v for k, v in TINY.items() if k != "intermediate_size"}
    )
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **size, **SEES_LATER_TOKENS[kind])).eval()
    for p in model.parameters():
        if p.dim() > 1:
            p.data.normal_(0, 0.4)
    for measure in (
        lambda: perplexity(model, tokenizer, TEXTS, progress=False),
        lambda: label_accuracy(model, tokenizer, [("a", 0), ("b", 1)], label_words=["c", "d"], progress=False),
        lambda: cloze_accuracy(model, tokenizer, [("a", "b")], progress=False),
    ):
        with pytest.raises(TypeError):
            measure()
    if kind in ("llama", "gemma3_text", "gemma"):
        option = next(iter(SEES_LATER_TOKENS[kind]))
        causal = {k: v for k, v in SEES_LATER_TOKENS[kind].items() if k != option}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **size, **causal)).eval()
        a, b = (perplexity(model, tokenizer, TEXTS, progress=False, batch_size=n).nats for n in (1, 4))
        assert math.isclose(a, b, rel_tol=1e-5)


def test_a_model_without_its_attention_is_no_language_model(tokenizer):
    "MRA skips its attention on the CPU, and so would look like one that is blind to later tokens."
    with pytest.raises(NotImplementedError):
        perplexity(AutoModelForMaskedLM.from_config(survey.small("mra", 24)), tokenizer, ["a b c"])


def test_the_looks_at_a_model_happen_once():
    "Short passes that ask whether the model is causal, and whether it reads a batch as single texts."
    model, passes = build(), []
    model.register_forward_hook(lambda *a: passes.append(1))
    texts = EvalSet(lambda text, **_: {"input_ids": [7, 8, *range(20, 20 + len(text))]}, ["a", "bcd"])
    for first in (True, False):
        passes.clear()
        perplexity(model, None, texts, progress=False)
        assert len(passes) == (1 + 3 + 3 if first else 1)
