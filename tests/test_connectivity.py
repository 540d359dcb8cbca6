"""Pins network time courses (equal to a loop in float64, whatever the type, block or storage) and functional
connectivity (planted correlations, against scikit-learn and regression, degenerate courses)."""

import warnings

import numpy as np
import pytest
import torch

from llmfact_nb.activations import Activations
from llmfact_nb.base.arguments import ArgumentError
from llmfact_nb.connectivity import functional_connectivity, network_time_courses
from llmfact_nb.masks import NeuronMask, apply_mask_and_average

WIDTHS, DEPTHS = (40, 30, 50), (2, 3, 7)
N = sum(WIDTHS)


def masks(k=4, share=0.2, site="mlp_hidden", depths=DEPTHS):
    rng = np.random.default_rng(5)
    return [NeuronMask.from_flat(rng.random(N) < share, WIDTHS, site, depths) for _ in range(k)]


def matrix(T=90, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(T, N)) * rng.lognormal(0, 2, N) + rng.normal(size=N) * 3).astype(np.float32)


def activations(values, sinks=None, site="mlp_hidden"):
    T = len(values)
    sinks = torch.zeros(T, dtype=torch.bool) if sinks is None else sinks
    return Activations(
        values,
        torch.zeros(T, dtype=torch.long),
        torch.arange(T),
        torch.zeros(T, dtype=torch.long),
        sinks,
        WIDTHS,
        DEPTHS,
        site,
    )


def by_loop(X, found, rows=None, standardize=False):
    X = np.asarray(X, dtype=np.float64)
    if standardize:
        used = X if rows is None else X[rows]
        X = (X - used.mean(0)) / used.std(0)
    return np.stack([X[:, m.flat.numpy()].mean(1) for m in found], 1)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("block", [1, 17, 90, 1000])
