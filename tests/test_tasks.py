"""Pins the studies of a task's neurons on models where they are known: planted neurons come first, are faithful and
complete, and their damage is specific; networks find what no contrast shows; and a null is not called a finding."""

import math

import families
import numpy as np
import pandas as pd
import planted
import pytest
import torch

from llmfact_nb.ablation import Counterparts, ScoreCache, Settings, find_networks, loss_on
from llmfact_nb.base.arguments import ArgumentError
from llmfact_nb.evaluate import EvalSet
from llmfact_nb.masks import NeuronMask
from llmfact_nb.scores.contrast import ContrastPair, ContrastSet, contrast_accuracy, localize, token_pairs
from llmfact_nb.study.confidence import by_confidence, confidence_study, questions_of, questions_on
from llmfact_nb.study.contrasts import contrasts
from llmfact_nb.study.further import (
    further_verdicts,
    judge_confidence,
    judge_localized,
    judge_network_for_task,
    judge_specific,
    judge_training,
)
from llmfact_nb.study.localizers import contrast_on, localizer_study, task_contrasts
from llmfact_nb.study.tasks import circuit_areas, circuit_study, neuron_scores, specificity
from llmfact_nb.study.verdicts import NOT_SUPPORTED, SUPPORTED, UNDECIDED

TOKENIZER = families.tokenizer()
SMALL = Settings(fit_tokens=400, fit_length=40, n_components=3, n_init=1, exclude="first", fraction=0.05)
SHARE = 2 / (3 * families.HIDDEN)  # two neurons


def texts_of(n=12, length=40, seed=0):
    return [families.words(length, seed=seed + i) for i in range(n)]


@pytest.fixture(scope="module")
def given():
    model = planted.task_model()
    return model, find_networks(model, TOKENIZER, texts_of(), SMALL, progress=False)


def others_of(contrast):
    return Counterparts((p.a, p.b) for p in token_pairs(TOKENIZER, contrast))


def units(mask: NeuronMask):
    return [(d, int(u)) for d, row in zip(mask.depths, mask.layers) for u in row.nonzero()]


def test_planted_neurons_are_ranked_first_and_are_faithful_and_complete(given):
    model, found = given
    first, second = planted.task_pairs().split()
    scores = neuron_scores(model, TOKENIZER, found, first, EvalSet(TOKENIZER, texts_of(4), 40))
    for name in ("t", "difference", "attribution", "integrated attribution"):
        chosen = torch.zeros(len(found.mean), dtype=torch.bool)
        chosen[scores[name].topk(2).indices] = True
        assert units(found.mask(chosen)) == planted.TASKS["one"], name
    cache = ScoreCache(model, progress=False)
    table = circuit_study(cache, found, scores, contrast_on("one", TOKENIZER, second), others_of(second), (SHARE, 0.2))
    areas = circuit_areas(table, cache).set_index(["operation", "replace", "setting"])
    for name in ("t", "attribution", "integrated attribution"):
        assert areas.area["keep", "counterfactual", name] == pytest.approx(1, abs=0.05)
        assert areas.area["ablate", "counterfactual", name] == pytest.approx(0, abs=0.05)
    assert areas.area["keep", "counterfactual", "random"] < 0.5
    assert areas.area["ablate", "counterfactual", "random"] > 0.5
    assert (areas.note == "").all() and (areas.ci_low <= areas.ci_high).all()


def test_an_area_is_the_mean_of_the_line_through_the_recovered_shares(given):
    model, found = given
    task = planted.task_pairs()
    scores = {"some": torch.rand(len(found.mean), generator=torch.Generator().manual_seed(1))}
    cache, sizes = ScoreCache(model, progress=False), (0.05, 0.2, 0.8)
    table = circuit_study(cache, found, scores, contrast_on("one", TOKENIZER, task), others_of(task), sizes, None)
    areas = circuit_areas(table, cache).set_index(["operation", "replace"])
    for (operation, to), area in areas.area.items():
        rows = table[(table.arm == "named") & (table.operation == operation) & (table["replace"] == to)]
        rows = rows[rows.measure == "logit difference"]
        x = np.log10(sizes)
        assert area == pytest.approx(np.trapezoid(rows.recovered.to_numpy(float), x) / (x[-1] - x[0]), abs=1e-6)


