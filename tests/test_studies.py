"""Pins the studies: planted neurons are found to matter, masks do what hooks by hand do (also late-bound ones), an
interrupted study ends with the same table, and no verdict goes beyond its rule."""

import copy
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import families
import pandas as pd
import planted
import pytest
import torch

from llmfact_nb.activations import capture
from llmfact_nb.evaluate import EvalSet, perplexity
from llmfact_nb.ablation import (
    COLUMNS,
    PRESETS,
    Found,
    Intervention,
    ScoreCache,
    Settings,
    answers_on,
    enough_texts,
    find_networks,
    injected_norm,
    loss_on,
    measure,
    network_score,
)
from llmfact_nb.study.contrasts import contrasts
from llmfact_nb.study.subtraction import Subtraction
from llmfact_nb.masks import CONTROLS, NeuronMask
from llmfact_nb.networks import Threshold
from llmfact_nb.paper import late_binding_evidence, published
from llmfact_nb.study.selections import gradient_times_activation, score_neurons, wanda_score
from llmfact_nb.base.files import read_claim
from llmfact_nb.base.statistics import control_p_value
from llmfact_nb.base.tokens import own_hook
from llmfact_nb.study.studies import (
    amplification_study,
    cross_task_study,
    damage_curve,
    network_study,
    preservation_study,
    subtraction_study,
    union_study,
)
from llmfact_nb.study.plan import (
    QUICK,
    StudySettings,
    StudyTexts,
    evaluation_sets,
    found_networks,
    further_texts,
    study_passes,
    wanted_networks,
)
from llmfact_nb.study.whole import paper_study, read_study

pytestmark = pytest.mark.filterwarnings("ignore:FastICA has not converged")
TOKENIZER = families.tokenizer()
SETTINGS = Settings(n_components=14, n_init=1, fit_tokens=1000, fit_length=40, fraction=0.125, exclude="first")


@pytest.fixture(scope="module")
def world():
    "The planted model, what is found in it, its held-out texts, and activations of it."
    model = planted.model()
    fit = planted.texts(25)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = find_networks(model, TOKENIZER, fit, SETTINGS, progress=False)
        found = score_neurons(found, model, TOKENIZER, fit, 1000, 40)
    acts = capture(model, TOKENIZER, fit[:4], "mlp_hidden", progress=False)
    return model, found, [loss_on("topics", EvalSet(TOKENIZER, planted.texts(12, 24, seed=99)))], acts


def cache_of(model, folder=None):
    return ScoreCache(model, folder, progress=False)


def counting(model):
    "A list that grows with every forward pass of the whole model."
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(own_hook(lambda *_: seen.append(1)))
    return seen, handle


# planted neurons


def test_planted_neurons_rank_above_every_control(world):
    model, found, topics, acts = world
    state, b = families.state(model), cache_of(model)
    truth = found.mask(torch.arange(3 * planted.WIDTH) % planted.WIDTH < planted.PLANTED)
    assert (found.key & truth).n >= 0.9 * truth.n, "ICA finds what was planted"
    table = union_study(b, found, topics, {c: 3 for c in CONTROLS}, sample=acts)
    damage = lambda arm: table[table.arm == arm].damage
    assert damage("key").item() > 1.0 and table[table.arm == "key"].ci_low.item() > 0
    for arm in ("random", "matched random", "top variance", "least active"):
        assert damage(arm).max() < 0.2 * damage("key").item(), arm
    assert damage("gradient x activation").item() > 0.9 * damage("key").item(), "the gradient knows"
    injected = lambda arm: table[table.arm == arm].injected.max()
    assert injected("all off") < 1.0 + 1e-9 and injected("key") > injected("random")
    recovered = table.set_index("arm").recovered
    assert (
        recovered["all off"] == pytest.approx(0, abs=1e-9)
        and recovered["keep key"] > 0.9 > 0.5 > recovered["keep random"]
    )
    key_random = contrasts(table, b).query("arm == 'key' and against == 'random'").iloc[0]
    assert key_random.seeds == 3 and math.isnan(key_random.p) and key_random.ci_low > 0
    assert key_random.difference == pytest.approx(damage("key").item() - damage("random").mean(), abs=1e-6)
    assert families.state(model) == state and list(table.columns) == list(COLUMNS)


def test_more_neurons_more_damage_and_the_norm_beside(world):
    model, found, topics, acts = world
    curve = damage_curve(cache_of(model), found, topics, (0.01, 0.05, 0.125), {"random": 1}, sample=acts)
    key = curve[curve.arm == "key"]
    assert (
        key.damage.is_monotonic_increasing
        and key.injected.is_monotonic_increasing
        and key.units.tolist() == [4, 19, 48]
    )
    assert {"key", "PCA", "rotation", "gradient x activation", "Wanda score", "random", "unmasked"} == set(curve.arm)
    with pytest.raises(ValueError):
        damage_curve(cache_of(model), found, topics, (0.0,))


