"""Pins the command as a user meets it, in processes of its own: a whole run on a tiny model, kill and resume, refusals, exit codes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import families
import pandas as pd
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LLMFACT = Path(sys.executable).with_name("llmfact")
WORDS = [f"w{i}" for i in range(90)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A saved random model and a text file: everything a run needs, offline."""
    folder = tmp_path_factory.mktemp("tiny")
    model = families.build("llama")
    model.save_pretrained(folder / "model")
    vocabulary = {"[UNK]": 0, "[PAD]": 1, **{w: i + 2 for i, w in enumerate(WORDS)}}
    words = Tokenizer(models.WordLevel({w: i for w, i in vocabulary.items() if i < model.config.vocab_size}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder / "model")
    rng = random.Random(0)
    texts = "\n".join(json.dumps({"title": f"t{i}", "text": " ".join(rng.choices(WORDS, k=60))}) for i in range(40))
    (folder / "texts.jsonl").write_text(texts)
    return folder


def options(tiny: Path, out: Path) -> list[str]:
    return [
        "run", "--out", str(out), "--model", str(tiny / "model"), "--texts", str(tiny / "texts.jsonl"), "--k", "4", "--n-init", "2",
        "--fit-tokens", "600", "--eval-texts", "4", "--control-seeds", "2", "--fraction", "0.05",
    ]  # fmt: skip


def llmfact(*arguments, **kw) -> subprocess.CompletedProcess:
    return subprocess.run([LLMFACT, *arguments], capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, **kw)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The folder of an uninterrupted run, and what it printed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = llmfact(*options(tiny, out))
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_a_run_leaves_everything(whole):
    out, printed = whole
    figures = {p.name for p in (out / "figures").iterdir()}
    assert figures == {f"{n}.png" for n in ("maps", "units_per_layer", "damage", "time_courses", "connectivity", "stability")}
    results, manifest = pd.read_csv(out / "results.csv"), json.loads((out / "manifest.json").read_text())
    assert set(results.arm) == {"unmasked", "key", "random", "matched random", "matched shuffle", "top variance", "PCA", "keep key", "keep random", "all off"}
    for _, row in results[results.arm != "unmasked"].iterrows():
        assert sum(map(int, row.counts.split())) == row.units
    assert {"model", "texts", "seeds", "versions", "settings", "found", "machine"} <= set(manifest)
    assert "matched random" in printed and str(out / "report.html") in printed
    assert not [p for p in out.rglob("*") if p.name.endswith(".partial")]


def test_the_same_command_resumes_and_another_is_refused(tiny, whole):
    out, printed = whole
    before = (out / "results.csv").read_text()
    again = llmfact(*options(tiny, out))
    assert again.returncode == 0 and (out / "results.csv").read_text() == before
    assert "loading" not in again.stdout, "nothing is missing, so the model need not be loaded"
    other = llmfact(*options(tiny, out), "--k", "3")
    assert other.returncode == 1 and "n_components: 4 there, 3 now" in other.stderr and len(other.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 10))])
def test_killed_runs_end_with_the_same_table(tiny, whole, tmp_path, seed):
    rng, out = random.Random(seed), tmp_path / "run"
    for _ in range(2):
        process = subprocess.Popen([LLMFACT, *options(tiny, out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        end = time.time() + 60
        while time.time() < end and process.poll() is None and not (out / "settings.json").exists():
            time.sleep(0.05)  # the imports are over when the folder is claimed
        time.sleep(rng.uniform(0, 4))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert llmfact(*options(tiny, out)).returncode == 0
    ours, theirs = (pd.read_csv(p / "results.csv") for p in (out, whole[0]))
    pd.testing.assert_frame_equal(ours, theirs, check_exact=False, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "arguments, code, says",
    [
        (["run", "--preset", "papr"], 1, "preset='papr'"),
        (["run", "--site", "mlp"], 1, "accepted: 'mlp_out', 'mlp_hidden'"),
        (["run", "--alpha", "-1"], 1, "alpha=-1.0"),
        (["run", "--nonsense"], 2, "--nonsense"),
        (["fetch", "no-such-thing"], 1, "no-such-thing"),
        (["run", "--texts", "no-such-texts", "--out", "OUT"], 1, "no-such-texts"),
        (["run", "--model", "no-such-model", "--texts", "TEXTS", "--out", "OUT"], 1, "no-such-model"),
    ],
)
def test_refusals_are_one_line(arguments, code, says, tiny, tmp_path):
    places = {"OUT": str(tmp_path / "run"), "TEXTS": str(tiny / "texts.jsonl")}
    done = llmfact(*(places.get(a, a) for a in arguments), cwd=tmp_path)
    assert done.returncode == code and says in done.stderr and "Traceback" not in done.stderr
    assert code == 2 or len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1


def test_an_output_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = llmfact(*options(tiny, tmp_path / "file" / "run"))
    assert done.returncode == 1 and "cannot be written" in done.stderr and "Traceback" not in done.stderr


def test_a_damaged_part_is_named(tiny, whole, tmp_path):
    import shutil

    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    arm = next((out / "parts" / "arms").glob("key-*.safetensors"))
    arm.write_bytes(arm.read_bytes()[:-10])
    done = llmfact(*options(tiny, out))
    assert done.returncode == 1 and arm.name in done.stderr and "damaged" in done.stderr
