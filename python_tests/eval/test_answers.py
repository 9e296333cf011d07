"""VQAv2's answer normalization and ten-answer accuracy, against cases worked out by hand from the rules."""

import pytest

from mmq_kernels.eval.answers import CONTRACTIONS, answer_accuracy, exact_accuracy, normalize_answer


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Dog", "dog"),
        ("a an the", ""),
        ("two", "2"),
        ("none", "0"),
        ("ten dogs", "10 dogs"),
        ("eleven", "eleven"),
        ("dont know", "don't know"),
        ("couldntve", "couldntve"),  # two apostrophes lost: not in the official table
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),  # the official table's own slip
        ("left,right", "left right"),  # a mark between letters becomes a space
        ("left, right", "left right"),  # beside a space it vanishes
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),  # the comma in a number makes every mark vanish
        ("t-shirt", "t shirt"),
        ("3.5", "3.5"),
        ("4.", "4"),
        ("a.m.", "am"),
        ("yes!", "yes"),
        ("5:30", "5:30"),  # the colon is no punctuation here
        ("  two   Dogs ", "2 dogs"),
    ],
)
def test_normalization(answer: str, normal: str) -> None:
    assert normalize_answer(answer) == normal


def test_contractions_are_apostrophes_put_back() -> None:
    assert len(CONTRACTIONS) > 100
    for spelling, word in CONTRACTIONS.items():
        if spelling != "somebody'd":
            assert spelling.replace("'", "") == word.replace("'", "")
            assert spelling.count("'") == word.count("'") - 1


@pytest.mark.parametrize(
    ("matches", "accuracy"),
    # with m matches: m subsets lack one of them, 10 - m lack none
    [
        (0, 0.0),
        (1, 9 * (1 / 3) / 10),
        (2, (2 * (1 / 3) + 8 * (2 / 3)) / 10),
        (3, (3 * (2 / 3) + 7) / 10),
        (4, 1.0),
        (9, 1.0),
    ],
)
def test_accuracy_is_the_mean_over_leave_one_out_subsets(matches: int, accuracy: float) -> None:
    answers = ["red"] * matches + [f"other {i}" for i in range(10 - matches)]
    assert answer_accuracy("red", answers) == pytest.approx(accuracy)


def test_normalization_is_skipped_where_all_people_agree() -> None:
    assert answer_accuracy("the dog", ["dog"] * 10) == 0.0
    assert answer_accuracy("the dog", ["dog"] * 9 + ["cat"]) == 1.0
    assert answer_accuracy("dog\n", ["dog"] * 10) == 1.0


def test_human_answers_are_normalized_too() -> None:
    assert answer_accuracy("2", ["Two", "two.", "the 2", "2"] + ["three"] * 6) == 1.0


def test_empty_prediction_is_wrong() -> None:
    assert answer_accuracy("", ["yes"] * 6 + ["no"] * 4) == 0.0


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("yes", "yes", True),
        ("Yes.", "yes", True),
        (" light  blue\n", "light blue", True),
        ("t-shirt", "t-shirt", True),  # not VQA's normalization, which would drop the hyphen
        ("the dog", "dog", False),  # articles count
        ("2", "two", False),
        ("", "yes", False),
        ("yes, it is", "yes", False),
    ],
)
def test_gqa_answers_match_exactly(prediction: str, answer: str, right: bool) -> None:
    assert exact_accuracy(prediction, [answer]) == float(right)


def test_no_more_than_32_periods_vanish() -> None:
    """The official script passes a flag, whose value is 32, where `re.sub` takes a count."""
    assert normalize_answer("a." * 40) == "a" * 32 + "a." * 8
