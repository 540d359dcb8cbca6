"""Small runs and studies that several test files share: a tiny saved model, texts, settings, and the command in this
process."""

import hashlib
import json
import random
import shlex
from dataclasses import replace
from pathlib import Path

import families
import planted
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from llmfact_nb.ablation import PRESETS, Settings
from llmfact_nb.across.untrained import UntrainedSettings
from llmfact_nb.command.run import Run, run_experiment
from llmfact_nb.cli import app
from llmfact_nb.scores.contrast import ContrastPair, ContrastSet
from llmfact_nb.study.further_study import QUICK_FURTHER, FurtherTexts
from llmfact_nb.study.plan import StudySettings

SMALL = dict(
    n_components=3,
    n_init=2,
    fit_tokens=300,
    fit_length=48,
    eval_texts=3,
    eval_length=30,
    control_seeds=2,
    fraction=0.1,
    conditions=(("mean", "after-first"), ("zero", "all")),
)
N_ARMS = 1 + 2 * 12 + 17  # unmasked, twelve arms under two conditions, and 17 more draws of the deciding control
WORDS = [f"w{i}" for i in range(2, families.VOCAB - 2)]


def word_tokenizer() -> PreTrainedTokenizerFast:
    "A tokenizer of whole words, w2, w3 ..., and of the two label words of the studies."
    vocabulary = {w: i for i, w in enumerate(["[UNK]", "[PAD]", *WORDS, "positive", "negative"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")


def small_world(folder: Path) -> Path:
    "A saved random model and a text file: everything a run needs, offline."
    model = families.build("llama")
    model.generation_config.repetition_penalty = 8.0  # a checkpoint's own wish, which masked text must not follow
    model.save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    rng = random.Random(0)
    rows = [{"title": f"t{i}", "text": " ".join(rng.choices(WORDS, k=60))} for i in range(40)]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def small_settings(world: Path, **changes) -> Settings:
    return Settings(model=str(world / "model"), texts=str(world / "texts.jsonl"), **SMALL | changes)


def small_run(world: Path, out: Path, **changes) -> Run:
    return run_experiment(small_settings(world, **changes), out, progress=False)


def tables(out: Path) -> dict[str, str]:
    "What a run says, file by file: checksums of the bytes."
    names = ("results.csv", "differences.csv", "networks.csv", "manifest.json", "networks.safetensors", "networks.html")
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names}


def llmfact(line: str, code: int = 0) -> tuple[str, str]:
    "The command in this process: (output stream, error stream)."
    done = CliRunner().invoke(app, shlex.split(line))
    assert done.exit_code == code and "Traceback" not in done.stderr, done.output
    return done.stdout, done.stderr


def study_texts():
    "Texts of two kinds for a study on the planted model."
    from llmfact_nb.study.plan import StudyTexts

    return StudyTexts(
        {"topics": planted.texts(30, 80), "others": planted.texts(20, 80, seed=7)},
        {"topics": planted.texts(4, 60, seed=8), "others": planted.texts(3, 60, seed=9)},
        [(f"w{5 + i} w{6 + i}", i % 2) for i in range(4)],
        "w4 {text}",
        ["w20", "w30"],
    )


SMALL_PAPER = StudySettings(
    find=Settings(n_components=6, n_init=2, fit_tokens=1000, fit_length=40, fraction=0.125),
    published=replace(PRESETS["paper"], alpha=2.0, fit_tokens=400, fit_length=80), eval_tokens=120,
    sentences=6, short_length=12, short_sentences=4, seeds=1, draws=1, ks=(4,), fractions=(0.05,), kept=(0.1,),
    gains=(2.0,), adds=(1.0,), networks=1, more_seeds=(), more_texts=0, variant_restarts=1, recurrence_texts=1,
    sample_tokens=40,
)  # fmt: skip


def study_job(out: Path, model=None) -> None:
    "A whole study on the planted model, as small as it can be."
    from llmfact_nb.study.whole import paper_study

    paper_study(model or planted.model(), families.tokenizer(), out, SMALL_PAPER, study_texts(), progress=False)


SMALL_FURTHER = replace(
    QUICK_FURTHER,
    find=Settings(fit_tokens=300, fit_length=40, n_components=4, n_init=1, exclude="first", fraction=0.05),
    untrained=UntrainedSettings(n_components=4, n_init=2, n_splits=1, exclude="first", max_length=20),
    seeds=(0,),
    draws=2,
    fit_texts=6,
    articles=4,
    length=12,
    sentences=6,
    pairs=8,
    tested=4,
    layer_networks=3,
)
TOPICS = [f"w{4 + planted.WORDS * t} w{5 + planted.WORDS * t} w{6 + planted.WORDS * t}" for t in range(8)]


def further_texts() -> FurtherTexts:
    turned = [" ".join(reversed(t.split())) for t in TOPICS]
    pairs = [
        ContrastPair(TOPICS[i], turned[(i + 1) % 8], f" w{8 + 5 * i}", f" w{8 + 5 * ((i + 1) % 8)}") for i in range(8)
    ]
    language = ContrastSet("words", tuple(map(ContrastPair, TOPICS, turned)))
    return FurtherTexts(
        planted.texts(12, 50), planted.texts(4, 20, seed=3), language, ContrastSet("topics", tuple(pairs))
    )


def further_texts_in(world: Path) -> FurtherTexts:
    texts = [json.loads(line)["text"] for line in (world / "texts.jsonl").read_text().splitlines()]
    return replace(further_texts(), fit=texts[:20], held_out=texts[20:24])
