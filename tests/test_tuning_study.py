"""Pins the tuning study and its tasks: what the arms are, which loss chooses, which rates are tried, the same table
twice and after an interruption, whose folder it is, and a model that comes back as it was."""

import json
import math
import re
import shutil
from dataclasses import replace

import families
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from llmfact_nb.base import identity, texts
from llmfact_nb.base.arguments import ArgumentError
from llmfact_nb.base.files import ClaimError, digest
from llmfact_nb.evaluate import EvalSet, label_accuracy, perplexity
from llmfact_nb.finetune import neuron_parameters
from llmfact_nb.masks import NeuronMask
from llmfact_nb.show import tuning_figures
from llmfact_nb.tuning import arms as arms_module
from llmfact_nb.tuning import comparison
from llmfact_nb.tuning.arms import ARMS, CandidateNeurons, arm_training, gradient_scores, lora_rank, mlp_maps
from llmfact_nb.tuning.comparison import (
    RATES,
    TuningSettings,
    check_arms,
    choose_rate,
    compare_tuning,
    next_rate,
    orders,
    set_aside,
    sweep_losses,
    train_run,
)
from llmfact_nb.tuning.tables import TuningResults, document_interval, read_tuning
from llmfact_nb.tuning.tasks import (
    Example, Scores, TuningTask, batch_nats, excerpts, labelled_examples, score, speeches_task, window_examples,
)  # fmt: skip
from tuning_task import ELSEWHERE, SMALL, planted_task, study, timeless

