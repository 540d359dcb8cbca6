"""Pins NeuronMask as a value (equal, hashable, immutable, saved and loaded whole), its set algebra against Python
sets, what controls promise per layer and per seed, and reading activations through masks."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from refusals import refused

from llmfact_nb.masks import (
    Layout,
    NeuronMask,
    apply_mask_and_average,
    apply_mask_any,
    common_layout,
    disjoint,
    n_shared,
    named_masks,
    score_match,
    union,
)

WIDTHS = (7, 12, 1, 30)
N = sum(WIDTHS)


def random_mask(seed, widths=WIDTHS, share=0.3, **kwargs):
    return NeuronMask.from_flat(np.random.default_rng(seed).random(sum(widths)) < share, widths, **kwargs)


@pytest.mark.parametrize("seed", range(5))
def test_algebra_is_that_of_python_sets(seed):
    a, b = random_mask(seed), random_mask(seed + 100, share=0.6)
    units = lambda m: set(m.flat.nonzero().flatten().tolist())
    assert units(a | b) == units(a) | units(b)
    assert units(a & b) == units(a) & units(b)
    assert units(a - b) == units(a) - units(b)
    assert units(a ^ b) == units(a) ^ units(b)
    assert units(~a) == set(range(N)) - units(a)


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
def test_equal_however_built(kind):
    flat = (np.arange(N) % 3 == 0).tolist()
    a = NeuronMask.from_flat(kind(flat), WIDTHS, "mlp_out")
    b = NeuronMask.from_layers(np.split(np.array(flat), np.cumsum(WIDTHS)[:-1]), "mlp_out")
    assert a == b and hash(a) == hash(b)
    assert a.flat.tolist() == flat and a.flat.dtype == torch.bool and torch.equal(torch.cat(a.layers), a.flat)
    assert (
        a.counts == tuple(int(row.sum()) for row in a.layers) and a.n == sum(a.counts) == sum(flat) and a.n_neurons == N
    )


@pytest.mark.parametrize("site", [None, "mlp_out", "mlp_hidden", ("h.0.mlp", "h.3.mlp", "h.4.mlp", "h.9.mlp")])
@pytest.mark.parametrize("depths", [None, (0, 3, 4, 9)])
def test_saved_copied_pickled_whole(tmp_path, site, depths):
    a = random_mask(1, site=site, depths=depths)
    a.save(tmp_path / "a.safetensors")
    for b in (NeuronMask.load(tmp_path / "a.safetensors"), copy.deepcopy(a), pickle.loads(pickle.dumps(a))):
        assert a == b and hash(a) == hash(b) and b.site == site and b.depths == (depths or (0, 1, 2, 3))


def test_what_differs_is_not_equal():
    flat = random_mask(1).flat
    variants = [
        NeuronMask.from_flat(flat, WIDTHS),
        NeuronMask.from_flat(flat, WIDTHS, "mlp_out"),
        NeuronMask.from_flat(flat, WIDTHS, "mlp_hidden"),
        NeuronMask.from_flat(flat, WIDTHS, depths=(1, 2, 3, 4)),
        NeuronMask.from_flat(flat, (8, 11, 1, 30)),
        NeuronMask.from_flat(~flat, WIDTHS),
    ]
    assert len(set(variants)) == len(variants) and variants[0] != "mask"


def test_a_mask_cannot_be_changed():
    source = random_mask(1).flat
    a = NeuronMask.from_flat(source, WIDTHS)
    before = a.flat
    source[:] = True
    a.flat[:] = True
    a.layers[0][:] = True
    assert torch.equal(a.flat, before)
    with pytest.raises(AttributeError):
        a.site = "mlp_out"


def test_masks_that_do_not_belong_together():
    a = random_mask(1, site="mlp_out")
    for other in (
        random_mask(1, site="mlp_hidden"),
        random_mask(1, (25, 25)),
        random_mask(1, depths=(0, 1, 2, 4)),
        random_mask(1, tuple(reversed(WIDTHS))),
    ):
        for operation in (
            lambda: a | other,
            lambda: a & other,
            lambda: a - other,
            lambda: a ^ other,
            lambda: common_layout([a, other]),
            lambda: a.matched_top(np.arange(N), exclude=other),
        ):
            with pytest.raises(ValueError) as e:
                operation()
            assert repr(a) in str(e.value) and repr(other) in str(e.value)
    unknown = random_mask(2)
    assert (a | unknown).site == (unknown | a).site == "mlp_out"
    with pytest.raises(ValueError):  # an unknown one between two that differ does not join them
        common_layout([unknown, a, unknown, random_mask(1, site="mlp_hidden")])
    with pytest.raises(TypeError):
        a | torch.ones(N, dtype=torch.bool)


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: NeuronMask.from_flat([0, 1, 1], (3,)), TypeError, "booleans"),
        (lambda: NeuronMask.from_flat(torch.ones(4), (4,)), TypeError, "float32"),
        (lambda: NeuronMask.from_flat(np.ones((2, 2), bool), (4,)), ValueError, "(2, 2)"),
        (lambda: NeuronMask.from_flat([True] * 4, (3,)), ValueError, "(3,)"),
        (lambda: NeuronMask.from_flat([True] * 4, (4, 0)), ValueError, "positive"),
        (lambda: NeuronMask.from_layers([[True], [1.0]]), TypeError, "layers[1]"),
        (lambda: NeuronMask.from_layers([]), ValueError, "widths"),
        (lambda: NeuronMask.empty((4, 4), depths=(1, 0)), ValueError, "increasing"),
        (lambda: NeuronMask.empty((4, 4), depths=(1,)), ValueError, "depths"),
        (lambda: NeuronMask.empty((4,), site="mlp"), ValueError, "mlp_hidden"),
        (lambda: NeuronMask.empty((4,), site=[]), ValueError, "site"),
        (lambda: NeuronMask(torch.ones(4, dtype=torch.bool), Layout((4,))), TypeError, "from_flat"),
        (lambda: NeuronMask(b"\2", Layout((1,))), TypeError, "from_flat"),
        (lambda: bool(random_mask(1)), TypeError, "mask.n > 0"),
        (lambda: random_mask(1).matched_random(-1), ValueError, "seed=-1"),
        (lambda: random_mask(1).matched_random(None), ValueError, "seed=None"),
        (lambda: random_mask(1).matched_random(0, np.ones(N), bins=0), ValueError, "bins=0"),
        (lambda: random_mask(1).matched_random(0, np.ones(N - 1)), ValueError, "(49,)"),
        (lambda: random_mask(1).matched_top([np.nan] * N), ValueError, "nan"),
        (lambda: NeuronMask.full(WIDTHS).matched_top(np.ones(N), exclude=random_mask(1)), ValueError, "layer 0"),
        (lambda: score_match(random_mask(1), random_mask(2), np.ones(N)), ValueError, "as many units per layer"),
        (lambda: apply_mask_any(random_mask(1), np.ones((3, N - 1))), ValueError, "(3, 49)"),
        (lambda: apply_mask_any(random_mask(1), np.ones(N)), ValueError, "(50,)"),
        (lambda: apply_mask_and_average([], np.ones((3, N))), TypeError, "at least one"),
        (lambda: apply_mask_and_average([random_mask(1).flat], np.ones((3, N))), TypeError, "NeuronMask"),
        (lambda: apply_mask_and_average(random_mask(1), [[1.0] * N]), TypeError, "list"),
    ],
)
def test_refusals_name_what_was_seen(call, error, says):
    with pytest.raises(error) as e:
        call()
    assert says in str(e.value)


def test_repr_is_short_for_a_large_model():
    text = repr(NeuronMask.full((1536,) * 30, "mlp_hidden"))
    assert (
        text == "NeuronMask(46,080 of 46,080 units, site mlp_hidden, layers 0-29, "
        "per layer 1536 1536 1536 1536 1536 1536 ... 1536 1536 1536)"
    )
    assert "layers 2-3, 7" in repr(NeuronMask.empty((1, 1, 1), depths=(2, 3, 7)))


WIDE = (400, 300, 500)


@pytest.mark.parametrize("seed", [0, 1, 2**40])
@pytest.mark.parametrize("score", [None, "variance", "constant", "mostly zero", "negative"])
def test_matched_random_keeps_counts_and_stays_outside(seed, score):
    rng = np.random.default_rng(3)
    scores = {
        None: None,
        "variance": rng.lognormal(size=1200),
        "constant": np.ones(1200),
        "mostly zero": rng.lognormal(size=1200) * (rng.random(1200) < 0.2),
        "negative": -rng.lognormal(size=1200),
    }
    mask = random_mask(9, WIDE, 0.05, site="mlp_hidden")
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    control = mask.matched_random(seed, scores[score])
    assert control.counts == mask.counts and control.site == mask.site and (control & mask).n == 0
    assert control == mask.matched_random(seed, scores[score]) and control != mask.matched_random(
        seed + 1, scores[score]
    )
    assert torch.equal(torch_state, torch.get_rng_state()) and np.array_equal(numpy_state, np.random.get_state()[1])


def test_a_layers_draw_depends_on_that_layer_alone():
    whole = random_mask(9, WIDE, 0.05)
    score = np.random.default_rng(3).lognormal(size=1200)
    part = NeuronMask.from_layers(whole.layers[1:], depths=(1, 2))
    assert torch.equal(part.matched_random(4, score[400:]).flat, whole.matched_random(4, score).flat[400:])
    same = NeuronMask.from_layers([whole.layers[0]] * 2).matched_random(4)
    assert not torch.equal(same.layers[0], same.layers[1])  # equal rows get different draws


def test_every_free_unit_is_equally_likely():
    mask = NeuronMask.from_flat(np.arange(40) < 10, (40,))
    hits = sum(mask.matched_random(seed).flat.int() for seed in range(600))
    assert (
        hits[:10].sum() == 0 and hits[10:].min() > 140 and hits[10:].max() < 260
    )  # expected 200, standard deviation 11.5


def test_score_is_matched_where_candidates_exist():
    rng = np.random.default_rng(5)
    variance = rng.lognormal(0, 2, 6000)
    widths = (2000, 2000, 2000)
    mask = NeuronMask.from_flat(np.log(variance) + rng.normal(0, 3, 6000) > 6.5, widths)
    plain = np.mean([score_match(mask, mask.matched_random(s), variance)["log_ratio"] for s in range(5)])
    ten = np.mean([score_match(mask, mask.matched_random(s, variance), variance)["log_ratio"] for s in range(5)])
    fifty = np.mean(
        [score_match(mask, mask.matched_random(s, variance, bins=50), variance)["log_ratio"] for s in range(5)]
    )
    assert plain < -1.5 and abs(ten) < 0.3 and abs(fifty) < 0.1 and abs(fifty) < abs(ten)
    control = mask.matched_random(0, variance)
    for row, drawn, v in zip(
        mask.layers, control.layers, torch.tensor(variance).split(widths)
    ):  # bin by bin, the same number
        bin_of = torch.searchsorted(torch.quantile(v, torch.linspace(0, 1, 11, dtype=v.dtype)[1:-1]), v, right=True)
        assert torch.equal(bin_of[row].bincount(minlength=10), bin_of[drawn].bincount(minlength=10))


def test_top_of_a_layer_falls_back_to_the_nearest_scores_and_says_so():
    score = np.arange(100.0)
    mask = NeuronMask.from_flat(score >= 80, (100,))
    with pytest.warns(UserWarning):
        control = mask.matched_random(0, score)
    assert control.flat.nonzero().flatten().tolist() == list(range(60, 80))
    part = NeuronMask.from_flat(score >= 93, (100,))
    with pytest.warns(UserWarning):  # 90, 91 and 92 are in its bin
        assert part.matched_random(0, score).flat.nonzero().flatten().tolist() == list(range(86, 93))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        near = mask.matched_random(0, score, disjoint=False)
    assert near == mask  # both bins hold nothing but the mask's units: all units allowed, they are drawn themselves
    assert score_match(mask, near, score) == {"log_ratio": 0.0, "sum_ratio": 1.0, "overlap": 1.0}


@pytest.mark.parametrize("of_others", [0.0, 2.0])
def test_scores_that_sum_to_nothing_have_no_ratio(of_others):
    "Neurons without variance: nan, without a word from numpy; the share that overlaps is known all the same."
    mask, control = (NeuronMask.from_flat((np.arange(20) >= a) & (np.arange(20) < a + 5), (20,)) for a in (0, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = score_match(mask, control, np.where(mask.flat, 0.0, of_others))
    assert np.isnan(found["log_ratio"]) and np.isnan(found["sum_ratio"]) and found["overlap"] == 0.4


@pytest.mark.parametrize("score", [None, np.arange(10.0)])
def test_crowded_layers_are_drawn_from_all_units(score):
    mask = NeuronMask.from_flat(np.arange(10) % 5 > 0, (5, 5), depths=(2, 7))
    with pytest.warns(UserWarning):
        assert mask.matched_random(0, score).counts == mask.counts
    with pytest.warns(UserWarning):
        assert NeuronMask.full((5, 5)).matched_random(0) == NeuronMask.full((5, 5))


def test_an_empty_mask_has_an_empty_control():
    empty = NeuronMask.empty(WIDTHS, "mlp_out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert empty.matched_random(0) == empty.matched_random(0, np.ones(N)) == empty.matched_top(np.ones(N)) == empty


def test_matched_top_takes_the_highest_and_the_first_of_equals():
    mask = NeuronMask.from_layers([[False, False, True, True], [True, False, False, False]])
    assert mask.matched_top([1, 3, 2, 9, 5, 5, 5, 5]) == NeuronMask.from_layers(
        [[False, True, False, True], [True, False, False, False]]
    )
    assert mask.matched_top([1, 3, 2, 9, 5, 5, 5, 5], exclude=mask) == NeuronMask.from_layers(
        [[True, True, False, False], [False, True, False, False]]
    )
    assert mask.matched_top(-torch.tensor([1.0, 3, 2, 9, 5, 5, 5, 6])).counts == mask.counts
    dead = NeuronMask.from_flat(np.arange(1000) >= 700, (1000,)).matched_top(np.zeros(1000))
    assert dead == NeuronMask.from_flat(np.arange(1000) < 300, (1000,))


def test_inputs_are_left_alone():
    score, X = torch.rand(N), torch.randn(6, N)
    score_before, X_before = score.clone(), X.clone()
    mask = random_mask(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (
            mask.matched_random(0, score),
            mask.matched_top(score),
            apply_mask_any(mask, X),
            apply_mask_and_average(mask, X),
        )
    apply_mask_any(NeuronMask.full(WIDTHS), X)[:] = 0  # a copy even if nothing is removed
    assert torch.equal(score, score_before) and torch.equal(X, X_before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_averages_and_unions_against_loops(dtype):
    X = torch.randn(20, N).to(dtype)
    masks = [random_mask(s) for s in range(4)]
    expected = torch.stack([X.float()[:, m.flat].mean(1) for m in masks], 1)
    courses = apply_mask_and_average(masks, X)
    assert courses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and torch.allclose(
        courses.float(), expected, atol=1e-6
    )
    kept = apply_mask_any(masks, X)
    union = masks[0] | masks[1] | masks[2] | masks[3]
    assert kept.dtype == dtype and torch.equal(kept[:, union.flat], X[:, union.flat]) and not kept[:, ~union.flat].any()


def test_large_values_survive():
    """1e5 becomes infinite in float16, the type the published code averaged in."""
    X = torch.full((2, N), 1e5)
    assert torch.allclose(apply_mask_and_average(random_mask(1), X), torch.full((2, 1), 1e5))


def test_bad_numbers_outside_the_masks_do_no_harm():
    mask = random_mask(1)
    X = torch.randn(5, N)
    clean = apply_mask_and_average(mask, X)
    X[:, ~mask.flat] = float("nan")
    assert torch.equal(apply_mask_and_average(mask, X), clean) and torch.isfinite(apply_mask_any(mask, X)).all()
    X[0, mask.flat.nonzero()[0]] = float("inf")
    with refused(argument="X"):
        apply_mask_and_average(mask, X)


def test_read_only_numpy_stays_numpy():
    X = np.random.default_rng(0).normal(size=(4, N)).astype(np.float32)
    X.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(apply_mask_and_average(random_mask(1), X), np.ndarray) and isinstance(
            apply_mask_any(random_mask(1), X), np.ndarray
        )


def test_empty_masks_have_no_course():
    with pytest.warns(UserWarning):
        courses = apply_mask_and_average([random_mask(1), NeuronMask.empty(WIDTHS)], torch.randn(3, N))
    assert torch.isfinite(courses[:, 0]).all() and courses[:, 1].isnan().all()
    with pytest.warns(UserWarning):
        assert apply_mask_and_average(NeuronMask.empty(WIDTHS), torch.randn(3, N)).isnan().all()
    assert not apply_mask_any(NeuronMask.empty(WIDTHS), torch.randn(3, N)).any()


@pytest.mark.parametrize("damage", ["missing", "cut", "another kind"])
def test_damaged_files_are_refused_by_name(tmp_path, damage):
    from llmfact_nb.base.files import save_tensors

    path = tmp_path / "m.safetensors"
    if damage == "cut":
        random_mask(1).save(path)
        path.write_bytes(path.read_bytes()[:-3])
    if damage == "another kind":
        save_tensors(path, {"flat": torch.ones(4)}, "activations")
    with refused(FileNotFoundError if damage == "missing" else ValueError, "m.safetensors"):
        NeuronMask.load(path)


def test_several_masks_by_name():
    a, b, c = random_mask(1), random_mask(2), random_mask(3)
    assert (
        named_masks(a) == {"neurons": a}
        and list(named_masks([a, b])) == ["network 0", "network 1"]
        and named_masks({"x": a, 7: b}) == {"x": a, "7": b}
    )
    own = disjoint({"a": a, "b": b, "c": c})
    assert own["a"] == a and own["b"] == b - a and own["c"] == c - (a | b)
    assert union([a, b, c]) == a | b | c == union(own.values())
    assert n_shared({"a": a, "b": b, "c": c}) == ((a & b) | (a & c) | (b & c)).n > 0 == n_shared(own)
    for wrong, error in (
        ("network 0", TypeError),
        ([1], TypeError),
        (None, TypeError),
        ([], ValueError),
        ({}, ValueError),
        ({1: a, "1": b}, ValueError),
        ([a, random_mask(1, (50,))], ValueError),
    ):
        with refused(error, "mask"):
            named_masks(wrong)
