"""Pins ranks: two processes that torchrun starts find the same networks and scores as one, only the first writes, and
none is left behind when one dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from small_runs import llmfact, small_world

from llmfact_nb.ablation import Found
from llmfact_nb.base.ranks import LedRanks, led_jobs, rank_of_many, shared_whitening, started_ranks
from llmfact_nb.base.whitening import CentredX, TooLittleData, whiten

OPTIONS = {"k": 3, "n-init": 2, "fit-tokens": 300, "fit-length": 48, "eval-texts": 3, "eval-length": 30}
OPTIONS |= {"control-seeds": 2, "fraction": 0.1}


@pytest.mark.parametrize("shape", [(60, 200), (200, 60), (1500, 1300), (40, 40)])
@pytest.mark.parametrize("standardize", [False, True])
def test_one_rank_whitens_as_one_process(shape, standardize):
    g = torch.Generator().manual_seed(0)
    X = torch.randn(shape[0], 20, generator=g) * torch.logspace(1, -1, 20) @ torch.randn(20, shape[1], generator=g)
    X = X + 0.01 * torch.randn(*shape, generator=g) + 3
    rows = torch.arange(shape[0])[shape[0] % 7 :]
    mine = shared_whitening(LedRanks(False), X, rows, 6, standardize)
    solver = "gram" if shape[0] <= shape[1] else "covariance"
    theirs = whiten(CentredX(X, rows, standardize), 6, solver)
    torch.testing.assert_close(mine.singular, theirs.singular, rtol=1e-3, atol=0)
    for a, b in ((mine.time, theirs.time), (mine.neurons, theirs.neurons)):
        assert ((a * b).sum(0).abs() > 0.99).all()
    assert mine.total == pytest.approx(theirs.total, rel=1e-4)
    torch.testing.assert_close(mine.mean, theirs.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine.scale, theirs.scale, rtol=1e-4, atol=1e-5)


def test_too_few_directions_are_refused():
    X = torch.randn(30, 2, generator=torch.Generator().manual_seed(0)) @ torch.ones(2, 40)
    with pytest.raises(TooLittleData) as e:
        shared_whitening(LedRanks(False), X, torch.arange(30), 4)
    assert e.value.argument == "n_components"


def test_without_torchrun_there_is_one_rank(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with started_ranks() as ranks:
        assert (ranks.rank, ranks.size, ranks.share(5)) == (0, 1, slice(0, 5))
        with ranks.order("nobody hears this"):
            pass
        assert ranks.together(lambda: 4) == 4 and ranks.objects(3) == [3]
    with pytest.raises(ZeroDivisionError):
        ranks.together(lambda: 1 / 0)


def test_a_rank_is_one_of_several(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "1"}.items():  # as some schedulers set them for a process alone
        monkeypatch.setenv(name, value)
    assert rank_of_many() == (0, False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert rank_of_many() == (1, True)
    assert "--jobs" in llmfact("run --jobs 2", 2)[1]


@pytest.mark.parametrize("n, size", [(2, 3), (1, 4), (5, 2), (7, 7), (10, 3)])
def test_things_are_shared_so_that_the_first_rank_has_some(n, size):
    ranks, parts = LedRanks(False), []
    for ranks.rank in range(size):
        ranks.size = size
        parts.append(list(range(n))[ranks.share(n)])
    assert sum(parts, []) == list(range(n)) and parts[0]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_ranks_in_the_middle_of_an_order_are_not_sent_another(monkeypatch):
    ranks, sent = LedRanks(False), []
    monkeypatch.setattr(ranks, "_send", sent.append)
    with ranks.order("count"):
        pass
    ranks.dismiss()
    with pytest.raises(OSError), ranks.order("measure"):
        raise OSError
    ranks.dismiss()
    assert sent == ["count", None, "measure"]


def start(
    world: Path, out: Path, *more, ranks: int = 2, program=("-m", "llmfact_nb"), command="run", **settings
) -> subprocess.Popen:
    options = [part for k, v in (OPTIONS | settings).items() for part in (f"--{k}", str(v)) if v is not None]
    what = [*program, command, "--model", world / "model", "--texts", world / "texts.jsonl", "--out", out]
    return started([*what, *options, *more], ranks)


def started(what: list, ranks: int) -> subprocess.Popen:
    "A process, or what torchrun makes of it on a free port."
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": env}
    return subprocess.Popen([sys.executable, *many, *what], start_new_session=True, **how)


@pytest.mark.extra
def test_two_ranks_give_the_run_of_one(tmp_path):
    world = small_world(tmp_path)
    said = {}
    for ranks in (1, 2):
        process = start(world, tmp_path / f"out{ranks}", ranks=ranks)
        said[ranks] = process.communicate(timeout=600)[0]
        assert process.returncode == 0, said[ranks]
    one, two = (Found.load(tmp_path / f"out{n}") for n in (1, 2))
    r = torch.corrcoef(torch.cat([one.networks.maps_, two.networks.maps_]))[:3, 3:].abs()
    assert r.amax(1).min() > 0.999 and one.key == two.key and one.facts.keys() == two.facts.keys()
    tables = [pd.read_csv(tmp_path / f"out{n}" / "results.csv") for n in (1, 2)]
    pd.testing.assert_series_equal(tables[0].damage, tables[1].damage, rtol=0, atol=1e-4)
    files = [{p.relative_to(tmp_path / f"out{n}") for p in (tmp_path / f"out{n}").rglob("*.csv")} for n in (1, 2)]
    assert files[0] == files[1]
    assert said[2].count("report: ") == 1, "only rank 0 speaks"


@pytest.mark.extra
def test_ranks_divide_the_shards_of_a_group(tmp_path):
    world, found = small_world(tmp_path), {}
    for ranks in (1, 2):
        out = tmp_path / f"out{ranks}"
        grouped = {"ranks": ranks, "command": "networks", "control-seeds": None}
        process = start(world, out, "--group", "--shards", "3", **grouped)
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said
        assert said.count("networks: ") == 1, said
        found[ranks] = Found.load(out)
    r = torch.corrcoef(torch.cat([found[1].networks.maps_, found[2].networks.maps_]))[:3, 3:].abs()
    assert r.amax(1).min() > 0.999 and len({f.facts["tokens used"] for f in found.values()}) == 1


OTHER = """
import os
from llmfact_nb.base import ranks
from llmfact_nb.cli import main

