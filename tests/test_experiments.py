"""Pins a run: settings, the arms and their controls, ablations against hooks written by hand, what is measured again and what is not, interruption and resuming, and whose folder it is."""

import os
import random
import warnings
from dataclasses import asdict, replace

import families
import numpy as np
import pandas as pd
import pytest
import torch

from llmfact_nb.activations import Activations, capture
from llmfact_nb.evaluate import EvalSet, perplexity
from llmfact_nb.ablation import (
    PRESETS, Arm, Settings, ablation_study, claim_folder, condition_name, enough_texts, file_marks, find_networks, first_texts, key_arms, match_facts, run_experiment,
)  # fmt: skip
from llmfact_nb.base.files import read_json
from llmfact_nb.masks import NeuronMask, score_match
from llmfact_nb.networks import FunctionalNetworks

pytestmark = pytest.mark.filterwarnings("ignore:FastICA has not converged")
COLUMNS = [
    "condition",
    "replace",
    "positions",
    "arm",
    "seed",
    "units",
    "share",
    "nats",
    "damage",
    "ci_low",
    "ci_high",
    "perplexity",
    "broken",
    "counts",
]


# settings

BAD = {
    "site": ["mlp", None, ("mlp_out",)], "kind": ["time", None], "exclude": ["sink", False], "tail": ["left", None],
    "n_components": [0, 2.0, "8", None, 4097], "n_init": [0, None], "ica_seed": [-1, None, 0.0], "control_seeds": [0, 1.5], "fit_tokens": [0, 1e3], "fit_length": [0, None],
    "eval_texts": [0, "4"], "eval_length": [1, 0], "fraction": [0, -0.1, 1.1, float("nan")],
}  # fmt: skip


@pytest.mark.parametrize("name, value", [(n, v) for n, values in BAD.items() for v in values])
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        Settings(**{name: value})


@pytest.mark.parametrize("value", [0, -1.96, float("nan")])
def test_bad_alpha(value):
    with pytest.raises(ValueError, match="alpha="):
        Settings(alpha=value, fraction=None)


@pytest.mark.parametrize("both", [(None, None), (0.1, 2.0)])
def test_exactly_one_of_alpha_and_fraction(both):
    with pytest.raises(ValueError, match="exactly one"):
        Settings(fraction=both[0], alpha=both[1])


@pytest.mark.parametrize(
    "conditions", [(), (("median", "all"),), (("zero", "first"),), (("mean",),), ("zero", "all")], ids=str
)
def test_bad_conditions_are_refused_before_the_fit(conditions):
    with pytest.raises(ValueError, match="conditions="):
        Settings(conditions=conditions)


def test_infinite_alpha_is_refused_before_the_fit():
    with pytest.raises(ValueError, match="alpha="):
        Settings(alpha=float("inf"), fraction=None)


def test_settings_at_the_edge():
    Settings(
        ica_seed=0, control_seeds=1, eval_length=2, fraction=1, n_components=7, fit_tokens=7, exclude=None, n_init=1
    )
    assert Settings(alpha=3.6, fraction=None, tail="raw").key_rule == {"alpha": 3.6, "tail": "raw", "fraction": None}


def test_presets_are_those_of_the_design():
    common = {"kind": "temporal", "model": "smollm2-135m", "texts": "wiki"}
    recommended = common | dict(
        site="mlp_hidden", n_components=32, n_init=10, standardize=True, exclude="sinks", fraction=0.01, alpha=None
    )
    paper = common | dict(
        site="mlp_out",
        n_components=10,
        standardize=False,
        exclude=None,
        fraction=None,
        tail="raw",
        conditions=(("zero", "all"),),
    )
    for name, wanted in (("recommended", recommended), ("paper", paper)):
        assert {k: getattr(PRESETS[name], k) for k in wanted} == wanted
    assert PRESETS["recommended"] == Settings() and Settings().fit_tokens >= 4096
    assert Settings().conditions == (("mean", "after-first"), ("zero", "after-first"), ("zero", "all"))
    assert PRESETS["paper"].alpha in (1.96, 3.6) and set(PRESETS) == {"recommended", "paper"}
    assert (
        condition_name("mean", "after-first") == "mean, after the first token"
        and condition_name("zero", "all") == "zero, all tokens"
    )


# arms

WIDTHS, DEPTHS = (600, 900, 500), (0, 1, 2)


