"""Caption metrics against pycocoevalcap's own classes, and the tokenizations."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from mmq_kernels.eval import DataError, spice
from mmq_kernels.eval.captions import CaptionScorer
from mmq_kernels.eval.corpus import bleu, bleu_counts, meteor
from mmq_kernels.eval.meteor import Meteor, meteor_scores
from mmq_kernels.eval.spice import spice_missing, spice_scores
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
    assert scores.metrics["cider"] == pytest.approx(cider) and cider > 0.5
    assert [image["cider"] for image in scores.per_image] == pytest.approx(list(per_image))
    bleu = [scores.metrics[f"bleu_{n}"] for n in (1, 2, 3, 4)]
    assert bleu == pytest.approx(Bleu(4).compute_score(refs, hyps, verbose=0)[0], abs=1e-12) and bleu[1] > 0.1
    rouge, each = Rouge().compute_score(refs, hyps)
    assert scores.metrics["rouge_l"] == pytest.approx(rouge)
    assert [image["rouge_l"] for image in scores.per_image] == pytest.approx(list(each))
    assert scores.metrics["meteor"] is None and scores.tokenizer == "plain"


def test_captions_are_matched_to_references_by_id_not_by_order() -> None:
    scorer = CaptionScorer(REFERENCES, tokenizer="plain")
    shuffled = {key: CAPTIONS[key] for key in (5, 7, 3)}
    assert scorer.score(shuffled, meteor=False) == scorer.score(CAPTIONS, meteor=False)


def test_predictions_are_not_stored_as_references() -> None:
    """Wrong captions must score 0, not the 10 of a text compared with itself."""
    wrong = {key: "zebra xylophone" for key in REFERENCES}
    assert CaptionScorer(REFERENCES, tokenizer="plain").score(wrong, meteor=False).metrics["cider"] == 0.0
    right = {key: texts[0] for key, texts in REFERENCES.items()}
    assert CaptionScorer(REFERENCES, tokenizer="plain").score(right, meteor=False).metrics["cider"] > 2.0


def test_one_scorer_serves_many_caption_sets() -> None:
    scorer = CaptionScorer(REFERENCES, tokenizer="plain")
    first = scorer.score(CAPTIONS, meteor=False)
    scorer.score({key: "a" for key in REFERENCES}, meteor=False)
    assert scorer.score(CAPTIONS, meteor=False) == first


def test_empty_caption_scores_zero() -> None:
    scores = CaptionScorer(REFERENCES, tokenizer="plain").score({**CAPTIONS, 3: ""}, meteor=False)
    assert scores.per_image[1]["cider"] == 0.0


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


@pytest.fixture(scope="module")
def scorer() -> Iterator[Meteor]:
    """One Java process: its tables take seconds to load."""
    with Meteor() as started:
        yield started


@needs_java
def test_meteor_equals_pycocoevalcap(scorer: Meteor) -> None:
    """The numbers are those of `pycocoevalcap.meteor.meteor.Meteor` on the same tokens."""
    refs, hyps = _by_hand(REFERENCES, CAPTIONS, "plain")
    score, each, counts = scorer.scores([hyps[key][0] for key in refs], list(refs.values()))
    assert score == pytest.approx(0.30607958925702416)
    assert each == pytest.approx([0.27588264629992343, 0.22660483853454663, 0.4330034260735872])
    assert [float(meteor(np.array(row))) for row in counts] == pytest.approx(each)
    assert float(meteor(np.sum(counts, 0))) == pytest.approx(score)


@needs_java
def test_meteor_of_counts_is_the_jar_s(scorer: Meteor) -> None:
    """Exact, stemmed, synonymous and paraphrased matches; none at all; and a caption that is its reference."""
    captions = ["a dog runs", "dogs running", "the puppy rides a sofa", "zebra", "a man walks in the street", "x"]
    references = [
        ["a dog runs"],
        ["a dog runs in a park", "the hound ran"],
        ["a small dog riding a couch"],
        ["a red bus"],
        ["the person is walking down the road", "a man walked along a street"],
        ["x", "y z"],
    ]
    score, each, counts = scorer.scores(captions, references)
    assert [float(meteor(np.array(row))) for row in counts] == pytest.approx(each)
    assert float(meteor(np.sum(counts, 0))) == pytest.approx(score)
    assert each[0] == pytest.approx(1.0) and each[3] == 0.0


def test_bleu_of_counts_is_pycocoevalcap_s() -> None:
    """Shorter than the references, longer, without any match, and of one word."""
    rng = random.Random(0)
    words = ["a", "the", "dog", "cat", "bus", "red", "on", "big", "two", "street"]

    def text(most: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(1, most)))

    for most in (3, 12):
        captions, references = [text(most) for _ in range(40)], [[text(9) for _ in range(3)] for _ in range(40)]
        counts = np.array(bleu_counts(captions, references, 4), float)
        hyps, refs = {i: [c] for i, c in enumerate(captions)}, dict(enumerate(references))
        corpus, each = Bleu(4).compute_score(refs, hyps, verbose=0)
        assert [float(bleu(counts.sum(0), n)) for n in (1, 2, 3, 4)] == pytest.approx(corpus)
        assert bleu(counts, 2) == pytest.approx(np.array(each[1]), abs=1e-7)


def test_spice_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert spice_missing() == "SPICE needs Java, and no java is on the PATH"
    (tmp_path / "java").write_text("#!/bin/sh\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setattr(spice, "FOLDER", tmp_path)
    assert "spice-1.0.jar, which this pycocoevalcap lacks" in str(spice_missing())
    (tmp_path / "spice-1.0.jar").touch()
    with pytest.raises(DataError, match=r"needs stanford-corenlp-3\.6\.0\.jar .*get_stanford_models downloads it"):
        spice_scores(["a"], [["a"]])


def test_spice_speaks_the_jar_s_format(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a java that answers as the jar would: the package brings the jar, not the models that it parses with."""
    (tmp_path / "lib").mkdir()
    for name in ("spice-1.0.jar", "lib/stanford-corenlp-3.6.0.jar", "lib/stanford-corenlp-3.6.0-models.jar"):
        (tmp_path / name).touch()
    monkeypatch.setattr(spice, "FOLDER", tmp_path)
    answer = (
        "import json, sys; rows = json.load(open(sys.argv[4])); assert sys.argv[3] == 'spice-1.0.jar'\n"
        "said = [{'image_id': r['image_id'], 'scores': {'All': {'f': len(r['refs']) / 4 if r['test'] else "
        "float('nan')}}} for r in rows]\n"
        "json.dump(said, open(sys.argv[6], 'w'))\n"
    )
    (tmp_path / "java").write_text(f"#!{sys.executable}\n{answer}")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert spice_scores(["a dog", "", "a cat"], [["a"], ["b"], ["c", "d"]]) == (0.25, [0.25, 0.0, 0.5])
    (tmp_path / "java").write_text("#!/bin/sh\necho no memory >&2\nexit 3\n")
    with pytest.raises(DataError, match=r"the SPICE scorer failed \(exit 3: no memory\)"):
        spice_scores(["a"], [["a"]])


def test_without_java_the_tokenization_is_plain_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    scores = CaptionScorer(REFERENCES).score(CAPTIONS)
    assert scores.tokenizer == "plain" and scores.metrics["meteor"] is None
    assert scores.not_computed["meteor"] == "METEOR needs Java, and no java is on the PATH"
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
