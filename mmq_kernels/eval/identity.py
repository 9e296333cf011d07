"""What predictions depend on, as facts that two runs can be told apart by: weights, data, options, versions."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmq_kernels.eval.datasets import RetrievalGallery
from mmq_kernels.eval.prepared import Prepared
from mmq_kernels.eval.result import versions

_PLACES = ("_name_or_path", "name_or_path", "transformers_version")
"""What a config says of where the model lay, not of what it is."""

_MAKERS = ("mmq_kernels", "torch", "transformers")
"""Packages on whose version the last bits of a prediction may depend."""


def run_facts(model: nn.Module, data: Prepared, asked: dict[str, Any], name: str | None = None) -> dict[str, Any]:
    """Facts of predicting `data` by `model`.

    Args:
        asked: protocol and options that predictions depend on.
        name: tells the model from others; None is made from its weights, which are all read for it.
    """
    settings = data.settings()
    del settings["data"]  # a place; what lies there is told by `data_digest`
    made_by = versions()
    return {
        "task": data.task,
        "model": name or f"{type(model).__name__} {model_digest(model)}",
        "data": data_digest(data),
        **settings,
        **asked,
        **{package: made_by[package] for package in _MAKERS},
    }


def model_digest(model: nn.Module) -> str:
    """Of configs and of all tensors, packed ones in the layout that is stored, a module at a time."""
    digest = hashlib.sha256()
    for attribute in ("config", "generation_config"):
        config = getattr(model, attribute, None)
        if config is not None:
            digest.update(_told(config.to_dict()).encode())
    for name, module in model.named_modules():
        own: dict[str, Tensor] = {}
        module._save_to_state_dict(own, f"{name}.", keep_vars=False)
        for key, tensor in sorted(own.items()):
            if isinstance(tensor, Tensor):
                digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(_bytes(tensor))
        rounded = getattr(module, "activation_bits", 16)  # of a packed layer: no tensor tells it
        if rounded != 16:
            digest.update(f"{name} {rounded}\n".encode())
    return digest.hexdigest()[:16]


def images_of(data: Prepared) -> list[Path]:
    """Every image once, in order."""
    samples: Any = data.samples
    found = samples.images if isinstance(samples, RetrievalGallery) else [sample.image for sample in samples]
    return list(dict.fromkeys(found))


def samples_digest(data: Prepared) -> str:
    """Equal for the same samples: task, ids, texts, names and sizes of images."""
    digest = hashlib.sha256(data.task.encode())
    for image in images_of(data):
        digest.update(f"{image.relative_to(data.folder).as_posix()} {image.stat().st_size}\n".encode())
    samples: Any = data.samples
    for sample in [samples] if isinstance(samples, RetrievalGallery) else samples:
        digest.update(_told({**vars(sample), "image": None, "images": None}).encode() + b"\n")
    return digest.hexdigest()[:16]


def data_digest(data: Prepared) -> str:
    """Of the samples and of how their images and texts are read."""
    digest = hashlib.sha256(samples_digest(data).encode())
    reader = getattr(data.processor, "image_processor", data.processor)
    tokenizer = getattr(data.processor, "tokenizer", data.processor)
    digest.update(_told(reader.to_dict() if hasattr(reader, "to_dict") else type(reader).__name__).encode())
    if hasattr(tokenizer, "get_vocab"):
        digest.update(_told(tokenizer.get_vocab()).encode())
    return digest.hexdigest()[:16]


def _told(content: Any) -> str:
    if isinstance(content, dict):
        content = _without_places(content)
    return json.dumps(content, sort_keys=True, default=str)


def _without_places(content: dict[str, Any]) -> dict[str, Any]:
    return {
        str(key): _without_places(value) if isinstance(value, dict) else value
        for key, value in content.items()
        if key not in _PLACES
    }


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
