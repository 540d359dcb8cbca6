"""Pins chapter 09: settings, interventions against hooks written by hand, the controls beside the key neurons, and a
score cache that measures what is missing and nothing else."""

import random
import time
import warnings
from dataclasses import asdict, replace

import families
import numpy as np
import pandas as pd
import pytest
import torch

from llmfact_nb.ablation import (
    COLUMNS,
    PRESETS,
    Found,
    Intervention,
    ScoreCache,
    Settings,
    _measure_missing,
    ablation_study,
    arm_plan,
    condition_name,
    enough_texts,
    find_networks,
    first_texts,
    key_arms,
    loss_on,
    measure,
)
from llmfact_nb.activations import Activations
from llmfact_nb.base.arguments import ArgumentError
from llmfact_nb.base.files import ClaimError, check_claim, claim, write_json
from llmfact_nb.base.tokens import own_hook
from llmfact_nb.command.run import MATCHED, Sources, _said_of_match, held_out_courses, run_identity
from llmfact_nb.evaluate import EvalSet, perplexity
from llmfact_nb.ica import DataError
from llmfact_nb.masks import DRAWN, NeuronMask, score_match
from llmfact_nb.networks import FunctionalNetworks, Threshold

pytestmark = pytest.mark.filterwarnings("ignore:FastICA has not converged")


# settings

BAD = {
    "site": ["mlp", None, ("mlp_out",)],
    "kind": ["time", None],
    "exclude": ["sink", False],
    "tail": ["left", None],
    "n_components": [0, 2.0, "8", None, 4097, True],
    "n_init": [0, None],
    "ica_seed": [-1, None, 0.0],
    "control_seeds": [0, 1.5],
    "fit_tokens": [0, 1e3],
    "fit_length": [0, None],
    "eval_texts": [0, "4"],
    "eval_length": [1, 0],
    "fraction": [0, -0.1, 1.1, float("nan")],
    "conditions": [(), (("median", "all"),), (("zero", "first"),), (("mean",),), ("zero", "all")],
}


@pytest.mark.parametrize("name, value", [(n, v) for n, values in BAD.items() for v in values])
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError) as e:
        Settings(**{name: value})
    assert f"{name}=" in str(e.value) and (not isinstance(e.value, ArgumentError) or e.value.argument == name)


@pytest.mark.parametrize("value", [0, -1.96, float("nan"), float("inf")])
def test_bad_alpha_is_refused_before_the_fit(value):
    with pytest.raises(ValueError):
        Settings(alpha=value, fraction=None)


@pytest.mark.parametrize("both", [(None, None), (0.1, 2.0)])
def test_exactly_one_of_alpha_and_fraction(both):
    with pytest.raises(ValueError):
        Settings(fraction=both[0], alpha=both[1])


def test_settings_at_the_edge():
    edge = dict(
        ica_seed=0, control_seeds=1, eval_length=2, fraction=1, n_components=7, fit_tokens=7, exclude=None, n_init=1
    )
    Settings(**edge)
    assert Settings(alpha=3.6, fraction=None, tail="raw").threshold == Threshold(3.6, tail="raw")
    assert Settings(fraction=0.02).threshold == Threshold(fraction=0.02)


def test_presets_are_those_of_the_design():
    common = {"kind": "temporal", "model": "smollm2-135m", "texts": "wiki"}
    recommended = dict(site="mlp_hidden", n_components=32, n_init=10, standardize=True, exclude="sinks", fraction=0.01)
    paper = dict(site="mlp_out", n_components=10, standardize=False, exclude=None, fraction=None, tail="raw")
    for name, wanted in (("recommended", recommended), ("paper", paper)):
        assert {k: getattr(PRESETS[name], k) for k in common | wanted} == common | wanted
    assert PRESETS["recommended"] == Settings() and Settings().fit_tokens >= 4096
    assert Settings().conditions == (("mean", "after-first"), ("zero", "after-first"), ("zero", "all"))
    assert PRESETS["paper"].conditions == (("zero", "all"),) and PRESETS["paper"].alpha in (1.96, 3.6)
    assert condition_name("mean", "after-first") == "mean, after the first token"


