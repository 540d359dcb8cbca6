"""Pins a fine-tuning from beginning to end on a tiny model: what trains, what stays, Ctrl-C and resume, files that
give the same model again."""

import dataclasses
import gc
import json
import os
import random
import shutil
import signal
from pathlib import Path

import families
import pytest
import torch
from transformers import Trainer

from llmfact_nb.base.arguments import ArgumentError
from llmfact_nb.base.files import ClaimError, hold, read_claim, write_json
from llmfact_nb.masks import NeuronMask
from llmfact_nb.base.models import load_model
from llmfact_nb.base.texts import load_texts
from llmfact_nb.tuning.sharing import load_neurons
from llmfact_nb.tuning.tasks import score, window_examples
from llmfact_nb.command.checks import named_content
from llmfact_nb.command.training import Steps, TuneSettings, tune

MASK = NeuronMask.from_layers([torch.arange(families.HIDDEN) < n for n in (5, 0, 3)], "mlp_hidden")


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Settings for a tiny model and text, saved to disk."""
    folder = tmp_path_factory.mktemp("tune")
    families.build("llama").save_pretrained(folder / "model")
    families.tokenizer().save_pretrained(folder / "model")
    rng = random.Random(0)
    (folder / "texts.jsonl").write_text(
        "\n".join(
            json.dumps({"title": f"t{i}", "text": " ".join(f"w{rng.randrange(4, families.VOCAB)}" for _ in range(60))})
            for i in range(30)
        )
    )
    return TuneSettings(
        str(folder / "model"),
        str(folder / "texts.jsonl"),
        steps=6,
        batch_size=2,
        max_length=12,
        warmup=1,
        eval_windows=6,
        lr=0.02,
    )


@pytest.fixture(scope="module")
def whole(asked, tmp_path_factory):
    """The facts and the folder of a training that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return tune(asked, MASK, folder, merge=True, save_every=4, progress=False), folder


def loss_of(model, tokenizer, asked):
    return score(
        model, window_examples(tokenizer, load_texts(asked.texts, "eval")["text"], asked.eval_windows, asked.max_length)
    ).loss


def test_what_trains_and_what_is_written(asked, whole):
    facts, folder = whole
    base, tokenizer = load_model(asked.model)
    assert facts["trained parameters"] == MASK.n * 3 * families.D and facts["frozen weights intact"] is True
    assert facts["loss before"] == pytest.approx(loss_of(base, tokenizer, asked)) and facts[
        "loss before"
    ] != pytest.approx(facts["loss after"], abs=1e-6)
    merged, _ = load_model(folder / "model")
    moved = {n for (n, a), (_, b) in zip(base.named_parameters(), merged.named_parameters()) if not torch.equal(a, b)}
    assert moved and all(".mlp." in n and ".layers.1." not in n for n in moved), "the second layer has no chosen neuron"
    ids = torch.tensor([[5, 9, 11, 4]])
    assert loss_of(
        load_neurons(base, folder / "neurons.safetensors", verbose=False), tokenizer, asked
    ) == pytest.approx(facts["loss after"], rel=1e-6)
    assert torch.allclose(base(ids).logits, merged(ids).logits, atol=1e-5)
    assert sorted(p.name for p in folder.iterdir() if p.name[0] != ".") == [
        "claim.json",
        "losses.csv",
        "model",
        "neurons.safetensors",
        "start.json",
        "tuned.json",
    ]
    assert len((folder / "losses.csv").read_text().splitlines()) == 1 + asked.steps


@pytest.mark.parametrize("step", [1, 5])
def test_ctrl_c_keeps_a_checkpoint_and_the_rest_is_the_same(asked, whole, tmp_path, monkeypatch, step):
    """A real SIGINT in the middle of a step."""
    end = Steps.on_step_end
    monkeypatch.setattr(
        Steps,
        "on_step_end",
        lambda self, args, state, control, **kw: (
            state.global_step == step and os.kill(os.getpid(), signal.SIGINT),
            end(self, args, state, control, **kw),
        )[1],
    )
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        tune(asked, MASK, tmp_path, save_every=4, progress=False)
    assert (
        signal.getsignal(signal.SIGINT) is before
        and (tmp_path / "checkpoints" / f"checkpoint-{step}").is_dir()
        and not (tmp_path / "tuned.json").exists()
    )
    monkeypatch.setattr(Steps, "on_step_end", end)
    facts = tune(asked, MASK, tmp_path, save_every=4, progress=False)
    assert (
        facts["loss after"] == pytest.approx(whole[0]["loss after"], rel=1e-6)
        and not (tmp_path / "checkpoints").exists()
    )


