"""What models are asked, and that README says so."""

import protocol_table

from mmq_kernels.eval.protocol import ANY, PROTOCOLS, Decoding


def test_readme_has_the_table_that_evaluation_reads() -> None:
    assert protocol_table.in_readme() == protocol_table.table(), "run python python_tests/eval/protocol_table.py"


def test_the_study_s_prompts_and_decoding() -> None:
    for task in ("vqa", "gqa"):
        for language, penalty in (("opt", 0.0), ("t5", -1.0)):
            asked = PROTOCOLS["blip-2", language, task]
            assert asked.prompt == "Question: {} Short answer:" and asked.layout is None
            assert asked.decoding == Decoding(10, 5, min_new_tokens=1, length_penalty=penalty)
        chat = PROTOCOLS[ANY, ANY, task]
        assert chat.layout is not None and chat.decoding.num_beams == 1
        said = chat.layout.replace("{image}", "<image>").replace("{text}", chat.text("Why?") or "")
        assert said == "USER: <image>\nWhy?\nAnswer the question using a single word or phrase. ASSISTANT:"


def test_braces_in_a_question_are_text() -> None:
    assert PROTOCOLS[ANY, ANY, "vqa"].text("{0.__class__} {}?").startswith("{0.__class__} {}?\n")
