"""Pins group ICA: equal to plain ICA where nothing is lost, the same from memory, disk, text shards and several
processes, resumable, bounded in memory, and strict about what forms a group."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import families
import numpy as np
import pytest
import torch

import llmfact_nb.across.group as group_module
from llmfact_nb.activations import Activations, capture
from llmfact_nb.across.group import GroupICA, dual_regression, leading_rows, memory_bound, my_share, text_shards
from llmfact_nb.base.arguments import ArgumentError
from llmfact_nb.base.files import ClaimError
from llmfact_nb.base.whitening import CentredX, DataError
from llmfact_nb.ica import ICA

KINDS = ["temporal", "spatial"]


def planted(n_texts=6, n_tokens=120, n_neurons=600, noise=0.3, offset=1.0, seed=0, model="planted"):
    "Four maps of 40 neurons, heavy-tailed time courses, an offset of every text. Returns (activations, maps)."
    g = torch.Generator().manual_seed(seed)
    maps = torch.zeros(4, n_neurons)
    for j in range(4):
        maps[j, 40 * j : 40 * (j + 1)] = 2 + torch.rand(40, generator=torch.Generator().manual_seed(j))
    T = n_texts * n_tokens
    sources = torch.randn(T, 4, generator=g) * torch.randn(T, 4, generator=g)
    ids, positions = torch.arange(n_texts).repeat_interleave(n_tokens), torch.arange(n_tokens).repeat(n_texts)
    X = (
        sources @ maps
        + noise * torch.randn(T, n_neurons, generator=g)
        + offset * torch.randn(n_texts, n_neurons, generator=g)[ids]
    )
    return Activations(
        X,
        ids,
        positions,
        torch.arange(T) % 97,
        positions == 0,
        (n_neurons // 2, n_neurons - n_neurons // 2),
        (0, 1),
        "mlp_out",
        model,
    ), maps


def shards(n=3, **how):
    return [planted(n_texts=2, seed=i, **how)[0] for i in range(n)]


def joined(parts):
    "One capture that holds the texts of all."
    ids, start = [], 0
    for p in parts:
        ids.append(p.text_ids + start)
        start += int(p.text_ids.max()) + 1
    columns = {k: torch.cat([getattr(p, k) for p in parts]) for k in ("values", "positions", "token_ids", "sinks")}
    return replace(parts[0], text_ids=torch.cat(ids), **columns)


def correlations(a, b):
    return torch.corrcoef(torch.cat([a, b]).double())[: len(a), len(a) :]


def partners(a, b):
    "For each map of a the map of b it belongs to; fails unless that is one to one."
    order = correlations(a, b).abs().argmax(1)
    assert len(set(order.tolist())) == len(order)
    return order


def same_space(a, b):
    "The two sets of maps span the same directions."
    p, q = (torch.linalg.qr(m.double().T)[0] for m in (a.maps_, b.maps_))
    torch.testing.assert_close(
        torch.linalg.svdvals(p.T @ q), torch.ones(len(a.maps_), dtype=torch.float64), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(a.explained_variance_ratio_.sum(), b.explained_variance_ratio_.sum(), rtol=1e-6, atol=0)


def same_result(a, b, atol=1e-3):
    order = partners(a.maps_, b.maps_)
    torch.testing.assert_close(b.maps_[order], a.maps_, rtol=1e-3, atol=atol)
    torch.testing.assert_close(b.time_courses_[:, order], a.time_courses_, rtol=1e-3, atol=atol)
    torch.testing.assert_close(
        b.explained_variance_ratio_[order].double(), a.explained_variance_ratio_.double(), rtol=1e-3, atol=1e-5
    )


# rows


@pytest.mark.parametrize("shape", [(30, 200), (200, 30), (1, 50), (2000, 60), (60, 2000)])
def test_rows_have_the_products_of_the_matrix(shape):
    X = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    walk = "neurons" if shape[0] <= shape[1] else "tokens"
    rows = leading_rows(CentredX(X, walk=walk, dtype=torch.float64), min(shape))
    centred = X - X.mean(0)
    torch.testing.assert_close(rows.T @ rows, centred.T @ centred)
    lengths = torch.linalg.vector_norm(rows, dim=1)
    assert (lengths[:-1] >= lengths[1:] - 1e-9).all() and len(rows) == torch.linalg.matrix_rank(centred)
    exact = torch.linalg.svdvals(centred)[:3]
    torch.testing.assert_close(
        torch.linalg.vector_norm(leading_rows(CentredX(X, walk=walk, dtype=torch.float64), 3), dim=1),
        exact[: min(3, len(rows))],
    )


def test_rows_where_both_sides_are_long():
    g = torch.Generator().manual_seed(0)
    X = torch.randn(900, 20, generator=g) * torch.logspace(1, -1, 20) @ torch.randn(
        20, 1200, generator=g
    ) + 0.01 * torch.randn(900, 1200, generator=g)
    rows = leading_rows(CentredX(X), 8)
    exact = torch.linalg.svdvals((X - X.mean(0)).double())[:8]
    assert (
        rows.shape == (8, 1200)
        and (torch.linalg.vector_norm(rows, dim=1).double().square().sum() / exact.square().sum()) > 0.999
    )


# equal to plain ICA


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_plain_ica_when_nothing_is_lost(kind, standardize):
    acts, _ = planted(n_neurons=160, offset=0.2)
    same = dict(kind=kind, standardize=standardize, dtype=torch.float64, tol=1e-10, max_iter=2000)
    plain = ICA(4, whiten_solver="gram", **same).fit(acts.values)
    group = GroupICA(4, n_reduced=120, **same).fit(acts)
    same_result(plain, group)
    torch.testing.assert_close(group.transform(acts), group.time_courses_, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(group.mean_, plain.mean_.to(group.mean_))
    torch.testing.assert_close(group.scale_, plain.scale_.to(group.scale_))
    torch.testing.assert_close(group.rotation_ @ group.rotation_.T, torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_argument_and_exclude_leave_tokens_out(kind):
    acts, _ = planted(n_neurons=160, offset=0.2)
    loud = replace(acts, values=torch.where(acts.sinks[:, None], 1e3, acts.values))
    how = dict(kind=kind, n_reduced=120, dtype=torch.float64, tol=1e-10, max_iter=2000)
    plain = ICA(4, kind, "gram", dtype=torch.float64, tol=1e-10, max_iter=2000).fit(loud.values, rows=~loud.sinks)
    for fitted in (
        GroupICA(4, exclude="sinks", **how).fit(loud),
        GroupICA(4, exclude="first", **how).fit(loud),
        GroupICA(4, **how).fit(loud, rows=~loud.sinks),
    ):
        same_result(plain, fitted)
        assert len(fitted.text_index_) == int((~loud.sinks).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"center_texts": True},
        {"standardize": True},
        {"center_texts": True, "standardize": "text"},
        {"center_texts": True, "unit_rows": True},
        {"max_rows": 12},
    ],
    ids=str,
)
def test_planted_maps_come_back_from_few_rows(kind, how):
    acts, truth = planted(n_tokens=300, offset=0.05)
    # a smaller tol: FastICA nearly stands still where two components are mixed half and half, and may stop there
    group = GroupICA(4, kind, n_reduced=6, n_init=3, tol=1e-7, max_iter=1000, **how).fit(acts)
    found = correlations(truth, group.maps_).abs().amax(1)
    assert found.min() > 0.9, found
    assert group.n_rows_ == min(how.get("max_rows", 99), 6 * (6 if how.get("center_texts") else 7))
    assert (group.stability_ > 0.8).all() and 0 < group.explained_variance_ratio_.sum() <= 1.0001


def test_offsets_of_texts_are_networks_only_if_they_shall_be():
    "Two texts that differ as a whole: uncentred, that difference is a direction; centred, no map follows it."
    acts, _ = planted(n_texts=4, offset=0)
    lift = torch.zeros(acts.n_neurons)
    lift[200:240] = 5
    acts = replace(acts, values=acts.values + (acts.text_ids % 2)[:, None] * lift)
    follows = {
        c: correlations(lift[None], GroupICA(5, center_texts=c).fit(acts).maps_).abs().max() for c in (False, True)
    }
    assert follows[False] > 0.9 and follows[True] < 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_signs_and_order_are_those_of_ica(kind):
    group = GroupICA(4, kind).fit(planted()[0])
    centred = group.maps_ - group.maps_.mean(1, keepdim=True)
    assert (
        ((centred**3).sum(1) > 0).all()
        and (group.negentropy_.diff() <= 0).all()
        and set(group.sign_.tolist()) <= {-1.0, 1.0}
    )


# shards


@pytest.mark.parametrize("kind", KINDS)
def test_shards_memory_disk_and_one_capture_agree(kind, tmp_path):
    parts = shards()
    how = dict(kind=kind, n_reduced=8, dtype="float64", tol=1e-10, max_iter=2000)
    whole = GroupICA(4, **how).fit(joined(parts))
    paths = [p.save(tmp_path / f"{i}.safetensors") for i, p in enumerate(parts)]
    for data in (parts, paths, [parts[0], str(paths[1]), paths[2]]):
        fitted = GroupICA(4, **how).fit(data)
        same_result(whole, fitted, atol=1e-4)
        assert torch.equal(fitted.text_index_, whole.text_index_) and fitted.n_parts_ == 6
    per_shard = GroupICA(4, per="shard", **how | {"n_reduced": 240}).fit(paths)
    assert per_shard.n_parts_ == 3 and correlations(whole.maps_, per_shard.maps_).abs().amax(1).min() > 0.99


def test_inputs_are_not_changed():
    parts = shards()
    before = [p.values.clone() for p in parts]
    GroupICA.canica(4, n_init=2).fit(parts)
    dual_regression(GroupICA(4).fit(parts), parts[0])
    assert all(torch.equal(a, p.values) for a, p in zip(before, parts))


TEXTS = [families.words(40, seed=i) for i in range(7)]


@pytest.mark.parametrize("kind", KINDS)
def test_text_shards_are_reduced_in_flight(kind, monkeypatch):
    model, t = families.build("llama"), families.tokenizer()
    in_flight = text_shards(model, t, TEXTS, n_texts=3, site="mlp_hidden")
    assert [len(s.texts) for s in in_flight] == [3, 3, 1]
    opened, real = [], group_module.capture
    monkeypatch.setattr(
        group_module, "capture", lambda m, t, texts, **k: opened.append(len(texts)) or real(m, t, texts, **k)
    )
    how = dict(kind=kind, n_reduced=40, dtype="float64")
    fitted = GroupICA(3, **how).fit(in_flight)
    assert opened == [3, 3, 1] * 2  # one pass to reduce, one to project
    whole = GroupICA(3, **how).fit(capture(model, t, TEXTS, "mlp_hidden", progress=False))
    same_space(whole, fitted)


@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload", "dispatch"])
def test_models_that_accelerate_placed(way, tmp_path):
    "End to end, with layers on disk that come only when needed."
    accelerate = pytest.importorskip("accelerate")
    model, t = families.build("llama"), families.tokenizer()
    how = dict(n_reduced=40, dtype="float64")
    expected = GroupICA(3, **how).fit(text_shards(model, t, TEXTS, n_texts=4))
    if way == "cpu_offload":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif way == "disk_offload":
        accelerate.disk_offload(model, tmp_path / "weights", execution_device="cpu")
    else:
        places = {
            "model.embed_tokens": "cpu",
            "model.layers.0": "cpu",
            "model.layers.1": "disk",
            "model.layers.2": "disk",
            "model.norm": "cpu",
            "model.rotary_emb": "cpu",
            "lm_head": "cpu",
        }
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path / "weights", force_hooks=True)
        assert any(p.device.type == "meta" for p in model.parameters()) and not all(
            p.device.type == "meta" for p in model.parameters()
        )
    same_space(expected, GroupICA(3, **how).fit(text_shards(model, t, TEXTS, n_texts=4)))


# refusals


def test_one_text_is_no_group():
    acts, _ = planted()
    model, t = families.build("llama"), families.tokenizer()
    for attempt in (
        lambda: GroupICA(4).fit(acts.of_text(0)),
        lambda: GroupICA(4, per="shard").fit([acts]),
        lambda: GroupICA(2).fit(text_shards(model, t, TEXTS[:1])),
        lambda: GroupICA(2).fit([]),
    ):
        with pytest.raises(ValueError):
            attempt()
    with pytest.raises(DataError), pytest.warns(UserWarning) as said:
        GroupICA(2).fit(acts, rows=acts.text_ids == 3)
    assert said[0].filename == __file__  # a warning points at the call


def test_strangers_are_refused_by_name(tmp_path):
    a, b = shards(2)
    path = replace(b, model="another model").save(tmp_path / "other.safetensors")
    (tmp_path / "foreign.safetensors").write_bytes(b"no")
    for other, named in (
        (path, "other.safetensors"),
        (replace(b, site="mlp_hidden"), "shard 1"),
        (replace(b, values=b.values[:, :599], widths=(300, 299)), "widths"),
        (tmp_path / "foreign.safetensors", "foreign"),
    ):
        with pytest.raises(ValueError) as e:
            GroupICA(4).fit([a, other])
        assert named in str(e.value)
    with pytest.raises(FileNotFoundError):
        GroupICA(4).fit([a, tmp_path / "gone.safetensors"])
    with pytest.raises(ValueError):
        GroupICA(4).fit([a, b]).transform(replace(a, site="mlp_hidden"))
    with pytest.raises(ValueError):
        GroupICA(4).transform(a)


@pytest.mark.parametrize(
    "how",
    [
        {"n_components": 0},
        {"kind": "spatiotemporal"},
        {"n_reduced": 0},
        {"n_reduced": 2.5},
        {"per": "word"},
        {"standardize": "shard"},
        {"standardize": "text"},
        {"unit_rows": True},
        {"exclude": "last"},
        {"max_rows": 3},
        {"center_texts": "yes"},
        {"dtype": torch.float16},
        {"n_components": True},
    ],
    ids=str,
)
def test_settings_are_checked(how):
    with pytest.raises(ArgumentError) as e:
        GroupICA(**{"n_components": 4} | how).fit(planted()[0])
    assert e.value.argument == next(iter(how))


def test_unknown_arguments_are_refused():
    for name in ("whiten_solver", "typo"):
        with pytest.raises(TypeError):
            GroupICA(4, **{name: "gram"})
    for data in ("shard.safetensors", [torch.zeros(3, 3)]):
        with pytest.raises(TypeError):
            GroupICA(4).fit(data)
    for name, value in (("n_texts", 0), ("path", "x")):
        with pytest.raises(ArgumentError) as e:
            text_shards(None, None, TEXTS, **{name: value})
        assert e.value.argument == name


def test_bad_data_is_named():
    acts, _ = planted()
    acts.values[250, 7] = float("nan")
    with pytest.raises(DataError) as e:
        GroupICA(4).fit(acts)
    assert "shard 0, text 2" in str(e.value) and "X[10, 7]" in str(e.value)
    with pytest.raises(DataError):
        GroupICA(6, n_reduced=1, center_texts=True).fit(planted(n_texts=5)[0])
    with pytest.raises(ValueError):
        GroupICA(4).fit(planted()[0], rows=torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError):
        GroupICA(4).fit(shards(2), rows=[torch.ones(240, dtype=torch.bool)])


def test_constant_neurons_and_short_texts():
    acts, truth = planted()
    acts.values[:, 590:] = 3.0
    ids = acts.text_ids.clone()
    ids[-1] = 6  # a text of a single token
    acts = replace(acts, text_ids=ids)
    for kind in KINDS:
        with pytest.warns(UserWarning) as said:
            group = GroupICA(4, kind, standardize=True).fit(acts)
        assert said[0].filename == __file__
        assert torch.isfinite(group.maps_).all() and group.n_parts_ == 7
    assert torch.isfinite(GroupICA.canica(4, n_init=2).fit(acts).maps_).all()


# interruption


@pytest.mark.parametrize("stop_after", [2, 4, 7])
def test_an_interrupted_fit_goes_on(stop_after, tmp_path, monkeypatch):
    "Four shards give four reduced files, the directions and four projections; whichever are there are not made again."
    parts, real, written, limit = shards(4), group_module.save_tensors, [], [stop_after]
    expected = GroupICA(4, n_reduced=8).fit(parts)

    def save(path, *rest):
        if len(written) == limit[0]:
            raise KeyboardInterrupt  # as a machine that goes down
        written.append(Path(path).name)
        return real(path, *rest)

    monkeypatch.setattr(group_module, "save_tensors", save)
    with pytest.raises(KeyboardInterrupt):
        GroupICA(4, n_reduced=8).fit(parts, folder=tmp_path)
    limit[0] = 99
    fitted = GroupICA(4, n_reduced=8).fit(parts, folder=tmp_path)
    assert len(written) == len(set(written)) == 9
    same_result(expected, fitted)
    for other in (GroupICA(4, n_reduced=8, n_init=3), GroupICA(4, n_reduced=8, fun="cube")):
        other.fit(parts, folder=tmp_path)
    assert len(written) == 9  # other restarts or contrasts: only FastICA runs again


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_holds_one_fit(kind, tmp_path):
    parts, how = shards(3), dict(kind=kind, n_reduced=8)
    GroupICA(4, **how).fit(parts, folder=tmp_path)
    middle = parts[1].values.clone()
    middle[1::2] += 1  # the first and the last token are as they were
    changed = [parts[0], replace(parts[1], values=middle), parts[2]]
    for different, attempt in (
        ("n_reduced", lambda: GroupICA(4, kind, n_reduced=9).fit(parts, folder=tmp_path)),
        ("exclude", lambda: GroupICA(4, exclude="sinks", **how).fit(parts, folder=tmp_path)),
        ("shard 1", lambda: GroupICA(4, **how).fit(changed, folder=tmp_path)),
        ("shard 0", lambda: GroupICA(4, **how).fit(parts, rows=[~p.sinks for p in parts], folder=tmp_path)),
        ("shards", lambda: GroupICA(4, **how).fit(parts[:2], folder=tmp_path)),
    ):
        with pytest.raises(ClaimError) as e:
            attempt()
        assert different in e.value.differences
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


def test_a_folder_knows_the_weights_of_its_model(tiny_model, tiny_tokenizer, tmp_path):
    model, t = tiny_model("gpt2"), tiny_tokenizer()
    same = lambda: GroupICA(2, n_reduced=4).fit(text_shards(model, t, TEXTS, n_texts=4), folder=tmp_path).maps_
    first = same()
    assert torch.equal(same(), first)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[3, 4] += 1.0  # a tuned copy has the same name
    with pytest.raises(ClaimError) as e:
        same()
    assert list(e.value.differences) == ["weights"]


# several processes

WORKER = """
import json, sys
import torch, torch.distributed as dist
sys.path[:0] = {paths!r}
import os
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
torch.set_num_threads(1)
from datetime import timedelta
from llmfact_nb.across import group
from llmfact_nb.across.group import GroupICA, my_share
rank = int(sys.argv[1])
meeting = dict(init_method="file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60))
dist.init_process_group("gloo", **meeting)
from test_group import shards, planted
from dataclasses import replace
from pathlib import Path
folder, report = Path({folder!r}), {{}}

def attempt(name, work):
    try:
        report[name] = work()
    except Exception as e:
        report[name] = type(e).__name__ + ": " + str(e)

def fit(name, mine, **how):
    how = {{"n_reduced": 8, "dtype": "float64", "tol": 1e-10, "max_iter": 2000, **how}}
    kept = folder / "kept" if "folder" in name else None
    g = GroupICA(4, **how).fit(mine, distributed=True, folder=kept)
    from llmfact_nb.base.files import save_tensors
    saved = ("maps_", "time_courses_", "explained_variance_ratio_", "text_index_")
    save_tensors(folder / f"{{name}}-{{rank}}.safetensors", {{k: getattr(g, k) for k in saved}}, "result")
    return "ok"

parts = shards(4)
if rank == 1:
    bad = [replace(p) for p in parts]
    nan = parts[3].values.clone(); nan[5, 5] = float("nan")
attempt("even", lambda: fit("even", my_share(parts)))
attempt("uneven", lambda: fit("uneven", parts[:3] if rank == 0 else parts[3:]))
attempt("empty", lambda: fit("empty", parts if rank == 0 else []))
attempt("spatial", lambda: fit("spatial", my_share(parts), kind="spatial", standardize=True, max_rows=30, n_init=3))
attempt("folder", lambda: fit("folder", my_share(parts)))
dist.barrier()
written = {{p.name: p.stat().st_mtime_ns for p in (folder / "kept").glob("*.safetensors")}}
attempt("folder again", lambda: fit("folder again", my_share(parts)))
dist.barrier()
files = (folder / "kept").glob("*.safetensors")
report["written again"] = [p.name for p in files if p.stat().st_mtime_ns != written.get(p.name)]
report["written"] = len(written)
# from another start than the one it is compared with, so what is left is the angle, the root of tol
attempt("seedless", lambda: fit("seedless", my_share(parts), random_state=None, tol=1e-14))
attempt("stranger", lambda: fit("stranger", parts[:2] if rank == 0 else [replace(parts[2], model="another model")]))
attempt("nan", lambda: fit("nan", parts[:2] if rank == 0 else [replace(parts[3], values=nan)]))
attempt("missing", lambda: fit("missing", parts[:2] if rank == 0 else [folder / "gone.safetensors"]))
attempt("settings", lambda: fit("settings", my_share(parts), n_reduced=8 + rank))
attempt("contrast", lambda: fit("contrast", my_share(parts), fun="logcosh" if rank == 0 else "cube"))

def broken(*_, **__):
    raise MemoryError("no room")

real, group.ICA.fit = group.ICA.fit, broken if rank == 1 else group.ICA.fit
attempt("unmixing", lambda: fit("unmixing", my_share(parts)))
group.ICA.fit = real
attempt("one", lambda: fit("one", [] if rank == 0 else [parts[0].of_text(0)]))
attempt("none", lambda: fit("none", []))
few = dict(n_reduced=1, center_texts=True, exclude="sinks", max_rows=4)
attempt("rank", lambda: fit("rank", my_share(parts), **few) and "ok")
(folder / f"report-{{rank}}.json").write_text(json.dumps(report))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    "All cases in one start of two processes; (folder, report of each rank)."
    folder = tmp_path_factory.mktemp("ranks")
    here = Path(__file__).parent
    script = folder / "worker.py"
    script.write_text(WORKER.format(paths=[str(here), str(here.parent)], folder=str(folder)))
    running = [
        subprocess.Popen(
            [sys.executable, script, str(r)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for r in range(2)
    ]
    try:
        said = [p.communicate(timeout=120)[0] for p in running]
    finally:
        for p in running:
            p.kill()
    assert [p.returncode for p in running] == [0, 0], said
    return folder, [json.loads((folder / f"report-{r}.json").read_text()) for r in range(2)]


@pytest.mark.parametrize("case", ["even", "uneven", "empty", "spatial", "folder", "folder again", "seedless"])
@pytest.mark.extra
def test_two_processes_equal_one(two_processes, case):
    from types import SimpleNamespace

    from llmfact_nb.base.files import load_tensors

    folder, reports = two_processes
    assert [r[case] for r in reports] == ["ok", "ok"]
    how = dict(kind="spatial", standardize=True, max_rows=30, n_init=3) if case == "spatial" else {}
    alone = GroupICA(4, n_reduced=8, dtype="float64", tol=1e-10, max_iter=2000, **how).fit(shards(4))
    results = [SimpleNamespace(**load_tensors(folder / f"{case}-{r}.safetensors", "result")[0]) for r in range(2)]
    for result in results:
        same_result(alone, result, atol=1e-5 if case != "spatial" else 1e-2)
        assert torch.equal(result.text_index_, alone.text_index_)
    assert torch.equal(results[0].maps_, results[1].maps_)


@pytest.mark.extra
def test_two_processes_do_nothing_twice(two_processes):
    for report in two_processes[1]:
        assert (
            report["written"] == 9 and report["written again"] == []
        )  # of each of 4 shards its rows and its projection, and the directions


@pytest.mark.parametrize(
    "case, first, second",
    [
        ("stranger", "rank 1, shard 0 does not belong to rank 0, shard 0: model", "rank 1, shard 0 does not belong"),
        ("nan", "rank 1 stopped with DataError: shard 0, text 0", "X[5, 5]"),
        ("missing", "rank 1 stopped with FileNotFoundError", "gone.safetensors"),
        (
            "settings",
            "rank 1 has other settings than rank 0: n_reduced is 8 there and 9 here",
            "rank 1 has other settings",
        ),
        (
            "contrast",
            "rank 1 has other settings than rank 0: fun is 'logcosh' there and 'cube' here",
            "rank 1 has other settings",
        ),
        ("unmixing", "rank 1 stopped with MemoryError: no room", "MemoryError: no room"),
        ("one", "one text only", "one text only"),
        ("none", "no shard", "no shard"),
    ],
)
@pytest.mark.extra
def test_no_process_stops_alone(two_processes, case, first, second):
    _, reports = two_processes
    assert first in reports[0][case] and second in reports[1][case]


def test_distributed_needs_a_process_group():
    with pytest.raises(ArgumentError):
        GroupICA(4).fit(shards(2), distributed=True)
    assert my_share([1, 2]) == [1, 2]


# memory

MEMORY = """
import sys, threading, time
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from pathlib import Path
from llmfact_nb.across.group import GroupICA
paths = sorted(Path({folder!r}).glob("shard*"))

def anonymous():
    "Bytes of this process that are not pages of a file (those of a memory map can be dropped at any time)."
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

GroupICA(4, n_reduced=4, kind="temporal").fit(paths[:2], rows=None)  # libraries are loaded
before, peak, running = anonymous(), [0], [True]

def watch():
    while running:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

t = threading.Thread(target=watch); t.start()
g = GroupICA(8, n_reduced=8, per="shard", max_rows=24).fit(paths, folder=Path({folder!r}) / "fit")
running.clear(); t.join()
print(peak[0] - before, g.memory_bound_)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_below_the_bound_and_far_below_the_data(tmp_path):
    n_tokens, n_neurons, n = 400, 60_000, 6
    g = torch.Generator().manual_seed(0)
    maps, noise = torch.randn(12, n_neurons, generator=g), 0.1 * torch.randn(n_tokens, n_neurons, generator=g)
    for i in range(n):
        X = torch.randn(n_tokens, 12, generator=g) ** 3 @ maps + noise
        ids, zeros = torch.arange(n_tokens) // 100, torch.zeros(n_tokens, dtype=torch.long)
        Activations(X, ids, torch.arange(n_tokens) % 100, zeros, zeros.bool(), (n_neurons,), (0,), "mlp_out").save(
            tmp_path / f"shard{i}.safetensors"
        )
    code = MEMORY.format(paths=[str(Path(__file__).parent.parent)], folder=str(tmp_path))
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )
    assert out.returncode == 0, out.stderr
    used, bound = map(int, out.stdout.split())
    data = n * n_tokens * n_neurons * 4
    print(f"used {used / 1e6:.0f} MB, bound {bound / 1e6:.0f} MB, data {data / 1e6:.0f} MB")
    assert used < bound < data


def test_the_bound_adds_up():
    small, large = (memory_bound(1000, 500, 10, 8, 4, in_folder=f) for f in (True, False))
    assert small["reduced rows"] == 0 and large["reduced rows"] == 10 * 9 * 500 * 4
    assert sum(memory_bound(1000, 500, 10_000, 8, 4, True, max_rows=64).values()) < sum(
        memory_bound(1000, 500, 10_000, 8, 4, True).values()
    )


# dual regression


def test_dual_regression_finds_what_is_different_in_one_text():
    acts, _ = planted()
    group = GroupICA(4, center_texts=True).fit(acts)
    here = acts.text_ids == 2
    changed = acts.values.clone()
    changed[here, 200:210] += 2 * group.time_courses_[here, 1][:, None]
    own = dual_regression(group, replace(acts, values=changed))
    rise = own.maps - group.maps_
    assert own.maps.shape == (6, 4, 600) and own.texts == tuple(range(6)) and torch.equal(own.text_index, acts.text_ids)
    assert rise[2, 1, 200:210].mean() > 1.7 and rise[[0, 1, 3, 4, 5], 1, 200:210].abs().max() < 0.5
    assert rise[2, 0, 200:210].abs().mean() < 0.3
    torch.testing.assert_close(own.time_courses, group.time_courses_, rtol=0, atol=0.3)


def test_dual_regression_is_least_squares_twice():
    acts, truth = planted(n_neurons=170)
    own = dual_regression(truth.double(), acts)
    for i in range(6):
        X = acts.of_text(i).values.double().numpy()
        X = X - X.mean(0)
        A = np.linalg.lstsq(truth.double().numpy().T, X.T, rcond=None)[0].T
        M = np.linalg.lstsq(A, X, rcond=None)[0]
        np.testing.assert_allclose(own.time_courses[own.text_index == i], A, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(own.maps[i], M, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [{}, {"standardize": True}, {"center_texts": True, "standardize": "text"}], ids=str)
def test_dual_regression_in_the_units_of_the_group(kind, how):
    acts, _ = planted(offset=0)
    group = GroupICA(4, kind, **how).fit(acts)
    own = dual_regression(group, acts)
    for j in range(4):
        r = correlations(group.maps_[j : j + 1], own.maps[:, j]).min()
        ratio = own.maps[:, j].norm(dim=1) / group.maps_[j].norm()
        assert r > 0.9 and (ratio - 1).abs().max() < 0.3


def test_dual_regression_refuses():
    acts, truth = planted(n_tokens=5)
    group = GroupICA(4).fit(acts)
    for maps, rows in (
        (torch.randn(5, 600), None),  # five tokens a text are too few for five maps
        (truth[:, 1:], None),
        (group, torch.zeros(30, dtype=torch.bool)),
    ):
        with pytest.raises(ValueError):
            dual_regression(maps, acts, rows)


# nilearn


@pytest.mark.extra
def test_canica_preset_agrees_with_nilearn():
    """The same images through nilearn's public CanICA: z-scored in time, reduced, stacked, unmixed; up to its
    thresholding, which is switched off."""
    nilearn = pytest.importorskip("nilearn.decomposition")
    import nibabel
    from nilearn.maskers import MultiNiftiMasker

    acts, truth = planted(n_texts=5, n_tokens=150, n_neurons=400, noise=1.0)
    shape = (10, 5, 8)
    mask = nibabel.Nifti1Image(np.ones(shape, np.uint8), np.eye(4))
    images = [nibabel.Nifti1Image(acts.of_text(i).values.numpy().T.reshape(*shape, -1), np.eye(4)) for i in range(5)]
    masker = MultiNiftiMasker(mask_img=mask, standardize="zscore_sample", smoothing_fwhm=None).fit()
    theirs = (
        nilearn.CanICA(
            n_components=4,
            mask=masker,
            threshold=None,
            smoothing_fwhm=None,
            detrend=False,
            standardize="zscore_sample",
            random_state=0,
            n_init=10,
        )
        .fit(images)
        .components_
    )
    ours = GroupICA.canica(4).fit(acts)
    r = correlations(torch.from_numpy(theirs).float(), ours.maps_).abs().amax(1)
    assert r.min() > 0.99, r
    assert correlations(truth, ours.maps_).abs().amax(1).min() > 0.9
