"""GPT-2 weights in Hugging Face's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gptfast.backend import Request
from gptfast.config import GPTConfig
from gptfast.files import read_json, read_tensors
from gptfast.model import GPT

HUB_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
# settings of GPT-2 that change the arithmetic, with the one value this GPT has
_FIXED = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
# Hugging Face keeps these matrices as [in, out]
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def from_pretrained(model_type: str, override_args: dict[str, float] | None = None, backend: Request = "auto") -> GPT:
    """GPT-2 with the weights of a folder or of the Hugging Face hub.

    Args:
        model_type: a folder with `config.json` and `model.safetensors`, or "gpt2", "gpt2-medium", "gpt2-large" or
            "gpt2-xl", which are downloaded once through the package `huggingface_hub`.
        override_args: "dropout" to train on with another one than none, and "pad_vocab_size_to".
        backend: as for `GPT`.

    Raises:
        ValueError: an unknown name, a file that is missing or does not fit, or a hub that cannot be reached.
    """
    overrides = dict(override_args or {})
    if not set(overrides) <= {"dropout", "pad_vocab_size_to"}:
        raise ValueError(f"override_args accepts dropout and pad_vocab_size_to, got {', '.join(overrides)}")
    if model_type in HUB_NAMES:
        folder = _download(HUB_NAMES[model_type])
    elif Path(model_type).is_dir():
        folder = Path(model_type)
    else:
        raise ValueError(f"no pretrained model {model_type!r}; accepted: {', '.join(HUB_NAMES)}, or a local folder")
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}")
    path = folder / "config.json"
    try:
        config = _config(read_json(path), overrides)
    except KeyError as error:
        raise ValueError(f"{path} is no GPT-2 config: it has no {error.args[0]}") from error
    except TypeError as error:
        raise ValueError(f"{path} is no GPT-2 config: {error}") from error
    model = GPT(config, backend)
    model.load_state_dict(_weights(folder / "model.safetensors", model))
    return model


def _config(theirs: dict[str, Any], overrides: dict[str, float]) -> GPTConfig:
    for name, needed in _FIXED.items():
        if theirs.get(name, needed) != needed:
            raise ValueError(f"GPT-2 config has {name}={theirs[name]!r}, only {needed!r} is supported")
    if theirs.get("n_inner") not in (None, 4 * theirs["n_embd"]):
        raise ValueError(f"GPT-2 config has n_inner={theirs['n_inner']}, only 4 * n_embd is supported")
    activation = theirs.get("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"GPT-2 config has activation {activation!r}; accepted: {', '.join(_ACTIVATIONS)}")
    return GPTConfig(
        block_size=theirs["n_positions"],
        vocab_size=theirs["vocab_size"],
        n_layer=theirs["n_layer"],
        n_head=theirs["n_head"],
        n_embd=theirs["n_embd"],
        activation=_ACTIVATIONS[activation],  # type: ignore[arg-type]
        tie_weights=theirs.get("tie_word_embeddings", True),
        **overrides,  # type: ignore[arg-type]
    )


def _weights(path: Path, model: GPT) -> dict[str, Any]:
    """The tensors of a file under this model's names and in its shapes."""
    theirs = {}
    for name, tensor in read_tensors(path).items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the causal mask, which old files hold as a buffer
        if name.endswith(_TRANSPOSED) and tensor.dim() == 2:
            tensor = tensor.t()
        theirs[name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"] = tensor
    if model.config.tie_weights and "transformer.wte.weight" in theirs:
        theirs["lm_head.weight"] = theirs["transformer.wte.weight"]
    ours = model.state_dict()
    wrong = sorted(set(ours) ^ set(theirs)) or [name for name in ours if ours[name].shape != theirs[name].shape]
    if wrong:
        raise ValueError(f"{path} does not fit its config.json: tensor {wrong[0]} is missing, unknown or misshapen")
    return theirs


def _download(repository: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"downloading {repository} needs the package huggingface_hub; install it, or give a local folder"
        ) from error
    try:
        return Path(snapshot_download(repository, allow_patterns=["config.json", "model.safetensors"]))
    except Exception as error:  # the hub's client raises errors of many libraries
        raise ValueError(
            f"{repository} could not be downloaded ({type(error).__name__}); give a local folder with its files"
        ) from error
