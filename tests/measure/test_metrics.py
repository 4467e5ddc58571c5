"""Every metric on answers whose score is known by hand."""

import pytest

from squeezed.measure.accuracy.examples import Question
from squeezed.measure.accuracy.metrics import score


def scored(prediction, metric, *answers, **settings):
    return score(prediction, Question("q", "", answers, (metric,), **settings))[metric]


def test_f1_ignores_case_articles_and_punctuation():
    assert scored("The cat, sat.", "f1", "a cat sat") == 1.0
    assert scored("cat dog", "f1", "cat") == pytest.approx(2 / 3)
    assert scored("dog", "f1", "cat", "a dog") == 1.0
    assert scored("", "f1", "cat") == 0.0


def test_containment_respects_word_bounds():
    assert scored("It is the M-dwarf star", "containment", "M dwarf") == 0.0
    assert scored("It is 70 K.", "containment", "70 K") == 1.0
    assert scored("It is 170 K.", "containment", "70 K") == 0.0


def test_rouge_l_is_the_longest_common_subsequence():
    pytest.importorskip("rouge_score")
    assert scored("a b c d", "rouge_l", "a b x d") == pytest.approx(0.75)


def test_edit_similarity_takes_the_first_line_of_code():
    pytest.importorskip("rapidfuzz")
    assert scored("\n# note\nreturn x\nmore", "edit_similarity", "return x") == 1.0
    assert 0.5 < scored("return y", "edit_similarity", "return x") < 1.0
    assert scored("# only a note", "edit_similarity", "return x") == 0.0


def test_classification_shares_the_point_among_the_labels_named():
    classes = ("Date", "Food", "Date of birth")
    assert scored("Type: Food", "classification", "Food", classes=classes) == 1.0
    assert scored("Food or Date", "classification", "Food", classes=classes) == 0.5
    assert scored("Date of birth", "classification", "Date of birth", classes=classes) == 1.0
    assert scored("none", "classification", "Food", classes=classes) == 0.0


def test_number_is_the_share_of_right_numbers():
    assert scored("Paragraph 19", "number", "Paragraph 19") == 1.0
    assert scored("19 or 3", "number", "Paragraph 19") == 0.5
    assert scored("no idea", "number", "7") == 0.0


def test_all_found_and_any_found_ignore_case():
    assert scored("x 12 Y", "all_found", "12", "y", "z") == pytest.approx(2 / 3)
    assert scored("x 12", "any_found", "9", "12") == 1.0


def test_first_line_ends_a_few_shot_answer():
    assert scored("\ncat\nQuestion: dog", "f1", "cat", first_line=True) == 1.0
