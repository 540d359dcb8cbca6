"""Pins contrasts: pairs that differ as promised, answers compared by hand, planted neurons named by every score,
attributions that add up, and tables that are refused by row."""

from collections import Counter

import families
import planted
import pytest
import torch

from llmfact_nb.base.arguments import ArgumentError
from llmfact_nb.base.texts import load_cloze, load_labelled
from llmfact_nb.activations import capture
from llmfact_nb.networks import FunctionalNetworks, z_scores
from llmfact_nb.scores.contrast import (
    SCORES, ContrastPair, ContrastSet, Localizer, contrast_accuracy, contrast_set, localize, text_means,
)  # fmt: skip

PLANTED = planted.TASKS["one"]


@pytest.fixture(scope="module")
def model():
    return planted.task_model()


@pytest.fixture(scope="module")
def contrast():
    return planted.task_pairs()


@pytest.mark.parametrize("score", SCORES)
def test_planted_neurons_are_named_by_every_score(model, contrast, score):
    found = localize(model, families.tokenizer(), contrast, score=score)
    mask = found.mask(n=2)
    assert [(d, int(u)) for d, row in zip(mask.depths, mask.layers) for u in row.nonzero()] == PLANTED
    assert found.n_pairs == len(contrast) and mask.site == "mlp_hidden"
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_null_names_nothing_in_particular(contrast):
    "Under shuffled labels the two planted neurons are no better than any."
    net = families.build("llama", num_hidden_layers=3)
    pairs = [p if i % 2 else ContrastPair(p.b, p.a, p.answer_b, p.answer_a) for i, p in enumerate(contrast.pairs)]
    t = localize(net, families.tokenizer(), ContrastSet("null", tuple(pairs))).map_
    assert (t.abs() > 3).float().mean() < 0.05


def test_accuracy_is_that_of_logits_compared_by_hand(model, contrast):
    tokenizer = families.tokenizer()
    solved = contrast_accuracy(model, tokenizer, contrast)
    assert solved.accuracy == 1 and solved.left_out == 0 and len(solved.margins) == len(contrast)
    by_hand = []
    for p in contrast.pairs:
        for text, sign in ((p.a, 1), (p.b, -1)):
            last = model(input_ids=tokenizer(text, return_tensors="pt").input_ids).logits[0, -1]
            by_hand.append(sign * (last[20] - last[21]).item())
    assert solved.logit_difference == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-4)
    assert sorted(solved.margins.flatten().tolist()) == pytest.approx(sorted(by_hand), abs=1e-4)
    (row,) = solved.by_construction.itertuples()
    assert row.pairs == len(contrast) and (row.accuracy, row.accuracy_low, row.accuracy_high) == (1, *solved.ci)
    numbers = (row.logit_difference, row.logit_difference_low, row.logit_difference_high)
    assert numbers == pytest.approx((solved.logit_difference, *solved.logit_ci))


def test_attribution_is_the_slope_towards_the_other_text():
    "By finite differences: each neuron's change towards its values in `b`, seen in the difference of logits."
    net, tokenizer = families.build("llama", num_hidden_layers=2), families.tokenizer()
    pair = ContrastPair("w4 w9 w10", "w4 w7 w11", " w20", " w21")
    map_ = localize(net, tokenizer, ContrastSet("two", (pair, pair)), score="attribution").map_
    ids = [tokenizer(text, return_tensors="pt").input_ids for text in (pair.a, pair.b)]
    answers = [tokenizer.encode(answer.strip())[-1] for answer in (pair.answer_a, pair.answer_b)]

    def run(x, change=None, layer=0):
        "(difference of the logits, the layer's neurons), with the neurons changed."
        seen = []
        watch = net.model.layers[layer].mlp.down_proj.register_forward_pre_hook(
            lambda m, args: seen.append(args[0]) or (None if change is None else (args[0] + change,))
        )
        try:
            last = net(input_ids=x).logits[0, -1].double()
        finally:
            watch.remove()
        return (last[answers[0]] - last[answers[1]]).item(), seen[0]

    with torch.no_grad():
        for layer in range(2):
            towards = run(ids[0], layer=layer)[1] - run(ids[1], layer=layer)[1]
            width = towards.shape[-1]
            of_layer = map_[layer * width : (layer + 1) * width]
            for neuron in of_layer.abs().topk(3).indices.tolist():
                step = torch.zeros_like(towards)
                step[..., neuron] = towards[..., neuron]
                slope = (run(ids[0], 0.1 * step, layer)[0] - run(ids[0], -0.1 * step, layer)[0]) / 0.2
                assert of_layer[neuron].item() == pytest.approx(slope, rel=0.05)


