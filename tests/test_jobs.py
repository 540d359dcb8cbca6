"""Pins jobs: the same results from processes and from a cluster as from one process, also when a worker dies."""

import os
import pickle
import signal
import time
import warnings
from pathlib import Path

import families
import filelock
import joblib
import numpy as np
import pandas as pd
import planted
import pytest
import torch
from small_runs import SMALL_PAPER, study_texts
from torch import nn

from llmfact_nb import __version__
from llmfact_nb.ablation import Intervention, ablation_study
from llmfact_nb.base.arguments import ArgumentError
from llmfact_nb.base.jobs import (
    PASSING,
    WEIGHTS,
    jobs_at_once,
    model_here,
    on_cluster,
    passing_folder,
    refuse_workers,
    several,
    with_tensors,
    write_model,
)
from llmfact_nb.evaluate import EvalSet
from llmfact_nb.masks import NeuronMask


@pytest.fixture
def model():
    return families.build("llama")


class Wide(nn.Module):
    "Large and small tensors, tied and frozen ones, a buffer and a view of a parameter's memory."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.small = nn.Linear(200, 200), nn.Linear(200, 200, bias=False), nn.Linear(2, 2)
        self.b.weight = self.a.weight
        self.frozen = nn.Parameter(torch.randn(200, 200), requires_grad=False)
        self.register_buffer("table", torch.randn(300, 100), persistent=False)
        self.register_buffer("view", self.frozen.data[:])
        self.register_buffer("part", self.frozen.data[10:])


def test_a_copy_with_other_tensors_shares_no_weight_and_keeps_ties():
    wide = Wide()
    double = with_tensors(wide, lambda i, t: 2 * t.detach())
    assert double.b.weight is double.a.weight and double.frozen.requires_grad is False
    torch.testing.assert_close(double.table, 2 * wide.table)
    assert double.a.weight.data_ptr() != wide.a.weight.data_ptr()
    same = with_tensors(wide, lambda i, t: t)
    assert same.a is not wide.a and same.a.weight is wide.a.weight


def test_a_written_model_comes_back_bit_for_bit_and_mapped(tmp_path):
    wide = Wide()
    written = write_model(wide, tmp_path)
    small = len(pickle.dumps(written)) - 2 * wide.frozen.nbytes  # two in one memory with another are not for a file
    assert 0 < small < 100_000, "the others are in the file"
    back = written.load()
    for (name, a), (other, b) in zip(wide.state_dict().items(), back.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)
    assert back.b.weight is back.a.weight and torch.equal(back.table, wide.table)
    with torch.no_grad():
        back.a.weight.zero_()  # changes stay in this process
    assert torch.equal(written.load().a.weight, wide.a.weight)
    os.unlink(written.path)
    with pytest.raises(FileNotFoundError):
        written.load()


def test_after_a_model_that_cannot_be_opened_the_one_before_it_is_opened_again(tmp_path):
    good, gone = write_model(Wide(), tmp_path / "good"), write_model(Wide(), tmp_path / "gone")
    os.unlink(gone.path)
    assert model_here(good) is model_here(good)
    with pytest.raises(FileNotFoundError):
        model_here(gone)
    assert model_here(good).a.weight.shape == (200, 200)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc here")
def test_weights_are_mapped_from_the_file(tmp_path):
    back = write_model(Wide(), tmp_path).load()
    assert str(tmp_path) in Path("/proc/self/maps").read_text() and back.a.weight.shape == (200, 200)


def weight_sum(model, name):
    return float(model.get_parameter(name).detach().double().sum())