ranks.LedRanks.orders = None  # no order may be heard
if os.environ["RANK"] == "1":
    ranks.__version__ = "0.0.1"
main()
"""


@pytest.mark.extra
def test_ranks_with_other_versions_are_refused(tmp_path):
    world, program = small_world(tmp_path), tmp_path / "other.py"
    program.write_text(OTHER)
    process = start(world, tmp_path / "out", program=[program])
    said = process.communicate(timeout=300)[0]
    assert process.returncode != 0 and "rank 1 is not like rank 0" in said and "0.0.1" in said
    assert not (tmp_path / "out" / "networks.safetensors").exists()


STUDY = """
import os
import sys
from pathlib import Path

tests, world, kind = sys.argv[1:4]
sys.path.insert(0, tests)
from small_runs import SMALL_FURTHER, SMALL_PAPER, further_texts_in, study_texts

from llmfact_nb.across import recurrence, untrained
from llmfact_nb.cli import main
from llmfact_nb.command import further_study, paper_study
from llmfact_nb.study import whole
from llmfact_nb.study.further_study import FurtherTexts
from llmfact_nb.study.plan import StudyTexts

score, search = whole.scored, whole.searched
measure, match = untrained._measured, recurrence._rows_or_why


def wrote(what):
    with open(f"{world}/{kind} {what} {os.environ.get('RANK')}", "a") as file:
        file.write("x")


def scored(model, pair):
    wrote("arms")
    return score(model, pair)


def searched(model, job):
    wrote("searches")
    return search(model, job)


def measured(*of):
    wrote("searches")
    return measure(*of)