@pytest.fixture(scope="module")
def found():
    "Networks fitted on hand-made activations, and each neuron's variance."
    rng = np.random.RandomState(0)
    N = sum(WIDTHS)
    maps = (rng.rand(4, N) < 0.08) * (1 + rng.exponential(size=(4, N)))
    values = torch.tensor(
        (rng.laplace(size=(500, 4)) @ maps + rng.randn(500, N)) * rng.lognormal(size=N), dtype=torch.float32
    )  # loud and quiet members alike
    positions = torch.arange(500) % 100
    acts = Activations(
        values, torch.arange(500) // 100, positions, positions, positions == 0, WIDTHS, DEPTHS, "mlp_hidden"
    )
    nets = FunctionalNetworks(4, standardize=True, exclude="sinks").fit(acts)
    return nets, acts.moments(nets.rows_)[1]


def named(arms, name):
    return [a for a in arms if a.name == name]


@pytest.mark.parametrize(
    "rule",
    [dict(fraction=0.06), dict(fraction=None, alpha=1.96, tail="raw"), dict(fraction=None, alpha=2.5, tail="both")],
    ids=str,
)
def test_arms_and_their_controls(found, rule):
    nets, variance = found
    settings = Settings(control_seeds=3, **rule)
    arms = key_arms(nets, variance, settings)
    (key,) = named(arms, "key")
    assert key.mask == nets.key_neurons(**settings.key_rule) and key.seed is None and not key.keep
    assert {a.name: len(named(arms, a.name)) for a in arms} == {
        "key": 1, "random": 3, "matched random": 3, "matched shuffle": 3, "top variance": 1, "PCA": 1, "keep key": 1, "keep random": 1, "all off": 1,
    }  # fmt: skip
    for name in ("random", "matched random", "matched shuffle"):
        controls = named(arms, name)
        assert [a.seed for a in controls] == [0, 1, 2] and not any(a.keep for a in controls)
        assert len({a.mask for a in controls}) == 3, "the seeds differ"
        for a in controls:
            assert a.mask.counts == key.mask.counts and a.mask != key.mask
            if name != "matched shuffle":
                assert (a.mask & key.mask).n == 0
    (top,) = named(arms, "top variance")
    for row, score, n in zip(top.mask.layers, variance.split(WIDTHS), key.mask.counts):
        assert not n or score[row].min() >= score[~row].max() and row.sum() == n
    (pca,) = named(arms, "PCA")
    assert pca.mask == nets.alternative("pca").key_neurons(**settings.key_rule) and pca.mask != key.mask
    if settings.fraction:
        assert pca.mask.n == key.mask.n
    (keep,), (keep_random,), (off,) = (named(arms, n) for n in ("keep key", "keep random", "all off"))
    assert keep.mask == key.mask and keep.masked == ~key.mask and key.masked == key.mask
    assert keep_random.mask == named(arms, "random")[0].mask and keep_random.masked == ~keep_random.mask
    assert off.masked.n == off.masked.n_neurons == 2000
    assert all(a.mask.site == "mlp_hidden" and a.mask.depths == DEPTHS for a in arms)
    assert len({(a.name, a.seed) for a in arms}) == len(arms)


def test_variance_matched_controls_are_closer_than_random_ones(found):
    nets, variance = found
    arms = key_arms(nets, variance, Settings(fraction=0.1, control_seeds=5))
    off = lambda name: np.mean(
        [abs(score_match(arms[0].mask, a.mask, variance)["log_ratio"]) for a in named(arms, name)]
    )
    assert off("matched shuffle") < 0.5 * off("random") and off("matched random") < 0.8 * off("random")


def test_controls_of_narrow_layers_are_still_draws(found):
    "Layers of 64 units: with more bins than units, every bin's only candidate is the key neuron itself, and a shuffle would be no control but the key neurons again."
    rng = np.random.RandomState(0)
    acts = Activations(
        torch.tensor(rng.laplace(size=(300, 128)), dtype=torch.float32),
        *(torch.arange(300),) * 3,
        torch.zeros(300, dtype=torch.bool),
        (64, 64),
        (0, 1),
        "mlp_hidden",
    )
    nets = FunctionalNetworks(4).fit(acts)
    arms = key_arms(nets, acts.moments()[1], Settings(fraction=0.1, control_seeds=3))
    for name in ("matched random", "matched shuffle"):
        masks = {a.mask for a in named(arms, name)}
        assert arms[0].mask not in masks and len(masks) > 1, (
            f"{name}: {len(masks)} different masks in 3 seeds, overlap {[(m & arms[0].mask).n for m in masks]} of {arms[0].mask.n}"
        )


