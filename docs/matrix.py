"""Write docs/pages/architectures.md: what the package does with each family of models, as the checks of the tests say.

Run it when a family, a check or a refusal has changed; tests/test_matrix.py says so when it is out of step. It
builds small random models and needs no network, a minute of one core."""

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "pages" / "architectures.md"
HEADINGS = (
    "family",
    "down projection",
    "attention's output projection",
    "layers",
    "capture",
    "ablate",
    "keep",
    "bake",
    "generate",
    "tune selected",
    "restored",
)

OPENING = """# Architectures

The families of models that were tried, what works with each of them, and which are refused and why.

Every row is a test. A random model of three narrow layers is built from the family's own configuration. The package
performs each operation on it; the result is compared with hooks, weights and gradients that the test handles itself,
without the package. The down projection of every family, and the output projection of its attention, are written down
by hand. The tests are
{test}`test_matrix.py::test_family`; `docs/matrix.py` writes this page from them.

capture
: The rows of a padded batch equal those of a plain hook on each text alone, at every site that the family has: the
  sides of the down projection, those of the attention's output projection, and the output of each block.

ablate
: The masked model gives the logits of a model whose weights were set to zero by hand: columns of the down projection
  at `mlp_hidden`, of the attention's output projection for whole heads at `attn_heads`; rows and bias at `mlp_out` and
  `attn_out`. At `residual` it gives those of a model with plain hooks.

keep
: The same for everything but the mask, and equal to ablating its complement.

bake
: The baked copy gives the logits of the masked model and has no hook. An ablation of the residual stream is refused.

generate
: A left-padded batch is continued under the mask as by the model with zeroed weights. Encoders generate no text.

tune selected
: Three steps of AdamW with weight decay 0.1 move every entry that belongs to the mask's neurons and no other by a
  single bit. Gradients show which entries belong to a neuron.

restored
: After all of these steps, weights and outputs are equal bit for bit, and no hook is left.

## Families that are handled
"""
REFUSED = """
## Families that are refused

Most of these do not have exactly one MLP in each layer; in a few, the rest of the batch influences every text. The two
sites of the MLP, capture, masks and tuning refuse them with the same message and leave the model as it was. Where the
message says so, modules can be given by name; mixtures of experts still have the sites of the attention and of the
residual stream.
"""
TUNING = """
## Families that are masked but not tuned

"""
SURVEY = """
## All other types

transformers {version} has {n} types of causal and masked language models. Each of those that are not listed above was
built small, from a guessed configuration, and searched for its neurons
({{test}}`test_matrix.py::test_types_nobody_thought_of`). No activations were compared. {unbuilt} types could not be
built in this way.

Placed: {placed}.

Refused: {refused}.
"""


def cell(words: str) -> str:
    "A cell of the table; words that are no plain result are spelled out below it."
    return words if words in ("works", "writes no text") else "refused"


def row(name: str, found: dict[str, str], pattern: str, attention: str | None, layers: int) -> str:
    "One family's row of the table."
    cells = [
        f"`{name}`",
        f"`{pattern}`",
        f"`{attention}`" if attention else "not in every layer",
        str(layers),
        *(cell(found[c]) for c in ("capture", "ablate", "keep", "bake", "generate", "tune", "restored")),
    ]
    return f"| {' | '.join(cells)} |"


def plain(words: str) -> str:
    "A message as a line of Markdown."
    return re.sub(r"([\[\]_*<>|])", r"\\\1", words)


def refusal(name: str, words: str) -> str:
    "An entry of the list of refusals."
    return f"`{name}`\n: {plain(words)}\n"


def page() -> str:
    "The whole page; every check is run for it."
    sys.path.insert(0, str(ROOT / "tests"))
    import transformers
    from architectures import WORKS, examine
    from families import ATTENTION, KNOWN, LAYERS
    from families import REFUSED as WITHOUT
    from survey import NOT_BUILT, kinds, look

    found = {name: examine(name) for name in (*KNOWN, *WITHOUT)}
    table = [f"| {' | '.join(HEADINGS)} |", "|" + " --- |" * len(HEADINGS)]
    places = {name: (KNOWN[name].down.format("*"), ATTENTION.get(name)) for name in sorted(KNOWN)}
    table += [row(name, found[name], *at, LAYERS) for name, at in places.items()]
    untuned = [refusal(name, found[name]["tune"]) for name in sorted(KNOWN) if found[name]["tune"] != WORKS]
    refused = [refusal(name, found[name]["site"]) for name in sorted(WITHOUT)]
    seen = {name: look(name) for name in kinds() if name not in found}
    listed = lambda kind: ", ".join(
        f"`{n}`" for n, what in seen.items() if what != NOT_BUILT and isinstance(what, str) == (kind == "refused")
    )
    survey = SURVEY.format(
        version=transformers.__version__,
        n=len(kinds()),
        unbuilt=sum(w == NOT_BUILT for w in seen.values()),
        placed=listed("placed"),
        refused=listed("refused"),
    )
    return "\n".join([OPENING, *table, REFUSED, *refused, TUNING, *untuned]) + survey


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
