"""Train a GPT on the bytes of a text in a plain PyTorch loop, and save it in Hugging Face's layout.

    python examples/train.py                                   # Python's standard library, a minute on a CPU
    python examples/train.py --data book.txt --n_layer 6 --n_head 6 --n_embd 384 --block_size 256 --batch_size 64

Each entry of SETTINGS is an option.
"""

import argparse
import math
import sysconfig
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from gptfast import GPT, GPTConfig

SETTINGS = {
    "data": "",  # text file; empty for the standard library's modules
    "out": "",  # new folder for the model; empty to save nothing
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "block_size": 64,
    "dropout": 0.0,
    "backend": "auto",  # triton, cpu, eager, or auto: triton on GPUs where it can run, cpu on CPUs
    "device": "cuda" if torch.cuda.is_available() else "cpu",
    "compile": 0,  # 1 for torch.compile
    "steps": 1000,
    "batch_size": 12,
    "accumulation": 1,  # micro-batches per step
    "learning_rate": 1e-3,
    "warmup": 100,
    "weight_decay": 0.1,
    "grad_clip": 1.0,
    "eval_interval": 250,
    "seed": 1337,
}


def main() -> None:
    """Train a model, sample from it and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in SETTINGS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    s = parser.parse_args()
    if s.out and Path(s.out).exists():
        parser.error(f"{s.out} exists already; give a new folder with --out")
    files = [Path(s.data)] if s.data else sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    if not all(file.is_file() for file in files):
        parser.error(f"no such text file: {s.data}")
    tokens = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()
    train, held_out = tokens.tensor_split([int(0.9 * len(tokens))])
    if len(held_out) <= s.block_size:
        parser.error(f"the text is too short: a tenth of its {len(tokens)} bytes must be above {s.block_size}")
    if s.accumulation < 1 or s.batch_size % s.accumulation:
        parser.error(f"--batch_size must be a multiple of --accumulation {s.accumulation}, got {s.batch_size}")

    torch.manual_seed(s.seed)
    shape = {name: getattr(s, name) for name in ("block_size", "n_layer", "n_head", "n_embd", "dropout")}
    model = GPT(GPTConfig(vocab_size=256, **shape), backend=s.backend).to(s.device)
    device_type = torch.device(s.device).type
    optimizer = model.configure_optimizers(s.weight_decay, s.learning_rate, (0.9, 0.99), device_type)
    forward = torch.compile(model) if s.compile else model
    autocast = torch.autocast("cuda", dtype=torch.bfloat16) if device_type == "cuda" else nullcontext()

    def batch(data: Tensor) -> tuple[Tensor, Tensor]:
        """Draw random sequences and their next bytes, each [B, T]."""
        starts = torch.randint(len(data) - s.block_size, (s.batch_size // s.accumulation, 1))
        windows = data[starts + torch.arange(s.block_size + 1)].to(s.device)  # [B, T + 1]
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    @torch.no_grad()
    def evaluate() -> float:
        """Compute the mean loss over 20 held-out batches."""
        model.eval()
        with autocast:
            losses = [model(*batch(held_out))[1].item() for _ in range(20)]
        model.train()
        return sum(losses) / len(losses)

    def learning_rate(step: int) -> float:
        """Schedule: linear warm-up, then cosine decay to a tenth."""
        if step < s.warmup:
            return s.learning_rate * (step + 1) / s.warmup
        done = (step - s.warmup) / max(1, s.steps - s.warmup)
        return s.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))

    print(f"{model.get_num_params():,} parameters, {len(train):,} training bytes, {dict(model.backend)}")
    started = time.perf_counter()
    for step in range(s.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        for _ in range(s.accumulation):
            with autocast:
                loss = forward(*batch(train))[1] / s.accumulation
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % s.eval_interval == 0 or step + 1 == s.steps:
            speed = (step + 1) * s.batch_size * s.block_size / (time.perf_counter() - started)
            print(f"step {step + 1}: validation loss {evaluate():.4f}, {speed:,.0f} tokens/s")

    prompt = held_out[None, : s.block_size // 2].to(s.device)  # [1, T]
    print(bytes(model.generate(prompt, 200, temperature=0.8, top_k=50)[0].tolist()).decode(errors="replace"))
    if s.out:
        model.save_pretrained(s.out)
        print(f"saved; load it with GPT.from_pretrained({s.out!r}) or transformers' AutoModelForCausalLM")


if __name__ == "__main__":
    main()
