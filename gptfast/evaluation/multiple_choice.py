"""Multiple choice: accuracy of a model that answers with its likeliest ending.

HellaSwag (Zellers et al. 2019, arXiv:1905.07830) with the rules and metric names of EleutherAI's
lm-evaluation-harness: `TemplateLM._encode_pair` and `loglikelihood` in lm_eval/api/model.py, `_loglikelihood_tokens`
in lm_eval/models/huggingface.py and `process_results` in lm_eval/api/task.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from gptfast.backend import IGNORE_INDEX
from gptfast.evaluation import metrics
from gptfast.evaluation.metrics import Estimate
from gptfast.evaluation.token_losses import token_losses
from gptfast.model import GPT
from gptfast.tokenizers import Tokenizer

ACCURACIES = ("acc", "acc_norm", "acc_bytes")


@dataclass(frozen=True)
class Question:
    """A context with several endings.

    Args:
        context: text before the ending.
        endings: at least two.
        label: index of the right ending.
    """

    context: str
    endings: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class EncodedEnding:
    """The tokens of a context and one ending.

    Args:
        ids: token ids of context and ending.
        n_targets: number of tokens at the end that belong to the ending.
    """

    ids: list[int]
    n_targets: int


@dataclass(frozen=True)
class ChoiceScore:
    """Shares of right answers.

    Args:
        acc: the answer has the highest log-likelihood.
        acc_norm: the answer has the highest log-likelihood per character.
        acc_bytes: the answer has the highest log-likelihood per byte of UTF-8, nearly the same for English.
        questions: number of questions.
    """

    acc: Estimate
    acc_norm: Estimate
    acc_bytes: Estimate
    questions: int

    def fields(self) -> dict[str, Any]:
        """Return the score as JSON fields."""
        result: dict[str, Any] = {"questions": self.questions}
        for name in ACCURACIES:
            result |= metrics.fields(name, getattr(self, name))
        return result


def read(path: Path, limit: int | None = None) -> list[Question]:
    """Read questions from a file of JSON lines in HellaSwag's format.

    Args:
        path: file of objects with "context" (or "ctx"), "endings" and "label". Other fields and empty lines are
            ignored.
        limit: number of questions; None for all.

    Raises:
        ValueError: no such file, no questions, or a malformed line; the message has its number.
    """
    if not path.is_file():
        raise ValueError(f"no such file with choices: {path}")
    questions: list[Question] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if limit is not None and len(questions) == limit:
                break
            if line.strip():
                try:
                    questions.append(_question(line))
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error
    if not questions:
        raise ValueError(f"{path} has no questions; give one JSON object per line")
    return questions


def _question(line: bytes) -> Question:
    try:
        entry = json.loads(line)
    except ValueError as error:  # also for bytes that are not UTF-8
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(entry, dict):
        raise ValueError(f"a line must be a JSON object, got {type(entry).__name__}")
    context = entry.get("context", entry.get("ctx"))
    if not isinstance(context, str):
        raise ValueError(f"'context' or 'ctx' must be a string; the line has: {', '.join(entry)}")
    endings = entry.get("endings")
    if not isinstance(endings, list) or len(endings) < 2 or not all(isinstance(e, str) and e for e in endings):
        raise ValueError(f"'endings' must be at least two non-empty strings, got {json.dumps(endings)[:60]}")
    label = entry.get("label")
    # the hub's copy of HellaSwag has string labels
    number = int(label) if isinstance(label, str) and label.isdecimal() else label
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(endings):
        raise ValueError(f"'label' must be an integer from 0 to {len(endings) - 1}, got {json.dumps(label)[:60]}")
    return Question(context, tuple(endings), number)


def encode(tokenizer: Tokenizer, context: str, ending: str, block_size: int, delimiter: str = " ") -> EncodedEnding:
    """Tokenize a context and an ending as one text, truncated on the left to the model's context length.

    If the context alone has n tokens, all tokens after the first n belong to the ending. White space at the end of the
    context moves to the ending, where byte-pair tokens have it. An empty context becomes the end-of-text token.

    Args:
        tokenizer: the model's.
        context: text before the ending.
        ending: one ending of a question.
        block_size: context length of the model. The last token is only a target, so `block_size` + 1 tokens fit.
        delimiter: inserted between context and ending where neither has white space there.

    Raises:
        ValueError: the tokenizer lacks tokens for the text, the ending adds no token, or the context is empty and the
            tokenizer has no end-of-text token.
    """
    kept = context.rstrip()
    space = context[len(kept) :] or ("" if ending[:1].isspace() else delimiter)
    if kept:
        before = tokenizer.encode(kept).tolist()
        after = tokenizer.encode(kept + space + ending).tolist()[len(before) :]
    elif tokenizer.end_of_text is None:
        raise ValueError("the context is empty, and the tokenizer has no end-of-text token; give a context")
    else:
        before, after = [tokenizer.end_of_text], tokenizer.encode(space + ending).tolist()
    if not before or not after:
        raise ValueError(f"the ending {ending[:40]!r} has no tokens after {context[-40:]!r}; give another ending")
    return EncodedEnding((before + after)[-block_size - 1 :], min(len(after), block_size))


def log_likelihoods(model: GPT, endings: Sequence[EncodedEnding], dtype: torch.dtype, batch_size: int) -> np.ndarray:
    """Compute the log-likelihood of each ending after its context. A terminal shows a progress bar.

    Args:
        model: the GPT; its mode is restored.
        endings: at most `block_size` + 1 tokens each. Batches are sorted by length and padded on the right.
        dtype: dtype of matmuls.
        batch_size: endings per forward pass.

    Returns:
        [N] float64, in nats.

    Raises:
        ValueError: a token id is out of range.
        RuntimeError: a log-likelihood is not finite.
    """
    order = sorted(range(len(endings)), key=lambda number: -len(endings[number].ids))
    sums = np.empty(len(endings), dtype=np.float64)
    with tqdm(total=len(endings), unit="ending", dynamic_ncols=True, disable=None, leave=False) as bar:
        for first in range(0, len(order), batch_size):
            numbers = order[first : first + batch_size]
            longest = len(endings[numbers[0]].ids) - 1
            idx = torch.zeros(len(numbers), longest, dtype=torch.int64)  # [B, T]
            targets = torch.full((len(numbers), longest), IGNORE_INDEX)  # [B, T]
            for row, number in enumerate(numbers):
                ids, n_targets = torch.tensor(endings[number].ids), endings[number].n_targets
                idx[row, : len(ids) - 1] = ids[:-1]
                targets[row, len(ids) - 1 - n_targets : len(ids) - 1] = ids[-n_targets:]
            sums[numbers] = -token_losses(model, idx, targets, dtype).sum(1).numpy()
            bar.update(len(numbers))
    return sums


def score(
    model: GPT,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    dtype: torch.dtype,
    batch_size: int,
    delimiter: str = " ",
) -> ChoiceScore:
    """Compute the accuracy of a model on questions. The first of equally likely endings is the answer.

    Args:
        model: the GPT; its mode is restored.
        tokenizer: the model's.
        questions: at least one.
        dtype: dtype of matmuls.
        batch_size: endings per forward pass.
        delimiter: see `encode`.

    Raises:
        ValueError: `encode` rejects a question; the message has its number.
        RuntimeError: a log-likelihood is not finite.
    """
    encoded: list[EncodedEnding] = []
    for number, question in enumerate(questions, start=1):
        try:
            encoded += [
                encode(tokenizer, question.context, ending, model.config.block_size, delimiter)
                for ending in question.endings
            ]
        except ValueError as error:
            raise ValueError(f"question {number}: {error}") from error
    remaining = log_likelihoods(model, encoded, dtype, batch_size)
    right: dict[str, list[float]] = {name: [] for name in ACCURACIES}
    for question in questions:
        sums, remaining = np.split(remaining, [len(question.endings)])
        lengths = {
            "acc": np.ones(len(sums)),
            "acc_norm": np.array([len(ending) for ending in question.endings]),
            "acc_bytes": np.array([len(ending.encode("utf-8", "surrogatepass")) for ending in question.endings]),
        }
        for name, length in lengths.items():
            right[name].append(float(np.argmax(sums / length) == question.label))
    return ChoiceScore(**{name: metrics.mean(answers) for name, answers in right.items()}, questions=len(questions))
