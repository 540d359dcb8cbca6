"""Pins `verify`: an untouched run is confirmed to the digit and not written to; every exchanged file and every changed number is found and named; other versions are reported and are no fault; folders that are no run are refused; manifests say enough and not too much."""

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
from test_faults import SMALL, small_run, small_world

from llmfact_nb.study import measures
from llmfact_nb.command import run as run_module
from llmfact_nb.base.files import HEADER, save_tensors, write_json
from llmfact_nb.base.resources import load_model
from llmfact_nb.command.verify import COLUMNS, compared, disagreements, kind_of, verification_report, verify

pytestmark = pytest.mark.filterwarnings("ignore:FastICA has not converged")
N_ROWS = 1 + 2 * 9


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
    assert list(table.columns) == list(COLUMNS) and not len(disagreements(table)), verification_report(table)
    losses = table[table.part == "losses"]
    assert len(losses) == 1 + 4 * (N_ROWS - 1) and (losses.difference == 0).all(), (
        "the same machine: the same to the last bit"
    )
    results = pd.read_csv(finished / "results.csv")
    assert losses.here.iloc[0] == pytest.approx(results.nats[0], abs=1e-12) and set(results.arm) - {"unmasked"} == {
        re.split(r",| \d", w)[0] for w in losses.what[1:]
    }
    assert {"table", "model", "texts", "losses", "environment"} <= set(table.part)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in finished.rglob("*")} == before, "nothing is written"
    said = verification_report(table)
    assert (
        said.splitlines()[0] == "environment: as it was"
        and said.splitlines()[-1] == "The numbers are confirmed."
        and "within 0.001 nats" in said
    )


def test_the_sample_is_drawn_with_the_headline_in_it(finished):
    drawn = [set(verify(finished, sample=3, seed=s).query("part == 'losses'").what) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and all(
        "key, mean, after the first token: damage" in d and len(d) == 1 + 4 * 3 for d in drawn
    )
    assert set(verify(finished, sample=0).query("part == 'losses'").what) == {"unmasked: nats"}


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
    exchanged(out / "parts" / "statistics.safetensors", lambda tensors: {k: v + 1 for k, v in tensors.items()})


TAMPERED = {
    changed_cell: ("table", "kept losses"),
    lost_row: ("table", "rows that are missing"),
    other_maps: ("table", "units of each layer"),
    other_means: ("losses", "key, mean"),
}


@pytest.mark.parametrize("tamper, where", TAMPERED.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_what_was_changed_is_found(tamper, where, copied):
    tamper(copied)
    table = verify(copied, sample=2)
    wrong = disagreements(table)
    assert ((wrong.part == where[0]) & wrong.what.str.contains(where[1])).any(), verification_report(table)
    assert verification_report(table).splitlines()[-1].startswith("NOT confirmed")


def test_another_model_and_other_texts_are_found(world, copied, tmp_path):
    "The files behind the names were exchanged since."
    other = tmp_path / "model"
    shutil.copytree(world / "model", other)
    model = families.build("llama")
    with torch.no_grad():
        model.lm_head.weight[5] += 0.5
    model.save_pretrained(other)
    wrong = disagreements(verify(copied, sample=1, model=other))
    assert "unmasked: nats" in set(wrong.what)
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
    assert f"torch 1.0 there, {torch.__version__.partition('+')[0]}" in first and "threads 77 there" in first


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
    assert "loading" in said and "measured again: 4 of 4 arm" in said and "finding the networks again" in said
    verify(finished, sample=3, progress=False)
    assert capsys.readouterr().err == ""


# folders that are none


def test_folders_that_are_no_run(finished, copied, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "tuning" / "reviews").mkdir(parents=True)
    (tmp_path / "tuning" / "reviews" / "settings.json").write_text("{}")
    (tmp_path / "study" / "scores").mkdir(parents=True)
    (tmp_path / "study" / "configuration.json").write_text("{}")
    (copied / "manifest.json").unlink()
    for folder, error, says in (
        (tmp_path / "nowhere", FileNotFoundError, "no such folder"), (tmp_path / "empty", FileNotFoundError, "llmfact run --out"), (copied, FileNotFoundError, "not finished: it lacks manifest.json"),
        (tmp_path / "study", FileNotFoundError, "not finished: it lacks study.json"), (tmp_path / "tuning", ValueError, "tuning study"),
    ):  # fmt: skip
        with pytest.raises(error, match=says) as e:
            verify(folder)
        assert str(folder) in str(e.value)
    assert kind_of(finished) == "run"
    for wrong in (
        dict(sample=-1),
        dict(sample=1.5),
        dict(sample=True),
        dict(tolerance=-1.0),
        dict(tolerance=float("nan")),
    ):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            verify(finished, **wrong)


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "settings.json",
        "results.csv",
        "networks.safetensors",
        "parts/statistics.safetensors",
        "parts/facts.json",
        "parts/courses.safetensors",
        "parts/arms/unmasked.safetensors",
    ],
)
def test_a_damaged_file_is_named(name, copied):
    path = copied / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if path.suffix != ".csv" else b"condition,arm\n")
    with pytest.raises((ValueError, OSError), match=str(copied)) as e:
        verify(copied, sample=0)
    assert path.name in str(e.value) or path.suffix == ".csv"


