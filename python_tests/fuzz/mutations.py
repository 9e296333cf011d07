"""Ways to damage a checkpoint: each takes the files of a folder by name and gives them back changed.

Drawn by a seeded generator. `kept` says of each way what a load may still give: the weights that were written, to the
last bit (a flip that hits padding, say), or nothing but an error.
"""

from __future__ import annotations

import json
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Files = dict[str, bytes]
Mutation = Callable[[random.Random, Files], Files]

NAN = float("nan")
HOSTILE_NUMBERS = (-1, 0, 1, 3, 9, 2**31, 2**63, -(2**70), 10**400, 1.5, True, None, "4", [], {}, NAN, 1e308)
HOSTILE_TEXTS = ("", "\0", "../../etc/passwd", "/etc/passwd", "a" * 100_000, "\ud800", "é" * 999, "model", "%s%n")


class Marker:
    """Pickled, it makes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def weights_of(draw: random.Random, files: Files) -> str:
    return draw.choice(sorted(name for name in files if name.endswith(".safetensors")))


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode(errors="surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


# --- bytes ------------------------------------------------------------------------------------------------------------


def flip_weights(draw: random.Random, files: Files) -> Files:
    name = weights_of(draw, files)
    data = bytearray(files[name])
    for _ in range(draw.choice((1, 1, 1, 2, 16))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return files | {name: bytes(data)}


def flip_header(draw: random.Random, files: Files) -> Files:
    name = weights_of(draw, files)
    data = bytearray(files[name])
    end = 8 + struct.unpack("<Q", data[:8])[0]
    data[draw.randrange(end)] ^= 1 << draw.randrange(8)
    return files | {name: bytes(data)}


def flip_quantization(draw: random.Random, files: Files) -> Files:
    """Of the description in config.json: anything but weights as they were, or an error, would be silent."""
    data = bytearray(files["config.json"])
    start = data.index(b'"quantization_config"')
    depth, end = 0, start
    for end in range(data.index(b"{", start), len(data)):
        depth += {ord("{"): 1, ord("}"): -1}.get(data[end], 0)
        if depth == 0:
            break
    data[draw.randrange(start, end)] ^= 1 << draw.randrange(7)
    return files | {"config.json": bytes(data)}


def truncate(draw: random.Random, files: Files) -> Files:
    name = draw.choice(sorted(files))
    return files | {name: files[name][: draw.randrange(len(files[name]))]}


def lengthen(draw: random.Random, files: Files) -> Files:
    name = draw.choice(sorted(files))
    return files | {name: files[name] + draw.randbytes(draw.choice((1, 8, 1000)))}


def lose_a_file(draw: random.Random, files: Files) -> Files:
    name = draw.choice(sorted(files))
    return {other: data for other, data in files.items() if other != name}


def noise(draw: random.Random, files: Files) -> Files:
    name = draw.choice(sorted(files))
    return files | {name: draw.randbytes(draw.choice((0, 1, 7, 8, 9, 500)))}


# --- headers ----------------------------------------------------------------------------------------------------------


def header_number(draw: random.Random, files: Files) -> Files:
    name = weights_of(draw, files)
    header, data = split(files[name])
    tensor = header[draw.choice([key for key in header if key != "__metadata__"])]
    field = draw.choice(("shape", "data_offsets"))
    if tensor[field]:
        tensor[field][draw.randrange(len(tensor[field]))] = draw.choice(HOSTILE_NUMBERS)
    return files | {name: join(header, data)}


def header_field(draw: random.Random, files: Files) -> Files:
    name = weights_of(draw, files)
    header, data = split(files[name])
    key = draw.choice(list(header))
    field = draw.choice(("shape", "data_offsets", "dtype", "mmq_crc32", "format"))
    values = ("F32", "F16", "BF16", "I32", "I64", "U8", "F8_E4M3", *HOSTILE_NUMBERS, *HOSTILE_TEXTS)
    header[key][field] = draw.choice(values)
    return files | {name: join(header, data)}


def header_tensors(draw: random.Random, files: Files) -> Files:
    """Two tensors exchanged, one left out, one under another name, one twice."""
    name = weights_of(draw, files)
    header, data = split(files[name])
    keys = [key for key in header if key != "__metadata__"]
    one, other = draw.choice(keys), draw.choice(keys)
    match draw.randrange(4):
        case 0:
            header[one], header[other] = header[other], header[one]
        case 1:
            del header[one]
        case 2:
            header[draw.choice(HOSTILE_TEXTS)] = header.pop(one)
        case _:
            twice = f"{json.dumps(header)[:-1]}, {json.dumps(one)}: {json.dumps(header[other])}"
            return files | {name: join(twice.encode() + b"}", data)}
    return files | {name: join(header, data)}


def header_whole(draw: random.Random, files: Files) -> Files:
    name = weights_of(draw, files)
    _, data = split(files[name])
    header = draw.choice((b"", b"[]", b"null", b'"a"', b"{", b"[" * 100_000, b'{"a":' * 50_000, b"\xff", b"{}", b"1"))
    if draw.random() < 0.3:
        claimed = draw.choice((2**64 - 1, 2**63, 10**9, 100_000_001, len(files[name]), 0))
        return files | {name: struct.pack("<Q", claimed) + files[name][8:]}
    return files | {name: join(header, data)}


# --- tensors, with checksums that fit ---------------------------------------------------------------------------------


def tensor_values(draw: random.Random, files: Files) -> Files:
    """Impossible values in a file that says nothing of checksums: scales, column groups, input scales, shapes."""
    wanted = ("weight_scale", "weight_g_idx", "weight_input_scale", "weight_shape")
    weights = sorted(name for name in files if name.endswith(".safetensors"))
    name, key = draw.choice([(n, key) for n in weights for key in split(files[n])[0] if key.endswith(wanted)])
    header, data = split(files[name])
    header.pop("__metadata__", None)
    start, end = header[key]["data_offsets"]
    size = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I64": 8}[header[key]["dtype"]]
    bad = {
        "F32": (struct.pack("<f", float("nan")), struct.pack("<f", float("inf"))),
        "F16": (b"\x00\x7e", b"\x00\x7c", b"\x00\xfc"),
        "BF16": (b"\xc0\x7f", b"\x80\x7f"),
        "I32": (struct.pack("<i", -1), struct.pack("<i", 2**31 - 1), struct.pack("<i", 10_000)),
        "I64": (struct.pack("<q", -1), struct.pack("<q", 2**62), struct.pack("<q", 0)),
    }[header[key]["dtype"]]
    at = start + size * draw.randrange((end - start) // size)
    return files | {name: join(header, data[:at] + draw.choice(bad) + data[at + size :])}


def tensor_lost(draw: random.Random, files: Files) -> Files:
    """A tensor gone, or of another shape of as many values, from a file without checksums."""
    name = weights_of(draw, files)
    header, data = split(files[name])
    header.pop("__metadata__", None)
    key = draw.choice(list(header))
    if draw.random() < 0.5:
        del header[key]
    else:
        shape = header[key]["shape"]
        header[key]["shape"] = [*shape, 1] if draw.random() < 0.5 or len(shape) < 2 else [shape[0] * shape[1]]
    return files | {name: join(header, data)}


# --- configs ----------------------------------------------------------------------------------------------------------


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [deeper for key, inner in items for deeper in _paths(inner, (*path, key))]


def _changed(draw: random.Random, content: Any) -> Any:
    path = draw.choice(_paths(content))
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    match draw.randrange(4):
        case 0 if isinstance(holder, dict):
            del holder[path[-1]]
        case 1 if isinstance(holder, dict):
            holder[draw.choice(HOSTILE_TEXTS)] = draw.choice(HOSTILE_NUMBERS)
        case _:
            holder[path[-1]] = draw.choice((*HOSTILE_NUMBERS, *HOSTILE_TEXTS))
    return content


def description(draw: random.Random, files: Files) -> Files:
    content = json.loads(files["config.json"])
    content["quantization_config"] = _changed(draw, content["quantization_config"])
    return files | {"config.json": json.dumps(content).encode(errors="surrogatepass")}


def model_config(draw: random.Random, files: Files) -> Files:
    """The model's own part, which people change: an error, or a model of what is asked for."""
    content = json.loads(files["config.json"])
    own = content.pop("quantization_config")
    content = _changed(draw, content)
    return files | {"config.json": json.dumps(content | {"quantization_config": own}).encode(errors="surrogatepass")}


