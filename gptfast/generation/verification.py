"""Which of a draft's proposals stand, so that what comes out is distributed as the model says."""

from __future__ import annotations

import torch
from torch import Tensor


def verify(p: Tensor, q: Tensor, proposals: Tensor, uniforms: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Which proposals stand, and the token that follows them.

    A proposal x ~ q stands with probability min(1, p(x) / q(x)). In the place of the first that does not comes a draw
    from max(0, p - q), up to a factor: so each token is distributed as p (Leviathan et al. 2023, appendix A.1). After
    the last comes a draw from p.

    Args:
        p: [B, K + 1, V] float32, the model's probabilities at each proposal's place and after them.
        q: [B, K + 1, V] float32, those from which the proposals were drawn; 0 after them, where nothing was proposed.
        proposals: [B, K] int64, K >= 0.
        uniforms: [B, K] float32 in [0, 1), independent.
        times: [B, V] float32, `sampling.exponentials`.

    Returns:
        [B] int64, how many proposals stand, 0 to K; [B] int64, the token after them.
    """
    chosen = proposals[..., None]  # [B, K, 1]
    # a product, and strictly less: a token of probability 0 never stands, one with p = q always does
    stands = uniforms * q[:, :-1].gather(2, chosen)[..., 0] < p[:, :-1].gather(2, chosen)[..., 0]  # [B, K]
    accepted = leading(stands)
    place = accepted[:, None, None].expand(-1, 1, p.shape[2])  # [B, 1, V]
    p, q = p.gather(1, place)[:, 0], q.gather(1, place)[:, 0]  # [B, V] each
    left = (p - q).clamp(min=0.0)
    # rounding may leave nothing of two distributions that are as good as equal
    left = torch.where(left.sum(-1, keepdim=True) > 0.0, left, p)
    return accepted, race(left, times)


def leading(stands: Tensor) -> Tensor:
    """How many of each row [B, K] are true before the first that is not, [B] int64."""
    return stands.long().cumprod(1).sum(1)


def race(weights: Tensor, times: Tensor) -> Tensor:
    """`sampling.exponential_race` of probabilities [B, V], up to a factor, in the place of their logarithms."""
    return (weights / times).argmax(-1)
