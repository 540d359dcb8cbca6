"""Pins what is left when something breaks: exceptions at every step of a run, kills, a full disk, a cache that cannot
be written, two processes at once, a clock that runs backwards.

The model comes back as it was, no file is ever half a file, and the same call afterwards gives the table of a run
that nothing happened to.

Kills need a process of their own. To start one takes seconds, so one process imports everything once (`nursery`)
and forks for every trial."""

import errno
import hashlib
import importlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import families
import pytest
import torch
from small_runs import N_ARMS, llmfact, small_run, small_settings, small_world, study_job, tables

from llmfact_nb.base import models as models_module
from llmfact_nb.command import run as run_module
from llmfact_nb.base.files import digest, load_tensors, save_tensors, hold, write_json, write_text
from llmfact_nb.networks import FunctionalNetworks
from llmfact_nb.base.downloads import RESOURCES, Resource, fetch
from llmfact_nb.base.models import is_whole, seal
from llmfact_nb.command.run import Sources, find_into, has_networks, read_run

pytestmark = pytest.mark.filterwarnings("ignore:FastICA has not converged")


def broken_files(folder: Path) -> list[str]:
    "The files that stand there under their own name and are not whole."
    import pandas as pd
    from PIL import Image
    from safetensors.torch import load_file

    def check(path: Path) -> None:
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".csv":
            assert path.read_text().endswith("\n") and len(pd.read_csv(path))
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")
        elif path.suffix == ".png":
            Image.open(path).load()

    broken = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".partial"):
        try:
            check(path)
        except Exception as e:  # whatever the reader says of half a file
            broken.append(f"{path.relative_to(folder)}: {e}")
    return broken


# exceptions


class Fault(Exception):
    "What the tests throw."


class AtCall:
    "Counts calls, and raises at the n-th."

    def __init__(self, n: int | None = None, error: BaseException | None = None):
        self.n, self.calls, self.error = n, 0, error or Fault("thrown by the test")

    def __call__(self):
        self.calls += 1
        if self.calls == self.n:
            raise self.error

    def around(self, function):
        def wrapped(*args, **kwargs):
            self()
            return function(*args, **kwargs)

        return wrapped

    def behind(self, function):
        "As `around`, but after the work is done."

        def wrapped(*args, **kwargs):
            result = function(*args, **kwargs)
            self()
            return result

        return wrapped


def throw_in(place: str, at: AtCall, model, m: pytest.MonkeyPatch) -> None:
    "Let a place of a run fail at the n-th time that it is passed."
    from llmfact_nb import masked_model
    from llmfact_nb import ablation as experiments

    Module = torch.nn.Module
    if place == "forward":  # the first thing in every pass
        embed = model.get_input_embeddings()
        m.setattr(embed, "forward", at.around(embed.forward))
    elif place == "layer":  # behind the hooks of the last layer
        down = families.down_projections("llama", model)[-1][1]
        m.setattr(down, "forward", at.around(down.forward))
    elif place == "hook":
        for name in ("register_forward_hook", "register_forward_pre_hook"):
            register = getattr(Module, name)
            m.setattr(
                Module, name, lambda self, hook, *a, register=register, **kw: register(self, at.around(hook), *a, **kw)
            )
    elif place == "attaching":
        for name in ("register_forward_hook", "register_forward_pre_hook"):
            m.setattr(Module, name, at.around(getattr(Module, name)))
    elif place == "evaluation":
        m.setattr(experiments, "perplexity", at.behind(experiments.perplexity))
    elif place == "fit":
        m.setattr(FunctionalNetworks, "fit", at.behind(FunctionalNetworks.fit))
    elif place == "masking":
        m.setattr(masked_model.MaskedModel, "ablate", at.around(masked_model.MaskedModel.ablate))
    elif place == "replace":
        m.setattr(os, "replace", at.around(os.replace))
    elif place == "flush":
        m.setattr(os, "fsync", at.around(os.fsync))
    else:
        raise AssertionError(place)


PLACES = ("forward", "layer", "hook", "attaching", "evaluation", "fit", "masking", "replace", "flush")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def loaded(world):
    return models_module.load_model(world / "model")


