"""Pins the command as a user meets it: a whole run on a tiny model, networks, masks, training, figures, verification;
kill, Ctrl-C and resume; dry runs that keep their word; refusals at once, in the user's words, that leave nothing
behind; exit codes, JSON."""

import dataclasses
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
import warnings
from pathlib import Path

import families
import pandas as pd
import pytest
import torch
from small_runs import WORDS, llmfact, small_world
from typer.testing import CliRunner

from llmfact_nb.ablation import Settings
from llmfact_nb.base.arguments import ArgumentError
from llmfact_nb.base.models import load_model
from llmfact_nb.base.tokens import token_counts
from llmfact_nb.cli import FIELD, SETTINGS
from llmfact_nb.command.cost import model_size
from llmfact_nb.command.run import read_found
from llmfact_nb.cli import app
from llmfact_nb.command.verification import verify_folder
from llmfact_nb.masked_model import MaskedModel
from llmfact_nb.masks import NeuronMask
from llmfact_nb.study.plan import QUICK, StudyTexts
from llmfact_nb.study.whole import paper_study

LLMFACT = Path(sys.executable).with_name("llmfact")
OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1"}
PAPER = Path(__file__).parent.parent / "nbs" / "tutorials" / "paper"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("tiny"))


def test_a_txt_file_is_read_as_the_option_says(tiny, tmp_path):
    "One text a line is one document, without an eval part, until --documents says lines."
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(f"w5 w6 w{7 + i}" for i in range(30)))
    for line in ("networks", "finetune --mode full"):
        line += f" --model {tiny / 'model'} --texts {path} --out {tmp_path / 'out'} --dry-run"
        llmfact(line, code=1)
        llmfact(f"{line} --documents lines")


def test_a_multimodal_model_is_run_on_its_text(tiny, tmp_path):
    "Its language model is found in what transformers loads for images and texts."
    from transformers import AutoConfig, AutoModelForImageTextToText
    from small_runs import word_tokenizer

    text = {"model_type": "llama", "vocab_size": families.VOCAB, "num_key_value_heads": 1, "num_attention_heads": 2}
    text |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "max_position_embeddings": 64}
    eyes = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    eyes |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = AutoConfig.for_model("llava", text_config=text, vision_config=eyes, image_token_index=7)
    families.shake(AutoModelForImageTextToText.from_config(config)).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    few = "--k 3 --n-init 1 --fit-tokens 300 --eval-texts 3 --fraction 0.1"
    line = f"networks --model {tmp_path / 'model'} --texts {tiny / 'texts.jsonl'} {few} --out {tmp_path / 'out'}"
    llmfact(f"{line} --dry-run")
    llmfact(line)
    assert len(read_found(tmp_path / "out")[1].networks.maps_) == 3


def found_by(tiny: Path) -> str:
    few = "--k 4 --n-init 2 --fit-tokens 600 --eval-texts 4 --fraction 0.05"
    return f"--model {tiny / 'model'} --texts {tiny / 'texts.jsonl'} {few}"


def run_line(tiny: Path, out: Path) -> str:
    return f"run --out {out} {found_by(tiny)} --control-seeds 2"


def process(line: str, **more) -> subprocess.Popen:
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs are born deaf to Ctrl-C
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": OFFLINE} | more
    return subprocess.Popen([LLMFACT, *shlex.split(line)], preexec_fn=heed, **streams)


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


