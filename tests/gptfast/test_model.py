import copy
import math

import pytest
import torch

from gptfast import GPT, GPTConfig, flops, hardware
from gptfast.model import sinusoids
from tests.support.oracle import DEVICE, assert_equal_to_oracle

SMALL = {"block_size": 16, "vocab_size": 31, "n_layer": 2, "n_head": 2, "n_embd": 32}

VARIANTS = {
    "gpt2": {},
    "no bias": {"bias": False, "activation": "gelu"},
    "untied, no qkv bias": {"tie_weights": False, "qkv_bias": False},
    "first transformer": {"norm_position": "post", "position": "sinusoidal", "activation": "relu"},
    "no positions": {"position": "none", "n_head": 1},
    "padded vocabulary": {"pad_vocab_size_to": 16},
}


def build(backend="eager", seed=0, **settings) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(**SMALL | settings), backend=backend).to(DEVICE)


def tokens(*shape: int, vocab_size: int = 31, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize(
    ("settings", "count"),
    [({}, 124_439_808), ({"qkv_bias": False}, 124_412_160), ({"tie_weights": False, "qkv_bias": False}, 163_009_536)],
)
def test_get_num_params_of_gpt2(settings, count):
    with torch.device("meta"):
        model = GPT(GPTConfig.preset("gpt2", **settings), backend="eager")
    assert model.get_num_params(non_embedding=False) == count
    assert model.get_num_params() == count - 1024 * 768


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_model_of_triton_equals_eager(settings):
    """Logits, loss and every gradient, within the operators' error bound."""
    idx, targets = tokens(2, 16), tokens(2, 16, seed=1)

    def run(backend: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model = build(backend, **settings).to(dtype)
        model(idx, targets)[1].backward()
        logits, loss = model.eval()(idx, targets)  # the Triton loss returns no logits in training
        return {"logits": logits.detach(), "loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()}

    ours, theirs, exact = run("triton", torch.float32), run("eager", torch.float32), run("eager", torch.float64)
    assert set(ours) == set(exact)
    for name in exact:
        assert_equal_to_oracle(name, ours[name], theirs[name], exact[name])


def test_dropout_of_triton_acts_in_training_only():
    model = build("triton", dropout=0.5)
    idx = tokens(1, 16)
    model.train()
    torch.manual_seed(1)
    first, second = model(idx)[0], model(idx)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(model(idx)[0], first)
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_forward_compiles_to_one_graph(backend: str):
    model = build(backend)
    idx, targets = tokens(2, 16), tokens(2, 16, seed=1)
    logits, loss = model(idx, targets)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled_logits, compiled_loss = compiled(idx, targets)
    compiled_loss.backward()
    assert (logits is None) == (compiled_logits is None) == (backend == "triton")
    if logits is not None:
        torch.testing.assert_close(compiled_logits, logits)
    torch.testing.assert_close(compiled_loss, loss)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_logits_do_not_depend_on_later_tokens(settings, backend):
    """Changing token t leaves the logits before t bitwise alone, and changes those from t on."""
    model = build(backend, **settings).eval()
    idx = tokens(1, 16)
    before = model(idx, idx)[0]
    changed = idx.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 31
    after = model(changed, changed)[0]
    assert torch.equal(after[:, :9], before[:, :9])
    assert (after[:, 9:] != before[:, 9:]).any(dim=-1).all()


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_training_overfits_one_batch(settings):
    model = build(**settings)
    idx, targets = tokens(2, 16), tokens(2, 16, seed=1)
    optimizer = model.configure_optimizers(0.0, 3e-3, (0.9, 0.99), DEVICE.type)
    for _ in range(150):
        _, loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_initial_loss_is_log_vocab_size():
    model = build(vocab_size=500, n_embd=64)
    idx = tokens(8, 16, vocab_size=500)
    _, loss = model(idx, tokens(8, 16, vocab_size=500, seed=1))
    assert abs(loss.item() - math.log(500)) < 0.1


def test_init_weights_are_gpt2s():
    model = build(n_embd=256, n_layer=8, vocab_size=1000)
    state = model.state_dict()
    assert state["transformer.wte.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert state["transformer.h.3.mlp.c_fc.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    for name in ("attn.c_proj.weight", "mlp.c_proj.weight"):
        assert state[f"transformer.h.3.{name}"].std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert not state["transformer.h.3.attn.c_attn.bias"].any()
    assert build(init_std=0.1).transformer.wte.weight.std().item() == pytest.approx(0.1, rel=0.1)


def test_tied_weights_survive_copies_and_loading():
    model = copy.deepcopy(build()).to(torch.float64)
    model.load_state_dict(build(seed=1).state_dict())
    assert model.lm_head.weight is model.transformer.wte.weight
    untied = build(tie_weights=False)
    assert untied.lm_head.weight is not untied.transformer.wte.weight


def test_forward_without_targets_returns_the_last_position():
    model, idx = build(), tokens(2, 10)
    logits, loss = model(idx)
    assert loss is None
    assert logits.shape == (2, 1, 31)
    assert model(idx[:0])[0].shape == (0, 1, 31)
    torch.testing.assert_close(logits, model(idx, idx)[0][:, -1:])


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("ignored", [-1, -100])
def test_loss_leaves_out_negative_targets(ignored: int, backend: str):
    model = build(backend).eval()
    idx, targets = tokens(1, 10), tokens(1, 10, seed=1)
    logits, _ = model(idx, targets)
    targets[0, 4:] = ignored
    _, loss = model(idx, targets)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[0, :4], targets[0, :4]))


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_vocab_padding_changes_no_result_and_no_file(backend: str, tied: bool):
    """31 tokens, 48 rows: the same files, logits, loss, samples and counts, and zeros that stay zeros."""
    plain, padded = build(backend, tie_weights=tied), build(backend, tie_weights=tied, pad_vocab_size_to=16)
    assert padded.transformer.wte.weight.shape == padded.lm_head.weight.shape == (32, 32)
    assert not padded.lm_head.weight[31:].any()
    assert not padded.transformer.wte.weight[31:].any()
    padded.load_state_dict(plain.state_dict())
    idx = tokens(2, 10)
    for model in (plain, padded):
        optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.99), DEVICE.type)
        for _ in range(3):
            model(idx, idx)[1].backward()
            optimizer.step()
        model.eval()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(padded.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    for weight in (padded.transformer.wte.weight, padded.lm_head.weight):
        assert not weight[31:].any()
    torch.testing.assert_close(padded(idx, idx), plain(idx, idx), rtol=1e-4, atol=1e-4)
    assert padded(idx)[0].shape == (2, 1, 31)
    assert padded.get_num_params() == plain.get_num_params()
    assert padded.state_dict()["lm_head.weight"].shape == (31, 32)
    around = torch.nn.ModuleDict({"inner": padded})
    assert around.state_dict()["inner.lm_head.weight"].shape == (31, 32)
    around.load_state_dict(around.state_dict())
    with pytest.raises(ValueError, match="token id 31 is out of range; accepted: 0 to 30"):
        padded.cpu()(torch.full((1, 2), 31))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_activation_checkpointing_changes_memory_only(backend: str, dropout: float):
    """Equal bits, dropout included; a block keeps only its inputs."""
    idx, targets = tokens(2, 16), tokens(2, 16, seed=1)

    def run(enabled: bool) -> tuple[dict[str, torch.Tensor], int]:
        model, kept = build(backend, dropout=dropout), []
        model.set_activation_checkpointing(enabled)
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            _, loss = model(idx, targets)
        loss.backward()
        return {n: p.grad for n, p in model.named_parameters()} | {"loss": loss.detach()}, sum(kept)

    (expected, all_kept), (actual, kept) = run(False), run(True)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    assert kept < all_kept / 3


def test_sinusoids_are_the_papers():
    table = sinusoids(torch.arange(7), 6, torch.float64)
    for t in range(7):
        for i in range(3):
            angle = t / 10000 ** (2 * i / 6)
            assert table[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "none"])
