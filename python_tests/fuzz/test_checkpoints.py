"""5,000 damaged and hostile checkpoints: a clear error, or the weights that were written; no crash, no hang, no lie."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mutations
import pytest
import tiny_families
import tiny_vlms
import torch
from safetensors.torch import load_file, save_file

from mmq_kernels import checkpoint, quantize_model
from mmq_kernels.checkpoint import CheckpointError, shards
from mmq_kernels.quantize import GptqSettings

SECONDS = 10
"""A case that takes longer hangs."""

CHUNKS, CASES = 40, 120
"""Chunks of cases of every way to change files."""

PICKLES = 200


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[mutations.Files, dict[str, torch.Tensor]]]:
    """Small checkpoints of every kind, file by file, and what is in them."""
    folder = tmp_path_factory.mktemp("fuzz")
    vit, llama, opt = (tiny_families.TINY[name] for name in ("vit", "llama", "opt"))
    made = []
    for name, model, recipe, calls, settings, size in (
        ("whole", vit.make(), "all=rtn:4:g16", (), GptqSettings(), 10**9),
        ("sharded", vit.make(torch.bfloat16), "all=rtn:3:channel:sym", (), GptqSettings(), 9000),
        ("ordered", llama.make(), "all=gptq:4:g16", llama.calls(), GptqSettings(order="activation"), 10**9),
        ("scaled", opt.make(), "all=awq:8:g16", opt.calls(), GptqSettings(), 20_000),
        ("tied", tiny_vlms.make("opt"), "vision=rtn:2:g16 connector=rtn:5", (), GptqSettings(), 10**9),
    ):
        quantize_model(model, recipe, calls, settings=settings)
        path = checkpoint.save(model, folder / name, recipe=recipe, max_shard_bytes=size)
        made.append(({file.name: file.read_bytes() for file in path.iterdir()}, state(path)))
    return made


def state(folder: Path) -> dict[str, torch.Tensor]:
    model = checkpoint.load(folder)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Hangs(BaseException):
    """Not an Exception: code that makes errors of whatever it catches must not make one of this."""


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raises where the block takes longer, in seconds of the CPU: a busy machine does not count."""

    def late(number: int, frame: object) -> None:
        raise Hangs(f"still at it after {seconds} s of the CPU")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def outcome(files: mutations.Files, folder: Path) -> dict[str, torch.Tensor] | str:
    """What loading gives: the state, or the one line of the error. Anything else comes out as it is."""
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    try:
        with within(SECONDS):
            return state(folder)
    except CheckpointError as error:
        message = str(error)
        assert message.strip() and "\n" not in message and len(message) < 2000, message
        return message
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


WAYS = [*mutations.EXACT, *mutations.REFUSED, *mutations.ANY]


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_damaged_checkpoints(chunk: int, written: list, tmp_path: Path) -> None:
    loaded = 0
    for case in range(CASES):
        way = WAYS[(chunk * CASES + case) % len(WAYS)]
        draw = random.Random(f"{way} {chunk} {case}")
        files, expected = written[draw.randrange(len(written))]
        change = (mutations.EXACT | mutations.REFUSED | mutations.ANY)[way]
        found = outcome(change(draw, dict(files)), tmp_path / "case")
        if isinstance(found, dict):
            loaded += 1
            assert way not in mutations.REFUSED, f"{way} {chunk} {case} loaded"
            assert way in mutations.ANY or same(found, expected), f"{way} {chunk} {case}: other weights, and no error"
    assert loaded < CASES / 2


@pytest.mark.parametrize("chunk", range(4))
def test_pickles_are_never_opened(chunk: int, written: list, tmp_path: Path) -> None:
    marker = tmp_path / "opened"
    for case in range(PICKLES // 4):
        draw = random.Random(f"pickle {chunk} {case}")
        files, expected = written[draw.randrange(len(written))]
        found = outcome(mutations.pickles(draw, dict(files), marker), tmp_path / "case")
        assert isinstance(found, str) or same(found, expected)
        assert not marker.exists()


def test_the_files_load_as_they_are(written: list, tmp_path: Path) -> None:
    for files, expected in written:
        found = outcome(files, tmp_path / "case")
        assert isinstance(found, dict) and same(found, expected), found


def test_the_harness_sees_what_it_looks_for(written: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without checksums, flipped bits go unnoticed, and the comparison says so."""
    monkeypatch.setattr(shards, "checksum", lambda name, tensor: None)
    monkeypatch.setattr(shards.Entry, "checksum", None)
    files, expected = written[0]
    different = 0
    for case in range(60):
        found = outcome(mutations.flip_weights(random.Random(case), dict(files)), tmp_path / "case")
        different += isinstance(found, dict) and not same(found, expected)
    assert different > 10


@pytest.mark.parametrize("size", [2**31, 2**40])
def test_sizes_that_no_memory_holds_are_refused_at_once(size: int, written: list, tmp_path: Path) -> None:
    """Constructors fill what a config asks for, and swallowed the alarm of this file's clock."""
    files, _ = written[0]
    config = json.loads(files["config.json"]) | {"hidden_size": size}
    begin = time.process_time()
    found = outcome(files | {"config.json": json.dumps(config).encode()}, tmp_path / "case")
    assert isinstance(found, str) and "still at it" not in found
    assert time.process_time() - begin < 2


def test_plain_safetensors_reads_them_and_files_without_checksums_load(tmp_path: Path) -> None:
    model = tiny_families.TINY["vit"].make()
    quantize_model(model, "all=rtn:4:g16")
    folder = checkpoint.save(model, tmp_path / "model")
    expected, file = state(folder), folder / "model.safetensors"
    save_file(load_file(file), file, {"format": "pt"})
    assert same(state(folder), expected)
