"""Pins the call of lm-evaluation-harness on a small random model and tasks of its own: scores by hand, masks, batches,
cut requests counted, nothing left behind."""

import importlib.util
import json
import math
import random

import families
import numpy as np
import pytest
import torch

from llmfact_nb.scores import harness
from llmfact_nb.base.statistics import wilson
from llmfact_nb.evaluate import label_accuracy
from llmfact_nb.masked_model import MaskedModel
from llmfact_nb.masks import NeuronMask

installed = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed: pip install 'llmfact_nb[lm-eval]'"
)


def example():
    return {
        "results": {
            "toy": {
                "alias": "toy",
                "acc,none": 0.75,
                "acc_stderr,none": 0.2,
                "loss,none": 2.0,
                "loss_stderr,none": 0.5,
                "none": "x",
            }
        },
        "configs": {"toy": {"output_type": "multiple_choice"}},
        "n-samples": {"toy": {"original": 9, "effective": 4}},
        "samples": {
            "toy": [{"doc_id": i, "target": t, "resps": [0, 0, 0]} for i, t in enumerate("2212")] * 2
        },  # two filters
    }


def test_results_become_a_table():
    accuracy, loss = harness.result_rows(example(), 3)
    assert accuracy == dict(
        task="toy",
        metric="acc",
        filter="none",
        value=0.75,
        low=wilson(3, 4).low,
        high=wilson(3, 4).high,
        stderr=0.2,
        n=4,
        chance=1 / 3,
        majority=0.75,
        n_cut=3,
    )
    assert (loss["low"], loss["high"]) == pytest.approx((1.02, 2.98)) and math.isnan(loss["chance"])
    other = example() | {"configs": {"toy": {"output_type": "generate_until"}}}
    assert math.isnan(harness.result_rows(other, 0)[0]["majority"])


def test_without_the_harness_its_installation_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "lm_eval" else find(name, *more)
    )
    with pytest.raises(ImportError):
        harness.evaluate_with_lm_eval(None, None, "any")


@pytest.fixture
def task(tmp_path):
    "A task of eight questions with two answers each, in a local file."
    rows = [dict(text=families.words(2 + i % 4, i), right=i % 2) for i in range(8)]
    file = tmp_path / "toy.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = dict(
        task="toy",
        dataset_path="json",
        dataset_kwargs=dict(data_files=dict(test=str(file)), cache_dir=str(tmp_path / "cache")),
        test_split="test",
        output_type="multiple_choice",
        doc_to_text="{{text}}",
        doc_to_choice=["w40", "w41"],
        doc_to_target="right",
        metric_list=[dict(metric="acc")],
    )
    return config, [(r["text"], r["right"]) for r in rows]


@pytest.mark.extra
@installed
def test_scores_are_those_of_label_accuracy_for_every_arm(task, tiny_model, tiny_tokenizer):
    (config, data), model, tokenizer = task, tiny_model("llama"), tiny_tokenizer(pad=False)
    mask = NeuronMask.from_layers([torch.arange(24) % 2 == 0] * 3, "mlp_hidden")
    model.train()
    before, states = (
        families.state(model),
        (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()),
    )
    rows = []
    for m in (None, mask, None):
        ours = label_accuracy(
            MaskedModel(model).bake(m) if m is not None else model,
            tokenizer,
            data,
            "{text}",
            ["w40", "w41"],
            progress=False,
        )
        for tokens in (4096, 1):  # one batch, and one by one
            (row,) = harness.evaluate_with_lm_eval(
                model, tokenizer, config, mask=m, tokens=tokens, bootstrap_iters=0
            ).to_dict("records")
            assert (
                row["value"] == ours.accuracy
                and (row["low"], row["high"]) == ours.ci
                and (row["chance"], row["majority"], row["n"], row["n_cut"]) == (0.5, 0.5, 8, 0)
            )
        rows.append(ours.log_likelihoods)
    assert not torch.allclose(rows[0], rows[1], atol=1e-2)
    assert families.state(model) == before and tokenizer.pad_token is None
    assert (
        states[0] == random.getstate()
        and states[1] == np.random.get_state()[1].tolist()
        and torch.equal(states[2], torch.get_rng_state())
    )
    (cut,) = harness.evaluate_with_lm_eval(model, tokenizer, config, max_length=4, bootstrap_iters=0).n_cut
    assert cut == 2 * sum(len(text.split()) > 4 for text, _ in data) > 0


@pytest.mark.extra
@installed
def test_what_would_spoil_the_comparison_is_refused(task, tiny_model, tiny_tokenizer):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    for option in (dict(use_cache="here"), dict(cache_requests=True), dict(batch_size=4)):
        with pytest.raises(ValueError):
            harness.evaluate_with_lm_eval(model, tokenizer, task[0], **option)
    with pytest.raises(ValueError):
        harness.evaluate_with_lm_eval(model, tokenizer, [])
    with pytest.raises(TypeError):
        harness.evaluate_with_lm_eval(model.model, tokenizer, task[0])
