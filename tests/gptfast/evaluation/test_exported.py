"""`transformers`, by the rules of lm-evaluation-harness, scores an exported model as `gptfast eval` does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from gptfast import GPT, GPTConfig, load_model
from gptfast.evaluation import multiple_choice
from gptfast.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, WordTokenizer
from tests.support.command_line import output
from tests.support.small_tokenizers import small_tiktoken

WORDS = ["the", "cat", "to", "be", "Zürich", "東京", "that's", "."]
TOKENIZERS: dict[str, Tokenizer] = {
    "char": CharTokenizer.of_documents([" ".join(WORDS)], end_of_text=True),
    "byte": ByteTokenizer(),
    "word": WordTokenizer.of_documents([" ".join(WORDS)]),
    "tiktoken": small_tiktoken(b"th", b" t", b" th"),
}


class Harness:
    """The log-likelihood of lm-evaluation-harness's model type "hf", from a folder."""

    def __init__(self, folder: Path) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.max_length = transformers.AutoConfig.from_pretrained(folder).n_positions

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    @torch.no_grad()
    def log_likelihood(self, context: str, continuation: str) -> float:
        before = self.encode(context) if context else [self.tokenizer.eos_token_id]
        after = self.encode(context + continuation)[len(before) if context else 0 :]
        row = torch.tensor([(before + after)[-self.max_length - 1 :]])
        chances = self.model(row[:, :-1]).logits.log_softmax(-1)[0]  # [T, V]
        return chances.gather(1, row[0, 1:, None])[-len(after) :].sum().item()


@pytest.mark.parametrize("tokens", TOKENIZERS.values(), ids=TOKENIZERS)
def test_exported_folder_answers_as_eval_does(here, capsys, tokens):
    torch.manual_seed(0)
    shape = {"block_size": 40, "n_layer": 2, "n_head": 2, "n_embd": 16, "init_std": 0.5}
    GPT(GPTConfig(vocab_size=tokens.vocab_size, **shape), "eager").save_pretrained("out", tokens)
    generator = np.random.default_rng(5)

    def text(longest: int) -> str:
        return " ".join(generator.choice(WORDS, size=generator.integers(1, longest)))

    questions = [{"ctx": text(9), "endings": [text(5) for _ in range(4)], "label": i % 4} for i in range(24)]
    questions[3]["ctx"] = ""
    Path("questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))

    harness, right = Harness(here / "out"), {"acc": [], "acc_norm": [], "acc_bytes": []}
    assert (harness.max_length, harness.tokenizer.model_max_length) == (40, 40)
    model, own = load_model.load("out", torch.device("cpu"))
    for question in questions:
        sums = np.array([harness.log_likelihood(question["ctx"], f" {ending}") for ending in question["endings"]])
        rows = [multiple_choice.encode(own, question["ctx"], ending, 40) for ending in question["endings"]]
        assert multiple_choice.log_likelihoods(model, rows, torch.float32, 3) == pytest.approx(sums, rel=1e-5)
        lengths = {
            "acc": [1] * 4,
            "acc_norm": [len(ending) for ending in question["endings"]],
            "acc_bytes": [len(ending.encode()) for ending in question["endings"]],
        }
        for name, length in lengths.items():
            right[name].append(np.argmax(sums / length) == question["label"])

    options = ["--choices", "questions.jsonl", "--device", "cpu", "--dtype", "float32", "--json"]
    found = json.loads(output(capsys, "eval", "out", *options))["choices"]
    for name, answers in right.items():
        assert found[name] == pytest.approx(np.mean(answers)), name
        assert found[f"{name}_stderr"] == pytest.approx(np.std(answers, ddof=1) / np.sqrt(24)), name
    assert right["acc"] != right["acc_norm"], "the metrics should differ"