def test_integrated_attribution_of_a_bottleneck_adds_up_to_the_difference():
    "Where everything passes the first layer's neurons, what they contribute is the whole difference."
    net, tokenizer = families.build("llama", num_hidden_layers=1, tie_word_embeddings=False), families.tokenizer()
    pair = ContrastPair("w4 w9 w10", "w4 w9 w11", " w20", " w21")
    net.model.layers[0].register_forward_hook(lambda m, args, out: out - args[0])  # no residual connection
    with torch.no_grad():
        net.model.layers[0].self_attn.o_proj.weight.zero_()
        ends = [net(input_ids=tokenizer(t, return_tensors="pt").input_ids).logits[0, -1] for t in (pair.a, pair.b)]
    answers = [tokenizer.encode(answer.strip())[-1] for answer in (pair.answer_a, pair.answer_b)]
    whole = [(end[answers[0]] - end[answers[1]]).item() for end in ends]
    map_ = localize(net, tokenizer, ContrastSet("two", (pair, pair)), score="integrated attribution").map_
    assert abs(whole[0] - whole[1]) > 0.01
    assert map_.sum().item() == pytest.approx(whole[0] - whole[1], rel=0.1)


def test_a_localizer_is_matched_with_networks_by_hand(model, contrast):
    tokenizer, texts = families.tokenizer(), [families.words(40, seed=i) for i in range(10)]
    acts = capture(model, tokenizer, texts, "mlp_hidden", progress=False)
    networks = FunctionalNetworks(3, exclude="first", n_init=1).fit(acts)
    found = localize(model, tokenizer, contrast)
    table = found.match(networks, n=5)
    assert sorted(table.network) == [0, 1, 2] and table.r.abs().is_monotonic_decreasing
    x, ours = found.map_.double(), set(found.map_.abs().topk(5).indices.tolist())
    for row in table.itertuples():
        y = networks.maps_[row.network].double()
        theirs = set(y.abs().topk(5).indices.tolist())
        assert row.iou == pytest.approx(len(ours & theirs) / len(ours | theirs))
        assert row.r == pytest.approx(torch.corrcoef(torch.stack([x, y]))[0, 1].item(), abs=1e-5)
    same = Localizer(networks.maps_[1], found.layout, "t", "itself", 2).match(networks)
    assert same.network[0] == 1 and same.r[0] == pytest.approx(1, abs=1e-5) and same.iou[0] == 1
    with pytest.raises(ArgumentError) as e:
        localize(model, tokenizer, contrast, "mlp_out").match(networks)
    assert e.value.argument == "networks"


def test_means_leave_sinks_out_and_do_not_depend_on_company(model, contrast):
    texts = [p.a for p in contrast.pairs[:4]] + [families.words(30)]
    together, layout = text_means(model, families.tokenizer(), texts)
    for text, row in zip(texts[:4], together):
        alone, _ = text_means(model, families.tokenizer(), [text, texts[-1]])
        torch.testing.assert_close(alone[0], row, rtol=1e-4, atol=1e-5)
    assert together.shape == (5, layout.n_neurons)


@pytest.mark.parametrize(
    "name", ["agreement", "capitals", "opinions", "sentences-nonwords", "sentences-shuffled", "reviews"]
)
def test_sets_are_drawn_by_their_seed_and_keep_their_promise(name):
    some = contrast_set(name, 40)
    assert len(some) == 40 and some.pairs == contrast_set(name, 40).pairs != contrast_set(name, 40, seed=1).pairs
    assert some.has_answers == (name in ("agreement", "capitals", "opinions"))
    first, second = some.split(0.6)
    assert set(second.pairs) <= set(some.pairs) and len(first) == 24 > len(second) > 0
    assert not {t for p in first.pairs for t in (p.a, p.b)} & {t for p in second.pairs for t in (p.a, p.b)}
    reviews = load_labelled("rotten-tomatoes", "fit") if name == "reviews" else {"text": [], "label": []}
    label = dict(zip(reviews["text"], reviews["label"]))
    for p in some.pairs:
        a, b = p.a.split(), p.b.split()
        assert p.a != p.b
        if name == "reviews":
            assert [reviews.features["label"].int2str(label[t]) for t in (p.a, p.b)] == ["fresh", "rotten"]
        if name == "agreement":
            assert [x for x, y in zip(a, b) if x != y] == [a[1]] and b[1] == a[1] + "s"
        if name == "sentences-nonwords":
            assert [sorted(x) for x in a] == [sorted(y) for y in b]
        if name == "sentences-shuffled":
            assert sorted(a) == sorted(b)


def test_a_set_whose_pairs_all_share_a_text_cannot_be_split():
    shared = ContrastSet("shared", tuple(ContrastPair("w4", f"w{i}") for i in range(5, 9)))
    with pytest.raises(ArgumentError) as e:
        shared.split()
    assert e.value.argument == "pairs"
    assert [len(part) for part in shared.split(1.0)] == [4, 0]


