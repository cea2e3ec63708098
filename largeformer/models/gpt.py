"""GPT: a causal decoder of Megatron-core layers, whole or as one pipeline stage's chunks.

`s` sequence, `b` micro batch, `h` hidden, `v` this rank's share of the padded vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig

from largeformer.config.schema import ModelConfig, ParallelConfig, Recipe, TrainConfig
from largeformer.layout import stage_layers
from largeformer.models.initialization import initialize
from largeformer.models.layers import block_spec
from largeformer.models.losses import HeadLoss, TokenLoss
from largeformer.models.shards import Shard, describe
from largeformer.parallel.groups import ParallelGroups

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class VocabularyHead(ColumnParallelLinear):  # type: ignore[misc]
    """The output projection. With labels it returns the summed loss instead, fused; see `HeadLoss`.

    `row_losses`: where it is a list, it takes the summed loss of each row of each micro batch in training, float32[b].
    `next_loss`: gives the loss of the next micro batch in training, where that is not cross-entropy.
    """

    vocab_size: int
    loss_chunk_size: int
    row_losses: list[torch.Tensor] | None = None
    next_loss: Callable[[], TokenLoss] | None = None

    def forward(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
        labels: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
    ) -> Any:
        """hidden: [s (or s / t), b, h]; labels, loss_mask: [b, s].

        Returns: float32[], the sum of the masked losses; without labels what `ColumnParallelLinear` returns.
        """
        if labels is None:
            return super().forward(hidden, weight, runtime_gather_output)
        assert loss_mask is not None, "a label counts or does not: say which"
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        rows = self.row_losses if self.training else None
        token_losses: list[torch.Tensor] | None = None if rows is None else []
        loss = HeadLoss.apply(
            hidden.flatten(0, 1),
            self.weight if weight is None else weight,
            labels.t().flatten(),
            loss_mask.t().flatten(),
            self.vocab_size,
            self.loss_chunk_size,
            self.tp_group,
            torch.is_grad_enabled(),
            token_losses,
            self.next_loss() if self.training and self.next_loss is not None else None,
        )
        if rows is not None and token_losses is not None:
            rows.append(torch.cat(token_losses).view(hidden.shape[:2]).sum(dim=0))
        return loss


class GPT(GPTModel):  # type: ignore[misc]
    """Megatron-core's GPT with our head. `forward` with labels and loss_mask returns the summed loss, without them logits [b, s, v]."""

    def __init__(self, *, unpadded_vocab_size: int, loss_chunk_size: int, **kwargs: Any) -> None:
        self._head_settings = {"vocab_size": unpadded_vocab_size, "loss_chunk_size": loss_chunk_size}
        super().__init__(**kwargs)

    def setup_embeddings_and_output_layer(self) -> None:
        """Called by the library once all parts are made: put our head in, and mark the second copy of a tied embedding.

        The library would copy the tied weights here by a collective; ours are equal already, since a parameter's initial value
        depends on its name and the seed alone.
        """
        if not self.post_process:
            return
        tied = self.share_embeddings_and_output_weights
        self.output_layer = VocabularyHead(
            self.config.hidden_size,
            self.vocab_size,
            config=self.config,
            init_method=self.config.init_method,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=self.pre_process and tied,
            tp_group=self.pg_collection.tp,
        )
        for name, value in self._head_settings.items():
            setattr(self.output_layer, name, value)
        if tied and not self.pre_process:
            # DeepSpeed's name for "counted, and stepped from, elsewhere": gradient norms leave this copy out.
            self.output_layer.weight.ds_pipe_replicated = True

    def _postprocess(self, hidden_states: torch.Tensor, labels: torch.Tensor | None, loss_mask: Any = None, **kwargs: Any) -> Any:
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states=hidden_states, labels=None, loss_mask=loss_mask, **kwargs)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden_states, weight=weight, labels=labels, loss_mask=loss_mask)


def build_gpt(recipe: Recipe, groups: ParallelGroups, device: torch.device) -> tuple[list[GPT], list[Shard]]:
    """This rank's part of the model, initialised: one chunk, or one per virtual pipeline stage; and what its parameters hold.

    The parameters' dtype is that of `train.precision`; their values depend on the seed and their global names alone.
    """
    config = transformer_config(recipe.model, recipe.parallel, recipe.train)
    p, layout = recipe.parallel, groups.layout
    ranges = stage_layers(
        recipe.model.num_layers,
        layout.pipeline,
        layout.virtual,
        p.num_layers_in_first_pipeline_stage,
        p.num_layers_in_last_pipeline_stage,
    )[groups.coordinates.pipeline]
    chunks = []
    for index, layers in enumerate(ranges):
        chunk = GPT(
            config=config,
            transformer_layer_spec=block_spec(recipe.model.attention_backend, len(layers)),
            vocab_size=recipe.padded_vocab_size,
            max_sequence_length=recipe.model.seq_length,
            pre_process=groups.is_first_stage and index == 0,
            post_process=groups.is_last_stage and index == layout.virtual - 1,
            parallel_output=True,
            share_embeddings_and_output_weights=recipe.model.tie_embeddings,
            position_embedding_type={"learned": "learned_absolute"}.get(recipe.model.position_embedding, recipe.model.position_embedding),
            rotary_base=recipe.model.rotary_base,
            pg_collection=groups.collection,
            vp_stage=index if layout.virtual > 1 else None,
            unpadded_vocab_size=recipe.tokenizer.vocab_size,
            loss_chunk_size=recipe.train.loss_chunk_size,
        )
        chunks.append(chunk.to(device))
        for parameter in chunk.parameters():
            # Megatron-core makes learned positions in float32, whatever it is told. Rows that pad the vocabulary stay 0.
            parameter.data = parameter.data.to(config.params_dtype).zero_()
    shards = describe(chunks, recipe.tokenizer.vocab_size)
    for shard in shards:
        # Gradient norms count a sharded parameter on every tensor-parallel rank, any other on the first alone.
        shard.parameter.tensor_model_parallel = shard.shape != shard.global_shape  # type: ignore[attr-defined]
    initialize(shards, recipe.run.seed, recipe.model)
    return chunks, shards


def transformer_config(model: ModelConfig, parallel: ParallelConfig, train: TrainConfig) -> TransformerConfig:
    """The recipe in Megatron-core's terms. Fusions that need CUDA extensions or its just-in-time scripts are off; layers are
    compiled whole by `train.compile` instead."""
    interleaved = (parallel.virtual_pipeline_model_parallel_size or 1) > 1
    dtype = DTYPES[train.precision]
    full = train.recompute_granularity == "full"
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_dim,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=model.activation == "swiglu",
        activation_func={"swiglu": F.silu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}[model.activation],
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        init_method_std=model.init_method_std,
        perform_initialization=False,
        use_cpu_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=train.precision == "bf16",
        fp16=train.precision == "fp16",
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size if interleaved else None,
        sequence_parallel=parallel.sequence_parallel,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        # Interleaving is silently wrong without these two, and they fail without interleaving.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # Interleaved sends are still under way when the schedule would free their memory, which gloo does not survive.
        deallocate_pipeline_outputs=parallel.pipeline_model_parallel_size > 1 and not interleaved,
        calculate_per_token_loss=True,
        recompute_granularity=train.recompute_granularity,
        recompute_method=(train.recompute_method or "uniform") if full else None,
        recompute_num_layers=(train.recompute_num_layers or 1) if full else None,
        recompute_modules=list(train.recompute_modules) if train.recompute_granularity == "selective" else None,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