@pytest.mark.parametrize("kind", ["array", "array64", "read-only", "fortran", "tensor", "bfloat16", "activations"])
def test_equal_to_a_loop(kind, standardize, block):
    X = matrix()
    given = {
        "array": X,
        "array64": X.astype(np.float64),
        "read-only": np.frombuffer(X.tobytes(), np.float32).reshape(X.shape),
        "fortran": np.asfortranarray(X),
        "tensor": torch.tensor(X),
        "bfloat16": torch.tensor(X).bfloat16(),
        "activations": activations(torch.tensor(X)),
    }[kind]
    before = (
        given.values.clone() if kind == "activations" else given.clone() if torch.is_tensor(given) else given.copy()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        courses = network_time_courses(given, masks(), standardize=standardize, block=block)
    expected = by_loop(
        torch.tensor(X).bfloat16().float() if kind == "bfloat16" else X, masks(), standardize=standardize
    )
    assert isinstance(courses, np.ndarray) == isinstance(given, np.ndarray) and courses.shape == (90, 4)
    assert str(courses.dtype).endswith("float32") and np.allclose(np.asarray(courses), expected, rtol=1e-4, atol=1e-4)
    assert (given.values if kind == "activations" else given).tolist() == before.tolist()


def test_same_as_averaging_through_masks():
    X = matrix()
    assert np.allclose(network_time_courses(X, masks()), apply_mask_and_average(masks(), X), rtol=1e-5, atol=1e-5)


def test_scale_comes_from_tokens_that_are_no_sinks():
    X = torch.tensor(matrix())
    sinks = torch.zeros(90, dtype=torch.bool)
    sinks[[0, 40]] = True
    X[sinks] *= 1000
    courses = network_time_courses(activations(X, sinks), masks(), standardize=True)
    assert np.allclose(courses, by_loop(X, masks(), (~sinks).numpy(), True), rtol=1e-4, atol=1e-4)
    assert courses[~sinks].abs().max() < 3 < courses[sinks].abs().max()
    everything = network_time_courses(
        activations(X, torch.ones(90, dtype=torch.bool)), masks(), standardize=True
    )  # nothing but sinks: all tokens count
    assert np.allclose(everything, by_loop(X, masks(), None, True), rtol=1e-4, atol=1e-4)


def test_large_offsets_are_removed_before_the_product():
    "A neuron of mean 1e4 and deviation 1 keeps its z-scores: the mean goes first, and is summed in float64."
    rng = np.random.default_rng(1)
    signal = rng.normal(size=5000)
    X = (signal[:, None] + rng.normal(size=(5000, N)) * 0.1 + 1e4).astype(np.float32)
    course = network_time_courses(X, masks(1), standardize=True)[:, 0]
    assert np.corrcoef(course, signal)[0, 1] > 0.999 and abs(course.mean()) < 1e-3


def test_constant_neurons_count_as_zero():
    X = matrix()
    mask = NeuronMask.from_flat(np.arange(N) < 10, WIDTHS)
    X[:, :5] = 7
    courses = network_time_courses(X, mask, standardize=True)
    Z = (X[:, 5:10].astype(float) - X[:, 5:10].mean(0)) / X[:, 5:10].std(0)
    assert np.allclose(courses[:, 0], Z.sum(1) / 10, atol=1e-4)
    X[:, :10] = 7
    assert not network_time_courses(X, mask, standardize=True).any()


class Watched(np.ndarray):
    "An array that remembers how many rows each reading took."

    rows_read: list = []

    def __getitem__(self, key):
        out = super().__getitem__(key)
        if self.shape == (90, N):
            self.rows_read.append(len(out))
        return np.asarray(out)


def test_reads_blocks_of_tokens_only():
    Watched.rows_read.clear()
    network_time_courses(matrix().view(Watched), masks(), standardize=True, block=8)
    assert max(Watched.rows_read) == 8 and sum(Watched.rows_read) == 3 * 90


def test_memory_mapped_bfloat16(tmp_path):
    X = torch.tensor(matrix()).bfloat16()
    activations(X).save(tmp_path / "a.safetensors")
    loaded = Activations.load(tmp_path / "a.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.allclose(
            network_time_courses(loaded, masks(), True), by_loop(X.float(), masks(), None, True), rtol=1e-3, atol=1e-3
        )


def test_bad_numbers_elsewhere_do_no_harm():
    X = matrix()
    found = masks(2)
    clean = network_time_courses(X, found, True)
    X[:, ~(found[0] | found[1]).flat.numpy()] = np.nan
    assert np.array_equal(network_time_courses(X, found, True), clean)
    X[33, found[0].flat.numpy()] = np.inf
    with pytest.raises(ValueError) as e:
        network_time_courses(X, found)
    assert "token 33" in str(e.value)


def test_empty_masks():
    empty = NeuronMask.empty(WIDTHS, depths=DEPTHS)
    with pytest.warns(UserWarning):
        courses = network_time_courses(matrix(), [masks(1)[0], empty], True)
    assert np.isfinite(courses[:, 0]).all() and np.isnan(courses[:, 1]).all()
    with pytest.warns(UserWarning):
        assert np.isnan(network_time_courses(matrix(), empty)).all()


@pytest.mark.parametrize(
    "call, error",
    [
        (lambda: network_time_courses(activations(torch.tensor(matrix())), masks(site="mlp_out")), ValueError),
        (lambda: network_time_courses(activations(torch.tensor(matrix())), masks(depths=(0, 1, 2))), ValueError),
        (lambda: network_time_courses(matrix()[:, 1:], masks()), ValueError),
        (lambda: network_time_courses(matrix()[:0], masks()), ValueError),
        (lambda: network_time_courses(matrix().tolist(), masks()), TypeError),
        (lambda: network_time_courses(np.ma.masked_greater(matrix(), 5), masks()), TypeError),
        (lambda: network_time_courses(matrix(), []), TypeError),
        (lambda: network_time_courses(matrix(), [masks()[0], masks(site="mlp_out")[0]]), ValueError),
        (lambda: functional_connectivity(matrix(), "partial"), ArgumentError),
        (lambda: functional_connectivity(np.ones(5)), ValueError),
        (lambda: functional_connectivity(np.ones((1, 5))), ValueError),
        (lambda: functional_connectivity(np.ma.masked_greater(matrix(), 5)), TypeError),
    ],
)
def test_refusals(call, error):
    with pytest.raises(error):
        call()


def planted(C, T=40_000, seed=0):
    return np.random.default_rng(seed).normal(size=(T, len(C))) @ np.linalg.cholesky(np.array(C)).T


@pytest.mark.parametrize("kind", ["correlation", "partial correlation"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_planted_correlations_are_found(kind, as_tensor):
    rng = np.random.default_rng(2)
    A = rng.normal(size=(6, 9))
    C = A @ A.T
    C = C / np.sqrt(np.outer(np.diag(C), np.diag(C)))
    X = planted(C) * rng.lognormal(0, 4, 6) + 100
    P = np.linalg.inv(C)
    truth = C if kind == "correlation" else 2 * np.eye(6) - P / np.sqrt(np.outer(np.diag(P), np.diag(P)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = functional_connectivity(torch.tensor(X) if as_tensor else X, kind)
    assert isinstance(found, torch.Tensor) == as_tensor and found.dtype == (torch.float64 if as_tensor else np.float64)
    found = np.asarray(found)
    assert np.allclose(found, truth, atol=0.03) and (found == found.T).all() and (np.diag(found) == 1).all()
    if kind == "correlation":
        assert np.allclose(found, np.corrcoef(X.T))


def test_partial_correlation_is_that_of_residuals():
    X = planted([[1, 0.6, 0.3, 0.2], [0.6, 1, 0.5, 0.1], [0.3, 0.5, 1, 0.4], [0.2, 0.1, 0.4, 1]], T=500)
    X = X - X.mean(0)
    rest = X[:, 2:]
    left = X[:, :2] - rest @ np.linalg.lstsq(rest, X[:, :2], rcond=None)[0]
    assert np.isclose(functional_connectivity(X, "partial correlation")[0, 1], np.corrcoef(left.T)[0, 1], atol=1e-10)


@pytest.mark.parametrize("case", ["copies", "few tokens", "sum of others"])
def test_dependent_courses_are_shrunk_and_said(case):
    X = planted(np.eye(5) * 0.6 + 0.4, T=2000)
    X = {"copies": np.c_[X, X[:, 0]], "few tokens": X[:4], "sum of others": np.c_[X, X.sum(1)]}[case]
    with pytest.warns(UserWarning):
        P = functional_connectivity(X, "partial correlation")
    assert np.isfinite(P).all() and (np.abs(P) <= 1).all() and (P == P.T).all() and (np.diag(P) == 1).all()


def test_undefined_courses_leave_the_others_alone():
    X = planted(np.eye(4) * 0.5 + 0.5, T=300)
    bad = X.copy()
    bad[:, 1] = 0.1
    bad[7, 3] = np.nan
    for kind in ("correlation", "partial correlation"):
        with pytest.warns(UserWarning):
            C = functional_connectivity(bad, kind)
        assert np.isnan(C[[1, 3]]).all() and np.isnan(C[:, [1, 3]]).all()
        assert np.allclose(C[np.ix_([0, 2], [0, 2])], functional_connectivity(X[:, [0, 2]], kind))
    with pytest.warns(UserWarning):
        assert np.isnan(functional_connectivity(np.ones((5, 2)))).all()


def test_size_and_sign_do_not_matter():
    X = planted([[1, 0.7], [0.7, 1]], T=400)
    C = functional_connectivity(X)
    assert np.allclose(functional_connectivity(X * [1e200, -1e-200]), C * [[1, -1], [-1, 1]])
    assert np.isclose(functional_connectivity(np.c_[X[:, 0], -X[:, 0]])[0, 1], -1)
    assert (
        functional_connectivity(X[:, :1]).tolist()
        == [[1.0]]
        == functional_connectivity(X[:, :1], "partial correlation").tolist()
    )
    before = X.copy()
    functional_connectivity(X, "partial correlation")
    assert np.array_equal(X, before)