def test_transformer_adds_positions_to_the_embedding(position):
    """Token embedding and positions; the embedding is scaled by sqrt(C) where sinusoids are added."""
    model, idx = build(position=position), tokens(2, 16)
    entered = []
    model.transformer.drop.register_forward_hook(lambda module, args, output: entered.append(output))
    model(idx)
    embedding = model.transformer.wte(idx)
    if position == "learned":
        embedding = embedding + model.transformer.wpe.weight
    elif position == "sinusoidal":
        embedding = embedding * math.sqrt(32) + sinusoids(torch.arange(16, device=DEVICE), 32, embedding.dtype)
    torch.testing.assert_close(entered[0], embedding)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("gelu_tanh", lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
        ("gelu", torch.nn.functional.gelu),
        ("relu", torch.relu),
    ],
)
def test_mlp_computes_the_configured_activation(activation, function):
    mlp = build(activation=activation, init_std=1.0).transformer.h[0].mlp
    x = torch.randn(3, 32, device=DEVICE)
    torch.testing.assert_close(mlp(x), mlp.c_proj(function(mlp.c_fc(x))))


@pytest.mark.parametrize("site", ["embedding", "attention", "attention output", "feed-forward output"])
def test_dropout_acts_in_four_places_in_training_only(site):
    model, idx = build(dropout=0.5), tokens(2, 16)
    transformer = model.transformer
    # the norm that adds a sublayer's output also applies its dropout
    sites = {
        "attention": [block.attn for block in transformer.h],
        "attention output": [block.ln_2 for block in transformer.h],
        "feed-forward output": [*(block.ln_1 for block in transformer.h), transformer.ln_f],
    }
    if site != "embedding":
        transformer.drop.p = 0.0
    for module in (module for name, modules in sites.items() if name != site for module in modules):
        module.dropout = 0.0
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