@pytest.fixture
def in_memory(loaded, monkeypatch):
    "The model that every run of the test gets, in memory; figures are not drawn."
    monkeypatch.setattr(run_module, "load_model", lambda *a, **kw: loaded)
    monkeypatch.setattr(run_module, "publish", lambda run: None)
    return loaded[0]


@pytest.fixture(scope="module")
def undisturbed(world, loaded, tmp_path_factory):
    "The tables of a run that nothing happened to; what is looked at once per model has been seen afterwards."
    with pytest.MonkeyPatch.context() as m:
        m.setattr(run_module, "load_model", lambda *a, **kw: loaded)
        m.setattr(run_module, "publish", lambda run: None)
        out = tmp_path_factory.mktemp("undisturbed")
        small_run(world, out)
    return tables(out)


def thrown(place, n, model, world, out, undisturbed, error=None) -> None:
    "A run in which the n-th passage of a place fails, and the same run again."
    before, weights = families.state(model), digest(*model.parameters())
    with pytest.MonkeyPatch.context() as m:
        at = AtCall(n, error)
        throw_in(place, at, model, m)
        with pytest.raises(type(at.error)) as e:
            small_run(world, out)
    assert e.value is at.error or isinstance(e.value.__cause__, type(at.error)), (
        "the fault is not swallowed, nor taken for another"
    )
    assert families.state(model) == before and digest(*model.parameters()) == weights, (
        f"{place} {n}: the model has changed"
    )
    assert not list(out.rglob("*.partial")) and not broken_files(out), f"{place} {n}"
    assert not (out / "manifest.json").exists()
    small_run(world, out)
    assert tables(out) == undisturbed, f"{place} {n}"


def passages(place, model, world, out) -> int:
    "How often a run passes a place."
    with pytest.MonkeyPatch.context() as m:
        at = AtCall()
        throw_in(place, at, model, m)
        small_run(world, out)
    return at.calls


@pytest.mark.parametrize("place", PLACES)
def test_a_fault_leaves_the_model_and_the_next_run_as_they_were(place, in_memory, world, undisturbed, tmp_path):
    """A passage drawn at random; of the writing and reading places also the last, which is that of the manifest, or of
    the last arm."""
    counted = [passages(place, in_memory, world, tmp_path / name) for name in ("first", "count")]
    n = min(counted)  # what is asked of a model once is asked in the first run alone
    measured = len(list((tmp_path / "count" / "parts" / "scores").glob("*.safetensors")))  # equal masks once
    assert n >= (1 if place == "fit" else measured - 1) and measured > N_ARMS / 2, "the place is passed"
    rng = random.Random(place)
    for i in {rng.randint(1, n), *([n] if place in ("replace", "forward") else [])}:
        thrown(place, i, in_memory, world, tmp_path / str(i), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_fault_at_every_passage(place, in_memory, world, undisturbed, tmp_path):
    "Every n of a small run; of the hooks, which are passed hundreds of times, sixty."
    n = passages(place, in_memory, world, tmp_path / "count")
    every = range(1, n + 1) if n <= 60 else sorted(random.Random(place).sample(range(1, n + 1), 60))
    for i in every:
        thrown(place, i, in_memory, world, tmp_path / str(i), undisturbed)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), torch.OutOfMemoryError("thrown by the test")], ids=lambda e: type(e).__name__
)
def test_other_faults_in_the_middle_of_an_arm(error, in_memory, world, undisturbed, tmp_path):
    thrown("layer", 12, in_memory, world, tmp_path, undisturbed, error)


# networks that are found again


@pytest.fixture
def another_order(in_memory, monkeypatch):
    "From now on components come in another order, as another number of threads can order them."
    honest = run_module.find_networks

    def find(*args):
        found = honest(*args)
        for name in ("mixing_", "rotation_", "sign_", "stability_", "maps_"):
            setattr(found.networks, name, getattr(found.networks, name)[[2, 0, 1]])
        found.networks.time_courses_ = found.networks.time_courses_[:, [2, 0, 1]]
        return found

    return lambda: monkeypatch.setattr(run_module, "find_networks", find)