def test_a_manifest_of_another_kind_is_named(copied):
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": [1]}))
    with pytest.raises(ValueError, match="run' is damaged, or no run"):
        verify(copied, sample=0)


def test_settings_of_another_version_are_named(copied):
    settings = json.loads((copied / "settings.json").read_text())
    settings["tail"] = "left, as in version 9"
    (copied / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"{copied}.*tail="):
        verify(copied, sample=0)


def test_a_folder_cannot_ask_for_remote_code(copied, monkeypatch):
    settings = json.loads((copied / "settings.json").read_text())
    (copied / "settings.json").write_text(json.dumps(settings | {"trust_remote_code": True}))
    monkeypatch.setattr("llmfact_nb.base.resources.load_model", lambda *a, **kw: pytest.fail(f"loaded with {kw}"))
    with pytest.raises(ValueError, match="code that came with its checkpoint.*trust_remote_code=True"):
        verify(copied)


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
    run_module.run_settings(settings, tmp_path / "out", progress=False, token="hf_secret")
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


# a whole study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "A finished study in the folder `study`, and its model beside it."
    import planted
    import test_faults as t
    import test_studies as s

    at = tmp_path_factory.mktemp("whole")
    planted.model().save_pretrained(at / "model")
    s.TOKENIZER.save_pretrained(at / "model")
    t.study_job(at / "study", load_model(at / "model")[0])
    return at


@pytest.fixture
def copied_study(study, tmp_path):
    "A study to be tampered with."
    shutil.copytree(study / "study", tmp_path / "study")
    return tmp_path / "study"


def verified(folder: Path, study: Path, sample: int = 0):
    "`verify` with the model and the texts of the study."
    from test_faults import study_texts

    return verify(folder, sample=sample, model=study / "model", texts=study_texts(), progress=False)


def test_an_untouched_study_is_confirmed(study, copied_study):
    from test_faults import study_texts

    table = verified(study / "study", study, sample=6)
    assert not len(disagreements(table)), verification_report(table)
    named = {what.partition(":")[0].replace(" ", "-") for what in table[table.part == "table"].what}
    assert (
        named
        == {p.stem for p in (study / "study" / "tables").glob("*.csv")}
        >= {"verdicts", "recurrence", "facts", "contrasts"}
    )
    assert len(table[table.part == "losses"]) >= 7 and (table[table.part == "losses"].difference.abs() < 1e-6).all()
    write_json(
        copied_study / "asked.json", {"model": str(study / "model"), "quick": True}
    )  # what `llmfact figures --model` leaves there
    assert not len(disagreements(verify(copied_study, sample=0, texts=study_texts(), progress=False)))


def cell(column: str, row: int, to):
    "Change one cell; to what, or how."
    return lambda t: t.assign(
        **{column: [(to(v) if callable(to) else to) if i == row else v for i, v in enumerate(t[column])]}
    )


