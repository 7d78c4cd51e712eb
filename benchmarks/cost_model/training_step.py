"""FLOPs and bytes of a training step, pass by pass: every tensor that is read, written and kept.

The step is that of `TrainStep` with the Triton backend: products in `itemsize` bytes; parameters, gradients and the
optimizer's state in float32. Each tensor counts once for each pass that reads it and once for each that writes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from benchmarks.cost_model import operators
from benchmarks.cost_model.operators import Cost
from gptfast.config import GPTConfig

FLOAT32, TOKEN = 4, 8  # bytes
NORM, ATTENTION, PROJECTIONS, FFN = "residual and layer norm", "attention", "attention projections", "feed-forward"


@dataclass(frozen=True)
class Pass:
    """One pass over memory."""

    kind: str  # kind of operation, by which passes are summed
    name: str
    reads: Mapping[str, int]  # bytes of each tensor that it reads, by name
    writes: Mapping[str, int]
    keeps: tuple[str, ...] = ()  # names of the tensors that it keeps for the backward
    flops: int = 0  # of matrix products

    @property
    def cost(self) -> Cost:
        return Cost(self.flops, sum(self.reads.values()) + sum(self.writes.values()))

    @property
    def kept_bytes(self) -> int:
        return sum({**self.reads, **self.writes}[name] for name in self.keeps)


@dataclass(frozen=True)
class StepCost:
    """The passes of one training step of a GPT on [batch, length] tokens."""

    config: GPTConfig
    batch: int
    length: int
    itemsize: int = 2  # bytes per element of matrix products
    residual_itemsize: int = FLOAT32  # bytes per element of the residual stream

    def passes(self) -> list[Pass]:
        """All passes; those of a block as often as there are blocks."""
        return [*self.around(), *(self.block_forward() + self.block_backward()) * self.config.n_layer]

    def by_kind(self) -> dict[str, Cost]:
        """Sum the passes by kind of operation."""
        return summed(self.passes())

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> dict[str, float]:
        """Compute the roofline's bound by kind of operation; each pass takes the time of its slower half."""
        total: dict[str, float] = {}
        for one in self.passes():
            total[one.kind] = total.get(one.kind, 0.0) + one.cost.seconds(flops_per_second, bytes_per_second)
        return total

    def kept_bytes(self) -> int:
        """Bytes of activations that one block keeps for its backward."""
        return sum(one.kept_bytes for one in self.block_forward())

    def block_input_bytes(self) -> int:
        """Bytes that one block keeps with activation checkpointing: the residual stream and what is added to it."""
        return self._activations["x"] + self._activations["m"]

    def block_forward(self) -> list[Pass]:
        """Passes of one block. Its first norm adds the output m of the block before it."""
        return [
            self._add_norm("ln_1", "m"),
            self._linear("c_attn", "y", "qkv"),
            self._pass(ATTENTION, "attention", "qkv", "o lse", keeps="qkv o lse", flops=self._attention.forward.flops),
            self._linear("c_proj", "o", "a"),
            self._add_norm("ln_2", "a"),
            self._linear("c_fc", "y", "z hidden", keeps="z", epilogue=", activation"),
            self._linear("mlp.c_proj", "hidden", "m"),
        ]

    def block_backward(self) -> list[Pass]:
        """Passes of one block, from the gradients dm of its output and dh of the residual stream."""
        return [
            *self._linear_backward("mlp.c_proj", "dm", "hidden", "dz", epilogue=("z", "hidden")),
            *self._linear_backward("c_fc", "dz", "y", "dy")[:2],  # the product before has summed the bias's gradient
            self._add_norm_backward("ln_2", "a"),
            *self._linear_backward("c_proj", "da", "o", "do"),
            self._pass(ATTENTION, "attention", "qkv o do lse", "dqkv", flops=self._attention.backward.flops),
            *self._linear_backward("c_attn", "dqkv", "y", "dy"),
            self._add_norm_backward("ln_1", "m"),
        ]

    def around(self) -> list[Pass]:
        """Passes that a step does once: embedding, last norm, head, loss, casts of weights, clipping, optimizer."""
        config, rows, width = self.config, self.batch * self.length, self.config.n_embd
        vocabulary, embedded = config.padded_vocab_size, rows * width * FLOAT32
        table, positions = vocabulary * width * FLOAT32, self.length * width * FLOAT32
        parameters = operators.parameters(config) + (vocabulary - config.vocab_size) * width
        loss = operators.linear_cross_entropy(rows, width, vocabulary, self.itemsize, FLOAT32)
        passes = [
            Pass("embedding", "look-up", {"ids": rows * TOKEN, "rows": embedded}, {"x": embedded}),
            Pass("embedding", "gradient", {"dx": embedded, "ids": rows * TOKEN}, {"dtable": table + embedded}),
            Pass("head and loss", "forward and gradients", {"all": loss.forward.bytes}, {}, flops=loss.forward.flops),
            Pass("head and loss", "times the upstream gradient", {"all": loss.backward.bytes}, {}),
            Pass("optimizer", "AdamW", {"all": operators.adamw(parameters).bytes}, {}),
            Pass("optimizer", "clipping", {"gradients": FLOAT32 * parameters}, {"gradients": FLOAT32 * parameters}),
        ]
        if config.norm_position == "pre":
            passes += [self._add_norm("ln_f", "m"), self._add_norm_backward("ln_f backward", "m")]
        if config.position == "learned":
            passes += [
                Pass("embedding", "add positions", {"x": embedded, "rows": positions}, {"x": embedded}),
                Pass("embedding", "gradient of positions", {"dx": embedded}, {"drows": positions}),
            ]
        if self.residual_itemsize != FLOAT32:
            stream = self._activations["x"]
            passes += [
                Pass("embedding", "cast", {"x": embedded}, {"x": stream}),
                Pass("embedding", "cast of the gradient", {"dx": stream}, {"dx": embedded}),
            ]
        if config.tie_weights:
            passes.append(Pass("embedding", "add the head's gradient", {"both": 2 * table}, {"dtable": table}))
        if self.itemsize != FLOAT32:
            attention, ffn = (config.n_layer * count * width**2 for count in (4, 8))
            for name, elements in (
                ("to products", attention + ffn + vocabulary * width),
                ("of the feed-forward, again in the backward", ffn),
                ("of the projections' gradients", attention),
            ):
                passes.append(Pass("weight casts", name, {"all": elements * (FLOAT32 + self.itemsize)}, {}))
        return passes

    @cached_property
    def _activations(self) -> dict[str, int]:
        """Bytes of the tensors of all tokens, by name."""
        rows, width = self.batch * self.length, self.config.n_embd
        unit, stream = rows * width * self.itemsize, rows * width * self.residual_itemsize
        return {
            "x": stream, "h": stream, "y": unit if self.config.norm_position == "pre" else stream,
            "qkv": 3 * unit, "o": unit, "a": unit, "z": 4 * unit, "hidden": 4 * unit, "m": unit,
            "lse": rows * self.config.n_head * FLOAT32, "statistics": 2 * rows * FLOAT32,
        }  # fmt: skip

    @property
    def _attention(self) -> operators.Passes:
        heads, head_size = self.config.n_head, self.config.head_size
        return operators.causal_attention(self.batch, heads, self.length, self.length, head_size, self.itemsize)

    @property
    def _layers(self) -> dict[str, tuple[str, int, int, bool]]:
        """Kind, inputs, outputs and bias of each linear layer."""
        config, width = self.config, self.config.n_embd
        return {
            "c_attn": (PROJECTIONS, width, 3 * width, config.has_qkv_bias),
            "c_proj": (PROJECTIONS, width, width, config.bias),
            "c_fc": (FFN, width, 4 * width, config.bias),
            "mlp.c_proj": (FFN, 4 * width, width, config.bias),
        }

    def _pass(
        self, kind: str, name: str, reads: str, writes: str, keeps: str = "", flops: int = 0, **parameters: int
    ) -> Pass:
        """A pass over activations by name, "d" before a name for its gradient, and over `parameters` in bytes.

        The pass reads a parameter "weight", and writes the others.
        """
        known = self._activations
        read, written = (
            {tensor: known[tensor if tensor in known else tensor.removeprefix("d")] for tensor in names.split()}
            for names in (reads, writes)
        )
        for parameter, size in parameters.items():
            (read if parameter == "weight" else written)[parameter] = size
        return Pass(kind, name, read, written, tuple(keeps.split()), flops)

    def _linear(self, layer: str, x: str, y: str, keeps: str = "", epilogue: str = "") -> Pass:
        kind, inputs, outputs, bias = self._layers[layer]
        weight, flops = (inputs + bias) * outputs * self.itemsize, 2 * self.batch * self.length * inputs * outputs
        return self._pass(kind, layer + epilogue, x, y, keeps, flops, weight=weight)

    def _linear_backward(
        self, layer: str, dy: str, x: str, dx: str, epilogue: tuple[str, str] = ("", "")
    ) -> list[Pass]:
        """Passes for the gradients of a linear layer's input, weight and bias; the first product has the epilogue."""
        kind, inputs, outputs, bias = self._layers[layer]
        weight, flops = inputs * outputs, 2 * self.batch * self.length * inputs * outputs
        itemsize = FLOAT32 if kind == FFN else self.itemsize  # the feed-forward sums its weights' gradients in float32
        reads, writes = f"{dy} {epilogue[0]}", f"{dx} {epilogue[1]}"
        return [
            self._pass(kind, f"{layer}, {dx}", reads, writes, flops=flops, weight=weight * self.itemsize),
            self._pass(kind, f"{layer}, dweight", f"{dy} {x}", "", flops=flops, dweight=weight * itemsize),
            *[self._pass(kind, f"{layer}, dbias", dy, "", dbias=outputs * itemsize)] * bias,
        ]

    def _add_norm(self, name: str, sublayer: str) -> Pass:
        outputs = "h y statistics"
        return self._pass(NORM, name, f"{sublayer} x", outputs, keeps=outputs, weight=self._norm_parameters)

    def _add_norm_backward(self, name: str, sublayer: str) -> Pass:
        known = self._activations
        dx = "dx" if known[sublayer] == known["x"] else f"dx d{sublayer}"  # one gradient for both, if it has one size
        weight = self.config.n_embd * FLOAT32
        return self._pass(NORM, name, "dy dh h statistics", dx, weight=weight, dweight=self._norm_parameters)

    @property
    def _norm_parameters(self) -> int:
        return self.config.n_embd * (2 if self.config.bias else 1) * FLOAT32


def summed(passes: Iterable[Pass]) -> dict[str, Cost]:
    """Sum the costs of passes by kind."""
    total: dict[str, Cost] = {}
    for one in passes:
        total[one.kind] = total.get(one.kind, Cost(0, 0)) + one.cost
    return total
