"""How much slower is reading the neurons than the forward pass alone, and how much memory does reading to disk take?"""

import argparse
import gc
import json
import tempfile
from pathlib import Path

import torch
from table import forget_peak, in_own_process, in_turns, peak_megabytes, publish, within

from llmfact_nb import activations
from llmfact_nb.activations import capture
from llmfact_nb.base.models import load_model
from llmfact_nb.base.texts import load_texts
from llmfact_nb.sites import SITES, neuron_sites


class Stop(Exception):
    pass


def batches_of(model, run) -> list[dict]:
    "What the model is called with while `run()` runs for the second time; the first time `capture` makes a check."
    seen = []
    handle = model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    try:
        run()
        seen.clear()
        run()
    finally:
        handle.remove()
    return seen


def bare(model, batches, last) -> None:
    "The same batches through the same blocks, with nothing but one hook that stops at the last site."

    def stop(*_):
        raise Stop

    handle = (
        last.module.register_forward_pre_hook(stop)
        if last.where == "input"
        else last.module.register_forward_hook(stop)
    )
    try:
        with torch.no_grad():
            for kwargs in batches:
                try:
                    model(**kwargs)
                except Stop:
                    pass
    finally:
        handle.remove()


def compare(model, tokenizer, texts: list[str], length: int, repeats: int, sites=SITES) -> list[dict]:
    "Time of capture against the bare forward pass, at these sites, to memory and to disk."
    rows = []
    for site in sites:
        with tempfile.TemporaryDirectory() as folder:
            file, last = Path(folder) / "a.safetensors", neuron_sites(model, site)[-1]
            read = lambda path=None: capture(
                model, tokenizer, texts, site, max_length=length, path=path, progress=False
            )
            batches = batches_of(model, read)
            n_tokens = sum(int(b["attention_mask"].sum()) for b in batches)
            every = {f"{site} to memory": read}
            if site.startswith("mlp"):
                every[f"{site} to disk"] = lambda: read(file)
            for name, numbers in in_turns(lambda: bare(model, batches, last), every, repeats).items():
                rows.append(
                    dict(
                        what=name,
                        tokens=n_tokens,
                        batches=len(batches),
                        within=within(activations, model, every[name]),
                        **numbers,
                    )
                )
    return rows


def child(target: str, args) -> None:
    "One capture in a process of its own; prints its tokens, the growth of peak memory, and the size of the matrix."
    model, tokenizer = load_model()
    texts = load_texts("wiki", "fit", n=args.texts)["text"][:]
    capture(model, tokenizer, texts[:1], "mlp_hidden", max_length=8, progress=False)  # what is loaded on first use
    gc.collect()
    forget_peak()
    before = peak_megabytes()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors" if target == "disk" else None
        a = capture(model, tokenizer, texts, "mlp_hidden", max_length=args.length, path=path, progress=False)
        matrix = a.n_tokens * a.n_neurons * a.values.itemsize / 2**20
        print(json.dumps({"tokens": a.n_tokens, "peak_mb": peak_megabytes() - before, "matrix_mb": matrix}))


def memory(args) -> list[dict]:
    rows = []
    for target, texts in (("memory", args.texts), ("disk", args.texts), ("disk", 2 * args.texts)):
        settings = ("--child", target, "--texts", str(texts), "--length", str(args.length))
        rows.append({"what": f"mlp_hidden to {target}", **in_own_process(__file__, *settings)})
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=32, help="texts, each cut to --length tokens")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", choices=["memory", "disk"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args)
        raise SystemExit
    texts = load_texts("wiki", "fit", n=args.texts)["text"][:]
    half = texts[: args.texts // 2]
    times, peaks = compare(*load_model(), half, args.length, args.repeats), memory(args)
    rows = [
        [
            f"time, {r['what']}",
            f"{r['tokens']:,}",
            f"{r['plain_s']:.2f} s",
            f"{r['arm_s']:.2f} s",
            f"{r['ratio']:.3f}",
            f"{r['cpu_ratio']:.3f}",
            f"{r['within']:.3f}",
            "1.10" if "memory" in r["what"] else "",
        ]
        for r in times
    ]
    rows += [
        [
            f"memory, {r['what']}",
            f"{r['tokens']:,}",
            f"{r['matrix_mb']:,.0f} MB",
            f"{r['peak_mb']:,.0f} MB",
            f"{r['peak_mb'] / r['matrix_mb']:.2f}",
            "",
            "",
            "",
        ]
        for r in peaks
    ]
    note = (
        f"smollm2-135m, articles of {args.length} tokens. Time: bare forward pass, and capture with "
        f"everything it does, medians of {args.repeats} repetitions in turns on {args.texts // 2} articles. "
        "Memory: the whole matrix, and the growth of peak memory in a fresh process (one batch is at most 2,048 "
        "tokens, 360 MB at this site)."
    )
    publish(
        "capture",
        ["what", "tokens", "without", "with", "ratio", "of processor time", "within one run", "bar"],
        rows,
        note,
        {"arguments": vars(args), "times": times, "memory": peaks},
    )