pytestmark = [
    pytest.mark.filterwarnings("ignore:FastICA has not converged"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
WIDTHS = (families.HIDDEN,) * families.LAYERS
N = sum(WIDTHS)


def same(a, b):
    for x, y in zip(timeless(a), timeless(b), strict=True):
        pd.testing.assert_frame_equal(x, y, check_exact=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return folder, study(folder)


# the whole study


def test_two_arms_two_seeds_from_end_to_end(finished):
    _, results = finished
    runs = results.runs
    assert (
        list(runs["arm"]) == ["key", "key", "full", "full"]
        and list(runs["seed"]) == [0, 1, 0, 1]
        and set(runs["task"]) == {"planted"}
    )
    assert (runs["steps"] == 12).all() and (runs["test_loss"] < runs["test_loss_before"] - 0.3).all()
    assert (
        runs["test_loss_before"].nunique() == 1
        and runs["wiki_loss_before"].nunique() == 1
        and (runs["wiki_loss"] != runs["wiki_loss_before"]).all()
    )
    assert runs["test_accuracy"].between(0, 1).all() and runs["test_loss"].nunique() == 4
    assert (
        runs.loc[runs["arm"] == "key", "frozen_intact"].eq(True).all()
        and runs.loc[runs["arm"] == "full", "frozen_intact"].isna().all()
    )
    final = results.curves[results.curves["phase"] == "final"]
    assert list(final[(final["arm"] == "key") & (final["seed"] == 0)]["step"]) == [0, 4, 8, 12] and len(final) == 16
    swept = results.curves[results.curves["phase"] == "sweep"]
    assert (swept.groupby("arm")["lr"].nunique() == runs.groupby("arm")["rates_tried"].first()).all() and set(
        swept["step"]
    ) == {0, 4}
    facts = results.facts["planted"]
    assert (
        facts["chance"] == 0.5
        and 0.5 <= facts["majority"] < 1
        and facts["chance choice loss"] == pytest.approx(math.log(2))
    )
    assert facts["seconds to find the neurons"] > 0 and "chance choice loss 0.693" in repr(results)


def test_best_state_is_what_is_tested(finished):
    _, results = finished
    for r in results.runs.itertuples():
        curve = results.curves.query("phase == 'final' and arm == @r.arm and seed == @r.seed")
        assert r.best_step == curve.loc[curve["val_choice_loss"].idxmin(), "step"]


def test_same_call_gives_the_same_table_also_without_a_folder(finished):
    same(study(), finished[1])


@pytest.mark.parametrize("interrupted_at", [2, 8])
def test_interrupted_study_goes_on_to_an_equal_table(finished, tmp_path, monkeypatch, interrupted_at):
    calls, real, model = [], comparison.train_run, families.build("llama")
    weights, before = [p.clone() for p in model.parameters()], families.state(model)

    def interrupt(*args, **kwargs):
        calls.append(1)
        if len(calls) == interrupted_at:  # in the middle of a run, with trained weights in place
            for p in args[0].parameters():
                p.data.add_(1.0) if p.requires_grad else None
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(comparison, "train_run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path, model=model)
    assert families.state(model) == before and all(torch.equal(p, w) for p, w in zip(model.parameters(), weights))
    done = {p.name: p.read_bytes() for p in (tmp_path / "planted").glob("*-*.json")}
    assert len(done) == interrupted_at - 1
    again = study(tmp_path, model=model)
    everything = len(finished[1].sweep) + len(finished[1].runs)
    assert len(calls) == interrupted_at + everything - len(done)  # the finished ones not again
    assert {name: (tmp_path / "planted" / name).read_bytes() for name in done} == done
    same(again, finished[1])


def test_finished_study_trains_nothing(finished, monkeypatch):
    folder, results = finished
    monkeypatch.setattr(comparison, "train_run", lambda *a, **k: pytest.fail("trained again"))
    same(study(folder), results)
    same(read_tuning(folder), results)


@pytest.mark.parametrize(
    "change, name",
    [
        (dict(steps=13), "steps"),
        (dict(batch_size=3), "batch_size"),
        (dict(lrs={a: (1e-4, 1e-3, 3e-2 if a != "full" else 2e-2) for a in ARMS}), "lrs full"),
        (dict(sweep_seeds=(0, 1)), "sweep_seeds"),
        (dict(further_rates=2), "further_rates"),
        (dict(n_components=4), "n_components"),
    ],
)
def test_changed_configuration_is_refused_with_the_difference(finished, change, name):
    with pytest.raises(ClaimError) as e:
        study(finished[0], **change)
    assert list(e.value.differences) == [name]


def test_other_data_and_other_weights_are_refused(finished):
    task = planted_task()
    with pytest.raises(ValueError):
        study(finished[0], task=TuningTask("planted", task.train[1:], task.val, task.test, task.texts))
    model = families.build("llama")
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    with pytest.raises(ValueError):
        study(finished[0], model=model)


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_another_release_is_refused(finished, monkeypatch, name):
    real = identity.version
    monkeypatch.setattr(identity, "version", lambda n: "0.1" if n == name else real(n))
    with pytest.raises(ClaimError) as e:
        study(finished[0])
    assert list(e.value.differences) == [name]


def test_only_lora_says_which_peft_it_was(tmp_path):
    study(tmp_path, arms=["key", "LoRA"], seeds=[0])
    of = lambda arm: json.loads((tmp_path / "planted" / f"run-{arm}-seed0.json").read_text())
    assert "peft" in of("LoRA") and "peft" not in of("key")


def test_several_processes_make_the_same_tables(finished, tmp_path):
    same(study(tmp_path, n_jobs=2), finished[1])


def test_two_calls_at_once_in_one_folder_are_refused(tmp_path):
    from llmfact_nb.base.files import hold

    with hold(tmp_path / "planted"), pytest.raises(BlockingIOError):
        study(tmp_path)


def test_threads_are_recorded_and_do_not_stop_a_resumption(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "copy")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        more = study(tmp_path / "copy", arms=["key"], seeds=[0, 2])
    finally:
        torch.set_num_threads(threads)
    assert list(more.runs["threads"]) == [threads, threads + 1]


def test_examples_of_the_gradient_are_not_trained_on(monkeypatch):
    task, scored, trained, real, train = planted_task(), [], [], arms_module.gradient_scores, comparison.train_run
    monkeypatch.setattr(
        arms_module,
        "gradient_scores",
        lambda model, batches, like: (
            scored.extend(ids for rows in batches for ids, _ in rows) or real(model, batches, like)
        ),
    )
    monkeypatch.setattr(
        comparison,
        "train_run",
        lambda model, ready, t, *a, **k: trained.append([e.ids for e in t.train]) or train(model, ready, t, *a, **k),
    )
    study(arms=["key"], seeds=[0], task=task)
    assert len(scored) == 8 and all(len(ids) == 16 for ids in trained)
    assert all(sorted(scored + ids) == sorted(e.ids for e in task.train) for ids in trained)
    assert scored != [e.ids for e in task.train[:8]] and scored != [e.ids for e in task.train[-8:]]
    with pytest.raises(ValueError):
        set_aside(task, 24)


def test_more_seeds_and_arms_train_only_what_is_new(tmp_path, monkeypatch):
    first = study(tmp_path, arms=["key"], seeds=[0])
    trained, real = [], comparison.train_run
    monkeypatch.setattr(comparison, "train_run", lambda *a, **k: trained.append(1) or real(*a, **k))
    more = study(tmp_path, arms=["key"], seeds=[0, 3])
    assert len(trained) == 1 and list(more.runs["seed"]) == [0, 3]
    pd.testing.assert_frame_equal(more.runs.iloc[:1], first.runs)


def test_all_seven_arms(tmp_path):
    model = families.build("llama")
    before, weights = families.state(model), [p.clone() for p in model.parameters()]
    results = study(tmp_path, arms=ARMS, seeds=[1], model=model, steps=4)
    assert (
        families.state(model) == before
        and all(torch.equal(p, w) for p, w in zip(model.parameters(), weights))
        and not hasattr(model, "peft_config")
    )
    runs = results.runs.set_index("arm")
    assert list(runs.index) == list(ARMS)
    key = runs.loc["key"]
    assert key["neurons"] == round(0.15 * N) == sum(map(int, key["counts"].split()))
    for matched in ("random", "top variance"):
        assert (
            runs.loc[matched, "counts"] == key["counts"]
            and runs.loc[matched, "trained_parameters"] == key["trained_parameters"]
        )
    assert (
        runs.loc["top gradient", "neurons"] == key["neurons"]
        and runs.loc["rest", "neurons"] == N - key["neurons"]
        and runs.loc["full", "neurons"] == N
    )
    assert (
        runs.loc["full", "trained_parameters"]
        == sum(p.numel() for p in model.parameters())
        == runs.loc["rest", "trained_parameters"] + key["trained_parameters"]
    )
    assert runs.loc["key", "key_share"] == 1 and runs.loc["random", "key_share"] == 0
    assert runs["frozen_intact"].drop("full").eq(True).all() and runs["rank"].notna().sum() == 1
    # AdamW holds two numbers beside each gradient, and a counter for each tensor
    for arm in ("key", "full", "LoRA"):
        numbers = 4 * 3 * runs.loc[arm, "trained_parameters"]
        assert numbers <= runs.loc[arm, "held_bytes"] < numbers + 4 * 200
    others = results.intervals.query("reference == 'full' and measure == 'test loss'")
    assert list(others["arm"]) == [a for a in ARMS if a != "full"]


def test_a_task_of_windows_has_no_accuracy():
    examples = window_examples(families.tokenizer(), [families.words(60, seed=i) for i in range(4)], 12, 10)
    task = TuningTask("windows", examples, examples[:4], examples[4:8], [families.words(40, seed=i) for i in range(8)])
    results = study(arms=["key"], seeds=[0], task=task)
    assert results.runs["test_accuracy"].isna().all() and results.facts["windows"]["chance"] is None
    assert (
        set(results.intervals["measure"]) == {"test loss", "wiki loss"}
        and results.curves["val_choice_loss"].isna().all()
    )
    assert results.facts["windows"]["chance choice loss"] is None


def test_intervals_are_paired_differences_of_the_stored_items(finished):
    folder, results = finished
    read = lambda arm, seed: json.loads((folder / "planted" / f"run-{arm}-seed{seed}.json").read_text())
    row = results.intervals.query("arm == 'key' and reference == 'full' and measure == 'wiki loss'").iloc[0]
    differences = [np.array(read("key", s)["wiki"]["nats"]) - np.array(read("full", s)["wiki"]["nats"]) for s in (0, 1)]
    tokens = np.array([len(e.ids) - 1 for e in ELSEWHERE])
    values = [d.sum() / tokens.sum() for d in differences]
    assert row["value"] == pytest.approx(np.mean(values)) and (row["seed_low"], row["seed_high"]) == pytest.approx(
        (min(values), max(values))
    )
    assert (row["items"], row["documents"], row["seeds"]) == (6, 3, 2) and row["ci_low"] < row["value"] < row["ci_high"]
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(
        document_interval(np.mean(differences, axis=0), tokens, [e.document for e in ELSEWHERE])
    )
    absolute = results.intervals.query("arm == 'key' and reference == '' and measure == 'test accuracy'").iloc[0]
    assert absolute["value"] == pytest.approx(results.runs.query("arm == 'key'")["test_accuracy"].mean())
    choice = results.intervals.query("arm == 'key' and reference == 'before' and measure == 'test choice loss'").iloc[0]
    start = json.loads((folder / "planted" / "start.json").read_text())["test"]["choice_nats"]
    assert choice["value"] == pytest.approx(
        np.mean([np.mean(read("key", s)["test"]["choice_nats"]) for s in (0, 1)]) - np.mean(start)
    )
    assert (results.runs["test_choice_loss"] < results.runs["test_choice_loss_before"]).all()


def test_interval_draws_documents_not_items():
    sums, counts = np.tile([0.0, 1.0], 20), np.ones(40)
    wide, narrow = (
        document_interval(sums, counts, [i % 2 for i in range(40)]),
        document_interval(sums, counts, range(40)),
    )
    assert wide == (0.0, 1.0) and 0.3 < narrow[0] < 0.5 < narrow[1] < 0.7
    assert np.isnan(document_interval(sums, counts, [0] * 40)).all()


# the learning rate


def test_sweep_takes_the_better_rate_and_says_where_it_lies():
    results = study(arms=["full"], seeds=[0], lrs={"full": (1e-9, 1e-2, 1e2)})
    assert (
        results.runs["lr"].item() == 1e-2
        and results.runs["edge"].item() == ""
        and results.runs["rates_tried"].item() == 3
    )
    assert (
        list(results.sweep["chosen"]) == [False, True, False]
        and results.sweep["val_choice_loss"].iloc[1] < results.sweep["val_choice_loss"].iloc[0]
    )
    assert not results.sweep["further"].any()


@pytest.mark.parametrize("rates, edge", [((1e-9, 1e-8, 3e-3), "highest"), ((3e-3, 1.0, 10.0), "lowest")])
def test_edge_of_the_rates_is_reported(rates, edge):
    results = study(arms=["full"], seeds=[0], lrs={"full": rates}, further_rates=0)
    assert (
        results.runs["lr"].item() == 3e-3
        and results.runs["edge"].item() == edge == results.sweep.query("chosen")["edge"].item()
    )
    assert f"{edge} of those tried (0.003)" in repr(results)


@pytest.mark.parametrize("further, tried", [(0, [1e-9, 1e-8, 1e-7]), (2, [1e-9, 1e-8, 1e-7, 1e-6, 1e-5])])
def test_sweep_goes_on_beyond_the_edge(tmp_path, monkeypatch, further, tried):
    """While the rate is far too small, the largest is the best of those tried. The same rule for every arm."""
    settings = dict(
        arms=["key", "full"],
        seeds=[0],
        lrs={"key": tried[:3], "full": tried[:3]},
        further_rates=further,
        batch_size=1,
        steps=4,
    )
    results = study(tmp_path, **settings)
    for arm in ("key", "full"):
        own = results.sweep[results.sweep["arm"] == arm]
        assert (
            list(own["lr"]) == pytest.approx(tried)
            and list(own["further"]) == [False] * 3 + [True] * further
            and own["chosen"].iloc[-1]
        )
    assert (results.runs["rates_tried"] == 3 + further).all() and (results.runs["edge"] == "highest").all()
    monkeypatch.setattr(comparison, "train_run", lambda *a, **k: pytest.fail("trained again"))
    same(study(tmp_path, **settings), results)


def test_next_rate():
    assert next_rate({3e-4: 2.0, 1e-3: 1.5, 3e-3: 1.0}) == 9e-3 and next_rate({3e-4: 1.0, 1e-3: 1.5, 3e-3: 2.0}) == 9e-5
    assert next_rate({1e-3: 2.0, 1e-2: 1.0, 1e-1: None}) is None and next_rate({1e-3: 1.0}) is None


def test_choose_rate():
    assert choose_rate({1e-3: 1.0, 1e-2: 0.5, 1e-1: None}) == (1e-2, "")
    assert choose_rate({1e-3: 0.2, 1e-2: 0.5}) == (1e-3, "lowest") and choose_rate({1e-3: 0.2}) == (1e-3, "")
    with pytest.raises(ValueError):
        choose_rate({1e-3: None, 1.0: float("inf")})


def test_a_rates_value_is_the_mean_choice_loss_over_the_seeds():
    """Rate 2 has the smaller vocabulary loss, rate 1 the smaller choice loss; with its first seed alone rate 3 would
    win; rate 4 diverged once."""
    made_up = lambda lr, seed, loss, choice, diverged=False: {
        "lr": lr,
        "seed": seed,
        "diverged": diverged,
        "curve": [{"val_loss": loss, "val_choice_loss": choice, "val_accuracy": None}],
    }
    runs = [
        made_up(1.0, 0, 5, 0.6),
        made_up(1.0, 1, 5, 0.7),
        made_up(2.0, 0, 1, 0.7),
        made_up(2.0, 1, 1, 0.8),
        made_up(3.0, 0, 5, 0.1),
        made_up(3.0, 1, 5, 1.9),
    ]
    runs += [made_up(4.0, 0, 1, 0.1), made_up(4.0, 1, None, None, True)]
    losses = sweep_losses(runs)
    assert (
        losses == {1.0: pytest.approx(0.65), 2.0: pytest.approx(0.75), 3.0: pytest.approx(1.0), 4.0: None}
        and choose_rate(losses)[0] == 1.0
    )


def test_every_rate_is_tried_with_every_sweep_seed():
    results = study(arms=["key"], seeds=[0], sweep_seeds=(0, 3))
    swept = results.curves.query("phase == 'sweep' and step > 0")
    assert len(swept) == 2 * len(results.sweep) and set(swept["seed"]) == {0, 3} and (results.sweep["seeds"] == 2).all()
    assert set(study(arms=["key"], seeds=[0], eval_every=1, patience=1).curves.query("phase == 'sweep'")["step"]) == {
        0,
        4,
    }  # at the end only, and all to the end
    for r in results.sweep.itertuples():
        assert r.val_choice_loss == pytest.approx(swept.query("lr == @r.lr")["val_choice_loss"].mean())


def test_every_arm_gets_the_same_number_of_rates():
    assert {len(r) for r in RATES.values()} == {3}
    with pytest.raises(ValueError):
        check_arms(["key", "full"], TuningSettings(lrs={"key": (1e-3, 1e-2)}))


def test_defaults_depend_on_the_task():
    windows = TuningTask("windows", *[[Example((4, 5, 6), 1)]] * 3, ["w4"])
    default = TuningSettings()
    labelled, other = default.of(planted_task()), default.of(windows)
    assert (
        (labelled.batch_size, other.batch_size) == (8, 2)
        and labelled.steps != other.steps
        and labelled.max_length > other.max_length
    )
    assert all(s.sweep_steps == s.steps // 2 and s.patience * s.eval_every < s.steps for s in (labelled, other))
    assert len(default.sweep_seeds) == 2 and TuningSettings(steps=61, sweep_steps=7).of(windows).sweep_steps == 7


@pytest.mark.parametrize(
    "steps, patience, accepted", [(45, 3, False), (46, 3, True), (31, 2, True), (30, 2, False), (5, 0, True)]
)
def test_a_patience_that_could_never_act_is_refused(steps, patience, accepted):
    if accepted:
        TuningSettings(steps=steps, patience=patience)
    else:
        with pytest.raises(ValueError):
            TuningSettings(steps=steps, patience=patience)


BAD = {
    "steps": [-1, 1.5, True],
    "batch_size": [-1],
    "eval_every": [0],
    "clip": [0, float("inf")],
    "weight_decay": [-1],
    "further_rates": [-1],
    "sweep_seeds": [(), (0, 0)],
    "lrs": [{"keys": [1]}],
    "lrs['key']": [{"key": []}, {"key": [0.0]}, {"key": [1, 1]}],
    "fraction": [0, 1],
}


@pytest.mark.parametrize("name, value", [(n, v) for n, values in BAD.items() for v in values])
def test_bad_settings_are_named(name, value):
    with pytest.raises(ArgumentError) as e:
        TuningSettings(**{name.partition("[")[0]: value})
    assert e.value.argument == name


@pytest.mark.parametrize(
    "arms, seeds, argument",
    [
        ([], [0], "arms"),
        (["key", "key"], [0], "arms"),
        (["keys"], [0], "arms"),
        (["key"], [], "seeds"),
        (["key"], [0, 0], "seeds"),
        (["key"], [-1], "seeds"),
    ],
)
def test_bad_arms_and_seeds(arms, seeds, argument):
    with pytest.raises(ArgumentError) as e:
        compare_tuning(arms=arms, seeds=seeds)
    assert e.value.argument == argument


def test_unknown_task_and_setting():
    with pytest.raises(ValueError):
        compare_tuning(task="poems")
    with pytest.raises(TypeError):
        compare_tuning(stepps=3)


def test_lora_without_peft_names_the_extra(monkeypatch):
    monkeypatch.setattr(comparison, "find_spec", lambda name: None)
    with pytest.raises(ImportError):
        check_arms(["LoRA"], TuningSettings())
    check_arms(["key", "full"], TuningSettings())


# the arms


def candidates(model, n=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(N, dtype=torch.bool)
    chosen[torch.randperm(N, generator=generator)[:n]] = True
    return CandidateNeurons(
        NeuronMask.from_flat(chosen, WIDTHS, "mlp_hidden"),
        torch.rand(N, generator=generator),
        torch.rand(N, generator=generator),
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_gradient_score_finds_planted_neurons(family):
    "All other neurons have weights of zero on both sides, so no gradient can reach them."
    model = families.build(family)
    planted = candidates(model, 7, seed=3).key
    with torch.no_grad():
        for part in neuron_parameters(model, ~planted):
            model.get_parameter(part.name).index_fill_(part.axis, part.index, 0)
    before = families.state(model)
    scores = gradient_scores(model, [[(tuple(range(4, 20)), 1)], [(tuple(range(20, 40)), 3)]], planted)
    assert families.state(model) == before
    neurons = CandidateNeurons(candidates(model, 7).key, torch.rand(N), scores)
    assert (
        neurons.mask("top gradient", 0) == planted and (scores[~planted.flat] < 1e-3 * scores[planted.flat].min()).all()
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_gradient_score_is_the_norm_over_a_neurons_own_weights(family):
    model = families.build(family)
    rows = [(tuple(range(4, 20)), 1), (tuple(range(20, 40)), 3)]
    scores = gradient_scores(model, [rows[:1], rows[1:]], NeuronMask.empty(WIDTHS, "mlp_hidden"))
    (sum(torch.cat(batch_nats(model, [r])).mean() for r in rows) / 2).backward()
    for neuron in (0, 25, 71):
        one = torch.zeros(N, dtype=torch.bool)
        one[neuron] = True
        own = [
            model.get_parameter(p.name).grad.index_select(p.axis, p.index).flatten()
            for p in neuron_parameters(model, NeuronMask.from_flat(one, WIDTHS, "mlp_hidden"))
        ]
        assert float(torch.cat(own).norm()) == pytest.approx(float(scores[neuron]), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_rank_is_the_nearest(family):
    model = families.build(family)
    neurons = candidates(model, 30)
    maps, size = mlp_maps(model, neurons.key), sum(p.of(model).numel() for p in neuron_parameters(model, neurons.key))
    with arm_training(model, "LoRA", 0, neurons) as ready:
        ours = ready.about["trained_parameters"]
        rank = ready.about["rank"]
        assert sum(p.numel() for g in ready.groups for p in g["params"]) == ours and rank == lora_rank(
            model, maps, size
        )
    one = ours // rank
    assert abs(ours - size) == min(abs(r * one - size) for r in range(1, 100)) and lora_rank(model, maps, 1) == 1
    assert (lora_rank(model, maps, int(2.6 * one)), lora_rank(model, maps, int(2.4 * one))) == (3, 2)


def test_random_and_lora_depend_on_the_seed():
    model, masks, starts = families.build("llama"), [], []
    neurons = candidates(model)
    for seed in (0, 1, 0):
        masks.append(neurons.mask("random", seed))
        with arm_training(model, "LoRA", seed, neurons) as ready:
            starts.append(digest(*[p for g in ready.groups for p in g["params"]]))
    assert masks[0] == masks[2] != masks[1] and starts[0] == starts[2] != starts[1]
    assert neurons.mask("key", 0) == neurons.mask("key", 1) and masks[0].counts == neurons.key.counts


def test_order_depends_on_the_seed_and_visits_everything():
    take = lambda seed: [i for i, _ in zip(orders(9, seed), range(18))]
    assert take(0) == take(0) != take(1) and sorted(take(2)[:9]) == sorted(take(2)[9:]) == list(range(9))


@pytest.mark.parametrize("arm", ARMS)
def test_arm_starts_from_the_model_and_gives_it_back(arm):
    model = families.build("gpt2")
    before, weights, rows = (
        families.state(model),
        {n: p.clone() for n, p in model.named_parameters()},
        [(tuple(range(4, 20)), 1)],
    )
    alone = torch.cat(batch_nats(model, rows)).detach()
    with pytest.raises(RuntimeError), arm_training(model, arm, 0, candidates(model)) as ready:
        assert torch.equal(torch.cat(batch_nats(model, rows)), alone)
        torch.cat(batch_nats(model, rows)).mean().backward()
        torch.optim.AdamW(ready.groups, lr=0.1).step()
        assert not torch.equal(torch.cat(batch_nats(model, rows)), alone) and ready.intact() is (
            None if arm == "full" else True
        )
        raise RuntimeError("in the middle")
    assert families.state(model) == before and all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("arm", ["key", "rest", "LoRA"])
def test_a_frozen_weight_that_moves_is_noticed(arm):
    model = families.build("llama")
    neurons = candidates(model)
    part = neuron_parameters(model, neurons.key)[0]
    with arm_training(model, arm, 0, neurons) as ready:
        weight = dict(model.named_parameters()).get(part.name)
        weight = model.get_submodule(part.name.removesuffix(".weight")).base_layer.weight if weight is None else weight
        with torch.no_grad():
            weight.index_fill_(part.axis, part.index[:1], 7.0)
        assert ready.intact() is False


def test_model_changed_during_the_study_is_noticed(tmp_path, monkeypatch):
    model, real = families.build("llama"), comparison.write_json

    def meddle(path, content):
        if path.name.startswith("sweep-"):
            model.get_input_embeddings().weight.data[0, 0] += 1
        return real(path, content)

    monkeypatch.setattr(comparison, "write_json", meddle)
    with pytest.raises(RuntimeError):
        study(tmp_path, model=model)


# one run


@pytest.mark.parametrize("arm, lr", [("key", 3e-2), ("full", 1e-2)])
def test_early_stopping_keeps_the_best_state(arm, lr):
    """Four windows of the same few words to learn by heart: at first other windows gain, since the same words come up
    in them; then they lose."""
    draw = lambda seed: [
        Example(tuple(ids), 1) for ids in np.random.default_rng(seed).integers(5, 20, (4, 12)).tolist()
    ]
    model, task = families.build("llama"), TuningTask("windows", draw(0), draw(1), draw(1), ["unused"])
    settings, start = (
        TuningSettings(**SMALL | dict(steps=60, eval_every=2, patience=3, batch_size=4)),
        score(model, task.val),
    )
    with arm_training(model, arm, 0, candidates(model, 40)) as ready:
        run = train_run(model, ready, task, start, lr, 0, settings)
        kept = score(model, task.val)
    losses = [r["val_loss"] for r in run["curve"]]
    best = losses.index(min(losses))
    assert (
        0 < best == len(losses) - 4
        and run["steps"] == run["curve"][-1]["step"] < 60
        and run["best_step"] == run["curve"][best]["step"]
    )
    assert losses[best] < losses[0] and all(x > losses[best] for x in losses[best + 1 :]) and kept.loss == losses[best]
    with arm_training(model, arm, 0, candidates(model, 40)) as ready:
        run = train_run(model, ready, task, start, lr, 0, replace(settings, steps=run["best_step"], patience=0))
        assert score(model, task.val).nats == kept.nats  # the state of that step, bit for bit
    with arm_training(model, arm, 0, candidates(model, 40)) as ready:
        assert train_run(model, ready, task, start, lr, 0, replace(settings, patience=0))["steps"] == 60


def test_the_choice_loss_chooses_the_best_step(monkeypatch):
    """The vocabulary loss is best at the fourth step, the choice loss at the second."""
    model, task, told = families.build("llama"), planted_task(), iter([(4.0, 0.6), (3.0, 0.5), (2.0, 0.55), (1.0, 0.6)])
    made_up = lambda loss, choice: Scores([loss], [1], [0], [True], [choice])
    monkeypatch.setattr(comparison, "score", lambda *a: made_up(*next(told)))
    with arm_training(model, "full", 0, candidates(model)) as ready:
        run = train_run(
            model, ready, task, made_up(5.0, 0.69), 1e-3, 0, TuningSettings(**SMALL | dict(eval_every=1, steps=4))
        )
    assert run["best_step"] == 2 and [r["val_choice_loss"] for r in run["curve"]] == [0.69, 0.6, 0.5, 0.55, 0.6]


def test_diverged_run_ends_at_once():
    model, task = families.build("llama"), planted_task()
    with arm_training(model, "full", 0, candidates(model)) as ready:
        run = train_run(model, ready, task, score(model, task.val), float("1e38"), 0, TuningSettings(**SMALL))
    assert run["diverged"] and run["steps"] < 12


def test_training_is_what_it_says_it_is():
    "Against a loop written by hand: AdamW, decay of matrices only, clipping, warmup, order of the examples."
    model, task, settings = (
        families.build("llama"),
        planted_task(),
        TuningSettings(**SMALL | dict(weight_decay=0.5, clip=0.1, warmup=2, steps=4)),
    )
    with arm_training(model, "full", 0, candidates(model), 0.5) as ready:
        train_run(model, ready, task, Scores([1e9], [1], [0], []), 1e-2, 5, settings)
        ours = [p.detach().clone() for p in model.parameters()]
    net = families.build("llama").train()
    groups = [
        {"params": [p for p in net.parameters() if (p.dim() > 1) == m], "weight_decay": 0.5 * m} for m in (True, False)
    ]
    optimizer, order = torch.optim.AdamW(groups, lr=1e-2), orders(len(task.train), 5)
    for factor in (1 / 3, 2 / 3, 1, 1):
        nats = []
        for e in (task.train[next(order)] for _ in range(2)):
            logits = net(torch.tensor([e.ids])).logits[0]
            nats.append(
                torch.nn.functional.cross_entropy(
                    logits[e.start - 1 : -1], torch.tensor(e.ids[e.start :]), reduction="none"
                )
            )
        for g in optimizer.param_groups:
            g["lr"] = 1e-2 * factor
        torch.cat(nats).mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    for p, q in zip(ours, net.parameters()):
        torch.testing.assert_close(p, q.detach(), rtol=1e-4, atol=1e-5)


# losses and examples


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("start", [1, 4])
def test_losses_do_not_depend_on_the_company(family, start):
    model = families.build(family)
    rows = [(tuple(range(4, 20)), start), (tuple(range(30, 38)), start), (tuple(range(30, 37)) + (9,), start)]
    together = batch_nats(model, rows)
    for row, nats in zip(rows, together):
        logits = model(torch.tensor([row[0]])).logits[0].log_softmax(-1)
        alone = -logits[start - 1 : -1].gather(1, torch.tensor(row[0][start:])[:, None])[:, 0]
        torch.testing.assert_close(nats, alone, rtol=1e-4, atol=1e-4)


def test_a_model_that_gives_all_logits_will_do():
    model, rows = families.build("llama"), [(tuple(range(4, 20)), 6), (tuple(range(30, 38)), 5)]
    wanted, forward = batch_nats(model, rows), model.forward
    model.forward = lambda input_ids, attention_mask, use_cache: forward(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache
    )
    for a, b in zip(batch_nats(model, rows), wanted):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("words", [("w40", "w41"), ("w40 w7", "w41"), ("w40 w7", "w40 w8")])
def test_label_accuracy_agrees_with_the_one_of_the_evaluation(words):
    model, tokenizer = families.build("llama"), families.tokenizer()
    data = [(families.words(3 + i % 4, seed=i), i % 2) for i in range(20)]
    theirs = label_accuracy(model, tokenizer, data, "{text} w30", words, progress=False)
    ours = score(model, labelled_examples(tokenizer, *map(list, zip(*data)), "{text} w30", words))
    assert ours.correct == (theirs.labels == theirs.predictions).tolist() and 0 < ours.means["accuracy"] < 1
    torch.testing.assert_close(
        torch.tensor(ours.nats), -theirs.log_likelihoods.gather(1, theirs.labels[:, None])[:, 0], rtol=1e-4, atol=1e-4
    )


def test_choice_loss_is_that_of_the_label_among_the_labels():
    model, tokenizer = families.build("gpt2"), families.tokenizer()
    ours = score(
        model,
        labelled_examples(
            tokenizer,
            [families.words(4, seed=i) for i in range(6)],
            [0, 1, 2] * 2,
            "{text} w30",
            ("w40", "w41 w7", "w42"),
            16,
        ),
    )
    for e, choice, right in zip(
        labelled_examples(
            tokenizer,
            [families.words(4, seed=i) for i in range(6)],
            [0, 1, 2] * 2,
            "{text} w30",
            ("w40", "w41 w7", "w42"),
            16,
        ),
        ours.choice_nats,
        ours.correct,
    ):
        likely = []
        for ids, start in e.rows:
            logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            likely.append(sum(logits[p - 1, ids[p]] for p in range(start, len(ids))).exp().item())
        assert choice == pytest.approx(-math.log(likely[e.label] / sum(likely)), rel=1e-4) and right == (
            likely[e.label] == max(likely)
        )
    assert ours.means["choice_loss"] == pytest.approx(np.mean(ours.choice_nats)) == ours.criterion != ours.loss
    plain = score(model, [Example((4, 5, 6), 1)])
    assert plain.means["choice_loss"] is None and plain.criterion == plain.loss and plain.choice_nats == []


def test_texts_of_the_speeches_span_all_years(monkeypatch):
    speeches = {
        "fit": [f"first half {i} . year {i} goes on" for i in range(100)],
        "eval": [f"year {i} of the others" for i in range(100, 110)],
    }
    monkeypatch.setattr(texts, "load_texts", lambda name, split: {"text": speeches[split]})
    task = speeches_task(lambda text, **options: {"input_ids": list(range(len(text.split())))}, 200, 20, 10, 8)
    years = [int(re.search(r"year (\d+)", t).group(1)) for t in task.texts]
    assert (
        len(years) == 90
        and not set(years) & set(range(5, 100, 10))
        and {e.document for e in task.val} == set(range(10))
    )
    for n in (6, 10, 20):
        assert all(any(part <= y < part + 25 for y in years[:n]) for part in (0, 25, 50, 75))


def test_window_loss_agrees_with_the_perplexity():
    model, tokenizer = families.build("llama"), families.tokenizer()
    texts = [families.words(9, seed=i) for i in range(5)]
    ours = score(model, [Example(tuple(ids), 1) for ids in EvalSet(tokenizer, texts).ids])
    assert (
        ours.loss == pytest.approx(perplexity(model, tokenizer, texts, progress=False).nats, rel=1e-5)
        and ours.means["accuracy"] is None
    )


def test_label_examples_are_cut_in_the_text_not_in_the_prompt():
    tokenizer = families.tokenizer()
    long = labelled_examples(tokenizer, [families.words(50)], [1], "w4 {text} w30", ("w40", "w41"), 12)[0]
    assert (
        len(long.ids) == 12
        and long.ids[0] == 4
        and long.ids[-2:] == (30, 41)
        and long.start == 11
        and long.choices == ((40,), (41,))
    )
    with pytest.raises(ValueError):
        labelled_examples(tokenizer, ["w5"], [0], "w4 {text} w30", ("w40", "w41"), 2)
    with pytest.raises(ValueError):
        labelled_examples(tokenizer, ["w5"], [0], "{text} w30", ("w40", "w40"), 12)


def test_excerpts_spread_over_documents_and_within():
    texts = [" ".join(f"{d}.{i}" for i in range(100)) for d in range(3)]
    found = excerpts(texts, 6, 40)
    assert (
        [d for d, _ in found] == [0, 1, 2, 0, 1, 2]
        and len({t for _, t in found}) == 6
        and all(t in texts[d] for d, t in found)
    )
    assert all(t.split()[0] in texts[d].split() for d, t in found)
    assert [d for d, _ in excerpts(texts, 2, 40)] == [0, 1] and excerpts(["ab"], 1, 40) == [(0, "ab")]


CHINESE = "".join(chr(0x4E00 + i) for i in range(6000))
BORDERLESS = {
    "no spaces": CHINESE,
    "new lines": "\n".join(CHINESE),
    "no-break spaces": "\u00a0".join(CHINESE),
    "thai": "".join(chr(0x0E01 + i % 46) for i in range(6000)),
    "one long word": "ab" * 3000,
    "few spaces": " ".join([CHINESE[:2500], CHINESE[2500:]]),
}


def letters(text, **options):
    "A tokenizer that knows characters alone."
    return {"input_ids": [ord(c) for c in text]}


@pytest.mark.parametrize("kind", BORDERLESS)
def test_windows_of_texts_without_spaces_are_spread_too(kind):
    windows = window_examples(letters, [BORDERLESS[kind]], 8, 48)
    assert len(windows) == 8 and all(len(w.ids) == 48 for w in windows)
    places = [excerpt for _, excerpt in excerpts([BORDERLESS[kind]], 8, 480)]
    assert len(places) == 8 and all(p in BORDERLESS[kind] for p in places)
    if kind not in ("thai", "one long word"):  # these repeat themselves
        assert len({w.ids for w in windows}) == 8


@pytest.mark.parametrize("kind", BORDERLESS)
def test_labelled_texts_without_spaces_are_cut_and_not_emptied(kind):
    e = labelled_examples(letters, [BORDERLESS[kind]], [1], "R: {text}\nS:", ("good", "bad"), 40)[0]
    read = "".join(map(chr, e.ids))
    assert len(e.ids) <= 40 and read.startswith("R: ") and read.endswith("\nS: bad")
    assert len(read) > 30 and read[3:20] == BORDERLESS[kind][:17]


# the tables and the figures


def test_a_diverged_run_is_said(finished, tmp_path):
    shutil.copytree(finished[0] / "planted", tmp_path / "planted")
    path = tmp_path / "planted" / "run-full-seed1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"diverged": True}))
    assert "full, seed 1, diverged at step 12" in repr(read_tuning(tmp_path)) and "seed 1, diverged" not in repr(
        finished[1]
    )


def test_saved_tables_are_read_as_they_were(finished, tmp_path):
    results = finished[1]
    results.save(tmp_path)
    read = read_tuning(tmp_path)
    for name in ("runs", "curves", "sweep", "intervals"):
        pd.testing.assert_frame_equal(getattr(read, name), getattr(results, name), check_exact=True)
    assert read.facts == json.loads(json.dumps(results.facts)) and repr(read) == repr(results)
    assert set(read_tuning(tmp_path, arms=["key"]).runs["arm"]) == {"key"}
    with pytest.raises(ValueError):
        read_tuning(tmp_path, seeds=[0])


def test_nothing_finished_is_said(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_tuning(tmp_path)


def note(ax):
    "The small print below the title."
    return " ".join(t.get_text().replace("\n", " ") for t in ax.texts)


FIGURES = {
    "learning": lambda r, **where: tuning_figures.plot_learning(r.curves, **where),
    "accuracy": lambda r, **where: tuning_figures.plot_learning(r.curves, "val_accuracy", **where),
    "outcome": lambda r, **where: tuning_figures.plot_outcome(r.intervals, r.runs, "test accuracy", level=0.5, **where),
    "difference": lambda r, **where: tuning_figures.plot_outcome(r.intervals, reference="full", **where),
    "forgetting": lambda r, **where: tuning_figures.plot_forgetting(r.runs, **where),
    "cost": lambda r, **where: tuning_figures.plot_cost(r.runs, **where),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_draw_on_given_axes_and_from_csv_files(finished, tmp_path, name):
    results, settings = finished[1], dict(plt.rcParams)
    results.save(tmp_path)
    read = TuningResults(
        *(pd.read_csv(tmp_path / f"{n}.csv") for n in ("runs", "curves", "sweep", "intervals")), results.facts
    )
    drawn = []
    for r in (results, read):
        fig, ax = plt.subplots()
        assert (
            FIGURES[name](r, ax=ax) is ax
            and ("bootstrap over" in note(ax)) == (name in ("outcome", "difference"))
            and ax.get_title("left")
            and ax.get_xlabel()
        )
        fig.canvas.draw()
        drawn.append(np.asarray(fig.canvas.buffer_rgba()).copy())
        plt.close(fig)
    assert np.array_equal(*drawn) and dict(plt.rcParams) == settings


def test_whole_figure_and_refusals(finished):
    r = finished[1]
    fig = tuning_figures.plot_tuning(
        r.runs, r.curves, pd.concat([r.intervals, r.intervals.query("reference == 'full'").assign(reference="random")])
    )
    assert len(fig.axes) == 6
    plt.close(fig)
    _, ax = plt.subplots()
    tuning_figures.plot_outcome(r.intervals, measure="wiki loss", ax=ax)
    assert "bootstrap over 3 documents" in note(ax)  # of six windows
    plt.close("all")
    for measure, wanted in ((None, "choice loss"), ("val_loss", "validation loss")):
        _, ax = plt.subplots()
        assert wanted in tuning_figures.plot_learning(r.curves, measure, ax=ax).get_ylabel()
    assert (
        "choice loss" in tuning_figures.plot_forgetting(r.runs).get_xlabel()
        and "choice loss" in tuning_figures.plot_outcome(r.intervals).get_xlabel()
    )
    plt.close("all")
    two = pd.concat([r.runs, r.runs.assign(task="other")])
    with pytest.raises(ValueError):
        tuning_figures.plot_cost(two)
    with pytest.raises(ValueError):
        tuning_figures.plot_learning(r.curves, "loss")
    with pytest.raises(ValueError):
        tuning_figures.plot_forgetting(r.runs.drop(columns="wiki_loss"))
    looks = list(tuning_figures.TUNING_LOOKS.values())
    assert set(tuning_figures.TUNING_LOOKS) == set(ARMS) and len({c for c, _, _ in looks}) == len(
        {m for _, m, _ in looks}
    ) == len(ARMS)
