"""Pins the command as a user meets it: a whole run on a tiny model, networks, masks, training, figures of a run and of the paper, verification; kill, Ctrl-C and resume; dry runs that keep their word; refusals at once, in the user's words, that leave nothing behind; exit codes, JSON."""

import inspect
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import typing
import warnings
from pathlib import Path

import families
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from llmfact_nb.cli import SETTINGS, app, in_options
from llmfact_nb.ablation import Settings
from llmfact_nb.masked_model import MaskedModel
from llmfact_nb.masks import NeuronMask
from llmfact_nb.show.paper_figures import invented_study
from llmfact_nb.base.resources import load_model
from llmfact_nb.command.run import read_found
from llmfact_nb.command.verify import verify
from llmfact_nb.study.whole import QUICK, StudyTexts, whole_study

LLMFACT = Path(sys.executable).with_name("llmfact")
OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1"}
WORDS = [f"w{i}" for i in range(90)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A saved random model and a text file: everything a run needs, offline."""
    folder = tmp_path_factory.mktemp("tiny")
    model = families.build("llama")
    model.generation_config.repetition_penalty = 8.0  # a checkpoint's own wish, which masked text must not follow
    model.save_pretrained(folder / "model")
    vocabulary = {"[UNK]": 0, "[PAD]": 1, **{w: i + 2 for i, w in enumerate(WORDS)}}
    words = Tokenizer(
        models.WordLevel({w: i for w, i in vocabulary.items() if i < model.config.vocab_size}, unk_token="[UNK]")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(
        folder / "model"
    )
    rng = random.Random(0)
    texts = "\n".join(json.dumps({"title": f"t{i}", "text": " ".join(rng.choices(WORDS, k=60))}) for i in range(40))
    (folder / "texts.jsonl").write_text(texts)
    return folder


def found_by(tiny: Path) -> str:
    return f"--model {tiny / 'model'} --texts {tiny / 'texts.jsonl'} --k 4 --n-init 2 --fit-tokens 600 --eval-texts 4 --fraction 0.05"


def run_line(tiny: Path, out: Path) -> str:
    return f"run --out {out} {found_by(tiny)} --control-seeds 2"


def llmfact(line: str, code: int = 0):
    "The command in this process: (output stream, error stream)."
    done = CliRunner().invoke(app, shlex.split(line))
    assert done.exit_code == code and "Traceback" not in done.stderr, done.output
    return done.stdout, done.stderr


def process(line: str) -> subprocess.Popen:
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs are born deaf to Ctrl-C
    return subprocess.Popen(
        [LLMFACT, *shlex.split(line)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=OFFLINE,
        preexec_fn=heed,
    )


def ended(child: subprocess.Popen) -> tuple[int, str, str, int]:
    "(exit code, output stream, error stream, peak memory in bytes) of a process that comes to its end."
    out, err = child.stdout.read(), child.stderr.read()
    if child.returncode is not None:
        return child.returncode, out, err, 0  # it had ended before anybody waited for it
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode, out, err, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def wait_for(condition, child: subprocess.Popen, seconds: float = 300.0) -> None:
    end = time.time() + seconds
    while time.time() < end and child.poll() is None and not condition():
        time.sleep(0.05)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The folder of an uninterrupted run in a process of its own, what it printed, and its peak memory."""
    out = tmp_path_factory.mktemp("whole") / "run"
    code, printed, notes, peak = ended(process(run_line(tiny, out)))
    assert code == 0, notes
    return out, printed, notes, peak


def test_a_run_leaves_everything(whole):
    out, printed, notes, _ = whole
    figures = {p.name for p in (out / "figures").iterdir()}
    assert figures == {
        f"{n}.png" for n in ("maps", "units_per_layer", "damage", "time_courses", "connectivity", "stability")
    }
    results, manifest = pd.read_csv(out / "results.csv"), json.loads((out / "manifest.json").read_text())
    assert set(results.arm) == {
        "unmasked",
        "key",
        "random",
        "matched random",
        "matched shuffle",
        "top variance",
        "PCA",
        "keep key",
        "keep random",
        "all off",
    }
    for _, row in results[results.arm != "unmasked"].iterrows():
        assert sum(map(int, row.counts.split())) == row.units
    assert {"model", "texts", "seeds", "versions", "settings", "found", "machine"} <= set(manifest)
    assert (
        "matched random" in printed
        and str(out / "report.html") in printed
        and "loading" not in printed
        and "loading" in notes
    )
    page = (out / "networks.html").read_text()
    assert (
        str(out / "networks.html") in printed
        and "w7" in page
        and 'src="http' not in page
        and page.count('<th scope="row">') >= 4
    )
    assert not [p for p in out.rglob("*") if p.name.endswith(".partial")]


def test_the_same_command_resumes_and_another_is_refused(tiny, whole):
    out = whole[0]
    before = (out / "results.csv").read_text()
    printed, notes = llmfact(run_line(tiny, out) + " --json")
    assert (out / "results.csv").read_text() == before and json.loads(printed)["report"] == str(out / "report.html")
    assert "loading" not in notes, "nothing is missing, so the model need not be loaded"
    _, said = llmfact(run_line(tiny, out) + " --k 3", 1)
    assert "(--k: 4 there, 3 now)" in said and len(said.strip().splitlines()) == 1
    assert "(--k: 4 there, 3 now)" in llmfact(run_line(tiny, out) + " --k 3 --dry-run", 1)[1], (
        "a dry run refuses what the run would"
    )


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 10))])
def test_interrupted_runs_end_with_the_same_table(tiny, whole, tmp_path, seed):
    """Ctrl-C once and a kill once, at random moments; then the command is given again."""
    rng, out = random.Random(seed), tmp_path / "run"
    for how in (signal.SIGINT, signal.SIGKILL):
        child = process(run_line(tiny, out))
        if how == signal.SIGKILL:
            wait_for((out / "settings.json").exists, child)  # networks are found
        else:
            child.stderr.readline()  # the imports are over when it says what it loads
        time.sleep(rng.uniform(0, 4))
        child.send_signal(how)
        code, _, said, _ = ended(child)
        if how == signal.SIGINT and code != 0:
            assert code == 130 and "the same command goes on" in said and "Traceback" not in said
    llmfact(run_line(tiny, out))
    ours, theirs = (pd.read_csv(p / "results.csv") for p in (out, whole[0]))
    pd.testing.assert_frame_equal(ours, theirs, check_exact=False, rtol=1e-4, atol=1e-5)


