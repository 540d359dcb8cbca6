"""Pins the study of one model by one command: tables with the columns of the single studies, held-out texts that chose
nothing, resume without measuring again, folders and models that are refused, studies that a model does not admit, and
a dry run that keeps its word."""

import json
from dataclasses import replace

import families
import pandas as pd
import planted
import pytest
from small_runs import SMALL_FURTHER, further_texts, further_texts_in, llmfact, small_world

from llmfact_nb.ablation import ScoreCache
from llmfact_nb.base.arguments import ArgumentError
from llmfact_nb.scores.contrast import ContrastPair, ContrastSet
from llmfact_nb.study import further_study as module
from llmfact_nb.study.further import FURTHER
from llmfact_nb.study.further_study import FurtherSettings, FurtherTexts, further_passes, further_study
from llmfact_nb.study.plan import more_held_out
from llmfact_nb.study.whole import read_study


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("further") / "study"
    return folder, further_study(
        planted.model(), families.tokenizer(), folder, SMALL_FURTHER, further_texts(), progress=False
    )


def test_every_study_leaves_its_table_with_the_columns_of_the_single_study(done):
    folder, tables = done
    committed = module.Path(__file__).parent.parent / "nbs" / "tutorials" / "further"
    kept = read_study(folder)
    assert set(kept) == set(tables) == {"untrained", "untrained-networks", "localizers", "tasks", "pruning", "verdicts"}
    for name in {path.stem for path in committed.glob("*.csv")} & set(kept):
        assert list(kept[name].columns) == list(pd.read_csv(committed / f"{name}.csv").columns), name
    assert set(kept["localizers"].study) == {"localizers"} and set(kept["tasks"].study) == {"tasks"}
    assert kept["verdicts"].attrs["mark"] and len(kept["untrained"]) == 3
    assert (kept["localizers"].seeds == SMALL_FURTHER.draws).all() and len(kept["tasks"].setting.unique()) == 5
    assert kept["verdicts"].verdict.isin(["supported", "not supported", "undecided"]).all()
    why = kept["verdicts"].set_index("claim").why
    judged = {claim.split()[0] for claim in why.index[~why.str.startswith("there is no table")]}
    assert judged == {"T0", "T13", "T14", "T16"}, "the others need tables of other notebooks"


def test_more_permuted_copies_are_measured_where_the_verdict_is_taken(tmp_path):
    some = replace(SMALL_FURTHER, seeds=(0, 5), sites=("mlp_hidden", "mlp_out"), permuted=4)
    assert some.more_permuted == [1, 2] and some.rows == 12
    divide = lambda work, jobs, model: enumerate(work(model, job) for job in jobs)
    given = planted.model(), families.tokenizer(), further_texts(), some, tmp_path
    tables = module._untrained(*given, False, divide)
    counts = tables["untrained"].groupby(["site", "model"]).size().to_dict()
    permuted = {site: counts.pop((site, "permuted")) for site in some.sites}
    assert permuted == {"mlp_hidden": 4, "mlp_out": 2} and sum(counts.values()) == 2 * 3
    assert len(tables["untrained"]) == some.rows == len(list((tmp_path / "untrained").glob("*-*.json")))
    networks = tables["untrained-networks"]
    assert len(networks) == 4 * some.rows and set(networks[networks.model == "permuted"].seed) == {0, 1, 2, 5}
    assert replace(some, sites=("mlp_out",)).more_permuted == [] == replace(some, permuted=1).more_permuted


