"""Pins what must not matter: batch size, padding, the order of texts, where the weights lie, their precision within
stated tolerances, units and signs of the data, the way over a file; and that masks are sets. Examples are drawn by
hypothesis, a few of them always and many in the slow round, the same ones each time."""

import contextlib
import sys
import tempfile
import warnings
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from llmfact_nb.activations import Activations, capture
from llmfact_nb.evaluate import perplexity
from llmfact_nb.ica import ICA
from llmfact_nb.masked_model import MaskedModel
from llmfact_nb.masks import NeuronMask, apply_mask_and_average, apply_mask_any
from llmfact_nb.networks import FunctionalNetworks, iou
from llmfact_nb.sites import blocks

set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")  # nothing of it in the working tree
pytestmark = pytest.mark.filterwarnings(
    "ignore:FastICA has not converged",
    "ignore:no unit is masked",
    "ignore:The mask holds more than half",
    r"ignore:\d+ of \d+ units found no unused",
)


def holds(few: int, many: int, **strategies):
    "The decorated property becomes two tests: of few examples, and, slow, of many."

    def decorate(property_):
        def of(n):  # without shrinking: a failing example is printed whole, and is small enough
            rules = settings(
                max_examples=n,
                derandomize=True,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate],
            )
            return rules(given(**strategies)(property_))

        setattr(sys.modules[property_.__module__], f"{property_.__name__}_often", pytest.mark.slow(of(many)))
        return of(few)

    return decorate


# Texts through a model

LAYOUTS = (
    "gpt2",
    "llama",
    "gemma3_text",
    "lfm2",
    "bloom",
    "bert",
)  # learned positions, rotary, windows, convolutions, ALiBi, encoder
texts = st.lists(st.tuples(st.integers(1, 14), st.integers(0, 50)), min_size=1, max_size=6).map(
    lambda drawn: [families.words(n, seed) for n, seed in drawn]
)
sites = st.sampled_from(["mlp_out", "mlp_hidden"])
batches = st.sampled_from([1, 2, 3, 7, "auto"])
tokenizers = st.builds(families.tokenizer, pad=st.booleans(), side=st.sampled_from(["left", "right"]))
orders = st.randoms(use_true_random=False)


@cache
def model_of(family: str, dtype: torch.dtype = torch.float32):
    return families.build(family).to(dtype)


@cache
def rounded(family: str, dtype: torch.dtype):
    "The weights that `model_of(family, dtype)` has, in float32."
    return families.build(family).to(dtype).float()


def rows_of(acts: Activations, text: int) -> torch.Tensor:
    return acts.values[acts.text_ids == text]


@holds(
    10,
    150,
    family=st.sampled_from(LAYOUTS),
    texts=texts,
    site=sites,
    batch_size=batches,
    tokenizer=tokenizers,
    order=orders,
)
def test_a_texts_rows_do_not_depend_on_its_company(family, texts, site, batch_size, tokenizer, order):
    model, places = model_of(family), list(range(len(texts)))
    order.shuffle(places)
    together = capture(model, tokenizer, [texts[i] for i in places], site, batch_size=batch_size, progress=False)
    assert together.text_ids.tolist() == sorted(together.text_ids.tolist())
    for place, i in enumerate(places):
        alone = capture(model, families.tokenizer(), [texts[i]], site, batch_size=1, progress=False)
        torch.testing.assert_close(rows_of(together, place), alone.values, rtol=1e-4, atol=1e-4)
        assert torch.equal(together.token_ids[together.text_ids == place], alone.token_ids) and torch.equal(
            together.positions[together.text_ids == place], alone.positions
        )


@holds(
    8,
    100,
    family=st.sampled_from(LAYOUTS[:-1]),
    texts=texts,
    batch_size=batches,
    tokenizer=tokenizers,
    order=orders,
    positions=st.sampled_from(["all", "after-first"]),
    share=st.floats(0, 1),
)
def test_a_texts_loss_does_not_depend_on_its_company(family, texts, batch_size, tokenizer, order, positions, share):
    model, places = model_of(family), list(range(len(texts)))
    texts = [f"{t} w5" for t in texts]  # two tokens at least, else there is nothing to score
    order.shuffle(places)
    rng = np.random.default_rng(len(texts))
    mask = NeuronMask.from_layers(
        [rng.random(families.KNOWN[family].hidden) < share for _ in range(families.LAYERS)], "mlp_hidden"
    )
    with MaskedModel(model).ablate(mask, positions=positions):
        together = perplexity(
            model, tokenizer, [texts[i] for i in places], batch_size=batch_size, n_boot=2, progress=False
        )
        for place, i in enumerate(places):
            alone = perplexity(model, families.tokenizer(), [texts[i]], batch_size=1, n_boot=2, progress=False)
            torch.testing.assert_close(
                together.token_nats[together.text_ids == place], alone.token_nats, rtol=1e-3, atol=1e-3
            )


