"""What the package does with one family, from sites to tuning: each column of the table of architectures is a check
against hooks, weights and gradients of this file's own.

A check returns "works", or the words of the refusal it got; it raises AssertionError where the package does
something else than it says. docs/matrix.py writes what they return down as a page."""

import copy
import functools
from contextlib import ExitStack
from dataclasses import dataclass

import families
import torch
from families import LAYERS, D, width_of

from llmfact_nb.activations import capture
from llmfact_nb.evaluate import cloze_accuracy, perplexity
from llmfact_nb.finetune import neuron_training
from llmfact_nb.masked_model import MaskedModel
from llmfact_nb.masks import NeuronMask
from llmfact_nb.scores.generation import generate_texts
from llmfact_nb.sites import neuron_sites

COLUMNS = ("site", "capture", "ablate", "keep", "bake", "generate", "tune", "restored")
# One of each layout: Conv1D, residual inside the MLP, fused gate, MLP without a module of its own, parallel block,
# window and many norms, convolutions, encoder, experts, experts that hide, two stacks.
ALWAYS = [
    "gpt2",
    "bloom",
    "phi3",
    "opt",
    "gpt_neox",
    "gemma3_text",
    "lfm2",
    "llama",
    "bert",
    "distilbert",
    "mixtral",
    "doge",
    "t5",
]
WORKS, NO_TEXT = "works", "writes no text"
TEXTS = [families.words(9, 1), families.words(4, 2)]
IDS = torch.tensor([[5, 9, 17, 30, 8, 41, 11, 26], [7, 7, 22, 4, 46, 12, 39, 20]])
SHORT = dict(
    input_ids=torch.tensor([[5, 9, 17, 30], [0, 0, 22, 46]]), attention_mask=torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
)


@dataclass
class Subject:
    "A model of a family, and what is known of it by hand."

    name: str
    model: torch.nn.Module

    @functools.cached_property
    def down(self) -> list[tuple[str, torch.nn.Module]]:
        return families.down_projections(self.name, self.model)

    @property
    def sites(self) -> tuple[str, ...]:
        return families.sites_of(self.name)

    def at(self, site: str) -> list[torch.nn.Module]:
        return [module for _, module in families.modules_of(self.name, self.model, site)]

    def mask(self, site: str) -> NeuronMask:
        "Some units of each layer, in each layer others; of heads, the second of the first layer, the first elsewhere."
        if site == "attn_heads":
            heads = families.config_of(self.name).num_attention_heads
            some = [torch.arange(heads) == (layer == 0) for layer in range(LAYERS)]
            return NeuronMask.from_heads(some, neuron_sites(self.model, site))
        n, g = width_of(self.name, site), torch.Generator().manual_seed(7)
        return NeuronMask.from_layers([torch.rand(n, generator=g) < 0.4 for _ in range(LAYERS)], site)

    def zeroed(self, mask: NeuronMask) -> torch.nn.Module:
        """A copy that is changed by hand: columns of the projection for neurons and heads, rows and entries of the bias
        for its outputs; where every layer writes, a plain hook."""
        other = Subject(self.name, copy.deepcopy(self.model))
        with torch.no_grad():
            for chosen, module in zip(mask.layers, other.at(mask.site)):
                if mask.site == "residual":
                    module.register_forward_hook(functools.partial(_zero_first, chosen))
                    continue
                weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight  # (outputs, inputs)
                if mask.site in ("mlp_hidden", "attn_heads"):
                    weight[:, chosen] = 0
                else:
                    weight[chosen] = 0
                    if module.bias is not None:
                        module.bias[chosen] = 0
        return other.model

    def read(self, ids: list[int], site: str) -> torch.Tensor:
        "Activations of one text, (tokens, layers * units), by a plain hook on each module."
        seen, inner = {}, site in ("mlp_hidden", "attn_heads")
        with ExitStack() as stack, torch.no_grad():
            for i, module in enumerate(self.at(site)):
                hook = lambda m, args, out, i=i: seen.update({i: (args[0] if inner else _first(out)).detach().clone()})
                stack.callback(module.register_forward_hook(hook).remove)
            self.model(input_ids=torch.tensor([ids]))
        return torch.cat([seen[i].reshape(len(ids), -1) for i in range(LAYERS)], 1)


