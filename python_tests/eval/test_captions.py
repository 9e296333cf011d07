"""Caption metrics against pycocoevalcap's own classes, and the tokenizations."""

from pathlib import Path

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from mmq_kernels.eval import DataError
from mmq_kernels.eval.captions import CaptionScorer
from mmq_kernels.eval.meteor import meteor_scores
from mmq_kernels.eval.tokenization import choose_tokenizer, java, tokenize

needs_java = pytest.mark.skipif(java() is None, reason="no java on the PATH")

REFERENCES = {
    7: ["A man riding a wave, on a surfboard.", "A surfer rides a big wave."],
    3: ["Two dogs (brown) play with a ball.", "The dogs don't share a ball!"],
    5: ["A red bus on a street.", "The bus is parked.", "A bus drives down the street at 10:30."],
}
CAPTIONS = {7: "a man on a wave", 3: "Two dogs play.", 5: "a red bus parked on the street"}


def _by_hand(
    references: dict[int, list[str]], captions: dict[int, str], tokenizer: str
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    return {key: tokenize(texts, tokenizer) for key, texts in references.items()}, {
        key: tokenize([text], tokenizer) for key, text in captions.items()
    }


def test_scores_equal_pycocoevalcap_run_by_hand() -> None:
    refs, hyps = _by_hand(REFERENCES, CAPTIONS, "plain")
    scores = CaptionScorer(REFERENCES, tokenizer="plain").score(CAPTIONS, meteor=False)
    cider, per_image = Cider().compute_score(refs, hyps)
    assert scores.cider == pytest.approx(cider) and cider > 0.5
    assert scores.cider_per_image == pytest.approx(list(per_image))
    assert scores.bleu == pytest.approx(Bleu(4).compute_score(refs, hyps, verbose=0)[0])
    assert scores.rouge_l == pytest.approx(Rouge().compute_score(refs, hyps)[0])
    assert scores.meteor is None and scores.tokenizer == "plain"


def test_captions_are_matched_to_references_by_id_not_by_order() -> None:
    scorer = CaptionScorer(REFERENCES, tokenizer="plain")
    shuffled = {key: CAPTIONS[key] for key in (5, 7, 3)}
    assert scorer.score(shuffled, meteor=False) == scorer.score(CAPTIONS, meteor=False)


def test_predictions_are_not_stored_as_references() -> None:
    """Wrong captions must score 0, not the 10 of a text compared with itself."""
    wrong = {key: "zebra xylophone" for key in REFERENCES}
    assert CaptionScorer(REFERENCES, tokenizer="plain").score(wrong, meteor=False).cider == 0.0
    right = {key: texts[0] for key, texts in REFERENCES.items()}
    assert CaptionScorer(REFERENCES, tokenizer="plain").score(right, meteor=False).cider > 2.0


def test_one_scorer_serves_many_caption_sets() -> None:
    scorer = CaptionScorer(REFERENCES, tokenizer="plain")
    first = scorer.score(CAPTIONS, meteor=False)
    scorer.score({key: "a" for key in REFERENCES}, meteor=False)
    assert scorer.score(CAPTIONS, meteor=False) == first


def test_empty_caption_scores_zero() -> None:
    scores = CaptionScorer(REFERENCES, tokenizer="plain").score({**CAPTIONS, 3: ""}, meteor=False)
    assert scores.cider_per_image[1] == 0.0


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man's dog, isn't it?", "a man 's dog is n't it"),
        ("They don't; can't!", "they do n't ca n't"),
        ("3.5 liters, 1,000 times at 10:30.", "3.5 liters 1,000 times at 10:30"),
        ("a t-shirt", "a t-shirt"),
        ("", ""),
        ("two\nlines", "two lines"),
    ],
)
def test_plain_tokenization(caption: str, tokens: str) -> None:
    assert tokenize([caption], "plain") == [tokens]
    if java() is not None:
        assert tokenize([caption], "ptb") == [tokens]


@needs_java
def test_ptb_equals_pycocoevalcap() -> None:
    texts = [text for texts in REFERENCES.values() for text in texts]
    official = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    assert tokenize(texts, "ptb") == [official[i][0] for i in range(len(texts))]


@needs_java
def test_ptb_keeps_empty_captions_in_place() -> None:
    assert tokenize(["", "A dog.", " ", "Cats"], "ptb") == ["", "a dog", "", "cats"]
    assert tokenize(["", ""], "ptb") == ["", ""]


@needs_java
def test_meteor_equals_pycocoevalcap() -> None:
    """The numbers are those of `pycocoevalcap.meteor.meteor.Meteor` on the same tokens."""
    refs, hyps = _by_hand(REFERENCES, CAPTIONS, "plain")
    score, each = meteor_scores([hyps[key][0] for key in refs], list(refs.values()))
    assert score == pytest.approx(0.30607958925702416)
    assert each == pytest.approx([0.27588264629992343, 0.22660483853454663, 0.4330034260735872])


def test_without_java_the_tokenization_is_plain_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    scores = CaptionScorer(REFERENCES).score(CAPTIONS)
    assert scores.tokenizer == "plain" and scores.meteor is None
    with pytest.raises(DataError, match="tokenizer ptb needs Java"):
        choose_tokenizer("ptb")
    with pytest.raises(DataError, match="METEOR needs Java"):
        meteor_scores(["a"], [["a"]])


def test_a_java_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "java"
    broken.write_text("#!/bin/sh\necho no memory >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(DataError, match=r"PTBTokenizer gave 0 lines for 1 captions \(exit 3: no memory\)"):
        tokenize(["a dog"], "ptb")
    with pytest.raises(DataError, match="METEOR scorer stopped"):
        meteor_scores(["a"], [["a"]])


def test_unknown_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="tokenizer must be one of auto, ptb, plain, got 'moses'"):
        choose_tokenizer("moses")


def test_ids_must_agree() -> None:
    scorer = CaptionScorer(REFERENCES, tokenizer="plain")
    with pytest.raises(DataError, match="image 9 is in one only"):
        scorer.score({**CAPTIONS, 9: "a dog"})
    with pytest.raises(DataError, match="image 4 has no reference captions"):
        CaptionScorer({4: []}, tokenizer="plain")
