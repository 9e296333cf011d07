"""The study's own result tables, read into rows; what is damaged is named by its line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mmq_kernels.sweep import read_published

TABLES = Path(__file__).resolve().parents[3] / "shared" / "data" / "paper"

AWQ = "vit_bits,qformer_bits,llm_bits,METEOR,CIDEr,model_size\n2,2,3,0.14,0.38,18244540672\n16,4,4,0.2,1.1,80\n"
UNIFORM = (
    "config,bit_size,type,VIT_FIRST,VIT_MIDDLE,VIT_LAST,QFORMER_FIRST,QFORMER_MIDDLE,QFORMER_LAST,"
    "LLM_FIRST,LLM_MIDDLE,LLM_LAST,METEOR,CIDEr,quantized_size\n"
    "894,5,MLP,0,0,0,0,1,1,0,0,0,0.27,1.28,800\n895,16,BOTH,0,0,1,0,1,1,0,0,0,0.27,1.28,800\n"
)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    def written(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return written


def test_bits_of_components(write: Callable[[str, str], Path]) -> None:
    first, second = read_published(write("awq_captioning.csv", AWQ))
    assert first.factors == {"vision": 2, "connector": 2, "language": 3}
    assert first.metrics == {"meteor": 0.14, "cider": 0.38}
    assert (first.model, first.task, first.method) == ("Salesforce/blip2-opt-2.7b", "caption", "awq")
    assert first.bytes == 18244540672 // 8
    assert first.recipe == "vision=awq:2:g128:asym connector=awq:2:g128:asym language=awq:3:g128:asym"
    assert second.recipe == "connector=awq:4:g128:asym language=awq:4:g128:asym"
    quantized = 2 * 984_023_040 + 2 * 104_988_672 + 3 * 2_516_582_400
    left = 3_744_761_856 - 984_023_040 - 104_988_672 - 2_516_582_400
    assert first.bpw == pytest.approx((quantized + 16 * left) / 3_744_761_856)
    assert second.bpw == pytest.approx(4 + 12 * (984_023_040 + left) / 3_744_761_856)


def test_retrieval_has_no_language_model(write: Callable[[str, str], Path]) -> None:
    text = "vit_bits,qformer_bits,txt_r1,txt_r_mean,img_r10\n4,16,97.5,1,86\n"
    (found,) = read_published(write("awq_retrieval.csv", text))
    assert found.factors == {"vision": 4, "connector": 16}
    assert found.metrics == pytest.approx({"text_r1": 0.975, "image_r10": 0.86})
    assert found.bytes is None
    left = 1_172_623_618 - 984_023_040
    assert found.bpw == pytest.approx((4 * 984_023_040 + 16 * left) / 1_172_623_618)


def test_thirds_and_kinds_of_layers(write: Callable[[str, str], Path]) -> None:
    first, second = read_published(write("uniform_captioning.csv", UNIFORM))
    assert first.factors == {
        **{f"vision.{third}": 16 for third in ("first", "middle", "last")},
        **{"connector.first": 16, "connector.middle": 5, "connector.last": 5},
        **{f"language.{third}": 16 for third in ("first", "middle", "last")},
        "layers": "mlp",
    }
    assert first.bpw is None and first.bytes == 100
    assert set(second.factors.values()) == {16, "both"}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("results.csv", AWQ, "must be named METHOD_TASK.csv"),
        ("awq_captioning.csv", AWQ.replace("qformer_bits", "q"), "lacks column qformer_bits; it has vit_bits, q,"),
        ("awq_captioning.csv", "", "lacks column vit_bits, qformer_bits; it has none"),
        ("awq_captioning.csv", "vit_bits,qformer_bits,x\n2,2,1\n", "has no metric; one of cider"),
        ("awq_captioning.csv", AWQ.replace("0.38", "good"), "line 2: CIDEr must be a number, got 'good'"),
        ("awq_captioning.csv", AWQ.replace("0.38", "nan"), "line 2: CIDEr must be a number, got 'nan'"),
        ("awq_captioning.csv", AWQ.replace(",80", ""), "line 3: model_size must be a number, got None"),
        ("awq_captioning.csv", AWQ.replace("16,4,4", "9,4,4"), "line 3: vit_bits must be 2..8 or 16, got 9"),
        ("awq_captioning.csv", AWQ.replace("16,4,4", "2,2,3"), "line 3: .*'vision': 2.* is in the table twice"),
        ("awq_captioning.csv", AWQ.replace(",80", ",80,1"), "line 3 has more values than columns"),
        ("uniform_captioning.csv", UNIFORM.replace("MLP", "CONV"), "line 2: type must be one of MLP, .*'CONV'"),
        ("uniform_captioning.csv", UNIFORM.replace("MLP,0", "MLP,2"), "line 2: VIT_FIRST must be 0 or 1, got 2"),
    ],
)
def test_damage_is_named(name: str, text: str, said: str, write: Callable[[str, str], Path]) -> None:
    with pytest.raises(ValueError, match=said):
        read_published(write(name, text))


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no table .*awq_captioning.csv"):
        read_published(tmp_path / "awq_captioning.csv")


@pytest.mark.skipif(not TABLES.is_dir(), reason=f"no tables of the study in {TABLES}")
@pytest.mark.parametrize(
    ("name", "rows"),
    [("gptq_captioning", 448), ("awq_captioning", 343), ("awq_retrieval", 49), ("uniform_captioning", 1500)],
)
def test_the_real_tables(name: str, rows: int) -> None:
    found = read_published(TABLES / f"{name}.csv")
    assert len({result.fingerprint for result in found}) == rows