@pytest.mark.parametrize(
    "step, written",
    [(2, "weights"), (4, "weights"), (4, "optimizer"), (4, "half of the state"), (4, "nothing of the state")],
)
def test_a_kill_while_a_checkpoint_is_written(asked, whole, tmp_path, monkeypatch, step, written):
    "What was written of it is dropped, and the checkpoint before it is taken; before the first there is none."

    class Killed(BaseException):
        pass

    def dies(
        self, *args, honest=Trainer._save_optimizer_and_scheduler if written == "weights" else Trainer._save_rng_state
    ):
        if self.state.global_step == step and written in ("weights", "optimizer"):
            raise Killed
        honest(self, *args)
        if self.state.global_step == step:
            self.state.save_to_json = lambda path: (_ for _ in ()).throw(
                (Path(path).write_text('{"global_step": ' if written == "half of the state" else ""), Killed())[1]
            )

    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(Trainer, "_save_optimizer_and_scheduler" if written == "weights" else "_save_rng_state", dies)
        tune(asked, MASK, tmp_path, save_every=2, progress=False)
    assert (tmp_path / "checkpoints" / f"checkpoint-{step}" / "model.safetensors").exists()
    steps, end = [], Steps.on_step_end
    monkeypatch.setattr(
        Steps,
        "on_step_end",
        lambda self, args, state, control, **kw: (
            steps.append(state.global_step),
            end(self, args, state, control, **kw),
        )[1],
    )
    assert tune(asked, MASK, tmp_path, save_every=2, progress=False)["loss after"] == pytest.approx(
        whole[0]["loss after"], rel=1e-6
    )
    assert steps == list(range(step - 1, 7)), "it goes on from the last whole checkpoint"


def test_a_training_that_died_after_its_last_step(asked, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as m, pytest.raises(OSError):
        m.setattr("llmfact_nb.command.training.keep", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
        tune(asked, MASK, tmp_path, save_every=4, progress=False)
    assert (tmp_path / "checkpoints" / "checkpoint-6").is_dir()
    assert tune(asked, MASK, tmp_path, save_every=4, progress=False)["loss after"] == pytest.approx(
        whole[0]["loss after"], rel=1e-6
    )


def test_finished_is_not_done_again_and_others_are_refused(asked, whole, monkeypatch):
    facts, folder = whole
    with monkeypatch.context() as m:
        m.setattr("llmfact_nb.command.training.load_model", lambda *_, **__: pytest.fail("it was finished"))
        assert tune(asked, MASK, folder, merge=True, progress=False) == facts
        for settings, mask, name in ((dataclasses.replace(asked, lr=0.01), MASK, "lr"), (asked, ~MASK, "neurons")):
            with pytest.raises(ClaimError) as e:
                tune(settings, mask, folder, progress=False)
            assert list(e.value.differences) == [name]


@pytest.mark.parametrize("mode", ["selected", "rest"])
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_finished_training_goes_on_with_more_steps(asked, tmp_path, monkeypatch, mode, interrupted):
    few, more = (dataclasses.replace(asked, mode=mode, steps=n) for n in (3, 7))
    first, folders = tune(few, MASK, tmp_path / "a", progress=False), [tmp_path / "a"]
    log = (folders[0] / "losses.csv").read_text().splitlines()
    if interrupted:
        shutil.copytree(folders[0], tmp_path / "b")
        folders.append(tmp_path / "b")
        end = Steps.on_step_end

        def stops(self, args, state, control, **kw):
            self.asked = state.global_step == 2
            end(self, args, state, control, **kw)

        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(Steps, "on_step_end", stops)
            tune(more, MASK, tmp_path / "b", progress=False)
        assert tune(few, MASK, tmp_path / "b", progress=False) == first, "what was finished is still there"
    facts = [tune(more, MASK, folder, progress=False) for folder in folders]
    assert all(f["loss after"] == pytest.approx(facts[0]["loss after"], rel=1e-6) for f in facts)
    assert facts[0]["loss before"] == first["loss before"] and facts[0]["loss after"] != first["loss after"]
    assert facts[0]["settings"]["steps"] == 7 and facts[0]["frozen weights intact"] is True
    for folder in folders:
        now = (folder / "losses.csv").read_text().splitlines()
        assert now[:4] == log and [row.split(",")[0] for row in now[1:]] == list("1234567")
        assert not (folder / "checkpoints").exists()
    with pytest.raises(ArgumentError) as e:
        tune(few, MASK, folders[0], progress=False)
    assert e.value.argument == "steps"


def test_a_tuning_says_what_trains_also_without_its_model(asked, whole):
    model = load_model(asked.model)[0]
    tuning = load_neurons(model, whole[1] / "neurons.safetensors", verbose=False).neuron_tuning
    assert f"{whole[0]['trained parameters']:,}" in repr(tuning) == str(tuning)
    del model
    gc.collect()
    assert "selected" in repr(tuning)


def test_a_lost_model_is_made_again(asked, whole, tmp_path):
    shutil.copytree(whole[1], tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "model")
    assert tune(asked, MASK, tmp_path / "out", merge=True, progress=False)["files"] == whole[0]["files"]
    model, tokenizer = load_model(tmp_path / "out" / "model")
    assert loss_of(model, tokenizer, asked) == pytest.approx(whole[0]["loss after"], rel=1e-6)


@pytest.mark.parametrize("lost", [["neurons.safetensors"], ["losses.csv"], ["model", "neurons.safetensors"]])
def test_files_that_are_gone_are_named(asked, whole, tmp_path, lost):
    out = tmp_path / "out"
    shutil.copytree(whole[1], out)
    for name in lost:
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
    for merge in (True, False):
        with pytest.raises(FileNotFoundError) as e:
            tune(asked, MASK, out, merge=merge, progress=False)
        assert lost[-1] in str(e.value)
    (out / "tuned.json").unlink()
    assert (
        tune(asked, MASK, out, progress=False)["loss after"] == whole[0]["loss after"]
        and (out / "neurons.safetensors").exists()
    )


def test_incomplete_notes_are_refused_by_name(asked, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("llmfact_nb.command.training.train", lambda *_: pytest.fail("it would be said too late"))
    for name in ("tuned.json", "start.json"):
        out = tmp_path / name
        shutil.copytree(whole[1], out)
        (out / "tuned.json").unlink()
        write_json(out / name, {})
        with pytest.raises(ValueError) as e:
            tune(asked, MASK, out, progress=False)
        assert name in str(e.value)


def test_nothing_tells_whose_home_it_was(asked, tmp_path, monkeypatch):
    home = Path(asked.model).parent
    monkeypatch.setenv("HOME", str(home))
    facts = tune(asked_there := dataclasses.replace(asked, steps=1), MASK, tmp_path, progress=False)
    assert (
        (asked_there.model, asked_there.texts)
        == ("~/model", "~/texts.jsonl")
        == (facts["settings"]["model"], facts["settings"]["texts"])
    )
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and str(home).encode() in p.read_bytes()]
    kept = read_claim(tmp_path)["identity"]
    assert kept["model"] == named_content(asked.model) != "~/model", "~ is a folder that is looked into"
    assert kept["texts"] == named_content(asked.texts) != "~/texts.jsonl"
    assert tune(TuneSettings(**dataclasses.asdict(asked_there)), MASK, tmp_path, merge=True, progress=False)[
        "files"
    ] == ["losses.csv", "neurons.safetensors", "model"]


@pytest.mark.parametrize("kind", ["run", "study", None])
def test_a_folder_of_something_else_is_named_and_kept(asked, tmp_path, kind):
    "Of a run, of a study, of nobody."
    (tmp_path / "notes.txt").write_text("mine")
    if kind is not None:
        write_json(tmp_path / "claim.json", {"kind": kind, "identity": {}})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ClaimError) as e:
        tune(asked, MASK, tmp_path, progress=False)
    assert (e.value.folder, e.value.kind) == (str(tmp_path), kind)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name[0] != "."} == before