@pytest.fixture
def copied(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    return tmp_path / "run"


def test_group_and_shards(tiny, tmp_path):
    line = f"networks {found_by(tiny)} --out {tmp_path / 'out'}"
    assert "--group" in llmfact(f"{line} --shards 3", 2)[1]
    assert "in 3 shards" in llmfact(f"{line} --group --shards 3 --dry-run")[0]
    said = llmfact(f"{line} --group --shards 3")[1]
    assert "group ICA: 6 of 6 shard" in said
    settings, found = read_found(tmp_path / "out")
    assert len(found.networks.maps_) == settings.n_components == 4
    llmfact(f"{line} --group --shards 2", 1)  # another group


def test_a_run_in_bfloat16_keeps_its_type(tiny, tmp_path):
    line = run_line(tiny, tmp_path / "out")
    bound = lambda of: json.loads(llmfact(f"{line} --dtype {of} --dry-run --json")[0])["memory"]
    saved = 2 * model_size(str(tiny / "model")).parameters
    assert bound("float32") - bound("bfloat16") == saved
    line = f"networks {found_by(tiny)} --out {tmp_path / 'out'}"
    assert bound("float32") - bound("bfloat16") == saved
    line = run_line(tiny, tmp_path / "out")
    llmfact(f"{line} --dtype bfloat16 --eval-length 30")
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["dtype"] == "bfloat16"
    assert "--dtype" in llmfact(f"{line} --eval-length 30", 1)[1], "another type is another run"
    out = tmp_path / "out"
    llmfact(f"verify {out}")
    llmfact(f"networks --out {out} --html {tmp_path / 'page.html'}")
    llmfact(f"mask --key --generate 'w5 w6' --tokens 3 --out {out}")
    llmfact(f"finetune --run {out} --texts {tiny / 'texts.jsonl'} --steps 2 --out {tmp_path / 'tuned'}")
    llmfact(f"prune --run {out} --share 0.2 --out {tmp_path / 'pruned'}")
    assert "accepted: 'float32', 'bfloat16'" in llmfact(f"{line} --dtype float16", 2)[1]


def test_the_default_type_may_be_said(tiny, copied, whole):
    before = {path: path.stat().st_mtime_ns for path in (copied / "parts" / "scores").iterdir()}
    llmfact(f"{run_line(tiny, copied)} --dtype float32")
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_run_leaves_everything(whole):
    out, printed, notes, _ = whole
    figures = {p.stem for p in (out / "figures").iterdir()}
    assert figures == {"maps", "units_per_layer", "damage", "time_courses", "connectivity", "stability"}
    results, manifest = pd.read_csv(out / "results.csv"), json.loads((out / "manifest.json").read_text())
    arms = {"unmasked", "key", "random", "matched random", "matched permuted", "top variance", "PCA"}
    assert set(results.arm) == arms | {"keep key", "keep random", "all off"}
    for _, row in results[results.arm != "unmasked"].iterrows():
        assert sum(map(int, row.counts.split())) == row.units
    assert {"model", "texts", "seeds", "versions", "settings", "found", "machine"} <= set(manifest)
    assert "matched random" in printed and str(out / "report.html") in printed
    assert "loading" not in printed and "loading" in notes
    page = (out / "networks.html").read_text()
    assert str(out / "networks.html") in printed and "w7" in page and 'src="http' not in page
    assert not [p for p in out.rglob("*") if p.name.endswith(".partial")]


def test_key_neurons_are_compared_document_by_document(whole):
    table, results = pd.read_csv(whole[0] / "differences.csv"), pd.read_csv(whole[0] / "results.csv")
    for row in table.itertuples():
        here = results[(results["replace"] == row.replace) & (results.positions == row.positions)]
        drawn = here[here.arm == row.against]
        decides = row.against == "matched permuted" and row.replace == "mean"  # under the first condition
        assert row.seeds == len(drawn) == (19 if decides else 2)
        key = here[here.arm == "key"].damage.item()
        assert abs(row.difference - (key - drawn.damage.mean())) < 1e-9
        assert row.ci_low < row.difference < row.ci_high and 0 <= row.p <= 1
        assert (row.verdict != "undecided") == (row.p < 0.05)
        assert (drawn.key_minus - (key - drawn.damage)).abs().max() < 1e-9
        assert (drawn.key_minus_low < drawn.key_minus).all() and (drawn.key_minus < drawn.key_minus_high).all()
    assert len(table) == 9 and results[results.operation == "keep"].key_minus.isna().all()


@pytest.mark.extra
def test_two_processes_give_the_same_run(tiny, whole, tmp_path):
    llmfact(run_line(tiny, tmp_path / "two") + " --jobs 2")
    two, one = (pd.read_csv(folder / "differences.csv") for folder in (tmp_path / "two", whole[0]))
    pd.testing.assert_frame_equal(two, one, atol=1e-6)


def test_the_same_command_resumes_and_another_is_refused(tiny, whole):
    out = whole[0]
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    os.utime(tiny / "texts.jsonl", (1, 1))  # touching a file changes nothing
    printed, notes = llmfact(run_line(tiny, out) + " --json")
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert json.loads(printed)["report"] == str(out / "report.html")
    assert "loading" not in notes, "nothing is missing, so the model need not be loaded"
    for more in ("", " --dry-run"):
        said = llmfact(run_line(tiny, out) + " --k 3" + more, 1)[1]
        assert "--k" in said and len(said.strip().splitlines()) == 1


def test_other_texts_are_named_and_no_files_listed(tiny, whole, copied, tmp_path):
    others = tmp_path / "others.jsonl"
    shutil.copy(tiny / "texts.jsonl", others)
    line = run_line(tiny, copied).replace(str(tiny / "texts.jsonl"), str(others))
    assert "loading" not in llmfact(line)[1], "a copy holds the same texts, wherever it lies"
    assert json.loads((copied / "settings.json").read_text())["texts"] == str(others)
    assert set(pd.read_csv(copied / "results.csv").data) == {str(others)}
    others.write_text(others.read_text() + "\n" + json.dumps({"title": "more", "text": "w5 w6 w7"}))
    said = llmfact(line, 1)[1]
    assert "--texts" in said and "others.jsonl" in said and len(said.strip().splitlines()) == 1
    before = (tiny / "texts.jsonl").read_text()
    (tiny / "texts.jsonl").write_text(before + "\n" + json.dumps({"title": "more", "text": "w5 w6 w7"}))
    said = llmfact(run_line(tiny, whole[0]), 1)[1]
    (tiny / "texts.jsonl").write_text(before)
    assert "--texts" in said and "--model" not in said


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 10))])
def test_interrupted_runs_end_with_the_same_table(tiny, whole, tmp_path, seed):
    """Ctrl-C once and a kill once, at random moments; then the command is given again."""
    rng, out = random.Random(seed), tmp_path / "run"
    for how in (signal.SIGINT, signal.SIGKILL):
        child = process(run_line(tiny, out))
        if how == signal.SIGKILL:
            wait_for((out / "found.safetensors").exists, child)
        else:
            child.stderr.readline()  # the imports are over when it says what it loads
        time.sleep(rng.uniform(0, 3))
        child.send_signal(how)
        code, printed, said, _ = ended(child)
        if how == signal.SIGINT and code != 0:
            late = code == -signal.SIGINT and "report: " in printed  # all is done, and Python is closing down
            assert (code == 130 or late) and "Traceback" not in said
    llmfact(run_line(tiny, out))
    ours, theirs = (pd.read_csv(p / "results.csv") for p in (out, whole[0]))
    pd.testing.assert_frame_equal(ours, theirs, check_exact=False, rtol=1e-4, atol=1e-5)


@pytest.mark.extra
def test_ctrl_c_ends_a_run_with_jobs_and_the_same_command_resumes(tiny, whole, tmp_path):
    "At a terminal all processes get the signal."
    out = tmp_path / "run"
    child = process(f"{run_line(tiny, out)} --jobs 2", start_new_session=True)
    wait_for(lambda: any((out / "parts" / "scores").glob("*.safetensors")), child)
    os.killpg(child.pid, signal.SIGINT)
    code, _, said, _ = ended(child)
    assert code == 130 and "Traceback" not in said
    kept = {path: path.stat().st_mtime_ns for path in (out / "parts" / "scores").glob("*.safetensors")}
    llmfact(run_line(tiny, out))
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    ours, theirs = (pd.read_csv(p / "results.csv") for p in (out, whole[0]))
    pd.testing.assert_frame_equal(ours, theirs, check_exact=False, rtol=1e-4, atol=1e-5)


def test_a_dry_run_does_nothing_and_its_bounds_are_kept(tiny, whole, tmp_path):
    out, _, _, peak = whole
    bill = json.loads(llmfact(f"{run_line(tiny, tmp_path / 'no')} --dry-run --json")[0])
    assert not (tmp_path / "no").exists() and bill["download"] == 0
    assert peak <= bill["memory"], "peak memory"
    assert sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) <= bill["disk"]
    found = read_found(out)[1].facts
    assert 4 * found["tokens"] * found["neurons"] <= bill["activations"]
    scored = len(list((out / "parts" / "scores").glob("*.safetensors")))
    assert scored <= 1 + 3 * (6 + 3 * 2) + 17 and "54" in bill["passes"]  # equal masks are measured once


def test_a_matrix_that_does_not_fit_is_kept_on_disk(tiny, whole, tmp_path, monkeypatch):
    "And the table is the same."
    monkeypatch.setattr("llmfact_nb.command.run.free_memory", lambda: 1000)
    llmfact(run_line(tiny, tmp_path / "run"))
    ours, theirs = (pd.read_csv(p / "results.csv") for p in (tmp_path / "run", whole[0]))
    pd.testing.assert_frame_equal(ours, theirs, check_exact=False, rtol=1e-4, atol=1e-5)
    assert not list((tmp_path / "run" / "parts").glob("activations*"))


