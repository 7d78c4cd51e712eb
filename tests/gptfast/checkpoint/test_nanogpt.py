import importlib.util
import random
from pathlib import Path

import pytest
import torch

from gptfast import GPT, GPTConfig
from tests.support.nanogpt import MODEL_ARGS, checkpoint, logits, shapes
from tests.support.oracle import DEVICE

IDX = torch.randint(MODEL_ARGS["vocab_size"], (3, MODEL_ARGS["block_size"]), generator=torch.Generator().manual_seed(1))


def save(folder: Path, content: object) -> Path:
    torch.save(content, folder / "ckpt.pt")
    return folder / "ckpt.pt"


def refused(path: Path, **options) -> str:
    """The error, which is one line."""
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        GPT.from_nanogpt(path, **options)
    return str(caught.value)


@torch.no_grad()
def ours(model: GPT) -> torch.Tensor:
    idx = IDX.to(model.lm_head.weight.device)
    return model.eval()(idx, idx)[0].cpu()


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_from_nanogpt_gives_nanogpts_logits(tmp_path, bias, compiled, backend):
    path = save(tmp_path, checkpoint(bias=bias, compiled=compiled))
    model = GPT.from_nanogpt(path, backend=backend).to(DEVICE)
    assert (model.config.activation, model.config.dropout, model.config.bias) == ("gelu", 0.1, bias)
    torch.testing.assert_close(ours(model), logits(checkpoint(bias=bias)["model"], 2, 2, IDX), atol=1e-5, rtol=0)


@pytest.mark.parametrize("compiled", [False, True])
def test_from_nanogpt_gives_older_checkpoints_the_older_gelu(tmp_path, compiled):
    """Before nanoGPT had the module it computed the tanh approximation; attention's mask was a buffer then."""
    content = checkpoint(gelu=False, compiled=compiled)
    del content["model_args"]["bias"]
    content["model"]["_orig_mod." * compiled + "transformer.h.0.attn.bias"] = torch.ones(1, 1, 12, 12)
    model = GPT.from_nanogpt(save(tmp_path, content))
    assert model.config.activation == "gelu_tanh"
    expected = logits(checkpoint()["model"], 2, 2, IDX, "tanh")
    torch.testing.assert_close(ours(model), expected, atol=1e-5, rtol=0)
    assert GPT.from_nanogpt(tmp_path / "ckpt.pt", {"activation": "relu"}).config.activation == "relu"


def test_from_nanogpt_takes_a_plain_dict_for_todays_nanogpt(tmp_path):
    content = checkpoint()
    content["model"] = dict(content["model"])
    assert GPT.from_nanogpt(save(tmp_path, content)).config.activation == "gelu"


def test_from_nanogpt_takes_overrides(tmp_path):
    path = save(tmp_path, checkpoint())
    model = GPT.from_nanogpt(path, {"dropout": 0.0, "pad_vocab_size_to": 64})
    assert (model.config.dropout, model.lm_head.weight.shape[0]) == (0.0, 64)
    assert torch.equal(ours(model), ours(GPT.from_nanogpt(path)))
    assert refused(path, override_args={"n_layer": 3}).startswith("override_args has n_layer; accepted: dropout, ")
    assert refused(path, override_args={"dropout": 1.5}) == "dropout must be in [0, 1), got 1.5"
    assert refused(path, backend="cuda").startswith("unknown backend 'cuda'")


@pytest.mark.parametrize("tied", [True, False])
def test_from_nanogpt_drops_padded_vocabulary_rows(tmp_path, tied):
    """The remaining tokens keep their logits."""
    content = checkpoint()
    if not tied:
        content["model"]["lm_head.weight"] = content["model"]["lm_head.weight"] + 1
    path, idx = save(tmp_path, content), IDX % 15
    model = GPT.from_nanogpt(path, {"vocab_size": 15}).eval()
    assert (model.config.vocab_size, model.lm_head.weight.shape[0]) == (15, 15)
    with torch.no_grad():
        torch.testing.assert_close(model(idx, idx)[0], logits(content["model"], 2, 2, idx)[..., :15], atol=1e-5, rtol=0)
    assert refused(path, override_args={"vocab_size": 20}) == f"vocab_size must be at most the 19 of {path}, got 20"
    assert refused(path, override_args={"vocab_size": 0}) == "vocab_size must be an integer of at least 1, got 0"
    path = save(tmp_path, content | {"model_args": content["model_args"] | {"vocab_size": 18}})
    assert "tensor transformer.wte.weight is [19, 16], [15, 16] is exp" in refused(
        path, override_args={"vocab_size": 15}
    )


