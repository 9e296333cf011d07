"""Teacher-forced negative log-likelihood of reference texts: the steadiest signal of what quantization cost.

``nll = -sum_t log p(reference_t | image, prompt, reference_<t) / tokens``, over reference tokens only: pads,
image tokens, prompt and the end token do not count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmq_kernels.eval.started import Started


@torch.inference_mode()
def reference_nll(started: Started, references: Sequence[Sequence[int]]) -> list[float]:
    """Summed negative log-likelihood (nats) of one reference a prompt.

    Args:
        started: prompts that were read, from `mmq_kernels.eval.started.start`.
        references: token ids from `PromptedModel.encode_answer`; an empty one has likelihood 1.
    """
    forced = started.force(references)
    scores = forced.logits.float().log_softmax(-1).gather(-1, forced.targets.unsqueeze(-1)).squeeze(-1)
    return (-scores.double().masked_fill(~forced.counted, 0.0).sum(1)).tolist()