def test_networks_are_the_first_half_of_a_run(tiny, tmp_path):
    out, page = tmp_path / "run", tmp_path / "page.html"
    printed, _ = llmfact(f"networks --out {out} {found_by(tiny)} --html {page}")
    assert str(page) in printed
    assert 'src="http' not in page.read_text() and "w7" in page.read_text()
    listed = json.loads(llmfact(f"networks --out {out} --json")[0])
    assert [n["network"] for n in listed["networks"]] == [0, 1, 2, 3] and listed["settings"]["n_components"] == 4
    at = (out / "networks.safetensors").stat().st_mtime_ns
    assert (
        f"llmfact run --out {out}" in llmfact(f"figures {out}", 1)[1]
        and f"`llmfact run --out {out}`" in llmfact(f"info {out}")[0]
    )
    llmfact(f"run --out {out} {found_by(tiny)}")
    assert (out / "networks.safetensors").stat().st_mtime_ns == at and "report.html" in llmfact(f"info {out}")[0]


def test_titles_of_what_was_read_are_kept(tiny, whole):
    from llmfact_nb.base.texts import load_texts

    read = json.loads((whole[0] / "manifest.json").read_text())["documents"]
    parts = {
        part: load_texts(tiny / "texts.jsonl", split)["title"] for part, split in (("fit", "fit"), ("held out", "eval"))
    }
    assert all(read[part] == list(parts[part])[: len(read[part])] and read[part] for part in parts)
    assert read["held out"][-1] in (whole[0] / "report.html").read_text()


def test_documents_come_from_the_whole_folder(tiny, tmp_path):
    "Not from the first book of the alphabet; and a seed draws others, the same each time."
    books = tmp_path / "books"
    for book in "abcdef":
        for chapter in range(10):
            path = books / book / f"{chapter}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(" ".join(random.Random(f"{book}{chapter}").choices(WORDS, k=60)))
    read = {}
    for name, more in {"evenly": "", "one": "--shuffle 1", "again": "--shuffle 1", "two": "--shuffle 2"}.items():
        llmfact(f"networks {found_by(tiny)} --texts {books} --out {tmp_path / name} {more}")
        read[name] = json.loads((tmp_path / name / "parts" / "loaded.json").read_text())["documents"]["fit"]
    assert len(read["evenly"]) <= 15 and {title[0] for title in read["evenly"]} == set("abcdef")
    assert read["one"] == read["again"] != read["two"]


def test_a_column_of_another_name(tiny, tmp_path):
    rows = [json.loads(line) for line in (tiny / "texts.jsonl").read_text().splitlines()]
    renamed = tmp_path / "renamed.jsonl"
    renamed.write_text("\n".join(json.dumps({"title": r["title"], "body": r["text"], "text": "w2"}) for r in rows))
    listed = [
        json.loads(llmfact(f"networks {found_by(tiny)} --texts {texts} --out {tmp_path / name} --json")[0])["networks"]
        for name, texts in (("a", tiny / "texts.jsonl"), ("b", f"{renamed} --column body"))
    ]
    assert listed[0] == listed[1]


def test_a_network_without_units_is_said_to_have_none(tiny, tmp_path):
    "In the table, in what is suggested, and where its number is given."
    line = f"networks {found_by(tiny)}".replace("--fraction 0.05", "")
    llmfact(f"{line} --out {tmp_path / 'all'}")
    largest = read_found(tmp_path / "all")[1].networks.maps_.amax(1).sort().values
    one = f"--alpha {float(largest[-2:].mean())} --tail positive"  # passed by one network alone
    printed, notes = llmfact(f"{line} {one} --out {tmp_path / 'one'}")
    assert printed.count("no unit") == len(largest) - 1 and "empty" not in notes
    first = int(re.search(r"mask --network (\d+)", printed)[1])
    llmfact(f"mask --network {first} --out {tmp_path / 'one'}")
    for line in (f"mask --out {tmp_path / 'one'}", f"finetune --run {tmp_path / 'one'} --out {tmp_path / 't'}"):
        said = llmfact(f"{line} --network {(first + 1) % len(largest)}", 1)[1]
        assert f"units: {first}." in said and "--alpha" not in said


def test_what_to_do_if_the_ica_does_not_converge(tiny, tmp_path):
    "Is said once, in options of the command, with the number of restarts that was given."
    few = f"networks {found_by(tiny)} --out {tmp_path / 'n'} --max-iter 1"
    printed, notes = llmfact(few)
    assert printed.count("--max-iter") == 1 and "2 restarts" in printed and "max_iter" not in printed + notes
    assert "FastICA" not in notes and "did NOT converge" in printed.replace("ICA did", "did")


def test_nothing_is_said_twice(whole):
    said = [line.removeprefix("- ") for line in f"{whole[1]}\n{whole[2]}".splitlines() if line.endswith(".")]
    assert len(set(said)) == len(said) > 5


def test_a_model_with_few_positions_reads_short_texts(tiny, tmp_path):
    "As capture does: the texts are cut, and it is said."
    from transformers import GPT2Config, GPT2LMHeadModel

    short = tmp_path / "short"
    GPT2LMHeadModel(
        GPT2Config(n_positions=20, n_embd=16, n_layer=2, n_head=2, vocab_size=families.VOCAB)
    ).save_pretrained(short)
    for path in (tiny / "model").glob("token*"):
        shutil.copy(path, short)
    notes = llmfact(run_line(tiny, tmp_path / "run") + f" --model {short}")[1]
    assert "20 tokens" in notes
    llmfact(f"mask --out {tmp_path / 'run'} --key --texts {tiny / 'texts.jsonl'} --eval-texts 2")


def test_transformers_alarms_nobody(tiny, tmp_path, caplog):
    "Of a loss that it takes anyway, of a head that is not wanted, of texts that are longer than it reads."
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    sizes = {"n_positions": 20, "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": families.VOCAB}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path)
    for path in (tiny / "model").glob("token*"):
        shutil.copy(path, tmp_path)
    logging.enable_propagation()
    try:
        caplog.clear()
        model, tokenizer = load_model(tmp_path)
        ids = torch.tensor([[5, 6, 7]])
        model(ids, labels=ids)
        load_model(tiny / "model", task="base")
        token_counts(tokenizer, ["w5 " * 50])
    finally:
        logging.disable_propagation()
    assert not [r for r in caplog.records if r.name.startswith("transformers")]


def test_info_describes_a_model(tiny, tmp_path):
    from transformers import T5Config

    facts = json.loads(llmfact(f"info {tiny / 'model'} --json")[0])
    assert facts["kind"] == "model" and facts["family"] == "llama" and str(families.VOCAB) in facts["tokenizer"]
    assert f"{3 * families.HIDDEN:,}" in facts["mlp_hidden"] and f"{3 * families.D:,}" in facts["mlp_out"]
    assert facts["positions"] > 0 and "refused" not in facts
    T5Config().save_pretrained(tmp_path / "t5")
    facts = json.loads(llmfact(f"info {tmp_path / 't5'} --json")[0])
    assert "causal" in facts["refused"] and facts["family"] == "t5"


