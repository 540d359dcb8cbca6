"""Pins the step from maps to networks: z-scores, thresholds and tails, which tokens take part, the nulls of the same
subspace against numpy's SVD, files, and how networks are matched."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import norm
from refusals import refused

from llmfact_nb.activations import Activations
from llmfact_nb.base.files import load_tensors, save_tensors
from llmfact_nb.across.group import GroupICA
from llmfact_nb.ica import DataError
from llmfact_nb.masks import NeuronMask
from llmfact_nb.networks import FunctionalNetworks, gaussian_union, iou, match_networks, z_scores

pytestmark = pytest.mark.filterwarnings("ignore:FastICA has not converged")
WIDTHS = (50, 70, 40)


def as_activations(values, widths=WIDTHS, n_texts=2, sinks=(), site="mlp_hidden", depths=(0, 1, 2)):
    "Hand-made activations of texts of equal length; `sinks` are rows beside the first tokens."
    T = len(values)
    positions = torch.arange(T) % (T // n_texts)
    is_sink = positions == 0
    is_sink[list(sinks)] = True
    values = torch.as_tensor(values, dtype=torch.float32)
    return Activations(
        values,
        torch.arange(T) // (T // n_texts),
        positions,
        torch.arange(T),
        is_sink,
        tuple(widths),
        tuple(depths),
        site,
        "by hand",
    )


def planted(T=600, k=4, seed=0, loudness=(4.0, 3.0, 2.0, 1.5), **kw):
    """Activations with k sparse maps of different loudness and heavy-tailed courses: both kinds of ICA find them. Also
    the (k, N) bool members."""
    g, N = np.random.RandomState(seed), sum(WIDTHS)
    members = np.zeros((k, N), dtype=bool)
    for row, units in zip(members, g.permutation(N)[: 12 * k].reshape(k, 12)):
        row[units] = True
    values = (g.laplace(size=(T, k)) * loudness[:k]) @ members + 0.3 * g.randn(T, N) + g.randn(N)
    return as_activations(values, **kw), members


def loud_sinks(acts, rows, seed=0):
    "The same activations with a huge random pattern on these rows."
    values = acts.values.clone()
    values[rows] += 500 * torch.randn(len(rows), acts.n_neurons, generator=torch.Generator().manual_seed(seed))
    sinks = acts.sinks.clone()
    sinks[rows] = True
    return replace(acts, values=values, sinks=sinks)


@pytest.fixture(scope="module")
def acts():
    return planted()[0]


@pytest.fixture(scope="module")
def fitted(acts):
    return FunctionalNetworks(4, exclude="sinks", n_init=3).fit(acts)


def with_maps(fitted, z, sign):
    "A fitted object whose z-scores and signs are known to the last digit."
    nets = fitted.alternative("pca")
    nets.maps_, nets.sign_ = z, torch.tensor(sign)
    return nets


def subset(acts, rows):
    return replace(
        acts, **{n: getattr(acts, n)[rows] for n in ("values", "text_ids", "positions", "token_ids", "sinks")}
    )


# z-scores and the Gaussian null


def test_z_scores_are_those_of_float64():
    rng = np.random.default_rng(0)
    maps = (1e4 + rng.standard_normal((3, 5000)) * [[1.0], [0.1], [3.0]]).astype(np.float32)
    x = maps.astype(np.float64)
    z = z_scores(torch.from_numpy(maps))
    assert z.dtype == torch.float32
    np.testing.assert_allclose(
        z.numpy(), (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True), atol=1e-6
    )  # population standard deviation


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6 / 3, 1e30])
def test_a_constant_map_becomes_zero(value):
    z = z_scores(torch.stack([torch.full((1001,), value), torch.arange(1001.0)]))
    assert not z[0].any() and abs(float(z[1].std(correction=0)) - 1) < 1e-6


@pytest.mark.parametrize("k, alpha", [(1, 1.0), (10, 1.96), (32, 1.96), (10, 3.6)])
def test_gaussian_union(k, alpha):
    one, two = norm.sf(alpha), 2 * norm.sf(alpha)
    assert (
        gaussian_union(k, alpha)
        == pytest.approx(1 - (1 - one) ** k, rel=1e-9)
        == pytest.approx(gaussian_union(k, alpha, "raw"), rel=1e-12)
    )
    assert gaussian_union(k, alpha, "both") == pytest.approx(1 - (1 - two) ** k, rel=1e-9)


def test_expected_null_counts_the_networks(fitted):
    assert fitted.expected_null(1.5, "both") == gaussian_union(4, 1.5, "both") != gaussian_union(3, 1.5, "both")


# thresholds


def test_tails_and_the_threshold_itself(fitted):
    z = torch.zeros(2, sum(WIDTHS))
    z[0, [0, 60, 150]] = torch.tensor([2.0, 1.9999, 3.0])
    z[0, [1, 61]] = torch.tensor([-2.0, -2.5])
    z[1, [5, 6]] = torch.tensor([2.5, -2.0])
    nets = with_maps(fitted, z, [1.0, -1.0])
    units = lambda tail: [m.flat.nonzero()[:, 0].tolist() for m in nets.masks(2.0, tail)]
    assert units("positive") == [[0, 150], [5]]
    assert units("both") == [[0, 1, 61, 150], [5, 6]]
    assert units("raw") == [[0, 150], [6]], "the map as ICA gave it, so the other tail where sign_ is -1"
    mask = nets.masks(2.0)[0]
    assert (mask.counts, mask.site, mask.widths, mask.depths) == ((1, 0, 1), "mlp_hidden", WIDTHS, (0, 1, 2))
    assert nets.masks(1e9)[0].n == 0


def test_raw_is_what_scikit_learn_gives():
    from sklearn.decomposition import FastICA

    for seed in range(8):
        acts, _ = planted(seed=seed)
        nets = FunctionalNetworks(4, dtype=torch.float64).fit(acts)
        sk = FastICA(4, whiten="unit-variance", random_state=0, tol=1e-4, max_iter=200).fit(
            acts.values.double().numpy()
        )
        if sk.n_iter_ != nets.n_iter_:
            continue  # FastICA turns signs round at every step, so only after as many steps are they comparable
        maps = sk.mixing_.T
        theirs = [
            NeuronMask.from_flat(z >= 1.96, WIDTHS, "mlp_hidden")
            for z in (maps - maps.mean(1, keepdims=True)) / maps.std(1, keepdims=True)
        ]
        assert len(match_networks(nets.masks(tail="raw"), theirs, 0.9).pairs) == 4
        if 0 < (nets.sign_ < 0).sum() < 4:
            assert len(match_networks(nets.masks(tail="positive"), theirs, 0.9).pairs) < 4
            return
    raise AssertionError("no seed gave both signs, so this test has tested nothing")


@pytest.mark.parametrize("tail", ["positive", "both", "raw"])
def test_key_neurons_at_alpha_are_the_union(fitted, tail):
    union = np.any([m.flat.numpy() for m in fitted.masks(1.7, tail)], axis=0)
    key = fitted.key_neurons(1.7, tail)
    assert (key.flat.numpy() == union).all() and 0 < key.n < key.n_neurons
    default = np.any([m.flat.numpy() for m in fitted.masks(1.96, tail)], axis=0)
    assert (fitted.key_neurons(tail=tail).flat.numpy() == default).all()


@pytest.mark.parametrize("fraction", [1e-6, 0.01, 0.0594, 0.5, 1, np.float32(0.25)])
def test_key_neurons_at_a_fraction(fitted, fraction):
    key, largest = fitted.key_neurons(fraction=fraction), fitted.maps_.abs().amax(0)
    assert key.n == max(1, round(float(fraction) * 160))
    alpha = fitted.implied_alpha(fraction)
    assert torch.equal(key.flat, largest >= alpha), "they are those that pass the implied alpha, either tail"
    assert key == fitted.key_neurons(alpha=alpha, tail="both")
    assert key == fitted.key_neurons(fraction=fraction, tail="raw"), "the fraction goes by |z|, whatever the tail"


@pytest.mark.parametrize("alpha", [0, -1.96, float("nan"), float("inf"), "1.96", True, None])
def test_bad_alpha(fitted, alpha):
    for call in (fitted.masks, fitted.expected_null, lambda a: gaussian_union(4, a)):
        with refused(argument="alpha"):
            call(alpha)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan"), "0.1", True])
def test_bad_fraction(fitted, fraction):
    for call in (lambda f: fitted.key_neurons(fraction=f), fitted.implied_alpha):
        with refused(argument="fraction"):
            call(fraction)


@pytest.mark.parametrize(
    "call",
    [
        lambda f, a: f.masks(),
        lambda f, a: f.key_neurons(),
        lambda f, a: f.key_neurons(fraction=0.1),
        lambda f, a: f.implied_alpha(0.1),
        lambda f, a: f.transform(a),
        lambda f, a: f.alternative(),
        lambda f, a: f.expected_null(),
        lambda f, a: f.stable(),
        lambda f, a: f.save("must-not-appear"),
    ],
    ids=[
        "masks",
        "key alpha",
        "key fraction",
        "implied_alpha",
        "transform",
        "alternative",
        "expected_null",
        "stable",
        "save",
    ],
)
def test_nothing_comes_of_an_unfitted_object(call, acts):
    with pytest.raises(ValueError):
        call(FunctionalNetworks(4), acts)


def test_other_refusals(fitted, acts):
    for f in (fitted.masks, fitted.key_neurons, fitted.expected_null):
        with refused(argument="tail"):
            f(tail="left")
    with pytest.raises(ValueError):
        fitted.key_neurons(alpha=1.96, fraction=0.1)
    for exclude in ("sink", True, 0):
        with refused(argument="exclude"):
            FunctionalNetworks(exclude=exclude)
    with refused(TypeError, "Tensor"):
        FunctionalNetworks(4).fit(acts.values)
    with refused(argument="method"):
        fitted.alternative("random")
    with refused(TypeError, "n_compnents"):
        FunctionalNetworks(n_compnents=3)
    for bad in (dict(n_components=0), dict(kind="space"), dict(fun="tanh")):
        with refused(argument=next(iter(bad))):
            FunctionalNetworks(**bad).fit(acts)


@pytest.mark.parametrize("change", [dict(site="mlp_out"), dict(depths=(0, 1, 3)), dict(widths=(70, 50, 40))])
def test_transform_refuses_other_neurons(fitted, acts, change):
    with refused(argument="activations"):
        fitted.transform(replace(acts, **change))


# which tokens take part


@pytest.mark.parametrize("exclude, away", [(None, []), ("first", [0, 300]), ("sinks", [0, 17, 300, 411])])
@pytest.mark.parametrize("kind", ["temporal", "spatial"])
def test_exclude_leaves_exactly_those_rows(kind, exclude, away):
    acts, _ = planted(sinks=(17, 411))
    nets = FunctionalNetworks(4, kind, standardize=True, exclude=exclude).fit(acts)
    assert (~nets.rows_).nonzero()[:, 0].tolist() == away and nets.time_courses_.shape == (600 - len(away), 4)
    alone = FunctionalNetworks(4, kind, standardize=True).fit(subset(acts, nets.rows_))
    for name in ("maps_", "mixing_", "time_courses_", "mean_", "scale_"):
        torch.testing.assert_close(getattr(nets, name), getattr(alone, name), rtol=1e-3, atol=1e-3)


def test_nothing_left():
    acts = as_activations(torch.randn(4, 160), n_texts=4)
    for exclude in ("first", "sinks"):
        with refused(DataError, exclude):
            FunctionalNetworks(1, exclude=exclude).fit(acts)


@pytest.mark.parametrize("kind", ["temporal", "spatial"])
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_networks_are_found_past_the_sinks(seed, kind):
    acts, members = planted(seed=seed, loudness=(2.0, 2.0, 2.0, 2.0))
    acts = loud_sinks(acts, [0, 17, 300, 411], seed)  # two first tokens and two others
    truth = [NeuronMask.from_flat(m, WIDTHS, "mlp_hidden") for m in members]
    best = lambda exclude: match_networks(
        truth, FunctionalNetworks(4, kind, exclude=exclude, n_init=3).fit(acts).masks()
    ).iou.amax(1)
    assert best("sinks").min() > 0.9
    assert best(None).max() < 0.5 and best("first").min() < 0.5, "the sinks that stay mislead"


def test_standardize_lets_quiet_neurons_take_part():
    acts, members = planted()
    gains = torch.ones(160)
    gains[~torch.from_numpy(members).any(0)] = 300  # loud neurons that carry only noise
    loud = replace(acts, values=acts.values * gains)
    truth = [NeuronMask.from_flat(m, WIDTHS, "mlp_hidden") for m in members]
    best = lambda a, s: match_networks(truth, FunctionalNetworks(4, standardize=s).fit(a).masks()).iou.amax(1)
    assert best(loud, True).min() > 0.9 and best(loud, False).max() < 0.2
    torch.testing.assert_close(
        FunctionalNetworks(4, standardize=True).fit(loud).maps_,
        FunctionalNetworks(4, standardize=True).fit(acts).maps_,
        rtol=1e-2,
        atol=1e-2,
    )


# the same subspace, other components


def reference(acts, rows, kind, standardize):
    "What is decomposed, in float64, by numpy alone; and its singular value decomposition."
    X = acts.values[rows].double().numpy()
    X = X - X.mean(0)
    if standardize:
        X = X / X.std(0)
    if kind == "spatial":
        X = X - X.mean(1, keepdims=True)
    return X, *np.linalg.svd(X, full_matrices=False)


@pytest.mark.parametrize("exclude", [None, "sinks"])
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("kind", ["temporal", "spatial"])
def test_alternatives_span_the_leading_directions(kind, standardize, exclude):
    acts, _ = planted(sinks=(17,))
    nets = FunctionalNetworks(3, kind, standardize, exclude, whiten_solver="gram").fit(acts)
    X, U, S, V = reference(acts, nets.rows_, kind, standardize)
    leading = torch.from_numpy((U[:, :3] * S[:3]) @ V[:3])
    share = torch.from_numpy(S[:3] ** 2 / (X**2).sum())
    pca, turned = nets.alternative("pca"), nets.alternative("rotation", 3)
    for other in (nets, pca, turned, turned.alternative("rotation", 1)):
        torch.testing.assert_close(other.time_courses_.double() @ other.mixing_.double(), leading, rtol=1e-3, atol=2e-3)
        torch.testing.assert_close(other.transform(acts)[nets.rows_], other.time_courses_, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(other.explained_variance_ratio_.double().sum(), share.sum(), rtol=1e-4, atol=0)
        held = [
            float((c[:, None] * m).double().square().sum()) / (X**2).sum()
            for c, m in zip(other.time_courses_.T, other.mixing_)
        ]
        np.testing.assert_allclose(other.explained_variance_ratio_, held, rtol=1e-3)
        assert ((z_scores(other.mixing_) - other.maps_).abs() < 1e-4).all() and ((other.maps_**3).sum(1) >= 0).all(), (
            "the longer tail is positive"
        )
    torch.testing.assert_close(pca.explained_variance_ratio_.double(), share, rtol=1e-3, atol=0)
    assert (abs((z_scores(torch.from_numpy(V[:3])) * pca.maps_).mean(1)) > 0.9999).all(), (
        "principal components, in their order"
    )
    assert (nets.method_, pca.method_, turned.method_) == ("ica", "pca", "rotation")


@pytest.mark.parametrize("kind", ["temporal", "spatial"])
def test_rotations(kind, acts):
    nets = FunctionalNetworks(4, kind).fit(acts)
    turned = [nets.alternative("rotation", s) for s in (0, 1, 2)]
    for a, b in itertools.combinations([nets, nets.alternative("pca"), *turned], 2):
        assert (a.maps_ - b.maps_).abs().max() > 0.1
    assert torch.equal(nets.alternative("rotation").maps_, turned[0].maps_) and torch.equal(
        nets.alternative("rotation", 1).maps_, turned[1].maps_
    )
    for a in turned:
        torch.testing.assert_close(a.rotation_ @ a.rotation_.T, torch.eye(4), rtol=0, atol=1e-5)
        assert a.stability_.isnan().all()


def test_rotations_are_equally_likely(acts):
    """A Haar-random orthogonal matrix has entries of mean 0 and mean square 1/k; QR without its sign rule has a first
    column that leans."""
    nets = FunctionalNetworks(4).fit(acts)
    turns = torch.stack(
        [(a := nets.alternative("rotation", s)).rotation_ * a.sign_[:, None] for s in range(400)]
    )  # before the map's sign
    assert turns.mean(0).abs().max() < 0.15 and (turns.square().mean(0) - 0.25).abs().max() < 0.07


def test_an_alternative_of_an_alternative(fitted):
    pca, turned = fitted.alternative("pca"), fitted.alternative("rotation", 5)
    for again, direct in (
        (turned.alternative("pca"), pca),
        (pca.alternative("pca"), pca),
        (pca.alternative("rotation", 5), turned),
        (turned.alternative("rotation", 5), turned),
    ):
        for name in ("mixing_", "maps_", "time_courses_", "explained_variance_ratio_", "rotation_", "sign_"):
            torch.testing.assert_close(
                getattr(again, name).float(), getattr(direct, name).float(), rtol=1e-3, atol=1e-3
            )
        assert again.masks(1.5) == direct.masks(1.5)


def test_an_alternative_leaves_the_original(fitted):
    before = {k: v.clone() for k, v in vars(fitted).items() if isinstance(v, torch.Tensor)}
    other = fitted.alternative("rotation", 1)
    other.maps_[:] = 7
    other.time_courses_[:] = 7
    assert fitted.method_ == "ica" and all(
        torch.equal(v.nan_to_num(9), getattr(fitted, k).nan_to_num(9)) for k, v in before.items()
    )


# restarts, one text at a time


def test_stable(fitted, acts):
    assert fitted.stable(-1) == [0, 1, 2, 3] and fitted.stable(1.1) == []
    nets = fitted.alternative("pca")
    nets.stability_ = torch.tensor([0.5, 0.9, 0.7999, 0.8])
    assert nets.stable() == [1, 3] and nets.stable(0.5) == [0, 1, 2, 3]
    for unknown in (FunctionalNetworks(4).fit(acts), fitted.alternative("pca")):
        with refused(ValueError, "n_init"):
            unknown.stable()


def test_fit_each(acts):
    acts = replace(acts, text_ids=torch.tensor([3, 7]).repeat_interleave(300))
    each = FunctionalNetworks(4, "spatial", True, "first", random_state=2, fun="cube").fit_each(acts)
    for nets, text in zip(each, (3, 7), strict=True):
        alone = FunctionalNetworks(4, "spatial", True, "first", random_state=2, fun="cube").fit(acts.of_text(text))
        torch.testing.assert_close(nets.maps_, alone.maps_)
        assert nets.rows_.tolist() == [False] + [True] * 299


def test_fit_each_names_the_text_that_fails(acts):
    short = replace(acts, text_ids=torch.tensor([0] * 300 + [4] * 297 + [9] * 3))
    with refused(ValueError, "text 9", "n_components"):
        FunctionalNetworks(4).fit_each(short)
    bad = acts.values.clone()
    bad[305, 2] = float("nan")
    with refused(ValueError, "text 1", "nan"):
        FunctionalNetworks(4).fit_each(replace(acts, values=bad))


# files


def same(a, b):
    for name in (
        "mixing_",
        "rotation_",
        "sign_",
        "mean_",
        "scale_",
        "stability_",
        "time_courses_",
        "rows_",
        "convergence_",
        "explained_variance_ratio_",
        "maps_",
    ):
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype and torch.equal(
            x.nan_to_num(9) if x.is_floating_point() else x, y.nan_to_num(9) if y.is_floating_point() else y
        ), name
    for name in (
        "method_",
        "converged_",
        "n_iter_",
        "whiten_solver_",
        "widths",
        "depths",
        "site",
        "model",
        "n_components",
        "kind",
        "standardize",
        "exclude",
    ):
        assert getattr(a, name) == getattr(b, name) and type(getattr(a, name)) is type(getattr(b, name)), name
    assert repr(a) == repr(b) and a.masks(1.5, "raw") == b.masks(1.5, "raw")


SETTINGS = {
    "plain": {},
    "spatial": dict(kind="spatial", standardize=True, exclude="sinks", n_init=3),
    "float64": dict(dtype=torch.float64),
    "numpy seed": dict(random_state=np.int64(3), n_init=np.int64(2)),
    "device": dict(device=torch.device("cpu"), exclude="first"),
    "no seed": dict(random_state=None),
    "sklearn": dict(backend="sklearn"),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_saved_file_is_the_same_object(settings, acts, tmp_path):
    nets = FunctionalNetworks(4, **settings).fit(acts)
    path = nets.save(tmp_path / "deep" / "nets.safetensors")
    again = FunctionalNetworks.load(path)
    same(nets, again)
    torch.testing.assert_close(again.transform(acts), nets.transform(acts))
    same(nets.alternative("rotation", 2), again.alternative("rotation", 2))
    if settings.get("random_state", 0) is not None:
        torch.testing.assert_close(again.fit(acts).maps_, nets.maps_)  # the settings came back too
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("method", ["pca", "rotation"])
def test_alternatives_can_be_saved(method, fitted, acts, tmp_path):
    other = fitted.alternative(method, 1)
    again = FunctionalNetworks.load(other.save(tmp_path / "x.safetensors"))
    same(other, again)
    torch.testing.assert_close(again.transform(acts)[fitted.rows_], other.time_courses_, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        dict(site=("model.layers.0.mlp", "model.layers.4.mlp", "lm.norm")),
        dict(depths=(1, 4, 29)),
        dict(site="mlp_out", model=""),
    ],
)
def test_sites_and_layers_are_kept(change, acts, tmp_path):
    acts = replace(acts, **change)
    nets = FunctionalNetworks(4).fit(acts)
    again = FunctionalNetworks.load(nets.save(tmp_path / "x.safetensors"))
    same(nets, again)
    for name, value in change.items():
        assert getattr(again, name) == value
    assert again.masks()[0].depths == acts.depths and again.masks()[0].site == acts.site
    torch.testing.assert_close(again.transform(acts), nets.time_courses_, rtol=1e-3, atol=1e-3)


def test_float64_goes_all_the_way(acts):
    nets = FunctionalNetworks(4, dtype=torch.float64).fit(acts)
    assert nets.mixing_.dtype == torch.float64
    for other in (nets, nets.alternative("pca"), nets.alternative("rotation", 1)):
        torch.testing.assert_close(other.transform(acts).double(), other.time_courses_.double(), rtol=1e-3, atol=1e-3)


def test_files_that_are_refused(fitted, tmp_path):
    path = fitted.save(tmp_path / "nets.safetensors")
    with refused(FileNotFoundError, "absent"):
        FunctionalNetworks.load(tmp_path / "absent.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-100])
    (tmp_path / "text.safetensors").write_text("hello")
    save_file({"mixing_": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    fitted.masks()[0].save(tmp_path / "mask.safetensors")
    for name in ("cut", "text", "foreign", "mask"):
        with refused(ValueError, f"{name}.safetensors"):
            FunctionalNetworks.load(tmp_path / f"{name}.safetensors")
    tensors, meta = load_tensors(path, "networks")
    about = {k: meta[k] for k in ("settings", "learned")}
    for name in [*tensors, *about]:
        left = {k: v for k, v in tensors.items() if k != name}
        save_tensors(tmp_path / "less.safetensors", left, "networks", {k: v for k, v in about.items() if k != name})
        with refused(ValueError, "less.safetensors", name):
            FunctionalNetworks.load(tmp_path / "less.safetensors")


# seeds and inputs


def test_seed_0_is_a_seed(acts):
    fit = lambda seed: (
        FunctionalNetworks(4, random_state=seed, max_iter=1, n_init=1).fit(acts).mixing_
    )  # one step: the start still shows
    assert torch.equal(fit(0), fit(0)) and torch.equal(fit(0), FunctionalNetworks(4, max_iter=1).fit(acts).mixing_)
    assert (fit(0) - fit(1)).abs().max() > 0.01


def test_global_generators_are_untouched(acts, tmp_path):
    states = lambda: (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate())
    before = states()
    nets = FunctionalNetworks(4, n_init=2, whiten_solver="randomized").fit(acts)
    nets.alternative("rotation", 4)
    FunctionalNetworks.load(nets.save(tmp_path / "x.safetensors")).key_neurons(fraction=0.1)
    FunctionalNetworks(4).fit_each(acts)
    assert states() == before


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("kind", ["temporal", "spatial"])
def test_activations_are_only_read(kind, standardize, tmp_path):
    acts, _ = planted(sinks=(17,))
    before = {n: getattr(acts, n).clone() for n in ("values", "text_ids", "positions", "token_ids", "sinks")}
    nets = FunctionalNetworks(4, kind, standardize, "sinks").fit(acts)
    nets.transform(acts)
    assert all(torch.equal(getattr(acts, n), v) for n, v in before.items())
    mapped = Activations.load(acts.save(tmp_path / "acts.safetensors"))
    stored = (tmp_path / "acts.safetensors").read_bytes()
    torch.testing.assert_close(FunctionalNetworks(4, kind, standardize, "sinks").fit(mapped).maps_, nets.maps_)
    assert (tmp_path / "acts.safetensors").read_bytes() == stored


def test_bfloat16_activations(acts):
    nets = FunctionalNetworks(4).fit(acts)
    half = FunctionalNetworks(4).fit(replace(acts, values=acts.values.bfloat16()))
    assert half.maps_.dtype == torch.float32 and len(match_networks(nets.masks(), half.masks(), 0.9).pairs) == 4
    torch.testing.assert_close(
        half.transform(replace(acts, values=acts.values.bfloat16())), half.time_courses_, rtol=1e-3, atol=1e-3
    )


# matching


def mask(units, n=12, site="mlp_hidden", depths=None):
    flat = np.zeros(n, dtype=bool)
    flat[list(units)] = True
    return NeuronMask.from_flat(flat, (n - 5, 5), site, depths)


def test_iou():
    a, b, empty = mask(range(4)), mask(range(2, 8)), mask([])
    assert iou(a, b) == iou(b, a) == 2 / 8
    assert iou(a, a) == iou(empty, empty) == 1.0 and iou(a, empty) == iou(empty, a) == 0.0


@pytest.mark.parametrize("seed", range(12))
def test_matching_is_the_best_there_is(seed):
    rng = np.random.default_rng(seed)
    ka, kb = rng.integers(1, 6, 2)
    draw = lambda k: [mask(np.flatnonzero(rng.random(12) < rng.choice([0.0, 0.2, 0.5, 0.9]))) for _ in range(k)]
    a, b = draw(ka), draw(kb)
    table = np.array([[len(x & y) / len(x | y) if x | y else 1.0 for y in map(members, b)] for x in map(members, a)])
    for threshold in (0.0, 0.2, 0.5):
        match = match_networks(a, b, threshold)
        np.testing.assert_allclose(match.iou.numpy(), table, atol=1e-6)
        assert match.counts.tolist() == (table > threshold + 1e-7).sum(1).tolist() and match.n_similar == int(
            (table > threshold + 1e-7).sum()
        )
        assert all(table[i, j] > threshold for i, j in match.pairs)
        assert len({i for i, _ in match.pairs}) == len({j for _, j in match.pairs}) == len(match.pairs)
    small, large = (table, kb) if ka <= kb else (table.T, ka)
    best = max(sum(row[j] for row, j in zip(small, p)) for p in itertools.permutations(range(large), len(small)))
    assert sum(table[i, j] for i, j in match_networks(a, b, 0).pairs) == pytest.approx(best, abs=1e-6)


def members(m):
    return set(m.flat.nonzero()[:, 0].tolist())


def test_a_greedy_choice_would_be_worse():
    a, b = ([mask([0, 1, 2, 3, 4]), mask([0, 1, 2])], [mask([0, 1, 2, 3]), mask([4, 5, 6, 3])])
    table = match_networks(a, b, 0).iou  # .8 .286 / .75 0: greedy .8 + 0, best .286 + .75
    assert table.argmax() == 0 and match_networks(a, b, 0).pairs == [(0, 1), (1, 0)]


@pytest.mark.parametrize("n, threshold", [(5, 0.2), (4, 0.25), (2, 0.5), (3, 1 / 3), (10, 0.1), (1, 1.0)])
def test_an_iou_on_the_threshold_is_not_above_it(n, threshold):
    match = match_networks([mask([0])], [mask(range(n))], threshold)
    assert match.pairs == [] and match.n_similar == 0
    assert match_networks([mask([0])], [mask(range(n))], threshold - 1e-3).n_similar == 1


def test_the_papers_counting_counts_pairs():
    a, b = ([mask(range(6)), mask([11])], [mask(range(5)), mask(range(6)), mask(range(4, 8)), mask([])])
    match = match_networks(a, b)
    assert match.counts.tolist() == [3, 0] and match.n_similar == 3 and match.pairs == [(0, 1)]


def test_matching_refuses():
    one = [mask([0])]
    for a, b in (([], one), (one, []), ([], [])):
        with pytest.raises(ValueError):
            match_networks(a, b)
    for other in (mask([0], n=13), mask([0], site="mlp_out"), mask([0], depths=(0, 2))):
        with pytest.raises(ValueError):
            match_networks(one, [other])
    for threshold in (-0.1, 1.1, float("nan")):
        with refused(argument="threshold"):
            match_networks(one, one, threshold)


@pytest.mark.parametrize(
    "change", [dict(n=13), dict(site="mlp_out"), dict(depths=(0, 2))], ids=["widths", "site", "depths"]
)
def test_iou_refuses_masks_of_different_models(change):
    with pytest.raises(ValueError):
        iou(mask([0]), mask([0], **change))


# groups


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("kind", ["temporal", "spatial"])
def test_networks_of_a_group_are_those_of_a_fit_on_all_tokens(kind, standardize, tmp_path):
    """Shards on disk, reduced without loss, give the networks of the whole matrix, their nulls, and masks of the
    planted units."""
    acts, members = planted(n_texts=3)
    shards = [subset(acts, acts.text_ids == i).save(tmp_path / f"{i}.safetensors") for i in range(3)]
    how = dict(kind=kind, standardize=standardize, exclude="first", dtype="float64", tol=1e-10, max_iter=2000)
    plain, nets = (FunctionalNetworks(4, **how).fit(acts), GroupICA(4, n_reduced=160, **how).fit(shards).networks())
    order = torch.corrcoef(torch.cat([plain.maps_, nets.maps_]).double())[:4, 4:].abs().argmax(1)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(nets.maps_[order], plain.maps_, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(nets.time_courses_[:, order], plain.time_courses_, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        nets.transform(acts)[acts.positions > 0].double(), nets.time_courses_, rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(
        nets.alternative("pca").maps_.abs(), plain.alternative("pca").maps_.abs(), rtol=1e-2, atol=1e-2
    )
    truth = [NeuronMask.from_flat(torch.from_numpy(m), WIDTHS, "mlp_hidden") for m in members]
    assert match_networks(truth, nets.masks(2)).iou.amax(1).min() > 0.9
    again = FunctionalNetworks.load(nets.save(tmp_path / "networks.safetensors"))
    assert again.masks(2) == nets.masks(2) and repr(again) == repr(nets) and "597 of 597 tokens" in repr(nets)


@pytest.mark.parametrize(
    "group",
    [
        GroupICA.canica(4, n_init=2),
        GroupICA(4, center_texts=True, n_init=2),
        GroupICA(4, "spatial", center_texts=True, n_init=2),
    ],
    ids=["canica", "temporal", "spatial"],
)
def test_a_group_of_texts_centred_one_by_one_gives_masks_but_no_time_courses_of_other_tokens(group, acts, tmp_path):
    nets = group.fit(acts).networks()
    assert nets.key_neurons(fraction=0.1).n == 16 and nets.stability_.shape == (4,)
    for networks in (nets, nets.alternative("pca"), FunctionalNetworks.load(nets.save(tmp_path / "n.safetensors"))):
        with refused(ValueError, "GroupICA.transform"):
            networks.transform(acts)


def test_a_group_that_is_not_fitted_has_no_networks():
    with pytest.raises(ValueError):
        GroupICA(4).networks()


def test_an_interrupted_fit_goes_on(acts, fitted, tmp_path):
    path = tmp_path / "white.safetensors"
    for _ in range(2):
        assert torch.equal(FunctionalNetworks(4, exclude="sinks", n_init=3).fit(acts, path).maps_, fitted.maps_)
    with refused(ValueError, "white.safetensors"):
        FunctionalNetworks(4, n_init=3).fit(acts, path)
