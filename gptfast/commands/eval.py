"""The command `gptfast eval`: how well a model predicts a text, and which endings it chooses."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tqdm import tqdm

from gptfast import devices, load_model, tokenizers
from gptfast.checkpoint.atomic_files import read_json
from gptfast.data import corpus, shards
from gptfast.data.shards import Tokens
from gptfast.evaluation import metrics, multiple_choice, perplexity
from gptfast.evaluation.metrics import Estimate
from gptfast.model import GPT
from gptfast.quantization import quantize
from gptfast.tokenizers import Tokenizer

_ACCURACIES = ("acc", "acc_norm", "acc_bytes")


@dataclass
class EvalConfig:
    """Measure how well a model predicts a text, or chooses between endings."""

    model: tyro.conf.Positional[str]
    """Run folder, folder in Hugging Face's layout, or gpt2, gpt2-medium, gpt2-large or gpt2-xl."""
    data: str | None = None
    """Text to predict: stdlib, shakespeare, chatbot, clinic, sentences, a text file, a folder of such files, or what
    `gptfast prepare` wrote."""
    split: Literal["val", "train"] = "val"
    """Of what `gptfast prepare` wrote."""
    stride: int | None = None
    """Tokens from one window to the next, by default as many as a window has; fewer give each token more before it."""
    choices: str | None = None
    """File of JSON lines with "context" (or "ctx"), "endings" and "label", as HellaSwag's."""
    delimiter: str = " "
    """Put between context and ending where neither has space there."""
    limit: int | None = None
    """Stop after so many windows of the text, and so many questions."""
    batch_size: int = 16
    """Windows or endings that go through the model together."""
    json: bool = False
    """Write a JSON object instead of a table."""
    tokenizer: str = "gpt2"
    """Of a model in Hugging Face's layout that does not bring its own, unlike GPT-2 and what `gptfast export` writes:
    byte, or an encoding of tiktoken."""
    vocabulary: str | None = None
    """Folder with the files of that encoding, for machines without a network."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    backend: str = "auto"
    """auto, triton, cpu, eager (plain PyTorch), or choices by operator such as attention=triton,ffn=eager."""
    dtype: str = "auto"
    """Of products: auto (bfloat16 where the device multiplies in it), float32, float16 or bfloat16, while weights stay
    float32; int8 has weights of 8 bits."""

    def __post_init__(self) -> None:
        if self.data is None and self.choices is None:
            raise ValueError("nothing to measure; give a text with --data or questions with --choices")
        if self.dtype not in (accepted := ("auto", *devices.DTYPES, "int8")):
            raise ValueError(f"unknown dtype {self.dtype!r}; accepted: {', '.join(accepted)}")
        for name in ("stride", "limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Do what the settings say, with progress on standard error where that is a terminal.

    Returns:
        What `--json` writes: of the model, and under "data" and "choices" what was measured.

    Raises:
        ValueError: a setting, model, text or question that is wrong.
        RuntimeError: a model that gives losses that are no numbers.
    """
    device = devices.resolve(config.device)
    dtype = devices.resolve_dtype("auto" if config.dtype == "int8" else config.dtype, device)
    questions = (
        None if config.choices is None else multiple_choice.read(Path(config.choices).expanduser(), config.limit)
    )
    model, tokenizer = load_model.load(config.model, device, config.tokenizer, config.vocabulary)
    model.set_backend(config.backend)
    if config.dtype == "int8":
        model = quantize(model)
    found: dict[str, Any] = {
        "model": config.model,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "weights": "int8" if config.dtype == "int8" else "float32",
        "backend": dict(model.backend),
    }
    if config.data is not None:
        found["data"] = _predict(config, config.data, model, tokenizer, dtype)
    if questions is not None:
        with _bar(sum(len(question.endings) for question in questions), "ending") as bar:
            score = multiple_choice.score(model, tokenizer, questions, dtype, config.batch_size, config.delimiter, bar)
        found["choices"] = {"file": config.choices, "questions": score.questions}
        for name in _ACCURACIES:
            found["choices"] |= _fields(name, getattr(score, name))
    return found