def test_a_dry_run_does_nothing_and_its_bounds_are_kept(tiny, whole, tmp_path):
    out, _, _, peak = whole
    printed, _ = llmfact(f"{run_line(tiny, tmp_path / 'no')} --dry-run --json")
    bill = json.loads(printed)
    assert not (tmp_path / "no").exists() and bill["download"] == 0
    assert peak <= bill["memory"], "peak memory"
    assert sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) <= bill["disk"]
    found = json.loads((out / "parts" / "facts.json").read_text())
    assert 4 * found["tokens"] * found["neurons"] <= bill["activations"]
    scored = len(list((out / "parts" / "arms").glob("*.safetensors")))
    assert scored == 1 + 3 * (6 + 3 * 2) and f"those {scored} times more" in bill["passes"]


def test_networks_are_the_first_half_of_a_run(tiny, tmp_path):
    out, page = tmp_path / "run", tmp_path / "page.html"
    printed, _ = llmfact(f"networks --out {out} {found_by(tiny)} --html {page}")
    assert "4 networks" in printed and "most active" in printed and str(page) in printed
    text = page.read_text()
    assert len(text) > 2000 and 'src="http' not in text and "w7" in text
    listed = json.loads(llmfact(f"networks --out {out} --json")[0])
    assert [n["network"] for n in listed["networks"]] == [0, 1, 2, 3] and listed["settings"]["n_components"] == 4
    at = (out / "networks.safetensors").stat().st_mtime_ns
    assert (
        "goes on" in llmfact(f"figures {out}", 1)[1] and f"`llmfact run --out {out}`" in llmfact(f"info --out {out}")[0]
    )
    llmfact(f"run --out {out} {found_by(tiny)}")
    assert (out / "networks.safetensors").stat().st_mtime_ns == at and "a finished run" in llmfact(f"info {out}")[0]