def names_of(model):
    return [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("n_jobs, backend", [(1, "loky"), (2, "threading")])
def test_results_are_those_of_a_loop(model, n_jobs, backend):
    names = names_of(model)
    with joblib.parallel_config(backend):
        found = dict(several(weight_sum, names, model, n_jobs))
    assert found == {i: weight_sum(model, name) for i, name in enumerate(names)}
    assert list(several(weight_sum, [], model, n_jobs)) == []


@pytest.mark.extra
def test_the_threads_are_divided_among_jobs(model):
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = dict(several(threads_here, range(4), model, 2))
    finally:
        torch.set_num_threads(before)
    assert set(found.values()) == {2}


def threads_here(model, job):
    return torch.get_num_threads()


def test_more_jobs_than_cores_give_a_note(recwarn):
    assert jobs_at_once(1, 5) == 1 and not recwarn.list
    assert jobs_at_once(10 * joblib.cpu_count(), 3) == 3
    assert len(recwarn.list) == 1


@pytest.mark.parametrize(
    "said, error",
    [
        (ModuleNotFoundError("No module named 'llmfact_nb'"), ModuleNotFoundError),
        (("0.0.1", True), RuntimeError),
        ((__version__, False), FileNotFoundError),
    ],
)
def test_a_worker_that_cannot_work_is_named(said, error):
    refuse_workers({"tcp://a:1": (__version__, True)}, "weights")
    with pytest.raises(error) as e:
        refuse_workers({"tcp://a:1": (__version__, True), "tcp://b:2": said}, "weights")
    assert "tcp://b:2" in str(e.value) and "tcp://a:1" not in str(e.value)


def test_a_cluster_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ArgumentError) as e, on_cluster(str(tmp_path / "scheduler.json")):
        pass
    assert e.value.argument == "cluster"


@pytest.mark.extra
@pytest.mark.parametrize("where, says", [("scheduler.json", "no such file"), ("tcp://127.0.0.1:1", "Nothing answers")])
def test_a_scheduler_that_does_not_run_is_named(where, says, monkeypatch, tmp_path):
    pytest.importorskip("distributed")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError) as e, on_cluster(where):
        pass
    assert e.value.argument == "cluster" and says in str(e.value)


