"""Pins the table of architectures: for each family that the package names, every column holds against hooks, weights
and gradients of the test's own, and the page in the documentation says what was found."""

import sys
from pathlib import Path

import architectures
import families
import pytest
import survey
import torch
import transformers
from architectures import ALWAYS, COLUMNS, NO_TEXT, WORKS, examine
from families import ATTENTION, KNOWN, LAYERS, REFUSED
from refusals import refused

from llmfact_nb.sites import neuron_sites

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "docs"))
import matrix

NAMES = [pytest.param(n, marks=[] if n in ALWAYS else pytest.mark.slow) for n in (*KNOWN, *REFUSED)]


@pytest.mark.parametrize("name", NAMES)
def test_family(name):
    found, page = examine(name), matrix.PAGE.read_text(encoding="utf-8")
    assert set(found) == set(COLUMNS) and found["restored"] == WORKS
    if name in REFUSED:
        lines = [matrix.refusal(name, found["site"])]
    else:
        assert found["generate"] == (WORKS if KNOWN[name].kind == "causal" else NO_TEXT)
        assert {c for c, words in found.items() if words not in (WORKS, NO_TEXT)} <= {"tune"}
        lines = [matrix.row(name, found, KNOWN[name].down.format("*"), ATTENTION.get(name), LAYERS)]
        if found["tune"] != WORKS:
            assert (
                families.down_projections(name, families.build(name))[0][0].rpartition(".")[0] in found["tune"]
            )  # says which module
            lines.append(matrix.refusal(name, found["tune"]))
    for line in lines:
        assert line in page, f"docs/pages/architectures.md has no line {line!r}: run docs/matrix.py"


def test_the_page_lists_these_families_and_no_others():
    rows = [
        line.split("`")[1] for line in matrix.PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")
    ]
    assert rows == sorted(KNOWN)


def test_every_family_that_was_promised_is_here():
    promised = """gpt2 gpt_neo gptj gpt_neox opt bloom falcon mpt llama mistral mixtral qwen2 qwen3 qwen2_moe gemma
        gemma2 gemma3_text phi phi3 stablelm starcoder2 cohere olmo2 glm4 smollm3 granite codegen persimmon bert roberta
        distilbert electra t5"""
    assert set(promised.split()) <= {*KNOWN, *REFUSED}


@pytest.mark.parametrize(
    "broken, column", [("neuron", "ablate"), ("layer", "capture"), ("frozen", "tune"), ("hook", "restored")]
)
def test_the_checks_notice_what_is_wrong(broken, column, monkeypatch):
    "Each fault is put into the package for the length of a test."
    from llmfact_nb import activations, finetune, masked_model

    if broken == "neuron":  # one unit too few

        def one_less(sites, function, model, attach=masked_model.attach):
            def changed(i, x):
                y = function(i, x)
                unit = (y != x).flatten(0, -2).any(0).nonzero()[0]
                y[..., unit] = x[..., unit]
                return y

            return attach(sites, changed, model)

        monkeypatch.setattr(masked_model, "attach", one_less)
    elif broken == "layer":  # the first two layers change places
        monkeypatch.setattr(
            activations,
            "attach",
            lambda sites, f, model, attach=activations.attach: attach([sites[1], sites[0], *sites[2:]], f, model),
        )
    elif broken == "frozen":  # the unit after the last one learns too
        call = finetune.neuron_parameters
        monkeypatch.setattr(
            finetune,
            "neuron_parameters",
            lambda model, mask: call(model, mask | mask.from_layers([row.roll(1) for row in mask.layers], mask.site)),
        )
    else:
        monkeypatch.setattr(
            architectures, "check_tune", lambda s: s.down[0][1].register_forward_hook(lambda *a: None) and WORKS
        )
    with pytest.raises(AssertionError) as error:
        examine("llama")
    assert {"capture": "off by", "ablate": "not as zeroed", "tune": "that are frozen", "restored": "are left"}[
        column
    ] in str(error.value)


def test_a_model_of_several_stacks_is_refused_not_broken():
    "Its configuration has no single number of layers to ask for."
    with torch.device("meta"):
        model = transformers.AutoModelForMaskedLM.from_config(transformers.AutoConfig.for_model("perceiver"))
    with refused(NotImplementedError, "'perceiver'", "self_attends"):
        neuron_sites(model)


def test_the_reason_for_a_refusal_is_the_right_one():
    reasons = {
        "t5": "encoder-decoder",
        "xlm": "4 of its lists have 3 entries",
        "albert": "none of its lists have 3 entries",
        "mixtral": "mixture of experts",
        "doge": "mixture of experts",
        "mobilebert": "intermediate.dense",
        "mamba": "site=",
        "fnet": "lets padding reach the real tokens",
        "big_bird": "changes from sparse to full attention",
    }
    for name, words in reasons.items():
        with refused(NotImplementedError, repr(name), words):
            neuron_sites(families.build(name))


@pytest.mark.parametrize("name", ["convbert", "nystromformer", "yoso"])
def test_families_refused_for_their_padding_do_mix_it_in(name):
    "The reason of the refusal is true: the same text answers differently beside a longer one."
    model = families.build(name)
    ids, real = torch.arange(5, 14)[None], torch.ones(1, 9, dtype=torch.long)
    with torch.no_grad():
        alone, beside = (
            model(ids, attention_mask=real)[0],
            model(torch.nn.functional.pad(ids, (0, 5)), attention_mask=torch.nn.functional.pad(real, (0, 5)))[0],
        )
    assert (alone - beside[:, :9]).abs().max() > 1e-2


def test_big_bird_does_change_for_good():
    "The reason of its refusal is true: the same text answers differently after a short one."
    model, long = families.build("big_bird"), torch.arange(4, 44)[None]
    with torch.no_grad():
        before = model(long)[0]
        assert torch.equal(model(long)[0], before)
        model(long[:, :4])
        assert (model(long)[0] - before).abs().max() > 1e-2


WITHOUT_A_SETTING = {
    "bloom": 64,
    "mpt": 64,
    "openai-gpt": 64,
    "gpt_neox_japanese": 64,
    "lfm2": 256,
}  # the width of the MLP follows from the model's, or is rounded up


@pytest.mark.slow
def test_types_nobody_thought_of():
    """Each type that can be built small is placed or refused; where it is placed, the width found is that of the MLP
    in the configuration, and the same module is found where shapes cannot tell it."""
    placed = 0
    for name in survey.kinds():
        found = survey.look(name)
        if isinstance(found, str):
            assert found == survey.NOT_BUILT or found.startswith("model type "), f"{name}: {found}"
            continue
        placed += 1
        wide, square = survey.look(name, 40), survey.look(name, survey.D)
        config = survey.small(name, 40)
        nested = config.get_text_config() is not config
        if nested and {w for _, w in wide} == {w for _, w in found}:
            continue  # a language model inside another: the small widths did not reach it
        assert [n for n, _ in wide] == [n for n, _ in found]
        assert all(a < b for (_, a), (_, b) in zip(found, wide)) or {w for _, w in found} == {
            WITHOUT_A_SETTING.get(name)
        }, f"{name}: {found[0]} does not follow the width of the MLP"
        assert isinstance(square, str) or [n for n, _ in square] == [n for n, _ in found], f"{name}: {square[0]}"
    assert placed > 100