def test_figures_come_again_from_the_tables(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    drawn = {p.relative_to(out): p.read_bytes() for p in [out / "report.html", *(out / "figures").iterdir()]}
    for name in drawn:
        (out / name).unlink()
    (out / "settings.json").write_text(
        (out / "settings.json").read_text().replace("tiny", "gone")
    )  # the model is not needed
    printed, _ = llmfact(f"figures {out} --json")
    assert {Path(p).relative_to(out) for p in json.loads(printed)["files"]} == set(drawn)
    assert all(
        (out / name).read_bytes() == drawn[name]
        for name in (Path("figures/damage.png"), Path("figures/connectivity.png"))
    )


def test_a_masked_text_is_that_of_the_masked_model(tiny, whole, tmp_path):
    line = f"mask --out {whole[0]} --network 0 --network 2 --alpha 1.5"
    answer = json.loads(
        llmfact(
            f"{line} --generate 'w5 w6 w7' --tokens 6 --texts {tiny / 'texts.jsonl'} --eval-texts 3 --save {tmp_path / 'm.safetensors'} --json"
        )[0]
    )
    _, found = read_found(whole[0])
    masks, (model, tokenizer) = found.networks.masks(1.5, "positive"), load_model(tiny / "model")
    chosen = masks[0] | masks[2]
    assert (
        NeuronMask.load(tmp_path / "m.safetensors") == chosen
        and answer["units"] == chosen.n
        and answer["units_by_layer"] == {str(d): n for d, n in enumerate(chosen.counts) if n}
    )
    texts = {row["arm"]: row["text"] for row in answer["texts"]}
    ids = tokenizer("w5 w6 w7", return_tensors="pt").input_ids

    def written():
        new = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            repetition_penalty=1.0,
            pad_token_id=1,
        )
        return tokenizer.decode(new[0, 3:], skip_special_tokens=True)

    assert texts["unmasked"] == written()
    with MaskedModel(model).ablate(chosen, found.mean, "after-first"):
        assert texts["networks 0, 2"] == written()
    with MaskedModel(model).ablate(chosen.matched_random(0), found.mean, "after-first"):
        assert texts["random"] == written()
    assert set(texts) == {"unmasked", "networks 0, 2", "random", "matched random"}
    damage = {row["arm"]: row["damage"] for row in answer["damage"]}
    assert set(damage) == set(texts) and damage["unmasked"] == 0 and damage["networks 0, 2"] != damage["random"]


