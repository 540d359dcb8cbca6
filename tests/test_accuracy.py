"""Pins what is counted without a model: intervals that cover, levels to beat, paired shares, and SQuAD's normal form
with its two scores."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from llmfact_nb.base.statistics import mean_estimate, levels, paired_shares, wilson
from llmfact_nb.evaluate import paired_accuracy
from llmfact_nb.scores.questions import exact_match, f1, normalise, qa_scores


def test_majority_levels_of_the_published_sets():
    "Two published scores are exactly what a constant answer gets."
    assert levels([1] * 721 + [0] * 322, 2) == (0.5, 721 / 1043) and f"{721 / 1043:.6f}" == "0.691275"
    assert levels([0] * 129 + [1] * 279, 2)[1] == 279 / 408 and f"{279 / 408:.6f}" == "0.683824"
    assert levels([2, 2, 0], 4) == (0.25, 2 / 3)


def test_wilson_covers_and_never_leaves_the_unit_interval():
    rng = np.random.default_rng(0)
    for p, n in ((0.5, 20), (0.9, 40), (0.03, 100)):
        found = [wilson(int(h), n).ci for h in rng.binomial(n, p, 2000)]
        assert 0.92 < np.mean([low <= p <= high for low, high in found]) < 0.985
    assert (
        wilson(0, 5).low == 0.0
        and wilson(5, 5).high == 1.0
        and 0.4 < wilson(0, 5).high < 0.5
        and all(math.isnan(x) for x in wilson(0, 0).ci)
    )


def test_paired_shares_cover_the_true_difference():
    "Two arms that share most of their answers; the true difference is -0.1."
    rng, covered, significant = np.random.default_rng(1), 0, 0
    for _ in range(300):
        b = rng.random(80) < 0.7
        a = np.where(b, rng.random(80) < 0.8, rng.random(80) < 2 / 15)  # .7 * .8 + .3 * 2/15 = .6
        result = paired_shares(a, b)
        covered += result.ci[0] <= -0.1 <= result.ci[1]
        assert result.difference == pytest.approx(a.mean() - b.mean()) and (result.gained, result.lost) == (
            int((a & ~b).sum()),
            int((~a & b).sum()),
        )
        c = np.where(b, rng.random(80) < 0.9, rng.random(80) < 0.7 * 0.1 / 0.3)  # as good as b
        significant += paired_shares(c, b).p < 0.05
    assert 0.92 < covered / 300 < 0.99 and significant / 300 < 0.06


def test_arms_that_were_asked_something_else_are_not_paired():
    arm = lambda correct, fingerprint: SimpleNamespace(correct=correct, fingerprint=fingerprint)
    assert paired_accuracy(arm([True, False], "x"), arm([False, False], "x")).difference == 0.5
    with pytest.raises(ValueError):
        paired_accuracy(arm([True], "x"), arm([True], "y"))


@pytest.mark.parametrize(
    "said, right, exact, score",
    [
        ("The  city of PARIS!", "city of paris", True, 1.0),
        ("city of Paris", "Paris", False, 0.5),
        ("“Paris”", "Paris", False, 0.0),  # only ASCII punctuation is dropped, as in the official scorer
        ("an anthem", "anthem", True, 1.0),
        ("theatre", "atre", False, 0.0),  # an article is a word, not letters
        ("a b b", "b c", False, 0.5),  # b b against b c: one word shared, however often it is said
        ("1,000", "1000", True, 1.0),
        ("", "Paris", False, 0.0),
        ("the", "", True, 1.0),
    ],
)
def test_exact_match_and_f1(said, right, exact, score):
    assert exact_match(said, right) == exact and f1(said, right) == pytest.approx(score) == f1(right, said)


def test_scores_take_the_best_answer_and_keep_the_order():
    answers = [["Nile", "river Nile"], {"text": ["Rome"], "answer_start": [3]}, "Oslo", []]
    result = qa_scores(["the river Nile", "in Rome", None, ""], answers, n_boot=500)
    assert result.correct.tolist() == [True, False, False, True] and result.f1_each.tolist() == pytest.approx(
        [1, 2 / 3, 0, 1]
    )
    assert (
        result.exact == 0.5
        and result.f1 == pytest.approx(2 / 3)
        and result.n_empty == 2
        and result.ci_exact == wilson(2, 4).ci
    )
    assert result.ci_f1 == mean_estimate(np.array([1, 2 / 3, 0, 1]), np.ones(4), 500, 0).ci
    unanswerable = qa_scores([None, ""], [[], []])
    assert unanswerable.correct.tolist() == [False, True]
    constant = qa_scores(["x"] * 4, ["yes", "yes", "no", ["yes", "no"]])
    assert constant.majority == constant.majority_f1 == 0.75 and constant.exact == 0
    assert qa_scores(["x"] * 3, ["New York", "New Delhi", "York"]).majority_f1 == pytest.approx((1 + 0.5 + 2 / 3) / 3)


@pytest.mark.parametrize(
    "call, error, argument",
    [
        (lambda: qa_scores([], []), ValueError, None),
        (lambda: qa_scores(["a"], ["a", "b"]), ValueError, None),
        (lambda: qa_scores([3], ["a"]), TypeError, None),
        (lambda: qa_scores(["a"], [7]), TypeError, None),
        (lambda: levels([0, 3], 3), ValueError, None),
        (lambda: levels([], 3), ValueError, None),
        (lambda: wilson(3, 2), ValueError, None),
        (lambda: paired_shares([], []), ValueError, None),
        (lambda: paired_shares([True], [True, False]), ValueError, None),
    ],
)
def test_refusals(call, error, argument):
    with pytest.raises(error) as e:
        call()
    assert getattr(e.value, "argument", None) == argument


def test_normal_form_is_stable():
    for text in ("The a an", " A  Tale ", "a.n", "é?", "", "U.S.A."):
        assert normalise(normalise(text)) == normalise(text)
