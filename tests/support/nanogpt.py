"""Stand-ins for nanoGPT: a train.py, a text to train on, checkpoints, and its forward pass."""

import math
from collections import OrderedDict, defaultdict
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

TEXT = "To be, or not to be: that is the question.\n" * 200
# a train.py that takes the settings and prints what the real one would
TRAIN = """\
import os, sys
settings = dict(word[2:].split("=") for word in sys.argv[2:])
print("tokens per iteration will be: 768")
print("found vocab_size = 18 (inside data/shakespeare_char/meta.pkl)")
for number in range(int(settings["max_iters"]) + 1):
    if number % int(settings["eval_interval"]) == 0:
        print(f"step {number}: train loss 2.0000, val loss {3 - number / 1000:.4f}")
    print(f"iter {number}: loss 2.5000, time 10.00ms, mfu -100.00%")
open("threads", "w").write(str(os.environ.get("OMP_NUM_THREADS")))
"""

# model settings in a checkpoint of train.py
MODEL_ARGS = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "bias": True, "vocab_size": 19, "dropout": 0.1}


def shapes(
    n_layer: int, n_embd: int, block_size: int, bias: bool, vocab_size: int, **_: object
) -> dict[str, list[int]]:
    """Names and shapes of the model's tensors, in order."""
    found = {"transformer.wte.weight": [vocab_size, n_embd], "transformer.wpe.weight": [block_size, n_embd]}
    inside = {
        "ln_1": [n_embd],
        "attn.c_attn": [3 * n_embd, n_embd],
        "attn.c_proj": [n_embd, n_embd],
        "ln_2": [n_embd],
        "mlp.c_fc": [4 * n_embd, n_embd],
        "mlp.c_proj": [n_embd, 4 * n_embd],
    }
    places = {f"transformer.h.{i}.{name}": shape for i in range(n_layer) for name, shape in inside.items()}
    for name, shape in (places | {"transformer.ln_f": [n_embd]}).items():
        found[f"{name}.weight"] = shape
        if bias:
            found[f"{name}.bias"] = shape[:1]
    return found | {"lm_head.weight": [vocab_size, n_embd]}


def checkpoint(gelu: bool = True, compiled: bool = False, **changes: object) -> dict:
    """Checkpoint as train.py saves it, with random weights.

    Args:
        gelu: the MLP has a module of exact GELU; older versions compute the tanh approximation inline.
        compiled: torch.compile wrapped the model.
        changes: changes of `MODEL_ARGS`.
    """
    arguments = MODEL_ARGS | changes
    torch.manual_seed(0)
    state = OrderedDict((name, 0.3 * torch.randn(shape)) for name, shape in shapes(**arguments).items())
    state["lm_head.weight"] = state["transformer.wte.weight"]
    modules = ["", "transformer", "lm_head"]
    for i in range(arguments["n_layer"]):
        names = ["attn.attn_dropout", "attn.resid_dropout", "mlp", *(["mlp.gelu"] if gelu else [])]
        modules += [f"transformer.h.{i}.{name}" for name in names]
    prefix = "_orig_mod." if compiled else ""
    named = OrderedDict((prefix + name, tensor) for name, tensor in state.items())
    named._metadata = {(prefix + name).rstrip("."): {"version": 1} for name in modules} | {"": {"version": 1}}
    return {
        "model": named,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "model_args": arguments,
        "iter_num": 3,
        "best_val_loss": torch.tensor(2.5),
        "config": {"out_dir": "out", "dataset": "shakespeare_char", "compile": compiled},
    }


def logits(state: Mapping[str, Tensor], n_layer: int, n_head: int, idx: Tensor, gelu: str = "none") -> Tensor:
    """nanoGPT's forward pass without dropout, written from its definition: [B, T] -> [B, T, V].

    Args:
        state: tensors by name.
        n_layer: number of blocks.
        n_head: number of heads.
        idx: [B, T] int64.
        gelu: "none" (exact) or "tanh", as in PyTorch.
    """
    state = defaultdict(lambda: None, state)

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    B, T = idx.shape
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    x = state["transformer.wte.weight"][idx] + state["transformer.wpe.weight"][:T]
    for i in range(n_layer):
        block = f"transformer.h.{i}"
        qkv = linear(f"{block}.attn.c_attn", norm(f"{block}.ln_1", x)).chunk(3, dim=-1)
        q, k, v = (part.view(B, T, n_head, -1).transpose(1, 2) for part in qkv)  # [B, H, T, D] each
        scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).masked_fill(~causal, -math.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1)
        x = x + linear(f"{block}.attn.c_proj", y)
        y = F.gelu(linear(f"{block}.mlp.c_fc", norm(f"{block}.ln_2", x)), approximate=gelu)
        x = x + linear(f"{block}.mlp.c_proj", y)
    return linear("lm_head", norm("transformer.ln_f", x))
