"""Pins that nothing piles up: after a hundred captures, masks, generations, trainings and fits there are as many
tensors, objects, hooks and bytes as before; and a run keeps within the memory that its dry run announced."""

import ctypes
import gc
import json
import os
import random
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import families
import pytest
import torch
from torch.optim import optimizer as optimizers

from llmfact_nb.activations import capture
from llmfact_nb.finetune import neuron_training
from llmfact_nb.masked_model import MaskedModel
from llmfact_nb.masks import NeuronMask
from llmfact_nb.networks import FunctionalNetworks

TIMES = 100
TEXTS = [families.words(60, i) for i in range(12)]
IDS = torch.arange(4, 20)[None]


def resident() -> int:
    "Bytes of main memory that this process holds, after the allocator gave back what it had free."
    if sys.platform != "linux":
        pytest.skip("resident memory is read from /proc")
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def held() -> dict[str, int]:
    "What a leak would add to."
    gc.collect()
    objects = gc.get_objects()
    tensors = sum(issubclass(type(o), torch.Tensor) for o in objects)
    return {
        "tensors": tensors,
        "objects": len(objects),
        "bytes": resident(),
        "optimizer hooks": len(optimizers._global_optimizer_pre_hooks) + len(optimizers._global_optimizer_post_hooks),
    }


def refuse_growth(once, times: int = TIMES) -> None:
    "Run it a few times, so that what is made only once is there, then often; what is held must be the same."
    for _ in range(5):
        once()
    bound = max(times * 2**16, 2**22)
    for _ in range(2):  # in a process that had much to do before, memory may settle once; a leak goes on
        before = held()
        for _ in range(times):
            once()
        after = held()
        if after["bytes"] - before["bytes"] < bound and after["tensors"] == before["tensors"]:
            break
    assert after["tensors"] == before["tensors"] and after["optimizer hooks"] == before["optimizer hooks"], (
        before,
        after,
    )
    assert after["objects"] - before["objects"] < times / 2, (
        f"{after['objects'] - before['objects']} objects more after {times} times"
    )
    assert after["bytes"] - before["bytes"] < bound, (
        f"{(after['bytes'] - before['bytes']) / 2**20:.1f} MiB more after {times} times"
    )


class Stop(Exception):
    "Thrown into a forward pass."


def ways(model) -> dict:
    "What users do over and over, by name."
    tokenizer, mask = (
        families.tokenizer(),
        NeuronMask.from_layers([torch.arange(families.HIDDEN) < 5] * families.LAYERS, "mlp_hidden"),
    )
    masked, acts = MaskedModel(model), capture(model, tokenizer, TEXTS, "mlp_hidden", progress=False)
    masked.fit_means(acts)

    def masks():
        for arm in (masked.ablate(mask), masked.keep(mask, "mean", "after-first"), masked.amplify(mask, gain=2.0)):
            with arm, torch.no_grad():
                model(IDS)

    def generation():
        with masked.ablate(mask, positions="after-first"):
            masked.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)

    def training():
        with neuron_training(model, mask, verbose=False) as tuning:
            optimizer = torch.optim.AdamW(tuning.param_groups(lr=1e-6))
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()

    def failure():
        with pytest.raises(Stop), masked.ablate(mask):
            handle = model.model.layers[1].register_forward_hook(lambda *a: (_ for _ in ()).throw(Stop))
            try:
                capture(model, tokenizer, TEXTS, "mlp_hidden", progress=False)
            finally:
                handle.remove()

    def networks():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it need not converge
            FunctionalNetworks(3, exclude="sinks", n_init=2, max_iter=3).fit(acts).key_neurons(fraction=0.05)

    return {
        "captures": lambda: capture(model, tokenizer, TEXTS, "mlp_hidden", progress=False),
        "masks": masks,
        "generations": generation,
        "copies": lambda: masked.bake(mask),
        "trainings": training,
        "failures": failure,
        "networks": networks,
    }


@pytest.mark.parametrize("way", ["captures", "masks", "generations", "copies", "trainings", "failures", "networks"])
@pytest.mark.extra
def test_doing_it_again_and_again_leaves_nothing(way):
    model = families.build("llama")
    state = families.state(model)
    refuse_growth(ways(model)[way], TIMES if way in ("captures", "masks", "generations") else 30)
    assert families.state(model) == state


@pytest.mark.parametrize("leak", ["tensor", "object", "bytes"])
@pytest.mark.extra
def test_a_leak_is_noticed(leak):
    kept = []
    leaks = {
        "tensor": lambda: kept.append(torch.zeros(1)),
        "object": lambda: kept.append([]),
        "bytes": lambda: kept.append(bytes(2**18)),
    }
    with pytest.raises(AssertionError):
        refuse_growth(leaks[leak])


SIZES = {  # what of the bound the run is made to use; (configuration, options)
    "activations": (
        dict(hidden_size=32, intermediate_size=2048, num_hidden_layers=8),
        "--fit-tokens 12000 --k 8 --eval-texts 2 --eval-length 64",
    ),
    "spatial": (
        dict(hidden_size=32, intermediate_size=2048, num_hidden_layers=8),
        "--fit-tokens 6000 --k 24 --kind spatial --eval-texts 2 --eval-length 64",
    ),
    "logits": (
        dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, vocab_size=150_000),
        "--fit-tokens 600 --k 4 --eval-texts 2 --eval-length 512",
    ),
    "parameters": (
        dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8),
        "--fit-tokens 600 --k 4 --eval-texts 2 --eval-length 32",
    ),
}


NOTHING = (
    dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2),
    "--fit-tokens 600 --k 4 --eval-texts 2 --eval-length 32",
)


def run_and_bill(folder: Path, configuration: dict, options: str) -> tuple[int, int]:
    "Peak memory of a run in a process of its own, and what the dry run said of it; bytes."
    families.build("llama", max_position_embeddings=512, **configuration).save_pretrained(folder / "model")
    families.tokenizer().save_pretrained(folder / "model")
    texts = [{"title": f"t{i}", "text": families.words(random.Random(i).randint(500, 600), i)} for i in range(120)]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    line = [
        Path(sys.executable).with_name("llmfact"),
        *shlex.split(
            f"run --out {folder / 'out'} --model {folder / 'model'} --texts {folder / 'texts.jsonl'} --n-init 1 "
            f"--control-seeds 1 {options}"
        ),
    ]
    bill = json.loads(subprocess.run([*line, "--dry-run", "--json"], check=True, capture_output=True, text=True).stdout)
    child = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, said
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), bill["memory"]


@pytest.fixture(scope="module")
def least(tmp_path_factory):
    return run_and_bill(tmp_path_factory.mktemp("least"), *NOTHING)


@pytest.mark.slow
@pytest.mark.parametrize("what", SIZES)
def test_the_memory_that_a_dry_run_announces_is_enough(what, least, tmp_path):
    peak, bound = run_and_bill(tmp_path, *SIZES[what])
    print(
        f"{what}: {peak / 1e6:,.0f} MB used, at most {bound / 1e6:,.0f} MB announced; "
        f"the least run {least[0] / 1e6:,.0f} and {least[1] / 1e6:,.0f} MB"
    )
    assert 0.25 * bound < peak <= bound
    if what in (
        "activations",
        "parameters",
    ):  # their terms are there, and not only hidden in the room that every bound has
        assert peak - least[0] <= bound - least[1]