def test_tables_are_read_and_refused_by_row(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("a,b,answer_a,answer_b\nw4 w5,w4 w6, w7, w8\nw9,w10, w7, w8\n")
    own = contrast_set(path)
    assert own.pairs[1] == ContrastPair("w9", "w10", " w7", " w8") and own.has_answers
    assert len(contrast_set(path, 1)) == 1
    path.write_text("a,b\nw4,w5\n,w6\n")
    with pytest.raises(ValueError):
        contrast_set(path)
    path.write_text("first,b\nw4,w5\n")
    with pytest.raises(ValueError):
        contrast_set(path)


def test_what_cannot_be_compared_is_left_out_or_refused(model):
    tokenizer, good = families.tokenizer(), ContrastPair("w4 w5", "w4 w6", " w20", " w21")
    longer, same = ContrastPair("w4 w5", "w4", " w20", " w21"), ContrastPair("w4 w5", "w4 w6", " w20", " w20")
    solved = contrast_accuracy(model, tokenizer, ContrastSet("some", (good, longer, same)))
    assert solved.left_out == 2 and len(solved.margins) == 1
    for bad in (ContrastSet("none", (longer,)), ContrastSet("mute", (ContrastPair("w4", "w5"),))):
        with pytest.raises(ArgumentError) as e:
            contrast_accuracy(model, tokenizer, bad)
        assert e.value.argument == "contrast"
    for call, argument in (
        (lambda: contrast_set("agreements"), "name"),
        (lambda: contrast_set("agreement", 0), "n"),
        (lambda: localize(model, tokenizer, ContrastSet("one", (good, good)), score="f"), "score"),
        (lambda: localize(model, tokenizer, ContrastSet("one", (good,))), "contrast"),
    ):
        with pytest.raises(ArgumentError) as e:
            call()
        assert e.value.argument == argument


def test_answers_of_several_tokens_are_judged_by_the_first_and_counted(model, contrast):
    some = ContrastSet("longer", tuple(ContrastPair(p.a, p.b, " w20 w4", " w21") for p in contrast.pairs))
    solved, plain = (
        contrast_accuracy(model, families.tokenizer(), some),
        contrast_accuracy(model, families.tokenizer(), contrast),
    )
    assert torch.equal(solved.margins, plain.margins)
    assert (solved.several, plain.several) == (len(contrast), 0) and repr(solved) != repr(plain)


def test_a_set_with_an_empty_condition_is_refused():
    for a, b in (("w4", ""), ("  ", "w4")):
        with pytest.raises(ArgumentError) as e:
            ContrastSet("half", (ContrastPair("w4", "w5"), ContrastPair(a, b)))
        assert e.value.argument == "pairs"


def test_a_model_that_reads_the_last_word_alone_is_at_chance_where_an_earlier_one_decides(model, contrast):
    "The model has no attention to the past, so the difference of the pairs never reaches the answer."
    pairs = [ContrastPair(f"{p.a} w15", f"{p.b} w15", p.answer_a, p.answer_b) for p in contrast.pairs]
    early = ContrastSet("early", tuple(pairs))
    solved = contrast_accuracy(model, families.tokenizer(), early)
    assert not solved.above_chance and solved.logit_difference == pytest.approx(0, abs=1e-6)
    for score in ("attribution", "integrated attribution"):
        assert localize(model, families.tokenizer(), early, score=score).map_.abs().max() < 1e-6


def test_capitals_come_once_before_any_comes_again():
    there, some = Counter(load_cloze("capitals")["prompt"]), contrast_set("capitals", 100)
    assert Counter(text for p in some.pairs for text in (p.a, p.b)) <= there
    assert all(p.answer_a != p.answer_b for p in some.pairs)


def test_masks_come_by_share_number_and_threshold_and_survive_a_file(model, contrast, tmp_path):
    found = localize(model, families.tokenizer(), contrast)
    n = len(found.map_)
    assert found.mask(fraction=0.1).n == round(0.1 * n) and found.mask(n=3).n == 3
    z = z_scores(found.map_[None])[0]
    assert found.mask(alpha=2.0).n == int((z >= 2).sum()) and found.mask(alpha=2.0, tail="both").n == int(
        (z.abs() >= 2).sum()
    )
    again = Localizer.load(found.save(tmp_path / "map.safetensors"))
    assert torch.equal(again.map_, found.map_) and repr(again) == repr(found) and again.mask(n=5) == found.mask(n=5)
    for bad in ({}, {"n": 3, "alpha": 2.0}, {"n": 0}, {"fraction": 2.0}):
        with pytest.raises(ArgumentError):
            found.mask(**bad)
