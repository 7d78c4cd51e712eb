"""The learning rate of each step."""

from __future__ import annotations

import math

NAMES = ("cosine", "constant", "wsd")


def learning_rate(
    schedule: str, step: int, steps: int, peak: float, lowest: float, warmup: int, decay_share: float
) -> float:
    """Linear warm-up to `peak`, then one of three courses.

    Args:
        schedule: "cosine" falls to `lowest` with the last step (Loshchilov and Hutter 2016, arXiv:1608.03983);
            "constant" stays; "wsd" stays, and falls to `lowest` along a line at the end (warm-up, stable, decay: Hu et
            al. 2024, arXiv:2404.06395, section 4), so that a run can be taken up from before its decay.
        step: from 0 on.
        steps: of the whole run.
        peak: the highest rate.
        lowest: the rate at the end.
        warmup: steps of the warm-up.
        decay_share: of the steps after the warm-up, those in which "wsd" falls.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "constant":
        height = 1.0
    elif schedule == "cosine":
        height = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        height = min(1.0, (1.0 - progress) / decay_share) if decay_share > 0.0 else 1.0
    return lowest + height * (peak - lowest)
