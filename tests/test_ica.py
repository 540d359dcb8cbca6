"""Pins the ICA room: planted sources are recovered, every whitening solver finds the float64 subspace, torch and scikit-learn agree from the same start, inputs are only
read, rows and standardising mean what they say, conventions of order, sign and rotation hold, an interrupted fit goes on from what it whitened, and bad input is refused by name."""

import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.optimize import linear_sum_assignment

import llmfact_nb.ica as ica_module
from llmfact_nb.ica import (
    ICA,
    CentredX,
    ConvergenceWarning,
    _newton_schulz,
    choose_solver,
    consensus,
    decorrelate,
    fastica,
    gram,
    leading_directions,
    negentropy,
    there_and_back,
)

SHAPES = {"wide": (500, 1600), "tall": (1800, 240)}


def planted(T, N, k=5, kind="temporal", seed=0, noise=0.05):
    "X (T, N) with k planted components, and the maps (k, N). Temporal: Laplace time courses, dense maps. Spatial: sparse maps, Gaussian time courses."
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
    assert real.min() > 0.95 and none.max() < real.min() - 0.1
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
    np.testing.assert_allclose(_newton_schulz(W), decorrelate(W), atol=1e-6)


def test_leading_directions_of_a_known_matrix():
    g = torch.Generator().manual_seed(0)
    V = torch.linalg.qr(torch.randn(300, 300, generator=g, dtype=torch.float64))[0]
    values = torch.arange(1, 301, dtype=torch.float64) ** -1.5
    U, n_iter, change = leading_directions(
        lambda Q: (V * values) @ (V.T @ Q), torch.randn(300, 20, generator=g, dtype=torch.float64), k=10
    )
    assert n_iter <= 6 and change < 0.01 and torch.linalg.svdvals(V[:, :10].T @ U).min() > 0.999
    U, n_iter, _ = leading_directions(
        lambda Q: (V * values) @ (V.T @ Q), torch.randn(300, 200, generator=g, dtype=torch.float64), k=10, n_iter=3
    )
    assert n_iter == 3 and torch.linalg.svdvals(V[:, :10].T @ U).min() > 0.999  # no room for a second block


def test_auto_takes_the_small_matrix_when_one_side_is_small():
    assert choose_solver(300, 50_000, 48)[0] == "gram" and choose_solver(50_000, 300, 48)[0] == "covariance"
    assert choose_solver(4096, 46_080, 48)[0] == "randomized" and choose_solver(46_080, 4096, 48)[0] == "randomized"
    assert choose_solver(2000, 46_080, 600)[0] == "gram"


def test_constant_neurons(wide):
    for walk in ("gram", "covariance"):
        X = wide[:, :500].copy()
        X[:, 7], X[:, 9] = 1234.567, 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ica = ICA(4, whiten_solver=walk).fit(X)
        assert (ica.maps_[:, [7, 9]] == 0).all() and (ica.maps_[:, :7] != 0).all()
        with pytest.warns(UserWarning, match="2 of 500 neurons are constant"):
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
    with pytest.warns(ConvergenceWarning, match=r"3 of 3 restarts still moved after max_iter=2 .*Raise max_iter"):
        ica = ICA(5, max_iter=2, n_init=3).fit(wide)
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
        with pytest.warns(UserWarning, match="1 of 420 neurons are constant"):
            return ICA(5, kind=kind, whiten_solver=solver, standardize=True, **how).fit(X, rows, path)

    def stop(*_):
        raise RuntimeError("the machine went down")

    expected = fit()
    with monkeypatch.context() as patch:
        patch.setattr(ica_module, "fastica", stop)
        with pytest.raises(RuntimeError, match="went down"):
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
    "how, message",
    [
        ({"n_components": 6}, "n_components was 5 and is now 6"),
        ({"kind": "spatial"}, "kind was 'temporal' and is now 'spatial'"),
        ({"whiten_solver": "randomized"}, "whiten_solver was 'gram' and is now 'randomized'"),
        ({"standardize": True}, "standardize was False and is now True"),
        ({"dtype": torch.float64}, "dtype was 'float32' and is now 'float64'"),
        ({"random_state": 1}, "random_state was 0 and is now 1"),
        ({"n_oversamples": 20}, "n_oversamples was 16 and is now 20"),
        ({"backend": "sklearn"}, "backend='sklearn' whitens inside scikit-learn"),
    ],
    ids=str,
)
def test_whitened_data_of_another_fit_are_refused(how, message, wide, tmp_path):
    path = tmp_path / "white.safetensors"
    ICA(5).fit(wide, path=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        ICA(**{"n_components": 5} | how).fit(wide, path=path)
    assert path.read_bytes() == before


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
    for X, rows, message in (
        (other, None, "values was"),
        (middle, None, "values was"),
        (hole, None, "values was"),
        (wide[:-1], None, "shape was"),
        (wide, np.arange(len(wide)) > 3, "rows was 'all'"),
    ):
        with pytest.raises(ValueError, match=f"white.safetensors.*another fit: .*{message}"):
            ICA(5).fit(X, rows, path)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        ICA(5).fit(wide, path=tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="another program"):
        ICA(5).fit(wide, path=tmp_path / "foreign.safetensors")


def test_estimator_conventions(wide, capsys):
    from sklearn.base import clone

    ica = ICA(5, fun="cube", standardize=True)
    assert (
        clone(ica).get_params() == ica.get_params() and repr(ica) == "ICA(n_components=5, fun='cube', standardize=True)"
    )
    assert ica.set_params(n_components=3).n_components == 3 and ica.fit(wide) is ica
    with pytest.raises(ValueError, match="'n_componets' is no parameter of ICA"):
        ica.set_params(n_componets=3)
    with pytest.raises(ValueError, match="call fit"):
        ICA(2).transform(wide)
    ICA(3, verbose=True).fit(wide)
    assert "converged" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n_components": 0}, "n_components=0; expected an integer of at least 1"),
        ({"n_components": 2.5}, "n_components=2.5"),
        ({"n_components": 101}, r"n_components=101 is above min\(tokens, neurons\) = 100"),
        ({"n_components": 100, "kind": "spatial"}, "numerical rank"),
        ({"kind": "both"}, "kind='both'; expected one of 'temporal', 'spatial'"),
        ({"whiten_solver": "svd"}, "whiten_solver='svd'; expected one of 'auto', 'gram'"),
        ({"fun": "tanh"}, "fun='tanh'; expected one of 'logcosh'"),
        ({"backend": "jax"}, "backend='jax'"),
        ({"standardize": "text"}, "standardize='text'; expected one of False, True"),
        ({"n_init": 0}, "n_init=0"),
        ({"max_iter": 0}, "max_iter=0"),
        ({"tol": 0}, "tol=0"),
        ({"dtype": torch.float16}, "dtype=torch.float16; expected torch.float32 or torch.float64"),
        ({"dtype": "half"}, "dtype='half'"),
        ({"random_state": -1}, "random_state=-1"),
        ({"w_init": np.eye(3)}, r"w_init has the shape \(3, 3\); expected \(5, 5\)"),
        ({"w_init": np.ones((5, 5))}, "finite and invertible"),
    ],
)
def test_bad_settings_are_refused_by_name(arguments, message):
    X = np.random.RandomState(0).randn(100, 400).astype(np.float32)
    with pytest.raises(ValueError, match=message):
        ICA(**{"n_components": 5, **arguments}).fit(X)


