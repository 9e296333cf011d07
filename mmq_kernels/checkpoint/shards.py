"""Safetensors files, one tensor at a time: reading with checks, and writing shards as they fill.

A file is ``u64 header length | JSON header | data``; the header gives each tensor's dtype, shape and place in the data.
Files written here also say in the header's metadata what the CRC-32 of each tensor is, over name, dtype, shape and
bytes, and reading holds them to it: what is not what was written is not loaded. Files of others need not.
Tensors are read straight into memory of their own: nothing stays mapped, so a folder can be replaced while a
model that came from it lives, and reading never costs more memory than one tensor.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from mmq_kernels.checkpoint.errors import CheckpointError, shortened

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CHECKSUMS = "mmq_crc32"
"""Key in a file's metadata, of a JSON object: name of a tensor -> its `checksum`."""

_MAX_HEADER = 100_000_000
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Entry(NamedTuple):
    """A tensor of a file: what it is, and where its bytes are."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    bytes: int
    checksum: int | None = None


def checksum(name: str, tensor: Tensor) -> int:
    """CRC-32 of a tensor on the CPU: of its name, dtype and shape, and then of its bytes."""
    about = f"{name} {tensor.dtype} {list(tensor.shape)} "
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data if tensor.numel() else b""
    return zlib.crc32(data, zlib.crc32(about.encode(errors="surrogatepass")))


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, in the order of their data.

    Raises:
        CheckpointError: for a file that is missing, truncated or no safetensors file.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; copy the whole folder again")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise CheckpointError(f"{path} is no complete safetensors file ({size} bytes); copy it again")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_without_repeats)
            metadata = header.pop("__metadata__", None) or {}
            sums = json.loads(metadata.get(CHECKSUMS, "{}"))
            entries = {name: _entry(fields, 8 + length, sums.get(name)) for name, fields in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            message = shortened(str(error) or type(error).__name__)
            raise CheckpointError(f"{path} has a damaged safetensors header ({message}); copy it again") from None
    for name, entry in entries.items():
        if math.prod(entry.shape) * entry.dtype.itemsize != entry.bytes:
            raise CheckpointError(f"{path}: the header gives tensor {name} the wrong number of bytes; copy it again")
        if entry.start + entry.bytes > size:
            raise CheckpointError(f"{path} is truncated in tensor {name} ({size} bytes); copy it again")
    return dict(sorted(entries.items(), key=lambda item: item[1].start))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _entry(fields: dict[str, Any], data: int, sum_of_it: Any) -> Entry:
    start, end = fields["data_offsets"]
    sizes = fields["shape"]
    if fields["dtype"] not in _DTYPES:
        raise ValueError(f"dtype {fields['dtype']} is not known")
    if any(type(number) is not int for number in (start, end, *sizes)) or not (
        sum_of_it is None or type(sum_of_it) is int
    ):
        raise ValueError(f"numbers that are no integers: {[start, end, *sizes, sum_of_it]}")
    if not 0 <= start <= end or any(size < 0 for size in sizes):
        raise ValueError(f"offsets {start}, {end}, shape {sizes}")
    return Entry(_DTYPES[fields["dtype"]], tuple(sizes), data + start, end - start, sum_of_it)


class Folder:
    """The tensors of a folder: `model.safetensors`, or the shards that its index lists.

    Args:
        path: the folder.

    Attributes:
        entries: every tensor, in the order of files and of data in them.
        files: the file of every tensor.

    Raises:
        CheckpointError: for a missing or damaged file, or tensors that contradict the index; each named.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self.files: dict[str, Path] = {}
        self._written: dict[str, str] = {}  # names in the files, of tensors that have others by now
        listed: dict[str, str] | None = None
        if (path / INDEX).is_file():
            listed = _read_index(path / INDEX)
            names = sorted(set(listed.values()))
        elif (path / SINGLE).is_file():
            names = [SINGLE]
        else:
            raise CheckpointError(_no_weights(path))
        for file in names:
            for name, entry in read_header(path / file).items():
                if name in self.entries:
                    raise CheckpointError(f"{path}: tensor {name} is in both {self.files[name].name} and {file}")
                self.entries[name], self.files[name] = entry, path / file
        for name, file in (listed or {}).items():
            if name not in self.files or self.files[name].name != file:
                raise CheckpointError(f"{path / file} has no tensor {name}, which {INDEX} places there")

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries.values())

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in memory of its own.

        Raises:
            CheckpointError: where the file ends before the tensor does.
        """
        entry, path = self.entries[name], self.files[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        with path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            memory: memoryview = tensor.view(-1).view(torch.uint8).numpy().data if entry.bytes else memoryview(b"")
            done = 0
            while done < entry.bytes:
                got = file.readinto(memory[done:])
                if not got:
                    raise CheckpointError(f"{path} is truncated in tensor {name}; copy it again")
                done += got
        if entry.checksum is not None and checksum(self._written.get(name, name), tensor) != entry.checksum:
            raise CheckpointError(f"{path}: tensor {name} is not what was written: its checksum differs; copy it again")
        return tensor

    def rename(self, names: dict[str, str]) -> None:
        """Call tensors by other names from now on: old name -> new name."""
        self._written |= {new: self._written.pop(old, old) for old, new in names.items()}
        self.entries = {names.get(name, name): entry for name, entry in self.entries.items()}
        self.files = {names.get(name, name): file for name, file in self.files.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)


def _read_index(path: Path) -> dict[str, str]:
    try:
        listed = json.loads(path.read_text())["weight_map"]
        if not all(_is_file_name(file) for file in listed.values()):
            raise ValueError("weight_map must map tensor names to safetensors files of the same folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        message = shortened(repr(error))
        raise CheckpointError(f"{path} is no index of safetensors files ({message}); copy it again") from None
    return listed


def _is_file_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and Path(name).name == name
        and "\0" not in name
        and len(name.encode()) <= 255
    )


def _no_weights(path: Path) -> str:
    pickled = sorted(file.name for suffix in ("*.bin", "*.pt", "*.pth") for file in path.glob(suffix))
    if pickled:
        return (
            f"{path} holds pickled weights ({pickled[0]}), which can run code and are never opened; convert them with "
            "model.save_pretrained(folder, safe_serialization=True) where you trust them"
        )
    return f"{path} holds no {SINGLE} and no {INDEX}; give a folder that save or save_pretrained wrote"


class ShardWriter:
    """Writes tensors to safetensors files of at most `max_bytes` each (or of one tensor, if that is larger).

    `close` gives the files the names that transformers gives them, and writes the index if there are several.

    Args:
        folder: where to write; exists.
        max_bytes: size of a file's data.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_shard_bytes must be positive, got {max_bytes}")
        self.folder, self.max_bytes = folder, max_bytes
        self.total_bytes = 0
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._addresses: set[int] = set()
        self._written: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take over one tensor (copied to the CPU where it is elsewhere)."""
        size = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + size > self.max_bytes:
            self._flush()
        tensor = tensor.detach().to("cpu").contiguous()
        address = tensor.untyped_storage().data_ptr()
        if tensor.untyped_storage().nbytes() != size or address in self._addresses:
            tensor = tensor.clone()  # a file cannot hold tensors that share memory
        self._addresses.add(tensor.untyped_storage().data_ptr())
        self._held[name] = tensor
        self._held_bytes += size
        self.total_bytes += size

    def close(self) -> list[str]:
        """Write what is left; returns the names of the files."""
        if self._held or not self._written:
            self._flush()
        count = len(self._written)
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        for i, name in enumerate(names):
            self._part(i).rename(self.folder / name)
        if count > 1:
            weight_map = {key: names[i] for i, keys in enumerate(self._written) for key in keys}
            content = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (self.folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")
        return names

    def _part(self, i: int) -> Path:
        return self.folder / f"part-{i:05}.safetensors"

    def _flush(self) -> None:
        sums = json.dumps({name: checksum(name, tensor) for name, tensor in self._held.items()})
        metadata = {"format": "pt", CHECKSUMS: sums}
        path = self._part(len(self._written))
        safetensors.torch.save_file(self._held, path, metadata=metadata)
        _order_metadata(path)
        self._written.append(list(self._held))
        self._held, self._held_bytes = {}, 0
        self._addresses.clear()


def _order_metadata(path: Path) -> None:
    """Give a file's metadata the order of their keys: safetensors writes them in any, another one each time."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) > length:
            raise CheckpointError(
                f"{path}: the header must fit its {length} bytes in another order, got {len(ordered)}"
            )
        file.seek(8)
        file.write(ordered.ljust(length))
