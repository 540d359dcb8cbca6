"""Pins what happens with files and names made to do harm: every damaged or invented file is refused with an error that
names it, no header makes the memory grow, no name leads out of its folder, no text becomes markup, no file brings
code.

The files are mutated from whole ones with fixed seeds: bytes flipped, cut, inserted; headers and JSON rewritten so
that they are still well formed; cells of tables exchanged. `python -m pytest -k fuzz` prints the reader and the
number of the case that fails."""

import ast
import contextlib
import copy
import functools
import html.parser
import json
import os
import random
import resource
import shutil
import struct
import warnings
from pathlib import Path

import families
import numpy as np
import pandas as pd
import pytest
import torch
from small_runs import small_run, small_world

import llmfact_nb
from llmfact_nb.command import checks
from llmfact_nb.command import run as run_module
from llmfact_nb.command.checks import content_mark
from llmfact_nb.activations import Activations
from llmfact_nb.evaluate import EvalSet
from llmfact_nb.ablation import Found, Intervention, ScoreCache, ablation_study, loss_on, measure
from llmfact_nb.base.files import ClaimError, check_claim, claim, remember, file_name, load_tensors, save_tensors
from llmfact_nb.base.identity import model_fingerprint
from llmfact_nb.finetune import NeuronTuningConfig, get_neuron_model, merge_and_unload
from llmfact_nb.masked_model import MaskedModel
from llmfact_nb.masks import NeuronMask
from llmfact_nb.show.network_page import write_network_page
from llmfact_nb.networks import FunctionalNetworks, Threshold
from llmfact_nb.tuning.pruning import load_pruned, prune, save_pruned
from llmfact_nb.show.report import write_report
from llmfact_nb.base.models import load_model
from llmfact_nb.base.texts import load_texts
from llmfact_nb.command.run import read_run
from llmfact_nb.tuning.sharing import load_neurons, save_neurons
from llmfact_nb.tuning.tasks import TuningTask
from llmfact_nb.tuning.tables import TuningResults, read_tuning
from llmfact_nb.study.whole import read_study