def test_networks_found_again_leave_nothing_of_the_old_ones(world, another_order, tmp_path):
    """Their file was damaged, and deleted as the message says; the folder becomes that of a run that found these
    networks at once."""
    small_run(world, tmp_path / "run")
    old = tables(tmp_path / "run")
    (tmp_path / "run" / "networks.safetensors").unlink()
    another_order()
    for name in ("run", "fresh"):
        small_run(world, tmp_path / name)
    assert tables(tmp_path / "run") == tables(tmp_path / "fresh")
    assert {name for name, of in tables(tmp_path / "run").items() if of == old[name]} == {
        "results.csv",
        "differences.csv",
    }, "they are others indeed, whose key neurons are the same all together"


@pytest.mark.parametrize("place", ["found.safetensors", "networks.safetensors", "loaded.json"])
def test_new_networks_and_old_facts_are_no_whole(place, world, another_order, tmp_path, monkeypatch):
    "It breaks as the file is to be written."
    small_run(world, tmp_path / "run")
    (tmp_path / "run" / "networks.safetensors").unlink()
    another_order()
    replace = os.replace
    with monkeypatch.context() as m, pytest.raises(Fault):
        m.setattr(
            os,
            "replace",
            lambda source, target: (
                (_ for _ in ()).throw(Fault()) if Path(target).name == place else replace(source, target)
            ),
        )
        small_run(world, tmp_path / "run")
    assert not has_networks(tmp_path / "run") and not [
        name for name in ("results.csv", "manifest.json", "networks.html") if (tmp_path / "run" / name).exists()
    ]
    for name in ("run", "fresh"):
        small_run(world, tmp_path / name)
    assert tables(tmp_path / "run") == tables(tmp_path / "fresh")


def test_a_folder_without_a_run_keeps_files_of_such_names(in_memory, world, tmp_path):
    (tmp_path / "manifest.json").write_text("mine")
    with pytest.raises(ValueError):
        find_into(Sources(small_settings(world), progress=False), tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.name[0] != "."] == ["manifest.json"]
    assert (tmp_path / "manifest.json").read_text() == "mine"


def test_other_settings_are_refused_before_networks_are_found_again(in_memory, world, tmp_path, monkeypatch):
    small_run(world, tmp_path)
    (tmp_path / "networks.safetensors").unlink()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    monkeypatch.setattr(run_module, "find_networks", lambda *_: pytest.fail("refused at once"))
    with pytest.raises(ValueError):
        small_run(world, tmp_path, n_components=4)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_courses_of_other_networks_are_made_again(world, another_order, tmp_path):
    small_run(world, tmp_path / "old")
    another_order()
    small_run(world, tmp_path / "new")
    whole, at = tables(tmp_path / "new"), tmp_path / "new" / "parts" / "courses.safetensors"
    at.write_bytes((tmp_path / "old" / "parts" / "courses.safetensors").read_bytes())
    small_run(world, tmp_path / "new")
    assert tables(tmp_path / "new") == whole


def test_networks_that_another_found_meanwhile_are_not_found_again(in_memory, world, tmp_path, monkeypatch):
    "Between the look into the folder and the hold on it, another process came and went."
    honest, claim, asked = run_module.find_networks, run_module.claim, []

    def find(out, k):
        monkeypatch.setattr(run_module, "claim", claim)
        monkeypatch.setattr(run_module, "find_networks", lambda *a: (asked.append(k), honest(*a))[1])
        return find_into(Sources(small_settings(world, n_components=k), progress=False), out)

    for k, out in ((3, tmp_path / "same"), (4, tmp_path / "other")):
        asked.clear()
        monkeypatch.setattr(run_module, "claim", lambda *a, k=k, out=out: (find(out, k), claim(*a))[1])
        sources = Sources(small_settings(world), progress=False)
        if k == 3:
            find_into(sources, out)
        else:
            with pytest.raises(ValueError):
                find_into(sources, out)
        assert asked == [k]


# a full disk