def test_a_mask_by_file_by_key_and_amplified(whole, tmp_path):
    out = whole[0]
    saved = tmp_path / "key.safetensors"
    key = json.loads(llmfact(f"mask --out {out} --key --save {saved} --json")[0])
    again = json.loads(
        llmfact(f"mask --out {out} --file {saved} --mode amplify --gain 3 --replace zero --positions all --json")[0]
    )
    assert key["units"] == again["units"] == json.loads((out / "parts" / "facts.json").read_text())["key neurons"]
    assert (key["mode"], key["replace"], key["positions"]) == ("ablate", "mean", "after-first") and (
        again["mode"],
        again["gain"],
        again["positions"],
    ) == ("amplify", 3.0, "all")
    drawn = [
        llmfact(f"mask --out {out} --key --generate w9 --temperature 2 --tokens 8 --seed {s} --json")[0]
        for s in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_finetune_trains_the_key_neurons_of_a_run(tiny, whole, tmp_path):
    line = f"finetune --run {whole[0]} --texts {tiny / 'texts.jsonl'} --out {tmp_path / 't'} --steps 4 --batch-size 2 --max-length 16 --eval-windows 6 --lr 0.02"
    bill = json.loads(llmfact(f"{line} --dry-run --json")[0])
    assert not (tmp_path / "t").exists() and bill["tokens"] == 4 * 2 * 16 + 2 * 6 * 16
    facts = json.loads(llmfact(f"{line} --json")[0])
    key = read_found(whole[0])[1].networks.key_neurons(fraction=0.05)
    assert (
        facts["neurons"] == {"key": key.n}
        and facts["trained_parameters"] == key.n * 3 * families.D
        and facts["frozen_weights_intact"] is True
    )
    assert facts["loss_after"] != facts["loss_before"] and sorted(p.name for p in (tmp_path / "t").iterdir()) == [
        "losses.csv",
        "neurons.safetensors",
        "settings.json",
        "start.json",
        "tuned.json",
    ]
    assert sum(p.stat().st_size for p in (tmp_path / "t").rglob("*") if p.is_file()) <= bill["disk"]
    printed, _ = llmfact(line)
    assert "bit for bit" in printed and f"{facts['loss_after']:.4f} after 4 steps" in printed
    told = llmfact(f"info {tmp_path / 't'}")[0]
    assert "fine-tuning" in told and f"{facts['loss_after']:.4f}" in told and not re.search(r"\d\.\d{5}", told)
    assert "--lr: 0.02 there, 0.01 now" in llmfact(line.replace("0.02", "0.01"), 1)[1]
    assert (
        "holds a run" in llmfact(f"finetune --run {whole[0]} --out {whole[0]}", 1)[1]
        and "holds something else" in llmfact(run_line(tiny, tmp_path / "t"), 1)[1]
    )


def test_verify_confirms_a_run_or_ends_with_1(whole, tmp_path):
    before = {p: p.read_bytes() for p in whole[0].rglob("*") if p.is_file()}
    printed, _ = llmfact(f"verify {whole[0]} --sample 2")
    assert printed.splitlines()[-1] == "The numbers are confirmed." and "environment: " in printed.splitlines()[0]
    answer = json.loads(llmfact(f"verify --out {whole[0]} --sample 2 --json")[0])
    table = verify(whole[0], sample=2)
    assert (
        answer["confirmed"] is True
        and answer["disagreements"] == 0
        and [(c["part"], c["what"], c["verdict"]) for c in answer["checks"]]
        == list(zip(table.part, table.what, table.verdict))
    )
    assert {p: p.read_bytes() for p in whole[0].rglob("*") if p.is_file()} == before, "nothing is written"
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    (out / "networks.csv").write_text("something else")
    printed, notes = llmfact(f"verify {out} --sample 0 --quiet", 1)
    assert printed.splitlines()[-1] == "NOT confirmed: 1 differs." and "networks.csv" in printed and not notes
    answer = json.loads(llmfact(f"verify {out} --sample 0 --json", 1)[0])
    assert answer["confirmed"] is False and [
        c["what"] for c in answer["checks"] if c["verdict"] == "differs" and c["part"] != "environment"
    ] == ["networks.csv"]


def test_a_moved_model_and_code_of_a_checkpoint_are_asked_for(tiny, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    settings = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps(settings | {"model": str(tmp_path / "gone")}))
    assert "gone" in llmfact(f"verify {out} --sample 0", 1)[1]
    printed, _ = llmfact(f"verify {out} --sample 0 --model {tiny / 'model'}", 1)
    assert printed.splitlines()[-1] == "NOT confirmed: 1 differs." and "settings.json" in printed, (
        "of the model nothing differs"
    )
    (out / "settings.json").write_text(json.dumps(settings | {"trust_remote_code": True}))
    assert "give --trust-remote-code" in llmfact(f"verify {out} --sample 0", 1)[1]


def test_the_defaults_of_verify_are_those_of_the_library():
    command = next(c.callback for c in app.registered_commands if c.callback.__name__ == "verify")
    ours, theirs = (inspect.signature(f).parameters for f in (command, verify))
    assert all(
        ours[name].default == theirs[name].default
        for name in ("sample", "seed", "tolerance", "model", "device", "refit")
    )


def test_output_streams(tiny, whole):
    out = whole[0]
    line = f"mask --out {out} --key --generate w9 --tokens 2 --texts {tiny / 'texts.jsonl'} --eval-texts 30"  # there are fewer
    printed, notes = llmfact(f"{line} --quiet")
    assert "w9" in printed and not notes
    assert "note:" in llmfact(line)[1]
    printed, notes = llmfact(f"--json mask --out {out} --key --generate w9 --tokens 2")
    assert json.loads(printed)["texts"][0]["prompt"] == "w9" and "loading" in notes and len(printed.splitlines()) == 1


@pytest.mark.parametrize(
    "line, code, says",
    [
        ("run --preset papr", 2, "--preset 'papr'|Did you mean 'paper'?"),
        ("run --site mlp_hiden", 2, "--site|accepted: 'mlp_hidden', 'mlp_out'|Did you mean 'mlp_hidden'?"),
        ("run --tail positiv", 2, "Did you mean 'positive'?"),
        ("run --exclude sink", 2, "'sinks', 'first', 'none'"),
        ("run --alpha -1", 2, "--alpha -1"),
        ("run --k 0", 2, "--k 0"),
        ("run --k many", 2, "--k needs a whole number"),
        ("run --k 700 --fit-tokens 600", 2, "--k 700 is above --fit-tokens 600"),
        ("run --alpha 2 --fraction 0.1", 2, "--alpha 2.0 and --fraction 0.1"),
        ("run --tail raw", 2, "--tail 'raw' belongs to --alpha"),
        ("run --nonsense", 2, "--nonsense"),
        ("run --mdel x", 2, "Did you mean --model?"),
        ("run --device cudaa --out OUT", 2, "--device 'cudaa'"),
        ("rum", 2, "rum"),
        ("fetch no-such-thing", 2, "no-such-thing"),
        ("fetch wiki smolm2", 2, "'smolm2'|Did you mean 'smollm2-135m'?"),
        ("run --texts no-such-texts --out OUT", 1, "no-such-texts"),
        ("run --texts TEXTS2 --out OUT", 2, "there is no such file|Did you mean 'texts.jsonl'?"),
        ("run --texts wikki --dry-run", 2, "--texts 'wikki'|Did you mean 'wiki'?"),
        ("run --texts smollm2-135m --dry-run", 2, "belongs to something else (model)"),
        ("run --model smolm2-135m --dry-run --out OUT", 2, "--model 'smolm2-135m'|Did you mean 'smollm2-135m'?"),
        ("run --model owner/none --dry-run --out OUT", 1, "--model 'owner/none'|the hub cannot be asked"),
        ("run --model no-such-model --texts TEXTS --out OUT", 1, "no-such-model"),
        ("run --model BROKEN --texts TEXTS --out OUT", 1, "--model"),
        ("run --out BLOCKED --model MODEL --texts TEXTS", 1, "cannot be written"),
        ("networks --html HERE", 2, "--html|is a folder"),
        ("mask --network 3 --out OUT", 1, "llmfact networks --out"),
        ("mask --out RUN", 2, "--network 3"),
        ("mask --network 9 --out RUN", 2, "holds 4 networks, 0 to 3"),
        ("mask --key --network 0 --out RUN", 2, "in one way"),
        ("mask --key --gain 2 --out RUN", 2, "--gain"),
        ("mask --key --mode kepp --out RUN", 2, "--mode|Did you mean 'keep'?"),
        ("mask --key --tokens 0 --out RUN", 2, "--tokens 0"),
        ("mask --key --generate= --out RUN", 2, "--generate"),
        ("mask --key --device cudaa --out RUN", 2, "--device"),
        ("mask --network 0 --alpha 1000 --out RUN", 1, "lower --alpha"),
        ("finetune --run OUT", 1, "holds no networks"),
        ("finetune --run RUN --texts nowhere.txt --dry-run", 2, "--texts 'nowhere.txt'"),
        ("finetune --lr 0", 2, "--lr 0"),
        ("finetune --mode full --key", 2, "everything trains"),
        ("figures OUT", 1, "holds no run|llmfact run --out|figures --model"),
        ("figures --model MODEL --out RUN", 1, "holds a run"),
        ("figures --quick", 2, "--quick belongs to --model"),
        ("figures --dry-run", 2, "--dry-run belongs to --model"),
        ("figures --model smolm2-135m --dry-run", 2, "--model 'smolm2-135m'"),
        ("figures --model MODEL --dry-run --out RUN", 1, "holds a run"),
        ("verify OUT", 1, "there is no such folder"),
        ("verify HERE", 1, "holds no run"),
        ("verify RUN --out OUT", 2, "--out|name one"),
        ("verify RUN --sample -1", 2, "--sample -1"),
        ("verify RUN --tolerance many", 2, "--tolerance needs a number"),
        ("verify RUN --device cudaa", 2, "--device 'cudaa'"),
        ("verify RUN --model smolm2-135m", 2, "--model 'smolm2-135m'"),
        ("info OUT", 1, "is no folder"),
        ("info --out HERE", 1, "nothing that is known"),
    ],
)
def test_refusals_are_one_line(line, code, says, tiny, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    if "BROKEN" in line:
        shutil.copytree(tiny / "model", tmp_path / "broken")
        (tmp_path / "broken" / "model.safetensors").write_bytes(b"no weights")
    places = {
        "OUT": tmp_path / "new",
        "TEXTS": tiny / "texts.jsonl",
        "TEXTS2": tiny / "text.jsonl",
        "MODEL": tiny / "model",
        "RUN": whole[0],
        "BLOCKED": tmp_path / "file" / "run",
        "HERE": tmp_path,
        "BROKEN": tmp_path / "broken",
    }
    printed, said = llmfact(" ".join(str(places.get(a, a)) for a in line.split()), code)
    assert (
        not printed
        and len([x for x in said.splitlines() if x.startswith("error:")]) == 1
        and "n_components" not in said
    )
    assert all(part in " ".join(said.split()) for part in says.split("|")), said
    assert {p.name for p in tmp_path.iterdir()} <= {"file", "broken"}, "nothing was computed, so nothing is left"


def test_messages_speak_of_options():
    shown, typed = (
        {"k": "--k", "model": "--model", "texts": "--texts", "names": "", "n_init": "--n-init"},
        {"model": "lama", "texts": None, "names": ["wikki"]},
    )
    assert in_options("n_components=3, n_init=0 and max_length=9", shown, typed) == "--k 3, --n-init 0 and max_length=9"
    assert (
        in_options("name='lama' is gone; name='wikki' is not here; name='other'", shown, typed)
        == "--model 'lama' is gone; 'wikki' is not here; 'other'"
    )
    assert (
        in_options("the file /a/n_init.json and 'n_init' stay, n_init is named", shown, typed)
        == "the file /a/n_init.json and 'n_init' stay, --n-init is named"
    )


def test_a_file_that_nobody_typed_is_no_option():
    shown = {"html": "--html", "out": "--out", "file": "--file", "model": "--model"}
    values = {"html": None, "out": Path("out/run"), "file": Path("m.safetensors"), "model": "lama"}
    at = "'out/run/networks.safetensors' is damaged"
    for one in ("html", "file"):
        assert in_options(f"path={at}", {one: shown[one]}, values) == at
    assert (
        in_options(f"path={at}", shown, values) == at
        and in_options("folder='out/run/parts' is in use", shown, values) == "'out/run/parts' is in use"
    )
    assert in_options("path='m.safetensors' is damaged", shown, values) == "--file 'm.safetensors' is damaged"
    assert (
        in_options("folder='out/run' is in use; name='other'", {"out": "--out", "model": "--model"}, values)
        == "--out 'out/run' is in use; 'other'"
    )


def test_choices_are_those_of_the_library():
    for field, how in SETTINGS.values():
        for value in (typing.get_args(how)[1].metavar or "").split("|"):
            kept = {"exclude": None} if value == "none" else {field: value} if value else {}
            Settings(**kept | ({"alpha": 2.0, "fraction": None} if field == "tail" else {}))
    options = {
        name: set(re.findall(r"^  (--[\w-]+)", llmfact(f"{name} --help")[0], re.M)) for name in ("run", "networks")
    }
    assert options["run"] - options["networks"] == {"--control-seeds"} and options["networks"] - options["run"] == {
        "--html"
    }


def test_names_in_json_are_snake_case(tiny, whole):
    answers = [
        json.loads(llmfact(f"{line} --json")[0])
        for line in (
            run_line(tiny, whole[0]),
            f"networks --out {whole[0]}",
            f"mask --out {whole[0]} --key",
            f"info {whole[0]}",
            "info",
            f"{run_line(tiny, whole[0])} --dry-run",
            f"figures --model {tiny / 'model'} --quick --dry-run",
            f"verify {whole[0]} --sample 0",
        )
    ]
    by_data = {
        "units_by_layer",
        "bytes",
        "fetched",
        "model_files",
        "text_files",
        "match_of_the_controls",
    }  # the names in these are layers, files, resources, arms

    def names(value) -> set[str]:
        if isinstance(value, list):
            return set().union(*map(names, value))
        return (
            set(value).union(*(names(v) for k, v in value.items() if k not in by_data))
            if isinstance(value, dict)
            else set()
        )

    assert not {name for answer in answers for name in names(answer) if not re.fullmatch(r"[a-z][a-z0-9_]*", name)}


def test_the_figures_of_the_paper(tiny, tmp_path, monkeypatch):
    """A study's folder is drawn as it is; with --model it is run first, once, and not for another model."""
    runs = []

    def study(model, tokenizer, folder, settings, **_):
        runs.append((model.config.model_type, settings.recurrence_texts))
        (Path(folder) / "tables").mkdir(parents=True, exist_ok=True)
        invented_study()["preservation"].to_csv(
            Path(folder) / "tables" / "preservation.csv", index=False
        )  # of the others the command says that they are missing

    monkeypatch.setattr("llmfact_nb.study.whole.whole_study", study)
    out = tmp_path / "paper"
    answer = json.loads(llmfact(f"figures --model {tiny / 'model'} --quick --out {out} --json")[0])
    assert (
        str(out / "figures" / "fig-3-preservation.png") in answer["files"]
        and "samples" in answer["missing"]["fig-4-5-generations.png"]
    )
    drawn = (out / "figures" / "fig-3-preservation.png").read_bytes()
    shutil.rmtree(out / "figures")
    llmfact(f"figures {out}")
    assert (out / "figures" / "fig-3-preservation.png").read_bytes() == drawn and runs == [("llama", 1)]
    assert (
        "--quick: True there, False now" in llmfact(f"figures --model {tiny / 'model'} --out {out}", 1)[1]
        and "studies of the paper" in llmfact(f"info {out}")[0]
    )


def test_a_dry_run_of_the_paper_keeps_its_word(tiny, tmp_path, monkeypatch, capsys):
    "What the studies count when they begin, with the model and the texts at hand, is no more than was said without them."
    wiki = [json.loads(line)["text"] for line in (tiny / "texts.jsonl").read_text().splitlines()]
    kinds = ("wiki", "speeches", "reviews", "code")
    texts = StudyTexts(
        {k: wiki[:20] for k in kinds},
        {k: [f"w{i} {t}" for t in wiki[20:]] for i, k in enumerate(kinds)},
        [(t, i % 2) for i, t in enumerate(wiki[:10])],
        "{text}",
        ["w1", "w2"],
    )
    bill = json.loads(llmfact(f"figures --model {tiny / 'model'} --quick --dry-run --out {tmp_path / 'no'} --json")[0])
    assert not (tmp_path / "no").exists()
    model, tokenizer = load_model(tiny / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole_study(model, tokenizer, tmp_path / "paper", QUICK, texts)
    said = capsys.readouterr().err
    counted = [
        tuple(int(n.replace(",", "")) for n in found)
        for found in re.findall(r": ([\d,]+) measurements, ([\d,]+) tokens", said)
    ]
    arms, tokens = map(sum, zip(*counted))
    assert (
        f"the rest for {arms} measurements" in bill["passes"]
        and 0.5 * arms < len(list((tmp_path / "paper" / "scores").glob("*.safetensors"))) <= arms
    )
    assert 0.3 * bill["tokens"] < tokens <= bill["tokens"]
    assert sum(p.stat().st_size for p in (tmp_path / "paper").rglob("*") if p.is_file()) <= bill["disk"]


def test_debug_shows_the_trace_wherever_it_stands():
    for line in ("--debug run --tail raw", "run --tail raw --debug"):
        assert isinstance(CliRunner().invoke(app, line.split()).exception, ValueError)
    assert isinstance(CliRunner().invoke(app, ["run", "--tail", "raw"]).exception, SystemExit), "it is not remembered"


def test_a_damaged_part_is_named(tiny, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    arm = next((out / "parts" / "arms").glob("key-*.safetensors"))
    arm.write_bytes(arm.read_bytes()[:-10])
    _, said = llmfact(run_line(tiny, out), 1)
    assert arm.name in said and "damaged" in said


def test_damaged_networks_are_no_option(tiny, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    (out / "networks.safetensors").write_bytes((out / "networks.safetensors").read_bytes()[:-10])
    for line in (f"networks --out {out}", f"mask --out {out} --key", f"finetune --run {out} --out {tmp_path / 't'}"):
        said = llmfact(line, 1)[1]
        assert f"error: '{out / 'networks.safetensors'}' is damaged" in said, said


def test_incomplete_notes_are_named(tiny, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    runs, tuned = (f"networks --out {out}", run_line(tiny, out)), tmp_path / "tuned"
    llmfact(f"finetune --run {whole[0]} --texts {tiny / 'texts.jsonl'} --steps 1 --out {tuned}")
    tunings = (f"finetune --run {whole[0]} --texts {tiny / 'texts.jsonl'} --steps 1 --out {tuned}", f"info {tuned}")
    cases = [
        (out / "parts" / "facts.json", "{}", runs, "tokens used"),
        (out / "settings.json", '{"conditions": []}', (f"info {out}",), "control_seeds"),
        (tuned / "tuned.json", "{}", tunings, "loss before"),
    ]
    for path, content, lines, lacks in cases:
        before = path.read_text()
        path.write_text(content)
        for line in lines:
            said = llmfact(line, 1)[1]
            assert f"{path} is incomplete: it lacks" in said and lacks in said, said
        path.write_text(before)


def test_help_teaches_and_is_light():
    code = """
import sys
from llmfact_nb.cli import app
from typer.testing import CliRunner
for name in ("run", "networks", "mask", "finetune", "figures", "verify", "fetch", "info"):
    text = CliRunner().invoke(app, [name, "--help"]).output
    assert f"\\n  llmfact {name}" in text and "Exit codes" in text and "--json" in text, name
    assert name in ("figures", "fetch", "info") or "default" in text
print([m for m in ("torch", "transformers", "pandas", "matplotlib", "rich") if m in sys.modules])
"""
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"
    )