def test_info_loads_no_networks(whole, monkeypatch):
    monkeypatch.setattr("llmfact_nb.ablation.Found.load", lambda *_: pytest.fail("not needed"))
    llmfact(f"info {whole[0]}")


def test_line_breaks_and_zeros_in_what_mask_prints():
    from llmfact_nb.cli import damage_line, texts_shown

    (_, _, line) = texts_shown([{"prompt": "p", "arm": "key", "text": "one\n\ntwo"}])
    assert line.count("\u23ce") == 2
    row = {
        "arm": "key",
        "damage": -0.0001,
        "ci_low": -0.0004,
        "ci_high": 0.0,
        "above_vocabulary": False,
        "perplexity": 2,
    }
    assert "-0.000" not in damage_line(row) and "+0.000" not in damage_line(row)


def test_one_is_singular():
    from llmfact_nb.base.display import counted

    assert (counted(1, "step"), counted(0, "step"), counted(2000, "step")) == ("1 step", "0 steps", "2,000 steps")


@pytest.mark.parametrize("wrong", [0.3, 1.0, 4.0])
def test_the_time_left_is_right_after_the_first_minute(wrong, monkeypatch):
    "Within 30 %, also where the pace was guessed wrong; the guess says how one kind of work compares with the other."
    from llmfact_nb.base import display

    clock = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: clock[0])
    true = {"set": 9.0, "tok": 0.01}
    work = display.Overall({"set": 10, "tok": 30_000}, {unit: seconds * wrong for unit, seconds in true.items()})
    whole = 10 * 9.0 + 300
    for unit, n, size in (("set", 10, 1), ("tok", 60, 500)):
        for _ in range(n):
            clock[0] += true[unit] * size
            work.add(unit, size)
            if clock[0] > 60:
                assert abs(clock[0] + work.left - whole) <= 0.3 * whole
    assert work.left == 0 and "100%" in str(work)


def test_the_suggested_network_has_units(whole):
    printed = llmfact(f"networks --out {whole[0]}")[0]
    llmfact(re.search(r"next: llmfact (mask --network \d+ --out \S+)", printed)[1])


@pytest.mark.skipif(os.geteuid() == 0, reason="a superuser writes everywhere")
def test_a_finished_run_in_a_read_only_folder_is_listed(copied):
    for path in (copied, *copied.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    llmfact(f"networks --out {copied}")
    llmfact(f"mask --out {copied} --key")


def test_figures_come_again_from_the_tables(whole, copied):
    drawn = {p.relative_to(copied): p.read_bytes() for p in [copied / "report.html", *(copied / "figures").iterdir()]}
    for name in drawn:
        (copied / name).unlink()
    settings = copied / "settings.json"
    settings.write_text(settings.read_text().replace("tiny", "gone"))  # the model is not needed
    printed, _ = llmfact(f"figures {copied} --json")
    assert {Path(p).relative_to(copied) for p in json.loads(printed)["files"]} == set(drawn)
    for name in ("figures/damage.png", "figures/connectivity.png"):
        assert (copied / name).read_bytes() == drawn[Path(name)]


def test_a_masked_text_is_that_of_the_masked_model(tiny, whole, tmp_path):
    line = f"mask --out {whole[0]} --network 0 --network 2 --alpha 1.5 --tail positive --generate 'w5 w6 w7' --tokens 6"
    more = f"--texts {tiny / 'texts.jsonl'} --eval-texts 3 --save {tmp_path / 'm.safetensors'} --json"
    answer = json.loads(llmfact(f"{line} {more}")[0])
    _, found = read_found(whole[0])
    masks, (model, tokenizer) = found.networks.masks(1.5, "positive"), load_model(tiny / "model")
    chosen = masks[0] | masks[2]
    assert NeuronMask.load(tmp_path / "m.safetensors") == chosen and answer["units"] == chosen.n
    assert answer["units_by_layer"] == {str(d): n for d, n in enumerate(chosen.counts) if n}
    texts = {row["arm"]: row["text"] for row in answer["texts"]}
    ids = tokenizer("w5 w6 w7", return_tensors="pt").input_ids

    def written():
        how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "repetition_penalty": 1.0, "pad_token_id": 1}
        return tokenizer.decode(model.generate(ids, max_new_tokens=6, **how)[0, 3:], skip_special_tokens=True)

    assert texts["unmasked"] == written()
    with MaskedModel(model).ablate(chosen, found.mean, "after-first"):
        assert texts["networks 0, 2"] == written()
    with MaskedModel(model).ablate(chosen.matched_random(0), found.mean, "after-first"):
        assert texts["random"] == written()
    damage = {row["arm"]: row["damage"] for row in answer["damage"]}
    assert set(damage) == set(texts) == {"unmasked", "networks 0, 2", "random", "matched random"}
    assert damage["unmasked"] == 0 and damage["networks 0, 2"] != damage["random"]


def test_a_mask_by_file_by_key_and_amplified(whole, tmp_path):
    out, saved = whole[0], tmp_path / "key.safetensors"
    key = json.loads(llmfact(f"mask --out {out} --key --save {saved} --json")[0])
    amplified = f"mask --out {out} --file {saved} --mode amplify --gain 3 --replace zero --positions all --json"
    again = json.loads(llmfact(amplified)[0])
    assert key["units"] == again["units"] == read_found(out)[1].facts["key neurons"]
    assert (key["mode"], key["replace"], key["positions"]) == ("ablate", "mean", "after-first")
    assert (again["mode"], again["gain"], again["positions"]) == ("amplify", 3.0, "all")
    drawn = f"mask --out {out} --key --generate w9 --temperature 2 --tokens 8 --json --seed"
    first, second, third = [llmfact(f"{drawn} {s}")[0] for s in (1, 1, 2)]
    assert first == second != third