@pytest.mark.parametrize("place", ["replace", "flush"])
def test_a_full_disk_names_the_file_and_keeps_the_old_one(place, tmp_path, monkeypatch):
    old = write_text(tmp_path / "table.csv", "old\n")
    save_tensors(tmp_path / "maps.safetensors", {"x": torch.ones(3)}, "maps")
    throw_in(place, AtCall(1, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))), None, monkeypatch)
    with pytest.raises(OSError) as e:
        write_text(old, "new\n")
    assert e.value.errno == errno.ENOSPC and old.read_text() == "old\n"
    assert load_tensors(tmp_path / "maps.safetensors", "maps")[0]["x"].tolist() == [1, 1, 1] and not list(
        tmp_path.glob(".*")
    )


# the cache

CONTENT = bytes(range(256)) * 300
NO_WRITING = OSError(errno.EROFS, os.strerror(errno.EROFS))


def toy() -> Resource:
    return Resource(
        "toy", "texts", "toy", "1.0", "", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), 1, "none", "bytes"
    )


def downloaded(package, version, folder: Path) -> Path:
    (folder / "toy.whl").write_bytes(CONTENT)
    return folder / "toy.whl"


def unreachable(package, version, folder):
    raise ConnectionError("no network in this test")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LLMFACT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(RESOURCES, "toy", toy())
    return tmp_path / "cache"


def test_a_corrupted_file_in_the_cache_is_never_given(cache):
    "Flipped bytes, cut, grown, emptied, replaced: fetched again; without network refused."
    path, rng = fetch("toy", download=downloaded), random.Random(0)
    for trial in range(30):
        data = bytearray(CONTENT)
        kind = trial % 5
        if kind == 0:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[rng.randrange(len(data)) :]
        elif kind == 2:
            data += b"\0"
        elif kind == 3:
            at = rng.randrange(len(data) - 99)
            data[at : at + 99] = bytes(99)
        else:
            data[:] = rng.randbytes(len(data))
        for download in (unreachable, downloaded):
            path.write_bytes(data)
            with pytest.warns(UserWarning):
                if download is unreachable:
                    with pytest.raises(ConnectionError):
                        fetch("toy", download=download, pause=0)
                else:
                    assert fetch("toy", download=download) == path and path.read_bytes() == CONTENT


def test_a_cache_that_cannot_be_written(cache, monkeypatch):
    "What is there is used; what is missing is refused with the way out."
    path = fetch("toy", download=downloaded)

    def refuse(*args, **kwargs):
        raise NO_WRITING

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    monkeypatch.setattr(Path, "touch", refuse)
    assert fetch("toy", download=unreachable) == path
    path.unlink()
    with pytest.raises(PermissionError):
        fetch("toy", download=downloaded, pause=0)
    with pytest.raises(OSError):
        write_json(cache / "x.json", {})


@pytest.mark.parametrize(
    "list_",
    [
        "{}",
        "[]",
        "7",
        '{"a": 3}',
        '{"a": {"size": 1}}',
        '{"../../etc/passwd": {"size": 0, "changed": 0, "sha256": ""}}',
        "[" * 9999,
        '{"a\\u0000b": {"size": 0, "changed": 0, "sha256": 0}}',
    ],
)
def test_a_converted_model_with_a_damaged_list_is_not_whole(tmp_path, list_):
    (tmp_path / "a").write_text("abc")
    seal(tmp_path)
    assert is_whole(tmp_path)
    (tmp_path / "sealed.json").write_text(list_)
    assert not is_whole(tmp_path)


# the clock


def test_a_clock_that_runs_backwards(in_memory, world, undisturbed, tmp_path, monkeypatch):
    started, real = time.time(), time.time
    monkeypatch.setattr(time, "time", lambda: 2 * started - real() - 86_400 * 400)
    small_run(world, tmp_path / "run")
    assert tables(tmp_path / "run") == undisturbed
    small_run(world, tmp_path / "run")  # and finds its parts again
    assert tables(tmp_path / "run") == undisturbed


def test_a_clock_that_jumps_does_not_lose_a_download(cache, monkeypatch):
    real, calls = time.time, iter(range(1000))
    monkeypatch.setattr(time, "time", lambda: real() + (-1) ** next(calls) * 10**8)
    assert fetch("toy", download=downloaded).read_bytes() == CONTENT


# one folder, two workers