OTHER = dict(
    model="gpt2", texts="sotu", site="mlp_out", kind="spatial", n_components=31, standardize=False, exclude=None,
    n_init=9, ica_seed=1, fraction=0.02, tail="both", conditions=(("zero", "all"),), control_seeds=2, fit_tokens=4097,
    fit_length=255, eval_texts=13, eval_length=129, documents="lines", max_iter=201, column="body", shuffle=1,
)  # fmt: skip


def claimed(folder, **more):
    "A folder that holds a run with the default settings."
    with claim(folder, "run", run_identity(Sources(Settings(), **more), folder)) as there:
        (there / "settings.json").write_text("{}")
    return folder


def test_every_setting_is_compared(tmp_path):
    assert set(OTHER) | {"alpha"} == set(asdict(Settings()))
    folder = claimed(tmp_path / "run")
    assert check_claim(folder, "run", run_identity(Sources(Settings()), folder))
    for name, value in OTHER.items():
        with pytest.raises(ClaimError) as e:
            check_claim(folder, "run", run_identity(Sources(replace(Settings(), **{name: value})), folder))
        assert list(e.value.differences) == [name]


@pytest.mark.parametrize(
    "there, now",
    [
        ({"device": "cpu"}, {"device": "cuda"}),
        ({"revision": "a"}, {}),
        ({}, {"revision": "a"}),
        ({}, {"device": "cpu"}),
    ],
    ids=str,
)
def test_another_device_or_revision_is_refused(there, now, tmp_path):
    folder = claimed(tmp_path / "run", **there)
    with pytest.raises(ClaimError) as e:
        check_claim(folder, "run", run_identity(Sources(Settings(), **now), folder))
    assert set(e.value.differences) == {*there, *now}


# arms

WIDTHS = (600, 900, 500)