def test_finetune_trains_the_key_neurons_of_a_run(tiny, whole, tmp_path):
    few = "--steps 4 --batch-size 2 --max-length 16 --eval-windows 6 --lr 0.02"
    line = f"finetune --run {whole[0]} --texts {tiny / 'texts.jsonl'} --out {tmp_path / 't'} {few}"
    bill = json.loads(llmfact(f"{line} --dry-run --json")[0])
    assert not (tmp_path / "t").exists() and bill["tokens"] == 4 * 2 * 16 + 2 * 6 * 16
    facts = json.loads(llmfact(f"{line} --json")[0])
    key = read_found(whole[0])[1].key
    assert facts["neurons"] == {"key": key.n} and facts["trained_parameters"] == key.n * 3 * families.D
    assert facts["frozen_weights_intact"] is True and facts["loss_after"] != facts["loss_before"]
    left = {p.name for p in (tmp_path / "t").iterdir() if p.name[0] != "."}
    assert left == {"claim.json", "losses.csv", "neurons.safetensors", "start.json", "tuned.json"}
    assert sum(p.stat().st_size for p in (tmp_path / "t").rglob("*") if p.is_file()) <= bill["disk"]
    printed, _ = llmfact(line)
    assert f"{facts['loss_after']:.4f}" in printed
    told = llmfact(f"info {tmp_path / 't'}")[0]
    assert f"{facts['loss_after']:.4f}" in told and not re.search(r"\d\.\d{5}", told)
    for more in ("", " --dry-run"):
        assert "--lr" in llmfact(line.replace("0.02", "0.01") + more, 1)[1]
    more = json.loads(llmfact(line.replace("--steps 4", "--steps 6") + " --json")[0])
    assert more["settings"]["steps"] == 6 and more["loss_after"] != facts["loss_after"]
    assert "steps                  6" in llmfact(f"info {tmp_path / 't'}")[0]
    assert "--steps" in llmfact(line, 1)[1], "fewer than it took"
    assert "a fine-tuning" in llmfact(f"figures {tmp_path / 't'}", 1)[1]
    assert str(whole[0]) in llmfact(f"finetune --run {whole[0]} --out {whole[0]}", 1)[1]
    assert str(tmp_path / "t") in llmfact(run_line(tiny, tmp_path / "t"), 1)[1]


def test_files_of_somebody_else_are_left_alone(tiny, tmp_path):
    (tmp_path / "results.csv").write_text("mine")
    for line in (run_line(tiny, tmp_path), f"networks --out {tmp_path} {found_by(tiny)}"):
        llmfact(line, 1)
        llmfact(f"{line} --dry-run", 1)
    assert [p.name for p in tmp_path.iterdir()] == ["results.csv"] and (tmp_path / "results.csv").read_text() == "mine"


def test_verify_confirms_a_run_or_ends_with_1(whole, copied):
    before = {p: p.read_bytes() for p in whole[0].rglob("*") if p.is_file()}
    printed, _ = llmfact(f"verify {whole[0]} --sample 2")
    assert len(printed.splitlines()) > 5
    answer, table = json.loads(llmfact(f"verify --out {whole[0]} --sample 2 --json")[0]), verify_folder(whole[0], 2)
    assert answer["confirmed"] is True and answer["disagreements"] == 0
    verdicts = [(c["part"], c["what"], c["verdict"]) for c in answer["checks"]]
    assert verdicts == list(zip(table.part, table.what, table.verdict))
    assert {p: p.read_bytes() for p in whole[0].rglob("*") if p.is_file()} == before, "nothing is written"
    (copied / "networks.csv").write_text("something else")
    printed, notes = llmfact(f"verify {copied} --sample 0 --quiet", 1)
    assert "networks.csv" in printed and not notes
    answer = json.loads(llmfact(f"verify {copied} --sample 0 --json", 1)[0])
    wrong = [c["what"] for c in answer["checks"] if c["verdict"] == "differs" and c["part"] != "environment"]
    assert answer["confirmed"] is False and wrong == ["networks.csv"]


def test_a_moved_model_and_code_of_a_checkpoint_are_asked_for(tiny, copied, tmp_path):
    settings = json.loads((copied / "settings.json").read_text())
    (copied / "settings.json").write_text(json.dumps(settings | {"model": str(tmp_path / "gone")}))
    assert "gone" in llmfact(f"verify {copied} --sample 0", 1)[1]
    printed, _ = llmfact(f"verify {copied} --sample 0 --model {tiny / 'model'}", 1)
    assert "settings.json" in printed and "fingerprint" not in printed, "of the model nothing differs"
    (copied / "settings.json").write_text(json.dumps(settings | {"trust_remote_code": True}))
    assert "--trust-remote-code" in llmfact(f"verify {copied} --sample 0", 1)[1]


def test_output_streams(tiny, whole):
    out = whole[0]
    texts = f"--texts {tiny / 'texts.jsonl'} --eval-texts 30"  # there are fewer
    line = f"mask --out {out} --key --generate w9 --tokens 2 {texts}"
    printed, notes = llmfact(f"{line} --quiet")
    assert "w9" in printed and not notes
    assert "note:" in llmfact(line)[1]
    printed, notes = llmfact(f"--json mask --out {out} --key --generate w9 --tokens 2")
    assert json.loads(printed)["texts"][0]["prompt"] == "w9" and "loading" in notes and len(printed.splitlines()) == 1


def test_a_stream_that_lacks_characters(tiny, whole):
    "Windows writes cp1252 into pipes and files."
    line = f"mask --out {whole[0]} --key --generate 'w9 Страна' --tokens 2"
    narrow = {"env": OFFLINE | {"PYTHONIOENCODING": "cp1252"}, "encoding": "cp1252"}
    code, printed, _, _ = ended(process(line, **narrow))
    assert code == 0 and "w9" in printed
    code, printed, _, _ = ended(process(f"{line} --json", **narrow))
    assert code == 0 and json.loads(printed)["texts"][0]["prompt"] == "w9 Страна"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_to_a_full_disk_is_one_line(whole):
    with open("/dev/full", "w") as full:
        child = process(f"info {whole[0]}", stdout=full)
        said = child.stderr.read()
    assert child.wait() == 1 and len(said.splitlines()) == 1 and said.startswith("error:"), said


