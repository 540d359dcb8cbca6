"""Pins `verify`: an untouched run is confirmed to the digit and not written to; every exchanged file and every changed
number is found and named; other versions are reported and are no fault; folders that are no run are refused;
manifests say enough and not too much."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import families
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from small_runs import N_ARMS, SMALL, small_run, small_world, study_job, study_texts

from llmfact_nb import ablation
from llmfact_nb.command import run as run_module
from llmfact_nb.base.arguments import ArgumentError
from llmfact_nb.base.downloads import sha256_of
from llmfact_nb.base.files import HEADER, save_tensors, write_json
from llmfact_nb.base.models import load_model
from llmfact_nb.command.verification import Check, compared, disagreements, verifiable, verification_report
from llmfact_nb.command.verification import verify_folder as verify

pytestmark = pytest.mark.filterwarnings("ignore:FastICA has not converged")
N_ROWS = N_ARMS


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(run_module, "publish", lambda run: None)
        small_run(world, out)
    return out


@pytest.fixture
def copied(finished, tmp_path):
    "A run to be tampered with."
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def verdicts(table) -> dict[str, str]:
    return dict(zip(table.what, table.verdict))


def test_an_untouched_run_is_confirmed(finished):
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in finished.rglob("*")}
    table = verify(finished, sample=N_ROWS)
    assert list(table.columns) == list(Check._fields) and not len(disagreements(table)), verification_report(table)
    losses = table[table.part == "losses"]
    assert 1 < len(losses) <= N_ROWS and (losses.difference == 0).all(), "the same machine: the same to the last bit"
    results = pd.read_csv(finished / "results.csv")
    assert losses.here.iloc[0] == pytest.approx(results.value[0], abs=1e-12)
    assert {"table", "model", "texts", "losses", "environment"} <= set(table.part)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in finished.rglob("*")} == before, "nothing is written"
    assert all(what in verification_report(table) for what in table[table.part != "environment"].what)


def test_the_sample_is_drawn_with_the_headline_in_it(finished):
    drawn = [set(verify(finished, sample=3, seed=s).query("part == 'losses'").what) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(d) == 1 + 3 and any(", key, mean after-first" in what for what in d) for d in drawn)
    (only,) = verify(finished, sample=0).query("part == 'losses'").what
    assert "unmasked" in only


def where_wrong(table) -> set[tuple[str, str]]:
    "What disagrees, as (part, file or table)."
    return {(r.part, r.what.partition(":")[0]) for r in disagreements(table).itertuples()}


def changed_cell(out):
    table = pd.read_csv(out / "results.csv", dtype=str, keep_default_na=False)
    table.loc[7, "damage"] = str(float(table.loc[7, "damage"]) + 2e-6)
    table.to_csv(out / "results.csv", index=False)


def lost_row(out):
    lines = (out / "results.csv").read_text().splitlines(True)
    gone = next(i for i, line in enumerate(lines) if "top variance" in line)
    (out / "results.csv").write_text("".join(lines[:gone] + lines[gone + 1 :]))


def exchanged(path: Path, change) -> None:
    "Other tensors under the same description, and a checksum that fits."
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        meta = json.loads(f.metadata()[HEADER])
    save_tensors(path, change(load_file(path)), meta.pop("kind"), meta)


def other_maps(out):
    exchanged(out / "networks.safetensors", lambda tensors: tensors | {"mixing_": tensors["mixing_"].flip(1)})


def other_means(out):
    exchanged(out / "found.safetensors", lambda tensors: tensors | {"mean": tensors["mean"] + 1})


def other_difference(out):
    table = pd.read_csv(out / "differences.csv")
    table.assign(verdict="above").to_csv(out / "differences.csv", index=False)


TAMPERED = {
    changed_cell: {("table", "results"), ("files", "results.csv")},
    lost_row: {("table", "results"), ("files", "results.csv")},
    other_maps: {("table", "results"), ("files", "networks.safetensors")},
    other_means: {("table", "results"), ("files", "found.safetensors")},
    other_difference: {("table", "differences"), ("files", "differences.csv")},
}


@pytest.mark.parametrize("tamper, where", TAMPERED.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_what_was_changed_is_found(tamper, where, copied):
    tamper(copied)
    table = verify(copied, sample=2)
    assert where_wrong(table) == where, verification_report(table)


def fitting_checksums(out):
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"] = {name: sha256_of(out / name) for name in manifest["files"]}
    write_json(out / "manifest.json", manifest)


@pytest.mark.parametrize("tamper", [changed_cell, other_maps], ids=lambda x: x.__name__)
def test_checksums_that_were_made_to_fit_do_not_hide_it(tamper, copied):
    tamper(copied)
    fitting_checksums(copied)
    assert where_wrong(verify(copied, sample=0)) == {("table", "results")}


def test_scores_that_nobody_measured_are_found(world, copied):
    "A run whose scores, tables and checksums were all made up, and fit one another: the model tells."
    for path in (copied / "parts" / "scores").glob("*.safetensors"):
        exchanged(path, lambda tensors: tensors | {"nats": 1.01 * tensors["nats"]})
    settings, found = run_module.read_found(copied)
    results, cache = run_module.arms_measured(found, run_module.Sources(settings), copied, measurable=False)
    results.to_csv(copied / "results.csv", index=False)
    run_module.differences(results, cache).to_csv(copied / "differences.csv", index=False)
    fitting_checksums(copied)
    wrong = disagreements(verify(copied, sample=2))
    assert list(wrong.part) == ["losses"] * 3 and wrong.difference.lt(0).all()


def test_another_model_and_other_texts_are_found(world, copied, tmp_path):
    "The files behind the names were exchanged since."
    other = tmp_path / "model"
    shutil.copytree(world / "model", other)
    model = families.build("llama")
    with torch.no_grad():
        model.lm_head.weight[5] += 0.5
    model.save_pretrained(other)
    wrong = disagreements(verify(copied, sample=1, model=other))
    assert {"model", "losses"} == set(wrong.part)
    assert not len(disagreements(verify(copied, sample=1, model=world / "model")))
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["texts"]["sha256"] = "0" * 64
    (copied / "manifest.json").write_text(json.dumps(manifest))
    assert set(disagreements(verify(copied, sample=0)).what) == {"sha256"}


def test_another_environment_is_told_and_is_no_fault(copied):
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["versions"]["torch"], manifest["machine"]["device"], manifest["found"]["threads"] = "1.0", "cuda:0", 77
    (copied / "manifest.json").write_text(json.dumps(manifest))
    table = verify(copied, sample=1)
    assert not len(disagreements(table)) and set(table[(table.verdict == "differs")].what) == {
        "torch",
        "device",
        "threads",
    }
    first = verification_report(table).splitlines()[0]
    assert all(name in first for name in ("torch", "1.0", torch.__version__.partition("+")[0], "threads", "77"))


def test_networks_are_found_again(finished):
    again = verify(finished, sample=0, refit=True).query("part == 'networks'")
    assert len(again) == 2 and (again.verdict == "agrees").all() and again.here.iloc[0] > 0.99


def test_the_tolerance_is_what_decides():
    for off, verdict in ((0.9e-3, "agrees"), (1.1e-3, "differs")):
        assert (
            compared("losses", "x", 0.5, 0.5 + off, 1e-3).verdict
            == compared("losses", "x", 20.0, 20 * (1 + off), 1e-3).verdict
            == verdict
        )
    for odd in (float("nan"), float("inf")):
        assert (
            compared("losses", "x", odd, odd, 1e-3).verdict == "agrees"
            and compared("losses", "x", odd, 1.0, 1e-3).verdict
            == compared("losses", "x", 1.0, odd, 1e-3).verdict
            == "differs"
        )


def test_what_takes_long_is_said_and_a_library_can_be_silent(finished, capsys):
    verify(finished, sample=3, refit=True)
    said = capsys.readouterr().err
    assert str(verify(finished, sample=0, progress=False).attrs["folder"]) == str(finished) and "4 of 4" in said
    verify(finished, sample=3, progress=False)
    assert capsys.readouterr().err == ""


def test_how_many_scores_a_run_has_of_those_it_needs(finished, copied):
    "Arms whose masks are equal share one."
    parts = pd.read_csv(finished / "results.csv").part
    assert run_module.scores_known(finished) == (parts.nunique(), N_ARMS) and parts.nunique() <= N_ARMS
    (copied / "parts" / "scores" / f"{parts[0]}.safetensors").unlink()
    assert run_module.scores_known(copied) == (parts.nunique() - 1, N_ARMS)


def test_streamed_activations_go_when_the_networks_are_there(world, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "free_memory", lambda: 1000)
    with monkeypatch.context() as m:
        m.setattr(run_module, "publish", lambda run: None)
        streamed = []
        honest = run_module.find_networks
        m.setattr(run_module, "find_networks", lambda *a: (honest(*a), streamed.append(a[-1].is_file()))[0])
        small_run(world, tmp_path / "run")
    assert streamed == [True] and not list((tmp_path / "run" / "parts").glob("activations*"))


# folders that are none


def test_folders_that_are_no_run(finished, copied, tmp_path):
    (tmp_path / "empty").mkdir()
    for kind in ("tuning", "study"):
        write_json(tmp_path / kind / "claim.json", {"kind": kind, "identity": {}})
    (copied / "manifest.json").unlink()
    for folder, error, lacks in (
        (tmp_path / "nowhere", FileNotFoundError, ""),
        (tmp_path / "empty", FileNotFoundError, ""),
        (copied, FileNotFoundError, "manifest.json"),
        (tmp_path / "study", FileNotFoundError, "study.json"),
        (tmp_path / "tuning", ValueError, ""),
    ):
        with pytest.raises(error) as e:
            verify(folder)
        assert str(folder) in str(e.value) and lacks in str(e.value)
    assert verifiable(finished) == "run"
    for wrong in (
        dict(sample=-1),
        dict(sample=1.5),
        dict(sample=True),
        dict(tolerance=-1.0),
        dict(tolerance=float("nan")),
    ):
        with pytest.raises(ArgumentError) as e:
            verify(finished, **wrong)
        assert [e.value.argument] == list(wrong)


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "settings.json",
        "results.csv",
        "networks.safetensors",
        "found.safetensors",
        "differences.csv",
        "parts/loaded.json",
        "parts/courses.safetensors",
        "parts/scores/*.safetensors",
    ],
)
def test_a_damaged_file_is_named(name, copied):
    path = next(copied.glob(name))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if path.suffix != ".csv" else b"condition,arm\n")
    with pytest.raises((ValueError, OSError)) as e:
        verify(copied, sample=0)
    assert str(path) in str(e.value)


def test_a_manifest_of_another_kind_is_named(copied):
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": [1]}))
    with pytest.raises(ValueError):
        verify(copied, sample=0)


def test_settings_of_another_version_are_named(copied):
    settings = json.loads((copied / "settings.json").read_text())
    settings["tail"] = "left, as in version 9"
    (copied / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError):
        verify(copied, sample=0)


def test_a_folder_cannot_ask_for_remote_code(copied, monkeypatch):
    "Not even for a model that is given by its path."
    settings = json.loads((copied / "settings.json").read_text())
    (copied / "settings.json").write_text(json.dumps(settings | {"trust_remote_code": True}))
    monkeypatch.setattr(run_module, "load_model", lambda *a, **kw: pytest.fail(f"loaded with {kw}"))
    for given in ({}, {"model": "elsewhere"}):
        with pytest.raises(ArgumentError) as e:
            verify(copied, **given)
        assert e.value.argument == "trust_remote_code"


# what a manifest says


def test_a_manifest_says_what_is_needed(finished):
    manifest = json.loads((finished / "manifest.json").read_text())
    assert {"llmfact_nb", "model", "texts", "settings", "seeds", "versions", "machine", "found"} <= set(manifest)
    assert {k: manifest["settings"][k] for k in SMALL if k != "conditions"} == {
        k: v for k, v in SMALL.items() if k != "conditions"
    }
    assert manifest["found"]["threads"] == torch.get_num_threads() and {
        "torch",
        "transformers",
        "numpy",
        "python",
    } <= set(manifest["versions"])


def test_a_manifest_identifies_model_texts_and_files(finished):
    table = verify(finished, sample=0)
    assert not (table.verdict == "not on record").any(), verification_report(table)


def test_exchanged_weights_and_files_are_named(world, copied, tmp_path):
    (copied / "networks.csv").write_text((copied / "networks.csv").read_text() + "\n")
    model = families.build("llama")
    with torch.no_grad():
        model.lm_head.weight[5] += 0.5
    shutil.copytree(world / "model", tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    assert {"networks.csv", "weights"} <= set(disagreements(verify(copied, sample=0, model=tmp_path / "model")).what)


def test_no_home_and_no_secret_in_what_a_run_writes(world, tmp_path, monkeypatch):
    "A model in the user's home, and a token for the hub: neither stands in any file of the run."
    home = tmp_path / "home" / "some-user"
    shutil.copytree(world, home / "data")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(run_module, "publish", lambda run: None)
    settings = run_module.settings_from(
        model=str(home / "data" / "model"), texts=str(home / "data" / "texts.jsonl"), **SMALL
    )
    run_module.run_experiment(settings, tmp_path / "out", progress=False, token="hf_secret")
    for path in (p for p in (tmp_path / "out").rglob("*") if p.is_file()):
        for word in (b"some-user", b"hf_secret", os.uname().nodename.encode()):
            assert word not in path.read_bytes(), (path.name, word)


def test_nothing_of_this_machine_in_a_manifest(finished):
    "No user, no host, no environment variable."
    said = (finished / "manifest.json").read_text() + (finished / "parts" / "loaded.json").read_text()
    nouns = [os.uname().nodename, str(Path.home()) + "/"] + [
        v for k, v in os.environ.items() if re.search("TOKEN|SECRET|PASSWORD|API_KEY", k) and len(v) > 5
    ]
    assert not [w for w in nouns if w in said]


@pytest.mark.parametrize(
    "asked",
    [
        {"dtype": "int8"}, {"dtype": ["bfloat16"]}, {"device_map": [1]}, {"device_map": {"": True}},
        {"device_map": 1.5}, {"quantization_config": {"quant_method": "mxfp4"}}, {"quantization_config": "8"},
        {"revision": 3},
    ],
)  # fmt: skip
def test_a_folder_cannot_ask_for_everything(asked, tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps(asked))
    with pytest.raises(ValueError) as e:
        run_module.options_of(tmp_path)
    assert str(tmp_path / "settings.json") in str(e.value)


# a whole study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "A finished study in the folder `study`, and its model beside it."
    import planted

    at = tmp_path_factory.mktemp("whole")
    planted.model().save_pretrained(at / "model")
    families.tokenizer().save_pretrained(at / "model")
    study_job(at / "study", load_model(at / "model")[0])
    return at


@pytest.fixture
def copied_study(study, tmp_path):
    "A study to be tampered with."
    shutil.copytree(study / "study", tmp_path / "study")
    return tmp_path / "study"


def verified(folder: Path, study: Path, sample: int = 0):
    "`verify` with the model and the texts of the study."
    return verify(folder, sample=sample, model=study / "model", texts=study_texts(), progress=False)


def test_an_untouched_study_is_confirmed(study):
    table = verified(study / "study", study, sample=6)
    assert not len(disagreements(table)), verification_report(table)
    named = {what.partition(":")[0].replace(" ", "-") for what in table[table.part == "table"].what}
    assert (
        named
        == {p.stem for p in (study / "study" / "tables").glob("*.csv")}
        >= {"verdicts", "recurrence", "facts", "contrasts"}
    )
    assert len(table[table.part == "losses"]) >= 7 and (table[table.part == "losses"].difference.abs() < 1e-6).all()


def cell(column: str, row: int, to):
    "Change one cell; to what, or how."
    return lambda t: t.assign(
        **{column: [(to(v) if callable(to) else to) if i == row else v for i, v in enumerate(t[column])]}
    )


FALSIFIED = {  # table -> how its cells, all words, are changed (None: it is deleted), and how its row begins
    "words": {
        "verdicts": (lambda t: t.assign(verdict="holds", here="99"), "verdicts: verdict,"),
        "union": (lambda t: t.assign(arm=t.arm.replace({"key": "random", "random": "key"})), "union: arm,"),
        "subtraction": (lambda t: t.assign(data="moon"), "subtraction: data,"),
        "amplification": (cell("counts", 1, "1 2 3"), "amplification: counts,"),
        "factors": (cell("setting", 0, "baseline"), "factors: setting,"),
        "contrasts": (cell("note", 0, "as planned"), "contrasts: note,"),
        "cross-task": (cell("part", 3, ""), "cross-task: part, row 4 of"),
        "facts": (cell("value", 0, "many"), "facts: value,"),
    },
    "numbers": {
        "verdicts": (lambda t: t.assign(here="99"), "verdicts:"),
        "recurrence": (lambda t: t.assign(similar="9"), "recurrence:"),
        "damage": (cell("value", 3, lambda v: str(float(v) + 1e-5)), "damage:"),
        "random-share": (cell("value", 2, ""), "random share:"),
        "union": (cell("ci_low", 4, "inf"), "union:"),
        "sizes": (cell("units", 5, lambda v: str(int(v) + 1)), "sizes:"),
    },
    "rows and columns": {
        "sizes": (lambda t: t.drop(columns="depth"), "sizes:"),
        "union": (lambda t: t.assign(approved="yes"), "union:"),
        "verdicts": (lambda t: t[1:], "verdicts:"),
        "networks": (lambda t: t[::-1], "networks: arm,"),
        "facts": (lambda t: t[:0], "facts:"),
    },
    "tables": {name: (None, f"{name}:") for name in ("verdicts", "recurrence", "facts", "contrasts", "subtraction")},
}


@pytest.mark.parametrize("changes", FALSIFIED.values(), ids=FALSIFIED)
def test_what_was_changed_in_a_study_is_found(changes, study, copied_study):
    for name, (change, _) in changes.items():
        path = copied_study / "tables" / f"{name}.csv"
        if change is None:
            path.unlink()
        else:
            change(pd.read_csv(path, dtype=str, keep_default_na=False)).to_csv(path, index=False)
    table = verified(copied_study, study)
    wrong = sorted(disagreements(table).what)
    assert len(wrong) == len(changes) and all(
        what.startswith(says) for what, says in zip(wrong, sorted(says for _, says in changes.values()))
    ), verification_report(table)


def test_a_table_too_many_and_another_recurrence_are_found(study, copied_study):
    "The verdicts rest on recurrence, so they differ with it."
    shutil.copy(copied_study / "tables" / "sizes.csv", copied_study / "tables" / "models.csv")
    path = next((copied_study / "recurrence").glob("topics-*-0.json"))
    kept = json.loads(path.read_text())
    kept["rows"][0]["similar"] += 1
    path.write_text(json.dumps(kept))
    assert where_wrong(verified(copied_study, study)) == {
        ("table", name) for name in ("recurrence", "verdicts", "models")
    }


@pytest.mark.parametrize("flipped, verdict", [(1, "agrees"), (2, "differs")])
def test_of_an_accuracy_one_sentence_may_differ(flipped, verdict, study, monkeypatch):
    "Other hardware lets a near-tie fall the other way."
    honest = ablation.label_accuracy

    def elsewhere(*a, **kw):
        found = honest(*a, **kw)
        right = found.predictions == found.labels
        some = (right if right.sum() >= flipped else ~right).nonzero()[:flipped, 0]
        predictions = found.predictions.clone()
        predictions[some] = torch.where(right[some], -1, found.labels[some])
        return dataclasses.replace(found, predictions=predictions)

    monkeypatch.setattr(ablation, "label_accuracy", elsewhere)
    table = verified(
        study / "study", study, sample=999
    )  # all: what a smaller sample holds depends on the versions, which are in the names
    accuracy = table.what.str.contains(": accuracy")
    assert (
        accuracy.sum() > 1
        and set(table[accuracy].verdict) == {verdict}
        and set(table[accuracy].difference.abs()) == {flipped / 4}
    )
    assert set(disagreements(table[~accuracy]).what) == set()
