"""How much faster is evaluation in batches than one text at a time?"""

import argparse

import torch
from table import in_turns, publish

from llmfact_nb.evaluate import EvalSet, cloze_accuracy, label_accuracy, perplexity
from llmfact_nb.scores.generation import generate_texts
from llmfact_nb.base.texts import load_cloze, load_labelled, load_texts
from llmfact_nb.base.models import load_model

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reviews", type=int, default=60, help="sentences to label")
    parser.add_argument("--capitals", type=int, default=120, help="sentences to complete by one word")
    parser.add_argument("--prompts", type=int, default=16, help="sentences to go on with")
    parser.add_argument("--texts", type=int, default=24, help="texts whose loss is taken")
    parser.add_argument("--length", type=int, default=32, help="tokens of each of them")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default=None)
    args = parser.parse_args()

    model, tokenizer = load_model(device=args.device)
    reviews, capitals = (
        load_labelled("rotten-tomatoes", "eval", n=args.reviews),
        load_cloze("capitals", n=args.capitals),
    )
    texts, prompts = (
        EvalSet(tokenizer, load_texts("wiki", "eval", n=args.texts), max_length=args.length),
        capitals["prompt"][: args.prompts],
    )
    words = {"fresh": "positive", "rotten": "negative"}
    kinds = {
        "label accuracy": lambda b: (
            label_accuracy(
                model, tokenizer, reviews, "Review: {text}\nSentiment:", words, batch_size=b, progress=False
            ).log_likelihoods
        ),
        "cloze accuracy": lambda b: (
            cloze_accuracy(model, tokenizer, capitals, batch_size=b, progress=False).log_likelihoods
        ),
        f"perplexity, {args.length} tokens a text": lambda b: (
            perplexity(model, tokenizer, texts, batch_size=b, progress=False, n_boot=0).token_nats
        ),
        "generation, 16 new tokens": lambda b: torch.tensor(
            [len(c.tokens) for c in generate_texts(model, tokenizer, prompts, 16, batch_size=b, progress=False)]
        ),
    }
    results = []
    for name, run in kinds.items():
        print(name, flush=True)
        largest = float((run(1).double() - run("auto").double()).abs().max())  # the same numbers, whatever the batch
        timed = in_turns(lambda: run("auto"), {"one at a time": lambda: run(1)}, args.repeats)["one at a time"]
        results.append(dict(measure=name, largest_difference=largest, **timed))
    rows = [
        [
            r["measure"],
            f"{r['arm_s']:.2f} s",
            f"{r['plain_s']:.2f} s",
            f"{r['ratio']:.2f}",
            f"{r['cpu_ratio']:.2f}",
            "3.00",
        ]
        for r in results
    ]
    note = (
        f"smollm2-135m; {args.reviews} sentences to label, {args.capitals} to complete, {args.texts} texts of "
        f"{args.length} tokens, {args.prompts} to go on with; each run one at a time between two runs in batches, "
        f"medians of {args.repeats} repetitions. Both give the same numbers up to rounding."
    )
    publish(
        "evaluate",
        ["measure", "one at a time", "in batches", "times faster", "in processor time", "bar"],
        rows,
        note,
        {"arguments": vars(args), "measures": results},
    )