def test_post_norm_normalises_after_the_addition():
    model = build(norm_position="post", n_layer=1)
    hidden = model.transformer(tokens(1, 16))
    torch.testing.assert_close(hidden.mean(-1), torch.zeros(1, 16, device=DEVICE), atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden.var(-1, correction=0), torch.ones(1, 16, device=DEVICE), atol=1e-3, rtol=0)
    assert not any("ln_f" in name for name in model.state_dict())


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_blocks_equal_masked_encoder_layers_of_pytorch(norm_position):
    """The same weights in PyTorch's layers: head size, residuals, order of norms."""
    heads, width = 4, 32
    model = build(n_head=heads, norm_position=norm_position, activation="relu", init_std=0.3).double().eval()
    theirs = torch.nn.ModuleList(
        torch.nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="relu", batch_first=True, norm_first=norm_position == "pre"
        )
        for _ in model.transformer.h
    ).to(DEVICE, torch.float64)
    names = {
        "self_attn.in_proj_": "attn.c_attn.",
        "self_attn.out_proj.": "attn.c_proj.",
        "linear1.": "mlp.c_fc.",
        "linear2.": "mlp.c_proj.",
        "norm1.": "ln_1.",
        "norm2.": "ln_2.",
    }
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # norms and biases are alike at first
        for layer, block in zip(theirs, model.transformer.h, strict=True):
            weights = block.state_dict()
            layer.load_state_dict(
                {their + kind: weights[our + kind] for their, our in names.items() for kind in ("weight", "bias")}
            )
        idx = tokens(3, 16)
        x = model.transformer.wte(idx) + model.transformer.wpe.weight
        masked = torch.ones(16, 16, dtype=torch.bool, device=DEVICE).triu(1)
        for layer in theirs.train():  # PyTorch's plain path; dropout is 0
            x = layer(x, src_mask=masked)
        last = model.transformer.ln_f
        if last is not None:
            x = torch.nn.functional.layer_norm(x, (width,), last.weight, last.bias)
        torch.testing.assert_close(model(idx, idx)[0], x @ model.lm_head.weight.T)