def _first(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def _zero_first(chosen: torch.Tensor, module, args, output):
    _first(output)[..., chosen] = 0  # in place: whatever the block returns around it stays


def answer(model, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        out = model(input_ids=ids)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def check_site(s: Subject) -> str:
    "The sites are sides of the modules in the tables; a family without heads in every layer is refused by name."
    for site in s.sites:
        found = neuron_sites(s.model, site)
        assert [x.module for x in found] == s.at(site), f"{site}: {[x.name for x in found]}"
        assert found.widths == (s.mask(site).widths) and found.depths == tuple(range(LAYERS)), f"{site}: {found}"
    for site in set(families.SITES) - set(s.sites):
        try:
            neuron_sites(s.model, site)
        except NotImplementedError as e:
            assert repr(s.name) in str(e), str(e)
        else:
            raise AssertionError(f"{site}: accepted")
    return WORKS


def check_capture(s: Subject) -> str:
    "Rows of a padded batch are those of a plain hook on each text alone."
    tokenizer = families.tokenizer(side="left")
    for site in s.sites:
        got = capture(s.model, tokenizer, TEXTS, site, batch_size=2, progress=False)
        expected = torch.cat([s.read(tokenizer(t)["input_ids"], site) for t in TEXTS])
        assert close(got.values, expected), f"{site}: off by {float((got.values - expected).abs().max()):.2g}"
    return WORKS


def check_ablate(s: Subject) -> str:
    "The masked model answers as the one with zeroed weights, and not as the plain one."
    plain = answer(s.model)
    for mask in map(s.mask, s.sites):
        with MaskedModel(s.model).ablate(mask) as counts:
            got = answer(s.model)
        assert counts == mask.counts and close(got, answer(s.zeroed(mask))), f"{mask.site}: not as zeroed weights"
        assert not torch.allclose(got, plain, atol=1e-2), f"{mask.site}: nothing happened"
    return WORKS


def check_keep(s: Subject) -> str:
    "Keeping a mask is zeroing its complement."
    for mask in map(s.mask, s.sites):
        with MaskedModel(s.model).keep(mask) as counts:
            got = answer(s.model)
        with MaskedModel(s.model).ablate(~mask):
            assert torch.equal(got, answer(s.model)), f"{mask.site}: not the complement"
        assert counts == tuple(w - n for w, n in zip(mask.widths, mask.counts)) and close(
            got, answer(s.zeroed(~mask))
        ), f"{mask.site}: not as zeroed weights"
    return WORKS


def check_bake(s: Subject) -> str:
    "The baked copy answers as the masked model, without a hook, and the original is another model still."
    for mask in map(s.mask, s.sites):
        if mask.site == "residual":
            try:
                MaskedModel(s.model).bake(mask)
            except ValueError:
                continue
            raise AssertionError("residual: baked")
        baked = MaskedModel(s.model).bake(mask)
        with MaskedModel(s.model).ablate(mask):
            assert close(answer(baked), answer(s.model)), f"{mask.site}: not as masked"
        assert families.state(baked) == families.state(s.model) and not close(answer(baked), answer(s.model)), (
            f"{mask.site}: original touched, or hooks in the copy"
        )
    return WORKS


def check_generate(s: Subject) -> str:
    "A padded batch is continued under the mask as by the model with zeroed weights."
    if families.KNOWN[s.name].kind != "causal":
        return NO_TEXT
    mask, options = s.mask("mlp_hidden"), dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    with MaskedModel(s.model).ablate(mask):
        got = s.model.generate(**SHORT, **options)
    assert torch.equal(got, s.zeroed(mask).generate(**SHORT, **options)), "not as zeroed weights"
    check_company(s)
    return WORKS


def check_company(s: Subject) -> None:
    "What a text scores, and how it goes on, is what it would be without the others of its batch."
    t = families.tokenizer(side="left")
    told = dict(batch_size=len(TEXTS), progress=False)
    losses = torch.cat([perplexity(s.model, t, [text], progress=False).token_nats for text in TEXTS])
    assert close(perplexity(s.model, t, TEXTS, **told).token_nats, losses), "loss"
    pairs = [(text, "w7 w9") for text in TEXTS]
    alone = torch.cat([cloze_accuracy(s.model, t, [pair], progress=False).log_likelihoods for pair in pairs])
    assert close(cloze_accuracy(s.model, t, pairs, **told).log_likelihoods, alone), "likelihoods"
    written = [c for text in TEXTS for c in generate_texts(s.model, t, [text], 3, progress=False)]
    assert generate_texts(s.model, t, TEXTS, 3, **told) == written, "texts written"


def expected_slices(s: Subject, mask: NeuronMask) -> dict[str, torch.Tensor]:
    """Which entries of which parameter are the mask's neurons': those that their activations depend on, in linear maps
    beside the down projection, and its own columns. By gradients."""
    entries = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in s.model.named_parameters()}
    names = {id(p): n for n, p in s.model.named_parameters()}
    seen = {}
    with ExitStack() as stack:
        for i, (_, module) in enumerate(s.down):
            stack.callback(module.register_forward_pre_hook(lambda m, args, i=i: seen.update({i: args[0]})).remove)
        s.model(
            input_ids=torch.randint(4, families.VOCAB, (16, 24), generator=torch.Generator().manual_seed(3))
        )  # enough for every unit to be awake once
    for i, (path, module) in enumerate(s.down):
        beside = [
            m
            for m in s.model.get_submodule(path.rpartition(".")[0]).children()
            if m is not module and getattr(m, "weight", torch.empty(0)).dim() == 2
        ]
        parameters = [p for m in beside for p in m.parameters()]
        total = (seen[i][..., mask.layers[i]] * torch.linspace(0.5, 1.5, mask.counts[i])).sum()
        for p, g in zip(
            parameters,
            torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True) if parameters else (),
        ):
            if g is not None:
                entries[names[id(p)]] |= g != 0
        weight = entries[f"{path}.weight"]
        (weight if type(module).__name__ == "Conv1D" else weight.T)[mask.layers[i]] = True
    return entries


