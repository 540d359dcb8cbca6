"""Pins the fingerprint: pieces common to two tokenizers, courses that reordered neurons leave alone, nulls that hold
their level, kin told from strangers, and what merely follows words removed on request."""

import copy
import dataclasses
import math
from collections.abc import Callable

import families
import numpy as np
import planted
import pytest
import torch
from hypothesis import given, settings, strategies

from llmfact_nb.across.fingerprint import (
    NetworkCourses, aligned, common_pieces, compare_courses, fingerprint, fingerprint_study, told_apart, token_ends,
)  # fmt: skip
from llmfact_nb.across.untrained import untrained
from llmfact_nb.base.arguments import ArgumentError

CUTS = strategies.lists(strategies.integers(1, 60), min_size=1, max_size=30, unique=True).map(sorted)


@given(CUTS, CUTS, strategies.booleans())
@settings(max_examples=200, deadline=None)
def test_pieces_are_whole_tokens_of_both(a, b, special):
    a, b = np.array([0] * special + a), np.array(b)
    ends, *pieces = common_pieces(a, b)
    assert set(ends) == set(a) & set(b) - {0}
    for tokens, piece in zip((a, b), pieces):
        assert not special or a[0] or pieces[0][0] == -1
        for token, of in zip(tokens, piece):
            if of >= 0:
                assert token <= ends[of] and (of == 0 or token > ends[of - 1])
            else:
                assert token == 0 or not len(ends) or token > ends[-1]


def test_a_tokenizer_without_offsets_gives_the_same_ends():
    fast, text = families.tokenizer(special=True), planted.texts(1)[0]
    ids = fast(text)["input_ids"]

    expected = token_ends(fast, text, ids)
    assert expected[0] == 0 == expected[-1] and (np.diff(expected[1:-1]) > 0).all()
    with pytest.warns(UserWarning):
        assert token_ends(Slow(fast.all_special_ids, fast.decode), text, ids).tolist() == expected.tolist()


@dataclasses.dataclass
class Slow:
    "A tokenizer without character offsets, as those written in Python."

    all_special_ids: list
    decode: Callable
    is_fast = False


@pytest.mark.filterwarnings("ignore:Slow gives no characters")
def test_tokens_that_end_inside_a_character_end_with_it():
    raw = "naïve – ok".encode()
    bytewise = Slow([], lambda ids, **how: bytes(ids).decode(errors="replace"))
    ends = token_ends(bytewise, "naïve – ok", list(raw))
    assert ends.tolist() == [1, 2, 3, 3, 4, 5, 6, 7, 7, 7, 8, 9, 10]
    assert token_ends(bytewise, "naïve – ok", list(raw[:3])).tolist() == [1, 2, 3]


@pytest.mark.filterwarnings("ignore:Slow gives no characters")
def test_tokenizers_that_cannot_be_aligned_are_named():
    class Fast:
        is_fast = True

        def __call__(self, text, **how):
            return {"input_ids": [1, 2], "offset_mapping": [(0, 1), (1, 2)]}

    lower = Slow([], lambda ids, **how: bytes(ids).decode().lower())
    for tokenizer, ids in (lower, list(b"Ab Cd")), (Fast(), [7, 8]):
        with pytest.raises(ArgumentError) as e:
            token_ends(tokenizer, "Ab Cd", ids)
        assert e.value.argument == "tokenizer" and type(tokenizer).__name__ in str(e.value)


def reordered(model):
    "The same function, its neurons in another order."
    other, g = copy.deepcopy(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for block in other.model.layers:
            order = torch.randperm(block.mlp.down_proj.in_features, generator=g)
            for module in (block.mlp.gate_proj, block.mlp.up_proj):
                module.weight.copy_(module.weight[order].clone())
            block.mlp.down_proj.weight.copy_(block.mlp.down_proj.weight[:, order].clone())
    return other


HOW = dict(site="mlp_hidden", k=6, max_length=40)


@pytest.fixture(scope="module")
def kin():
    return families.build("llama", num_hidden_layers=4, intermediate_size=200), families.tokenizer(), planted.texts(8)


def test_reordered_neurons_leave_it_alone(kin):
    model, (_, tokenizer, texts) = planted.model(), kin
    same = fingerprint(model, tokenizer, reordered(model), tokenizer, texts, **HOW)
    assert same.similarity == pytest.approx(1, abs=1e-6) and same.p == 1 / 200 and same.ci == pytest.approx((1, 1))
    assert same.rotated < 0.9 and same.shifted < 0.5 and same.table.rho.abs().min() > 1 - 1e-6


def test_kin_are_told_from_strangers_by_the_study(kin):
    model, tokenizer, texts = kin
    near = copy.deepcopy(model)
    with torch.no_grad():
        for p in near.parameters():
            p.add_(0.02 * p.std() * torch.randn_like(p, generator=torch.manual_seed(1)))
    models = {"base": model, "near": near, "permuted": untrained(model, "permute")}
    pairs = [("base", "near", True), ("base", "permuted", False)]
    given_ = {name: (lambda m=m: (m, tokenizer)) for name, m in models.items()}
    table = fingerprint_study(given_, pairs, texts, site="mlp_hidden", k=6, progress=False, max_length=40)
    assert table[table.related].similarity.min() > table[~table.related].similarity.max()
    auc = told_apart(table).set_index("number")
    assert auc.auc["similarity"] == 1 and (auc.ci_low <= auc.auc).all() and (auc.auc <= auc.ci_high).all()


def invented(seed: int, text: str = "ab cd " * 40, k: int = 5, n_texts: int = 3, by_word: bool = False):
    "Courses of no model, of texts whose tokens are single characters; by_word: a function of the character alone."
    rng, ends = np.random.default_rng(seed), np.arange(1, len(text) + 1)
    value = {c: np.random.default_rng([ord(c), 1]).normal(size=k) for c in set(text)}
    parts = [rng.normal(size=(len(text), k)) for _ in range(n_texts)]
    if by_word:
        parts = [0.1 * part + np.stack([value[c] for c in text]) for part in parts]
    return NetworkCourses(torch.tensor(np.concatenate(parts)), [ends] * n_texts, [text] * n_texts)


def test_p_values_hold_their_level():
    found = [compare_courses(invented(2 * s), invented(2 * s + 1), draws=39) for s in range(60)]
    for p in ([f.p for f in found], [f.best_p for f in found]):
        assert 0.3 < np.mean(p) < 0.7 and np.mean(np.array(p) <= 0.05) < 0.15


def test_what_follows_words_goes_on_request():
    a, b = invented(0, by_word=True), invented(1, by_word=True)
    assert compare_courses(a, b).similarity > 0.8 > 0.3 > compare_courses(a, b, regress=True).similarity


def test_pieces_with_sinks_do_not_count():
    a, b = invented(0, n_texts=2), invented(1, n_texts=2)
    a.courses[3] = b.courses[5] = math.nan
    assert [len(x) for x, _, _ in aligned(a, b)] == [238, 240]


def test_what_cannot_be_compared_is_named(kin):
    model, tokenizer, texts = kin
    for change, argument in ({"k": 10_000}, "k"), ({"rule": "best"}, "rule"), ({"texts": ["w4 w5 w6"]}, "k"):
        with pytest.raises(ArgumentError) as e:
            fingerprint(
                **dict(model_a=model, tokenizer_a=tokenizer, model_b=model, tokenizer_b=tokenizer, texts=texts)
                | HOW
                | change
            )
        assert e.value.argument == argument
    with pytest.raises(ArgumentError) as e:
        compare_courses(invented(0, n_texts=1), invented(1, n_texts=1))
    assert e.value.argument == "texts"