WRONG = {
    "model": "nowhere/model.gguf",
    "texts": "no-such-texts.jsonl",
    "neurons": NeuronMask.from_layers([torch.ones(7, dtype=torch.bool)] * 3, "mlp_hidden"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_slip_of_the_hand_claims_nothing(asked, whole, tmp_path, what):
    "A wrong name, or neurons of another model; then the same folder takes the right ones."
    settings, mask = (
        (asked, WRONG[what]) if what == "neurons" else (dataclasses.replace(asked, **{what: WRONG[what]}), MASK)
    )
    with pytest.raises((ValueError, OSError)):
        tune(settings, mask, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    assert tune(asked, MASK, tmp_path / "out", progress=False)["loss after"] == whole[0]["loss after"]


def test_one_training_at_a_time_in_a_folder(asked, whole, tmp_path):
    with hold(tmp_path), pytest.raises(BlockingIOError):
        tune(asked, MASK, tmp_path, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    with hold(whole[1]):  # and what is finished can be read
        load_neurons(load_model(asked.model)[0], whole[1] / "neurons.safetensors", verbose=False)


@pytest.mark.parametrize("mode", ["rest", "full"])
def test_other_modes_write_the_model(asked, tmp_path, mode):
    facts = tune(dataclasses.replace(asked, mode=mode, steps=2), MASK, tmp_path, progress=False)
    assert facts["files"] == ["losses.csv", "model"] and facts["frozen weights intact"] is (
        True if mode == "rest" else None
    )
    (base, tokenizer), (tuned, _) = load_model(asked.model), load_model(tmp_path / "model")
    assert loss_of(tuned, tokenizer, asked) == pytest.approx(facts["loss after"], rel=1e-6)
    rows = [(base.get_parameter(n), tuned.get_parameter(n)) for n in ("model.layers.0.mlp.up_proj.weight",)]
    same = torch.stack([(a == b).all(1) for a, b in rows])[0]
    assert same[:5].all() == (mode == "rest") and not same[5:].any()


@pytest.mark.parametrize("wrong", [dict(mode="some"), dict(steps=0), dict(lr=-1.0), dict(max_length=1)], ids=str)
def test_settings_are_checked(wrong):
    with pytest.raises(ArgumentError) as e:
        TuneSettings(**wrong)
    assert [e.value.argument] == list(wrong)