def check_tune(s: Subject) -> str:
    "Three steps of AdamW with weight decay move every entry that belongs to the mask's neurons, and no other by a bit."
    s = Subject(s.name, copy.deepcopy(s.model))  # what is trained is another model afterwards
    mask, before = s.mask("mlp_hidden"), {n: p.detach().clone() for n, p in s.model.named_parameters()}
    expected = expected_slices(s, mask)
    hooks = families.state(s.model.train())
    try:
        with neuron_training(s.model, mask, verbose=False) as tuning:
            optimizer = torch.optim.AdamW(
                [p for p in s.model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
            )
            for _ in range(3):
                s.model(input_ids=IDS, labels=IDS).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    except NotImplementedError as e:
        words = str(e)
    else:
        assert tuning.model is s.model
        for n, p in s.model.named_parameters():
            moved = p.detach() != before[n]
            assert torch.equal(moved, expected[n]), (
                f"{n}: {int((moved & ~expected[n]).sum())} entries moved that are frozen, "
                f"{int((expected[n] & ~moved).sum())} did not learn"
            )
        words = WORKS
    assert families.state(s.model) == hooks and (
        words == WORKS or all(torch.equal(p, before[n]) for n, p in s.model.named_parameters())
    ), "not left as it was"
    return words


def examine(name: str) -> dict[str, str]:
    """The row of one family: for each column 'works' or the words of the refusal. 'restored' is last: after all of it
    the model is as it was."""
    if name in families.REFUSED:
        return refused(name)
    s = Subject(name, families.build(name))
    plain, state, weights = (
        answer(s.model),
        families.state(s.model),
        {k: v.clone() for k, v in s.model.state_dict().items()},
    )
    row = {column: globals()[f"check_{column}"](s) for column in COLUMNS[:-1]}
    assert families.state(s.model) == state, "hooks, modes or gradients are left"
    assert all(torch.equal(v, weights[k]) for k, v in s.model.state_dict().items()) and torch.equal(
        answer(s.model), plain
    ), "weights have changed"
    return row | {"restored": WORKS}


def refused(name: str) -> dict[str, str]:
    "A family without one MLP per layer: every entrance says so in the same words, and leaves the model alone."
    model = families.build(name)
    state, mask = families.state(model), NeuronMask.full((D,) * LAYERS, "mlp_hidden")
    entrances = {
        "site": lambda: neuron_sites(model, "mlp_out"),
        "capture": lambda: capture(model, families.tokenizer(), TEXTS, progress=False),
        "ablate": lambda: MaskedModel(model).ablate(mask).__enter__(),
        "keep": lambda: MaskedModel(model).keep(mask).__enter__(),
        "bake": lambda: MaskedModel(model).bake(mask),
        "tune": lambda: neuron_training(model, mask, verbose=False).__enter__(),
    }
    row = {}
    for column, enter in entrances.items():
        try:
            enter()
        except NotImplementedError as e:
            row[column] = str(e)
        else:
            raise AssertionError(f"{column}: accepted")
    assert len(set(row.values())) == 1 and repr(name) in row["site"], row
    assert families.state(model) == state, "not left as it was"
    return row | {"generate": row["ablate"], "restored": WORKS}