def test_single_networks_have_p_values_and_topics_of_their_own(world):
    model, found, topics, _ = world
    b = cache_of(model)
    which = [i for i, m in enumerate(found.network_masks()) if m.n][:2]
    table = network_study(b, found, topics, which, control_seeds=19)
    of = contrasts(table, b)
    assert of.network.tolist() == which and (of.seeds == 19).all() and of.p.between(0.05, 1).all()
    for i in which:
        group = table[table.network == i]
        ours = group[group.arm == "network"].damage.item()
        assert of[of.network == i].p.item() == pytest.approx(
            (1 + (group[group.arm == "random"].damage >= ours).sum()) / 20
        )
        assert set(group.counts) == {" ".join(map(str, found.network_masks()[i].counts))}, (
            "controls have as many units in each layer"
        )


def test_numbers_that_are_not_finite_are_compared_with_nothing(world, tmp_path):
    model, found, topics, _ = world
    b = cache_of(model, tmp_path)
    table = union_study(b, found, topics, {"random": 19, "top variance": 1}, selections=["key"], keep=False)
    sound = contrasts(table, b).set_index("against")
    pd.testing.assert_frame_equal(
        contrasts(table, cache_of(model, tmp_path)).set_index("against"), sound, obj="from the folder alone"
    )
    with pytest.raises(KeyError):
        contrasts(table, cache_of(model))
    for bad in (math.inf, math.nan):
        hurt = table.copy()
        at = hurt.index[hurt.arm == "random"][3]
        b.kept(hurt.part[at]).sums["nats"][0], before = bad, b.kept(hurt.part[at]).sums["nats"][0]
        hurt.loc[at, "damage"] = bad
        of = contrasts(hurt, b).set_index("against")
        assert (
            of.loc["random", ["difference", "ci_low", "ci_high", "p"]].isna().all()
            and of.note["random"] == "not finite: 1 of 19 draws of random"
        )
        pd.testing.assert_series_equal(of.loc["top variance"], sound.loc["top variance"])
        b.kept(hurt.part[at]).sums["nats"][0] = before
    assert sound.p["random"] == pytest.approx(0.05) and (sound.note == "").all()


def test_a_control_says_how_close_its_variance_comes(world):
    model, found, topics, _ = world
    table = union_study(
        cache_of(model),
        found,
        topics,
        {"random": 1, "matched permuted": 1, "top variance": 1},
        selections=["key"],
        keep=False,
    ).set_index("arm")
    variance = found.variance
    for arm in ("random", "matched permuted", "top variance"):
        drawn = found.control(arm, found.key, 0)
        assert table.variance_ratio[arm] == pytest.approx(
            math.exp(float(variance[drawn.flat].log().mean() - variance[found.key.flat].log().mean())), rel=1e-4
        )
        assert table.overlap[arm] == pytest.approx((drawn & found.key).n / found.key.n)
    assert (
        table.overlap["random"] == 0
        and math.isnan(table.variance_ratio["key"])
        and table.variance_ratio["top variance"] >= table.variance_ratio["random"]
    )


# masks against hooks by hand


def by_hand(model, texts, rows, keep):
    """Mean token loss when each layer's inputs of the down projection are zeroed (or all others are), one text at a
    time."""
    handles = []
    for (_, module), row in zip(families.down_projections("llama", model), rows):
        gone = ~row if keep else row
        handles.append(module.register_forward_pre_hook(lambda m, a, gone=gone: (a[0].masked_fill(gone, 0.0),)))
    total = n = 0
    with torch.no_grad():
        for ids in texts.ids:
            ids = torch.tensor([ids])
            total += float(
                torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].double(), ids[0, 1:], reduction="sum")
            )
            n += ids.shape[1] - 1
    for h in handles:
        h.remove()
    return total / n


@pytest.mark.parametrize("operation", ["ablate", "keep"])
def test_late_binding_and_right_masks_are_those_of_hooks_by_hand(operation):
    model, texts = families.build("llama"), EvalSet(TOKENIZER, [families.words(n, n) for n in (20, 13)])
    rows = [torch.arange(24) < n for n in (3, 8, 15)]
    b, y = cache_of(model), [loss_on("words", texts)]
    arms = [
        Intervention("key", NeuronMask.from_layers(rows, "mlp_hidden"), operation=operation, late_binding=late)
        for late in (False, True)
    ]
    table = measure(b, arms, y).iloc[1:]
    wanted = [
        by_hand(model, texts, rows, operation == "keep"),
        by_hand(model, texts, [rows[-1]] * 3, operation == "keep"),
    ]
    assert table.value.tolist() == pytest.approx(wanted, abs=1e-5) and abs(wanted[0] - wanted[1]) > 1e-3
    assert table.counts.tolist() == (
        ["3 8 15", "15 15 15"] if operation == "ablate" else ["21 16 9", "9 9 9"]
    ) and table.late_binding.tolist() == [False, True]


