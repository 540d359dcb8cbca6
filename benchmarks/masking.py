"""How much slower is a masked forward pass than an unmasked one, and a baked one?"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from table import in_turns, publish, within

from llmfact_nb import masked_model
from llmfact_nb.activations import capture
from llmfact_nb.masked_model import MaskedModel
from llmfact_nb.masks import NeuronMask
from llmfact_nb.base.models import load_model
from llmfact_nb.base.texts import load_texts
from llmfact_nb.sites import neuron_sites


def arms(mm: MaskedModel, mask: NeuronMask, run: Callable) -> dict[str, Callable]:
    "What each arm runs, by name."

    def inside(context):
        def masked():
            with context():
                return run(mm.model)

        return masked

    baked = mm.bake(mask)
    return {
        "ablate, zero": inside(lambda: mm.ablate(mask)),
        "ablate, mean": inside(lambda: mm.ablate(mask, "mean")),
        "ablate, mean, after-first": inside(lambda: mm.ablate(mask, "mean", "after-first")),
        "amplify, gain 1.5": inside(lambda: mm.amplify(mask, gain=1.5)),
        "keep": inside(lambda: mm.keep(mask)),
        "baked": lambda: run(baked),
    }


def compare(model, tokenizer, texts: list[str], ids: torch.Tensor, site: str, share: float, repeats: int) -> list[dict]:
    "Time of every arm against the unmasked pass over `ids`; the means are those of `texts`."

    def run(target):
        with torch.no_grad():
            return target(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)

    sites, draw, found = neuron_sites(model, site), np.random.default_rng(0), []
    if sites.heads:
        mask = NeuronMask.from_heads(draw.random((len(sites), sites.heads[0])) < share, sites)
    else:
        mask = NeuronMask.from_flat(draw.random(sites.n_neurons) < share, sites.widths, site)
    mm = MaskedModel(model).fit_means(capture(model, tokenizer, texts, site, max_length=64, progress=False))
    every = arms(mm, mask, run)
    for name, numbers in in_turns(lambda: run(model), every, repeats).items():
        inside = None if name == "baked" else within(masked_model, model, every[name])
        found.append(dict(site=site, arm=name, within=inside, **numbers))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument(
        "--share", type=float, default=0.01, help="share of neurons in the mask, drawn at random over all layers"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sites", nargs="+", default=["mlp_hidden", "mlp_out", "attn_heads"])
    args = parser.parse_args()

    model, tokenizer = load_model()
    tokens = tokenizer(" ".join(load_texts("wiki", "fit", n=8)["text"]))["input_ids"][: args.rows * args.length]
    ids = torch.tensor(tokens).view(args.rows, args.length)
    results, few = [], load_texts("wiki", "fit", n=2)["text"][:]
    for site in args.sites:
        results += compare(model, tokenizer, few, ids, site, args.share, args.repeats)
    rows = [
        [
            r["site"],
            r["arm"],
            f"{r['plain_s']:.3f} s",
            f"{r['arm_s']:.3f} s",
            f"{r['ratio']:.3f}",
            f"{r['cpu_ratio']:.3f}",
            "" if r["within"] is None else f"{r['within']:.3f}",
            "1.00" if r["arm"] == "baked" else "1.03",
        ]
        for r in results
    ]
    note = (
        f"smollm2-135m, {args.rows} x {args.length} tokens, {args.share:.0%} of the neurons, or of the heads, drawn at "
        f"random over all layers; each arm between two unmasked passes, medians of {args.repeats} repetitions."
    )
    publish(
        "masking",
        ["site", "arm", "unmasked", "masked", "ratio", "of processor time", "within one run", "bar"],
        rows,
        note,
        {"arguments": vars(args), "arms": results},
    )