def test_a_task_at_chance_has_no_circuit(given):
    model, found = given
    one = planted.task_pairs()
    unclear = ContrastSet("chance", tuple(ContrastPair(p.a, p.b, " w30", " w31") for p in one.pairs))
    assert not contrast_accuracy(model, TOKENIZER, unclear).above_chance
    assert contrast_accuracy(model, TOKENIZER, one).above_chance
    cache, scores = ScoreCache(model, progress=False), {"random": torch.rand(len(found.mean))}
    table = circuit_study(cache, found, scores, contrast_on("chance", TOKENIZER, unclear), others_of(unclear), (0.1,))
    areas = circuit_areas(table, cache)
    assert areas.area.isna().all() and (areas.note != "").all()


def matrix(model, found, masks, tasks):
    cache = ScoreCache(model, progress=False)
    held_out = loss_on("wiki", EvalSet(TOKENIZER, texts_of(6, 20, seed=90), 20))
    sets = [*(contrast_on(name, TOKENIZER, task) for name, task in tasks.items()), held_out]
    table = localizer_study(cache, found, masks, sets, controls=["matched permuted"])
    return specificity(table, cache, families.VOCAB)


@pytest.mark.slow
def test_damage_is_specific_where_it_was_planted_so_and_not_where_neurons_are_shared():
    tasks = {name: planted.task_pairs(name) for name in planted.TASKS}
    verdicts = {}
    for shared in (False, True):
        model = planted.task_model(shared)
        found = find_networks(model, TOKENIZER, texts_of(), SMALL, progress=False)
        masks = {
            name: localize(model, TOKENIZER, task, score="integrated attribution").mask(fraction=SHARE)
            for name, task in tasks.items()
        }
        table = matrix(model, found, masks, tasks)
        assert set(table.data) == {"one", "two", "wiki"} and len(table) == 6
        own = table[table.setting == table.data]
        assert own.own_less.isna().all() and (own.damage > 0).all() and (own.p == 0.05).all()
        verdicts[shared] = judge_specific(table).verdict
        if not shared:
            swapped = {"one": masks["two"], "two": masks["one"]}
            assert judge_specific(matrix(model, found, swapped, tasks)).verdict == NOT_SUPPORTED
    assert verdicts[False] == SUPPORTED and verdicts[True] != SUPPORTED


def specific_tasks(**of_two):
    "Two tasks with all the signs of specific damage, but for what is said of the second."
    own = {"accuracy_low": 0.7, "to_lose_low": 0.2, "lost": 0.5, "lost_low": 0.4, "lost_high": 0.6, "p": 0.05}
    other = {"lost": 0.0, "lost_low": -0.1, "lost_high": 0.1, "own_less": 0.5, "own_low": 0.4, "own_high": 0.6}
    rows = []
    for a in ("one", "two"):
        for b in ("one", "two", "wiki"):
            row = {"setting": a, "data": b, "own_less": math.nan, "own_low": math.nan, "own_high": math.nan}
            row |= own | (of_two if b == "two" else {}) | ({} if a == b else other)
            rows.append(row | ({"accuracy_low": math.nan} if b == "wiki" else {}))
    return pd.DataFrame(rows)


def test_a_task_without_anything_to_lose_does_not_count():
    assert judge_specific(specific_tasks()).verdict == SUPPORTED
    near_guessing = specific_tasks(to_lose_low=-0.1, lost_low=-30.0, lost_high=30.0)
    assert judge_specific(near_guessing).why.startswith("1 task solved")
    assert judge_specific(specific_tasks(p=0.3)).verdict == UNDECIDED