def matched(make):
    wrote("texts")
    return match(make)


whole.scored, whole.searched, untrained._measured, recurrence._rows_or_why = scored, searched, measured, matched
further_study.QUICK_FURTHER, FurtherTexts.default = SMALL_FURTHER, lambda settings: further_texts_in(Path(world))
paper_study.QUICK, StudyTexts.default = SMALL_PAPER, lambda settings: study_texts()
sys.argv[1:] = ["study", kind, "--quick", "--model", f"{world}/model", *sys.argv[4:]]
main()
"""


@pytest.mark.extra
@pytest.mark.parametrize("kind", ["further", "paper"])
def test_two_ranks_share_a_study_and_give_that_of_one(kind, tmp_path):
    world, program, tables = small_world(tmp_path), tmp_path / "study.py", {}
    program.write_text(STUDY)
    for ranks in (1, 2):
        out = tmp_path / f"study{ranks}"
        process = started([program, Path(__file__).parent, world, kind, "--out", out], ranks)
        said = process.communicate(timeout=600)[0]
        assert process.returncode == 0, said
        assert said.count("tables in ") == 1, said
        notes = [line for line in said.splitlines() if line.startswith("note:")]
        assert len(set(notes)) == len(notes), "only the first rank speaks"
        tables[ranks] = {path.name: pd.read_csv(path) for path in (out / "tables").glob("*.csv")}
    for what, least in (("arms", 5), ("searches", 1), *([("texts", 1)] if kind == "paper" else [])):
        done = [(world / f"{kind} {what} {rank}").stat().st_size for rank in (0, 1)]
        assert min(done) >= least and abs(done[0] - done[1]) <= max(1, max(done) / 2), f"both have a share of {what}"
    assert tables[1].keys() == tables[2].keys() and "verdicts.csv" in tables[1]
    for name, one in tables[1].items():
        pd.testing.assert_frame_equal(one, tables[2][name], atol=1e-4, rtol=1e-4)


def test_jobs_that_all_ranks_share():
    ranks = LedRanks(False)
    assert dict(led_jobs(ranks, lambda model, job: model * job, [1, 2, 3], 10)) == {0: 10, 1: 20, 2: 30}
    with pytest.raises(ZeroDivisionError):
        list(led_jobs(ranks, lambda model, job: model / job, [1, 0], 10))
    assert not ranks.under_way, "a job that fails fails everywhere, and the next order is heard"
    jobs = led_jobs(ranks, lambda model, job: job, [1, 2], None)
    next(jobs)
    jobs.close()
    assert ranks.under_way, "rank 0 has left alone; the others wait for numbers, not for an order"


@pytest.mark.extra
def test_when_a_rank_is_killed_the_others_end_and_it_is_named(tmp_path):
    world = small_world(tmp_path)
    process = start(world, tmp_path / "out", **{"eval-texts": 12, "eval-length": 60, "control-seeds": 12})
    try:
        scores, until = tmp_path / "out" / "parts" / "scores", time.monotonic() + 300
        while not list(scores.glob("*.safetensors")) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        ranks = {p.environ().get("RANK"): p for p in psutil.Process(process.pid).children()}
        ranks["1"].kill()
        said = process.communicate(timeout=60)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0 and "rank      : 1" in said and "-9" in said


FAILING = """
from llmfact_nb.ablation import ScoreCache
from llmfact_nb.cli import main

keep, kept = ScoreCache.keep, []

def fail(self, *of):
    kept.append(keep(self, *of))
    if len(kept) == 3:
        raise OSError(28, "No space left on device")

ScoreCache.keep = fail
main()
"""


@pytest.mark.extra
def test_when_the_first_rank_fails_the_others_end(tmp_path):
    world, program = small_world(tmp_path), tmp_path / "failing.py"
    program.write_text(FAILING)
    process = start(world, tmp_path / "out", program=[program])
    try:
        said = process.communicate(timeout=300)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0 and "No space left on device" in said
    assert len(list((tmp_path / "out" / "parts" / "scores").glob("*.safetensors"))) == 3
