"""A small study of fine-tuning that tests share: a task as easy as it gets, and everything around it."""

import families

from llmfact_nb.tuning.arms import ARMS
from llmfact_nb.tuning.comparison import compare_tuning
from llmfact_nb.tuning.tasks import TuningTask, labelled_examples, window_examples

SMALL = dict(
    steps=12,
    sweep_steps=4,
    eval_every=4,
    batch_size=2,
    max_length=16,
    gradient_batches=4,
    patience=0,
    sweep_seeds=(0,),
    further_rates=1,
    n_components=3,
    n_init=2,
    fit_tokens=200,
    fraction=0.15,
)
CLOCKS = ["step_seconds", "step_processor_seconds", "seconds"]
ELSEWHERE = window_examples(families.tokenizer(), [families.words(30, seed=200 + i) for i in range(3)], 6, 12)


def planted_task(name="planted"):
    "The label is w40 if the first word is below w20, else w41."
    texts = [families.words(6, seed=i) for i in range(40)]
    labels = [int(int(t.split()[0][1:]) >= 20) for t in texts]
    examples = labelled_examples(families.tokenizer(), texts, labels, "{text} w30", ("w40", "w41"), 16)
    to_find = [families.words(40, seed=100 + i) for i in range(8)]
    return TuningTask(name, examples[:24], examples[:24], examples[24:], to_find)


def study(folder=None, arms=("key", "full"), seeds=(0, 1), model=None, task=None, n_jobs=1, **changes):
    "The results of a study of the planted task, or another one."
    given = (model or families.build("llama"), families.tokenizer()), task or planted_task(), arms, seeds
    settings = SMALL | {"lrs": {a: (1e-4, 1e-3, 3e-2) for a in ARMS}} | changes
    return compare_tuning(*given, folder, ELSEWHERE, n_jobs, progress=False, **settings)


def timeless(results):
    "The tables without what a clock says."
    frames = (results.runs, results.curves, results.sweep, results.intervals)
    return [f.drop(columns=[c for c in CLOCKS if c in f]) for f in frames]
