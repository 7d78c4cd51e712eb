"""A training step pass by pass: every tensor that is read, written and kept, in bytes, and the FLOPs.

Of the step as `TrainStep` takes it with the Triton backend: products in `itemsize` bytes, parameters, gradients and the
optimizer's state in float32. Each tensor that a pass reads counts once for that pass, and each that it writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from benchmarks.cost_model import operators
from benchmarks.cost_model.operators import Cost
from gptfast.config import GPTConfig

_FLOAT32 = 4
_TOKEN = 8
_PROJECTIONS, _FFN = "attention projections", "feed-forward"  # kinds
_WORKSPACE = 2**29  # bytes of logits that the loss holds at a time


@dataclass(frozen=True)
class Pass:
    """One pass over memory.

    Args:
        kind: the kind of operation, by which passes are summed.
        name: of the pass.
        reads: bytes of each tensor that it reads, by name.
        writes: likewise.
        keeps: names of tensors that it keeps for the backward.
        flops: of matrix products.
    """

    kind: str
    name: str
    reads: Mapping[str, int]
    writes: Mapping[str, int]
    keeps: tuple[str, ...] = ()
    flops: int = 0

    @property
    def cost(self) -> Cost:
        return Cost(self.flops, sum(self.reads.values()) + sum(self.writes.values()))

    @property
    def kept_bytes(self) -> int:
        return sum({**self.reads, **self.writes}[name] for name in self.keeps)


@dataclass(frozen=True)
class StepCost:
    """The passes of one training step of a GPT on [batch, length] tokens.

    Args:
        config: the model's shape.
        batch: sequences.
        length: tokens of each.
        itemsize: bytes of the numbers that matrix products take.
        residual_itemsize: bytes of the residual stream's numbers.
    """

    config: GPTConfig
    batch: int
    length: int
    itemsize: int = 2
    residual_itemsize: int = _FLOAT32
    _sizes: dict[str, int] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        rows, width = self.batch * self.length, self.config.n_embd
        unit = rows * width * self.itemsize
        stream = rows * width * self.residual_itemsize
        norms = unit if self.config.norm_position == "pre" else stream
        self._sizes.update(
            x=stream, h=stream, y=norms, qkv=3 * unit, o=unit, a=unit, z=4 * unit, hidden=4 * unit, m=unit,
            lse=rows * self.config.n_head * _FLOAT32, statistics=2 * rows * _FLOAT32,
        )  # fmt: skip

    def _of(self, *names: str) -> dict[str, int]:
        """Bytes of tensors by name; "d" before a name is its gradient."""
        return {name: self._sizes[name if name in self._sizes else name.removeprefix("d")] for name in names}

    def _weight(self, inputs: int, outputs: int, bias: bool) -> dict[str, int]:
        return {"weight": (inputs * outputs + (outputs if bias else 0)) * self.itemsize}

    def _product(self, inputs: int, outputs: int) -> int:
        return 2 * self.batch * self.length * inputs * outputs

    def _norm_parameters(self) -> int:
        return self.config.n_embd * (2 if self.config.bias else 1) * _FLOAT32

    def _attention(self) -> operators.Passes:
        config = self.config
        return operators.causal_attention(
            self.batch, config.n_head, self.length, self.length, config.head_size, self.itemsize
        )

    def _add_norm(self, name: str, sublayer: str) -> Pass:
        return Pass(
            "residual and layer norm", name,
            reads={**self._of(sublayer, "x"), "weight": self._norm_parameters()},
            writes=self._of("h", "y", "statistics"),
            keeps=("h", "y", "statistics"),
        )  # fmt: skip

    def _add_norm_backward(self, name: str, sublayer: str) -> Pass:
        shared = self._sizes[sublayer] == self._sizes["x"]
        return Pass(
            "residual and layer norm", name,
            reads={**self._of("dy", "dh", "h", "statistics"), "weight": self.config.n_embd * _FLOAT32},
            writes={**self._of("dx"), **({} if shared else self._of(f"d{sublayer}")),
                    "dweight": self._norm_parameters()},
        )  # fmt: skip

    def _linear_backward(self, name: str, dy: str, x: str, dx: str, bias: bool) -> list[Pass]:
        """The gradients of a linear layer's input, weight and bias."""
        size = {"c_attn": 3, "c_proj": 1}[name] * self.config.n_embd
        flops = self._product(self.config.n_embd, size)
        weight = self._weight(self.config.n_embd, size, bias=False)
        passes = [
            Pass(_PROJECTIONS, f"{name}, {dx}", {**self._of(dy), **weight}, self._of(dx), flops=flops),
            Pass(_PROJECTIONS, f"{name}, dweight", self._of(dy, x), {"dweight": weight["weight"]}, flops=flops),
        ]
        if bias:
            passes.append(Pass(_PROJECTIONS, f"{name}, dbias", self._of(dy), {"dbias": size * self.itemsize}))
        return passes

    def block_forward(self) -> list[Pass]:
        """Of one block, whose first norm adds the output m of the block before it."""
        config, width = self.config, self.config.n_embd
        return [
            self._add_norm("ln_1", "m"),
            Pass(
                _PROJECTIONS, "c_attn", {**self._of("y"), **self._weight(width, 3 * width, config.has_qkv_bias)},
                self._of("qkv"), flops=self._product(width, 3 * width),
            ),
            Pass(
                "attention", "attention", self._of("qkv"), self._of("o", "lse"), keeps=("qkv", "o", "lse"),
                flops=self._attention().forward.flops,
            ),
            Pass(
                _PROJECTIONS, "c_proj", {**self._of("o"), **self._weight(width, width, config.bias)}, self._of("a"),
                flops=self._product(width, width),
            ),
            self._add_norm("ln_2", "a"),
            Pass(
                _FFN, "c_fc, activation", {**self._of("y"), **self._weight(width, 4 * width, config.bias)},
                self._of("z", "hidden"), keeps=("z",), flops=self._product(width, 4 * width),
            ),
            Pass(
                _FFN, "mlp.c_proj", {**self._of("hidden"), **self._weight(4 * width, width, config.bias)},
                self._of("m"), flops=self._product(4 * width, width),
            ),
        ]  # fmt: skip

    def block_backward(self) -> list[Pass]:
        """Of one block, from the gradients dm of its output and dh of the residual stream."""
        config, width = self.config, self.config.n_embd
        product, weight = self._product(width, 4 * width), self._weight(width, 4 * width, bias=False)
        dweight = {"dweight": 4 * width**2 * _FLOAT32}  # as it is summed, for parameters in float32
        passes = [
            Pass(_FFN, "mlp.c_proj, dz", {**self._of("dm", "z"), **weight}, self._of("dz", "hidden"), flops=product),
            Pass(_FFN, "mlp.c_proj, dweight", self._of("dm", "hidden"), dweight, flops=product),
            Pass(_FFN, "c_fc, dy", {**self._of("dz"), **weight}, self._of("dy"), flops=product),
            Pass(_FFN, "c_fc, dweight", self._of("dz", "y"), dweight, flops=product),
        ]
        if config.bias:
            passes.insert(2, Pass(_FFN, "mlp.c_proj, dbias", self._of("dm"), {"dbias": width * _FLOAT32}))
        return [
            *passes,
            self._add_norm_backward("ln_2", "a"),
            *self._linear_backward("c_proj", "da", "o", "do", config.bias),
            Pass(
                "attention", "attention", self._of("qkv", "o", "do", "lse"), self._of("dqkv"),
                flops=self._attention().backward.flops,
            ),
            *self._linear_backward("c_attn", "dqkv", "y", "dy", config.has_qkv_bias),
            self._add_norm_backward("ln_1", "m"),
        ]  # fmt: skip

    def around(self) -> list[Pass]:
        """What a step does once: embedding, last norm, head and loss, casts of weights, clipping, optimizer."""
        config, rows, width = self.config, self.batch * self.length, self.config.n_embd
        vocabulary, embedded = config.padded_vocab_size, rows * width * _FLOAT32
        table, positions = vocabulary * width * _FLOAT32, self.length * width * _FLOAT32
        parameters = operators.parameters(config) + (vocabulary - config.vocab_size) * width
        loss = operators.linear_cross_entropy(
            rows, width, vocabulary, self.itemsize, _FLOAT32,
            chunks=-(-rows * vocabulary * self.itemsize // _WORKSPACE),
        )  # fmt: skip
        passes = [
            Pass("embedding", "look-up", {"ids": rows * _TOKEN, "rows": embedded}, {"x": embedded}),
            Pass("embedding", "gradient", {"dx": embedded, "ids": rows * _TOKEN}, {"dtable": table + embedded}),
            Pass("head and loss", "forward and gradients", {"all": loss.forward.bytes}, {}, flops=loss.forward.flops),
            Pass("head and loss", "times the upstream gradient", {"all": loss.backward.bytes}, {}),
            Pass("optimizer", "AdamW", {"all": operators.adamw(parameters).bytes}, {}),
            Pass("optimizer", "clipping", {"gradients": _FLOAT32 * parameters}, {"gradients": _FLOAT32 * parameters}),
        ]
        if config.norm_position == "pre":
            passes += [self._add_norm("ln_f", "m"), self._add_norm_backward("ln_f backward", "m")]
        if config.position == "learned":
            passes += [
                Pass("embedding", "add positions", {"x": embedded, "rows": positions}, {"x": embedded}),
                Pass("embedding", "gradient of positions", {"dx": embedded}, {"drows": positions}),
            ]
        if self.residual_itemsize != _FLOAT32:
            stream = self._sizes["x"]
            passes += [
                Pass("embedding", "cast", {"x": embedded}, {"x": stream}),
                Pass("embedding", "cast of the gradient", {"dx": stream}, {"dx": embedded}),
            ]
        if config.tie_weights:
            passes.append(Pass("embedding", "add the head's gradient", {"both": 2 * table}, {"dtable": table}))
        if self.itemsize != _FLOAT32:
            attention, ffn = (config.n_layer * count * width**2 for count in (4, 8))
            linear, head = attention + ffn, vocabulary * width
            passes += [
                self._cast("to products", linear + head, _FLOAT32, self.itemsize),
                self._cast("of the feed-forward, again in the backward", ffn, _FLOAT32, self.itemsize),
                self._cast("of the projections' gradients", attention, self.itemsize, _FLOAT32),
            ]
        return passes

    def _cast(self, name: str, numbers: int, before: int, after: int) -> Pass:
        return Pass("weight casts", name, {"numbers": numbers * before}, {"numbers": numbers * after})

    def passes(self) -> list[Pass]:
        """All passes; those of blocks as often as there are blocks."""
        return [*self.around(), *(self.block_forward() + self.block_backward()) * self.config.n_layer]

    def by_kind(self) -> dict[str, Cost]:
        """The passes summed by kind of operation."""
        return summed(self.passes())

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> dict[str, float]:
        """The roofline's bound by kind of operation: passes follow one another, each as long as its slower half."""
        total: dict[str, float] = {}
        for one in self.passes():
            total[one.kind] = total.get(one.kind, 0.0) + one.cost.seconds(flops_per_second, bytes_per_second)
        return total

    def kept_bytes(self) -> int:
        """Of activations that one block keeps for its backward."""
        return sum(one.kept_bytes for one in self.block_forward())

    def block_input_bytes(self) -> int:
        """What is left of that with activation checkpointing: the residual stream and what is to be added to it."""
        return self._sizes["x"] + self._sizes["m"]


def summed(passes: Iterable[Pass]) -> dict[str, Cost]:
    """Costs of passes by kind."""
    total: dict[str, Cost] = {}
    for one in passes:
        total[one.kind] = total.get(one.kind, Cost(0, 0)) + one.cost
    return total