def test_a_folder_is_held_by_one(tmp_path):
    with hold(tmp_path / "run"):
        with pytest.raises(BlockingIOError):
            with hold(tmp_path / "run"):
                pass
        with hold(tmp_path / "other"):
            pass
    for _ in range(2):  # free again, also after an exception
        with pytest.raises(Fault), hold(tmp_path / "run"):
            raise Fault
    with hold(tmp_path / "run"):
        refused = []

        def second():
            try:
                with hold(tmp_path / "run"):
                    pass
            except BlockingIOError as e:
                refused.append(e)

        t = threading.Thread(target=second)
        t.start()
        t.join()
    assert len(refused) == 1


def test_a_folder_that_stayed_empty_goes_again(tmp_path):
    for name, there in {"new": False, "mine": True}.items():
        folder = tmp_path / name
        if there:
            folder.mkdir()
        with pytest.raises(Fault), hold(folder):
            raise Fault
        assert folder.exists() == there, "only what was made is removed"
    with hold(tmp_path / "new") as folder:
        (folder / "a").touch()
    assert (tmp_path / "new" / "a").exists()
    for name in ("new/a", "new/a/b"):
        with pytest.raises(NotADirectoryError), hold(tmp_path / name):
            pass


def test_a_folder_that_cannot_go_hides_no_fault(tmp_path, monkeypatch):
    "Another wrote into it at the last moment."
    rmdir = Path.rmdir
    monkeypatch.setattr(Path, "rmdir", lambda self: ((self / "late").touch(), rmdir(self)))
    with pytest.raises(Fault), hold(tmp_path / "run"):
        raise Fault
    assert (tmp_path / "run" / "late").exists()
    with hold(tmp_path / "run"):
        pass  # and it is free