def test_arms_are_reproducible_and_their_match_is_no_warning(found):
    nets, variance = found
    states = lambda: (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate())
    before, settings = states(), Settings(fraction=0.6, control_seeds=2)  # so many that no disjoint control exists
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arms = key_arms(nets, variance, Settings(fraction=0.1, control_seeds=2))
    assert arms == key_arms(nets, variance, Settings(fraction=0.1, control_seeds=2)) and states() == before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        crowded = key_arms(nets, variance, settings)
    assert all(a.mask.counts == crowded[0].mask.counts for a in named(crowded, "random"))


def test_no_key_neurons_are_refused(found):
    largest = float(found[0].maps_.abs().max())
    with pytest.raises(ValueError, match=f"alpha=1000.*{largest:.2f}"):
        key_arms(*found, Settings(fraction=None, alpha=1000))


def test_match_facts(found):
    nets, variance = found
    arms = key_arms(nets, variance, Settings(fraction=0.06, control_seeds=3))
    facts = match_facts(arms, variance)
    assert set(facts) == {"matched random", "matched shuffle"} and facts["matched random"]["overlap"] == 0
    v, key = variance.double().numpy(), arms[0].mask.flat.numpy()
    for name, values in facts.items():
        controls = [a.mask.flat.numpy() for a in named(arms, name)]
        assert values["log_ratio"] == pytest.approx(
            np.mean([np.log(v[c]).mean() - np.log(v[key]).mean() for c in controls]), abs=1e-6
        )
        assert values["sum_ratio"] == pytest.approx(np.mean([v[c].sum() / v[key].sum() for c in controls]), rel=1e-6)
        assert values["overlap"] == pytest.approx(np.mean([(c & key).sum() / key.sum() for c in controls]))
    dead = variance.clone()
    dead[arms[0].mask.flat.nonzero()[0]] = 0
    assert match_facts(arms, dead)["matched random"]["log_ratio"] is None, "JSON knows no nan"
    assert match_facts(arms[:1], variance) == {"matched random": {}, "matched shuffle": {}}


# the study

LLAMA = (24, 24, 24)
TEXTS = [families.words(n, seed) for seed, n in enumerate((20, 33, 7, 15))]


@pytest.fixture
def model():
    return families.build("llama")


@pytest.fixture
def texts():
    return EvalSet(families.tokenizer(), TEXTS, max_length=24)


def drawn(seed, share=0.3, site="mlp_hidden"):
    widths = LLAMA if site == "mlp_hidden" else (16, 16, 16)
    return NeuronMask.from_flat(np.random.default_rng(seed).random(sum(widths)) < share, widths, site)


ARMS = [
    Arm("key", drawn(1)),
    Arm("random", drawn(2), 0),
    Arm("random", drawn(3), 1),
    Arm("keep key", drawn(1), keep=True),
    Arm("all off", NeuronMask.full(LLAMA, "mlp_hidden")),
]
MEANS = torch.randn(72, generator=torch.Generator().manual_seed(5))
CONDITIONS = (("mean", "after-first"), ("zero", "all"))
N_PARTS = 1 + len(ARMS) * len(CONDITIONS)


def study(model, texts, arms=ARMS, conditions=CONDITIONS, means=MEANS, **kw):
    return ablation_study(model, texts, arms, conditions, means, progress=False, **kw)


def counting(model):
    "A list that grows by one with every forward pass; all texts fit into one batch, so that is one for every arm measured."
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda *_: seen.append(1))
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
            total += float(
                torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].double(), ids[0, 1:], reduction="sum")
            )
            n += ids.shape[1] - 1
    for h in handles:
        h.remove()
    return total / n


