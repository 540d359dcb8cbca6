"""Pins matching, split halves and the choice of k: what all texts share is found again, what one text has is not,
nulls lie where they must, and the shortcut through a common whitening gives the fits it replaces."""

import warnings
from dataclasses import replace

import numpy as np
import pandas
import pytest
import torch

from llmfact_nb.activations import Activations
from llmfact_nb.across.reproducibility import ARMS, SuggestedK, match_maps, reduce_to, split_half, suggest_k
from llmfact_nb.base.arguments import ArgumentError
from llmfact_nb.ica import ICA, ConvergenceWarning, DataError

KINDS = ["temporal", "spatial"]


def planted(n_texts=8, n_tokens=100, n_neurons=800, own=False, noise=0.5, seed=0):
    "Four maps of 30 neurons; with `own` the last of them only in the first text."
    g = torch.Generator().manual_seed(seed)
    maps = torch.zeros(4, n_neurons)
    for j in range(4):
        maps[j, 30 * j : 30 * (j + 1)] = 2 + torch.rand(30, generator=g)
    T = n_texts * n_tokens
    sources = torch.randn(T, 4, generator=g) * torch.randn(T, 4, generator=g)
    ids, positions = torch.arange(n_texts).repeat_interleave(n_tokens), torch.arange(n_tokens).repeat(n_texts)
    if own:
        sources[:, 3] *= 3 * (ids == 0)
    X = sources @ maps + noise * torch.randn(T, n_neurons, generator=g)
    return Activations(
        X,
        ids,
        positions,
        torch.zeros(T, dtype=torch.long),
        positions == 0,
        (n_neurons // 2,) * 2,
        (0, 1),
        "mlp_out",
        "planted",
    ), maps


# matching


def test_matching_is_one_to_one_and_blind_to_order_sign_and_scale():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(6, 400, generator=g)
    order = torch.randperm(6, generator=g)
    match = match_maps(a, -3 * a[order] + 7)
    assert [b for _, b in match.pairs] == order.argsort().tolist() and torch.allclose(
        match.r, torch.ones(6, dtype=torch.float64)
    )


def test_matching_maximises_the_sum_not_each_pair():
    "Two maps of a want the same map of b; one has to give way."
    x, y = torch.eye(2, 500).double() + 1e-3 * torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    match = match_maps(torch.stack([x, x + 0.1 * y]), torch.stack([x, y]))
    assert sorted(b for _, b in match.pairs) == [0, 1] and match.pairs[0] == (0, 0)


@pytest.mark.parametrize("k", [(2, 5), (5, 2), (3, 3)])
def test_matching_equals_a_search_over_all_assignments(k):
    from itertools import permutations

    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(k[0], 30, generator=g), torch.randn(k[1], 30, generator=g)
    r = torch.corrcoef(torch.cat([a, b]).double())[: k[0], k[0] :].abs().numpy()
    r = r if k[0] <= k[1] else r.T
    best = max(sum(r[i, j] for i, j in enumerate(p)) for p in permutations(range(max(k)), min(k)))
    match = match_maps(a, b)
    assert len(match.r) == min(k) and np.isclose(float(match.r.sum()), best)


def test_matching_refuses():
    for a, b in (
        (torch.zeros(2, 3), torch.zeros(2, 4)),
        (torch.zeros(3), torch.zeros(3)),
        (torch.zeros(0, 3), torch.zeros(1, 3)),
    ):
        with pytest.raises(ValueError):
            match_maps(a, b)


# one whitening for many fits


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_fits_on_a_common_whitening_are_the_fits_on_the_data(kind, standardize):
    acts, _ = planted()
    rows, how = ~acts.sinks, {"tol": 1e-6, "max_iter": 1000}
    reduced = reduce_to(acts, rows, 12, kind, standardize, 0)
    for k in (2, 4):
        small = ICA(k, **how).fit(reduced.samples[:, :k])
        full = ICA(k, kind, standardize=standardize, **how).fit(acts.values, rows)
        if k == 4:  # four were planted; two of four are no stable question
            assert match_maps(full.maps_, reduced.maps(small)).r.min() > 0.999
        span = [torch.linalg.qr(m.double().T)[0] for m in (full.maps_, reduced.maps(small))]
        assert torch.linalg.svdvals(span[0].T @ span[1]).min() > 0.99
        assert abs(reduced.share(k) - float(full.explained_variance_ratio_.sum())) < 2e-3
        if kind == "temporal" and k == 4:
            principal = reduced.maps(small, small.rotation_.T.double())
            assert match_maps(full.principal_maps_, principal).r.min() > 0.95


# split halves


@pytest.mark.parametrize("kind", KINDS)
def test_what_one_text_has_is_not_found_again(kind):
    acts, truth = planted(own=True)
    found = split_half(acts, 4, n_splits=4, n_init=3, kind=kind, exclude="first")
    table = found.by_component()
    names = dict(match_maps(truth, found.networks.mixing_).pairs)
    assert table.component.tolist() == [0, 1, 2, 3]
    assert table.r[table.component != names[3]].min() > 0.9 and table.r[names[3]] < 0.5
    assert table.stability.min() > 0.7
    assert (table.above_null[table.component != names[3]] == 1).all() and table.above_null[names[3]] == 0
    assert found.networks.exclude == "first" and not found.networks.rows_[acts.positions == 0].any()


def test_arms_and_columns():
    found = split_half(planted()[0], 4, n_splits=3)
    f = found.frame
    assert list(f.columns) == ["split", "converged", "arm", "component", "r", "named"] and len(f) == 3 * len(ARMS) * 4
    assert (f.groupby(["split", "arm"]).component.nunique() == 4).all() and f.r.between(0, 1).all()
    median = found.by_arm().set_index("arm")["50%"]
    assert median["ica"] > 0.95 > median["rotation"] > median["shuffled"] and median["shuffled"] < 0.2
    assert f[f.arm == "ica"].named.min() > 0.9 and f[f.arm != "ica"].named.isna().all()
    assert "ica" in repr(found)


def test_seed_decides_the_halves():
    acts, _ = planted()
    a, b, c = (split_half(acts, 3, n_splits=2, seed=s).frame for s in (0, 0, 1))
    assert a.equals(b) and not np.allclose(a.r, c.r)


def test_threads_change_nothing():
    acts = planted()[0]
    one, two = (split_half(acts, 4, n_splits=3, n_jobs=n).frame for n in (1, 2))
    pandas.testing.assert_frame_equal(one, two)
    one, two = (suggest_k(acts, (3, 4), n_splits=1, n_init=2, n_jobs=n).frame for n in (1, 2))
    pandas.testing.assert_frame_equal(one, two)


def test_noise_is_not_found_again():
    g = torch.Generator().manual_seed(0)
    acts, _ = planted()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = split_half(replace(acts, values=torch.randn(acts.values.shape, generator=g)), 4, n_splits=2)
    assert found.by_arm().set_index("arm")["max"]["ica"] < 0.3


def test_halves_are_of_texts():
    """Every text is whole in one half: with two texts that share nothing, nothing is found again, although each alone
    is easy."""
    acts, truth = planted(n_texts=2)
    X = acts.values.clone()
    X[acts.text_ids == 1] = X[acts.text_ids == 1].flip(1)
    found = split_half(replace(acts, values=X), 4, n_splits=2, max_iter=1000)
    assert found.frame[found.frame.arm == "ica"].r.max() < 0.3


def test_split_half_refuses():
    acts, _ = planted()
    with pytest.raises(ValueError):
        split_half(acts.of_text(0), 2)
    with pytest.raises(ArgumentError) as e:
        split_half(acts, 2, n_splits=0)
    assert e.value.argument == "n_splits"
    with pytest.raises(DataError), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        split_half(planted(n_texts=2, n_tokens=20)[0], 30, max_iter=5)
    with pytest.raises(TypeError):
        split_half(acts, 2, typo=1)
    with pytest.raises(ValueError):
        split_half(acts, 2, exclude="last")


def test_many_fits_give_one_warning():
    with pytest.warns(ConvergenceWarning) as seen:
        found = split_half(planted()[0], 8, n_splits=2, max_iter=2)
    assert len(seen) == 1 and seen[0].filename == __file__ and not found.frame.converged.any()


# the choice of k


@pytest.mark.filterwarnings("ignore::llmfact_nb.ica.ConvergenceWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_the_planted_number_is_suggested(kind):
    acts, _ = planted()
    choice = suggest_k(acts, ks=(8, 2, 4), n_splits=3, n_init=3, kind=kind)
    assert choice.k == 4 and choice.frame.k.tolist() == [2, 4, 8] and "k=4" in repr(choice)
    row = choice.frame.set_index("k").loc[4]
    assert row.found_again == 1 and row.stable == 1 and row.r > 0.9 > row.r_rotation
    assert choice.frame.variance.is_monotonic_increasing


@pytest.mark.filterwarnings("ignore::llmfact_nb.ica.ConvergenceWarning")
def test_noise_suggests_nothing():
    acts, _ = planted(n_texts=4)
    choice = suggest_k(
        replace(acts, values=torch.randn(acts.values.shape, generator=torch.Generator().manual_seed(0))),
        ks=(2, 4),
        n_splits=2,
        n_init=2,
    )
    assert choice.k is None and choice.rule.startswith("none of [2, 4]")


@pytest.mark.parametrize("k", [8, None])
def test_the_curve_shows_what_the_rule_looks_at(k):
    import matplotlib.pyplot as plt

    frame = pandas.DataFrame(
        {
            "k": [4, 8, 16],
            "stable": [1, 0.9, 0.5],
            "found_again": [1, 0.8, 0.3],
            "r": [0.9, 0.7, 0.4],
            "r_pca": [0.6, 0.5, 0.3],
            "r_rotation": [0.5, 0.4, 0.2],
        }
    )
    fig, ax = plt.subplots()
    assert SuggestedK(k, "by hand", frame, share=0.75).plot(ax) is ax
    drawn = {line.get_label(): line for line in ax.lines}
    for name, label in (
        ("stable", "stable over restarts"),
        ("found_again", "found again in other texts"),
        ("r", "|r| to other texts"),
        ("r_pca", "|r|, PCA"),
        ("r_rotation", "|r|, random rotation"),
    ):
        assert (
            drawn[label].get_xdata().tolist() == [4, 8, 16]
            and drawn[label].get_ydata().tolist() == frame[name].tolist()
        )
    assert drawn["share that the rule requires"].get_ydata()[0] == 0.75
    assert [line.get_xdata()[0] for label, line in drawn.items() if "suggested" in label] == ([] if k is None else [8])
    plt.close(fig)


def test_suggest_k_refuses():
    acts, _ = planted()
    for how in ({"ks": ()}, {"ks": (0, 2)}, {"n_init": 1}, {"threshold": 0}, {"share": 1.5}):
        with pytest.raises(ArgumentError) as e:
            suggest_k(acts, **how)
        assert e.value.argument == next(iter(how))
    with pytest.raises(DataError):
        suggest_k(acts, ks=(2, 500))


def test_inputs_are_not_changed():
    acts, _ = planted(n_texts=4)
    before = acts.values.clone()
    suggest_k(acts, ks=(2, 4), n_splits=1, n_init=2, standardize=True, exclude="sinks")
    assert torch.equal(acts.values, before) and int(acts.sinks.sum()) == 4