@pytest.mark.parametrize(
    "low, high, verdict", [(0.5, 0.6, SUPPORTED), (0.35, 0.6, UNDECIDED), (0.0, 0.1, NOT_SUPPORTED)]
)
def test_a_network_serves_a_task_better_only_with_its_whole_interval(low, high, verdict):
    rows = [("network 3", (low + high) / 2, low, high)] + [(name, 0.3, 0.2, 0.4) for name in "abcd"]
    table = pd.DataFrame(rows, columns=["setting", "difference", "ci_low", "ci_high"])
    table = table.assign(data="agreement", measure="label nats", accuracy_low=0.7)
    assert judge_network_for_task(table).verdict == verdict
    assert judge_network_for_task(table.assign(accuracy_low=0.48)).verdict == UNDECIDED, "nothing is claimed at chance"


def test_tasks_at_chance_or_absent_leave_the_claim_undecided():
    table = specific_tasks(accuracy_low=0.4)
    assert judge_specific(table).verdict == UNDECIDED
    verdicts = further_verdicts({"specificity": table}).set_index("claim").verdict
    assert (verdicts == UNDECIDED).all()


def test_the_table_of_tasks_says_how_many_pairs_there_were_and_whether_they_are_solved(given):
    model, found = given
    task, cache = planted.task_pairs(), ScoreCache(model, progress=False)
    early = ContrastSet(
        "early", tuple(ContrastPair(f"{p.a} w15", f"{p.b} w15", p.answer_a, p.answer_b) for p in task.pairs)
    )
    articles = loss_on("wiki", EvalSet(TOKENIZER, texts_of(4), 20))
    sets = [contrast_on("agreement", TOKENIZER, task), contrast_on("other", TOKENIZER, early), articles]
    masks = {"network 1": found.key} | {name: found.key for name in "abcd"}
    table = task_contrasts(localizer_study(cache, found, masks, sets, 2, controls=["matched permuted"]), cache)
    of = table.groupby("data").agg({"pairs": "first", "accuracy_low": "first"})
    assert of.pairs.to_dict() == {"agreement": len(task), "other": len(task), "wiki": 4}
    assert of.accuracy_low["agreement"] == 1 and of.accuracy_low["other"] <= 0.5 and math.isnan(of.accuracy_low["wiki"])
    early = table[table.data == "other"].assign(data="agreement")
    assert judge_network_for_task(early).verdict == UNDECIDED


def copies(trained, permuted, reinitialized=(0.05, 0.06), site="mlp_hidden"):
    "A table of untrained copies."
    rows = [("trained", trained)] + [("permuted", r) for r in permuted] + [("reinitialized", r) for r in reinitialized]
    return pd.DataFrame(rows, columns=["model", "r"]).assign(site=site)


def test_training_is_judged_by_nineteen_permuted_copies():
    low = np.linspace(0.3, 0.5, 19)
    assert judge_training(copies(0.6, low)).verdict == SUPPORTED
    assert judge_training(copies(0.6, low[:3])).verdict == UNDECIDED, "three copies are no evidence"
    assert judge_training(copies(0.6, [*low[:-1], 0.6])).verdict == UNDECIDED
    assert judge_training(copies(0.6, low, [0.7, 0.1])).verdict == UNDECIDED
    assert judge_training(copies(0.39, low)).verdict == judge_training(copies(0.3, low[:3])).verdict == NOT_SUPPORTED
    for missing in (copies(0.6, low, site="mlp_out"), copies(0.6, ())):
        assert judge_training(missing).verdict == UNDECIDED


def test_a_model_like_its_copies_is_seldom_called_trained():
    rng = np.random.default_rng(0)
    draws = [judge_training(copies(float(r[0]), r[1:], ())).verdict for r in rng.random((400, 20))]
    assert draws.count(SUPPORTED) <= 32, "one in twenty is 20, and 32 is beyond 99 % of such counts"


def test_a_claim_without_a_p_value_is_not_supported():
    row = {"setting": "t", "against": "matched permuted", "damage": 0.5, "against_damage": 0.2, "against_low": 0.1}
    row |= {"against_high": 0.3, "seeds": 3, "difference": 0.3, "ci_low": 0.2, "ci_high": 0.4}
    judged = {p: judge_localized(pd.DataFrame([row | {"p": p}])).verdict for p in (0.05, 0.1, math.nan)}
    assert list(judged.values()) == [SUPPORTED, UNDECIDED, UNDECIDED]