def test_from_nanogpt_reads_half_precision_into_float32(tmp_path):
    content = checkpoint()
    content["model"] = {name: tensor.bfloat16() for name, tensor in content["model"].items()}
    assert GPT.from_nanogpt(save(tmp_path, content)).lm_head.weight.dtype == torch.float32


def test_from_nanogpt_keeps_an_untied_head(tmp_path):
    content = checkpoint()
    content["model"]["lm_head.weight"] = content["model"]["lm_head.weight"] + 1
    model = GPT.from_nanogpt(save(tmp_path, content))
    assert not model.config.tie_weights
    torch.testing.assert_close(ours(model), logits(content["model"], 2, 2, IDX), atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"pad_vocab_size_to": 64}], ids=str)
def test_state_dict_is_nanogpts(settings):
    """Names, order and shapes, with both the head and the embedding, and without padding."""
    state = GPT(GPTConfig(**MODEL_ARGS | settings)).state_dict()
    expected = shapes(**MODEL_ARGS | settings)
    assert [(name, list(tensor.shape)) for name, tensor in state.items()] == list(expected.items())
    assert torch.equal(state["lm_head.weight"], state["transformer.wte.weight"])


def test_load_state_dict_adopts_nanogpts_activation():
    """As in train.py and sample.py, whose settings do not name it."""
    model = GPT(GPTConfig(**MODEL_ARGS))
    with pytest.warns(UserWarning, match="trained with activation='gelu', the model's 'gelu_tanh'"):
        model.load_state_dict(checkpoint()["model"])
    assert model.config == GPTConfig(**MODEL_ARGS, activation="gelu")
    torch.testing.assert_close(ours(model), logits(checkpoint()["model"], 2, 2, IDX), atol=1e-5, rtol=0)


@pytest.mark.parametrize("compiled", [False, True])
def test_state_dict_carries_its_activation(tmp_path, compiled):
    """It survives train.py: torch.save, torch.load, and the removal of torch.compile's prefix."""
    trained = GPT(GPTConfig(**MODEL_ARGS, activation="gelu"))
    wrapped = torch.compile(trained) if compiled else trained
    path = save(tmp_path, {"model": wrapped.state_dict(), "model_args": MODEL_ARGS})
    assert GPT.from_nanogpt(path).config.activation == "gelu"
    state = torch.load(path)["model"]
    for name in list(state):
        state[name.removeprefix("_orig_mod.")] = state.pop(name)
    model = GPT(GPTConfig(**MODEL_ARGS))
    with pytest.warns(UserWarning, match="trained with activation='gelu'"):
        model.load_state_dict(state)
    assert torch.equal(ours(model), ours(trained))


def test_load_state_dict_keeps_a_chosen_activation(recwarn):
    model = GPT(GPTConfig(**MODEL_ARGS, activation="relu"))
    model.load_state_dict(checkpoint()["model"])
    GPT(GPTConfig(**MODEL_ARGS)).load_state_dict(GPT(GPTConfig(**MODEL_ARGS)).state_dict())
    GPT(GPTConfig(**MODEL_ARGS)).load_state_dict(dict(checkpoint()["model"]))
    assert model.config.activation == "relu"
    assert not recwarn.list


def without(name: str, part: str) -> dict:
    content = checkpoint()
    del content[part][name]
    return content


