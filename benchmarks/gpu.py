"""What does a GPU bring? The same work on the CPU and on a device, within ten minutes; without a GPU the same code runs
on the CPU: `python benchmarks/gpu.py --device cpu --small`."""

import argparse
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import capture
import ica
import masking
import numpy as np
import torch
from finetune import LARGE, Training
from table import forget_peak, peak_megabytes, publish, seconds

from llmfact_nb.ica import ICA

FULL = dict(
    model="smollm2-135m", texts=32, length=128, rows=8, repeats=3, ica=(4096, 46_080, 64), group=(6400, 352_256, 128),
    sizes=("1B", "7B"), tuning=(4, 128), run={},
)  # fmt: skip
SMALL = dict(
    model=None, texts=4, length=12, rows=2, repeats=1, ica=(120, 90, 4), group=(120, 160, 4), sizes=("tiny",),
    tuning=(2, 8), run=dict(n_components=3, n_init=2, fit_tokens=120, fit_length=24, eval_texts=2, eval_length=16,
    control_seeds=1, fraction=0.1, conditions=(("zero", "all"),)),
)  # fmt: skip


class World:
    "A model with tokenizer and texts: the default one, or for small sizes a random one."

    def __init__(self, sizes: dict, folder: Path):
        self.sizes, self.folder = sizes, folder
        if sizes["model"] is None:
            self._make_small()
        else:
            from llmfact_nb.base.texts import load_texts

            self.name, self.source = sizes["model"], "wiki"
            self.texts = load_texts("wiki", "fit", n=sizes["texts"])["text"][:]

    def _make_small(self):
        import json

        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

        kind, settings = LARGE["tiny"]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).save_pretrained(self.folder)
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w1").save_pretrained(self.folder)
        draw = np.random.default_rng(0)
        every = [" ".join(f"w{i}" for i in draw.integers(2, 64, 40)) for _ in range(40)]
        self.name, self.texts = str(self.folder), every[: self.sizes["texts"]]
        self.source = str(self.folder / "texts.jsonl")
        Path(self.source).write_text("\n".join(json.dumps({"title": f"t{i}", "text": t}) for i, t in enumerate(every)))

    def load(self, device: str) -> tuple:
        from llmfact_nb.base.models import load_model

        return load_model(self.name, device=device)

    def ids(self, tokenizer, device: str) -> torch.Tensor:
        rows, length = self.sizes["rows"], self.sizes["length"]
        tokens = tokenizer(" ".join(self.texts * rows))["input_ids"][: rows * length]
        return torch.tensor(tokens, device=device).view(rows, length)


def peak(device: str) -> float:
    "Megabytes at most in use since `fresh`: on a GPU what PyTorch allocated, on a CPU the process."
    return torch.cuda.max_memory_allocated() / 2**20 if device.startswith("cuda") else peak_megabytes()


