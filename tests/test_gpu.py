"""Pins that a GPU gives what the CPU gives: reading, masks, networks, tuning and generation on a tiny model, within the
tolerance that each test states. Each test also runs with the CPU in the place of the GPU, so that only the device
differs; `make test-gpu` runs the others. Then: the benchmark of GPUs runs with small sizes on the CPU."""

import sys
from pathlib import Path

import families
import pytest
import torch

from llmfact_nb.activations import capture
from llmfact_nb.evaluate import perplexity
from llmfact_nb.finetune import NeuronTuningConfig, get_neuron_model, merge_and_unload
from llmfact_nb.ica import ICA
from llmfact_nb.masked_model import MaskedModel
from llmfact_nb.masks import NeuronMask
from llmfact_nb.networks import FunctionalNetworks, match_networks
from llmfact_nb.scores.generation import generate_texts
from llmfact_nb.sites import SITES
from llmfact_nb.tuning.gates import NeuronGate
from llmfact_nb.tuning.pruning import prune
from llmfact_nb.tuning.schedules import NetworkUnfreezeCallback
from llmfact_nb.tuning.sharing import load_neurons, save_neurons

EXACT = dict(rtol=1e-3, atol=1e-4)  # float32, in another order of summation
TEXTS = [families.words(n, n) for n in (12, 5, 20, 9)]
IDS = torch.arange(4, 24)[None]


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
        ),
    ]
)
def device(request):
    "What is compared with the CPU; float32 products are exact, as on the CPU."
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield request.param
    torch.set_float32_matmul_precision(before)


def model_on(device, **sizes):
    return families.build("llama", **sizes).to(device)


def mask(share=0.3, seed=0, site="mlp_hidden"):
    width = families.HIDDEN if site == "mlp_hidden" else families.D
    drawn = torch.rand(families.LAYERS * width, generator=torch.Generator().manual_seed(seed)) < share
    return NeuronMask.from_flat(drawn, [width] * families.LAYERS, site)


def both(device, compute):
    "What `compute(device)` gives on the CPU and on the device."
    return compute("cpu"), compute(device)


@pytest.mark.parametrize("site", SITES)
def test_reading(device, site, tmp_path):
    def read(place):
        model, tokenizer = model_on(place), families.tokenizer()
        acts = capture(model, tokenizer, TEXTS, site, progress=False)
        stored = capture(model, tokenizer, TEXTS, site, path=tmp_path / f"{place}.safetensors", progress=False)
        assert acts.values.device.type == "cpu" and torch.equal(acts.values, stored.values)
        return acts

    cpu, own = both(device, read)
    torch.testing.assert_close(own.values, cpu.values, **EXACT)
    assert torch.equal(own.token_ids, cpu.token_ids) and torch.equal(own.sinks, cpu.sinks)
    half = capture(model_on(device).bfloat16(), families.tokenizer(), TEXTS, site, progress=False)
    torch.testing.assert_close(half.values, cpu.values, rtol=0.1, atol=0.05 * float(cpu.values.abs().max()))


@pytest.mark.parametrize("positions", ["all", "after-first"])
@pytest.mark.parametrize("site", ["mlp_hidden", "mlp_out"])
def test_masks(device, site, positions):
    def logits(place):
        model, m = model_on(place), mask(site=site)
        mm, found = MaskedModel(model, site), []
        mm.fit_means(capture(model, families.tokenizer(), TEXTS, site, progress=False))
        for block in (
            mm.ablate(m, positions=positions),
            mm.ablate(m, "mean", positions),
            mm.keep(m, positions=positions),
            mm.amplify(m, gain=1.5, add=0.2, positions=positions),
        ):
            with torch.no_grad(), block:
                found.append(model(IDS.to(place)).logits.cpu())
        if positions == "all":
            baked = mm.bake(m)
            assert next(baked.parameters()).device.type == torch.device(place).type
            with torch.no_grad():
                found.append(baked(IDS.to(place)).logits.cpu())
        return torch.stack(found)

    torch.testing.assert_close(*both(device, logits), **EXACT)


@pytest.mark.parametrize("kind", ["temporal", "spatial"])
@pytest.mark.parametrize("solver", ["gram", "randomized"])
def test_components(device, kind, solver):
    draw = torch.Generator().manual_seed(0)
    sources = torch.empty(400, 4).exponential_(generator=draw)
    X = sources @ torch.randn(4, 60, generator=draw) + 0.01 * torch.randn(400, 60, generator=draw)
    X = X.T.contiguous() if kind == "spatial" else X
    given = [ICA(4, kind=kind, whiten_solver=solver, n_init=3).fit(x) for x in (X, X.to(device))]
    named = ICA(4, kind=kind, whiten_solver=solver, n_init=3, device=device).fit(X)
    for other in (given[1], named):
        r = torch.corrcoef(torch.cat([given[0].maps_, other.maps_]))[:4, 4:].abs()
        assert r.max(1).values.min() > 0.999 and other.maps_.device.type == "cpu"


