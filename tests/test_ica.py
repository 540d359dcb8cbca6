"""Pins the ICA room: planted sources are recovered, every whitening solver finds the float64 subspace, torch and
scikit-learn agree from the same start, inputs are only read, rows and standardising mean what they say, conventions
of order, sign and rotation hold, an interrupted fit goes on from what it whitened, and bad input is refused by
name."""

import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.optimize import linear_sum_assignment

import llmfact_nb.ica as ica_module
from llmfact_nb.base.arguments import ArgumentError
from llmfact_nb.base.whitening import CentredX, choose_solver, gram, leading_directions, leading_part, there_and_back
from llmfact_nb.ica import (
    ICA,
    ConvergenceWarning,
    DataError,
    consensus,
    decorrelate,
    fastica,
    negentropy,
    newton_schulz,
)

SHAPES = {"wide": (500, 1600), "tall": (1800, 240)}


def planted(T, N, k=5, kind="temporal", seed=0, noise=0.05):
    """X (T, N) with k planted components, and the maps (k, N). Temporal: Laplace time courses, dense maps. Spatial:
    sparse maps, Gaussian time courses."""
    g = np.random.RandomState(seed)
    if kind == "temporal":
        time, maps = g.laplace(size=(T, k)), g.randn(k, N)
    else:
        time, maps = g.randn(T, k), np.zeros((k, N))
        for row in maps:
            row[g.choice(N, N // 20, replace=False)] = 1 + g.exponential(size=N // 20)
    return (time @ maps + noise * g.randn(T, N) + g.randn(N)).astype(np.float32), maps


def steep(T, N, seed=0):
    "X whose singular values fall as those of real activations do: the first far above all others, then a power law."
    g = np.random.RandomState(seed)
    r = min(T, N)
    U, V = np.linalg.qr(g.randn(T, r))[0], np.linalg.qr(g.randn(N, r))[0]
    d = np.arange(1, r + 1.0) ** -0.8
    d[0] = 10
    return ((U * d) @ V.T * 100 + 0.01 * g.randn(N)).astype(np.float32)


def matched(a, b):
    "|r| of the one-to-one best pairs of rows, sorted upwards."
    r = np.abs(np.corrcoef(np.asarray(a), np.asarray(b))[: len(a), len(a) :])
    return np.sort(r[linear_sum_assignment(-r)])


@pytest.fixture(scope="module")
def wide():
    return planted(*SHAPES["wide"])[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["temporal", "spatial"])
@pytest.mark.parametrize("fun", ["logcosh", "cube", "exp"])
def test_planted_components_are_recovered(kind, fun, shape):
    T, N = SHAPES[shape]
    N = 1500 if kind == "spatial" else N  # spatial ICA's samples are neurons: it needs many
    X, maps = planted(T, N, kind=kind)
    ica = ICA(5, kind=kind, fun=fun).fit(X)
    assert ica.converged_ and matched(maps, ica.maps_).min() > 0.95
    assert ica.maps_.shape == (5, N) and ica.time_courses_.shape == (T, 5) and ica.maps_.dtype == torch.float32


@pytest.mark.parametrize("kind", ["temporal", "spatial"])
@pytest.mark.parametrize("shape", [(240, 1000), (1000, 240)], ids=["wide", "tall"])
@pytest.mark.parametrize("solver", ["gram", "covariance", "randomized", "auto", "exact"])
@pytest.mark.filterwarnings(
    "ignore::llmfact_nb.ica.ConvergenceWarning"
)  # Gaussian directions: there is a subspace to find, but no components
def test_every_solver_finds_the_subspace_of_a_float64_svd(solver, shape, kind):
    X, k = steep(*shape), 16
    ica = ICA(
        k,
        kind=kind,
        max_iter=20,
        whiten_solver="gram" if solver == "exact" else solver,
        dtype="float64" if solver == "exact" else "float32",
    ).fit(X)
    assert ica.whiten_solver_ in ("gram", "covariance", "randomized") and ica.whitening_report_.startswith(
        ica.whiten_solver_
    )
    C = X.astype(float) - X.mean(0, dtype=float)
    if kind == "spatial":
        C -= C.mean(1, keepdims=True)
    U, d, _ = np.linalg.svd(C, full_matrices=False)
    inside = np.linalg.qr(ica.time_courses_.double().numpy())[0].T @ C
    assert (inside**2).sum() > (1 - (1e-3 if solver == "randomized" else 1e-6)) * (d[:k] ** 2).sum()
    np.testing.assert_allclose(ica.singular_values_, d[:k], rtol=0.03 if solver == "randomized" else 1e-3)
    np.testing.assert_allclose(ica.explained_variance_.sum(), (ica.singular_values_**2).sum() / shape[0], rtol=1e-4)
    np.testing.assert_allclose(ica.explained_variance_ratio_.sum(), (d[:k] ** 2).sum() / (d**2).sum(), rtol=1e-3)


@pytest.mark.parametrize("kind", ["temporal", "spatial"])
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_and_scikit_learn_agree_from_the_same_start(kind, shape):
    X, _ = planted(*SHAPES[shape], kind=kind, noise=1.0)
    for start in ({"random_state": 3}, {"w_init": np.random.RandomState(9).randn(5, 5)}):
        a, b = (ICA(5, kind=kind, backend=backend, **start).fit(X) for backend in ("torch", "sklearn"))
        assert b.whiten_solver_ == "svd" and abs(a.n_iter_ - b.n_iter_) <= 2
        for name in ("maps_", "time_courses_", "sign_", "explained_variance_", "negentropy_"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=0.02, atol=0.02)


def test_the_start_and_the_raw_maps_are_those_of_scikit_learn(wide):
    from sklearn.decomposition import FastICA

    peer = FastICA(5, random_state=7, whiten="unit-variance").fit(wide)
    ica = ICA(5, random_state=7, whiten_solver="gram").fit(wide)
    r = np.corrcoef(ica.maps_, peer.mixing_.T)[:5, 5:]
    pair = np.abs(r).argmax(1)
    assert (np.abs(r[np.arange(5), pair]) > 0.9999).all() and abs(ica.n_iter_ - peer.n_iter_) <= 1
    # sign_ undoes the positive skew: what remains is what FastICA gave, which is what the paper thresholds
    np.testing.assert_allclose(ica.maps_ * ica.sign_[:, None], peer.mixing_.T[pair], atol=0.01)


@pytest.mark.parametrize("kind", ["temporal", "spatial"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("solver", ["auto", "randomized"])
def test_rows_fit_as_if_the_other_tokens_did_not_exist(kind, shape, solver):
    X, _ = planted(*SHAPES[shape], kind=kind)
    rows = np.random.RandomState(1).rand(len(X)) < 0.6
    X[~rows] = np.nan  # tokens that are left out may hold anything
    a, b = (
        ICA(5, kind=kind, whiten_solver=solver).fit(X, rows=rows),
        ICA(5, kind=kind, whiten_solver=solver).fit(X[rows]),
    )
    assert a.time_courses_.shape == (rows.sum(), 5)
    np.testing.assert_allclose(a.maps_, b.maps_, atol=1e-3)
    np.testing.assert_allclose(a.time_courses_, b.time_courses_, atol=1e-3)
    everyone = torch.ones(int(rows.sum()), dtype=torch.bool)
    np.testing.assert_allclose(
        ICA(5, kind=kind, whiten_solver=solver).fit(X[rows], rows=everyone).maps_, b.maps_, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["temporal", "spatial"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("solver", ["auto", "randomized"])
def test_standardize_equals_z_scored_input(kind, shape, solver):
    X, _ = planted(*SHAPES[shape], kind=kind)
    X *= np.linspace(0.1, 30, X.shape[1], dtype=np.float32)
    Z = (X - X.mean(0)) / X.std(0)
    a, b = (
        ICA(5, kind=kind, whiten_solver=solver, standardize=True).fit(X),
        ICA(5, kind=kind, whiten_solver=solver).fit(Z),
    )
    assert matched(a.maps_, b.maps_).min() > 0.999
    np.testing.assert_allclose(a.scale_, X.std(0), rtol=1e-3)
    np.testing.assert_allclose(a.transform(X), a.time_courses_, atol=5e-3)
    if kind == "temporal":  # unit-variance source with z-scored neuron: the map is their correlation
        np.testing.assert_allclose(a.maps_[0], np.corrcoef(a.time_courses_[:, 0], Z.T)[0, 1:], atol=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.filterwarnings("ignore::llmfact_nb.ica.ConvergenceWarning")  # spatial ICA of dense maps
def test_memory_maps_and_bfloat16_are_read_block_by_block_and_never_written(tmp_path, shape):
    X, maps = planted(*SHAPES[shape])
    exact = ICA(5).fit(X).maps_
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(ICA(5).fit(mapped).maps_, exact, atol=1e-5)
    half = torch.from_numpy(X).bfloat16()
    half.view(torch.int16).numpy().tofile(tmp_path / "x.bf16")
    mapped = torch.from_file(str(tmp_path / "x.bf16"), shared=True, size=half.numel(), dtype=torch.bfloat16).view(
        half.shape
    )
    for data in (half, mapped, torch.from_numpy(X).double()):
        before = data.clone()
        for arguments in ({}, {"standardize": True}, {"kind": "spatial"}):
            ICA(5, max_iter=20, **arguments).fit(data).transform(data)
        assert torch.equal(data, before)
    assert matched(ICA(5).fit(mapped).maps_, exact).min() > 0.999


def test_a_large_offset_does_not_eat_the_digits():
    for shape in SHAPES.values():
        X, _ = planted(*shape)
        moved = (X + 1000 * np.random.RandomState(0).randn(X.shape[1])).astype(np.float32)
        for solver in ("auto", "randomized"):
            assert matched(ICA(5).fit(X).maps_, ICA(5, whiten_solver=solver).fit(moved).maps_).min() > 0.999


@pytest.mark.parametrize("kind", ["temporal", "spatial"])
def test_order_sign_and_rotation(kind):
    X, _ = planted(500, 900, k=6, kind=kind, noise=0.5)
    ica = ICA(6, kind=kind, whiten_solver="gram").fit(X)
    sources = ica.time_courses_.T if kind == "temporal" else ica.maps_
    np.testing.assert_allclose(sources.mean(1), 0, atol=1e-4)
    np.testing.assert_allclose(sources @ sources.T / sources.shape[1], np.eye(6), atol=1e-3)
    np.testing.assert_allclose(negentropy(sources), ica.negentropy_, rtol=1e-3, atol=1e-7)
    assert (ica.negentropy_.diff() <= 0).all()
    assert (((ica.maps_ - ica.maps_.mean(1, keepdim=True)) ** 3).sum(1) >= 0).all() and set(ica.sign_.tolist()) <= {
        -1.0,
        1.0,
    }
    np.testing.assert_allclose(ica.rotation_ @ ica.rotation_.T, np.eye(6), atol=1e-5)
    np.testing.assert_allclose(ica.maps_, ica.rotation_ @ ica.principal_maps_, atol=1e-4)
    # the principal maps are those of PCA: orthogonal, by falling variance
    C = X - X.mean(0)
    C = C - C.mean(1, keepdims=True) if kind == "spatial" else C
    _, d, V = np.linalg.svd(C, full_matrices=False)
    assert (np.abs(np.diag(np.corrcoef(ica.principal_maps_, V[:6])[:6, 6:])) > 0.999).all()
    inside = ica.time_courses_ @ ica.maps_
    assert np.linalg.norm(C - inside.numpy()) ** 2 < (1 + 1e-4) * (d[6:] ** 2).sum()


@pytest.mark.parametrize("kind", ["temporal", "spatial"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("solver", ["gram", "covariance", "randomized"])
def test_transform_gives_the_time_courses_back(solver, shape, kind):
    T, N = {"wide": (500, 1500), "tall": (1500, 500)}[shape]
    X, _ = planted(T, N, kind=kind, noise=1.0)
    ica = ICA(5, kind=kind, whiten_solver=solver).fit(X)
    np.testing.assert_allclose(ica.transform(X), ica.time_courses_, atol=2e-3)
    np.testing.assert_allclose(ica.transform(torch.from_numpy(X[3])), ica.time_courses_[3:4], atol=2e-3)


def test_permuted_neurons_permute_the_maps():
    for kind in ("temporal", "spatial"):
        X, _ = planted(500, 1200, kind=kind)
        order = np.random.RandomState(2).permutation(X.shape[1])
        a, b = ICA(5, kind=kind).fit(X), ICA(5, kind=kind).fit(X[:, order])
        np.testing.assert_allclose(a.maps_[:, order], b.maps_, atol=0.02)
        np.testing.assert_allclose(a.time_courses_, b.time_courses_, atol=0.02)


@pytest.mark.filterwarnings("ignore::llmfact_nb.ica.ConvergenceWarning")  # the noise never settles
def test_restarts_agree_on_planted_sources_and_not_on_noise(wide):
    noise = np.random.RandomState(0).randn(500, 2000).astype(np.float32)
    real, none = ICA(5, n_init=8).fit(wide).stability_, ICA(5, n_init=8, max_iter=60, tol=1e-2).fit(noise).stability_
    assert real.min() > 0.95 and none.median() < real.min() - 0.1  # one direction of noise may be found again
    assert ICA(5).fit(wide).stability_.isnan().all()


@pytest.mark.filterwarnings("ignore::llmfact_nb.ica.ConvergenceWarning")  # the noise never settles
def test_components_that_are_not_there_are_the_unstable_ones():
    X, maps = planted(2000, 800, k=4, noise=1.0)
    ica = ICA(16, n_init=10, max_iter=100).fit(X)
    assert matched(maps, ica.maps_[:4]).min() > 0.98  # the real ones come first
    assert ica.stability_[:4].min() > 0.95 > 0.85 > ica.stability_[4:].median()


def test_consensus_is_orthogonal_and_ignores_order_and_sign():
    g = torch.Generator().manual_seed(0)
    W = decorrelate(torch.randn(6, 6, generator=g))
    shuffled = torch.stack(
        [W[torch.randperm(6, generator=g)] * torch.randn(6, 1, generator=g).sign() for _ in range(5)]
    )
    centre, stability = consensus(shuffled)
    np.testing.assert_allclose((centre @ W.T).abs().amax(1), 1, atol=1e-5)
    np.testing.assert_allclose(stability, 1, atol=1e-5)
    centre, stability = consensus(decorrelate(torch.randn(5, 6, 6, generator=g)))
    np.testing.assert_allclose(centre @ centre.T, np.eye(6), atol=1e-5)
    assert stability.max() < 0.6


def test_restarts_computed_together_equal_restarts_computed_alone(wide):
    time = ICA(5, whiten_solver="gram").fit(wide).time_courses_
    Z = (time @ torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))[0]).T.contiguous()
    starts = torch.randn(7, 5, 5, generator=torch.Generator().manual_seed(1))
    for fun in ("logcosh", "cube", "exp"):
        together, n_iter, history = fastica(Z, starts, fun)
        for i, start in enumerate(starts):
            alone, n, _ = fastica(Z, start[None], fun)
            assert abs(int(n_iter[i]) - int(n[0])) <= 1
            np.testing.assert_allclose(together[i], alone[0], atol=2e-3)
        assert history.shape == (n_iter.max(), 7, 5) and history[n_iter.max() - 1, n_iter.argmin()].isnan().all() == (
            n_iter.min() < n_iter.max()
        )


def test_newton_schulz_finds_the_same_orthogonal_matrix_as_the_eigenvectors():
    g = torch.Generator().manual_seed(0)
    W = torch.randn(4, 20, 20, generator=g, dtype=torch.float64)
    W[1] *= torch.logspace(-2, 2, 20, dtype=torch.float64)[:, None]  # badly scaled rows
    U, _, V = torch.linalg.svd(W)  # eigenvectors of W W' lose half of the digits on badly scaled rows
    np.testing.assert_allclose(newton_schulz(W), U @ V, atol=1e-9)
    np.testing.assert_allclose(decorrelate(W)[[0, 2, 3]], (U @ V)[[0, 2, 3]], atol=1e-9)


def test_leading_directions_of_a_known_matrix():
    g = torch.Generator().manual_seed(0)
    V = torch.linalg.qr(torch.randn(300, 300, generator=g, dtype=torch.float64))[0]
    values = torch.arange(1, 301, dtype=torch.float64) ** -1.5
    U, n_iter, change = leading_directions(
        lambda Q: (V * values) @ (V.T @ Q), torch.randn(300, 20, generator=g, dtype=torch.float64), k=10
    )
    assert n_iter <= 6 and change < 0.01 and torch.linalg.svdvals(V[:, :10].T @ U).min() > 0.999
    U, n_iter, _ = leading_directions(
        lambda Q: (V * values) @ (V.T @ Q),
        torch.randn(300, 200, generator=g, dtype=torch.float64),
        k=10,
        tol=0,
        max_iter=3,
    )
    assert n_iter == 3 and torch.linalg.svdvals(V[:, :10].T @ U).min() > 0.999  # no room for a second block


def test_auto_takes_the_small_matrix_when_one_side_is_small():
    assert choose_solver(300, 50_000, 32)[0] == "gram" and choose_solver(50_000, 300, 32)[0] == "covariance"
    assert choose_solver(4096, 46_080, 32)[0] == "randomized" and choose_solver(46_080, 4096, 32)[0] == "randomized"
    assert choose_solver(2000, 46_080, 600)[0] == "gram"


def test_constant_neurons(wide):
    for walk in ("gram", "covariance"):
        X = wide[:, :500].copy()
        X[:, 7], X[:, 9] = 1234.567, 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ica = ICA(4, whiten_solver=walk).fit(X)
        assert (ica.maps_[:, [7, 9]] == 0).all() and (ica.maps_[:, :7] != 0).all()
        with pytest.warns(UserWarning):
            ica = ICA(4, whiten_solver=walk, standardize=True).fit(X)
        assert (
            (ica.maps_[:, [7, 9]] == 0).all() and (ica.scale_[[7, 9]] == 1).all() and ica.time_courses_.isfinite().all()
        )


def test_the_seed_decides_and_the_global_generators_stay_where_they_are(wide):
    torch.manual_seed(5), np.random.seed(5)
    want = torch.rand(1), np.random.rand()
    torch.manual_seed(5), np.random.seed(5)
    first = ICA(5, n_init=2, whiten_solver="randomized").fit(wide).maps_
    assert (torch.rand(1), np.random.rand()) == want
    assert torch.equal(first, ICA(5, n_init=2, whiten_solver="randomized", random_state=0).fit(wide).maps_)
    one, two = (ICA(5, max_iter=1, random_state=s) for s in (0, 1))
    with pytest.warns(ConvergenceWarning):
        assert not torch.allclose(one.fit(wide).maps_, two.fit(wide).maps_, atol=0.01)
    assert ICA(5, random_state=None).fit(wide).maps_.isfinite().all()


def test_convergence_is_reported_and_the_warning_says_what_to_do(wide):
    with pytest.warns(ConvergenceWarning) as said:
        ica = ICA(5, max_iter=2, n_init=3).fit(wide)
    assert said[0].filename == __file__  # it points at the call
    assert not ica.converged_ and ica.n_iter_ == 2 and ica.convergence_.shape == (2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ica = ICA(5).fit(wide)
    assert ica.converged_ and len(ica.convergence_) == ica.n_iter_
    assert (ica.convergence_.diff(dim=1) >= 0).all() and ica.convergence_[-1, 3] < 1e-4 < ica.convergence_[-2, 3]


@pytest.mark.parametrize("kind", ["temporal", "spatial"])
@pytest.mark.parametrize("solver", ["gram", "covariance", "randomized"])
def test_an_interrupted_fit_goes_on_from_the_whitened_data(solver, kind, tmp_path, monkeypatch):
    "FastICA dies; the same call whitens nothing again and ends with the very numbers of a fit that ran through."
    X, _ = planted(300, 420, kind=kind)
    X[:, 7] = 3.0
    rows, path = np.arange(300) % 9 > 0, tmp_path / "white.safetensors"

    def fit(path=None, **how):
        with pytest.warns(UserWarning):
            return ICA(5, kind=kind, whiten_solver=solver, standardize=True, **how).fit(X, rows, path)

    def stop(*_):
        raise RuntimeError("the machine went down")

    expected = fit()
    with monkeypatch.context() as patch:
        patch.setattr(ica_module, "fastica", stop)
        with pytest.raises(RuntimeError):
            ICA(5, kind=kind, whiten_solver=solver, standardize=True).fit(X, rows, path)
    monkeypatch.setattr(ica_module, "whiten", stop)
    resumed = fit(path)
    for name in (
        "maps_",
        "time_courses_",
        "rotation_",
        "sign_",
        "mean_",
        "scale_",
        "singular_values_",
        "explained_variance_ratio_",
        "convergence_",
    ):
        assert torch.equal(getattr(resumed, name), getattr(expected, name)), name
    assert torch.equal(resumed.transform(X), expected.transform(X)) and "read from" in resumed.whitening_report_
    assert (
        matched(fit(path, n_init=3, fun="cube", max_iter=500).maps_, expected.maps_).min() > 0.95
    )  # FastICA's own settings may change
    assert [p.name for p in tmp_path.iterdir()] == ["white.safetensors"]


@pytest.mark.parametrize(
    "how",
    [
        {"n_components": 6},
        {"kind": "spatial"},
        {"whiten_solver": "randomized"},
        {"standardize": True},
        {"dtype": torch.float64},
        {"random_state": 1},
        {"backend": "sklearn"},
    ],
    ids=str,
)
def test_whitened_data_of_another_fit_are_refused(how, wide, tmp_path):
    path = tmp_path / "white.safetensors"
    ICA(5).fit(wide, path=path)
    before = path.read_bytes()
    with pytest.raises(ValueError) as e:
        ICA(**{"n_components": 5} | how).fit(wide, path=path)
    assert next(iter(how)) in str(e.value) and path.read_bytes() == before


def test_whitened_data_of_another_matrix_are_refused(wide, tmp_path):
    path, other = tmp_path / "white.safetensors", wide.copy()
    ICA(5).fit(wide, path=path)
    ICA(5, whiten_solver="gram").fit(wide, path=path)  # what "auto" chose
    other[-1, -1] += 1
    middle, hole = wide.copy(), wide.copy()
    middle[7, 3] += 1
    hole[5, 2] = np.nan
    unused = wide.copy()
    unused[2] += 1
    used = np.arange(len(wide)) > 3
    ICA(5).fit(wide, used, tmp_path / "part.safetensors")
    ICA(5).fit(unused, used, tmp_path / "part.safetensors")  # what was not used may be anything
    for X, rows in ((other, None), (middle, None), (hole, None), (wide[:-1], None), (wide, used)):
        with pytest.raises(ValueError) as e:
            ICA(5).fit(X, rows, path)
        assert path.name in str(e.value)
    with pytest.raises(IsADirectoryError):
        ICA(5).fit(wide, path=tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError):
        ICA(5).fit(wide, path=tmp_path / "foreign.safetensors")


def test_estimator_conventions(wide):
    from sklearn.base import clone

    ica = ICA(5, fun="cube", standardize=True)
    assert (
        clone(ica).get_params() == ica.get_params() and repr(ica) == "ICA(n_components=5, fun='cube', standardize=True)"
    )
    assert ica.set_params(n_components=3).n_components == 3 and ica.fit(wide) is ica
    assert torch.equal(ica.fit_transform(wide), ICA(3, fun="cube", standardize=True).fit(wide).time_courses_)
    with pytest.raises(ArgumentError):
        ica.set_params(n_componets=3)
    with pytest.raises(TypeError):
        ICA(2, n_componets=3)
    with pytest.raises(ValueError):
        ICA(2).transform(wide)


@pytest.mark.parametrize(
    "arguments",
    [
        {"n_components": 0},
        {"n_components": 2.5},
        {"n_components": True},
        {"kind": "both"},
        {"whiten_solver": "svd"},
        {"fun": "tanh"},
        {"backend": "jax"},
        {"standardize": "text"},
        {"n_init": 0},
        {"max_iter": 0},
        {"tol": 0},
        {"tol": float("nan")},
        {"dtype": torch.float16},
        {"dtype": "half"},
        {"random_state": -1},
        {"w_init": np.eye(3)},
        {"w_init": np.ones((5, 5))},
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(arguments):
    X = np.random.RandomState(0).randn(100, 400).astype(np.float32)
    with pytest.raises(ArgumentError) as e:
        ICA(**{"n_components": 5, **arguments}).fit(X)
    assert e.value.argument == next(iter(arguments))


@pytest.mark.parametrize("solver", ["gram", "covariance", "randomized"])
@pytest.mark.parametrize("kind", ["temporal", "spatial"])
def test_more_components_than_directions(solver, kind):
    g = np.random.RandomState(0)
    X = (g.laplace(size=(300, 6)) @ g.laplace(size=(6, 400))).astype(np.float32)
    with pytest.raises(DataError) as e:
        ICA(7, kind=kind, whiten_solver=solver).fit(X)
    assert e.value.argument == "n_components" and e.value.value == 7 and " 6," in e.value.accepted
    assert ICA(6, kind=kind, whiten_solver=solver).fit(X).maps_.isfinite().all()
    for other, k in ((np.ones((50, 60)), 2), (np.full((50, 60), 1234.567), 2), (X[:100], 101)):
        with pytest.raises(DataError):
            ICA(k, kind=kind, whiten_solver=solver).fit(other.astype(np.float32))


def one_large(T, N, factor, dead=False):
    "Six Laplace sources in noise, and one unit whose values are `factor` times larger than all others."
    g = np.random.RandomState(0)
    X = g.laplace(size=(T, 6)) @ g.randn(6, N) + 0.3 * g.randn(T, N)
    X[:, 17] = factor * g.laplace(size=T)
    return X.astype(np.float32)


@pytest.mark.parametrize("factor", [1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("shape", [(300, 2000), (2000, 300)], ids=["wide", "tall"])
@pytest.mark.parametrize("solver", ["gram", "covariance", "randomized"])
def test_one_unit_far_larger_than_the_others(solver, shape, factor):
    "The other components are those of an exact decomposition: float32 alone would lose them without a word."
    X, how = one_large(*shape, factor), dict(max_iter=500, tol=1e-6)
    found = ICA(7, whiten_solver=solver, **how).fit(X)
    exact = ICA(7, whiten_solver="gram" if solver == "randomized" else solver, dtype="float64", **how).fit(X)
    bases = [torch.linalg.qr(f.time_courses_.double())[0] for f in (found, exact)]
    assert torch.linalg.svdvals(bases[0].T @ bases[1]).min() > 0.999
    others = np.arange(shape[1]) != 17  # of its own map the large unit is all
    r = np.abs(np.corrcoef(found.maps_[:, others], exact.maps_[:, others])[:7, 7:])
    assert np.sort(r[linear_sum_assignment(-r)])[1:].min() > 0.99
    assert found.maps_.dtype == found.unmixing_.dtype == torch.float32
    np.testing.assert_allclose(found.transform(X), found.time_courses_, atol=0.02)


def test_float64_is_used_only_where_it_is_needed(wide):
    assert leading_part(CentredX(torch.from_numpy(wide)), 5, "gram").data.dtype == torch.float32
    large = torch.from_numpy(one_large(300, 2000, 1e4))
    assert leading_part(CentredX(large), 7, "gram").data.dtype == torch.float64
    assert leading_part(CentredX(large), 7, "randomized").rank >= 7


@pytest.mark.parametrize("solver", ["gram", "covariance", "randomized"])
def test_values_that_are_not_finite_are_counted_and_located(solver):
    X = np.random.RandomState(0).randn(300, 700).astype(np.float32)
    X[[20, 17, 250], [600, 650, 3]] = np.nan, np.inf, -np.inf
    with pytest.raises(DataError) as e:
        ICA(4, whiten_solver=solver).fit(X)
    assert " 3 of them" in str(e.value) and "X[17, 650]" in str(e.value)
    rows = np.ones(300, dtype=bool)
    rows[17] = False
    with pytest.raises(DataError) as e:
        ICA(4, whiten_solver=solver).fit(X, rows=rows)
    assert " 2 of them" in str(e.value) and "X[20, 600]" in str(e.value)
    rows[[20, 250]] = False
    ica = ICA(4, whiten_solver=solver, max_iter=1000).fit(X, rows=rows)
    with pytest.raises(DataError) as e:
        ica.transform(X)
    assert "3 tokens" in str(e.value) and "row 17" in str(e.value)


def test_bad_input_is_refused(wide):
    masked = np.ma.masked_greater(wide, 3)
    for X in ([[1.0, 2.0]], np.ones((10, 10), dtype=int), masked):
        with pytest.raises(TypeError):
            ICA(3).fit(X)
    fitted = ICA(3).fit(wide)
    with pytest.raises(TypeError):
        fitted.transform(masked)
    with pytest.raises(ValueError):
        ICA(3).fit(np.ones(10, dtype=np.float32))
    for rows in (np.ones(7, dtype=bool), np.arange(len(wide)), np.zeros(len(wide), dtype=bool)):
        with pytest.raises(ValueError):
            ICA(3).fit(wide, rows=rows)
    with pytest.raises(ValueError):
        fitted.transform(wide[:, :10])


def test_the_blocks_put_together_are_the_centred_matrix():
    g = np.random.RandomState(0)
    X = torch.from_numpy(g.randn(70, 90) + 5 * g.randn(90)).float()
    rows = torch.arange(0, 70, 2)
    for walk in ("neurons", "tokens"):
        for standardize in (False, True):
            data = CentredX(X, rows, standardize, walk, dtype=torch.float64)
            data.width = 13  # several blocks, the last one narrower
            whole = torch.cat([b.clone() for _, b in data], 1)
            want = X[rows].double() - X[rows].double().mean(0)
            want = want / want.std(0, correction=0) if standardize else want
            np.testing.assert_allclose(whole if walk == "neurons" else whole.T, want, atol=1e-6)
            np.testing.assert_allclose(data.total, want.square().sum(), rtol=1e-6)
            np.testing.assert_allclose(gram(data), whole @ whole.T, atol=1e-6)


def test_means_and_scales_may_be_given():
    X = torch.randn(40, 60, generator=torch.Generator().manual_seed(0)) + 3
    U = torch.randn(40, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for mean, scale in ((torch.zeros(60), torch.ones(60)), (torch.ones(60), torch.full((60,), 2.0))):
        data = CentredX(X, mean=mean, scale=scale)
        want = (X.double() - mean) / scale
        P, Y = there_and_back(data, U)
        np.testing.assert_allclose(P, want.T @ U, atol=1e-3)
        np.testing.assert_allclose(Y, want @ want.T @ U, atol=1e-2)
        np.testing.assert_allclose(gram(data), want @ want.T, atol=1e-3)
    measured = CentredX(X)
    want = X.double() - X.double().mean(0)
    for _ in range(2):  # the second walk reads X where it lies
        P, Y = there_and_back(measured, U)
        np.testing.assert_allclose(P, want.T @ (U - U.mean(0)), atol=1e-3)
        np.testing.assert_allclose(Y, want @ want.T @ U, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("kind", ["temporal", "spatial"])
def test_gpu_and_cpu_agree(wide, kind):
    X, _ = planted(*SHAPES["wide"], kind=kind)
    for solver in ("gram", "randomized"):
        a, b = (ICA(5, kind=kind, whiten_solver=solver, device=d, n_init=3).fit(X) for d in ("cpu", "cuda"))
        assert matched(a.maps_, b.maps_).min() > 0.999