def test_with_late_binding_the_preservation_curve_looks_like_the_published_one(world):
    """Networks whose units crowd in the last layer, as they do in raw MLP outputs: a full last row keeps everything if
    it is bound late, and the right mask keeps next to nothing."""
    model, found, topics, _ = world
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight[:, : planted.PLANTED] = (
            0  # what matters lies in the layers before the last
        )
    at_k = {}
    for k, units in ((10, 20), (64, 90), (256, planted.WIDTH)):
        maps = torch.zeros(k, 3 * planted.WIDTH)
        maps[0, -units:] = 10.0
        networks = copy.copy(found.networks)
        networks.maps_, networks.sign_ = maps, torch.ones(k)
        networks.layout = replace(networks.layout, card=None)  # they are used on another model than they were found in
        at_k[k] = replace(found, networks=networks, threshold=Threshold(3.6))
    table = preservation_study(cache_of(model), at_k, topics, fractions=())
    keep = lambda late: table[(table.arm == "keep key") & (table.late_binding == late)].set_index("k")
    late, right = keep(True), keep(False)
    assert late.value[256] == late.unmasked[256] and late.recovered[256] == 1, (
        "equal to the last digit, as in the published runs"
    )
    assert late.recovered.is_monotonic_increasing and late.recovered[10] < 0.1
    assert (right.recovered < 0.1).all() and right.units[256] == 2 * planted.WIDTH  # what is gone: two layers


def test_k_beyond_the_texts_is_a_row_and_the_study_goes_on(world):
    model, found, topics, _ = world
    table = preservation_study(
        cache_of(model),
        {10: found, 5000: "n_components=5000 is above what 1,000 tokens can carry"},
        topics,
        fractions=(0.125,),
    )
    gone = table[table.k == 5000]
    assert len(gone) == 1 and gone.damage.isna().all() and "5000" in gone.note.item() and gone.part.item() == ""
    assert table[table.k == 10].damage.notna().all() and {"keep key", "keep PCA", "keep top variance"} <= set(
        table[table.fraction == 0.125].arm
    )
    with pytest.raises(ValueError):
        preservation_study(cache_of(model), {5000: "too many"}, topics)


def test_amplification_is_the_formula_it_says(world):
    model, found, topics, _ = world
    table = amplification_study(cache_of(model), found, topics, gains=(0.0, 1.0, 2.0), adds=(1.0,), controls={})
    key = table[table.arm == "key"].set_index(["gain", "replace", "add_sd"])
    assert abs(key.damage[(1.0, "zero", 0.0)]) < 1e-6 and abs(key.damage[(1.0, "mean", 0.0)]) < 1e-6
    assert abs(key.damage[(2.0, "zero", 0.0)] - key.damage[(2.0, "mean", 0.0)]) > 1e-4
    ablated = union_study(cache_of(model), found, topics, {}, ("mean", "after-first"), ["key"], keep=False)
    assert key.damage[(0.0, "mean", 0.0)] == pytest.approx(ablated[ablated.arm == "key"].damage.item(), abs=1e-6)
    x = torch.randn(5, 384)
    a = Intervention(
        "key", found.key, operation="amplify", replace="mean", means=found.mean, gain=3.0, add=found.variance
    )
    wanted = torch.where(found.key.flat, found.mean + 3 * (x - found.mean) + found.variance, x)
    assert torch.allclose(a.change(x), wanted, rtol=1e-4, atol=1e-3)


def test_injected_norm_by_hand(world):
    model, found, _, acts = world
    rows, total, change = found.key.layers, 0.0, 0.0
    for i, (_, module) in enumerate(families.down_projections("llama", model)):
        x = acts.layer(i)[~acts.sinks].double()
        w = module.weight.detach().double()
        total += float((x @ w.T).square().sum())
        change += float(((x * rows[i]) @ w.T).square().sum())
    assert injected_norm(model, Intervention("key", found.key), acts) == pytest.approx(
        (change / total) ** 0.5, rel=1e-4
    )
    everything = Intervention("off", NeuronMask.full(found.key.widths, "mlp_hidden"))
    assert injected_norm(model, everything, acts) == pytest.approx(1, abs=1e-6)


# scores of neurons