def test_autocast_trains_in_bfloat16():
    for backend in ("eager", "triton"):
        model = build(backend)
        idx = tokens(2, 16)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            _, loss = model(idx, idx)
            assert model(idx)[0].dtype == torch.bfloat16
        loss.backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
        torch.testing.assert_close(loss.float(), build()(idx, idx)[1], rtol=0.01, atol=0.01)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize(("stream", "size"), [(None, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_norms_under_autocast_produce_the_matmul_dtype(backend: str, stream: torch.dtype | None, size: torch.dtype):
    """No cast between a norm and a matmul; the residual stream keeps its dtype."""
    model, seen = build(backend), []
    model.set_residual_dtype(stream)
    for block in model.transformer.h:
        block.ln_2.register_forward_hook(lambda module, args, output: seen.extend(tensor.dtype for tensor in output))
        block.attn.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        _, loss = model(tokens(2, 16), tokens(2, 16, seed=1))
    assert seen == [torch.bfloat16, torch.bfloat16, size] * 2
    loss.backward()
    torch.testing.assert_close(loss, build()(tokens(2, 16), tokens(2, 16, seed=1))[1], rtol=0.01, atol=0.01)
    with pytest.raises(ValueError, match='needs norm_position="pre", the model has "post"'):
        build(norm_position="post").set_residual_dtype(torch.bfloat16)


def test_configure_optimizers_decays_trained_matrices_alone():
    model = build()
    frozen = model.transformer.wpe.weight.requires_grad_(False)
    decayed, plain = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), DEVICE.type).param_groups
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in plain["params"]} == {1}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {*decayed["params"], *plain["params"]} == set(model.parameters()) - {frozen}
    assert decayed["betas"] == (0.9, 0.95)


def test_estimate_mfu_is_flops_over_peak(monkeypatch):
    model = build()
    monkeypatch.setattr(hardware, "peak_flops", lambda device, dtype: 1e12)
    expected = flops.training_flops_per_token(model.config) * 5 * 16 / 0.5 / 1e12
    assert model.estimate_mfu(fwdbwd_per_iter=5, dt=0.5) == pytest.approx(expected)
    monkeypatch.setattr(hardware, "peak_flops", lambda device, dtype: None)
    assert math.isnan(model.estimate_mfu(5, 0.5))


def test_crop_block_size():
    model = build().eval()
    idx = tokens(1, 8)
    logits, _ = model(idx)
    model.crop_block_size(8)
    assert model.config.block_size == 8
    assert model.transformer.wpe.weight.shape == (8, 32)
    assert torch.equal(model(idx)[0], logits)
    with pytest.raises(ValueError, match="9 tokens are longer than block_size=8"):
        model(tokens(1, 9))
    with pytest.raises(ValueError, match=r"block_size must be in \[1, 8\], got 9"):
        model.crop_block_size(9)


@pytest.mark.parametrize(
    ("idx", "targets", "message"),
    [
        (torch.zeros(5), None, r"idx must be \[B, T\] with T >= 1, got shape \(5,\)"),
        (torch.zeros(1, 0), None, r"idx must be \[B, T\] with T >= 1, got shape \(1, 0\)"),
        (torch.zeros(1, 17), None, "17 tokens are longer than block_size=16"),
        (torch.zeros(1, 5), torch.zeros(1, 4), r"targets must have the shape of idx, \(1, 5\), got \(1, 4\)"),
        (torch.full((1, 5), 31), None, "token id 31 is out of range; accepted: 0 to 30"),
        (torch.full((1, 5), -1), None, "token id -1 is out of range; accepted: 0 to 30"),
        (torch.zeros(1, 5), torch.full((1, 5), 99), "target 99 is out of range; accepted: 0 to 30"),
    ],
)
def test_forward_rejects_bad_tokens(idx, targets, message):
    model = GPT(GPTConfig(**SMALL))  # on the CPU, where PyTorch would raise an IndexError
    with pytest.raises(ValueError, match=message):
        model(idx.long(), None if targets is None else targets.long())