def _predict(config: EvalConfig, source: str, model: GPT, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, Any]:
    block_size = model.config.block_size
    windows = perplexity.Windows(tokens(source, config.split, tokenizer), block_size, config.stride or block_size)
    with _bar(min(len(windows), config.limit or len(windows)), "window") as bar:
        score = perplexity.score(model, tokenizer, windows, dtype, config.batch_size, config.limit, bar)
    return {
        "source": source,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "windows": score.windows,
        "block_size": block_size,
        "stride": windows.stride,
        **_fields("loss", score.loss),
        "perplexity": _finite(score.perplexity),
        **_fields("bits_per_byte", score.bits_per_byte),
    }


def tokens(source: str, split: str, tokenizer: Tokenizer) -> Tokens:
    """The token ids of a text, or of a split of what was prepared.

    Args:
        source: "stdlib", "shakespeare", a text file or folder of such, or a folder with token shards.
        split: "val" or "train", of such a folder.
        tokenizer: of the model.

    Raises:
        ValueError: nothing is there, it is empty, or the tokenizer is another or has no tokens for it.
    """
    folder = Path(source).expanduser()
    if not (folder.is_dir() and shards.is_prepared(folder)):
        return Tokens([tokenizer.encode(corpus.load(source))])
    saved = folder / "tokenizer.json"  # nanoGPT's folders have none
    if saved.is_file() and tokenizers.from_json(read_json(saved)).to_json() != tokenizer.to_json():
        raise ValueError(f"{folder} was prepared with another tokenizer than the model's; prepare the text with it")
    return shards.open_split(folder, split)


@contextmanager
def _bar(total: int, unit: str) -> Iterator[tqdm]:
    with tqdm(total=total, unit=unit, dynamic_ncols=True, disable=None, leave=False) as bar:
        yield bar


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no others


def _fields(name: str, estimate: Estimate | None) -> dict[str, Any]:
    value, stderr, interval = None, None, None
    if estimate is not None:
        value, stderr, interval = estimate.value, estimate.stderr, estimate.interval
    return {name: value, f"{name}_stderr": stderr, f"{name}_interval": interval}


def write(config: EvalConfig) -> None:
    """Print what `evaluate` finds, as JSON or as a table. Arguments and errors are its own."""
    found = evaluate(config)
    print(json.dumps(found, ensure_ascii=False, allow_nan=False) if config.json else table(found))


def table(found: dict[str, Any]) -> str:
    """What `evaluate` returned, for people."""
    backend = " ".join(f"{operator}={choice}" for operator, choice in found["backend"].items())
    if len(set(found["backend"].values())) == 1:
        backend = next(iter(found["backend"].values()))
    weights = ", weights of 8 bits" if found["weights"] == "int8" else ""
    rows = [("model", f"{found['model']}: on {found['device']} in {found['dtype']}{weights}, {backend}")]
    if (data := found.get("data")) is not None:
        size = "" if data["bytes"] is None else f", {data['bytes']:,} bytes"
        rows += [
            ("text", f"{data['source']}: {data['tokens']:,} tokens{size}"),
            ("windows", f"{data['windows']:,} of {data['block_size']} tokens, {data['stride']} from one to the next"),
            ("loss", f"{_shown(data, 'loss')} nats per token"),
            ("perplexity", _perplexity(data)),
            (
                "bits per byte",
                _shown(data, "bits_per_byte") if data["bytes"] else "none: the tokens do not keep the text",
            ),
        ]
    if (chosen := found.get("choices")) is not None:
        rows.append(("choices", f"{chosen['file']}: {chosen['questions']:,} questions"))
        rows += [(name, _shown(chosen, name)) for name in _ACCURACIES]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _shown(fields: dict[str, Any], name: str) -> str:
    value, stderr = fields[name], fields[f"{name}_stderr"]
    return f"{value:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def _perplexity(data: dict[str, Any]) -> str:
    if data["perplexity"] is None:
        return "beyond a float"
    if data["loss_interval"] is None:
        return f"{data['perplexity']:.3f}"
    low, high = map(metrics.perplexity, data["loss_interval"])
    return f"{data['perplexity']:.3f}, with a confidence of 95 % in {low:.3f} to {high:.3f}"
