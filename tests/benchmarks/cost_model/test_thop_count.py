import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cost_model import thop_count
from gptfast import GPT, GPTConfig, flops
from gptfast.config import PRESETS
from gptfast.training.recipes import GPT_CONFIG_124M

BATCH, LENGTH = 2, 64


def on_meta(config: GPTConfig, backend: str) -> GPT:
    with torch.device("meta"):
        return GPT(config, backend=backend)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("name", PRESETS)
def test_three_counts_agree_exactly(name, backend):
    """thop, PyTorch's counter and the closed form agree on the forward, the latter two on the backward."""
    model = on_meta(GPTConfig.preset(name), backend)
    config = model.config
    expected = BATCH * LENGTH * flops.forward_flops_per_token(config, LENGTH)
    assert thop_count.count(model, BATCH, LENGTH) == expected

    idx = torch.zeros(BATCH, LENGTH, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as forward:
        _, loss = model(idx, idx)
    # the Triton loss computes both gradients of the head with the logits
    early = 4 * BATCH * LENGTH * config.n_embd * config.vocab_size if backend == "triton" else 0
    assert forward.get_total_flops() == expected + early
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    # the Triton backward recomputes the scores, which the model's count leaves out by definition
    scores = config.n_layer * 2 * BATCH * LENGTH * LENGTH * config.n_embd
    recomputed = scores if backend == "triton" else 0
    trained = BATCH * LENGTH * flops.training_flops_per_token(config, LENGTH)
    assert forward.get_total_flops() + backward.get_total_flops() - recomputed == trained


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": False},
        {"norm_position": "post", "activation": "relu"},
        {"position": "sinusoidal", "tie_weights": False},
    ],
    ids=str,
)
def test_other_shapes_agree(changes):
    config = GPTConfig(block_size=32, vocab_size=101, n_layer=3, n_head=2, n_embd=32, **changes)
    expected = BATCH * 32 * flops.forward_flops_per_token(config)
    assert thop_count.count(on_meta(config, "eager"), BATCH, 32) == expected


def test_counting_leaves_the_model_unchanged():
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=4)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    thop_count.count(model, 1, 8)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) and after[name].device.type == "cpu" for name in before)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert next(model.parameters()).requires_grad


def test_a_length_beyond_the_block_size_is_rejected():
    with pytest.raises(ValueError, match="block_size=8"):
        thop_count.count(GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=4)), 1, 9)


class Linears(torch.nn.Module):
    """The linear layers of the book's GPT of 124M, which are all that thop sees of it."""

    def __init__(self) -> None:
        super().__init__()
        widths = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
        self.layers = torch.nn.ModuleList(torch.nn.Linear(*width) for _ in range(12) for width in widths)
        self.out_head = torch.nn.Linear(768, 50257, bias=False)

    def forward(self, x: torch.Tensor) -> None:
        for layer in (*self.layers, self.out_head):
            layer(x[..., :1].expand(*x.shape[:-1], layer.in_features))


def test_thop_without_rules_counts_the_linear_layers_of_the_books_model():
    """The book prints 6.5e+13 "FLOPS" for 256 sequences: the forward's FLOPs without scores and values."""
    from thop import profile

    config, tokens = GPTConfig.from_dict(GPT_CONFIG_124M), 256 * 1024
    with torch.device("meta"):
        linears, x = Linears(), torch.zeros(256, 1024, 1)
    products, _ = profile(linears, (x,), verbose=False)
    assert f"{2 * products:.1e}" == "6.5e+13"
    counted = thop_count.count(on_meta(config, "eager"), 256, 1024)
    assert counted == tokens * flops.forward_flops_per_token(config)
    assert counted - 2 * products == tokens * 4 * config.n_layer * config.n_embd * 1024
    assert f"{counted:.2e}" == "7.47e+13"
    assert f"{tokens * flops.training_flops_per_token(config):.2e}" == "2.24e+14"
    # 24 x 1,024 tokens in 0.393 s on an A100, as in docs/recipes.md
    speed = 24 * 1024 / 0.393
    assert f"{flops.utilisation(speed, flops.roofline_tokens_per_second(config, peak=312e12)):.0%}" == "17%"
    linears_alone = 3 * 2 * products / tokens
    assert f"{flops.utilisation(speed, 78e12 / linears_alone):.0%}" == "59%"
