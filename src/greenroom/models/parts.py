"""Takes the tensors of a layer by their usual names and has the backend prepare them.

What most families share is said here once: projections with optional biases, fused or apart,
experts merged, fused or one by one. Knows names and shapes, not the math.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

from torch import Tensor

from greenroom.layers.backend import Backend, ExpertWeights, NormLike
from greenroom.layers.embedding import Embedding
from greenroom.layers.moe import Experts, Matrices, Matrix, Routing, SharedExpert
from greenroom.layers.router import Rule
from greenroom.layers.weight import MixedStack, Weight, WeightStack
from greenroom.models.config import ModelConfig, MoeConfig
from greenroom.models.tensors import Tensors, mixed, stack

Bank = Weight | WeightStack | MixedStack  # a matrix of every expert


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A view of the file's tensors under a prefix.

    Attributes:
        tensors: the file's.
        config: of the model.
        backend: prepares what is taken.
        blocks: the backend of each layer, where layers differ; empty if they do not.
        ending: the backend of the last norm and the head, None for `backend`.
        centred: whether norms are LayerNorms, with a bias each.
        prefix: "" or "blk.N.".
    """

    tensors: Tensors
    config: ModelConfig
    backend: Backend
    centred: bool
    prefix: str = ""
    blocks: Sequence[Backend] = ()
    ending: Backend | None = None

    def block(self, layer: int) -> "Parts":
        """The view of one layer."""
        backend = self.blocks[layer] if self.blocks else self.backend
        return replace(self, prefix=f"blk.{layer}.", backend=backend)

    def end(self) -> "Parts":
        """The view of what follows the last layer."""
        return replace(self, backend=self.ending or self.backend)

    @property
    def moe(self) -> MoeConfig:
        """The expert structure; only asked for where there is one."""
        assert self.config.moe is not None
        return self.config.moe

    def has(self, name: str) -> bool:
        """Whether the layer has the tensor, e.g. "ffn_gate_exps.weight"."""
        return self.prefix + name in self.tensors

    def weight(self, name: str, *shape: int) -> Weight:
        """Raw rows of `name`."""
        return self.tensors.take(self.prefix + name, *shape)

    def values(self, name: str, *shape: int) -> Tensor:
        """Values of `name` in float32."""
        return self.tensors.values(self.prefix + name, *shape)

    def bias(self, name: str, width: int, required: bool) -> Tensor | None:
        """The bias of the projection `name`, (width,) float32."""
        if not required and not self.has(f"{name}.bias"):
            return None
        return self.values(f"{name}.bias", width)

    def norm(self, name: str, width: int = 0) -> NormLike:
        """A norm of `width` values, by default of the residual stream."""
        width = width or self.config.hidden_size
        weight = self.values(f"{name}.weight", width)
        bias = self.bias(name, width, required=self.centred)
        return self.backend.norm(weight, bias, self.config.norm_epsilon, self.centred)

    def token_embd(self) -> Embedding:
        """The embedding."""
        config = self.config
        weight = self.weight("token_embd.weight", config.vocabulary_size, config.hidden_size)
        return self.backend.embedding(weight)

    def output(self, bias: bool = False) -> Matrix:
        """The head; a file without one ties it to the embedding."""
        config = self.config
        name = "output" if self.has("output.weight") else "token_embd"
        weight = self.weight(f"{name}.weight", config.vocabulary_size, config.hidden_size)
        return self.backend.linear(weight, self.bias("output", config.vocabulary_size, bias))

    def qkv(self, biases: Set[str]) -> Matrices:
        """Query, key and value projections, from tensors of their own or a fused one."""
        shape = self.config.attention
        rows = (
            shape.heads * shape.key_length,
            shape.kv_heads * shape.key_length,
            shape.kv_heads * shape.value_length,
        )
        if self.has("attn_qkv.weight"):
            return self._fused_qkv(rows, bool(biases))
        weights, bias = [], []
        for letter, count in zip("qkv", rows, strict=True):
            name = f"attn_{letter}"
            weights.append(self.weight(f"{name}.weight", count, self.config.hidden_size))
            bias.append(self.bias(name, count, letter in biases))
        return self.backend.linears(weights, bias)

    def _fused_qkv(self, rows: tuple[int, int, int], required: bool) -> Matrices:
        total = sum(rows)
        weight = self.weight("attn_qkv.weight", total, self.config.hidden_size)
        bias = self.bias("attn_qkv", total, required)
        starts = [0, rows[0], rows[0] + rows[1], total]
        spans = [slice(starts[i], starts[i + 1]) for i in range(3)]
        return self.backend.linears(
            [weight.rows(span.start, span.stop) for span in spans],
            [None if bias is None else bias[span] for span in spans],
        )

    def attn_output(self, biases: Set[str]) -> Matrix:
        """The projection behind the attention; Ollama's files call it attn_out."""
        shape = self.config.attention
        name = "attn_output" if not self.has("attn_out.weight") else "attn_out"
        width = self.config.hidden_size
        weight = self.weight(f"{name}.weight", width, shape.heads * shape.value_length)
        return self.backend.linear(weight, self.bias(name, width, "output" in biases))

    def dense(self) -> Matrix:
        """A dense SwiGLU MLP."""
        return self._mlp("", self.config.feed_forward_length)

    def shared(self, gated: bool = False) -> SharedExpert | None:
        """The shared expert, or None if the file says there is none."""
        if self.moe.shared_width == 0:
            return None
        gate = None
        if gated:
            values = self.values("ffn_gate_inp_shexp.weight", self.config.hidden_size)
            gate = self.backend.place(values)
        return SharedExpert(self._mlp("_shexp", self.moe.shared_width), gate)

    def _mlp(self, suffix: str, width: int) -> Matrix:
        hidden = self.config.hidden_size
        return self.backend.mlp(
            self.weight(f"ffn_gate{suffix}.weight", width, hidden),
            self.weight(f"ffn_up{suffix}.weight", width, hidden),
            self.weight(f"ffn_down{suffix}.weight", hidden, width),
        )

    def router(self, rule: Rule, bias: bool = False) -> Routing:
        """The router."""
        experts = self.moe.experts
        weight = self.values("ffn_gate_inp.weight", experts, self.config.hidden_size)
        return self.backend.router(weight, self.bias("ffn_gate_inp", experts, bias), rule)

    def experts(self) -> Experts:
        """The routed experts without biases, merged, with fused gate and up, or one by one."""
        gate, up = self.gate_up()
        return self.backend.experts(ExpertWeights(gate, up, self.expert_stack("down")))

    def gate_up(self, interleaved: bool = False) -> tuple[Bank, Bank]:
        """Gate and up of all experts, each (experts, f, d).

        Args:
            interleaved: in a fused tensor even rows are gate (Ollama's gpt-oss); otherwise the
                first half is.
        """
        width = self.moe.width
        if not self.has("ffn_gate_up_exps.weight"):
            return self.expert_stack("gate"), self.expert_stack("up")
        shape = (self.moe.experts, 2 * width, self.config.hidden_size)
        fused = self.weight("ffn_gate_up_exps.weight", *shape)
        if interleaved:
            return fused.rows(0, step=2), fused.rows(1, step=2)
        return fused.rows(0, width), fused.rows(width)

    def expert_stack(self, part: str) -> Bank:
        """ "gate", "up" or "down" of all experts; files before April 2024 have them one by one."""
        moe, hidden = self.moe, self.config.hidden_size
        shape = (hidden, moe.width) if part == "down" else (moe.width, hidden)
        if self.has("ffn_exps.class"):  # docs/mixed-precision.md
            classes = self.tensors.integers(f"{self.prefix}ffn_exps.class", moe.experts)
            name = f"{self.prefix}ffn_{part}_exps"
            return mixed(self.tensors, name, classes, shape)
        if not self.has(f"ffn_{part}_exps.weight") and self.has(f"ffn_{part}.0.weight"):
            return stack(
                [self.weight(f"ffn_{part}.{e}.weight", *shape) for e in range(moe.experts)]
            )
        return self.weight(f"ffn_{part}_exps.weight", moe.experts, *shape)