@pytest.mark.parametrize("family, site", [("gpt2", "mlp_hidden"), ("llama", "mlp_hidden"), ("llama", "mlp_out")])
def test_scores_of_neurons_by_hand(family, site):
    model, texts = families.build(family), EvalSet(TOKENIZER, [families.words(9, 1), families.words(6, 2)])
    state = families.state(model)
    gradient, wanda = gradient_times_activation(model, texts, site), wanda_score(model, texts, site)
    assert families.state(model) == state
    wanted, squares, n = 0.0, [0.0] * 3, 0
    modules = [m for _, m in families.down_projections(family, model)]
    for ids in texts.ids:  # alone, without padding
        seen, inputs, handles = {}, {}, []
        for i, m in enumerate(modules):

            def keep(module, args, out, i=i):
                inputs[i] = args[0].detach()[0, 1:]
                if site == "mlp_out":
                    seen[i] = out
                    out.retain_grad()

            def keep_input(module, args, i=i):
                if site == "mlp_hidden":
                    seen[i] = args[0]
                    args[0].retain_grad()

            handles += [m.register_forward_pre_hook(keep_input), m.register_forward_hook(keep)]
        ids = torch.tensor([ids])
        torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum").backward()
        wanted = wanted + torch.cat([(seen[i].detach() * seen[i].grad)[0, 1:].abs().sum(0) for i in range(3)])
        squares = [s + inputs[i].square().sum(0) for i, s in enumerate(squares)]
        n += ids.shape[1] - 1
        for h in handles:
            h.remove()
    weights = [m.weight.detach().T if family == "gpt2" else m.weight.detach() for m in modules]
    assert torch.allclose(gradient, wanted / n, rtol=1e-3, atol=1e-6)
    loud = [(s / n).sqrt() for s in squares]
    by_weight = [w.abs().sum(0) * s if site == "mlp_hidden" else w.abs() @ s for w, s in zip(weights, loud)]
    assert torch.allclose(wanda, torch.cat(by_weight), rtol=1e-4)


def test_selections_and_controls(world):
    _, found, _, _ = world
    assert found.select("key") == found.key and torch.equal(
        network_score(found.networks).topk(5).indices.sort().values, found.select("key", 5).flat.nonzero()[:, 0]
    )
    pca = found.networks.alternative("pca").key_neurons(threshold=found.threshold)
    assert found.select("PCA") == pca != found.key and found.select("rotation", seed=1) != found.select(
        "rotation", seed=2
    )
    by_alpha = replace(found, threshold=Threshold(2.5, tail="raw"))
    assert by_alpha.select("key") == by_alpha.key == found.networks.key_neurons(2.5, "raw")
    quiet = found.control("least active", found.key)
    loudness = found.variance + found.mean**2
    for row, score, n in zip(quiet.layers, loudness.split(planted.WIDTH), found.key.counts):
        assert int(row.sum()) == n and score[row].max() <= score[~row].min()
    for call in (lambda: found.select("ICA"), lambda: found.control("none", found.key), lambda: found.select("key", 0)):
        with pytest.raises(ValueError):
            call()


def test_what_was_found_comes_back_from_their_folder(world, tmp_path):
    _, found, _, _ = world
    found.save(tmp_path)
    again = Found.load(tmp_path)
    assert (
        again.key == found.key
        and again.threshold == found.threshold
        and again.facts == json.loads(json.dumps(found.facts))
    )
    assert all(torch.equal(again.score(s), found.score(s)) for s in found.selections) and torch.equal(
        again.variance, found.variance
    )


# component subtraction


