"""The training loop that the three stages share: AdamW, warm-up, cosine, clipping, a log line, snapshots."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

LOG_EVERY = 50


@dataclass(frozen=True)
class Schedule:
    """How long and how hard to train.

    Attributes:
        steps: optimizer steps.
        batch: scenes a step.
        learning_rate: at its height.
        warmup: steps of linear rise before the cosine.
        weight_decay: on matrices only.
        horizon: step at which the cosine would end, where that is not the last one.
    """

    steps: int
    batch: int
    learning_rate: float
    warmup: int = 250
    weight_decay: float = 0.02
    horizon: int | None = None

    def scaled(self, factor: float) -> Schedule:
        """The same with `factor` times the steps."""
        steps = max(1, round(self.steps * factor))
        horizon = round(self.horizon * factor) if self.horizon else None
        return replace(self, steps=steps, warmup=min(self.warmup, steps // 4 + 1), horizon=horizon)

    def early(self, step: int) -> float:
        """Weight of the auxiliary losses: from 1 down to 0.2 in the first 40% of the steps."""
        return max(0.2, 1 - 2 * step / (self.horizon or self.steps))

    def rate(self, step: int) -> float:
        """Share of the learning rate at `step`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, (self.horizon or self.steps) - self.warmup)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def train(
    modules: nn.ModuleDict,
    losses: Callable[[int], dict[str, Tensor]],
    schedule: Schedule,
    *,
    name: str,
    log: Path,
    snapshot: Callable[[], None],
    snapshot_every: int = 500,
) -> None:
    """Minimize the sum of `losses(step)` over the parameters of `modules`.

    Args:
        modules: the model and its auxiliary heads.
        losses: the weighted terms of one step.
        log: JSON lines, one every `LOG_EVERY` steps.
        snapshot: writes the model as it is; called now and then and at the end.
    """
    matrices = [p for p in modules.parameters() if p.requires_grad and p.dim() > 1]
    vectors = [p for p in modules.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": schedule.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98))
    modules.train()
    log.parent.mkdir(parents=True, exist_ok=True)
    sums: dict[str, float] = {}
    started = time.perf_counter()
    with log.open("a") as lines:
        for step in range(schedule.steps):
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate * schedule.rate(step)
            terms = losses(step)
            optimizer.zero_grad(set_to_none=True)
            torch.stack(list(terms.values())).sum().backward()
            nn.utils.clip_grad_norm_([*matrices, *vectors], 1.0)
            optimizer.step()
            for key, value in terms.items():
                sums[key] = sums.get(key, 0.0) + value.item()
            if (step + 1) % LOG_EVERY == 0 or step + 1 == schedule.steps:
                seconds = time.perf_counter() - started
                row = {"stage": name, "step": step + 1, "seconds": round(seconds, 1)}
                row |= {key: round(value / LOG_EVERY, 4) for key, value in sums.items()}
                print(json.dumps(row), file=lines, flush=True)
                sums.clear()
            if (step + 1) % snapshot_every == 0 or step + 1 == schedule.steps:
                modules.eval()
                snapshot()
                modules.train()
    modules.eval()