# Where accelerate may put the weights: each block in memory or on the disk by a map; or all of them fetched module by
# module, or block by block, from memory or from the disk.
ways = st.one_of(
    st.lists(st.sampled_from(["cpu", "disk"]), min_size=families.LAYERS, max_size=families.LAYERS),
    st.tuples(st.sampled_from(["cpu_offload", "disk_offload"]), st.booleans()),
)


def placed(family: str, way, folder: str):
    "A model of the family whose weights lie where `way` says."
    import accelerate

    model = families.build(family)
    name, layers = blocks(model)
    if isinstance(way, tuple):
        offload, whole_blocks = way
        preload = [type(layers[0]).__name__] if whole_blocks else None
        getattr(accelerate, offload)(
            model,
            *([folder] if offload == "disk_offload" else []),
            execution_device="cpu",
            preload_module_classes=preload,
        )
        return model
    places, path = {f"{name}.{i}": place for i, place in enumerate(way)}, name.split(".")
    for depth, part in enumerate(path):  # what stands beside the blocks, and beside what they stand in
        parent = ".".join(path[:depth])
        places |= {
            f"{parent}.{n}".lstrip("."): "cpu" for n, _ in model.get_submodule(parent).named_children() if n != part
        }
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@holds(
    8,
    80,
    family=st.sampled_from(LAYOUTS),
    way=ways,
    texts=texts,
    site=sites,
    positions=st.sampled_from(["all", "after-first"]),
    share=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_where_the_weights_lie_does_not_matter(family, way, texts, site, positions, share, seed):
    """Activations, and losses plain and under a mask, are bit for bit those of the model in memory; the encoder has
    activations only."""
    texts, tokenizer, rng = [f"{t} w5" for t in texts], families.tokenizer(), np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        models = placed(family, way, folder), model_of(family)
        assert any(p.device.type == "meta" for p in models[0].parameters()) == (
            "cpu" in way and "disk" in way or "cpu" not in way
        )  # empty places, unless all is in memory
        here, there = (capture(m, tokenizer, texts, site, progress=False) for m in models)
        assert torch.equal(here.values, there.values)
        if family == LAYOUTS[-1]:
            return
        mask = NeuronMask.from_layers([rng.random(w) < share for w in here.widths], site)
        for masks in ([], [mask]):
            nats = []
            for m in models:
                with contextlib.ExitStack() as stack:
                    for chosen in masks:
                        stack.enter_context(MaskedModel(m).ablate(chosen, positions=positions))
                    nats.append(perplexity(m, tokenizer, texts, n_boot=2, progress=False).token_nats)
            assert torch.equal(*nats)


# How far weights of 8 and of 11 significant bits may carry the numbers, as a share of their norm. Three layers; each
# rounds a few times.
TOLERANCES = {torch.bfloat16: 0.04, torch.float16: 0.005}


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@holds(
    8,
    80,
    family=st.sampled_from(LAYOUTS),
    texts=texts,
    site=sites,
    dtype=st.sampled_from(list(TOLERANCES)),
    share=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_coarse_weights_give_nearly_the_same_numbers(family, texts, site, dtype, share, seed):
    "Activations, and answers under a mask; and what is masked is exactly zero in every precision."
    coarse, exact, tokenizer = model_of(family, dtype), rounded(family, dtype), families.tokenizer()
    a, b = (capture(m, tokenizer, texts, site, progress=False) for m in (coarse, exact))
    assert a.values.dtype == torch.float32 and far(a.values, b.values) < TOLERANCES[dtype]
    rng = np.random.default_rng(seed)
    mask = NeuronMask.from_layers([rng.random(w) < share for w in a.widths], site)
    answers = []
    for m in (coarse, exact):
        with MaskedModel(m).ablate(mask), torch.no_grad():
            assert not capture(m, tokenizer, texts, site, progress=False).values[:, mask.flat].any()
            answers.append(m(**tokenizer(texts[:1], return_tensors="pt", return_token_type_ids=False)).logits)
    assert answers[0].dtype == dtype and far(*answers) < TOLERANCES[dtype]


# Masks are sets

WIDTHS = (5, 1, 9)
N = sum(WIDTHS)
units = st.lists(st.booleans(), min_size=N, max_size=N)
homes = st.sampled_from([None, "mlp_hidden", "mlp_out", ("a", "b", "c")])


def masks(site=None):
    return st.builds(NeuronMask.from_flat, units, st.just(WIDTHS), st.just("mlp_hidden") if site is None else site)


@holds(25, 500, a=masks(), b=masks(), c=masks())
def test_masks_are_sets(a, b, c):
    everything, nothing = NeuronMask.full(WIDTHS, "mlp_hidden"), NeuronMask.empty(WIDTHS, "mlp_hidden")
    assert ~(a | b) == ~a & ~b and ~(a & b) == ~a | ~b and ~~a == a  # De Morgan
    assert a - b == a & ~b and a ^ b == (a | b) - (a & b) and a - (b | c) == (a - b) - c
    assert a & (b | c) == (a & b) | (a & c) and a | (b & c) == (a | b) & (a | c) and a | (a & b) == a
    assert a | b == b | a and (a | b) | c == a | (b | c) and a | a == a & a == a
    assert (
        a | ~a == everything
        and a & ~a == nothing == a - a
        and a ^ everything == ~a
        and a | nothing == a & everything == a
    )
    for x in (a, b, a | b, ~a):
        assert x.n == sum(x.counts) == int(x.flat.sum()) and x.counts == tuple(int(r.sum()) for r in x.layers)
        assert all(n + m == w for n, m, w in zip(x.counts, (~x).counts, WIDTHS))
    assert tuple(map(sum, zip((a | b).counts, (a & b).counts))) == tuple(
        map(sum, zip(a.counts, b.counts))
    )  # inclusion and exclusion, layer by layer
    assert hash(a | b) == hash(b | a)
    assert iou(a, b) == iou(b, a) and iou(a, a) == 1 and (iou(a, b) == 0) == ((a & b).n == 0 < (a | b).n)


@holds(25, 300, a=masks(homes), b=masks(homes))
def test_sites_join_or_refuse(a, b):
    if a.site is not None and b.site is not None and a.site != b.site:
        for operation in (a.__or__, a.__and__, a.__sub__, a.__xor__):
            with pytest.raises(ValueError):
                operation(b)
    else:
        assert (a | b).site == (b & a).site == (a - b).site == (a.site if a.site is not None else b.site) and (
            ~a
        ).site == a.site


@holds(
    15,
    200,
    a=masks(),
    seed=st.integers(0, 2**40),
    score=st.lists(st.floats(-1e6, 1e6), min_size=N, max_size=N),
    bins=st.integers(1, 12),
)
def test_controls_have_the_same_counts_and_their_seed_decides(a, seed, score, bins):
    for control in (a.matched_random(seed), a.matched_random(seed, score, bins), a.matched_top(score)):
        assert control.counts == a.counts and control.site == a.site and control.widths == a.widths
    assert a.matched_random(seed) == a.matched_random(seed) and a.matched_random(seed, score, bins) == a.matched_random(
        seed, score, bins
    )
    roomy = [2 * n <= w for n, w in zip(a.counts, WIDTHS)]
    apart = a.matched_random(seed) & a
    assert all(n == 0 for n, room in zip(apart.counts, roomy) if room)
    top, s = a.matched_top(score), np.split(np.array(score), np.cumsum(WIDTHS)[:-1])
    assert all(
        not chosen.any() or chosen.all() or row[chosen].min() >= row[~chosen].max()
        for chosen, row in zip((r.numpy() for r in top.layers), s)
    )


@holds(15, 200, chosen=st.lists(masks(), min_size=1, max_size=4), seed=st.integers(0, 99), T=st.integers(1, 6))
def test_reading_through_masks_is_indexing(chosen, seed, T):
    assume(all(m.n for m in chosen))
    X = torch.randn(T, N, generator=torch.Generator().manual_seed(seed))
    expected = torch.stack([X[:, m.flat].mean(1) for m in chosen], 1)
    torch.testing.assert_close(
        torch.as_tensor(apply_mask_and_average(chosen, X)).reshape(T, -1), expected, rtol=1e-5, atol=1e-6
    )
    either = torch.stack([m.flat for m in chosen]).any(0)
    torch.testing.assert_close(torch.as_tensor(apply_mask_any(chosen, X)), torch.where(either, X, 0))


# Over a file and back

values = st.one_of(st.floats(width=32, allow_nan=False), st.just(float("nan")), st.just(-0.0))


@holds(10, 150, a=masks(homes), start=st.integers(0, 5), step=st.integers(1, 4))
def test_a_mask_comes_back_from_its_file(a, start, step):
    a = replace(a, layout=replace(a.layout, depths=tuple(range(start, start + 3 * step, step))))
    with tempfile.TemporaryDirectory() as folder:
        a.save(Path(folder) / "m")
        b = NeuronMask.load(Path(folder) / "m")
    assert a == b and all(getattr(a, f.name) == getattr(b, f.name) for f in fields(a))


@st.composite
def activations(draw):
    T, widths = draw(st.integers(1, 7)), draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    numbers = draw(st.lists(values, min_size=T * sum(widths), max_size=T * sum(widths)))
    whole = lambda most: torch.tensor(draw(st.lists(st.integers(0, most), min_size=T, max_size=T)))
    return Activations(
        torch.tensor(numbers, dtype=torch.float32).reshape(T, -1).to(dtype),
        whole(9).sort()[0],
        whole(2**40),
        whole(10**6),
        whole(1).bool(),
        tuple(widths),
        tuple(range(2, 2 + len(widths))),
        draw(st.sampled_from(["mlp_out", "mlp_hidden", tuple("abc"[: len(widths)])])),
        draw(st.text(max_size=20)),
        draw(st.integers(0, 99)),
    )


def bits(t: torch.Tensor) -> torch.Tensor:
    "Equal if and only if every bit is, nan and the sign of zero too."
    return t.view({4: torch.int32, 2: torch.int16}[t.element_size()]) if t.is_floating_point() else t


@holds(12, 200, a=activations())
def test_activations_come_back_from_their_file(a):
    with tempfile.TemporaryDirectory() as folder:
        b = Activations.load(a.save(Path(folder) / "a"))
        for f in fields(a):
            mine, theirs = getattr(a, f.name), getattr(b, f.name)
            if isinstance(mine, torch.Tensor):
                assert mine.dtype == theirs.dtype and torch.equal(bits(mine), bits(theirs)), f.name
            else:
                assert mine == theirs, f.name


@cache
def planted(seed: int, kind: str = "temporal") -> torch.Tensor:
    """X of three sources, one less Gaussian than the next, with skewed maps, and a little noise: (600, 60) heavy-
    tailed courses, or (60, 600) sparse maps."""
    g = np.random.RandomState(seed)
    if kind == "temporal":
        drawn = g.laplace(size=(600, 3))
        courses, maps = (
            np.sign(drawn) * np.abs(drawn) ** [1.0, 1.4, 2.0],
            np.where(g.rand(3, 60) < 0.3, 1.0 + g.rand(3, 60), 0.05 * g.randn(3, 60)),
        )
    else:
        courses, maps = (
            g.randn(60, 3),
            np.where(
                g.rand(3, 600) < [[0.15], [0.06], [0.02]], 2.0 + g.exponential(size=(3, 600)), 0.1 * g.randn(3, 600)
            ),
        )
    X = courses / courses.std(0) * [4.0, 2.5, 1.5] @ maps
    return torch.tensor(X + 0.02 * g.randn(*X.shape), dtype=torch.float32)


def as_activations(X: torch.Tensor) -> Activations:
    T, n = X.shape
    positions = torch.arange(T) % 40
    return Activations(
        X,
        torch.arange(T) // 40,
        positions,
        torch.arange(T),
        positions == 0,
        (n // 3,) * 3,
        (0, 1, 2),
        "mlp_hidden",
        "by hand",
    )


@holds(
    4,
    40,
    seed=st.integers(0, 200),
    kind=st.sampled_from(["temporal", "spatial"]),
    exclude=st.sampled_from([None, "first"]),
    n_init=st.sampled_from([1, 3]),
    standardize=st.booleans(),
)
def test_networks_come_back_from_their_file(seed, kind, exclude, n_init, standardize):
    acts = as_activations(planted(seed, kind))
    a = FunctionalNetworks(3, kind, standardize, exclude, n_init=n_init).fit(acts)
    with tempfile.TemporaryDirectory() as folder:
        a.save(Path(folder) / "n")
        b = FunctionalNetworks.load(Path(folder) / "n")
    for name in ("maps_", "mixing_", "time_courses_", "rows_", "sign_", "stability_"):
        assert torch.equal(bits(getattr(a, name)), bits(getattr(b, name))), name
    assert (
        a.masks() == b.masks()
        and a.key_neurons(fraction=0.1) == b.key_neurons(fraction=0.1)
        and torch.equal(a.transform(acts), b.transform(acts))
    )


# What ICA promises of order, sign and units

fits = dict(seed=st.integers(0, 300), kind=st.sampled_from(["temporal", "spatial"]))
SAME = 1e-5  # how far a correlation may be from 1


def fitted(X, kind, **options) -> ICA:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ICA(3, kind=kind, max_iter=400, tol=1e-8, dtype=torch.float64, **options).fit(
            X
        )  # at tol=1e-4 one start in a hundred rests where two components are mixed half and half


def same_parts(a: ICA, maps: torch.Tensor, courses: torch.Tensor) -> None:
    "The components of `a` are these, in this order and sign."
    for mine, theirs in ((a.maps_, maps), (a.time_courses_.T, courses.T)):
        assert torch.cosine_similarity(mine.double(), theirs.double(), 1).min() > 1 - SAME


@holds(6, 80, **fits, skewed=st.booleans())
def test_order_and_sign_are_the_convention(seed, kind, skewed):
    X = planted(seed, kind)
    X = X if skewed else X * torch.linspace(-1, 1, X.shape[1]).sign()  # maps of both signs
    ica = fitted(X, kind)
    assert (ica.negentropy_.diff() <= 0).all()
    centred = (ica.maps_ - ica.maps_.mean(1, keepdim=True)).double()
    assert (centred.pow(3).sum(1) >= 0).all() and set(ica.sign_.tolist()) <= {-1.0, 1.0}
    C = X - X.mean(0)
    if kind == "spatial":
        C = C - C.mean(1, keepdim=True)
    assert (C - ica.time_courses_ @ ica.maps_).norm() < 0.05 * C.norm()


@holds(6, 80, **fits, gain=st.floats(1e-3, 1e3), offset=st.floats(-5, 5))
def test_units_and_offsets_of_the_data_do_not_matter(seed, kind, gain, offset):
    X = planted(seed, kind)
    a, b = fitted(X, kind), fitted(gain * (X + offset), kind)
    same_parts(b, a.maps_, a.time_courses_)
    units = (b.maps_ if kind == "temporal" else b.time_courses_).std() / (
        a.maps_ if kind == "temporal" else a.time_courses_
    ).std()  # the mixing carries the units
    assert abs(float(units) / gain - 1) < 0.01


@holds(6, 80, **fits)
def test_a_negated_matrix_has_the_same_maps_and_negated_courses(seed, kind):
    X = planted(seed, kind)
    a, b = fitted(X, kind), fitted(-X, kind)
    same_parts(b, a.maps_, -a.time_courses_)


@holds(6, 80, **fits, order=orders)
def test_the_order_of_tokens_and_neurons_does_not_matter(seed, kind, order):
    X = planted(seed, kind)
    rows, columns = (list(range(n)) for n in X.shape)
    order.shuffle(rows), order.shuffle(columns)
    a, b = fitted(X, kind), fitted(X[rows][:, columns], kind)
    same_parts(b, a.maps_[:, columns], a.time_courses_[rows])


@holds(5, 60, **fits, one=st.integers(0, 2**31 - 1), two=st.integers(0, 2**31 - 1), n_init=st.sampled_from([1, 4]))
def test_one_seed_is_one_result_and_planted_sources_need_none(seed, kind, one, two, n_init):
    X = planted(seed, kind)
    torch.manual_seed(one)  # the global generator has no say
    a = fitted(X, kind, random_state=one, n_init=n_init)
    torch.manual_seed(two)
    again, b = fitted(X, kind, random_state=one, n_init=n_init), fitted(X, kind, random_state=two, n_init=n_init)
    for name in ("maps_", "time_courses_", "sign_"):
        assert torch.equal(getattr(a, name), getattr(again, name)), name
    same_parts(b, a.maps_, a.time_courses_)