def test_scores_of_another_model_and_impossible_sizes_are_refused(given):
    model, found = given
    task = planted.task_pairs()
    call = lambda scores, sizes: circuit_study(
        ScoreCache(model, progress=False), found, scores, contrast_on("one", TOKENIZER, task), others_of(task), sizes
    )
    for scores, sizes, argument in (
        ({"a": torch.rand(5)}, (0.1,), "scores"),
        ({"a": torch.rand(len(found.mean))}, (1.5,), "fractions"),
    ):
        with pytest.raises(ArgumentError) as e:
            call(scores, sizes)
        assert e.value.argument == argument


@pytest.mark.slow
def test_networks_find_topics_that_a_contrast_does_not_show():
    "Topics come and go in both conditions alike, so a contrast cannot see their neurons."
    model, texts = planted.model(), planted.texts(40)
    settings = Settings(fit_tokens=800, fit_length=40, n_components=8, n_init=2, exclude="first", fraction=0.05)
    found = find_networks(model, TOKENIZER, texts, settings, progress=False)
    word = lambda topic, j: f"w{4 + planted.WORDS * topic + j}"
    said = lambda topic, numbers: " ".join(word(topic, j) for j in numbers)
    pairs = [
        (said(t, [(j + i) % 2 for j in range(8)]), said(t, [2 + (j + i) % 3 for j in range(8)]))
        for i in range(4)
        for t in range(planted.TOPICS)
    ]
    contrast = ContrastSet("words of one topic", tuple(ContrastPair(a, b) for a, b in pairs))
    column = torch.arange(len(found.mean)) % planted.WIDTH
    is_planted = column < planted.PLANTED
    n = int(is_planted.sum())
    share = lambda score: float(is_planted[score.topk(n).indices].float().mean())
    by_networks = share(found.networks.maps_.abs().amax(0))
    by_contrast = [share(localize(model, TOKENIZER, contrast, score=s).map_.abs()) for s in ("t", "difference")]
    assert by_networks > 0.8 and max(by_contrast) < 0.3


# Amplification by confidence


def test_gains_are_those_of_probabilities_computed_by_hand(given):
    model, found = given
    task = planted.task_pairs(n=9)
    questions = questions_of(task)
    assert len(questions) == 9 and questions[1][1:] == (" w21", " w20") and len(questions_of(task, both=True)) == 18
    e = questions_on("one", TOKENIZER, questions)
    cache = ScoreCache(model, progress=False)
    mask = localize(model, TOKENIZER, task).mask(n=2)
    table = confidence_study(cache, found, {"one": mask}, [e], gain=1.5, draws=3)
    rows = by_confidence(table, cache).set_index(["setting", "stratum"])

    def log_p():
        of = lambda text: model(input_ids=TOKENIZER(text, return_tensors="pt").input_ids).logits[0, -1].log_softmax(-1)
        return np.array([of(q)[int(a.strip()[1:])].item() for q, a, _ in questions])

    with torch.no_grad():
        before = log_p()
        handles = [
            model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(
                lambda m, args, n=neuron: (
                    torch.cat([args[0][:, :1], args[0][:, 1:] * (1 + 0.5 * (torch.arange(args[0].shape[2]) == n))], 1),
                )
            )
            for layer, neuron in planted.TASKS["one"]
        ]
        gain = log_p() - before
        [h.remove() for h in handles]
    order = np.argsort(before)
    for stratum, of in zip(("unsure", "between", "sure"), np.array_split(order, 3)):
        assert rows.gain["localized", stratum] == pytest.approx(gain[of].mean(), abs=1e-4)
    assert (rows.gain["localized"] > 0).all() and (rows.draws == 3).all()
    assert set(rows.index.get_level_values(0)) == {"networks", "localized"}


