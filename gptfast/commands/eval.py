"""The command `gptfast eval`: score a model on a text and on multiple-choice questions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from gptfast import devices, load_model
from gptfast.evaluation import metrics, multiple_choice, perplexity
from gptfast.quantization import quantize


@dataclass
class EvalConfig:
    """Measure perplexity and bits per byte of a text, or accuracy on multiple-choice questions."""

    model: tyro.conf.Positional[str]
    """Run folder, folder in Hugging Face's layout, or gpt2, gpt2-medium, gpt2-large or gpt2-xl."""
    data: str | None = None
    """Text: stdlib, shakespeare, chatbot, clinic, sentences, a text file, a folder of text files, or a folder that
    `gptfast prepare` wrote."""
    split: Literal["val", "train"] = "val"
    """Split of a folder that `gptfast prepare` wrote."""
    stride: int | None = None
    """Tokens from one window to the next. The default is a window's length; fewer give each token more context."""
    choices: str | None = None
    """File of JSON lines with "context" (or "ctx"), "endings" and "label", as HellaSwag's."""
    delimiter: str = " "
    """Text inserted between context and ending where neither has white space there."""
    limit: int | None = None
    """Number of windows and of questions to stop after."""
    batch_size: int = 16
    """Windows or endings per forward pass."""
    json: bool = False
    """Print a JSON object instead of a table."""
    tokenizer: str = "gpt2"
    """Tokenizer of a model in Hugging Face's layout without one: byte, or an encoding of tiktoken. GPT-2 and models
    from `gptfast export` have one."""
    vocabulary: str | None = None
    """Folder with the files of that encoding, for machines without a network."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    backend: str = "auto"
    """auto, triton, cpu, eager (plain PyTorch), or choices by operator such as attention=triton,ffn=eager."""
    dtype: str = "auto"
    """Dtype of matmuls: auto (bfloat16 where the device has instructions for it), float32, float16 or bfloat16; weights
    stay float32. int8 quantizes the weights to 8 bits."""

    def __post_init__(self) -> None:
        if self.data is None and self.choices is None:
            raise ValueError("nothing to measure; give a text with --data or questions with --choices")
        if self.dtype not in (accepted := ("auto", *devices.DTYPES, "int8")):
            raise ValueError(f"unknown dtype {self.dtype!r}; accepted: {', '.join(accepted)}")
        for name in ("stride", "limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def run(config: EvalConfig) -> None:
    """Evaluate a model and print the results, as JSON or as a table. Errors are those of `evaluate`."""
    results = evaluate(config)
    print(json.dumps(results, ensure_ascii=False, allow_nan=False) if config.json else table(results))


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Load and score a model, with a progress bar on standard error if that is a terminal.

    Returns:
        The object that `--json` prints: the model's fields, and "data" and "choices" with the scores.

    Raises:
        ValueError: a setting, model, text or question that is wrong.
        RuntimeError: losses that are not finite.
    """
    device = devices.resolve(config.device)
    int8 = config.dtype == "int8"
    dtype = devices.resolve_dtype("auto" if int8 else config.dtype, device)
    file = None if config.choices is None else Path(config.choices).expanduser()
    questions = None if file is None else multiple_choice.read(file, config.limit)
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
        text = perplexity.score(model, tokenizer, windows, dtype, config.batch_size, config.limit, progress=True)
        place = {"source": config.data, "block_size": block_size, "stride": windows.stride}
        results["data"] = place | text.fields()
    if questions is not None:
        answers = multiple_choice.score(
            model, tokenizer, questions, dtype, config.batch_size, config.delimiter, progress=True
        )
        results["choices"] = {"file": config.choices, **answers.fields()}
    return results


def table(results: dict[str, Any]) -> str:
    """Format the results of `evaluate` as a table."""
    backend = " ".join(f"{operator}={choice}" for operator, choice in results["backend"].items())
    if len(choices := set(results["backend"].values())) == 1:
        (backend,) = choices
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
    if (chosen := results.get("choices")) is not None:
        rows.append(("choices", f"{chosen['file']}: {chosen['questions']:,} questions"))
        rows += [(name, _with_stderr(chosen, name)) for name in multiple_choice.ACCURACIES]
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
