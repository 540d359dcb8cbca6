"""How much memory does a training step take on a quantised base, and what does the rounding cost in loss?"""

import argparse
import gc
import json
import sys
import warnings

import torch
from finetune import Training
from table import forget_peak, in_own_process, peak_megabytes, publish, seconds
from torch import nn

ARMS = {  # arm -> (how it is made, bar on its memory, bar on its loss), as ratios to float32
    "float32": (None, None, None),
    "int8 weights, torchao": ("torchao", 0.55, 1.02),
    "int8 weights and inputs, torch": ("torch", None, None),
    "int8, bitsandbytes": ("8 bits", 0.55, 1.02),
    "NF4, bitsandbytes": ("4 bits", 0.55, None),
}


def quantise(model: nn.Module, how: str | None) -> None:
    "Quantise every linear map but the head, in place."
    for name, linear in [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and "head" not in n]:
        parent, _, own = name.rpartition(".")
        if how == "torchao":
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            quantize_(linear, Int8WeightOnlyConfig())
        elif how == "torch":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                whole = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)
            setattr(model.get_submodule(parent), own, whole[0])
        elif how is not None:
            setattr(model.get_submodule(parent), own, _of_bitsandbytes(linear, how))


def _of_bitsandbytes(linear: nn.Linear, how: str) -> nn.Module:
    import bitsandbytes

    shape = (linear.in_features, linear.out_features, linear.bias is not None)
    made = (
        bitsandbytes.nn.Linear8bitLt(*shape, has_fp16_weights=False, device="meta")
        if how == "8 bits"
        else bitsandbytes.nn.Linear4bit(*shape, quant_type="nf4", compute_dtype=linear.weight.dtype, device="meta")
    )
    kind = type(made.weight)
    options = {"has_fp16_weights": False} if how == "8 bits" else {"quant_type": "nf4", "module": made}
    made.weight, made.bias = kind(linear.weight.data, requires_grad=False, **options), linear.bias
    return made.to(linear.weight.device)


def child(arguments: dict) -> None:
    "Three steps in a process of their own; prints how far memory grew beyond the loaded libraries, and what holds it."
    from transformers import AutoModelForCausalLM  # noqa: F401  what is imported on the way is no part of any arm

    arm, before = arguments.pop("arm"), peak_megabytes()
    training = Training(arm="selected", prepare=lambda model: quantise(model, ARMS[arm][0]), **arguments)
    gc.collect()
    forget_peak()
    times = [seconds(training.step)[1] for _ in range(3)]
    parts = {name: n / 2**20 for name, n in training.model.neuron_tuning.memory().items()}
    print("\n" + json.dumps({"peak_mb": peak_megabytes() - before, "cpu_s": min(times), "parts_mb": parts}))


def loss_after(arm: str, steps: int, lr: float) -> list[float]:
    "The default model learns two texts of 64 tokens; the loss before each step and after the last."
    from llmfact_nb import NeuronMask, NeuronTuningConfig, get_neuron_model, load_model, load_texts

    model, tokenizer = load_model()
    ids = tokenizer(load_texts("wiki", "fit", n=2)["text"][:], return_tensors="pt", truncation=True, max_length=64)
    ids = ids["input_ids"]
    quantise(model, ARMS[arm][0])
    drawn = torch.rand(30 * 1536, generator=torch.Generator().manual_seed(0)) < 0.02
    mask = NeuronMask.from_flat(drawn, [1536] * 30, site="mlp_hidden")
    get_neuron_model(model.train(), NeuronTuningConfig("selected", mask), verbose=False)
    frozen = model.neuron_tuning.frozen_digests()
    optimizer, found = torch.optim.AdamW(model.neuron_tuning.param_groups(weight_decay=0.1, lr=lr)), []
    for step in range(steps + 1):
        with torch.set_grad_enabled(step < steps):
            found.append(model(input_ids=ids, labels=ids).loss)
        if step < steps:
            found[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
    assert model.neuron_tuning.frozen_digests() == frozen, "the base has moved"
    return [float(x) for x in found]


def verdict(value: float, bar: float | None) -> str:
    return f"{value:.3f}" + ("" if bar is None else f" (bar {bar:.2f})")


def table(args, found: dict) -> None:
    "Publish what was found for each arm."
    plain, rows = found["float32"], []
    for arm, (_, memory, loss) in ((name, ARMS[name]) for name in found):
        f, parts = found[arm], found[arm]["parts_mb"]
        rows.append([arm, f"{parts['base']:,.0f} MB", f"{parts['slices']:,.0f} MB", f"{parts['gradients']:,.0f} MB"])
        rows[-1] += [f"{parts['AdamW']:,.0f} MB", f"{f['peak_mb']:,.0f} MB"]
        rows[-1] += [verdict(f["peak_mb"] / plain["peak_mb"], memory), f"{f['cpu_s'] / plain['cpu_s']:.2f}"]
        rows[-1] += [f"{f['loss'][0]:.3f}", f"{f['loss'][-1]:.3f}", verdict(f["loss"][-1] / plain["loss"][-1], loss)]
    note = (
        f"Memory and time: a Llama-like random model of size {args.size}, {args.rows} x {args.length} tokens, "
        f"{args.share:.0%} of the neurons of every layer train; growth of a fresh process over three steps, the loaded "
        "weights included; processor time of the fastest step. Loss: smollm2-135m learns two texts of 64 tokens in "
        f"{args.steps} steps with a learning rate of {args.lr:g}, 2% of its neurons; the frozen weights were equal bit "
        "for bit in every arm."
    )
    head = ["base", "weights", "slices", "gradients", "AdamW", "peak memory", "ratio", "time, ratio"]
    publish(
        "quantised", [*head, "loss before", "loss after", "ratio"], rows, note, {"arguments": vars(args), "arms": found}
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="1B", help="a size of finetune.LARGE")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--share", type=float, default=0.02, help="share of the neurons that train")
    parser.add_argument("--steps", type=int, default=20, help="of the run whose loss is compared")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--loss", choices=list(ARMS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(json.loads(args.child))
        sys.exit()
    if args.loss:
        print("\n" + json.dumps({"loss": loss_after(args.loss, args.steps, args.lr)}))
        sys.exit()

    shape, found = dict(family=args.size, rows=args.rows, length=args.length, share=args.share), {}
    for arm in ARMS:
        found[arm] = in_own_process(__file__, "--child", json.dumps(dict(arm=arm, **shape)))
        found[arm] |= in_own_process(__file__, "--loss", arm, "--steps", str(args.steps), "--lr", str(args.lr))
        print(arm, found[arm], flush=True)
    table(args, found)