def cells(unsure, sure, n=6):
    kinds = {"helps": (0.1, 0.3), "harms": (-0.3, -0.1), "nothing": (-0.1, 0.1)}
    rows = []
    for i in range(n):
        for stratum, kind in (("unsure", unsure[i]), ("sure", sure[i])):
            low, high = kinds[kind]
            rows.append({"stratum": stratum, "gain_low": low, "gain_high": high, "ci_low": low, "ci_high": high})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    "unsure, sure, verdict",
    [
        (["helps"] * 3 + ["nothing"] * 3, ["nothing"] * 6, SUPPORTED),
        (["helps"] * 3 + ["nothing"] * 3, ["helps"] * 3 + ["nothing"] * 3, UNDECIDED),
        (["helps"] * 2 + ["nothing"] * 4, ["nothing"] * 6, UNDECIDED),
        (["nothing"] * 6, ["nothing"] * 6, UNDECIDED),
        (["helps"] + ["harms"] * 3 + ["nothing"] * 2, ["nothing"] * 6, NOT_SUPPORTED),
        (["helps"] * 3 + ["harms"] * 3, ["nothing"] * 6, UNDECIDED),
    ],
)
def test_the_rule_on_confidence(unsure, sure, verdict):
    assert judge_confidence(cells(unsure, sure)).verdict == verdict
    assert judge_confidence(cells(unsure[:3], sure[:3], 3)).verdict == UNDECIDED


def test_what_cannot_be_amplified_by_confidence_is_refused(given):
    model, found = given
    e = questions_on("one", TOKENIZER, questions_of(planted.task_pairs(n=4)))
    with pytest.raises(ArgumentError) as err:
        questions_of(ContrastSet("mute", (ContrastPair("w4", "w5"),)))
    assert err.value.argument == "contrast"
    for options, argument in ((dict(gain=0.0), "gain"), (dict(draws=1), "draws")):
        with pytest.raises(ArgumentError) as err:
            confidence_study(ScoreCache(model, progress=False), found, {}, [e], **options)
        assert err.value.argument == argument


# A null


@pytest.mark.slow
def test_a_null_is_seldom_called_a_finding():
    "Random models, conditions that differ in nothing: a rule may say `supported` in one of twenty at most."
    supported = {"localized": 0, "confidence": 0}
    for seed in range(40):
        model = families.shake(families.build("llama", num_hidden_layers=3), seed)
        found = find_networks(model, TOKENIZER, texts_of(seed=1000 * seed), SMALL, progress=False)
        supported = {name: supported[name] + (v == SUPPORTED) for name, v in null_verdicts(model, found, seed).items()}
    assert max(supported.values()) <= 2, supported


def null_pairs(n, at, name):
    "Pairs of texts that have nothing in common, with one pair of answers for all."
    texts = [families.words(6, seed=at + i) for i in range(2 * n)]
    return ContrastSet(name, tuple(ContrastPair(a, b, " w20", " w21") for a, b in zip(texts[::2], texts[1::2])))


def null_verdicts(model, found, seed):
    start, names = 1000 * seed + 500, ("one", "two")
    held_out = loss_on("wiki", EvalSet(TOKENIZER, texts_of(8, 20, seed=start + 300), 20))
    mask = localize(model, TOKENIZER, null_pairs(12, start, "x")).mask(fraction=0.1)
    cache = ScoreCache(model, progress=False)
    table = localizer_study(cache, found, {"t": mask}, [held_out], 19, ("zero", "all"), ["matched permuted"])
    localized = judge_localized(contrasts(table, cache, ["localized"]))
    sets = [
        questions_on(name, TOKENIZER, questions_of(null_pairs(24, start + 100 * i, name)))
        for i, name in enumerate(names)
    ]
    chosen = {
        name: localize(model, TOKENIZER, null_pairs(12, start + 100 * i + 60, name)).mask(n=found.key.n)
        for i, name in enumerate(names)
    }
    sure = judge_confidence(by_confidence(confidence_study(cache, found, chosen, sets, draws=3), cache))
    return {"localized": localized.verdict, "confidence": sure.verdict}