def replaced(tensor: object, name: str = "transformer.h.0.attn.c_attn.weight") -> dict:
    content = checkpoint()
    content["model"][name] = tensor
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "is no checkpoint of nanoGPT: it needs a dict with model and model_args"),
        (checkpoint()["model"], "is no checkpoint of nanoGPT: it needs a dict with model and model_args"),
        ({"model": [], "model_args": MODEL_ARGS}, "is no checkpoint of nanoGPT: it needs a dict with model and"),
        (without("n_head", "model_args"), "is no checkpoint of nanoGPT: no n_head in its model_args"),
        (checkpoint(n_experts=4), "is no checkpoint of nanoGPT: unknown 'n_experts' in its model_args"),
        (checkpoint(n_head=3), "is no checkpoint of nanoGPT: n_embd must be divisible by n_head, got n_embd=16"),
        (replaced("text"), "is no checkpoint of nanoGPT: its model has values that are no tensors"),
        (
            without("transformer.h.1.ln_2.bias", "model"),
            "does not fit its model_args: it lacks tensor transformer.h.1.ln_2.bias [16]",
        ),
        (
            replaced(torch.zeros(16, 48)),
            "does not fit its model_args: tensor transformer.h.0.attn.c_attn.weight is [16, 48], [48, 16] is expected",
        ),
        (
            replaced(torch.zeros(()), "lm_head.weight"),
            "does not fit its model_args: tensor lm_head.weight is [], [19, 16] is expected",
        ),
        (
            replaced(torch.zeros(48, 16, dtype=torch.int64)),
            "does not fit its model_args: tensor transformer.h.0.attn.c_attn.weight is of dtype int64; accepted: ",
        ),
        (
            replaced(torch.zeros(1), "transformer.h.0.moe.gate"),
            "does not fit its model_args: tensor transformer.h.0.moe.gate is none of the model's",
        ),
        (
            {"model": random.Random(0), "model_args": MODEL_ARGS},
            "is damaged, or holds more than tensors and plain values",
        ),
    ],
)
def test_from_nanogpt_rejects_other_content(tmp_path, content, message):
    path = save(tmp_path, content)
    assert refused(path).startswith(f"{path} {message}")


def test_from_nanogpt_rejects_missing_and_damaged_files(tmp_path, recwarn):
    assert str(tmp_path / "none.pt") in refused(tmp_path / "none.pt")
    assert str(tmp_path) in refused(tmp_path)
    whole = save(tmp_path, checkpoint()).read_bytes()
    path = tmp_path / "damaged.pt"
    for content in (b"", b"text\n", whole[: len(whole) // 2], whole[:-30], b"\x80\x04" + whole):
        path.write_bytes(content)
        assert refused(path).startswith(f"{path} is damaged")
    assert not recwarn.list


def test_from_nanogpt_runs_no_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was run",)

    assert "holds more than tensors" in refused(save(tmp_path, checkpoint() | {"config": Harmful()}))
    assert not (tmp_path / "was run").exists()


def test_nanogpts_model_and_ours_continue_each_others_checkpoints(nanogpt, tmp_path):
    """nanoGPT's own model and optimizer, from a checkout: its checkpoints here, ours there."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", nanogpt / "model.py")
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    torch.manual_seed(0)
    them = theirs.GPT(theirs.GPTConfig(**MODEL_ARGS | {"dropout": 0.0}))
    optimizers = [them.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")]

    def step(model, optimizer) -> torch.Tensor:
        loss = model.train()(IDX[:, :-1].contiguous(), IDX[:, 1:].contiguous())[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    for _ in range(3):
        step(them, optimizers[0])
    content = {"model": them.state_dict(), "optimizer": optimizers[0].state_dict(), "model_args": MODEL_ARGS}
    path = save(tmp_path, content | {"iter_num": 3, "best_val_loss": torch.tensor(2.0), "config": {}})
    us = GPT.from_nanogpt(path, {"dropout": 0.0}, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(ours(us), them.eval()(IDX, IDX)[0], atol=1e-5, rtol=0)

    # three steps of both, with the optimizer's state of nanoGPT's, and back
    optimizers.append(us.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu"))
    optimizers[1].load_state_dict(torch.load(path)["optimizer"])
    for _ in range(3):
        torch.testing.assert_close(step(us, optimizers[1]), step(them, optimizers[0]), atol=1e-5, rtol=0)
    again = theirs.GPT(theirs.GPTConfig(**MODEL_ARGS | {"dropout": 0.0}))
    again.load_state_dict(us.state_dict())
    optimizers.append(again.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu"))
    optimizers[2].load_state_dict(optimizers[1].state_dict())
    torch.testing.assert_close(step(again, optimizers[2]), step(them, optimizers[0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(step(again, optimizers[2]), step(them, optimizers[0]), atol=1e-5, rtol=0)