def test_networks(device):
    acts = capture(model_on("cpu"), families.tokenizer(), [families.words(40, i) for i in range(8)], progress=False)
    cpu, own = (FunctionalNetworks(3, n_init=3, device=d, max_iter=500).fit(acts) for d in ("cpu", device))
    assert len(match_networks(cpu.masks(), own.masks(), 0.9).pairs) == 3


@pytest.mark.parametrize("mode", ["selected", "rest", "full"])
def test_tuning(device, mode, tmp_path):
    def losses(place):
        model = model_on(place)
        get_neuron_model(model, NeuronTuningConfig(mode, None if mode == "full" else mask()), verbose=False)
        frozen = model.neuron_tuning.frozen_digests()
        optimizer = torch.optim.AdamW(model.neuron_tuning.param_groups(weight_decay=0.1, lr=1e-2))
        found, ids = [], IDS.to(place)
        for _ in range(5):
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        assert model.neuron_tuning.frozen_digests() == frozen
        tuned = model(ids).logits
        if mode == "selected":
            save_neurons(model, tmp_path / f"{place}.safetensors")
            again = load_neurons(model_on(place), tmp_path / f"{place}.safetensors", verbose=False)
            assert torch.equal(again(ids).logits, tuned)
        torch.testing.assert_close(merge_and_unload(model)(ids).logits, tuned, **EXACT)
        return torch.tensor(found)

    torch.testing.assert_close(*both(device, losses), rtol=1e-2, atol=1e-3)


def test_a_model_moves_while_it_is_tuned(device):
    model = get_neuron_model(model_on("cpu"), NeuronTuningConfig(masks=mask()), verbose=False)
    before = model(IDS).logits
    model.to(device)
    torch.testing.assert_close(model(IDS.to(device)).logits.cpu(), before, **EXACT)


def test_a_schedule_of_the_trainer(device, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = model_on(device)
    networks = {"early": mask(), "late": mask(seed=1) - mask()}
    get_neuron_model(model, NeuronTuningConfig(masks=networks), verbose=False)
    late = [p.detach().clone() for p in model.neuron_tuning.parameters_of("late")]
    options = dict(max_steps=3, per_device_train_batch_size=1, report_to="none", learning_rate=1e-2, save_strategy="no")
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), use_cpu=device == "cpu", disable_tqdm=True, **options),
        train_dataset=[{"input_ids": IDS[0], "labels": IDS[0]}] * 4,
        callbacks=[NetworkUnfreezeCallback({"early": 0, "late": 99})],
    )
    trainer.train()
    assert all(torch.equal(p, q) for p, q in zip(late, model.neuron_tuning.parameters_of("late")))
    assert next(model.parameters()).device.type == torch.device(device).type


def test_gates_and_pruning(device):
    def found(place):
        model, ids = model_on(place), IDS.to(place)
        gate = NeuronGate(mask(), kind="sigmoid")
        with gate.attached(model):
            model(ids, labels=ids).loss.backward()
        prune(model, mask())
        with torch.no_grad():
            return gate.bias.grad.cpu(), model(ids).logits.cpu()

    for cpu, own in zip(*both(device, found)):
        torch.testing.assert_close(own, cpu, **EXACT)


def test_generation_and_loss(device):
    def found(place):
        model, tokenizer = model_on(place), families.tokenizer(side="left")
        texts = [c.tokens for c in generate_texts(model, tokenizer, TEXTS[:2], 6, progress=False)]
        with MaskedModel(model).ablate(mask()):
            masked = [c.tokens for c in generate_texts(model, tokenizer, TEXTS[:2], 6, progress=False)]
        return texts, masked, perplexity(model, tokenizer, TEXTS, n_boot=0, progress=False).token_nats

    (texts, masked, nats), (own_texts, own_masked, own_nats) = both(device, found)
    assert list(texts) == list(own_texts) and list(masked) == list(own_masked)
    torch.testing.assert_close(own_nats.cpu(), nats, **EXACT)


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import gpu

    yield gpu
    for name in ("gpu", "capture", "masking", "ica", "finetune", "table"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("works", [["reading", "masking"], ["group", "tuning"]])
def test_the_benchmark_runs_with_small_sizes_on_the_cpu(bench, works):
    rows = bench.main(["--device", "cpu", "--small", "--only", *works])
    assert {r["work"].split(",")[0] for r in rows} == {
        "reading": {"reading", "masking"},
        "group": {"ICA", "tuning step"},
    }[works[0]]
    assert all(r["device"] > 0 and r["peak"] > 0 for r in rows)


@pytest.mark.extra
def test_the_whole_benchmark_runs_with_small_sizes_on_the_cpu(bench):
    rows = bench.main(["--device", "cpu", "--small"])
    assert {"reading", "masking", "ICA", "llmfact run"} < {r["work"] for r in rows}


def test_without_a_gpu_the_benchmark_says_so(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as e:
        bench.main([])
    assert "--small" in str(e.value)
