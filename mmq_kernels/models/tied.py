"""Output heads tied to an embedding: quantizing one must not change the other."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def untie_heads(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Make the planned linears whose weight is another module's weight their own masters.

    The embedding keeps the shared tensor; the config says from now on that nothing is tied, so that neither saving
    nor loading ties them again.

    Returns:
        The names that were tied.

    Raises:
        ValueError: for an encoder-decoder that scales its outputs because of the tie.
    """
    shared: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    tied = [name for name in names if len(shared[id(model.get_parameter(f"{name}.weight"))]) > 1]
    if not tied:
        return []
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is None or not getattr(config, "tie_word_embeddings", False):
            continue
        if getattr(config, "is_encoder_decoder", False) and getattr(config, "model_type", "") == "t5":
            raise ValueError(
                f"{tied[0]} is tied to the embedding of a T5 that scales its outputs for it; leave it at 16 bits"
            )
        for holder in (config, getattr(config, "text_config", None)):
            if holder is not None:
                holder.tie_word_embeddings = False
    for name in tied:
        weight = model.get_parameter(f"{name}.weight").detach()
        model.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    return tied
