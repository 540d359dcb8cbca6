"""Pins `llmfact prune` and `llmfact fingerprint` on a small world: what is removed, kept, said and refused."""

import json
import math

import pytest
from small_runs import llmfact, small_run, small_world

from llmfact_nb.command.run import read_found
from llmfact_nb.masks import union
from llmfact_nb.tuning.pruning import load_pruned


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    small_run(world, out)
    return out


def test_the_smaller_model_is_saved_and_told(run, tmp_path):
    out = tmp_path / "pruned"
    line = f"prune --run {run} --share 0.25 --out {out}"
    bill = json.loads(llmfact(f"{line} --dry-run --json")[0])
    assert bill["dry_run"] and not out.exists()
    facts = json.loads(llmfact(f"{line} --json")[0])
    model, left = load_pruned(out), facts["neurons_left"]
    assert sum(left) == facts["neurons"] - facts["removed"] and tuple(left) == model.neuron_pruning.widths
    assert all(n % 16 == 0 for n in left)
    assert facts["removed"] == pytest.approx(0.25 * facts["neurons"], abs=8 * len(left))
    assert facts["ci"][0] <= facts["difference"] <= facts["ci"][1]
    assert facts["loss_after"] - facts["loss_before"] == pytest.approx(facts["difference"], abs=1e-9)
    made = lambda name, p: name.endswith(("gate_proj.bias", "up_proj.bias")) and not p.any()  # by the format, all zero
    weights = sum(p.numel() for name, p in model.named_parameters() if not made(name, p))
    assert weights == facts["parameters"] < facts["parameters_before"]
    assert all(s.bias is not None for s in (layer.mlp.down_proj for layer in model.model.layers))


@pytest.mark.parametrize("score", ["Wanda", "fluctuation", "magnitude", "variance", "random"])
def test_every_score_prunes(run, tmp_path, score):
    line = f"prune --run {run} --score {score} --uncompensated --anywhere --out {tmp_path / 'pruned'} --json"
    facts = json.loads(llmfact(line)[0])
    assert facts["removed"] and math.isfinite(facts["loss_after"])


def test_networks_can_be_kept_and_leave_only_so_many(run, tmp_path):
    _, found = read_found(run)
    held = union(found.network_masks())
    share = 0.5 * (1 - held.n / held.n_neurons)
    facts = json.loads(
        llmfact(f"prune --run {run} --keep-networks --share {share:.4f} --out {tmp_path / 'k'} --json")[0]
    )
    mask = load_pruned(tmp_path / "k").neuron_pruning.mask
    assert facts["removed"] == mask.n and not (mask & held).n
    _, said = llmfact(f"prune --run {run} --keep-networks --share 0.99 --anywhere --out {tmp_path / 'l'}", 2)
    assert "--share" in said and not (tmp_path / "l").exists()


def test_the_share_is_exact_without_blocks(run, tmp_path):
    line = f"prune --run {run} --share 0.3 --multiple 1 --score random --out {tmp_path / 'p'} --json"
    facts = json.loads(llmfact(line)[0])
    assert facts["removed"] == pytest.approx(0.3 * facts["neurons"], abs=0.5 * len(facts["neurons_left"]))


def test_what_cannot_be_pruned_is_refused_before_anything(run, tmp_path):
    for options in ("--share 1.5", "--score best", "--protect 9", "--share 0", "--multiple 0"):
        llmfact(f"prune --run {run} {options} --out {tmp_path / 'no'}", 2)
        assert not (tmp_path / "no").exists()
    llmfact(f"prune --run {tmp_path / 'nothing'} --out {tmp_path / 'no'}", 1)


def test_a_model_is_its_own_kin_on_the_command_line(world):
    model, texts = world / "model", world / "texts.jsonl"
    line = f"fingerprint {model} {model} --texts {texts} --n-texts 4 --k 3 --max-length 64 --json"
    facts = json.loads(llmfact(line)[0])
    assert facts["similarity"] == pytest.approx(1) and facts["p"] == pytest.approx(1 / 200) and len(facts["pairs"]) == 3
    assert "similarity" in llmfact(line.removesuffix(" --json"))[0]
    llmfact(f"fingerprint {model} {model} --texts {texts} --n-texts 4 --k 100000", 2)
    llmfact(f"fingerprint {model}", 2)