@pytest.mark.parametrize("positions", ["all", "after-first"])
def test_a_subtraction_by_hand(world, positions):
    model, found, _, _ = world
    networks, state = found.networks, families.state(model)
    texts = EvalSet(TOKENIZER, planted.texts(3, 12, seed=5))
    with Subtraction(networks, (1, 4), positions=positions).on(model):
        got = perplexity(model, None, texts, progress=False).token_nats
    assert families.state(model) == state
    maps = networks.mixing_.double()
    wanted = []
    for ids in texts.ids:
        ids, seen, handles = torch.tensor([ids]), [], []
        modules = [m for _, m in families.down_projections("llama", model)]
        handles = [m.register_forward_pre_hook(lambda m, a: seen.append(a[0][0])) for m in modules]
        with torch.no_grad():
            model(ids)
        for h in handles:
            h.remove()
        centred = (torch.cat(seen, 1).double() - networks.mean_.double()) / networks.scale_.double()
        fitted = torch.linalg.lstsq(maps.T, centred.T).solution[[1, 4]]  # (2, T)
        if positions == "after-first":
            fitted[:, 0] = 0
        gone = (fitted.T @ maps[[1, 4]] * networks.scale_.double()).float().split(planted.WIDTH, 1)
        handles = [
            m.register_forward_pre_hook(lambda m, a, part=part: (a[0] - part,)) for m, part in zip(modules, gone)
        ]
        with torch.no_grad():
            wanted.append(torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none"))
        for h in handles:
            h.remove()
    wanted = torch.cat(wanted)
    plain = perplexity(model, None, texts, progress=False).token_nats
    assert torch.allclose(got, wanted, atol=2e-3) and (wanted - plain).abs().max() > 0.05


def test_subtractions_refuse_and_leave_nothing_behind(world):
    model, found, topics, _ = world
    for bad in ((), (0, 0), (14,), (-1,)):
        with pytest.raises(ValueError):
            Subtraction(found.networks, bad)
    state, ids = families.state(model), torch.tensor([[5, 6, 7]])
    one = Subtraction(found.networks, (0,))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError), one.on(model):
        model(ids, past_key_values=cache)
    assert families.state(model) == state
    with one.on(model):
        assert model.generate(ids, max_new_tokens=2, use_cache=False, do_sample=False, pad_token_id=0).shape == (1, 5)
    table = subtraction_study(cache_of(model), found, topics, [0])
    subtracted = table[table.operation == "subtract"]
    assert subtracted.network.isna().tolist() == [False, True] and subtracted.damage.abs().min() > 1e-3
    assert subtracted.counts.tolist() == ["128 128 128"] * 2


# resuming


def test_the_same_seed_gives_the_same_table_twice_and_a_folder_measures_nothing_again(world, tmp_path):
    model, found, topics, _ = world
    run = lambda folder: union_study(cache_of(model, folder), found, topics, {"random": 2}, keep=False)
    whole = run(None)
    pd.testing.assert_frame_equal(run(None), whole, check_exact=True)
    pd.testing.assert_frame_equal(run(tmp_path), whole, check_exact=True)
    seen, handle = counting(model)
    pd.testing.assert_frame_equal(run(tmp_path), whole, check_exact=True)
    handle.remove()
    assert not seen