def config_whole(draw: random.Random, files: Files) -> Files:
    text = files["config.json"]
    choices = (b"[]", b"null", b"{", b"[" * 100_000, b'{"a":' * 50_000, b"\xff", b"{}", text.replace(b"}", b"]"))
    return files | {"config.json": draw.choice(choices)}


def index(draw: random.Random, files: Files) -> Files:
    name = "model.safetensors.index.json"
    if name not in files:
        listed = {"weight_map": {draw.choice(HOSTILE_TEXTS): draw.choice(HOSTILE_TEXTS)}}
        return files | {name: json.dumps(listed).encode(errors="surrogatepass")}
    content = json.loads(files[name])
    key = draw.choice(list(content["weight_map"]))
    match draw.randrange(4):
        case 0:
            content["weight_map"][key] = draw.choice((*HOSTILE_TEXTS, *HOSTILE_NUMBERS))
        case 1:
            content["weight_map"][key] = draw.choice(sorted(files))
        case 2:
            del content["weight_map"][key]
        case _:
            content = _changed(draw, content)
    return files | {name: json.dumps(content).encode(errors="surrogatepass")}


def pickles(draw: random.Random, files: Files, marker: Path) -> Files:
    """Pickled weights beside, or instead of, the others."""
    evil = pickle.dumps(Marker(marker))
    name = draw.choice(("pytorch_model.bin", "model.pt", "adapter_model.bin", "model.safetensors", "weights.pth"))
    if draw.random() < 0.5:
        files = {other: data for other, data in files.items() if ".safetensors" not in other}
    return files | {name: evil}


EXACT: dict[str, Mutation] = {
    f.__name__: f
    for f in (
        flip_weights,
        flip_header,
        flip_quantization,
        truncate,
        lengthen,
        lose_a_file,
        noise,
        header_number,
        header_field,
        header_tensors,
        header_whole,
        description,
        config_whole,
        index,
    )
}
"""After these a load gives an error, or what was written."""

REFUSED: dict[str, Mutation] = {f.__name__: f for f in (tensor_values, tensor_lost)}
"""These no load may survive."""

ANY: dict[str, Mutation] = {model_config.__name__: model_config}
"""These may change the model; only crashes, hangs and unclear errors are ruled out."""