def test_what_is_finished_is_not_measured_again(done, monkeypatch):
    folder, tables = done

    def never(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(module, "localize", never)
    monkeypatch.setattr(module, "pruning_scores", never)
    monkeypatch.setattr("llmfact_nb.study.plan.find_networks", never)
    monkeypatch.setattr("llmfact_nb.across.untrained.untrained", never)
    before = {path: path.stat().st_mtime_ns for path in (folder / "scores").iterdir()}
    again = further_study(planted.model(), families.tokenizer(), folder, SMALL_FURTHER, further_texts(), progress=False)
    assert {path: path.stat().st_mtime_ns for path in (folder / "scores").iterdir()} == before
    assert again["verdicts"].why.tolist() == tables["verdicts"].why.tolist()


def test_no_more_is_measured_than_was_counted(done):
    folder, _ = done
    counted = sum(sum(sets.values()) for sets in further_passes(SMALL_FURTHER).values())
    assert 0.7 * counted < len(list((folder / "scores").glob("*.safetensors"))) <= counted


def test_foreign_folders_and_other_work_are_refused(done, tmp_path):
    folder, _ = done
    (tmp_path / "letters.txt").write_text("mine")
    given = planted.model(), families.tokenizer()
    others = [(tmp_path, SMALL_FURTHER, further_texts()), (folder, replace(SMALL_FURTHER, draws=3), further_texts())]
    others += [(folder, SMALL_FURTHER, replace(further_texts(), fit=planted.texts(12, 50, seed=9)))]
    for place, settings, texts in others:
        with pytest.raises(ValueError):
            further_study(*given, place, settings, texts, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]


def test_a_study_that_the_model_does_not_admit_is_named_and_the_others_go_on(tmp_path, capsys):
    unknown = ContrastSet("unknown", tuple(ContrastPair(t, t, " positive", " positive") for t in ("w4", "w9", "w14")))
    texts = replace(further_texts(), agreement=unknown)
    some = replace(SMALL_FURTHER, layer_networks=500)
    tables = further_study(planted.model(), families.tokenizer(), tmp_path / "f", some, texts)
    said = capsys.readouterr().err
    assert "tasks is left out" in said and "pruning is left out" in said and "expected" in said
    assert set(tables) == {"untrained", "untrained-networks", "localizers", "verdicts"}


def test_held_out_texts_choose_nothing():
    fit, held_out = more_held_out([f"f{i}" for i in range(10)], ["e0", "e1"], 5)
    assert fit == [f"f{i}" for i in range(7)] and held_out == ["e0", "e1", "f7", "f8", "f9"]
    assert more_held_out(["a", "b"], ["c", "d"], 1) == (["a", "b"], ["c"])
    assert more_held_out(["a"], ["b"], 1) == (["a"], ["b"]), "nothing moves"
    with pytest.raises(ArgumentError) as e:
        more_held_out(["a", "b", "c"], [], 2)
    assert e.value.argument == "articles"


@pytest.mark.parametrize("name", ["articles", "length", "pairs", "permuted"])
def test_settings_that_cannot_work_are_refused(name):
    with pytest.raises(ArgumentError) as e:
        FurtherSettings(**{name: -1 if name == "permuted" else 1})
    assert e.value.argument == name


def test_the_command_runs_resumes_and_refuses(tmp_path, monkeypatch):
    tiny, out = small_world(tmp_path), tmp_path / "further"
    monkeypatch.setattr(FurtherTexts, "default", lambda settings: further_texts_in(tiny))
    monkeypatch.setattr("llmfact_nb.command.further_study.QUICK_FURTHER", SMALL_FURTHER)
    line = f"study further --quick --model {tiny / 'model'} --out {out}"
    bill = json.loads(llmfact(f"{line} --dry-run --json")[0])
    assert bill["dry_run"] and not out.exists()
    answer = json.loads(llmfact(f"{line} --json")[0])
    assert {row["claim"] for row in answer["verdicts"]} == set(FURTHER) and answer["quick"]
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert written <= bill["disk"]
    said, notes = llmfact(line)
    assert str(out / "tables") in said and "expected" in notes
    assert json.loads(llmfact(f"info {out} --json")[0])["kind"] == "further study"
    record = json.loads((out / "study.json").read_text())
    assert record["settings"]["quick"] and record["seconds of the last call"] >= 0
    for other in (f"run --model {tiny / 'model'} --texts {tiny / 'texts.jsonl'} --out {out}", f"figures {out}"):
        llmfact(other, 1)
    llmfact(f"study further --model {tiny / 'model'} --out {tmp_path / 'model'}", 1)


def test_the_estimate_counts_what_is_left(tmp_path):
    model, tokenizer = planted.model(), families.tokenizer()
    cache = ScoreCache(model, tmp_path / "scores", progress=False)
    new = module._work(model, tokenizer, cache, tmp_path, SMALL_FURTHER, further_texts())
    assert new.amounts["model"] == 3 and new.amounts["tok"] > 0 < new.amounts["s"]
    (tmp_path / "untrained").mkdir()
    (tmp_path / "untrained" / "mlp_hidden-trained-None.json").write_text("{}")
    assert module._work(model, tokenizer, cache, tmp_path, SMALL_FURTHER, further_texts()).amounts["model"] == 2
