"""The command `gptfast eval`: perplexity of a text and accuracy on multiple-choice questions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gptfast import devices, load_model
from gptfast.evaluation import metrics, multiple_choice, perplexity
from gptfast.quantization import quantize


@dataclass
class EvalConfig:
    """Measure perplexity and bits per byte of a text, or accuracy on multiple-choice questions."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Run folder, Hugging Face folder, hub repository OWNER/MODEL, or gpt2, gpt2-medium, gpt2-large or gpt2-xl."""
    data: str | None = None
    """Text: stdlib, shakespeare, chatbot, clinic, sentences, a UTF-8 text file or a folder of them, or a folder that
    `gptfast prepare` or nanoGPT wrote."""
    split: Literal["val", "train"] = "val"
    """Split of a folder that `gptfast prepare` or nanoGPT wrote."""
    stride: int | None = None
    """Tokens from one window to the next. By default windows do not overlap; fewer tokens give more context."""
    choices: str | None = None
    """Multiple-choice questions: JSON lines with "context" (or "ctx"), "endings" and "label", as in HellaSwag."""
    delimiter: str = " "
    """Text inserted between context and ending where neither has white space there."""
    limit: int | None = None
    """Stop after this many windows or questions."""
    batch_size: int = 16
    """Windows or endings per forward pass."""
    json: bool = False
    """Print a JSON object instead of a table."""
    tokenizer: str = "gpt2"
    """Tokenizer of a model that has none: byte, or a tiktoken encoding. Runs, exported models and GPT-2 have one."""
    vocabulary: str | None = None
    """Folder with the files of a tiktoken encoding, for machines without a network."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    backend: str = "auto"
    """auto, triton, cpu, eager (plain PyTorch), or choices by operator such as attention=triton,ffn=eager."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    """Dtype of matmuls; weights stay float32. auto is bfloat16 where the device has instructions for it. int8 quantizes
    the weights to 8 bits."""

    def __post_init__(self) -> None:
        if self.data is None and self.choices is None:
            raise ValueError("nothing to measure; give a text with --data or questions with --choices")
        for name in ("stride", "limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def run(config: EvalConfig) -> None:
    """Evaluate a model and print the results, as JSON or as a table."""
    results = evaluate(config)
    print(json.dumps(results, ensure_ascii=False, allow_nan=False) if config.json else table(results))


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Load and score a model, with a progress bar if standard error is a terminal.

    Returns:
        The object that `--json` prints: the model's fields, and "data" and "choices" with the scores.

    Raises:
        ValueError: a wrong setting, model, text or question.
        RuntimeError: a loss is not finite.
    """
    device = devices.resolve(config.device)
    int8 = config.dtype == "int8"
    dtype = devices.resolve_dtype("auto" if int8 else config.dtype, device)
    questions = []
    if config.choices is not None:
        questions = multiple_choice.read(Path(config.choices).expanduser(), config.limit)
    model, tokenizer = load_model.load(config.model, device, config.tokenizer, config.vocabulary)
    model.set_backend(config.backend)
    if int8:
        model = quantize(model)
    results: dict[str, Any] = {
        "model": config.model,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "weights": "int8" if int8 else "float32",
        "backend": dict(model.backend),
    }
    if config.data is not None:
        block_size = model.config.block_size
        tokens = perplexity.load_tokens(config.data, config.split, tokenizer)
        windows = perplexity.Windows(tokens, block_size, config.stride or block_size)
        text = perplexity.score(model, tokenizer, windows, dtype, config.batch_size, config.limit)
        origin = {"source": config.data, "block_size": block_size, "stride": windows.stride}
        results["data"] = origin | text.fields()
    if questions:
        answers = multiple_choice.score(model, tokenizer, questions, dtype, config.batch_size, config.delimiter)
        results["choices"] = {"file": config.choices, **answers.fields()}
    return results


def table(results: dict[str, Any]) -> str:
    """Format the results of `evaluate` as a table."""
    choices = results["backend"]
    if len(set(choices.values())) == 1:
        backend = choices["loss"]
    else:
        backend = " ".join(f"{operator}={choice}" for operator, choice in choices.items())
    weights = ", int8 weights" if results["weights"] == "int8" else ""
    rows = [("model", f"{results['model']}: {results['device']}, {results['dtype']}{weights}, backend {backend}")]
    if (data := results.get("data")) is not None:
        size = "" if data["bytes"] is None else f", {data['bytes']:,} bytes"
        bits = _with_stderr(data, "bits_per_byte") if data["bytes"] else "none: the tokens do not keep the text"
        rows += [
            ("text", f"{data['source']}: {data['tokens']:,} tokens{size}"),
            ("windows", f"{data['windows']:,} of {data['block_size']} tokens, stride {data['stride']}"),
            ("loss", f"{_with_stderr(data, 'loss')} nats per token"),
            ("perplexity", _perplexity(data)),
            ("bits per byte", bits),
        ]
    if (answers := results.get("choices")) is not None:
        rows.append(("choices", f"{answers['file']}: {answers['questions']:,} questions"))
        rows += [(name, _with_stderr(answers, name)) for name in multiple_choice.ACCURACIES]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _with_stderr(fields: dict[str, Any], name: str) -> str:
    value, stderr = fields[name], fields[f"{name}_stderr"]
    return f"{value:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def _perplexity(data: dict[str, Any]) -> str:
    if data["perplexity"] is None:
        return "overflows a float"
    if data["loss_interval"] is None:
        return f"{data['perplexity']:.3f}"
    low, high = map(metrics.perplexity, data["loss_interval"])
    return f"{data['perplexity']:.3f}, 95 % confidence interval {low:.3f} to {high:.3f}"