def fresh(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()


def reading(world: World, device: str) -> Iterator[dict]:
    sizes, places = world.sizes, dict.fromkeys(("cpu", device))
    for place in places:
        fresh(place)
        found = capture.compare(*world.load(place), world.texts, sizes["length"], sizes["repeats"], ["mlp_hidden"])
        places[place] = (found[0], peak(place))
    (cpu, _), (own, memory) = places["cpu"], places[device]
    size = f"{cpu['tokens']:,} tokens, mlp_hidden to memory"
    note = f"{own['ratio']:.3f} of the bare forward pass (CPU: {cpu['ratio']:.3f})"
    yield dict(work="reading", size=size, cpu=cpu["arm_s"], device=own["arm_s"], peak=memory, note=note)


def masks(world: World, device: str) -> Iterator[dict]:
    sizes, places = world.sizes, dict.fromkeys(("cpu", device))
    for place in places:
        fresh(place)
        model, tokenizer = world.load(place)
        ids = world.ids(tokenizer, place)
        found = masking.compare(model, tokenizer, world.texts[:2], ids, "mlp_hidden", 0.05, sizes["repeats"])
        places[place] = ({f["arm"]: f for f in found}, peak(place))
    (cpu, _), (own, memory) = places["cpu"], places[device]
    for arm in ("ablate, zero", "ablate, mean, after-first", "baked"):
        size, note = f"{sizes['rows']} x {sizes['length']} tokens, {arm}", f"{own[arm]['ratio']:.3f} of the plain pass"
        note += f" (CPU: {cpu[arm]['ratio']:.3f})"
        yield dict(
            work="masking", size=size, cpu=cpu[arm]["arm_s"], device=own[arm]["arm_s"], peak=memory, note=note
        )  # fmt: skip


def components(world: World, device: str) -> Iterator[dict]:
    T, N, k = world.sizes["ica"]
    X = ica.synthetic(T, N, k, "cpu")
    on_device = X.to(device)
    size, maps, times = f"{T:,} x {N:,}, k {k}", {}, {}

    def fit(name: str, run: Callable) -> None:
        times[name] = seconds(lambda: maps.update({name: run()}))[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether a fit has converged is no question of speed
        ICA(2).fit(on_device[:64])  # what is loaded on first use
        ica.sklearn_default(X[:64, :64].numpy(), 2)
        fit("CPU", lambda: ICA(k).fit(X).maps_.numpy())
        fit("scikit-learn", lambda: ica.sklearn_default(X.numpy(), k)["maps"])
        fresh(device)
        fit("device", lambda: ICA(k).fit(on_device).maps_.numpy())
    memory = peak(device)
    r = float(np.median(ica.matched(maps["CPU"], maps["device"])))
    for other in ("CPU", "scikit-learn"):
        note = f"against {other} on the CPU" + (f"; maps agree, median r {r:.4f}" if other == "CPU" else "")
        yield dict(work="ICA", size=size, cpu=times[other], device=times["device"], peak=memory, note=note)


def group(world: World, device: str) -> Iterator[dict]:
    T, N, k = world.sizes["group"]
    fresh(device)
    found = ica.group(T, N, k, device)
    note = f"the matrix itself takes {4 * T * N / 2**20:,.0f} MB"
    yield dict(work="ICA", size=f"{T:,} x {N:,}, k {k}", device=found["seconds"], peak=found["peak_mb"], note=note)


def tuning(world: World, device: str) -> Iterator[dict]:
    rows, length = world.sizes["tuning"]
    for size in world.sizes["sizes"]:
        step = {}
        for arm in ("selected", "full"):
            fresh(device)
            try:
                training = Training(size, arm, rows, length, 0.02, device, torch.bfloat16)
                training.step()
                step[arm] = min(seconds(training.step)[0] for _ in range(world.sizes["repeats"]))
            except torch.OutOfMemoryError as e:
                print(f"{size}, {arm}: {e}")
                step[arm] = None
            memory, training = peak(device), None
            both = arm == "full" and step["full"] and step["selected"]
            note = f"selected takes {step['selected'] / step['full']:.2f} of it" if both else ""
            work = f"tuning step, {arm}" + ("" if step[arm] else ": no room")
            what = f"{size} in bfloat16, {rows} x {length} tokens"
            yield dict(work=work, size=what, device=step[arm], peak=memory, note=note)


def whole_run(world: World, device: str) -> Iterator[dict]:
    from llmfact_nb.ablation import Settings
    from llmfact_nb.command.run import run_experiment

    fresh(device)
    settings = Settings(model=world.name, texts=world.source, **world.sizes["run"])
    with tempfile.TemporaryDirectory() as out, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wall, _ = seconds(lambda: run_experiment(settings, Path(out) / "run", device, progress=False))
    yield dict(work="llmfact run", size=Path(world.name).name, device=wall, peak=peak(device), note="every arm")


WORKS = {
    "reading": reading, "masking": masks, "ica": components, "group": group, "tuning": tuning, "run": whole_run,
}  # fmt: skip


def measure(device: str, sizes: dict, works: list[str]) -> list[dict]:
    "The rows of the table, one for each measurement."
    with tempfile.TemporaryDirectory() as folder:
        world, rows = World(sizes, Path(folder)), []
        for work in works:
            for row in WORKS[work](world, device):
                rows.append(row)
                print(row, flush=True)
    return rows


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for a test; printed, not published")
    parser.add_argument("--only", nargs="+", choices=list(WORKS), default=list(WORKS), help="printed, not published")
    args = parser.parse_args(arguments)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("no GPU here; `--device cpu --small` runs the same code on the CPU")
    rows = measure(args.device, SMALL if args.small else FULL, args.only)
    cells = [
        [
            r["work"],
            r["size"],
            f"{r['cpu']:.3f} s" if r.get("cpu") else "",
            f"{r['device']:.3f} s" if r["device"] else "",
            f"{r['cpu'] / r['device']:.1f}x" if r.get("cpu") else "",
            f"{r['peak']:,.0f} MB",
            r["note"],
        ]
        for r in rows
    ]
    head = ["work", "size", "CPU", "device", "times faster", "peak memory on the device", ""]
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else "the CPU itself"
    note = f"Device: {name}. Medians, or the fastest of {FULL['repeats']} steps; random models for the tuning steps."
    if args.small or args.only != list(WORKS):
        print(*(" | ".join(row) for row in [head, *cells]), note, sep="\n")
    else:
        publish("gpu", head, cells, note, {"device": name, "rows": rows})
    return rows


if __name__ == "__main__":
    main()
