"""Multiple choice: which of several endings of a text a model finds likeliest.

HellaSwag (Zellers et al. 2019, arXiv:1905.07830) as EleutherAI's lm-evaluation-harness measures it, whose rules these
are, and whose names the measures have: `TemplateLM._encode_pair` and `loglikelihood` in lm_eval/api/model.py,
`_loglikelihood_tokens` in lm_eval/models/huggingface.py and `process_results` in lm_eval/api/task.py.
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
from gptfast.evaluation.token_losses import losses
from gptfast.model import GPT
from gptfast.tokenizers import Tokenizer


@dataclass(frozen=True)
class Question:
    """A text, and endings of which one is right.

    Args:
        context: the text.
        endings: at least two.
        label: which of them is right, from 0.
    """

    context: str
    endings: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Row:
    """What the model reads of a question and one ending.

    Args:
        ids: of the context and the ending.
        asked: how many at the end are the ending's.
    """

    ids: list[int]
    asked: int


@dataclass(frozen=True)
class ChoiceScore:
    """Shares of right answers.

    Args:
        acc: of answers by the ending's log-likelihood.
        acc_norm: by that over the ending's characters.
        acc_bytes: by that over the ending's bytes of UTF-8; in English text nearly the same.
        questions: how many there were.
    """

    acc: Estimate
    acc_norm: Estimate
    acc_bytes: Estimate
    questions: int


def read(path: Path, limit: int | None = None) -> list[Question]:
    """The questions in a file of JSON lines, as HellaSwag's.

    Args:
        path: of a file whose lines are objects with "context" (or "ctx"), "endings" and "label"; others of their fields
            are not read, and empty lines are none.
        limit: the first so many; all if None.

    Raises:
        ValueError: no such file, no questions, or a line that is none; the message has its number.
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
        raise ValueError(f"{path} has no questions; a line of JSON for each is needed")
    return questions


def _question(line: bytes) -> Question:
    try:
        entry = json.loads(line)
    except ValueError as error:  # also of bytes that are no UTF-8
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(entry, dict):
        raise ValueError(f"a JSON object is needed, got {type(entry).__name__}")
    context = entry.get("context", entry.get("ctx"))
    if not isinstance(context, str):
        raise ValueError(f"no text in the field 'context' or 'ctx'; there is: {', '.join(entry)}")
    endings = entry.get("endings")
    if not isinstance(endings, list) or len(endings) < 2 or not all(isinstance(e, str) and e for e in endings):
        raise ValueError(f"'endings' must be at least two texts that are not empty, got {_shown(endings)}")
    label = entry.get("label")
    # the hub's copy of HellaSwag has them as text
    number = int(label) if isinstance(label, str) and label.isdecimal() else label
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(endings):
        raise ValueError(f"'label' must be a number from 0 to {len(endings) - 1}, got {_shown(label)}")
    return Question(context, tuple(endings), number)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."


def encode(tokenizer: Tokenizer, context: str, ending: str, block_size: int, delimiter: str = " ") -> Row:
    """The tokens of a context and an ending, cut to what a window holds.

    Text is tokenized as a whole, and the ending's tokens are those beyond the number that the context has by itself.
    Space at the end of the context goes with the ending, which is where byte-pair tokens have it. An empty context is
    the end of a document before. Of what is longer than `block_size` + 1 tokens, of which the last is predicted and not
    read, the last ones stay.

    Args:
        tokenizer: of the model.
        context: what comes before.
        ending: of it.
        block_size: of the model.
        delimiter: put between them where neither has space there.

    Raises:
        ValueError: text that the tokenizer has no tokens for, an ending without tokens of its own, or an empty context
            where the tokenizer has no end of text.
    """
    kept = context.rstrip()
    space = context[len(kept) :] or ("" if ending[:1].isspace() else delimiter)
    if kept:
        before = tokenizer.encode(kept).tolist()
        after = tokenizer.encode(kept + space + ending).tolist()[len(before) :]
    elif tokenizer.end_of_text is None:
        raise ValueError("the context is empty, and the tokenizer has no end of text that would stand in its place")
    else:
        before, after = [tokenizer.end_of_text], tokenizer.encode(space + ending).tolist()
    if not before or not after:
        raise ValueError(f"the ending {ending[:40]!r} has no tokens of its own after {context[-40:]!r}")
    return Row((before + after)[-block_size - 1 :], min(len(after), block_size))


def log_likelihoods(
    model: GPT, rows: Sequence[Row], dtype: torch.dtype, batch_size: int, bar: tqdm | None = None
) -> np.ndarray:
    """What the model gives the ending of each row, [N] float64 in nats: the sum of its tokens' log-probabilities.

    Args:
        model: left in the mode it was in.
        rows: of at most `block_size` + 1 tokens; they go through padded on the right, the longest first.
        dtype: of matrix products.
        batch_size: rows of a batch.
        bar: of progress, which is moved on by each row.

    Raises:
        ValueError: a token id out of range.
        RuntimeError: a probability that is no number.
    """
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number].ids))
    found = np.empty(len(rows), dtype=np.float64)
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        longest = len(rows[numbers[0]].ids) - 1
        idx = torch.zeros(len(numbers), longest, dtype=torch.int64)  # [B, T]
        targets = torch.full((len(numbers), longest), IGNORE_INDEX)  # [B, T]
        for place, number in enumerate(numbers):
            ids, asked = torch.tensor(rows[number].ids), rows[number].asked
            idx[place, : len(ids) - 1] = ids[:-1]
            targets[place, len(ids) - 1 - asked : len(ids) - 1] = ids[-asked:]
        found[numbers] = -losses(model, idx, targets, dtype).sum(1).numpy()
        if bar is not None:
            bar.update(len(numbers))
    return found


def score(
    model: GPT,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    dtype: torch.dtype,
    batch_size: int,
    delimiter: str = " ",
    bar: tqdm | None = None,
) -> ChoiceScore:
    """How many questions the model answers rightly.

    Args:
        model: left in the mode it was in.
        tokenizer: of the model.
        questions: at least one.
        dtype: of matrix products.
        batch_size: endings that go through the model together.
        delimiter: put between context and ending where neither has space there.
        bar: of progress, which is moved on by each ending.

    Raises:
        ValueError: a question that the tokenizer has no tokens for; the message says which.
        RuntimeError: a probability that is no number.
    """
    rows: list[Row] = []
    for number, question in enumerate(questions, start=1):
        try:
            rows += [
                encode(tokenizer, question.context, ending, model.config.block_size, delimiter)
                for ending in question.endings
            ]
        except ValueError as error:
            raise ValueError(f"question {number}: {error}") from error
    found = log_likelihoods(model, rows, dtype, batch_size, bar)
    right: dict[str, list[float]] = {"acc": [], "acc_norm": [], "acc_bytes": []}
    for question in questions:
        sums, found = found[: len(question.endings)], found[len(question.endings) :]
        sizes = {
            "acc": np.ones(len(sums)),
            "acc_norm": np.array([len(ending) for ending in question.endings]),
            "acc_bytes": np.array([len(ending.encode("utf-8", "surrogatepass")) for ending in question.endings]),
        }
        for name, size in sizes.items():
            right[name].append(float(np.argmax(sums / size) == question.label))
    return ChoiceScore(**{name: metrics.mean(one) for name, one in right.items()}, questions=len(questions))