@pytest.mark.parametrize("site", ["mlp_hidden", "mlp_out"])
def test_the_numbers_are_those_of_hooks_by_hand(model, texts, site):
    full = NeuronMask.full((24 if site == "mlp_hidden" else 16,) * 3, site)
    arms = [
        Arm("key", drawn(1, site=site)),
        Arm("random", drawn(2, site=site), 1),
        Arm("keep key", drawn(1, site=site), keep=True),
        Arm("all off", full),
    ]
    means = MEANS[: full.n]
    state = families.state(model)
    conditions = [(how, positions) for how in ("mean", "zero") for positions in ("after-first", "all")]
    table = study(model, texts, arms, conditions, means)
    assert families.state(model) == state
    assert list(table.columns) == COLUMNS and len(table) == 1 + 4 * 4
    base = by_hand(model, TEXTS, torch.zeros(full.n, dtype=torch.bool), site, means, False)
    first = table.iloc[0]
    assert (first.arm, first.units, first.share, first.damage, first.condition, first.counts) == (
        "unmasked",
        0,
        0,
        0,
        "",
        "",
    ) and first.nats == pytest.approx(base, abs=1e-5)
    rows = iter(table.iloc[1:].itertuples())
    nats = []
    for how, positions in conditions:
        for arm in arms:
            row, flat = next(rows), ~arm.mask.flat if arm.keep else arm.mask.flat
            expected = by_hand(
                model, TEXTS, flat, site, means if how == "mean" else torch.zeros(full.n), positions == "after-first"
            )
            assert (row.arm, row.replace, row.positions, row.condition) == (
                arm.name,
                how,
                positions,
                condition_name(how, positions),
            )
            assert pd.isna(row.seed) if arm.seed is None else row.seed == arm.seed
            assert row.nats == pytest.approx(expected, abs=2e-5) and row.damage == pytest.approx(
                expected - base, abs=4e-5
            )
            assert row.perplexity == pytest.approx(np.exp(expected), rel=1e-4) and row.ci_low < row.damage < row.ci_high
            assert row.units == int(flat.sum()) and row.share == pytest.approx(float(flat.float().mean()))
            assert row.counts == " ".join(str(int(r.sum())) for r in flat.split([full.n // 3] * 3))
            nats.append(expected)
    assert len({round(x, 4) for x in nats}) == 16, (
        "every arm and condition has a number of its own, so none can be mistaken for another"
    )


def test_the_whole_table_comes_back_without_a_forward(model, texts, tmp_path):
    seen = counting(model)
    table = study(model, texts, folder=tmp_path)
    assert len(seen) == N_PARTS
    pd.testing.assert_frame_equal(study(model, texts, folder=tmp_path), table, check_exact=True)
    pd.testing.assert_frame_equal(
        study(lambda: pytest.fail("loaded"), None, folder=tmp_path, identity=texts.fingerprint), table, check_exact=True
    )
    assert len(seen) == N_PARTS
    pd.testing.assert_frame_equal(study(model, texts), table, check_exact=True)
    assert len(seen) == 2 * N_PARTS, "without a folder nothing is kept"


STALE = {  # what changed, and how many of the 1 + 5 * 2 measurements it touches
    "another mask in one arm": (dict(arms=[Arm("key", drawn(9)), *ARMS[1:]]), 2),
    "kept instead of ablated": (dict(arms=[Arm("key", drawn(1), keep=True), *ARMS[1:]]), 2),
    "other means": (dict(means=MEANS + 1e-3), 5),
    "another identity": (dict(identity="another model"), 11),
    "one more arm": (dict(arms=[*ARMS, Arm("random", drawn(4), 2)]), 2),
    "other order": (dict(arms=ARMS[::-1], conditions=CONDITIONS[::-1]), 0),
    "means in float64": (dict(means=MEANS.double()), 0),
}


@pytest.mark.parametrize("change, measured", STALE.values(), ids=STALE)
def test_stale_parts_are_measured_again_and_finished_ones_are_not(model, texts, tmp_path, change, measured):
    study(model, texts, folder=tmp_path)
    seen = counting(model)
    table = study(model, texts, folder=tmp_path, **change)
    assert len(seen) == measured
    pd.testing.assert_frame_equal(table, study(model, texts, **change), check_exact=False, atol=1e-6)
    assert len(study(model, texts, folder=tmp_path, **change)) == len(table) and len(seen) == measured + 1 + (
        len(table) - 1
    ), "now they are finished"


def test_other_texts_are_measured_again(model, texts, tmp_path):
    study(model, texts, folder=tmp_path)
    seen = counting(model)
    other = EvalSet(families.tokenizer(), TEXTS[:3], max_length=24)
    table = study(model, other, folder=tmp_path)
    assert len(seen) == N_PARTS and table.nats[0] == pytest.approx(
        perplexity(model, None, other, progress=False).nats, abs=1e-6
    )


def test_another_site_of_the_same_bits_is_measured_again(tmp_path, texts):
    model = families.build("llama", intermediate_size=16)
    masks = {
        site: NeuronMask.from_flat(np.arange(48) % 3 == 0, (16, 16, 16), site) for site in ("mlp_hidden", "mlp_out")
    }
    tables = [study(model, texts, [Arm("key", m)], (("zero", "all"),), folder=tmp_path) for m in masks.values()]
    assert abs(tables[0].damage[1] - tables[1].damage[1]) > 1e-4


def test_arms_that_fall_on_one_file_stay_apart(model, texts, tmp_path):
    arms = [Arm("random 1", drawn(1)), Arm("random", drawn(2), 1)]
    for _ in range(2):
        pd.testing.assert_frame_equal(study(model, texts, arms, folder=tmp_path), study(model, texts, arms))


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_interrupted_in_the_fourth_arm_and_resumed(model, texts, tmp_path, stop):
    whole, state = study(model, texts), families.state(model)
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 5:  # unmasked, three arms, and in the middle of the fourth
            raise stop("now")

    handle = model.get_output_embeddings().register_forward_hook(interrupt)
    with pytest.raises(stop, match="now"):
        study(model, texts, folder=tmp_path)
    handle.remove()
    assert families.state(model) == state, "no hook stays behind"
    assert len(list(tmp_path.iterdir())) == 4 and not list(tmp_path.glob(".*"))
    seen = counting(model)
    pd.testing.assert_frame_equal(study(model, texts, folder=tmp_path), whole, check_exact=True)
    assert len(seen) == N_PARTS - 4


def test_training_mode_is_given_back(model, texts):
    model.train()
    state = families.state(model)
    trained = study(model, texts)
    assert families.state(model) == state
    pd.testing.assert_frame_equal(study(model.eval(), texts), trained)


def test_broken_arms_are_flagged_and_kept(model, tmp_path):
    with (
        torch.no_grad()
    ):  # a model that is sure of itself: its own continuations cost it next to nothing, until its MLPs are gone
        model.lm_head.weight *= 20
        ids = [[i] for i in (5, 9, 30)]
        for x in ids:
            for _ in range(20):
                x.append(int(model(torch.tensor([x])).logits[0, -1, 4:].argmax()) + 4)
    texts = EvalSet(families.tokenizer(), [" ".join(f"w{i}" for i in x) for x in ids])
    arms = [Arm("one", NeuronMask.from_flat(np.arange(72) == 0, LLAMA, "mlp_hidden")), ARMS[-1]]
    table = study(model, texts, arms, (("zero", "all"),), folder=tmp_path)
    assert table.broken.tolist() == (table.perplexity > 48).tolist() and not table.broken[0] and table.broken[2]
    nan = study(
        model, texts, arms[1:], (("mean", "all"),), torch.full((72,), 3e38), folder=tmp_path
    )  # finite, but their sum is not
    assert not np.isfinite(nan.nats[1]) and nan.broken[1] and not nan.broken[0]
    pd.testing.assert_frame_equal(
        study(
            lambda: pytest.fail("loaded"),
            None,
            arms[1:],
            (("mean", "all"),),
            torch.full((72,), 3e38),
            folder=tmp_path,
            identity=texts.fingerprint,
        ),
        nan,
    )


def test_one_document_has_no_interval(model, tmp_path):
    texts = EvalSet(families.tokenizer(), TEXTS[:1])
    table = study(model, texts, ARMS[:1], folder=tmp_path)
    assert table.ci_low.isna().all() and table.damage.notna().all()
    pd.testing.assert_frame_equal(study(model, texts, ARMS[:1], folder=tmp_path), table)


def test_the_study_refuses(model, texts, tmp_path):
    seen = counting(model)
    for change, error, says in (
        (dict(arms=[*ARMS, Arm("random", drawn(7), 1)]), ValueError, "'random', 1"),
        (dict(arms=[ARMS[0], ARMS[0]]), ValueError, "twice"),
        (dict(arms=[]), ValueError, "arms has 0"),
        (dict(conditions=()), ValueError, "conditions 0"),
        (dict(means=None), ValueError, "means="),
    ):
        with pytest.raises(error, match=says):
            study(model, texts, folder=tmp_path, **change)
    for bad in (TEXTS, None, TEXTS[0]):
        with pytest.raises(TypeError, match="expected an EvalSet"):
            study(model, bad, folder=tmp_path)
    assert not seen and not list(tmp_path.iterdir()), "before anything was measured"
    study(model, texts, means=None, conditions=(("zero", "all"),))  # zeros need no means
    state = families.state(model)
    for change in (
        dict(conditions=(("median", "all"),)),
        dict(conditions=(("zero", "first"),)),
        dict(means=MEANS[:-1]),
        dict(arms=[Arm("key", NeuronMask.full((24, 24, 23)))]),
    ):
        with pytest.raises(ValueError):
            study(model, texts, **change)
    assert families.state(model) == state


# which texts


def test_first_texts():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert first_texts(TEXTS, 3) == TEXTS[:3] and first_texts(TEXTS, 4) == TEXTS
    with pytest.warns(UserWarning, match="only 4 held-out texts; 5 were asked"):
        assert first_texts(TEXTS, 5) == TEXTS


@pytest.mark.parametrize("wanted, n", [(1, 1), (20, 1), (21, 2), (44, 2), (45, 3), (66, 4)])
def test_enough_texts(wanted, n):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            enough_texts(families.tokenizer(), TEXTS, wanted, max_length=24) == TEXTS[:n]
        )  # 20, 24 (of 33), 7, 15 tokens


def test_too_few_texts_are_taken_with_a_warning():
    with pytest.warns(UserWarning, match="only 66 tokens at 24 a text; 67 were asked for"):
        assert enough_texts(families.tokenizer(), TEXTS, 67, max_length=24) == TEXTS


def test_a_text_set_may_be_a_dataset():
    from datasets import Dataset

    data = Dataset.from_dict({"text": TEXTS})
    assert first_texts(data, 2) == TEXTS[:2] and enough_texts(families.tokenizer(), data, 21, 24) == TEXTS[:2]


def test_a_model_with_few_positions_gets_its_tokens_or_a_warning(model):
    "The model reads 64 positions, the settings ask for 200 of each text: what counts is what was read."
    settings = Settings(n_components=3, n_init=1, fit_tokens=300, fit_length=200, fraction=0.1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        facts = find_networks(
            model, families.tokenizer(), [families.words(100, s) for s in range(10)], settings, progress=False
        ).facts
    assert facts["tokens"] >= 300 or any("300 were asked for" in str(w.message) for w in said), (
        f"{facts['tokens']} tokens of 300, and not a word"
    )


# folders


def start(folder, settings, beside=None):
    "As far as a run must come to own its folder."
    claim_folder(folder, settings, beside)
    (folder / "parts").mkdir(exist_ok=True)
    (folder / "parts" / "facts.json").write_text("{}")
    return folder


def test_the_same_run_resumes(tmp_path):
    for name, preset in PRESETS.items():
        folder = start(tmp_path / name, preset, {"device": "cpu", "revision": None})
        before = (folder / "settings.json").read_bytes()
        assert claim_folder(folder, replace(preset), {"device": "cpu", "revision": None}) == folder
        assert (
            claim_folder(str(folder), preset, {"revision": None, "device": "cpu"}) == folder
            and (folder / "settings.json").read_bytes() == before
        )


OTHER = dict(
    model="gpt2", texts="sotu", site="mlp_out", kind="spatial", n_components=31, standardize=False, exclude=None, n_init=9, ica_seed=1, fraction=0.02, tail="both",
    conditions=(("zero", "all"),), control_seeds=2, fit_tokens=4097, fit_length=255, eval_texts=13, eval_length=129,
)  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_another_setting_is_refused_with_both_values(name, tmp_path):
    start(tmp_path / "run", Settings())
    before = (tmp_path / "run" / "settings.json").read_bytes()
    shown = lambda v: repr(list(map(list, v)) if name == "conditions" else v)
    with pytest.raises(ValueError) as e:
        claim_folder(tmp_path / "run", Settings(**{name: OTHER[name]}))
    assert f"({name}: {shown(getattr(Settings(), name))} there, {shown(OTHER[name])} now)" in str(e.value) and str(
        tmp_path / "run"
    ) in str(e.value)
    assert (tmp_path / "run" / "settings.json").read_bytes() == before


def test_every_setting_is_compared():
    assert set(OTHER) | {"alpha"} == set(asdict(Settings()))


@pytest.mark.parametrize(
    "there, now", [({"device": "cpu"}, {"device": "cuda"}), ({"revision": "a"}, {}), ({}, {"revision": "a"})], ids=str
)
def test_another_device_or_revision_is_refused(there, now, tmp_path):
    start(tmp_path, Settings(), there)
    with pytest.raises(ValueError, match="(device|revision): .* there, .* now"):
        claim_folder(tmp_path, Settings(), now)


def test_another_release_is_refused(tmp_path, monkeypatch):
    start(tmp_path, Settings())
    monkeypatch.setattr("llmfact_nb.ablation.__version__", "99.0")
    with pytest.raises(ValueError, match="llmfact_nb: .* there, '99.0' now"):
        claim_folder(tmp_path, Settings())


def test_a_folder_whose_run_came_to_nothing_is_free(tmp_path):
    claim_folder(tmp_path, Settings())
    claim_folder(tmp_path, Settings(n_components=9))
    assert read_json(tmp_path / "settings.json")["n_components"] == 9
    start(tmp_path, Settings(n_components=9))
    with pytest.raises(ValueError, match="n_components: 9 there, 32 now"):
        claim_folder(tmp_path, Settings())


@pytest.mark.parametrize("change", ["size", "time", "a new file", "a file less"])
@pytest.mark.parametrize("field", ["model", "texts"])
def test_changed_files_are_refused(field, change, tmp_path):
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    for name in ("a.bin", "deep/b.bin"):
        (source / name).write_text("12345")
        os.utime(source / name, ns=(10**18, 10**18))
    settings = Settings(**{field: str(source)})
    start(tmp_path / "run", settings)
    claim_folder(tmp_path / "run", settings)
    if change == "size":
        (source / "deep/b.bin").write_text("123456")
        os.utime(source / "deep/b.bin", ns=(10**18, 10**18))
    elif change == "time":
        os.utime(source / "deep/b.bin", ns=(10**18, 10**18 + 1000))
    elif change == "a new file":
        (source / "c.bin").write_text("1")
    else:
        (source / "a.bin").unlink()
    with pytest.raises(ValueError, match=f"{'text' if field == 'texts' else field} files: .*b.bin.* there, .* now"):
        claim_folder(tmp_path / "run", settings)


def test_file_marks(tmp_path):
    (tmp_path / "m.gguf").write_text("123")
    os.utime(tmp_path / "m.gguf", ns=(5, 7000))
    assert file_marks(str(tmp_path / "m.gguf")) == {"m.gguf": [3, 7000]} and file_marks("no-such/model") == {}


# a whole run

SMALL = Settings(
    model="tiny", texts="made-up", n_components=4, n_init=2, fit_tokens=300, fit_length=48, eval_texts=3, eval_length=30, control_seeds=2, fraction=0.1,
    conditions=(("mean", "after-first"), ("zero", "all")),
)  # fmt: skip
SPLITS = {"fit": [families.words(60, s) for s in range(10)], "eval": [families.words(50, s) for s in range(100, 105)]}
N_ARMS = 1 + (1 + 3 * 2 + 5) * 2


class Sources:
    "What a run is given, noting what it asked for."

    def __init__(self):
        self.model, self.asked = families.build("llama"), []
        self.forwards = counting(self.model)

    def load(self):
        self.asked.append("model")
        return self.model, families.tokenizer()

    def texts(self, split):
        self.asked.append(split)
        return SPLITS[split]


def run(folder, sources, settings=SMALL, **kw):
    return run_experiment(settings, folder, sources.load, sources.texts, progress=False, **kw)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder, sources = tmp_path_factory.mktemp("done"), Sources()
    return folder, sources, *run(folder, sources)


def test_a_run_fits_on_one_split_and_scores_the_other(done):
    _, sources, found, table = done
    assert sources.asked == ["fit", "model", "model", "eval"] and len(table) == N_ARMS
    acts = capture(
        sources.model, families.tokenizer(), SPLITS["fit"][:7], "mlp_hidden", max_length=48, progress=False
    )  # 7 * 48 = 336 tokens
    nets = FunctionalNetworks(4, "temporal", True, "sinks", n_init=2, random_state=0).fit(acts)
    torch.testing.assert_close(found.networks.maps_, nets.maps_, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.mean, acts.values[~acts.sinks].mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.variance, acts.values[~acts.sinks].var(0, correction=0), rtol=1e-4, atol=1e-5)
    facts = found.facts
    assert (facts["texts"], facts["tokens"], facts["tokens used"], facts["texts cut"], facts["neurons"]) == (
        7,
        336,
        int((~acts.sinks).sum()),
        7,
        72,
    )
    assert facts["key neurons"] == 7 == sum(facts["key neurons per layer"]) and facts["implied alpha"] == pytest.approx(
        nets.implied_alpha(0.1), abs=1e-3
    )
    scored = EvalSet(families.tokenizer(), SPLITS["eval"][:3], max_length=30)
    assert table.nats[0] == pytest.approx(perplexity(sources.model, None, scored, progress=False).nats, abs=1e-6)
    key = table[(table.arm == "key") & (table["replace"] == "zero")].iloc[0]
    flat = found.networks.key_neurons(fraction=0.1).flat
    hand = lambda rows: by_hand(
        sources.model, SPLITS["eval"][:3], rows, "mlp_hidden", torch.zeros(72), False, length=30
    )
    assert key.damage == pytest.approx(hand(flat) - hand(torch.zeros(72, dtype=torch.bool)), abs=5e-5)
    assert found.facts["match of the controls"] == match_facts(
        key_arms(found.networks, found.variance, SMALL), found.variance
    )


def test_the_second_time_nothing_is_loaded(done):
    folder, sources, found, table = done
    asked, forwards, files = (
        list(sources.asked),
        len(sources.forwards),
        {p: p.stat().st_mtime_ns for p in folder.rglob("*")},
    )
    again, results = run(folder, sources)
    assert sources.asked == asked and len(sources.forwards) == forwards
    pd.testing.assert_frame_equal(results, table, check_exact=True)
    assert (
        again.facts == found.facts
        and torch.equal(again.mean, found.mean)
        and torch.equal(again.variance, found.variance)
    )
    assert torch.equal(again.networks.maps_, found.networks.maps_)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == files, "and nothing is written"


def test_the_same_seed_gives_the_same_table_twice(done, tmp_path):
    found, table = run(tmp_path, Sources())
    pd.testing.assert_frame_equal(table, done[3], check_exact=True)
    assert torch.equal(found.networks.maps_, done[2].networks.maps_)


def test_an_interrupted_run_keeps_its_fit_and_its_arms(done, tmp_path):
    whole, sources = done[3], Sources()

    def stop(*_):
        if len(list((tmp_path / "parts").glob("arms/*"))) == 4:
            raise KeyboardInterrupt

    handle = sources.model.get_output_embeddings().register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, sources)
    handle.remove()
    fitted = (tmp_path / "networks.safetensors").stat().st_mtime_ns
    sources.asked.clear(), sources.forwards.clear()
    _, table = run(tmp_path, sources)
    assert (
        sources.asked == ["model", "eval"]
        and len(sources.forwards) == N_ARMS - 4
        and (tmp_path / "networks.safetensors").stat().st_mtime_ns == fitted
    )
    pd.testing.assert_frame_equal(table, whole, check_exact=False, rtol=1e-5, atol=1e-6)


def test_a_run_stopped_before_its_fit_was_whole_fits_again(done, tmp_path, monkeypatch):
    sources = Sources()
    with monkeypatch.context() as m:
        m.setattr(FunctionalNetworks, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            run(tmp_path, sources)
    _, table = run(tmp_path, sources)
    assert sources.asked.count("fit") == 2
    pd.testing.assert_frame_equal(table, done[3], check_exact=False, rtol=1e-5, atol=1e-6)


def test_unknown_texts_are_refused_before_the_model_is_loaded(tmp_path):
    sources = Sources()
    with pytest.raises(KeyError):
        run_experiment(SMALL, tmp_path, sources.load, {}.__getitem__, progress=False)
    assert sources.asked == []
    run(tmp_path, sources, replace(SMALL, n_components=3))  # and the folder is still free


def test_another_run_is_refused_before_anything_is_loaded(done):
    sources = Sources()
    with pytest.raises(ValueError, match="ica_seed: 0 there, 1 now"):
        run(done[0], sources, replace(SMALL, ica_seed=1))
    with pytest.raises(ValueError, match="device: None there, 'cuda' now"):
        run(done[0], sources, beside={"device": "cuda"})
    assert sources.asked == []


def test_parts_of_other_settings_are_never_taken(tmp_path):
    "settings.json is gone, by hand or by accident: whose the networks are is not known any more."
    run(tmp_path, Sources())
    (tmp_path / "settings.json").unlink()
    other = replace(SMALL, n_components=3)
    try:
        found, _ = run(tmp_path, Sources(), other)
    except ValueError:
        return  # refusing is as good
    assert len(found.networks.maps_) == 3
