"""What does a training step cost when only some neurons train, beside full fine-tuning and LoRA: time, memory,
optimizer state?"""

import argparse
import json
import sys
from collections.abc import Callable

import numpy as np
import torch
from table import in_own_process, in_turns, peak_megabytes, publish

from llmfact_nb.finetune import NeuronTuningConfig, get_neuron_model
from llmfact_nb.masks import NeuronMask
from llmfact_nb.sites import neuron_sites

MODELS = {  # GPT-2's own size, and a Llama of about the same
    "GPT-2 size": ("gpt2", dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
    "Llama-like": (
        "llama",
        dict(
            vocab_size=32_000,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=12,
        ),
    ),
}
# Further sizes, for machines that have room for them: a Llama-like model of that many parameters, and a tiny one.
_LLAMA = dict(vocab_size=32_000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16)
LARGE = {
    "tiny": ("llama", {**_LLAMA, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                       "num_attention_heads": 4, "num_key_value_heads": 2}),
    "0.5B": ("llama", {**_LLAMA, "num_hidden_layers": 6, "num_attention_heads": 32, "num_key_value_heads": 8}),
    "1B": ("llama", {**_LLAMA, "num_attention_heads": 32, "num_key_value_heads": 8}),
    "7B": ("llama", {**_LLAMA, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
                     "num_attention_heads": 32, "num_key_value_heads": 32}),
}  # fmt: skip
# arm -> (bar on the step, on forward and backward, on peak memory), as ratios to full fine-tuning
ARMS = {
    "selected": (0.60, 0.70, 0.60),
    "selected, top quarter": (None, 0.55, None),
    "rest": (1.05, 1.05, None),
    "LoRA r=8": (None, None, None),
}


def chosen(model, share: float, top_quarter: bool) -> NeuronMask:
    "A share of the neurons of every layer, or as large a share of the last quarter of the layers alone."
    widths = neuron_sites(model, "mlp_hidden").widths
    draw, first = np.random.default_rng(0), len(widths) * 3 // 4 if top_quarter else 0
    return NeuronMask.from_layers(
        [draw.random(w) < share * (i >= first) for i, w in enumerate(widths)], site="mlp_hidden"
    )


class Training:
    "A model of one arm with its optimizer, ready to step on random tokens."

    def __init__(
        self,
        family: str,
        arm: str,
        rows: int,
        length: int,
        share: float,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        prepare: Callable = lambda model: None,
    ):
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        name, settings = {**MODELS, **LARGE}[family]
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings), dtype=dtype).train()
        prepare(model)
        if arm.startswith("LoRA"):
            from peft import LoraConfig, get_peft_model

            maps = ["c_fc", "mlp.c_proj"] if name == "gpt2" else ["gate_proj", "up_proj", "down_proj"]
            model = get_peft_model(model, LoraConfig(r=8, target_modules=maps, fan_in_fan_out=name == "gpt2"))
        else:
            mode = "selected" if arm.startswith("selected") else arm
            mask = None if mode == "full" else chosen(model, share, "quarter" in arm)
            get_neuron_model(model, NeuronTuningConfig(mode, mask), verbose=False)
        self.model, self.ids = (
            model,
            torch.randint(
                min(32_000, model.config.vocab_size), (rows, length), generator=torch.Generator().manual_seed(0)
            ).to(device),
        )
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=0.01, fused=True)

    def forward_backward(self) -> None:
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_bytes(self) -> int:
        "Gradients and AdamW's state, as they lie in memory after a backward pass."
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        state = [t for p in self.trained for t in self.optimizer.state[p].values()]
        return sum(t.numel() * t.element_size() for t in [*state, *(p.grad for p in self.trained)])


def child(arguments: dict) -> None:
    "Three steps in a process of their own; prints how far memory grew beyond the loaded libraries."
    import peft  # noqa: F401  what is imported on the way is no part of any arm
    from transformers import AutoModelForCausalLM  # noqa: F401

    before = peak_megabytes()
    training = Training(**arguments)
    for _ in range(3):
        training.step()
    peak = peak_megabytes() - before
    trained = sum(p.numel() for p in training.trained)
    print("\n" + json.dumps({"peak_mb": peak, "state_mb": training.state_bytes() / 2**20, "trained": trained}))


def memory(**arguments) -> dict:
    return in_own_process(__file__, "--child", json.dumps(arguments))