def test_a_held_folder_is_read_and_not_written(in_memory, world, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with hold(out), monkeypatch.context() as m, pytest.raises(BlockingIOError):
        m.setattr(run_module, "load_model", lambda *a, **kw: pytest.fail("refused at once"))
        small_run(world, out)
    assert not out.exists()
    small_run(world, out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    with hold(out):
        with pytest.raises(BlockingIOError):
            small_run(world, out)
        assert len(read_run(out).results) == N_ARMS
        llmfact(f"info {out}")
        llmfact(f"mask --out {out} --network 0")
        assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
        llmfact(f"networks --out {out}")


# processes


def forked(job) -> int:
    """Start a child that does the job and ends, with 0; 3 if it raises OSError, 5 BlockingIOError, 4 anything else.

    Returns its number."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 0
    try:
        job()
    except BaseException as e:  # the child must never return into the parent's code
        code = 5 if isinstance(e, BlockingIOError) else 3 if isinstance(e, OSError) else 4
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int, seconds: float = 180.0) -> int:
    "Wait for a child's end and return its exit code; a child that hangs is killed, and 99 returned."
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        there, status = os.waitpid(pid, os.WNOHANG)
        if there:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 99


def wait_until(condition, seconds: float = 180.0) -> None:
    deadline = time.perf_counter() + seconds
    while not condition() and time.perf_counter() < deadline:
        time.sleep(0.001)


def heard(job) -> tuple[int, list[str]]:
    "The exit code of a child that does the job, and the last line it said."
    hear, say = os.pipe()
    code = ended(forked(lambda: (os.dup2(say, 2), job())))
    os.close(say)
    with open(hear, errors="replace") as f:
        return code, f.read().strip().splitlines()[-1:]


def import_what_it_imports(job, note: Path) -> None:
    """Do the job once in a child, and import here the modules that it came to need. The job itself starts threads, and
    a process with threads cannot be forked safely."""
    assert ended(forked(lambda: (job(), note.write_text("\n".join(sys.modules))))) == 0
    for name in note.read_text().split():
        if name not in sys.modules and not name.startswith(("__", "_pytest")):
            try:
                importlib.import_module(name)
            except ImportError:
                pass  # made at run time
    assert threading.active_count() == 1


def dies_at_write(n: int, before: bool) -> None:
    "Let this process be killed at its n-th rename, before or after it, or in the middle of the n-th file."
    at, real, fsync = [0], os.replace, os.fsync

    def replace(source, target, **kw):
        at[0] += 1
        if at[0] == n and before:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target, **kw)
        if at[0] == n:
            os.kill(os.getpid(), signal.SIGKILL)

    def flush(handle):
        if at[0] + 1 == n and n % 3 == 0:  # half of the file has arrived
            os.ftruncate(handle, os.fstat(handle).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(handle)

    os.replace, os.fsync = replace, flush


def kill_chain(job, result, folder: Path, kills: int, seed: int, writes: int) -> dict:
    """Kill the job again and again, at a random moment or at a random write, and let it finish at last; when a life
    ends before it is killed, another folder is taken.

    `job(out)` works, `result(out)` says what came out. Returns how often it was killed, how many lives came to
    their end, and everything that was not as it should be."""
    rng, wrong, n_killed, finished, life = random.Random(seed), [], 0, 0, 0
    begun = time.perf_counter()
    if code := ended(forked(lambda: job(folder / "whole"))):
        return {"wrong": [f"the undisturbed job ended with {code}"]}
    span, expected = time.perf_counter() - begun, result(folder / "whole")
    while n_killed < kills or finished == 0:
        out = folder / f"life {life}"
        last = n_killed >= kills  # now it may live
        if last:
            pid = forked(lambda: job(out))
        elif rng.random() < 0.5:
            n, before = rng.randint(1, writes), rng.random() < 0.5
            pid = forked(lambda: (dies_at_write(n, before), job(out)))
        else:
            pid = forked(lambda: job(out))
            time.sleep(rng.uniform(0.02, 1) * span)
            os.kill(pid, signal.SIGKILL)
        code = ended(pid)
        wrong += [f"after kill {n_killed}: {b}" for b in (broken_files(out) if out.exists() else [])]
        if code == -signal.SIGKILL:
            n_killed += 1
            continue
        if code:
            wrong.append(f"life {life} ended with {code}")
            break
        finished += 1
        if result(out) != expected:
            wrong.append(f"life {life} came to another result after {n_killed} kills")
        life += 1
    return {"killed": n_killed, "finished": finished, "wrong": wrong}


def study_result(out: Path) -> dict:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((out / "tables").glob("*.csv"))}


def tuning_job(out: Path) -> None:
    import tuning_task as t

    results = t.study(out)
    write_text(out / "tables.txt", "\n".join(f.to_csv() for f in t.timeless(results)))


def limited(n_bytes: int) -> None:
    "No file of this process may grow beyond so many bytes: a disk that is full in the middle of a file."
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


def nursery(world: str, folder: str, what: str, kills: int, seed: int) -> None:
    "What runs in the process of its own; prints one line of JSON."
    world, folder, answer = Path(world), Path(folder), {}
    torch.set_num_threads(1)
    if what != "run with its page":
        run_module.publish = lambda run: None
    if "run" in what:
        run = lambda out: small_run(world, out)
        import_what_it_imports(lambda: run(folder / "warm"), folder / "modules")
        expected = tables(folder / "warm")
        answer["kills"] = kill_chain(run, tables, folder, kills, seed, 8 + N_ARMS)
    elif what == "study":
        import_what_it_imports(lambda: study_job(folder / "warm"), folder / "modules")
        answer["kills"] = kill_chain(study_job, study_result, folder, kills, seed, 60)
    elif what == "tuning":
        import_what_it_imports(lambda: tuning_job(folder / "warm"), folder / "modules")
        answer["kills"] = kill_chain(tuning_job, lambda out: (out / "tables.txt").read_text(), folder, kills, seed, 12)
    if what == "run":
        answer["full"] = []
        for n_bytes in (9000,) if kills < 30 else (100, 700, 1500, 3000, 9000, 20000, 30000):
            out = folder / f"full {n_bytes}"
            code, words = heard(lambda out=out, n_bytes=n_bytes: (limited(n_bytes), run(out)))
            broken, again = broken_files(out), ended(forked(lambda out=out: run(out)))
            answer["full"].append(
                {
                    "limit": n_bytes,
                    "code": code,
                    "said": words,
                    "broken": broken,
                    "again": again == 0 and tables(out) == expected,
                }
            )
        answer["two"] = []
        for i in range(1 if kills < 30 else 8):
            out = folder / f"two {i}"
            work = lambda out=out: run(out)
            first = forked(work)
            wait_until(
                lambda out=out, n=2 * i: (
                    (out / "settings.json").exists() and sum(1 for _ in out.rglob("*.safetensors")) >= n
                )
            )
            os.kill(first, signal.SIGSTOP)  # however fast it is, the second comes while it is at work
            refused, said = heard(work)
            os.kill(first, signal.SIGCONT)
            answer["two"].append(
                {
                    "codes": [refused, ended(first), ended(forked(work))],
                    "said": said,
                    "broken": broken_files(out),
                    "same": tables(out) == expected,
                }
            )
        os.environ["LLMFACT_CACHE"] = str(folder / "cache")
        RESOURCES["toy"] = toy()

        def slowly(package, version, place):
            time.sleep(0.1)
            return downloaded(package, version, place)

        codes = [ended(p) for p in [forked(lambda: fetch("toy", download=slowly)) for _ in range(4)]]
        left = sorted(str(p.relative_to(folder / "cache")) for p in (folder / "cache").rglob("*") if p.is_file())
        answer["fetch"] = {
            "codes": codes,
            "whole": fetch("toy", download=unreachable).read_bytes() == CONTENT,
            "left": left,
        }
        pid = forked(lambda: hold_for(folder / "held"))
        wait_until((folder / "held" / "ready").exists)
        answer["held"] = [ended(forked(lambda: hold_for(folder / "held", 0)))]
        os.kill(pid, signal.SIGKILL)
        ended(pid)
        answer["held"].append(ended(forked(lambda: hold_for(folder / "held", 0))))
    print(json.dumps(answer), flush=True)


def hold_for(folder: Path, seconds: float = 60) -> None:
    with hold(folder):
        write_text(folder / "ready", "")
        time.sleep(seconds)


def in_a_nursery(world, folder, what, kills, seed=0) -> dict:
    code = f"import test_faults as t; t.nursery({str(world)!r}, {str(folder)!r}, {what!r}, {kills}, {seed})"
    settings = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "Agg",
        "PYTHONWARNINGS": "ignore",
    }
    settings["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # the other one keeps a thread
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | settings)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"stderr": done.stderr[-3000:]}


@pytest.fixture(scope="module")
def trials(world, tmp_path_factory):
    return in_a_nursery(world, tmp_path_factory.mktemp("trials"), "run", 5)


def survived(trials, kills):
    found = trials["kills"]
    assert not found["wrong"], (found, trials["stderr"])
    assert found["killed"] >= kills and found["finished"] >= 1, found


@pytest.mark.extra
def test_five_kills(trials):
    survived(trials, 5)


def wrote_whole_or_not_at_all(trials):
    for trial in trials["full"]:
        assert trial["again"] and not trial["broken"], trial
        if trial["code"]:
            assert trial["code"] == 3, trial
    assert {t["code"] for t in trials["full"] if t["limit"] < 10_000} == {3}, "the limit was felt"


@pytest.mark.extra
def test_a_disk_that_is_full_in_the_middle_of_a_file(trials):
    wrote_whole_or_not_at_all(trials)


@pytest.mark.extra
def test_two_processes_in_one_folder(trials):
    "The second is refused while the first is at work, who never notices; afterwards the folder takes another."
    for trial in trials["two"]:
        assert trial["codes"] == [5, 0, 0], (trial, trials["stderr"])
        assert trial["same"] and not trial["broken"], trial


@pytest.mark.extra
def test_four_processes_fetch_one_file(trials):
    assert trials["fetch"] == {"codes": [0, 0, 0, 0], "whole": True, "left": ["files/toy/toy-1.0.whl"]}


@pytest.mark.extra
def test_a_hold_ends_with_its_process(trials):
    assert trials["held"] == [5, 0], "refused while the other lives, free when it is killed"


@pytest.mark.slow
@pytest.mark.parametrize("what, kills", [("run", 30), ("run with its page", 30), ("study", 30), ("tuning", 30)])
def test_thirty_kills(what, kills, world, tmp_path):
    trials = in_a_nursery(world, tmp_path, what, kills, seed=1)
    survived(trials, kills)
    if what == "run":
        wrote_whole_or_not_at_all(trials)
        test_two_processes_in_one_folder(trials)