def test_interrupted_in_the_middle_and_resumed(world, tmp_path):
    model, found, topics, _ = world
    run = lambda folder: cross_task_study(cache_of(model, folder), {"topics": found}, topics, {"random": 3})
    whole, state, calls = run(None), families.state(model), []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    handle = model.get_output_embeddings().register_forward_hook(own_hook(interrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    handle.remove()
    assert (
        families.state(model) == state
        and len(list(tmp_path.glob("*.safetensors"))) == 3
        and not list(tmp_path.glob(".*"))
    )
    seen, handle = counting(model)
    pd.testing.assert_frame_equal(run(tmp_path), whole, check_exact=True)
    handle.remove()
    assert len(seen) == len(whole) - 3


# evaluation sets


def test_answers_are_scored_by_hand():
    model, data = families.build("llama"), [("w5 w6", 1), ("w7", 0), ("w8 w9 w10", 1), ("w30", 1)]
    y = answers_on("words", TOKENIZER, data, "w11 {text} w12", ["w20", "w21"])
    scores = y.score(model)
    right, nats = [], []
    for text, label in data:
        ids = torch.tensor([[int(w[1:]) for w in f"w11 {text} w12".split()]])
        with torch.no_grad():
            logits = model(ids).logits[0, -1, [20, 21]].double()
        right.append(float(logits.argmax() == label))
        nats.append(float(-logits.log_softmax(0)[label]))
    assert scores.sums["accuracy"].tolist() == right and scores.sums["label nats"].tolist() == pytest.approx(
        nats, abs=1e-5
    )
    assert y.levels == {"chance": 0.5, "majority": 0.75}
    off = Intervention("all off", NeuronMask.full((24,) * 3, "mlp_hidden"))
    table = measure(cache_of(model), [off], [y])
    worse = table[(table.arm == "all off") & (table.measure == "accuracy")].iloc[0]
    assert worse.damage == pytest.approx(worse.unmasked - worse.value), "fewer right answers are damage"


@pytest.mark.parametrize(
    "data, words, error",
    [
        ([("w5", 0), ("w6", 1)], None, ValueError),
        ([("w5", 0), ("w6", 2)], ["w20", "w21"], ValueError),
        ([("w5", -1), ("w6", 0)], ["w20", "w21"], ValueError),
        ([("w5", "good"), ("w6", 0)], ["w20", "w21"], TypeError),
    ],
)
def test_labels_without_words_are_refused_before_anything_is_measured(data, words, error):
    with pytest.raises(error):
        answers_on("words", TOKENIZER, data, "{text}", words)


def test_a_class_that_the_sentences_lack_is_still_a_choice():
    from datasets import ClassLabel, Dataset, Features, Value

    names = ["w20", "w21", "w22"]
    data = Dataset.from_dict(
        {"text": ["w5 w6", "w7", "w8"], "label": [0, 1, 1]},
        Features({"text": Value("string"), "label": ClassLabel(names=names)}),
    )
    model, levels = families.build("llama"), {"chance": 1 / 3, "majority": 2 / 3}
    for y in (
        answers_on("words", TOKENIZER, data, "{text}"),
        answers_on("words", TOKENIZER, list(zip(data["text"], data["label"])), "{text}", names),
    ):
        assert y.levels == levels
        with pytest.warns(UserWarning):
            table = measure(cache_of(model), [], [y])
        assert table.chance.tolist() == [1 / 3] * 2 and table["items"].tolist() == [3, 3]


def test_sentences_longer_than_the_model_reads_are_left_out_and_counted():
    model, data = families.build("llama"), [("w5 w6", 0), (families.words(70), 1), ("w7", 1)]
    y = answers_on("words", TOKENIZER, data, "{text}", ["w20", "w21"])
    with pytest.warns(UserWarning):
        table = measure(cache_of(model), [], [y])
    fitting = measure(
        cache_of(model), [], [answers_on("words", TOKENIZER, [data[0], data[2]], "{text}", ["w20", "w21"])]
    )
    assert (
        table["items"].tolist() == table.documents.tolist() == [2, 2] and table.value.tolist() == fitting.value.tolist()
    )


# p-values and published numbers


def test_p_values_need_nineteen_draws():
    with pytest.raises(ValueError):
        control_p_value(1.0, [0.0] * 18)


def test_published_numbers_are_in_the_package():
    assert late_binding_evidence().equal.all() and len(late_binding_evidence()) == 5
    assert {name: len(published(name)) for name in ("preservation", "ablation", "networks", "recurrence")} == {
        "preservation": 110,
        "ablation": 59,
        "networks": 10,
        "recurrence": 12,
    }
    assert published("networks").attrs["source"].startswith("arXiv 2502.20408, Table 4")
    with pytest.raises(ValueError):
        published("Table 4")


# all of it

WHOLE = StudySettings(
    find=SETTINGS,
    published=replace(PRESETS["paper"], alpha=2.0, fit_tokens=400, fit_length=80),
    eval_tokens=120,
    sentences=6,
    short_length=12,
    short_sentences=4,
    seeds=1,
    draws=2,
    ks=(4, 300),
    fractions=(0.05, 0.125),
    kept=(0.1,),
    gains=(0.0, 2.0, 4.0),
    adds=(1.0,),
    networks=1,
    more_seeds=(1,),
    more_texts=1,
    variant_restarts=1,
    recurrence_texts=2,
    sample_tokens=40,
)


def test_only_what_the_texts_cannot_carry_is_remembered(tmp_path, monkeypatch):
    model, texts, wanted = planted.model(), planted.texts(30, 80), wanted_networks(WHOLE, ["topics"])
    find = lambda name, of=None: found_networks(model, TOKENIZER, name, of or wanted[name], texts, tmp_path)
    with monkeypatch.context() as m:
        m.setattr(
            "llmfact_nb.study.plan.find_networks",
            lambda *a, **k: (_ for _ in ()).throw(ValueError("path='model' is damaged")),
        )
        with pytest.raises(ValueError):
            find("published k 4")
    assert not list(tmp_path.iterdir()) and isinstance(find("published k 4"), Found), "it passes, and the study goes on"
    quiet = replace(wanted["published k 4"], settings=replace(wanted["published k 4"].settings, alpha=1e3))
    said = {
        "published k 300": find("published k 300"),
        "texts 1": find("texts 1", replace(wanted["texts 1"], skip=2)),
        "quiet": find("quiet", quiet),
    }
    for name, why in said.items():
        assert isinstance(why, str) and found_networks(None, None, name, quiet, (), tmp_path) == why, (
            "a reason of the texts is kept"
        )
    assert (
        said["published k 300"].startswith("n_components=300")
        and "further tokens" in said["texts 1"]
        and said["quiet"].startswith("alpha=1000")
    )


def test_tables_are_read_for_the_model_they_were_measured_with():
    paper = Path(__file__).parent.parent / "nbs" / "tutorials" / "paper"
    pd.testing.assert_frame_equal(read_study(paper, "smollm2-135m")["verdicts"], read_study(paper)["verdicts"])
    with pytest.raises(ValueError):
        read_study(paper, "openai-community/gpt2")


def study_texts(**kinds):
    "Texts of a whole study by kind; the first is the baseline's."
    held_out = {kind: planted.texts(4, 80, seed=8 + i) for i, kind in enumerate(kinds)}
    return StudyTexts(kinds, held_out, [(f"w{5 + i} w{6 + i}", i % 2) for i in range(6)], "w4 {text}", ["w20", "w30"])


def test_a_kind_of_text_may_have_any_name():
    "Also that of an evaluation set of the study itself."
    plain, named = (
        evaluation_sets(TOKENIZER, study_texts(topics=["w5"], **{name: ["w5"]}), WHOLE) for name in ("others", "full")
    )
    for name in ("full", "short", "answers", "answers, short", "on topics"):
        assert (named[name].data, named[name].measures, named[name].fingerprint) == (
            plain[name].data,
            plain[name].measures,
            plain[name].fingerprint,
        )
    assert named["on full"].fingerprint == plain["on others"].fingerprint
    with pytest.raises(ValueError):
        StudyTexts({"topics": ["w5"]}, {"topics": ["w5"], "others": ["w5"]}, [])


def test_further_texts_are_no_texts_of_the_baseline():
    "Short ones neither: as many are passed over as the earlier sets read."
    model, texts = planted.model(), planted.texts(100, 20)
    wanted, length = (
        wanted_networks(replace(WHOLE, more_texts=2, find=replace(SETTINGS, fit_tokens=400)), ["topics"]),
        SETTINGS.fit_length,
    )
    read = [
        enough_texts(TOKENIZER, further_texts(model, TOKENIZER, texts, wanted[name]), 400, length)
        for name in ("baseline", "texts 1", "texts 2")
    ]
    assert [t for some in read for t in some] == texts[: sum(map(len, read))] and min(map(len, read)) > 400 // length


def test_draws_of_different_sets_are_independent(world):
    "Two sets of key neurons that are alike would otherwise share their controls."
    model, found, topics, _ = world
    table = cross_task_study(cache_of(model), {"a": found, "b": found}, topics, {"random": 2, "matched permuted": 1})
    drawn = table[table.arm.isin(["random", "matched permuted"])]
    assert drawn.groupby(["arm", "found_on"]).seed.apply(list).to_dict() == {
        ("random", "a"): [0, 1],
        ("random", "b"): [2, 3],
        ("matched permuted", "a"): [0],
        ("matched permuted", "b"): [1],
    }
    assert drawn.part.nunique() == len(drawn)


def test_a_study_of_odd_texts_and_thresholds(tmp_path, capsys):
    """The first fit text is one token, no unit passes the published threshold, fit_length is more than the model
    reads; the estimate minds none of it."""
    torch.manual_seed(0)
    model = families.build("gpt2", max_position_embeddings=32)
    settings = replace(
        WHOLE,
        find=replace(SETTINGS, n_components=4, fit_tokens=200, fit_length=64),
        published=replace(WHOLE.published, alpha=50.0, fit_length=64, fit_tokens=200),
        ks=(3,),
        more_texts=0,
        more_seeds=(),
        recurrence_texts=0,
        draws=1,
        sample_tokens=16,
    )
    tables = paper_study(
        model, TOKENIZER, tmp_path / "out", settings, study_texts(topics=["w5", *planted.texts(30, 80)])
    )
    said = capsys.readouterr().err
    assert "in all about" in said and said.count("left") > 5, "the time that is left is told again and again"
    assert (
        tables["preservation"].note.str.startswith("alpha=50").all()
        and tables["union"].injected.dropna().between(0, 10).any()
    )
    name = json.loads((tmp_path / "out" / "study.json").read_text())["settings"]["find"]["model"]
    assert name == "GPT2LMHeadModel" and set(read_study(tmp_path / "out", name)) == set(tables)
    claimed = read_claim(tmp_path / "out")["identity"]
    assert claimed["model"] == name and "smollm2" not in json.dumps(claimed), "named before anything is measured"
    for quick in (False, True):
        record = json.loads((tmp_path / "out" / "study.json").read_text())
        record["settings"]["quick"] = quick
        (tmp_path / "out" / "study.json").write_text(json.dumps(record))
        marks = {table.attrs["mark"] for table in read_study(tmp_path / "out").values()}
        assert marks == {"quick: for trying out" if quick else ""}
    assert {table.attrs["model"] for table in tables.values()} == {name} and QUICK.quick
    rule = tables["verdicts"].set_index("id").rule["T4"]
    assert "alpha 50" in rule and "3.6" not in rule


@pytest.mark.slow
def test_the_whole_study_interrupted_and_resumed(tmp_path):
    model = planted.model()
    texts = StudyTexts(
        {"topics": planted.texts(60, 80), "others": planted.texts(30, 80, seed=7)},
        {"topics": planted.texts(5, 80, seed=8), "others": planted.texts(3, 80, seed=9)},
        [(f"w{5 + i} w{6 + i}", i % 2) for i in range(6)],
        "w4 {text}",
        ["w20", "w30"],
    )
    run = lambda folder, settings=WHOLE: paper_study(model, TOKENIZER, folder, settings, texts, progress=False)
    whole, state = run(tmp_path / "a"), families.state(model)
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 60:
            raise KeyboardInterrupt

    handle = model.get_output_embeddings().register_forward_hook(own_hook(interrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b")
    handle.remove()
    assert families.state(model) == state and not (tmp_path / "b" / "tables").exists()
    resumed = run(tmp_path / "b")
    for name, table in whole.items():
        pd.testing.assert_frame_equal(resumed[name], table, check_exact=True, obj=name)
    assert {
        "union",
        "damage",
        "preservation",
        "amplification",
        "networks",
        "subtraction",
        "cross-task",
        "random share",
        "factors",
        "contrasts",
        "sizes",
        "recurrence",
        "facts",
        "verdicts",
    } == set(whole)
    two = paper_study(model, TOKENIZER, tmp_path / "d", WHOLE, texts, n_jobs=2, progress=False)
    for name, table in two.items():
        pd.testing.assert_frame_equal(table, whole[name], check_exact=True, obj=name)
    again = read_study(tmp_path / "a", "LlamaForCausalLM")
    assert (
        set(again) == set(whole)
        and again["union"].damage.tolist() == pytest.approx(whole["union"].damage.tolist(), nan_ok=True)
        and (again["union"].dtypes == whole["union"].dtypes).all()
    )
    gone = whole["preservation"].query("k == 300")
    assert (
        len(gone) == 3
        and gone.note.str.contains("300").all()
        and gone.damage.isna().all()
        and whole["verdicts"].set_index("id").verdict["T6"] == "undecided"
    )  # two draws give no p-value
    lacking = {row.id for row in whole["verdicts"].itertuples() if "no table" in row.why or "no row" in row.why}
    assert lacking == {"T2"}, "every rule finds its rows; T2 needs several models"
    assert {"kind spatial", "site mlp_out", "k 4", "ICA seed 1", "texts 1", "zero, all"} <= set(
        whole["factors"].setting
    )
    drawn = whole["random share"].query("arm == 'random 15 %' and replace == 'zero'")
    draws = {m: set(of.groupby("data").seed.nunique()) for m, of in drawn.groupby("measure")}
    assert draws["nats"] == {WHOLE.draws} and draws["accuracy"] == {WHOLE.seeds}
    across = whole["cross-task"].query("arm == 'random' and measure == 'nats'")
    assert set(across.groupby(["found_on", "data"]).seed.nunique()) == {1}, "two draws, shared by two kinds"
    factors = whole["factors"]
    assert (factors.damage.isna() == (factors.note != "")).all() and set(factors[factors.note != ""].setting) <= {
        "k 28"
    }, "only what the tiny model's rank cannot carry has no numbers, and a reason"
    assert (
        set(whole["random share"].query("replace == 'mean'").recovered.notna()) == {True}
        and (tmp_path / "a" / "study.json").exists()
    )
    few = found_networks(
        model,
        TOKENIZER,
        "texts 1",
        wanted_networks(WHOLE, ["topics"])["texts 1"],
        texts.fit["topics"][:40],
        tmp_path / "c",
    )
    assert "further tokens" in few, "never the baseline's own texts"
    assert (
        max(map(len, EvalSet(TOKENIZER, texts.held_out["topics"], 80).ids)) > 9
        and evaluation_sets(TOKENIZER, texts, WHOLE, 9)["short"].tokens <= 9 * 5
    )
    with pytest.raises(ValueError):
        run(tmp_path / "a", replace(WHOLE, seeds=2))

    grid = paper_study(
        model, TOKENIZER, tmp_path / "g", replace(WHOLE, grid=True, recurrence_texts=0), texts, progress=False
    )["factors"]
    spatial = grid[(grid.setting == "kind spatial") & (grid.measure == "nats")]
    assert {"key", "PCA", "rotation", "keep key", "all off", *CONTROLS} <= set(spatial.arm) and set(spatial.data) == {
        "topics"
    }
    assert set(grid[grid.measure == "nats"].data.dropna()) <= {"topics", ""}, "all factors on the same texts"

    sets = evaluation_sets(TOKENIZER, texts, WHOLE)
    passes = study_passes(replace(WHOLE, ks=(4,)), ["topics", "others"])  # 300 networks cannot be found
    files = len(list((tmp_path / "a" / "scores").glob("*.safetensors")))
    counted = sum(n for study, of in passes.items() for name, n in of.items())
    assert {name for of in passes.values() for name in of} <= set(sets)
    assert files <= counted < 1.2 * files, "an upper bound: what cannot be found, or is equal, counts too"