def largest_batch(family: str, limit: float, rows: int, length: int, share: float) -> tuple[int, float]:
    """How many rows `selected` may have before it needs more memory than `limit`, to a quarter of `rows`: (rows,
    megabytes)."""
    grain = max(1, rows // 4)
    used = {rows: memory(family=family, arm="selected", rows=rows, length=length, share=share)["peak_mb"]}
    used[2 * rows] = memory(family=family, arm="selected", rows=2 * rows, length=length, share=share)["peak_mb"]
    per_row = (used[2 * rows] - used[rows]) / rows
    guess = int((limit - used[rows]) / per_row / grain) * grain + rows
    while True:  # the straight line is only a guess: what is reported was run
        used[guess] = memory(family=family, arm="selected", rows=guess, length=length, share=share)["peak_mb"]
        if used[guess] <= limit:
            return guess, used[guess]
        guess -= grain


def verdict(value: float, bar: float | None) -> str:
    return f"{value:.2f}" + ("" if bar is None else f" (bar {bar:.2f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument(
        "--share", type=float, default=0.02, help="share of the neurons that train (selected) or are frozen (rest)"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(json.loads(args.child))
        sys.exit()

    shape, rows, results, versus = (dict(rows=args.rows, length=args.length, share=args.share), [], [], {})
    for family in MODELS:
        full = Training(family, "full", **shape)
        arms = {arm: Training(family, arm, **shape) for arm in ARMS}
        print(family)
        step = in_turns(full.step, {arm: t.step for arm, t in arms.items()}, args.repeats)
        both = in_turns(full.forward_backward, {arm: t.forward_backward for arm, t in arms.items()}, args.repeats)
        del full, arms
        shorter_longer = {}
        for length in (
            args.length // 2,
            4 * args.length,
        ):  # the optimizer's work does not depend on the tokens, so its share of a step does
            other = {arm: Training(family, arm, args.rows, length, args.share) for arm in ("full", "selected")}
            shorter_longer[length] = in_turns(other["full"].step, {"selected": other["selected"].step}, args.repeats)[
                "selected"
            ]
            del other
        peak = {arm: memory(family=family, arm=arm, **shape) for arm in ("full", *ARMS)}
        batch, needs = largest_batch(family, peak["full"]["peak_mb"], **shape)
        rows.append(
            [
                family,
                "full",
                f"{step['selected']['plain_s']:.2f} s",
                "1",
                "1",
                f"{peak['full']['peak_mb']:,.0f} MB",
                "1",
                f"{peak['full']['state_mb']:,.0f} MB",
                f"{args.rows} x {args.length}",
            ]
        )
        for arm, bars in ARMS.items():
            p = peak[arm]
            ratio = p["peak_mb"] / peak["full"]["peak_mb"]
            rows.append(
                [
                    family,
                    arm,
                    f"{step[arm]['arm_s']:.2f} s",
                    verdict(step[arm]["ratio"], bars[0]),
                    verdict(both[arm]["ratio"], bars[1]),
                    f"{p['peak_mb']:,.0f} MB",
                    verdict(ratio, bars[2]),
                ]
            )
            rows[-1] += [
                f"{p['state_mb']:,.1f} MB (1/{peak['full']['state_mb'] / p['state_mb']:.0f})",
                f"{batch} x {args.length} ({needs:,.0f} MB)" if arm == "selected" else "",
            ]
            results.append(
                dict(
                    family=family,
                    arm=arm,
                    step=step[arm],
                    forward_backward=both[arm],
                    memory=p,
                    full_memory=peak["full"],
                )
            )
        results[-len(ARMS)] |= {"largest_rows": batch, "other_lengths": shorter_longer}
        for measure, a, b in (
            ("step", step, "ratio"),
            ("forward + backward", both, "ratio"),
            ("peak memory", peak, "peak_mb"),
            ("state", peak, "state_mb"),
        ):
            versus.setdefault(family, {})[measure] = a["selected"][b] / a["LoRA r=8"][b]
        for length, r in shorter_longer.items():
            rows.append(
                [
                    family,
                    f"selected, {args.rows} x {length} tokens",
                    f"{r['arm_s']:.2f} s",
                    f"{r['ratio']:.2f}",
                    *[""] * 5,
                ]
            )
    note = (
        f"Random weights, {args.rows} x {args.length} tokens, {args.share:.0%} of the neurons of every layer, "
        f"fused AdamW with clipping; ratios to full fine-tuning, each arm between two full steps, medians of "
        f"{args.repeats} "
        "repetitions. Memory: growth of a fresh process over three steps, weights included. State: gradients and both "
        "moments. Batch: the largest that stays within the memory of full."
    )
    note += (
        " Selected over LoRA r=8: "
        + "; ".join(f"{family}: " + ", ".join(f"{k} {v:.2f}" for k, v in of.items()) for family, of in versus.items())
        + "."
    )
    publish(
        "finetune",
        [
            "model",
            "arm",
            "step",
            "ratio",
            "forward + backward",
            "peak memory",
            "ratio",
            "state",
            "batch at equal memory",
        ],
        rows,
        note,
        {"arguments": vars(args), "arms": results, "selected_over_lora": versus},
    )
