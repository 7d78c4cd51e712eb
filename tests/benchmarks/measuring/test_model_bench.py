import dataclasses

import pytest
import torch
from torch import nn

from benchmarks.cost_model import operators
from benchmarks.cost_model.training_step import StepCost
from benchmarks.measuring.bench import UnavailableError, WrongResultError
from benchmarks.measuring.model_bench import (
    GenerationBench,
    ModelCase,
    ModelProvider,
    TrainingBench,
    providers,
    reference_model,
    twin,
)
from gptfast import GPTConfig, TrainStep, flops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LIMITS = {"copy_bytes_per_second": 1e12, "matrix_flops_per_second": {"float32": 1e13, "bfloat16": 1e14}}
CONFIG = GPTConfig(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=16)
TRAINING = ModelCase("training", "tiny", CONFIG, batch=2, length=16)
GENERATION = ModelCase("generation", "tiny", CONFIG, batch=2, length=4, new_tokens=6)
KNOWN = providers(nanogpt=None)


@pytest.fixture(autouse=True)
def _quickly(monkeypatch):
    monkeypatch.setattr("benchmarks.measuring.model_bench.SECONDS", {"cpu": 0.0, "cuda": 0.0})


def test_a_training_row_has_speed_flops_and_roofline():
    bench = TrainingBench(TRAINING, [KNOWN["eager"], KNOWN["Hugging Face"]], DEVICE, LIMITS)
    for name in ("eager", "Hugging Face"):
        times, row = bench.row(name, "step")
        assert len(times.device) >= 5
        speed = 2 * 16 / row["seconds"]["median"]
        assert row["tokens_per_second"] == pytest.approx(speed)
        assert row["flops_per_token"] == row["flops_per_token_thop"] == flops.training_flops_per_token(CONFIG)
        assert row["mfu_causal"] / row["mfu"] == pytest.approx(row["flops_per_token_causal"] / row["flops_per_token"])
        assert row["bytes"] == sum(cost.bytes for cost in StepCost(CONFIG, 2, 16, _itemsize()).by_kind().values())


def test_a_captured_step_shares_weights_but_no_moments_with_a_plain_loop():
    captured = dataclasses.replace(KNOWN["eager"], name="captured", captured=True)
    bench = TrainingBench(TRAINING, [KNOWN["eager"], captured], DEVICE, LIMITS)
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", lambda self, *batch: steps.extend(self.optimizers))
        rows = [bench.row(name, "step")[1] for name in ("eager", "captured")]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert len(steps) > 5
    assert steps[0] is not bench.optimizer
    assert steps[0].param_groups[0]["params"][0] is bench.optimizer.param_groups[0]["params"][0]


def test_a_generation_row_has_speed_latency_and_bytes():
    bench = GenerationBench(GENERATION, [KNOWN["eager"], KNOWN["Hugging Face"]], DEVICE, LIMITS)
    for name in ("eager", "Hugging Face"):
        _, row = bench.row(name, "generate")
        whole = row["seconds"]["median"]
        assert row["tokens_per_second"] == pytest.approx(2 * 6 / whole)
        assert row["seconds_to_first_token"] + 5 * row["seconds_per_token"] == pytest.approx(whole)
        assert row["bytes_per_token"] == operators.decode_bytes(CONFIG, 2, 4 + 3, _itemsize())


def _itemsize() -> int:
    return 2 if DEVICE.type == "cuda" else 4


@pytest.mark.parametrize("padded", [1, 16])
def test_a_twin_shares_every_parameter_and_nothing_else(padded: int):
    reference = reference_model(dataclasses.replace(CONFIG, pad_vocab_size_to=padded), DEVICE, torch.float32)
    other = twin(reference, "eager")
    ours, theirs = dict(reference.named_parameters()), dict(other.named_parameters())
    assert list(ours) == list(theirs)
    assert all(ours[name] is theirs[name] for name in ours)
    assert other.transformer.wte.weight is other.lm_head.weight
    other.set_backend({"attention": "eager"})
    assert other.backend is not reference.backend


def wrong(change) -> ModelProvider:
    """A provider that changes its model after it got the weights."""

    def build(reference):
        model = twin(reference, "eager")
        change(model)
        return model

    return ModelProvider("wrong", build)


def forget_the_mask(model) -> None:
    def attention(qkv, **_):
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    model.transformer.h[0].attn.backend = type("Broken", (), {"causal_attention_qkvpacked": staticmethod(attention)})()


def drop_a_gradient(model) -> None:
    """The loss and all other gradients are right."""
    weight = model.transformer.h[0].mlp.c_proj.weight
    model.transformer.h[0].mlp.c_proj.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)


@pytest.mark.parametrize(
    ("bench", "case", "mode", "change", "what"),
    [
        (TrainingBench, TRAINING, "step", drop_a_gradient, "the loss or the norm of its gradient"),
        (GenerationBench, GENERATION, "generate", forget_the_mask, "the prompt's logits"),
    ],
)
def test_a_wrong_model_has_no_speed(bench, case, mode, change, what):
    large = dataclasses.replace(CONFIG, init_std=0.2)  # with errors that exceed the tolerance of bfloat16
    built = bench(dataclasses.replace(case, config=large), [wrong(change), KNOWN["eager"]], DEVICE, LIMITS)
    with pytest.raises(WrongResultError, match=what):
        built.row("wrong", mode)
    assert built.row("eager", mode)[1]["provider"] == "eager"


def test_generation_that_ends_early_has_no_speed():
    lazy = dataclasses.replace(
        KNOWN["eager"], name="lazy", generate=lambda model, idx, count: model.generate(idx, min(count, 3))
    )
    bench = GenerationBench(GENERATION, [lazy], DEVICE, LIMITS)
    with pytest.raises(WrongResultError, match=r"lazy .* 3 .* 6"):
        bench.row("lazy", "generate")


def test_a_peer_that_cannot_be_built_is_unavailable():
    config = dataclasses.replace(CONFIG, bias=False)
    case = dataclasses.replace(TRAINING, config=config)
    bench = TrainingBench(case, [KNOWN["Hugging Face"], KNOWN["eager"]], DEVICE, LIMITS)
    with pytest.raises(UnavailableError, match="biases"):
        bench.row("Hugging Face", "step")
    assert bench.row("eager", "step")[1]["case"] == "tiny B=2 T=16"


@pytest.mark.skipif(DEVICE.type == "cuda", reason="tests a machine without a GPU")
def test_triton_without_a_gpu_is_unavailable():
    bench = TrainingBench(TRAINING, [KNOWN["triton"]], DEVICE, LIMITS)
    with pytest.raises(UnavailableError, match="CUDA GPU"):
        bench.row("triton", "step")