def test_an_unknown_home_names_the_way_out(tmp_path):
    gone = {k: v for k, v in OFFLINE.items() if k not in ("HOME", "LLMFACT_CACHE", "XDG_CACHE_HOME")}
    child = subprocess.run(
        [
            sys.executable,
            "-c",
            "import pathlib, sys\n"
            "def home(*_): raise RuntimeError('Could not determine home directory.')\n"
            "import llmfact_nb.cli as c\nc.app\n"
            "pathlib.Path.home = classmethod(home)\n"
            "pathlib.Path.expanduser = lambda p: home() if str(p)[0] == '~' else p\n"
            "c.main(['info'])",
        ],
        capture_output=True,
        text=True,
        env=gone,
    )
    assert child.returncode == 1 and "LLMFACT_CACHE" in child.stderr and len(child.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "line, code, says",
    [
        ("run --preset papr", 2, "--preset|'papr'|'paper'"),
        ("run --site mlp_hiden", 2, "--site|'mlp_hidden', 'mlp_out', 'attn_heads'|'mlp_hidden'"),
        ("run --alpha -1", 2, "--alpha|-1"),
        ("run --k 0", 2, "--k|0"),
        ("run --k many", 2, "--k"),
        ("run --k 700 --fit-tokens 600", 2, "700|600"),
        ("run --alpha 2 --fraction 0.1", 2, "--alpha"),
        ("run --tail raw", 2, "--tail|raw"),
        ("run --nonsense", 2, "--nonsense"),
        ("run --mdel x", 2, "--model"),
        ("run --device cudaa --out OUT", 2, "--device|'cudaa'"),
        ("rum", 2, "rum"),
        ("tune", 2, "llmfact finetune"),
        ("fetch no-such-thing", 2, "error: 'no-such-thing'"),
        ("fetch wiki smolm2", 2, "error: 'smolm2'|'smollm2-135m'"),
        ("run --k 4081 --dry-run", 2, "--k|4,080"),
        ("run --column body --model MODEL --texts TEXTS --out OUT", 1, "--column 'body'|'title', 'text'"),
        ("run --shuffle -1", 2, "--shuffle"),
        ("finetune --run RUN --texts TEXTS --column body --out OUT", 1, "--column 'body'"),
        ("finetune --run RUN --texts TEXTS --max-length 100000 --out OUT", 1, "--max-length"),
        ("mask --key --out RUN --texts ONE", 1, "Give more documents"),
        ("study paper --model MODEL --texts nowhere.txt --dry-run", 2, "--texts|'nowhere.txt'"),
        ("run --texts no-such-texts --out OUT", 1, "no-such-texts"),
        ("run --texts TEXTS2 --out OUT", 2, "--texts|'texts.jsonl'"),
        ("run --texts wikki --dry-run", 2, "--texts|'wikki'|'wiki'"),
        ("run --texts smollm2-135m --dry-run", 2, "--texts|model"),
        ("run --model smolm2-135m --dry-run --out OUT", 2, "--model|'smolm2-135m'|'smollm2-135m'"),
        ("run --model owner/none --dry-run --out OUT", 1, "owner/none"),
        ("run --model no-such-model --texts TEXTS --out OUT", 1, "no-such-model"),
        ("run --model BROKEN --texts TEXTS --out OUT", 1, "broken"),
        ("run --out BLOCKED --model MODEL --texts TEXTS", 1, "file"),
        ("networks --html HERE", 2, "--html"),
        ("mask --network 3 --out OUT", 1, "llmfact networks --out"),
        ("mask --out RUN", 2, "--network 3"),
        ("mask --network 9 --out RUN", 2, "--network 9|0 to 3"),
        ("mask --key --network 0 --out RUN", 2, "--key|--network"),
        ("mask --key --gain 2 --out RUN", 2, "--gain"),
        ("mask --key --mode kepp --out RUN", 2, "--mode|'keep'"),
        ("mask --key --tokens 0 --out RUN", 2, "--tokens"),
        ("mask --key --generate= --out RUN", 2, "--generate"),
        ("mask --key --device cudaa --out RUN", 2, "--device"),
        ("mask --network 0 --alpha 1000 --out RUN", 1, "--alpha"),
        ("finetune --run OUT", 1, "llmfact networks --out"),
        ("finetune --run RUN --texts nowhere.txt --dry-run", 2, "--texts|'nowhere.txt'"),
        ("finetune --lr 0", 2, "--lr"),
        ("finetune --mode full --key", 2, "--mode"),
        ("figures OUT", 1, "llmfact run --out"),
        ("figures --model MODEL --out RUN", 2, "llmfact study paper --model"),
        ("figures --quick", 2, "llmfact study paper --quick"),
        ("study paper --model smolm2-135m --dry-run", 2, "--model|'smolm2-135m'"),
        ("study further --model smolm2-135m --dry-run", 2, "--model|'smolm2-135m'"),
        ("study papr", 2, "papr"),
        ("study tuning --task review", 2, "--task|'reviews'"),
        ("verify OUT", 1, "OUT"),
        ("verify HERE", 1, "HERE"),
        ("verify RUN --out OUT", 2, "--out"),
        ("verify RUN --sample -1", 2, "--sample"),
        ("verify RUN --tolerance many", 2, "--tolerance"),
        ("verify RUN --device cudaa", 2, "--device|'cudaa'"),
        ("verify RUN --model smolm2-135m", 2, "--model|'smolm2-135m'"),
        ("figures MODEL", 1, "a model"),
        ("figures HERE", 1, "file"),
        ("info OUT", 1, "OUT"),
        ("info --out HERE", 1, "HERE"),
    ],
)
def test_refusals_are_one_line(line, code, says, tiny, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    (tiny / "one.txt").write_text("w5 w6 w7")  # in the fit part
    if "BROKEN" in line:
        shutil.copytree(tiny / "model", tmp_path / "broken")
        (tmp_path / "broken" / "model.safetensors").write_bytes(b"no weights")
    places = {
        "OUT": tmp_path / "new", "TEXTS": tiny / "texts.jsonl", "TEXTS2": tiny / "text.jsonl", "MODEL": tiny / "model",
        "RUN": whole[0], "ONE": tiny / "one.txt", "HERE": tmp_path, "BLOCKED": tmp_path / "file" / "run",
        "BROKEN": tmp_path / "broken",
    }  # fmt: skip
    printed, said = llmfact(" ".join(str(places.get(a, a)) for a in line.split()), code)
    assert not printed and len([x for x in said.splitlines() if x.startswith("error:")]) == 1
    assert "n_components" not in said
    assert all(str(places.get(part, part)) in " ".join(said.split()) for part in says.split("|")), said
    assert {p.name for p in tmp_path.iterdir()} <= {"file", "broken"}, "nothing was computed, so nothing is left"


def test_what_a_run_needs_later_is_checked_before_the_search(tiny, tmp_path, monkeypatch):
    "By a dry run as well, as far as it can be told without the weights."
    monkeypatch.setattr("llmfact_nb.command.run.find_networks", lambda *_: pytest.fail("too late"))
    texts, model, bert = tmp_path / "one.txt", tmp_path / "untold", tmp_path / "t5"
    texts.write_text("w5 w6 w7 w8")
    shutil.copytree(tiny / "model", model)
    for path in model.glob("token*"):
        path.unlink()
    from transformers import T5Config

    T5Config().save_pretrained(bert)
    for line in (f"--texts {texts}", f"--model {model}", f"--model {bert}"):
        for more in ("", " --dry-run"):
            said = llmfact(
                f"run --model {tiny / 'model'} --texts {tiny / 'texts.jsonl'} {line} --out {tmp_path / 'x'}{more}", 1
            )
            assert not said[0] and not (tmp_path / "x").exists()


def test_too_few_tokens_are_noticed_before_the_search(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("llmfact_nb.command.run.find_networks", lambda *_: pytest.fail("too late"))
    rows = [json.dumps({"title": f"t{i}", "text": "w5 w6"}) for i in range(20)]
    (tmp_path / "short.jsonl").write_text("\n".join(rows))
    line = f"run --model {tiny / 'model'} --texts {tmp_path / 'short.jsonl'} --out {tmp_path / 'x'}"
    for more in ("", " --dry-run"):
        said = llmfact(line + more, 1)[1]
        assert "--texts" in said and len(said.strip().splitlines()) == 1
    llmfact(f"{line} --k 3 --dry-run")


def test_what_is_not_there_yet_is_described_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMFACT_CACHE", str(tmp_path))
    for name, says in (("smollm2-135m", "first loaded"), ("wiki", "is no model"), ("nowhere", "is not there")):
        said = llmfact(f"info {name}", 1)[1]
        assert said.startswith(f"error: '{name}'") and says in said and str(tmp_path) not in said


def test_terms_and_a_full_disk_are_noticed_before_the_search(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("llmfact_nb.command.run.find_networks", lambda *_: pytest.fail("too late"))
    line = f"run --texts {tiny / 'texts.jsonl'} --out {tmp_path / 'x'}"
    with monkeypatch.context() as m:
        m.setenv("LLMFACT_CACHE", str(tmp_path / "nothing"))
        bill = json.loads(llmfact(f"{line} --model gemma-3-270m --dry-run --json", 1)[0])
        assert bill["terms"].startswith("http")
        assert json.loads(llmfact(f"{line} --model gemma-3-270m --dry-run --json --accept-licence")[0])["terms"] is None
        said = llmfact(f"{line} --model gemma-3-270m", 1)[1]
        assert "--accept-licence" in said and bill["terms"] in said
    monkeypatch.setattr("llmfact_nb.command.cost.free_disk", lambda _: 1000)
    for more in ("", " --dry-run"):
        assert "disk" in "".join(llmfact(f"{line} --model {tiny / 'model'} --k 4{more}", 1))
    assert not (tmp_path / "x").exists()


def test_a_model_that_sees_later_tokens_is_refused_before_the_search(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("llmfact_nb.command.run.find_networks", lambda *_: pytest.fail("too late"))
    folder = tmp_path / "bert"
    shutil.copytree(tiny / "model", folder)
    families.build("bert", "masked").save_pretrained(folder)
    llmfact(f"run --model {folder} --texts {tiny / 'texts.jsonl'} --out {tmp_path / 'x'}", 1)
    assert not (tmp_path / "x").exists()


def test_an_argument_error_is_told_in_options(monkeypatch):
    "Whatever part of the library raises it."

    def refuse(*_, **__):
        raise ArgumentError("ica_seed", -1, "a whole number, at least 0", "Seeds count from 0.")

    monkeypatch.setattr("llmfact_nb.command.run.settings_from", refuse)
    said = llmfact("run", 2)[1]
    assert "--seed -1" in said and "at least 0" in said and "Seeds count from 0" in said and "ica_seed" not in said


def test_choices_are_those_of_the_library():
    for name, o in SETTINGS.items():
        for value in o.accepted:
            kept = {"exclude": None} if value == "none" else {FIELD.get(name, name): value}
            Settings(**kept | ({"alpha": 2.0, "fraction": None} if name == "tail" else {}))
    options = {n: set(re.findall(r"^  (--[\w-]+)", llmfact(f"{n} --help")[0], re.M)) for n in ("run", "networks")}
    assert options["run"] - options["networks"] == {"--control-seeds", "--jobs", "--cluster"}
    assert options["networks"] - options["run"] == {"--html"}


def test_names_in_json_are_snake_case(tiny, whole):
    lines = [run_line(tiny, whole[0]), f"networks --out {whole[0]}", f"mask --out {whole[0]} --key", "info"]
    lines += [f"info {whole[0]}", f"{run_line(tiny, whole[0])} --dry-run", f"verify {whole[0]} --sample 0"]
    lines += [f"study {name} --model {tiny / 'model'} --quick --dry-run" for name in ("paper", "further")]
    by_data = {"units_by_layer", "bytes", "fetched"}  # the names in these are layers, files, resources

    def names(value) -> set[str]:
        if isinstance(value, list):
            return set().union(*map(names, value))
        if isinstance(value, dict):
            return set(value).union(*(names(v) for k, v in value.items() if k not in by_data))
        return set()

    for line in lines:
        odd = {n for n in names(json.loads(llmfact(f"{line} --json")[0])) if not re.fullmatch(r"[a-z][a-z0-9_]*", n)}
        assert not odd, line


def test_the_studies_of_the_paper_are_run_and_drawn(tiny, tmp_path, monkeypatch):
    """The command loads the model and measures; `figures` draws the folder without it."""
    from llmfact_nb.base.files import claim

    asked = []

    def study(model, tokenizer, folder, settings, **more):
        asked.append((model.config.model_type, settings.recurrence_texts, more["n_jobs"], more["model_name"]))
        with claim(folder, "study", {"settings": "quick"}):
            shutil.copytree(PAPER / "tables", Path(folder) / "tables")
            record = json.loads((PAPER / "study.json").read_text())
            record["settings"] |= {"quick": settings.quick}
            (Path(folder) / "study.json").write_text(json.dumps(record))
        return {"verdicts": pd.read_csv(PAPER / "tables" / "verdicts.csv")}

    monkeypatch.setattr("llmfact_nb.study.whole.paper_study", study)
    out = tmp_path / "paper"
    line = f"study paper --model {tiny / 'model'} --quick --jobs 2 --out {out} --json"
    answer = json.loads(llmfact(line)[0])
    assert asked == [("llama", 1, 2, str(tiny / "model"))]
    pictures = {Path(p).name for p in answer["files"] if p.endswith(".png")}
    assert len(pictures) > 5 and answer["missing"]
    before = {p: p.read_bytes() for p in (out / "figures").glob("*.png")}
    assert "quick: for trying out" in (out / "figures" / "index.html").read_text()
    shutil.rmtree(out / "figures")
    llmfact(f"figures {out}")
    assert {p: p.read_bytes() for p in (out / "figures").glob("*.png")} == before
    assert "quick: for trying out" in (out / "figures" / "index.html").read_text(), "also without the model"
    assert json.loads(llmfact(f"info {out} --json")[0])["kind"] == "study"


def test_a_study_reads_texts_of_ones_own(tiny, monkeypatch):
    from llmfact_nb.base.texts import load_texts
    from llmfact_nb.command.paper_study import paper_settings

    others = {"encyclopaedia": ["not read"], "speeches": ["s"], "reviews": ["r"], "code": ["c"]}
    monkeypatch.setattr("llmfact_nb.study.plan.text_kinds", lambda split, n: others)
    monkeypatch.setattr("llmfact_nb.base.texts.load_labelled", lambda *_: [("a", 0), ("b", 1)])
    path = str(tiny / "texts.jsonl")
    texts = StudyTexts.default(paper_settings(True, texts=path, shuffle=3))
    assert list(texts.fit) == list(texts.held_out) == ["texts", "speeches", "reviews", "code"]
    assert texts.fit["texts"] == list(load_texts(path, "fit", shuffle=3)["text"])
    assert texts.held_out["texts"] == list(load_texts(path, "eval", shuffle=3)["text"])


def test_a_study_holds_out_further_articles_of_wikipedia(monkeypatch):
    from llmfact_nb.command.paper_study import paper_settings

    articles = {"fit": [f"f{i}" for i in range(30)], "eval": ["e0", "e1"]}
    monkeypatch.setattr("llmfact_nb.study.plan.text_kinds", lambda split, n: {"code": ["c"] * n})
    monkeypatch.setattr("llmfact_nb.base.texts.load_labelled", lambda *_: [("a", 0), ("b", 1)])
    monkeypatch.setattr("llmfact_nb.base.texts.texts_of", lambda find, split: {"text": articles[split]})
    texts = StudyTexts.default(dataclasses.replace(paper_settings(False), articles=5))
    assert texts.fit["wiki"] == articles["fit"][:-3] and texts.held_out["wiki"] == ["e0", "e1", "f27", "f28", "f29"]
    assert len(texts.held_out["code"]) == 5


def test_label_words_are_checked_before_anything_is_measured(tiny, tmp_path, monkeypatch):
    "By a dry run as well."
    monkeypatch.setattr("llmfact_nb.study.whole.paper_study", lambda *_, **__: pytest.fail("too late"))
    folder = tmp_path / "same"
    shutil.copytree(tiny / "model", folder)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"negative"', '"another"'))  # both are unknown words now
    path.write_text(path.read_text().replace('"positive"', '"others"'))
    for more in ("", " --dry-run"):
        said = llmfact(f"study paper --quick --model {folder} --out {tmp_path / 'x'}{more}", 1)[1]
        assert "label_words" in said and not (tmp_path / "x").exists()


@pytest.mark.parametrize("study", ["paper", "further"])
def test_a_study_of_several_ranks_needs_the_memory_of_each(study, tiny, tmp_path, monkeypatch):
    bill = lambda: json.loads(llmfact(f"study {study} --quick --model {tiny / 'model'} --dry-run --json")[0])
    monkeypatch.chdir(tmp_path)
    one = bill()
    for name, value in {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    both = bill()
    assert both["memory"] == 2 * one["memory"] and any("2 ranks" in said for said in both["assumptions"])


def test_a_dry_run_of_the_paper_keeps_its_word(tiny, tmp_path, capsys):
    "What the studies count when they begin, with model and texts at hand, is no more than was said without them."
    wiki = [json.loads(line)["text"] for line in (tiny / "texts.jsonl").read_text().splitlines()]
    kinds = ("wiki", "speeches", "reviews", "code")
    held_out = {kind: [f"w{i} {t}" for t in wiki[20:]] for i, kind in enumerate(kinds)}
    sentences = [(t, i % 2) for i, t in enumerate(wiki[:10])]
    texts = StudyTexts(dict.fromkeys(kinds, wiki[:20]), held_out, sentences, "{text}", ["w2", "w3"])
    line = f"study paper --model {tiny / 'model'} --quick --dry-run --out {tmp_path / 'no'} --json"
    bill = json.loads(llmfact(line)[0])
    assert not (tmp_path / "no").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paper_study(*load_model(tiny / "model"), tmp_path / "paper", QUICK, texts)
    said = re.findall(r": ([\d,]+) measurements, ([\d,]+) tokens", capsys.readouterr().err)
    arms, tokens = map(sum, zip(*[[int(n.replace(",", "")) for n in found] for found in said]))
    measured = len(list((tmp_path / "paper" / "scores").glob("*.safetensors")))
    assert f"the rest for {arms} measurements" in bill["passes"] and 0.5 * arms < measured <= arms
    assert 0.3 * bill["tokens"] < tokens <= bill["tokens"]
    assert sum(p.stat().st_size for p in (tmp_path / "paper").rglob("*") if p.is_file()) <= bill["disk"]


def test_debug_shows_the_trace_wherever_it_stands():
    for line in ("--debug run --tail raw", "run --tail raw --debug"):
        assert isinstance(CliRunner().invoke(app, line.split()).exception, ValueError)
    assert isinstance(CliRunner().invoke(app, ["run", "--tail", "raw"]).exception, SystemExit), "it is not remembered"


def test_damaged_files_are_named(tiny, copied, tmp_path):
    scores = sorted((copied / "parts" / "scores").glob("*.safetensors"))
    networks = copied / "networks.safetensors"
    resumed, listed = run_line(tiny, copied), f"networks --out {copied}"
    others = (f"mask --out {copied} --key", f"finetune --run {copied} --out {tmp_path / 't'}")
    for path, lines in ((scores[0], (resumed,)), (networks, (listed, *others))):
        whole = path.read_bytes()
        path.write_bytes(whole[:-10])
        for line in lines:
            assert path.name in llmfact(line, 1)[1], line
        path.write_bytes(whole)
    for name, content, lacks in (("settings.json", "{}", "conditions"), ("manifest.json", "{}", "found")):
        before = (copied / name).read_text()
        (copied / name).write_text(content)
        said = llmfact(f"figures {copied}", 1)[1]
        assert name in said and lacks in said
        (copied / name).write_text(before)


def test_a_tuning_study_is_divided_among_processes_and_not_among_ranks(monkeypatch, tmp_path):
    asked = {}

    def compared(*_, **how):
        asked.update(how)
        raise ValueError("enough")

    monkeypatch.setattr("llmfact_nb.tuning.comparison.compare_tuning", compared)
    line = f"study tuning --jobs 2 --steps 3 --out {tmp_path / 'out'}"
    assert "enough" in llmfact(line, 1)[1]
    assert (asked["n_jobs"], asked["steps"]) == (2, 3)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--jobs" in llmfact(line, 2)[1]


def test_help_teaches_and_is_light():
    code = """
import sys
from llmfact_nb.cli import app
from typer.testing import CliRunner
commands = ("run", "networks", "mask", "finetune", "figures", "verify", "fetch", "info", "study paper", "study further",
            "study tuning")
for name in commands:
    text = CliRunner().invoke(app, [*name.split(), "--help"]).output
    assert f"\\n  llmfact {name}" in text and "Exit codes" in text and "--json" in text, name
    assert name in ("figures", "fetch", "info") or "default" in text
print([m for m in ("torch", "transformers", "pandas", "matplotlib", "rich", "numpy") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
