"""Log-probabilities by definition: one row at a time, in float64."""

import copy

import torch

from gptfast import GPT


def exact_log_probabilities(model: GPT, ids: list[int]) -> list[float]:
    """Return those of the second token to the last, each given the tokens before it."""
    model = copy.deepcopy(model)
    model.set_backend("eager")
    model.double().eval()
    row = torch.tensor([ids])
    with torch.no_grad():
        log_probs = model(row[:, :-1], row[:, :-1])[0][0].log_softmax(-1)  # [T - 1, V]
    return log_probs.gather(1, row[0, 1:, None])[:, 0].tolist()