pytest_plugins = ["browser"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:FastICA has not converged"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
DEFAULT, SLOW = 125, 390  # cases of each reader, in `make test` and beyond
DEAR = {
    "run folder": 40,
    "study folder": 30,
    "tuning folder": 30,
}  # readers of which `make test` has fewer, because pandas takes its time
WIDTHS = (24, 24, 24)


# what is read


def mask_file(folder):
    NeuronMask.from_flat(np.arange(72) % 5 == 0, WIDTHS, "mlp_hidden").save(folder / "m.safetensors")
    return lambda: NeuronMask.load(folder / "m.safetensors").counts


def activations_file(folder):
    made_activations().save(folder / "a.safetensors")

    def read():
        acts = Activations.load(folder / "a.safetensors")
        return acts.layer(acts.depths[-1]).float().sum(), repr(acts)

    return read


def made_activations():
    n, g = torch.arange(120), torch.Generator().manual_seed(0)
    values = torch.randn(120, 72, generator=g) ** 3
    return Activations(values, n // 40, n % 40, n % 48, n % 40 == 0, WIDTHS, (0, 1, 2), "mlp_hidden", "tiny", 0)


_FITTED: list = []


def made_networks():
    if not _FITTED:
        _FITTED.append(FunctionalNetworks(3, standardize=True, exclude="sinks").fit(made_activations()))
    return _FITTED[0]


def networks_file(folder):
    made_networks().save(folder / "n.safetensors")

    def read():
        found = FunctionalNetworks.load(folder / "n.safetensors")
        return found.masks(2.0), found.key_neurons(fraction=0.1), found.alternative("pca").maps_, repr(found)

    return read


def found_folder(folder):
    mean, variance = made_activations().moments()
    scores = {"Wanda score": variance.clone()}
    found = Found(made_networks(), mean, variance, Threshold(fraction=0.1), scores, {"tokens": 120})
    found.save(folder / "c")
    return lambda: Found.load(folder / "c").key


def neurons_file(folder):
    model = get_neuron_model(
        families.build("llama"),
        NeuronTuningConfig("selected", NeuronMask.from_flat(np.arange(72) % 9 == 0, WIDTHS, "mlp_hidden")),
        verbose=False,
    )
    save_neurons(model, folder / "t.safetensors")
    base = families.build("llama")

    def read():
        merge_and_unload(load_neurons(base, folder / "t.safetensors", verbose=False))
        base.__dict__.pop("neuron_tuning", None)

    return read


TOKENIZER = families.tokenizer()
TEXTS = [families.words(n, seed) for seed, n in enumerate((12, 20))]


def scores_folder(folder):
    words = loss_on("words", EvalSet(TOKENIZER, TEXTS))
    cache = ScoreCache(families.build("llama"), folder / "scores", progress=False)
    cache.scores(None, words)
    key = cache.key(None, words)

    def read():
        cache.known.clear()
        return cache.kept(key).mean("nats")

    return read


def run_folder(folder):
    shutil.copytree(_RUN[0], folder / "run", ignore=shutil.ignore_patterns("scores", "figures", "*.html", ".*"))
    return lambda: read_run(folder / "run").summary()


def claimed_folder(folder):
    identity = {"model": "tiny", "texts": "wiki", "n_components": 3, "conditions": [["mean", "after-first"]]}
    with claim(folder / "run", "run", identity) as place:
        (place / "facts.json").write_text("{}")
    for path in place.iterdir():
        path.chmod(0o600 if path.name == "claim.json" else 0o400)
    return lambda: check_claim(folder / "run", "run", identity)


def study_folder(folder):
    cache = ScoreCache(families.build("llama"), progress=False)
    table = measure(cache, [], [loss_on("words", EvalSet(TOKENIZER, TEXTS))], "union")
    (folder / "tables").mkdir()
    for name in ("union", "random-share"):
        table.to_csv(folder / "tables" / f"{name}.csv", index=False)
    (folder / "study.json").write_text(json.dumps({"settings": {"find": {"model": "tiny"}, "quick": False}}))
    return lambda: read_study(folder)


def tuning_folder(folder):
    import tuning_task as t

    if not _TUNED:
        _TUNED.append(
            t.study(arms=("key",), seeds=(0,), steps=4, eval_every=2, sweep_steps=2, lrs={a: (1e-3,) for a in t.ARMS})
        )
    _TUNED[0].save(folder / "tuned")
    assert isinstance(_TUNED[0], TuningResults)
    return lambda: repr(read_tuning(folder / "tuned"))


_TUNED: list = []
_RUN: list = []


def pruned_folder(folder):
    mask = NeuronMask.from_flat(np.arange(72) % 5 == 0, WIDTHS, "mlp_hidden")
    model = families.build("llama")
    prune(model, mask)
    save_pruned(model, folder / "pruned")
    for path in (folder / "pruned").iterdir():
        if path.name != "pruning.json":
            path.chmod(0o400)
    return lambda: load_pruned(folder / "pruned").config.model_type


def jsonl_file(folder):
    (folder / "t.jsonl").write_text(
        "\n".join(json.dumps({"title": f"t{i}", "text": "words é " * 5}) for i in range(12))
    )
    return lambda: load_texts(folder / "t.jsonl", "fit")["text"]


def csv_file(folder):
    pd.DataFrame({"title": [f"t{i}" for i in range(12)], "text": ["some, words"] * 12}).to_csv(
        folder / "t.csv", index=False
    )
    return lambda: load_texts(folder / "t.csv", "fit")["text"]


def txt_file(folder):
    (folder / "t.txt").write_text("\n\n".join(f"paragraph {i}" for i in range(12)))
    return lambda: load_texts(folder / "t.txt", "fit")["text"]


def whitened_file(folder):
    acts, nets = made_activations(), FunctionalNetworks(3)
    nets.fit(acts, path=folder / "w.safetensors")
    return lambda: nets.fit(acts, path=folder / "w.safetensors").maps_


def model_folder(folder):
    shutil.copytree(_RUN[0].parent / "model", folder / "model")
    return lambda: load_model(folder / "model")[0].config.model_type


READERS = {f.__name__.replace("_", " "): f for f in (
    mask_file, activations_file, networks_file, found_folder, neurons_file, scores_folder,
    run_folder, claimed_folder, study_folder, tuning_folder, pruned_folder, jsonl_file, csv_file, txt_file,
    whitened_file,
)}  # fmt: skip


# how it is damaged

ODD = [
    None,
    True,
    False,
    -1,
    0,
    1,
    3.5,
    1e308,
    2**70,
    10**18,
    "",
    "x",
    "../../x",
    "a\0b",
    "<b>",
    "\ud800",
    "nan",
    [],
    {},
    [[]],
    [1, 2],
    ["x"],
    {"a": 1},
    [None] * 3,
]


def odd_bytes(rng, data: bytes) -> bytes:
    data, how = bytearray(data), rng.randrange(8)
    at = rng.randrange(len(data) + 1)
    if how == 0:
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == 1:
        del data[at:]
    elif how == 2:
        data[at:at] = rng.randbytes(rng.randint(1, 40))
    elif how == 3:
        del data[at : at + rng.randint(1, 60)]
    elif how == 4:
        data[at : at + 16] = b"\xff" * len(data[at : at + 16])
    elif how == 5:
        data = data[at:] + data[:at]
    elif how == 6:
        data[:8] = struct.pack(
            "<Q", rng.choice([0, 1, 7, 2**20, 10**8, 2**32, 2**63, 2**64 - 1, len(data), len(data) - 8])
        )
    else:
        data[at : at + 1] = rng.choice([b"\0", b'"', b"{", b"[" * 5000, b"\n", b",", b"\xed\xa0\x80"])
    return bytes(data)


def odd_json(rng, content):
    "The content with one place exchanged, removed, doubled or swapped with another."
    content, places = copy.deepcopy(content), []

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    if isinstance(content, (dict, list)):
        walk(content)
    if not places or rng.random() < 0.05:
        return rng.choice(ODD)
    how, (node, key) = rng.randrange(6), rng.choice(places)
    if how == 0:
        del node[key]
    elif how == 1:
        other, at = rng.choice(places)
        node[key] = copy.deepcopy(other[at])
    elif how == 2 and isinstance(node[key], str):
        node[key] = node[key][::-1]
    elif how == 3 and isinstance(node, dict):
        node[rng.choice(["x", "__class__", "fit", "maps_", "kind", "../x", "0"])] = rng.choice(ODD)
    else:
        node[key] = rng.choice(ODD)
    return content


def odd_tensors(rng, data: bytes) -> bytes:
    "A tensor file whose header is well formed and untrue."
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    entries = [k for k in header if k != "__metadata__"]
    name, how = rng.choice(entries), rng.randrange(9)
    if how == 0:
        header[name]["dtype"] = rng.choice(
            ["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "U64", "X9", ""]
        )
    elif how == 1:
        header[name]["shape"] = rng.choice(
            [
                [],
                [0],
                [-1],
                [2**40],
                [2**62, 4],
                [1, *header[name]["shape"]],
                header[name]["shape"][::-1],
                [2**31, 0],
                "x",
                [1.5],
            ]
        )
    elif how == 2:
        header[name]["data_offsets"] = rng.choice(
            [[0, 0], [0, 2**50], [8, 4], [-8, 8], [2**63, 2**63], [0, len(body)], "x"]
        )
    elif how == 3:
        other = rng.choice(entries)
        header[name], header[other] = header[other], header[name]
    elif how == 4:
        header[rng.choice(["x", "../x", "mean", "values"])] = header.pop(name)
    elif how == 5:
        start, end = header[name]["data_offsets"]
        body = (
            body[:start] + (rng.choice([b"\xff", b"\0", b"\x7f", b"\x01"]) * (end - start)) + body[end:]
        )  # nan, zero, large, odd booleans
    elif rng.random() < 0.8 and "llmfact_nb" in header["__metadata__"]:  # a well-formed description that is untrue
        header["__metadata__"]["llmfact_nb"] = json.dumps(
            odd_json(rng, json.loads(header["__metadata__"]["llmfact_nb"]))
        )
    else:
        header["__metadata__"] = odd_json(rng, header["__metadata__"])
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def odd_table(rng, text: str) -> str:
    lines = [line.split(",") for line in text.splitlines()]
    row, how = rng.randrange(len(lines)), rng.randrange(6)
    column = rng.randrange(len(lines[row]))
    if how == 0:
        lines[row][column] = str(
            rng.choice(["", "x", "nan", "1e999", "-1", "9" * 400, '"', "\0", "<b>", "é", "0x10", "True"])
        )
    elif how == 1:
        for line in lines:
            del line[column : column + 1]
    elif how == 2:
        del lines[row]
    elif how == 3:
        lines[row] *= 2
    elif how == 4:
        lines[0][column % len(lines[0])] = lines[0][0]
    else:
        lines = lines[:1] * rng.randint(0, 2)
    return "\n".join(",".join(line) for line in lines)


def damage(rng, path: Path) -> None:
    "Write something else in place of a file's content."
    data, plain = path.read_bytes(), rng.random() < 0.4
    if path.suffix == ".safetensors" and not plain:
        new = odd_tensors(rng, data)
    elif path.suffix == ".json" and not plain:
        new = json.dumps(odd_json(rng, json.loads(data))).encode()
    elif path.suffix == ".jsonl" and not plain:
        lines = data.decode().splitlines()
        i = rng.randrange(len(lines))
        lines[i] = json.dumps(odd_json(rng, json.loads(lines[i])))
        new = "\n".join(lines).encode()
    elif path.suffix == ".csv" and not plain:
        new = odd_table(rng, data.decode()).encode()
    else:
        new = odd_bytes(rng, data)
    path.write_bytes(new)


@contextlib.contextmanager
def little_memory(n_bytes: int = 2 * 10**9):
    "Inside the block no more than so much memory can be had beyond what is in use: what asks for a terabyte fails."
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except FileNotFoundError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    "A small run and, beside it, its model."
    world = small_world(tmp_path_factory.mktemp("world"))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(run_module, "publish", lambda run: None)
        small_run(world, world / "run")
    _RUN[:] = [world / "run"]
    return world / "run"


def fuzz(make, folder: Path, n: int, seed: str, accepted=(ValueError, OSError)) -> dict[str, int]:
    """Damage one of a reader's files n times; return how often it was read all the same, and how often refused.
    Anything but a refusal that names the file or its folder is a failure."""
    read, counts, wrong = make(folder), {"read": 0, "refused": 0}, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read()
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_mode & 0o200)
    whole = {p: p.read_bytes() for p in files}
    with little_memory():
        for case in range(n):
            rng = random.Random(f"{seed} {case}")
            path = rng.choice(files)
            damage(rng, path)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    read()
                counts["read"] += 1
            except accepted as e:
                counts["refused"] += 1
                if str(folder) not in str(e):
                    wrong.append(f"case {case} of {seed}: {type(e).__name__} does not name {path.name}: {e}")
            except Exception as e:
                wrong.append(f"case {case} of {seed}, {path.name}: {type(e).__name__}: {e}")
            for p, data in whole.items():
                if not p.exists() or p.read_bytes() != data:
                    p.write_bytes(data)
    assert not wrong, "\n".join([f"{len(wrong)} of {n}", *wrong[:12]])
    assert sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_mode & 0o200) == files, (
        "nothing else was written"
    )
    return counts


@pytest.mark.parametrize("name", READERS)
def test_fuzzed_files_are_refused_by_name(name, request, tmp_path):
    if name == "run folder":
        request.getfixturevalue("finished_run")
    n = DEAR.get(name, DEFAULT)
    counts = fuzz(READERS[name], tmp_path, n, name)
    assert counts["refused"] > 0.1 * n or name == "txt file", counts  # any UTF-8 is text
    assert sum(counts.values()) == n


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_more_fuzzed_files(name, request, tmp_path):
    if name == "run folder":
        request.getfixturevalue("finished_run")
    assert sum(fuzz(READERS[name], tmp_path, SLOW, f"{name}, more").values()) == SLOW


@pytest.mark.slow
def test_fuzzed_model_folders(finished_run, tmp_path):
    """Configuration, weights and tokenizer are read by other libraries; what they throw comes out as a refusal that
    names the model."""
    assert fuzz(model_folder, tmp_path, 300, "model folder")["refused"] > 100


CHECKED = [
    "mask file",
    "networks file",
    "found folder",
    "neurons file",
    "scores folder",
    "whitened file",
]  # what save_tensors writes


def tensor_parts(folder: Path) -> dict[Path, tuple[bytes, int]]:
    "The content of each tensor file, and where its tensors begin."
    files = {p: p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}
    return {p: (data, 8 + struct.unpack("<Q", data[:8])[0]) for p, data in files.items()}


@pytest.mark.parametrize("name", CHECKED)
def test_a_flipped_bit_of_a_tensor_is_refused(name, tmp_path):
    "A number that has become another number looks like any other; only the checksum knows."
    read, rng = READERS[name](tmp_path), random.Random(name)
    parts = tensor_parts(tmp_path)
    assert parts
    for path, (data, start) in parts.items():
        for at in {start, len(data) - 1, *(rng.randrange(start, len(data)) for _ in range(30))}:
            damaged = bytearray(data)
            damaged[at] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(ValueError):
                read()
        path.write_bytes(data)
    read()


def test_there_are_enough_cases():
    quick = sum(DEAR.get(name, DEFAULT) for name in READERS)
    assert quick >= 1500 and quick + SLOW * len(READERS) + 300 >= 5000


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_model_folder_is_named(file, finished_run, tmp_path):
    model_folder(tmp_path)
    whole = (tmp_path / "model" / file).read_bytes()
    for new in (whole[: len(whole) // 2], whole[:8] + b"\0" * (len(whole) - 8), b"{}"):
        (tmp_path / "model" / file).write_bytes(new)
        with pytest.raises((ValueError, OSError)):
            load_model(tmp_path / "model")


# sizes


@pytest.mark.parametrize("entry", [
    {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]},
    {"dtype": "BOOL", "shape": [2**62, 4], "data_offsets": [0, 0]},
    {"dtype": "BOOL", "shape": [10**12], "data_offsets": [0, 72]},
    {"dtype": "BOOL", "shape": [2**32, 2**32], "data_offsets": [0, 72]},
])  # fmt: skip
def test_absurd_sizes_take_no_memory(entry, tmp_path):
    "Headers that promise terabytes; a width list that promises them too."
    path = tmp_path / "m.safetensors"
    about = {"kind": "mask", "format": 1, "widths": [10**12], "site": None, "depths": [0]}
    text = json.dumps({"__metadata__": {"llmfact_nb": json.dumps(about)}, "flat": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(72))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with little_memory(10**9):
        for read in (NeuronMask.load, Activations.load, FunctionalNetworks.load):
            with pytest.raises(ValueError):
                read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "kilobytes"


def networks_with(folder, tensors=(), **facts) -> Path:
    "A file of networks in which something is exchanged."
    made_networks().save(folder / "n.safetensors")
    kept, meta = load_tensors(folder / "n.safetensors", "networks")
    about = {"settings": meta["settings"], "learned": meta["learned"] | facts}
    return save_tensors(folder / "n.safetensors", kept | dict(tensors), "networks", about)


def test_widths_that_promise_terabytes_take_no_memory(tmp_path):
    layout = {"widths": [10**13, 72 - 10**13], "depths": [0, 1], "site": "mlp_hidden"}
    path = networks_with(tmp_path, layout=layout)
    with little_memory(10**9), pytest.raises(ValueError):
        FunctionalNetworks.load(path)


def test_networks_with_nan_are_refused(tmp_path):
    nets = copy.copy(made_networks())
    nets.mixing_ = nets.mixing_.clone()
    nets.mixing_[0, 0] = float("nan")
    nets.save(tmp_path / "n.safetensors")
    with pytest.raises(ValueError):
        FunctionalNetworks.load(tmp_path / "n.safetensors")


def test_a_file_cannot_exchange_methods(tmp_path):
    "What stands beside the learned numbers is not taken over into the object."
    path = networks_with(tmp_path, {"fit": torch.ones(1)}, masks="gone", __class__="x")
    found = FunctionalNetworks.load(path)
    assert len(found.masks(2.0)) == 3 and callable(found.fit)


# names

NAMES = [
    "../outside",
    "../../outside",
    "a/../../outside",
    "/outside",
    "..",
    ".",
    "a/b",
    "y" * 400,
    "a\0b",
    "~/x",
    "C:\\x",
    "con",
    "",
    "\u202e",
    "-rf",
    "*",
]


def outside(folder: Path, inside: Path) -> list[str]:
    return [
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if p != inside and inside not in p.parents and p not in inside.parents
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_an_arm_stays_in_its_folder(name, tmp_path):
    inside = tmp_path / "a" / "b" / "arms"
    name = f"{tmp_path}{name}" if name.startswith("/") else name
    arms = [Intervention(name, NeuronMask.from_flat(np.arange(72) == 1, WIDTHS, "mlp_hidden"))]
    with contextlib.suppress(ValueError, OSError):
        ablation_study(families.build("llama"), EvalSet(TOKENIZER, TEXTS), arms, folder=inside, progress=False)
    assert not outside(tmp_path, inside)


def test_a_name_of_a_task_is_that_of_a_folder():
    refused = [n for n in NAMES if file_name(n) != n]
    assert {"../outside", "/outside", "..", "a\0b", ""} <= set(refused)
    for name in refused:
        with pytest.raises(ValueError):
            TuningTask(name, [], [], [], [])
    assert TuningTask("reviews of films, 2026", [], [], [], []).name == "reviews of films, 2026"


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_a_network_is_only_a_name(name, tmp_path):
    mask = NeuronMask.from_flat(np.arange(72) % 9 == 0, WIDTHS, "mlp_hidden")
    model = get_neuron_model(families.build("llama"), NeuronTuningConfig("selected", {name: mask}), verbose=False)
    path = tmp_path / "a" / "b" / "neurons.safetensors"
    save_neurons(model, path)
    loaded = load_neurons(families.build("llama"), path, verbose=False)
    assert list(loaded.neuron_tuning.networks) == [name] and not outside(tmp_path, path)


def test_archives_are_read_by_name_and_never_unpacked():
    "No part of the package unpacks an archive into a folder, where its members' names could lead elsewhere."
    assert not [c for c in calls() if c[1].rpartition(".")[2] in ("extractall", "unpack_archive", "extract")]


# markup

EVIL = [
    "<script>window.pwned = 1</script>",
    "</script><script>window.pwned = 2</script>",
    "<img src=x onerror='window.pwned = 3'>",
    '"><svg onload=window.pwned=4>',
    "</title><script>window.pwned = 5</script>",
    "<!--<script>",
    "]]>",
    "\u2028window.pwned=6//",
    "javascript:window.pwned=7",
    "</textarea></style><script>window.pwned = 8</script>",
    "&lt;script&gt;",
    "${window.pwned=9}",
    "\\u003cscript\\u003e",
    "{{7*7}}",
    "\u202ewned",
]


class Tags(html.parser.HTMLParser):
    "The elements of a page with the names of their attributes."

    def __init__(self, text: str):
        super().__init__()
        self.seen: list = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, sorted(name for name, _ in attributes)))
        for name, value in attributes:
            assert not name.startswith("on") and not (value or "").strip().lower().startswith("javascript:"), (
                tag,
                name,
                value,
            )


def evil_report(path: Path, words) -> Path:
    rows = [
        {"condition": w, "replace": w, "positions": w, "arm": w, "seed": None, "units": 3,
         "share": 0.1, "value": 3.0, "damage": 0.5, "ci_low": 0.4, "ci_high": 0.6, "perplexity": 20.0,
         "above_vocabulary": False, "counts": w}
        for w in words
    ]  # fmt: skip
    networks = pd.DataFrame({"network": range(len(words)), words[0]: words})
    return write_report(
        path, f"Networks of {words[0]}", words, rows, facts={w: {w: [w, {w: w}]} for w in words}, networks=networks
    )


class Vocabulary:
    "A tokenizer that knows these words."

    def __init__(self, words):
        self.words = words

    def decode(self, ids):
        return "".join(self.words[i % len(self.words)] for i in ids)


def evil_page(path: Path, words) -> Path:
    values, where = torch.randn(60, sum(WIDTHS), generator=torch.Generator().manual_seed(0)) ** 3, torch.arange(60)
    about = (torch.zeros(60, dtype=torch.bool), WIDTHS, (0, 1, 2), "mlp_hidden", words[0])
    acts = Activations(values, where // 30, where % 30, where, *about)
    return write_network_page(FunctionalNetworks(3).fit(acts), path, acts, Vocabulary(words), title=words[1])


@pytest.mark.parametrize("write", [evil_report, evil_page])
def test_text_never_becomes_markup(write, tmp_path):
    "A page with hostile words has the elements of one with harmless words, no more."
    harmless = [f"word{chr(97 + i)}" for i in range(len(EVIL))]
    theirs, ours = (Tags(write(tmp_path / f"{i}.html", w).read_text()) for i, w in enumerate((EVIL, harmless)))
    assert theirs.seen == ours.seen and len(ours.seen) > 50
    assert len([t for t, _ in theirs.seen if t == "script"]) == (
        0 if write is evil_report else len([t for t, _ in ours.seen if t == "script"])
    )


@pytest.mark.parametrize("write", [evil_report, evil_page])
def test_hostile_pages_in_the_browser(write, tmp_path, browser_page):
    "Opened, and every button pressed: nothing of the words runs, nothing is fetched, nothing is complained of."
    page = browser_page(write(tmp_path / "evil.html", EVIL))
    for thing in page.locator("summary, button:visible").all()[:30]:
        thing.click(timeout=2000)
    assert page.evaluate("window.pwned") is None
    assert (
        page.evaluate(
            "[...document.querySelectorAll('*')].flatMap(e => [...e.attributes])"
            ".filter(a => a.name.startsWith('on')).length"
        )
        == 0
    )
    assert page.evaluate("[...document.images].filter(i => !i.src.startsWith('data:')).length") == 0


@pytest.mark.parametrize("word", EVIL)
def test_what_notebooks_show_is_escaped(word):
    acts = Activations(
        *(getattr(made_activations(), k) for k in ("values", "text_ids", "positions", "token_ids", "sinks")),
        WIDTHS,
        (0, 1, 2),
        "mlp_hidden",
        word,
        0,
    )
    nets = copy.copy(made_networks())
    nets.model = word
    mask = NeuronMask.from_flat(np.arange(72) == 1, WIDTHS, [word, "b"])
    for thing in (acts, nets, mask):
        assert not [
            t
            for t in Tags(thing._repr_html_()).seen
            if t[0] in ("script", "img", "iframe", "object") and word.startswith("<")
        ], word


# code

FORBIDDEN = {"pickle", "cPickle", "_pickle", "dill", "marshal", "shelve", "cloudpickle", "jsonpickle"}
MODULES = sorted(Path(llmfact_nb.__file__).parent.rglob("*.py"))


@functools.cache
def nodes() -> list[tuple[str, ast.AST]]:
    return [
        (path.name, node)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Call, ast.Import, ast.ImportFrom))
    ]


@functools.cache
def calls() -> list[tuple[str, str, set]]:
    "(module, dotted name, keyword arguments that are literally True) of every call in the package."
    return [
        (
            module,
            ast.unparse(node.func),
            {k.arg for k in node.keywords if isinstance(k.value, ast.Constant) and k.value.value is True},
        )
        for module, node in nodes()
        if isinstance(node, ast.Call)
    ]


def test_nothing_is_ever_unpickled():
    for module, node in nodes():
        if isinstance(node, ast.Import):
            assert not {a.name.partition(".")[0] for a in node.names} & FORBIDDEN, module
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in FORBIDDEN, module
    found = calls()
    assert len(found) > 3000, "the package was read"
    for module, name, true in found:
        assert name not in (
            "torch.load",
            "torch.save",
            "joblib.load",
            "joblib.dump",
            "joblib.Memory",
            "np.save",
            "np.savez",
            "eval",
            "exec",
            "compile",
            "__import__",
            "os.system",
            "os.popen",
            "yaml.load",
            "pd.read_pickle",
        ), (module, name)
        assert not true & {"allow_pickle", "trust_remote_code", "shell"}, (module, name)
        assert not name.endswith(("np.load", "numpy.load", "read_pickle", "to_pickle")), (module, name)


class Trap:
    "Writes a file when it is unpickled."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickled_checkpoint_runs_nothing(finished_run, tmp_path):
    import pickle

    model_folder(tmp_path)
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises((ValueError, OSError)):
        load_model(tmp_path / "model")
    for read in (NeuronMask.load, Activations.load, FunctionalNetworks.load):
        with pytest.raises(ValueError):
            read(tmp_path / "model" / "pytorch_model.bin")
    assert not (tmp_path / "sprung").exists()
    pickle.loads((tmp_path / "model" / "pytorch_model.bin").read_bytes()).close()
    assert (tmp_path / "sprung").exists(), "the trap works"


def test_code_beside_a_checkpoint_runs_only_when_the_user_says_so(finished_run, tmp_path, monkeypatch):
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model_folder(tmp_path)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {
        "model_type": "of-their-own",
        "auto_map": {"AutoConfig": "theirs.TheirConfig", "AutoModelForCausalLM": "theirs.TheirModel"},
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "theirs.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w').close()\n")
    with pytest.raises(ValueError):
        load_model(tmp_path / "model")
    assert not (tmp_path / "sprung").exists()
    with pytest.raises((ValueError, OSError)):
        load_model(tmp_path / "model", trust_remote_code=True)
    assert (tmp_path / "sprung").exists(), "said so, it runs"


# a model that is no longer the same


def test_every_byte_of_a_large_file_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMFACT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "weights.safetensors"
    with open(file, "wb") as f:
        f.truncate(2**26 + 5_000_000)
    marks, stat = [content_mark(tmp_path / "model")], file.stat()
    for at in (0, 2**20 + 77, 2**25 + 3, 2**26 + 4_999_999):
        with open(file, "rb+") as f:
            f.seek(at)
            f.write(b"x")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # even if the clock says nothing
        marks.append(content_mark(tmp_path / "model"))
    assert len(set(marks)) == 5
    os.utime(file)
    assert content_mark(tmp_path / "model") == marks[-1], "the time decides nothing"
    with monkeypatch.context() as m:
        m.setattr(checks, "sha256_of", lambda path: pytest.fail("remembered"))
        assert content_mark(tmp_path / "model") == marks[-1]
    for kept in (tmp_path / "cache" / "checksums").iterdir():
        kept.write_text("{}")
    assert content_mark(tmp_path / "model") == marks[-1], "a damaged memory is none"


def test_a_run_does_not_go_on_with_another_model(tmp_path, monkeypatch):
    world = small_world(tmp_path)
    monkeypatch.setattr(run_module, "publish", lambda run: None)
    monkeypatch.setattr(run_module, "named_content", str)  # as for a name of the hub
    small_run(world, world / "run")
    scores = sorted((world / "run" / "parts" / "scores").glob("*.safetensors"))
    scores[0].unlink()
    kept = {p: p.read_bytes() for p in scores[1:]}
    original = families.build("llama")
    families.shake(original, 3)
    original.save_pretrained(world / "model")
    with pytest.raises(ClaimError) as e:
        small_run(world, world / "run")
    assert str(world / "model") in str(e.value) and any("weights" in name for name in e.value.differences)
    assert {p: p.read_bytes() for p in scores[1:]} == kept and not scores[0].exists()


@pytest.mark.parametrize("how", [claim, remember])
def test_a_refused_claim_leaves_nothing_behind(how, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ClaimError):
        with contextlib.ExitStack() as stack:
            held = how(tmp_path, "run", {"a": 1})
            stack.enter_context(held)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_scores_are_refused_while_the_model_is_masked(tmp_path):
    model, words = families.build("llama"), loss_on("words", EvalSet(TOKENIZER, TEXTS))
    mask = NeuronMask.from_flat(np.arange(72) % 2 == 0, WIDTHS, "mlp_hidden")
    cache = ScoreCache(model, tmp_path, progress=False)
    for block in (
        MaskedModel(model).ablate(mask),
        MaskedModel(model).keep(mask),
        MaskedModel(model).amplify(mask, 2.0),
    ):
        with block:
            with pytest.raises(ValueError):
                cache.scores(None, words)
            with pytest.raises(ValueError):
                ScoreCache(model, tmp_path, progress=False)
    assert not list(tmp_path.iterdir()) and cache.scores(None, words).mean("nats") > 0
    with MaskedModel(model).ablate(mask), pytest.raises(ValueError):
        cache.scores(None, words)


def test_adapters_that_are_switched_off_make_another_model():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(families.build("llama"), peft.LoraConfig(target_modules=["down_proj"]))
    on = model_fingerprint(model)
    with model.disable_adapter():
        assert model_fingerprint(model) != on
    assert model_fingerprint(model) == on and "adapters" not in model_fingerprint(families.build("llama"))
    model.add_adapter("second", peft.LoraConfig(target_modules=["down_proj"]))
    first = model_fingerprint(model)
    model.set_adapter("second")
    assert model_fingerprint(model) != first
