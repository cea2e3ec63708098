"""Seconds of a layer, of the head, of a stage's chunk: one micro batch, forward and backward.

`n` tokens, `h` hidden, `q` heads x head size, `k` query groups x head size, `f` feed-forward, `v` padded vocabulary, `t` tensor parallel.
"""

from __future__ import annotations

from dataclasses import dataclass

from largeformer.config.schema import Recipe
from largeformer.planning.efficiency import Speed

_FUSED_BACKWARD = 2.5
"""Products of fused attention's backward for each of its forward: it recomputes the scores (Dao 2023, arXiv:2307.08691)."""
_ACCUMULATE = 12
"""Bytes that a gradient's element moves on its way into the float32 sum: written and read once, the sum read and written."""
_LOGIT_BYTES = 40
"""Bytes that the cross-entropy moves for a logit: read, made float32, reduced, exponentiated, scaled, made bf16."""


@dataclass(frozen=True)
class Seconds:
    """A forward and a backward, recomputation included; the communication of tensor parallelism apart."""

    forward: float
    backward: float
    forward_link: float = 0.0
    backward_link: float = 0.0

    def times(self, count: float) -> Seconds:
        return Seconds(self.forward * count, self.backward * count, self.forward_link * count, self.backward_link * count)

    def plus(self, other: Seconds) -> Seconds:
        return Seconds(
            self.forward + other.forward,
            self.backward + other.backward,
            self.forward_link + other.forward_link,
            self.backward_link + other.backward_link,
        )


class ModelCost:
    """The times of a recipe's parts on a machine; each is worked out once."""

    def __init__(self, recipe: Recipe, speed: Speed) -> None:
        model, parallel = recipe.model, recipe.parallel
        self._recipe, self._speed = recipe, speed
        self._t = parallel.tensor_model_parallel_size
        self._b, self._s = recipe.train.micro_batch_size, model.seq_length
        self._n = self._b * self._s
        self._h, self._f = model.hidden_size, model.ffn_size / self._t
        self._q = model.num_attention_heads * model.head_dim / self._t
        self._k = model.query_groups * model.head_dim / self._t
        self._gates = 2 if model.activation == "swiglu" else 1
        self._width = 4 if recipe.train.precision == "fp32" else 2
        self._split = self._t if parallel.sequence_parallel else 1
        self.layer = self._layer()
        self.recomputed = self._with_recomputation(self.layer, whole=True)
        self.kept = self._with_recomputation(self.layer, whole=False)

    def chunk(self, layers: int, embedding: bool, head: bool) -> Seconds:
        """A chunk of `layers` layers, with the embedding before or the head after them."""
        train = self._recipe.train
        whole = layers
        if train.recompute_granularity == "full" and train.recompute_method == "block":
            whole = min(train.recompute_num_layers or 1, layers)
        total = self.recomputed.times(whole).plus(self.kept.times(layers - whole))
        if embedding:
            total = total.plus(self._embedding())
        return total.plus(self._head()) if head else total

    def _layer(self) -> Seconds:
        """Without recomputation."""
        speed = self._speed
        matmuls = self._projections() + self._mlp_products()
        attention, attention_back = self._attention()
        moved = self._elementwise()
        forward = matmuls + attention + speed.memory(moved)
        gradients = (self._h * (2 * self._q + 2 * self._k) + (self._gates + 1) * self._h * self._f) * _ACCUMULATE
        backward = 2 * matmuls + attention_back + speed.memory(2 * moved + gradients)
        floor = speed.efficiency.launch_s
        link, link_back = self._tensor_communication()
        return Seconds(max(forward, floor), max(backward, 2 * floor), link, link_back)

    def _with_recomputation(self, layer: Seconds, whole: bool) -> Seconds:
        train = self._recipe.train
        if train.recompute_granularity == "full":
            again, link = (layer.forward, layer.forward_link) if whole else (0.0, 0.0)
        elif train.recompute_granularity == "selective":
            mlp = "mlp" in train.recompute_modules
            again = (self._attention()[0] if "core_attn" in train.recompute_modules else 0.0) + (self._mlp() if mlp else 0.0)
            link = layer.forward_link / 2 if mlp else 0.0
        else:
            again = link = 0.0
        return Seconds(layer.forward, layer.backward + again, layer.forward_link, layer.backward_link + link)

    def _projections(self) -> float:
        return self._speed.matmul(self._n, self._q + 2 * self._k, self._h) + self._speed.matmul(self._n, self._h, self._q)

    def _mlp_products(self) -> float:
        return self._speed.matmul(self._n, self._gates * self._f, self._h) + self._speed.matmul(self._n, self._h, self._f)

    def _mlp(self) -> float:
        return self._mlp_products() + self._speed.memory(self._n * self._width * self._activation_pieces() * self._f)

    def _attention(self) -> tuple[float, float]:
        """Forward and backward of scores and values."""
        speed, model = self._speed, self._recipe.model
        if model.attention_backend == "local":
            rows, heads = self._n, model.num_attention_heads / self._t
            products = 2 * heads * speed.matmul(rows, self._s, model.head_dim)
            scores = heads * rows * self._s
            return products + speed.memory(14 * scores), 2 * products + speed.memory(16 * scores)
        flops = 4 * self._n * self._s * self._q / 2  # the upper triangle is never computed
        return speed.attention(flops), speed.attention(_FUSED_BACKWARD * flops)

    def _activation_pieces(self) -> int:
        """Elements read and written for each of the feed-forward's width."""
        return 7 if self._gates == 2 else 4

    def _elementwise(self) -> float:
        """Bytes of norms, residual sums, rotary embedding, copies of the attention, and the activation."""
        norms_and_sums = 10 * self._h / self._split
        turned = 6 * (self._q + self._k) if self._recipe.model.position_embedding == "rope" else 0
        return self._n * self._width * (norms_and_sums + turned + 2 * self._q + self._activation_pieces() * self._f)

    def _tensor_communication(self) -> tuple[float, float]:
        """Attention and feed-forward each end in an all-reduce, and begin with one backward. Under sequence parallelism each is a
        reduce-scatter and an all-gather, and the backward gathers the inputs once more for the weights' gradients."""
        hidden = self._n * self._h * self._width
        reduce = self._speed.all_reduce(hidden, self._t)
        again = 2 * self._speed.all_gather(hidden, self._t) if self._recipe.parallel.sequence_parallel else 0.0
        return 2 * reduce, 2 * reduce + again

    def _embedding(self) -> Seconds:
        rows = self._recipe.padded_vocab_size / self._t
        hidden = self._n * self._h * self._width
        reduce = self._speed.all_reduce(hidden, self._t)
        return Seconds(self._speed.memory(3 * hidden), self._speed.memory(3 * hidden + rows * self._h * _ACCUMULATE), reduce, 0.0)

    def _head(self) -> Seconds:
        """Logits, their loss and both gradients, all in the forward; see `models/losses.py`."""
        rows = self._recipe.padded_vocab_size / self._t
        speed = self._speed
        forward = 3 * speed.matmul(self._n, rows, self._h) + speed.memory(self._n * rows * _LOGIT_BYTES)
        hidden = self._n * self._h * self._width
        reduce = speed.all_reduce(hidden, self._t)
        return Seconds(forward, speed.memory(rows * self._h * 2 * _ACCUMULATE), reduce / 2, reduce)