FALSIFIED = {  # table -> how its cells, all words, are changed (None: it is deleted), and the row that says so
    "words": {
        "verdicts": (lambda t: t.assign(verdict="holds", here="99"), "verdicts: verdict, row"),
        "union": (lambda t: t.assign(arm=t.arm.replace({"key": "random", "random": "key"})), "union: arm, row"),
        "lesion": (lambda t: t.assign(data="moon"), "lesion: data, row 1 of"),
        "amplification": (cell("counts", 1, "1 2 3"), "amplification: counts, row 2 of"),
        "factors": (cell("setting", 0, "baseline"), "factors: setting, row 1 of"),
        "contrasts": (cell("note", 0, "as planned"), "contrasts: note, row 1 of"),
        "cross-task": (cell("part", 3, ""), "cross-task: part, row 4 of"),
        "facts": (cell("value", 0, "many"), "facts: value, row 1 of"),
    },
    "numbers": {
        "verdicts": (lambda t: t.assign(here="99"), "verdicts: largest"),
        "recurrence": (lambda t: t.assign(similar="9"), "recurrence: largest"),
        "damage": (cell("value", 3, lambda v: str(float(v) + 1e-5)), "damage: largest"),
        "random-share": (cell("value", 2, ""), "random share: largest"),
        "union": (cell("ci_low", 4, "inf"), "union: largest"),
        "sizes": (cell("units", 5, lambda v: str(int(v) + 1)), "sizes: largest"),
    },
    "rows and columns": {
        "sizes": (lambda t: t.drop(columns="depth"), "sizes: rows, and columns"),
        "union": (lambda t: t.assign(approved="yes"), "union: rows, and columns"),
        "verdicts": (lambda t: t[1:], "verdicts: rows, and columns"),
        "networks": (lambda t: t[::-1], "networks: arm, row 1 of 2"),
        "facts": (lambda t: t[:0], "facts: rows, and columns"),
    },
    "tables": {name: (None, f"{name}: the table") for name in ("verdicts", "recurrence", "facts", "contrasts", "lesion")},
}  # fmt: skip


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
    assert verification_report(table).splitlines()[-1] == f"NOT confirmed: {len(changes)} differ."


def test_a_table_too_many_and_another_recurrence_are_found(study, copied_study):
    "The verdicts rest on recurrence, so they differ with it."
    shutil.copy(copied_study / "tables" / "sizes.csv", copied_study / "tables" / "models.csv")
    path = next((copied_study / "recurrence").glob("topics-*-0.json"))
    kept = json.loads(path.read_text())
    kept["rows"][0]["similar"] += 1
    path.write_text(json.dumps(kept))
    assert [what.partition(",")[0] for what in disagreements(verified(copied_study, study)).what] == [
        "recurrence: largest relative difference",
        "verdicts: why",
        "models: the table",
    ]


@pytest.mark.parametrize("flipped, verdict", [(1, "agrees"), (2, "differs")])
def test_of_an_accuracy_one_sentence_may_differ(flipped, verdict, study, monkeypatch):
    "Other hardware lets a near-tie fall the other way."
    honest = measures.label_accuracy

    def elsewhere(*a, **kw):
        found = honest(*a, **kw)
        right = found.predictions == found.labels
        some = (right if right.sum() >= flipped else ~right).nonzero()[:flipped, 0]
        predictions = found.predictions.clone()
        predictions[some] = torch.where(right[some], -1, found.labels[some])
        return dataclasses.replace(found, predictions=predictions)

    monkeypatch.setattr(measures, "label_accuracy", elsewhere)
    table = verified(
        study / "study", study, sample=999
    )  # all: what a smaller sample holds depends on the versions, which are in the names
    accuracy = table.what.str.contains(": accuracy, one of 4 may flip")
    assert (
        accuracy.sum() > 1
        and set(table[accuracy].verdict) == {verdict}
        and set(table[accuracy].difference.abs()) == {flipped / 4}
    )
    assert set(disagreements(table[~accuracy]).what) == set()