@pytest.fixture(scope="module")
def found():
    "Networks fitted on hand-made activations, with high- and low-variance members alike."
    rng = np.random.RandomState(0)
    maps = (rng.rand(4, 2000) < 0.08) * (1 + rng.exponential(size=(4, 2000)))
    values = (rng.laplace(size=(500, 4)) @ maps + rng.randn(500, 2000)) * rng.lognormal(size=2000)
    at = torch.arange(500) % 100
    rows = torch.tensor(values, dtype=torch.float32)
    acts = Activations(rows, torch.arange(500) // 100, at, at, at == 0, WIDTHS, (0, 1, 2), "mlp_hidden")
    nets = FunctionalNetworks(4, standardize=True, exclude="sinks").fit(acts)
    return Found(nets, acts.moments()[0], acts.moments(nets.rows_)[1], Threshold(fraction=0.06))


def named(arms, name):
    return [a for a in arms if a.arm == name]


THRESHOLDS = [Threshold(fraction=0.06), Threshold(1.96, tail="raw"), Threshold(2.5, tail="both")]


@pytest.mark.parametrize("threshold", THRESHOLDS, ids=str)
def test_arms_and_their_controls(found, threshold):
    found = replace(found, threshold=threshold)
    nets, arms = found.networks, key_arms(found)
    (key,) = named(arms, "key")
    assert key.mask == nets.key_neurons(threshold=threshold) and key.seed is None and key.operation == "ablate"
    assert {a.arm: len(named(arms, a.arm)) for a in arms} == {
        "key": 1,
        "PCA": 1,
        "random": 3,
        "matched random": 3,
        "matched permuted": 3,
        "top variance": 1,
        "keep key": 1,
        "keep random": 1,
        "all off": 1,
    }
    assert [(a.arm, a.seed) for a in arms] == arm_plan(3)
    for name in DRAWN:
        controls = named(arms, name)
        assert [a.seed for a in controls] == [0, 1, 2]
        assert len({a.mask for a in controls}) == 3, "the seeds differ"
        for a in controls:
            assert a.mask.counts == key.mask.counts and a.mask != key.mask
            assert name == "matched permuted" or (a.mask & key.mask).n == 0
    (top,) = named(arms, "top variance")
    for row, score, n in zip(top.mask.layers, found.variance.split(WIDTHS), key.mask.counts):
        assert not n or score[row].min() >= score[~row].max() and row.sum() == n
    (pca,) = named(arms, "PCA")
    assert pca.mask.n == key.mask.n and pca.mask != key.mask, "another selection of the same size"
    if threshold.fraction:
        assert pca.mask == nets.alternative("pca").key_neurons(threshold=threshold)
    (keep,), (keep_random,), (off,) = (named(arms, n) for n in ("keep key", "keep random", "all off"))
    assert keep.mask == key.mask and keep.touched == ~key.mask and key.touched == key.mask
    assert keep_random.mask == named(arms, "random")[0].mask and keep_random.touched == ~keep_random.mask
    assert off.touched.n == off.touched.n_neurons == 2000
    assert all(a.mask.layout == nets.layout for a in arms)


def test_variance_matched_controls_are_closer_than_random_ones(found):
    arms = key_arms(replace(found, threshold=Threshold(fraction=0.1)), controls=5)
    key, v = arms[0].mask, found.variance.double().numpy()
    off = lambda name: np.mean([abs(score_match(key, a.mask, found.variance)["log_ratio"]) for a in named(arms, name)])
    assert off("matched permuted") < 0.5 * off("random") and off("matched random") < 0.8 * off("random")
    for a in arms:  # and each control says it
        if a.arm in DRAWN:
            chosen = a.mask.flat.numpy()
            ratio = np.exp(np.log(v[chosen]).mean() - np.log(v[key.flat.numpy()]).mean())
            assert a.labels["variance_ratio"] == pytest.approx(ratio, rel=1e-6)
            assert a.labels["overlap"] == pytest.approx((a.mask & key).n / key.n)


def test_controls_of_narrow_layers_are_still_draws():
    "Layers of 64 units: with more bins than units, every bin's only candidate would be the key neuron itself."
    rng = np.random.RandomState(0)
    values, some = torch.tensor(rng.laplace(size=(300, 128)), dtype=torch.float32), torch.arange(300)
    acts = Activations(values, some, some, some, torch.zeros(300, dtype=torch.bool), (64, 64), (0, 1), "mlp_hidden")
    nets = FunctionalNetworks(4).fit(acts)
    arms = key_arms(Found(nets, *acts.moments(), Threshold(fraction=0.1)))
    for name in ("matched random", "matched permuted"):
        masks = {a.mask for a in named(arms, name)}
        assert arms[0].mask not in masks and len(masks) > 1, name


def test_arms_are_reproducible_and_their_match_is_no_warning(found):
    states = lambda: (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate())
    before, marks = states(), lambda arms: [(a.arm, a.seed, a.mark) for a in arms]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert marks(key_arms(found)) == marks(key_arms(found)) and states() == before
    crowded = key_arms(replace(found, threshold=Threshold(fraction=0.6)))  # so many that no disjoint control exists
    assert all(a.mask.counts == crowded[0].mask.counts for a in named(crowded, "random"))


def test_no_key_neurons_are_refused(found):
    with pytest.raises(DataError):
        key_arms(replace(found, threshold=Threshold(1000)))


# interventions

LLAMA = (24, 24, 24)
TEXTS = [families.words(n, seed) for seed, n in enumerate((20, 33, 7, 15))]
MEANS = torch.randn(72, generator=torch.Generator().manual_seed(5))


def drawn(seed, share=0.3, site="mlp_hidden"):
    widths = LLAMA if site == "mlp_hidden" else (16, 16, 16)
    return NeuronMask.from_flat(np.random.default_rng(seed).random(sum(widths)) < share, widths, site)


def arms_at(condition, means=MEANS, site="mlp_hidden"):
    "Five arms under one condition."
    to = {"replace": condition[0], "means": means if condition[0] == "mean" else None, "positions": condition[1]}
    full = ~(drawn(1, site=site) & ~drawn(1, site=site))
    return [
        Intervention("key", drawn(1, site=site), **to),
        Intervention("random", drawn(2, site=site), 0, **to),
        Intervention("random", drawn(3, site=site), 1, **to),
        Intervention("keep key", drawn(1, site=site), operation="keep", **to),
        Intervention("all off", full, **to),
    ]


CONDITIONS = (("mean", "after-first"), ("zero", "all"))
ARMS = [arm for condition in CONDITIONS for arm in arms_at(condition)]


@pytest.fixture
def model():
    return families.build("llama")


@pytest.fixture
def texts():
    return EvalSet(families.tokenizer(), TEXTS, max_length=24)


def study(model, texts, arms=ARMS, **how):
    return ablation_study(model, texts, arms, progress=False, **how)


def counting(model):
    "A list that grows with every forward pass; all texts fit into one batch, so that is one for every arm measured."
    perplexity(
        model, None, EvalSet(families.tokenizer(), TEXTS, max_length=24), progress=False
    )  # what is looked at once
    seen = []
    model.get_output_embeddings().register_forward_hook(own_hook(lambda *_: seen.append(1)))
    return seen


def by_hand(model, texts, flat, site, values, after_first, length=24):
    "Mean token loss with hooks written here: one text at a time, no padding, no package."
    rows, handles, total, n = flat.split([len(flat) // 3] * 3), [], 0.0, 0
    for i, (_, module) in enumerate(families.down_projections("llama", model)):
        new = values.split([len(flat) // 3] * 3)[i]

        def swap(x, row=rows[i], new=new):
            x, start = x.clone(), int(after_first)
            x[:, start:, row] = new[row]
            return x

        if site == "mlp_hidden":
            handles.append(module.register_forward_pre_hook(lambda m, a, swap=swap: (swap(a[0]),)))
        else:
            handles.append(module.register_forward_hook(lambda m, a, out, swap=swap: swap(out)))
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([[int(w[1:]) for w in text.split()][:length]])
            logits = model(ids).logits[0, :-1].double()
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            n += ids.shape[1] - 1
    for h in handles:
        h.remove()
    return total / n


@pytest.mark.parametrize("site", ["mlp_hidden", "mlp_out"])
def test_the_numbers_are_those_of_hooks_by_hand(model, texts, site):
    n = 72 if site == "mlp_hidden" else 48
    means, state = MEANS[:n], families.state(model)
    conditions = [(how, positions) for how in ("mean", "zero", "values") for positions in ("after-first", "all")]
    arms = [arm for c in conditions if c[0] != "values" for arm in arms_at(c, means, site)]
    arms += [replace(arm, replace=2 * means, means=None) for arm in arms_at(("mean", "all"), means, site)]
    table = study(model, texts, arms)
    assert families.state(model) == state and list(table.columns) == list(COLUMNS) and len(table) == 1 + len(arms)
    base = by_hand(model, TEXTS, torch.zeros(n, dtype=torch.bool), site, torch.zeros(n), False)
    first = table.iloc[0]
    assert (first.arm, first.units, first.damage, first.ci_low) == ("unmasked", 0, 0, 0)
    assert first.value == pytest.approx(base, abs=1e-5)
    seen = []
    for arm, row in zip(arms, table.iloc[1:].itertuples()):
        flat = ~arm.mask.flat if arm.operation == "keep" else arm.mask.flat
        to = {"mean": means, "zero": torch.zeros(n)}.get(arm.replace if isinstance(arm.replace, str) else "", 2 * means)
        expected = by_hand(model, TEXTS, flat, site, to, arm.positions == "after-first")
        assert (row.arm, row.positions, row.operation) == (arm.arm, arm.positions, arm.operation)
        assert pd.isna(row.seed) if arm.seed is None else row.seed == arm.seed
        assert row.value == pytest.approx(expected, abs=2e-5) and row.damage == pytest.approx(expected - base, abs=4e-5)
        assert row.ci_low < row.damage < row.ci_high and row.units == int(flat.sum())
        assert row.share == pytest.approx(float(flat.float().mean()))
        assert row.counts == " ".join(str(int(r.sum())) for r in flat.split([n // 3] * 3))
        seen.append(round(expected, 4))
    assert len(set(seen)) >= len(seen) - 2, "nearly every arm has a number of its own, so none is mistaken for another"


@pytest.mark.parametrize(
    "bad, name",
    [
        (dict(operation="remove"), "operation"),
        (dict(replace="median"), "replace"),
        (dict(positions="first"), "positions"),
        (dict(replace="mean"), "means"),
        (dict(gain=2.0), "gain"),
        (dict(add=MEANS), "add"),
        (dict(replace="mean", means=MEANS[:-1]), "means"),
        (dict(replace=MEANS[:-1]), "replace"),
    ],
)
def test_an_intervention_that_makes_no_sense_is_refused(bad, name):
    with pytest.raises(ArgumentError) as e:
        Intervention("key", drawn(1), **bad)
    assert e.value.argument == name


# what is measured, and what is remembered


def test_the_whole_table_comes_back_without_a_forward(model, texts, tmp_path):
    seen = counting(model)
    table = study(model, texts, folder=tmp_path)
    assert len(seen) == 1 + len(ARMS)
    pd.testing.assert_frame_equal(study(model, texts, folder=tmp_path), table, check_exact=True)
    identity = ScoreCache(model).identity
    unread = ScoreCache(lambda: pytest.fail("loaded"), tmp_path, identity, progress=False)
    pd.testing.assert_frame_equal(study(unread, texts), table, check_exact=True)
    assert len(seen) == 1 + len(ARMS)
    pd.testing.assert_frame_equal(study(model, texts), table, check_exact=True)
    assert len(seen) == 2 * (1 + len(ARMS)), "without a folder nothing is kept"
    none = ScoreCache(None, tmp_path, identity, progress=False)
    pd.testing.assert_frame_equal(study(none, texts), table, check_exact=True)
    assert {none.asked[part][0] for part in table.part} == {None, *ARMS}, "a key leads back to what was measured"
    with pytest.raises(KeyError):
        study(none, texts, [Intervention("key", drawn(77))])


def changed(**change):
    return [replace(arm, **change) if arm.arm == "key" else arm for arm in ARMS]


STALE = {  # what changed, and how many of the 1 + 5 * 2 measurements it touches
    "another mask in one arm": (lambda: changed(mask=drawn(9)), 2),
    "kept instead of ablated": (lambda: changed(operation="keep"), 0),
    "other means": (lambda: [*arms_at(CONDITIONS[0], MEANS + 1e-3), *arms_at(CONDITIONS[1])], 5),
    "one more arm": (lambda: [*ARMS, Intervention("random", drawn(4), 2)], 1),
    "other order": (lambda: ARMS[::-1], 0),
    "other names and seeds": (lambda: changed(arm="quay", seed=3), 0),
    "means in float64": (lambda: [*arms_at(CONDITIONS[0], MEANS.double()), *arms_at(CONDITIONS[1])], 0),
}


@pytest.mark.parametrize("arms, measured", STALE.values(), ids=STALE)
def test_a_content_hash_decides_what_is_measured_again(model, texts, tmp_path, arms, measured):
    study(model, texts, folder=tmp_path)
    seen = counting(model)
    table = study(model, texts, arms(), folder=tmp_path)
    assert len(seen) == measured
    pd.testing.assert_frame_equal(table, study(model, texts, arms()), check_exact=False, atol=1e-6)
    assert len(study(model, texts, arms(), folder=tmp_path)) == len(table)


def test_other_texts_and_other_weights_are_measured_again(model, texts, tmp_path):
    study(model, texts, folder=tmp_path)
    seen = counting(model)
    other = EvalSet(families.tokenizer(), TEXTS[:3], max_length=24)
    table = study(model, other, folder=tmp_path)
    assert len(seen) == 1 + len(ARMS)
    assert table.value[0] == pytest.approx(perplexity(model, None, other, progress=False).nats, abs=1e-6)
    before = len(seen)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    study(model, texts, folder=tmp_path)
    assert len(seen) > before + len(ARMS)


def test_another_site_of_the_same_bits_is_measured_again(tmp_path, texts):
    model = families.build("llama", intermediate_size=16)
    sites = ("mlp_hidden", "mlp_out")
    masks = [NeuronMask.from_flat(np.arange(48) % 3 == 0, (16, 16, 16), site) for site in sites]
    tables = [study(model, texts, [Intervention("key", m)], folder=tmp_path) for m in masks]
    assert abs(tables[0].damage[1] - tables[1].damage[1]) > 1e-4


def test_names_decide_nothing(model, texts, tmp_path):
    '("random 1", no seed) and ("random", seed 1) are two arms if their masks differ, and one measurement if not.'
    arms = [Intervention("random 1", drawn(1)), Intervention("random", drawn(2), 1)]
    for _ in range(2):
        pd.testing.assert_frame_equal(study(model, texts, arms, folder=tmp_path), study(model, texts, arms))
    assert arms[0].mark != arms[1].mark and arms[0].mark == replace(arms[0], arm="random", seed=1).mark


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_interrupted_in_the_fourth_arm_and_resumed(model, texts, tmp_path, stop):
    whole, state = study(model, texts), families.state(model)
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 5:  # unmasked, three arms, and in the middle of the fourth
            raise stop("now")

    handle = model.get_output_embeddings().register_forward_hook(own_hook(interrupt))
    with pytest.raises(stop):
        study(model, texts, folder=tmp_path)
    handle.remove()
    assert families.state(model) == state, "no hook stays behind"
    assert len(list(tmp_path.iterdir())) == 4 and not list(tmp_path.glob(".*"))
    seen = counting(model)
    pd.testing.assert_frame_equal(study(model, texts, folder=tmp_path), whole, check_exact=True)
    assert len(seen) == 1 + len(ARMS) - 4


@pytest.mark.parametrize("folder", [None, "scores"])
def test_two_processes_give_the_same_table(model, texts, tmp_path, folder):
    folder, state = folder and tmp_path / folder, families.state(model)
    table = study(model, texts, folder=folder, n_jobs=2)
    pd.testing.assert_frame_equal(table, study(model, texts), check_exact=True)
    assert families.state(model) == state
    assert folder is None or len(list(folder.glob("*.safetensors"))) == 1 + len(ARMS)


def failing(texts, after):
    "Held-out texts that cannot be scored, which is noticed after so many seconds."

    def score(model):
        time.sleep(after)
        raise MemoryError("planted")

    return replace(loss_on("held out", texts), fingerprint="failing", tokens=1, score=score)


@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_what_is_measured_is_kept_when_another_job_fails(model, texts, backend):
    import joblib

    cache, words = ScoreCache(model, progress=False), loss_on("words", texts)
    with joblib.parallel_config(backend), pytest.raises(MemoryError):
        _measure_missing(cache, [*((arm, words) for arm in ARMS[:4]), (None, failing(texts, 2))], "words", 2)
    assert {cache.key(arm, words) for arm in ARMS[:4]} <= set(cache.known)


def test_two_arms_of_one_name_are_refused(model, texts):
    one, other = (Intervention("random", drawn(seed), 0) for seed in (2, 3))
    with pytest.raises(ArgumentError) as e:
        study(model, texts, [one, other])
    assert e.value.argument == "arms" and "random" in str(e.value)
    assert len(study(model, texts, [one, one])) == 3, "the same thing twice is no contradiction"
    for apart in ({"seed": 1}, {"arm": "other"}, {"positions": "after-first"}, {"labels": {"setting": "other"}}):
        assert len(study(model, texts, [one, replace(other, **apart)])) == 3


@pytest.mark.parametrize("entry", ["mean", "variance"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_networks_whose_moments_are_no_numbers_are_not_loaded(found, tmp_path, entry, value):
    spoiled = getattr(found, entry).clone()
    spoiled[3] = value
    replace(found, **{entry: spoiled}).save(tmp_path)
    with pytest.raises(ValueError) as e:
        Found.load(tmp_path)
    assert "found.safetensors" in str(e.value)


@pytest.mark.parametrize(
    "ratios, said_at_all", [([0.5, float("nan"), 0.0], True), ([float("nan")] * 3, False), ([0.5] * 3, True)]
)
def test_a_unit_without_variance_makes_no_summary_of_nan(ratios, said_at_all):
    rows = [
        {"arm": name, "seed": i, "variance_ratio": r, "overlap": 0.0} for name in MATCHED for i, r in enumerate(ratios)
    ]
    said = _said_of_match(pd.DataFrame(rows))
    assert bool(said) == said_at_all and not any("nan" in s for s in said)
    assert all(s.count("0.50") == 2 for s in said)


class HalfCharacters:
    "Of a byte-level tokenizer: token 0 and 1 are the two bytes of a character, 2 is a letter."

    def decode(self, ids):
        return ["\ufffd", "\ufffd", "a"][ids[0]]

    def convert_ids_to_tokens(self, token):
        return "Ã¤a"[token]


@pytest.mark.filterwarnings("ignore:masks")
def test_tokens_of_the_courses_are_named_by_their_bytes(found, tmp_path):
    values, at = torch.randn(30, 2000, generator=torch.Generator().manual_seed(0)), torch.arange(30)
    acts = Activations(values, at * 0, at, at % 3, at < 0, WIDTHS, (0, 1, 2), "mlp_hidden")
    courses = held_out_courses(found, tmp_path, lambda: (acts, HalfCharacters()))
    assert courses.tokens[:3] == ["<0xC3>", "<0xA4>", "a"]


def test_threads_of_one_process_do_not_mix_their_masks(model, texts):
    import joblib

    with joblib.parallel_config("threading"):
        table = study(model, texts, n_jobs=2)
    pd.testing.assert_frame_equal(table, study(model, texts), check_exact=True)


def test_training_mode_is_given_back(model, texts):
    model.train()
    state = families.state(model)
    trained = study(model, texts)
    assert families.state(model) == state
    pd.testing.assert_frame_equal(study(model.eval(), texts).drop(columns="part"), trained.drop(columns="part"))


def test_arms_above_the_vocabulary_are_flagged_and_kept(model, tmp_path):
    with torch.no_grad():  # a model that is sure of itself: its own continuations cost it next to nothing
        model.lm_head.weight *= 20
        ids = [[i] for i in (5, 9, 30)]
        for x in ids:
            for _ in range(20):
                x.append(int(model(torch.tensor([x])).logits[0, -1, 4:].argmax()) + 4)
    texts = EvalSet(families.tokenizer(), [" ".join(f"w{i}" for i in x) for x in ids])
    one = Intervention("one", NeuronMask.from_flat(np.arange(72) == 0, LLAMA, "mlp_hidden"))
    off = Intervention("all off", NeuronMask.full(LLAMA, "mlp_hidden"))
    table = study(model, texts, [one, off], folder=tmp_path)
    assert table.above_vocabulary.tolist() == (np.exp(table.value) > 48).tolist() == [False, False, True]
    assert table.recovered[2] == pytest.approx(0, abs=1e-9) and table.recovered[0] == 1 > table.recovered[1] > 0.5
    huge = replace(off, replace="mean", means=torch.full((72,), 3e38))  # finite, but their sum is not
    nan = study(model, texts, [huge], folder=tmp_path)
    assert not np.isfinite(nan.value[1]) and nan.above_vocabulary[1] and not nan.above_vocabulary[0]
    cache = ScoreCache(None, tmp_path, ScoreCache(model).identity, progress=False)
    pd.testing.assert_frame_equal(study(cache, texts, [huge]), nan)


def test_one_document_has_no_interval(model, tmp_path):
    texts = EvalSet(families.tokenizer(), TEXTS[:1])
    table = study(model, texts, ARMS[:1], folder=tmp_path)
    assert table.ci_low.isna().all() and table.damage.notna().all()
    pd.testing.assert_frame_equal(study(model, texts, ARMS[:1], folder=tmp_path), table)


def test_the_study_refuses(model, texts, tmp_path):
    seen = counting(model)
    for bad, error in ((None, TypeError), (TEXTS[0], TypeError), (TEXTS, ValueError)):
        with pytest.raises(error):
            study(model, bad, folder=tmp_path)
    with pytest.raises(ValueError):
        study(model, texts, [], folder=tmp_path)
    assert not seen and not list(tmp_path.iterdir()), "before anything was measured"
    state = families.state(model)
    with pytest.raises(ValueError):
        study(model, texts, [Intervention("key", NeuronMask.full((24, 24, 23)))])
    assert families.state(model) == state


def test_a_damaged_score_is_named(model, texts, tmp_path):
    table = study(model, texts, ARMS[:1], folder=tmp_path)
    write_json(tmp_path / f"{table.part[1]}.safetensors", {})
    with pytest.raises(ValueError) as e:
        study(model, texts, ARMS[:1], folder=tmp_path)
    assert table.part[1] in str(e.value)


# which texts


def test_first_texts():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert first_texts(TEXTS, 3) == TEXTS[:3] and first_texts(TEXTS, 4) == TEXTS
    with pytest.warns(UserWarning):
        assert first_texts(TEXTS, 5) == TEXTS


@pytest.mark.parametrize("wanted, n", [(1, 1), (20, 1), (21, 2), (44, 2), (45, 3), (66, 4)])
def test_enough_texts(wanted, n):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # 20, 24 (of 33), 7, 15 tokens
        assert enough_texts(families.tokenizer(), TEXTS, wanted, max_length=24) == TEXTS[:n]


def test_too_few_texts_are_taken_with_a_warning():
    with pytest.warns(UserWarning):
        assert enough_texts(families.tokenizer(), TEXTS, 67, max_length=24) == TEXTS


def test_a_text_set_may_be_a_dataset():
    from datasets import Dataset

    data = Dataset.from_dict({"text": TEXTS})
    assert first_texts(data, 2) == TEXTS[:2] and enough_texts(families.tokenizer(), data, 21, 24) == TEXTS[:2]


# from texts to a table

SMALL = Settings(n_components=4, n_init=2, fit_tokens=300, fit_length=48, fraction=0.1)
FIT = [families.words(60, s) for s in range(10)]


def test_networks_are_found_on_as_many_texts_as_give_the_tokens(model, tmp_path):
    from llmfact_nb.activations import capture

    found = find_networks(model, families.tokenizer(), FIT, SMALL, progress=False)
    acts = capture(model, families.tokenizer(), FIT[:7], "mlp_hidden", max_length=48, progress=False)  # 7 * 48 = 336
    nets = FunctionalNetworks(4, "temporal", True, "sinks", n_init=2, random_state=0).fit(acts)
    torch.testing.assert_close(found.networks.maps_, nets.maps_, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.mean, acts.values[~acts.sinks].mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.variance, acts.values[~acts.sinks].var(0, correction=0), rtol=1e-4, atol=1e-5)
    facts = found.facts
    assert (facts["texts"], facts["tokens"], facts["texts cut"], facts["neurons"]) == (7, 336, 7, 72)
    assert facts["tokens used"] == int((~acts.sinks).sum())
    assert facts["key neurons"] == 7 == sum(facts["key neurons per layer"]) == found.key.n
    assert facts["implied alpha"] == pytest.approx(nets.implied_alpha(0.1), abs=1e-3)
    streamed = find_networks(model, families.tokenizer(), FIT, SMALL, progress=False, path=tmp_path / "acts")
    assert streamed.key == found.key and any(tmp_path.iterdir()), "the activations went to the disk"


def test_a_model_with_few_positions_gets_its_tokens_or_a_warning(model):
    "The model reads 64 positions, the settings ask for 200 of each text: what counts is what was read."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        settings = replace(SMALL, fit_length=200)
        facts = find_networks(model, families.tokenizer(), FIT, settings, progress=False).facts
    assert facts["tokens"] >= 300 or any("300" in str(w.message) for w in said)


def test_key_arms_of_several_conditions_are_measured_by_one_call(model, texts):
    found = find_networks(model, families.tokenizer(), FIT, SMALL, progress=False)
    arms = key_arms(found, CONDITIONS, controls=2)
    table = measure(ScoreCache(model, progress=False), arms, [loss_on("words", texts)])
    assert len(table) == 1 + 2 * len(arm_plan(2))
    assert set(table.setting) == {"baseline", *(condition_name(*c) for c in CONDITIONS)}
    for condition in CONDITIONS:
        here = table[table.setting == condition_name(*condition)]
        off = here[here.arm == "all off"].damage.item()
        assert here.recovered.tolist() == pytest.approx(((off - here.damage) / off).tolist(), abs=1e-9)
