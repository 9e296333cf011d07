"""The split computation equals stock `forward`; ranks and re-ranks on crafted matrices."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_blip2 import QUERIES, blip2_itm, blip2_opt, processor, write_flickr

from mmq_kernels.eval import ModelMismatch, PixelStore, RetrievalGallery, load
from mmq_kernels.eval.matching import MatchingModel
from mmq_kernels.eval.retrieval import candidates, rank, rerank, score_gallery

TEXTS = ("a red star", "a big blue circle and two small green things on the left", "no", "a square , yes")


@pytest.fixture
def gallery(tmp_path: Path) -> RetrievalGallery:
    write_flickr(tmp_path)
    found = load("retrieval", tmp_path)
    assert isinstance(found, RetrievalGallery)
    return found


@pytest.mark.parametrize("placeholders", [True, False], ids=["image tokens", "no image tokens"])
def test_split_computation_equals_forward(placeholders: bool, gallery: RetrievalGallery) -> None:
    stock, owner = blip2_itm(), processor()
    model = MatchingModel(stock, owner)
    rows = [model.encode_text(text) for text in TEXTS]
    pixels = PixelStore(owner)(gallery.images[:3])
    encoded = owner.tokenizer(list(TEXTS), padding=True, padding_side="right", return_tensors="pt")
    inputs = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    if placeholders:
        ones = torch.ones(len(TEXTS), QUERIES, dtype=torch.long)
        inputs = {
            "input_ids": torch.cat([3 * ones, inputs["input_ids"]], 1),
            "attention_mask": torch.cat([ones, inputs["attention_mask"]], 1),
        }
    else:
        stock.config.image_token_index = None
    vision, embeddings = model.embed_images(pixels)
    texts = model.embed_texts(rows)
    with torch.no_grad():
        for i in range(3):
            repeated = pixels[i : i + 1].expand(len(TEXTS), -1, -1, -1)
            contrastive = stock(pixel_values=pixels[i : i + 1], **inputs, use_image_text_matching_head=False)
            similarity = torch.einsum("qd,td->tq", embeddings[i], texts).amax(-1)
            torch.testing.assert_close(similarity, contrastive.logits_per_image[0], rtol=1e-4, atol=1e-5)
            matched = stock(pixel_values=repeated, **inputs, use_image_text_matching_head=True)
            torch.testing.assert_close(
                model.match(vision[i : i + 1], rows), matched.logits_per_image[:, 1], rtol=1e-4, atol=1e-5
            )


def test_scores_do_not_depend_on_the_batch(gallery: RetrievalGallery) -> None:
    owner = processor()
    model, store = MatchingModel(blip2_itm(), owner), PixelStore(owner)
    runs = [score_gallery(model, gallery, store, top_k=4, batch_size=size) for size in (1, 5, 64)]
    for run in runs:
        assert run.contrastive.recalls() == runs[0].contrastive.recalls()
        assert run.matched is not None and runs[0].matched is not None
        assert run.matched.text.tolist() == runs[0].matched.text.tolist()
        assert run.matched.image.tolist() == runs[0].matched.image.tolist()


def test_top_k_larger_than_the_gallery_is_clipped(gallery: RetrievalGallery) -> None:
    owner = processor()
    model, store = MatchingModel(blip2_itm(), owner), PixelStore(owner)
    progress: list[tuple[int, int]] = []
    scores = score_gallery(
        model, gallery, store, top_k=128, progress=lambda done, total: progress.append((done, total))
    )
    assert scores.top_k == 12 and scores.pairs == 6 * 12
    assert progress[-1] == (24, 24)
    alone = score_gallery(model, gallery, store, top_k=0)
    assert alone.matched is None and alone.pairs == 0
    assert alone.contrastive.recalls() == scores.contrastive.recalls()
    with pytest.raises(ValueError, match="top_k must be at least 0, got -1"):
        score_gallery(model, gallery, store, top_k=-1)


def test_ranks_of_a_crafted_matrix() -> None:
    """Images 0, 1, 2 own captions (0, 1), (2,), (3, 4)."""
    similarity = np.array(
        [
            [0.9, 0.1, 0.8, 0.2, 0.3],  # own best .9: none before
            [0.7, 0.6, 0.5, 0.6, 0.1],  # own .5: three before
            [0.4, 0.2, 0.3, 0.1, 0.35],  # own best .35: one before
        ]
    )
    ranking = rank(similarity, [0, 0, 1, 2, 2])
    assert ranking.text.tolist() == [0, 3, 1]
    # columns: .9 first; .1 after .6 and .2; .5 after .8; .1 after .6 and .2; .35 first
    assert ranking.image.tolist() == [0, 2, 1, 2, 0]
    recalls = ranking.recalls()
    assert recalls["text_r1"] == pytest.approx(1 / 3) and recalls["text_r5"] == 1.0
    assert recalls["image_r1"] == pytest.approx(2 / 5) and recalls["image_r10"] == 1.0


def test_ties_and_no_numbers_never_help() -> None:
    assert rank(np.zeros((3, 3)), [0, 1, 2]).text.tolist() == [2, 2, 2]
    assert rank(np.full((3, 3), np.nan), [0, 1, 2]).image.tolist() == [2, 2, 2]
    mixed = np.array([[np.nan, 0.1], [0.2, 0.3]])
    assert rank(mixed, [0, 1]).text.tolist() == [1, 0]


def test_reranking_reorders_the_candidates_and_nothing_else() -> None:
    similarity = np.array([[0.9, 0.8, 0.7, 0.6], [0.9, 0.8, 0.7, 0.6]])
    matched = np.array([[0.0, 1.0, 9.0, 9.0], [np.nan, np.nan, np.nan, np.nan]])
    own = [0, 0, 1, 1]
    ranking = rerank(similarity, matched, own, top_k=2)
    # image 0: candidates 0 and 1, both right. Image 1: its captions 2 and 3 are behind both candidates.
    assert ranking.text.tolist() == [0, 2]
    swapped = rerank(similarity, matched, [1, 0, 1, 1], top_k=2)
    assert swapped.text.tolist() == [0, 1]  # image 0 owns caption 1: .8 + 1 beats .9 + 0
    assert rank(similarity, [1, 0, 1, 1]).text.tolist() == [1, 0]


def test_reranking_by_a_constant_changes_nothing() -> None:
    similarity = np.random.default_rng(0).random((7, 21))
    own = [t // 3 for t in range(21)]
    for top_k in (1, 3, 21, 100):
        ranking = rerank(similarity, np.zeros((7, 21)), own, top_k)
        assert ranking.text.tolist() == rank(similarity, own).text.tolist()
        assert ranking.image.tolist() == rank(similarity, own).image.tolist()


def test_candidates_are_the_highest() -> None:
    scores = np.array([[0.1, 0.9, np.nan, 0.5]])
    assert candidates(scores, 2).tolist() == [[False, True, False, True]]
    assert candidates(scores, 9).all()


def test_captions_are_cut_at_35_tokens(gallery: RetrievalGallery) -> None:
    assert len(MatchingModel(blip2_itm(), processor()).encode_text("red " * 80)) == 35


def test_a_generative_model_does_not_retrieve() -> None:
    with pytest.raises(ModelMismatch, match="needs an image-text-retrieval model with embeddings, Blip2ForCond"):
        MatchingModel(blip2_opt(), processor())