def test_workers_write_no_results(model, monkeypatch, tmp_path):
    "Their disk may be full, and it may not be the disk of the study: what they found is written where it is asked for."
    from llmfact_nb.across import recurrence

    def watched(work, jobs, model, n_jobs, folder):
        for i, job in enumerate(jobs):
            before = set(Path(folder).iterdir())
            found = work(model, job)
            assert set(Path(folder).iterdir()) == before
            yield i, found

    monkeypatch.setattr(recurrence, "several", watched)
    texts = {"words": [families.words(30, seed=i) for i in range(3)]}
    how = {"n_templates": 3, "progress": False, "folder": tmp_path / "kept", "n_jobs": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = recurrence.recurrence_study(model, families.tokenizer(), texts, texts, **how)
        kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").glob("*.json")}
        again = recurrence.recurrence_study(model, families.tokenizer(), texts, texts, **how)
    assert len(table) and len(kept) > 3
    assert kept == {path: path.stat().st_mtime_ns for path in kept}, "what is kept is not found again"
    pd.testing.assert_frame_equal(table, again)


class Dying:
    "A job that kills its process: the first time, or each time."

    def __init__(self, marker: Path, always: bool):
        self.marker, self.always, self.parent = marker, always, os.getpid()

    def __call__(self, model, name):
        first = not self.marker.exists()
        if name is None and (first or self.always):
            self.marker.touch()
            assert os.getpid() != self.parent
            os.kill(os.getpid(), signal.SIGKILL)
        return name and weight_sum(model, name)


@pytest.mark.extra
def test_a_process_that_dies_costs_its_job(model, tmp_path):
    jobs = [*names_of(model)[:4], None]
    found = dict(several(Dying(tmp_path / "died", False), jobs, model, 2))
    assert (tmp_path / "died").exists()
    assert found == {i: name and weight_sum(model, name) for i, name in enumerate(jobs)}


@pytest.mark.extra
def test_a_job_that_always_kills_its_process_ends_the_study(model, tmp_path):
    with pytest.raises(RuntimeError):
        list(several(Dying(tmp_path / "died", True), [None, None], model, 2))


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    dead, young, alive, foreign = (
        tmp_path / name
        for name in (f"{PASSING}dead", f"{PASSING}young", f"{PASSING}alive", ".llmfact-model-other-host-x")
    )
    for folder in (dead, young, alive, foreign):
        folder.mkdir()
        (folder / WEIGHTS).write_bytes(b"0" * 100)
        (folder / "lock").touch()
        if folder != young:
            os.utime(folder / "lock", (0, 0))
    with filelock.FileLock(alive / "lock"), passing_folder(tmp_path) as place:
        os.utime(place / "lock", (0, 0))
        with passing_folder(tmp_path) as second:
            assert place.exists() and second != place
        assert set(tmp_path.iterdir()) == {young, alive, foreign, place}
    assert not place.exists()


# a cluster


class Slow:
    "Scores a second late, and says on disk that it has begun, so that its worker can be killed in the middle."

    def __init__(self, score, folder: Path):
        self.score, self.folder = score, folder

    def __call__(self, model):
        (self.folder / f"{os.getpid()}-{time.monotonic_ns()}").touch()
        time.sleep(0.3)
        return self.score(model)


@pytest.mark.extra
def test_a_cluster_gives_the_same_table_though_a_worker_is_killed(model, tmp_path):
    distributed = pytest.importorskip("distributed")
    from dataclasses import replace
    from threading import Thread

    from llmfact_nb.ablation import loss_on

    texts = EvalSet(families.tokenizer(), [families.words(20, seed=i) for i in range(3)])
    draw = lambda seed: NeuronMask.from_flat(np.random.default_rng(seed).random(72) < 0.3, (24, 24, 24), "mlp_hidden")
    arms = [Intervention("random", draw(seed), seed) for seed in range(8)]
    words, begun = loss_on("held out", texts), tmp_path / "begun"
    begun.mkdir()
    late = replace(words, score=Slow(words.score, begun))

    def kill():
        while len(list(begun.iterdir())) < 4:
            time.sleep(0.05)
        last = max((p.name for p in begun.iterdir()), key=lambda name: int(name.split("-")[1]))  # surely not done yet
        os.kill(int(last.split("-")[0]), signal.SIGKILL)

    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        killer = Thread(target=kill)
        killer.start()
        with on_cluster(cluster.scheduler_address):
            table = ablation_study(model, [late], arms, tmp_path / "scores", n_jobs=-1, progress=False)
        killer.join()
    processes = {p.name.split("-")[0] for p in begun.iterdir()}
    assert len(processes) >= 2 and str(os.getpid()) not in processes
    assert len(list(begun.iterdir())) > 1 + len(arms), "the job of the killed one was done again"
    pd.testing.assert_frame_equal(table, ablation_study(model, [words], arms, progress=False), check_exact=True)
    assert not [p for p in (tmp_path / "scores").iterdir() if p.name.startswith(PASSING)]


class Noted:
    "A search that says on disk which process does it."

    def __init__(self, search, folder: Path):
        self.search, self.folder = search, folder

    def __call__(self, model, job):
        (self.folder / f"{os.getpid()}-{time.monotonic_ns()}").touch()
        return self.search(model, job)


@pytest.mark.extra
def test_the_searches_of_a_study_are_spread_over_a_cluster(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    from llmfact_nb.study import whole

    begun = tmp_path / "begun"
    begun.mkdir()
    study = lambda name, n_jobs: whole.paper_study(
        planted.model(), families.tokenizer(), tmp_path / name, SMALL_PAPER, study_texts(), n_jobs, progress=False
    )
    here = study("here", 1)
    monkeypatch.setattr(whole, "searched", Noted(whole.searched, begun))
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        with on_cluster(cluster.scheduler_address):
            there = study("there", -1)
    searches = [int(p.name.split("-")[0]) for p in begun.iterdir()]
    assert len(searches) > 2 and len(set(searches)) == 2 and os.getpid() not in searches
    for name in here.keys() - {"facts"}:  # facts are words, and one of them is the number of threads
        pd.testing.assert_frame_equal(here[name], there[name], atol=1e-4, rtol=1e-4)