@pytest.mark.parametrize("solver", ["gram", "covariance", "randomized"])
@pytest.mark.parametrize("kind", ["temporal", "spatial"])
def test_more_components_than_directions(solver, kind):
    g = np.random.RandomState(0)
    X = (g.laplace(size=(300, 6)) @ g.laplace(size=(6, 400))).astype(np.float32)
    with pytest.raises(ValueError, match="n_components=7 is above the numerical rank of X in float32, 6"):
        ICA(7, kind=kind, whiten_solver=solver).fit(X)
    assert ICA(6, kind=kind, whiten_solver=solver).fit(X).maps_.isfinite().all()
    with pytest.raises(ValueError, match="numerical rank of X in float32, 0"):
        ICA(2, whiten_solver=solver).fit(np.ones((50, 60), dtype=np.float32))


@pytest.mark.parametrize("solver", ["gram", "covariance", "randomized"])
def test_values_that_are_not_finite_are_counted_and_located(solver):
    X = np.random.RandomState(0).randn(300, 700).astype(np.float32)
    X[[20, 17, 250], [600, 650, 3]] = np.nan, np.inf, -np.inf
    with pytest.raises(ValueError, match=r"nan or infinite as float32: 3 of them, the first at X\[17, 650\]"):
        ICA(4, whiten_solver=solver).fit(X)
    rows = np.ones(300, dtype=bool)
    rows[17] = False
    with pytest.raises(ValueError, match=r"2 of them, the first at X\[20, 600\]"):
        ICA(4, whiten_solver=solver).fit(X, rows=rows)
    rows[[20, 250]] = False
    ica = ICA(4, whiten_solver=solver, max_iter=1000).fit(X, rows=rows)
    with pytest.raises(ValueError, match=r"in 3 tokens, the first in row 17"):
        ica.transform(X)


def test_bad_input_is_refused(wide):
    with pytest.raises(TypeError, match="pass .values"):
        ICA(3).fit([[1.0, 2.0]])
    with pytest.raises(TypeError, match="int64"):
        ICA(3).fit(np.ones((10, 10), dtype=int))
    with pytest.raises(ValueError, match=r"shape \(10,\)"):
        ICA(3).fit(np.ones(10, dtype=np.float32))
    for rows in (np.ones(7, dtype=bool), np.arange(len(wide)), np.zeros(len(wide), dtype=bool)):
        with pytest.raises(ValueError, match="rows"):
            ICA(3).fit(wide, rows=rows)
    with pytest.raises(ValueError, match="X has 10 neurons; these components were fitted on 1,600"):
        ICA(3).fit(wide).transform(wide[:, :10])


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
        data = CentredX(X, standardize=True)
        data.mean, data.scale, data.measured = mean, scale, True
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("kind", ["temporal", "spatial"])
def test_gpu_and_cpu_agree(wide, kind):
    X, _ = planted(*SHAPES["wide"], kind=kind)
    for solver in ("gram", "randomized"):
        a, b = (ICA(5, kind=kind, whiten_solver=solver, device=d, n_init=3).fit(X) for d in ("cpu", "cuda"))
        assert matched(a.maps_, b.maps_).min() > 0.999
