"""The recipe: one frozen tree that says everything about a run.

Key names are the field's (Megatron's, then DeepSpeed's). Nothing here is ever written back: a number that follows from
others is a property. A number has one owner: ZeRO, offload and communication belong to the DeepSpeed JSON that
`Recipe.deepspeed` names, everything else stands here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from largeformer.config.chain import StageEntry, TrainedSection
from largeformer.config.checkpoint import CheckpointConfig
from largeformer.config.data import READING, DataConfig, TokenizerConfig
from largeformer.config.distill import DistillConfig
from largeformer.config.export import ExportConfig
from largeformer.config.guards import GuardsConfig
from largeformer.config.plan import PlanConfig
from largeformer.config.prune import PruneConfig
from largeformer.config.quality import QualityConfig
from largeformer.config.quantize import QuantizeConfig
from largeformer.config.section import NonNegative, Positive, PositiveInt, Probability, Section
from largeformer.config.tracking import TrackingConfig
from largeformer.errors import BadInputError
from largeformer.layout import Layout, padded_vocab_size

_NOT_ITS_OWN: dict[str, Any] = {"train": True, "optimizer": True, "offline": {"folder"}, "teacher": True, "seed": True}
"""Keys of a stage's section that are not part of its identity as they stand there: what is merged elsewhere, and places. A teacher is a
parent."""


class RunConfig(Section):
    name: str = "run"
    output_dir: str = "runs/run"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1234
    stages: tuple[StageEntry, ...] = tuple(map(StageEntry.of, ("prepare", "pretrain", "evaluate")))


class ModelConfig(Section):
    """The shape of the Transformer."""

    family: Literal["gpt"] = "gpt"
    num_layers: PositiveInt
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt | None = None
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt | None = None
    kv_channels: PositiveInt | None = None
    seq_length: PositiveInt
    normalization: Literal["LayerNorm", "RMSNorm"] = "RMSNorm"
    norm_epsilon: Positive = 1.0e-5
    activation: Literal["gelu", "gelu_tanh", "swiglu"] = "swiglu"
    position_embedding: Literal["learned", "rope", "none"] = "rope"
    rotary_base: Positive = 10000.0
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    attention_backend: Literal["sdpa", "local"] = "sdpa"
    tie_embeddings: bool = False
    hidden_dropout: Probability = 0.0
    attention_dropout: Probability = 0.0
    init_method_std: Positive = 0.02
    make_vocab_size_divisible_by: PositiveInt = 128

    @property
    def ffn_size(self) -> int:
        """Width of the feed-forward layer: as given, else 4h (GELU) or 8h/3 rounded up to 64 (SwiGLU keeps the parameters equal)."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        return 4 * self.hidden_size if self.activation != "swiglu" else -(-8 * self.hidden_size // (3 * 64)) * 64

    @property
    def query_groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads


class ParallelConfig(Section):
    """Degrees of model parallelism; what remains of the world is data parallel."""

    tensor_model_parallel_size: PositiveInt = 1
    pipeline_model_parallel_size: PositiveInt = 1
    virtual_pipeline_model_parallel_size: PositiveInt | None = None
    sequence_parallel: bool = False
    num_layers_in_first_pipeline_stage: PositiveInt | None = None
    num_layers_in_last_pipeline_stage: PositiveInt | None = None


class EarlyStoppingConfig(Section):
    """Stop when the validation loss has not improved by `min_delta` for `patience` validations, those before `start_step` not counted."""

    patience: PositiveInt = 10
    min_delta: NonNegative = 1.0e-4
    start_step: Annotated[int, Field(ge=0)] = 0
    mode: Literal["min", "max"] = "min"
    metric: Literal["val_loss", "val_bits_per_byte"] = "val_loss"


class RampupConfig(Section):
    """Batch-size ramp-up: from `start` by `increment` to the global batch size, over `samples` samples."""

    start: PositiveInt
    increment: PositiveInt
    samples: PositiveInt


class TrainConfig(Section):
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    micro_batch_size: PositiveInt
    global_batch_size: PositiveInt
    train_iters: PositiveInt
    eval_interval: PositiveInt = 100
    eval_iters: PositiveInt = 10
    log_interval: PositiveInt = 1
    exit_iteration: PositiveInt | None = None
    exit_duration_minutes: Positive | None = None
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: PositiveInt | None = None
    recompute_modules: tuple[Literal["core_attn", "mlp"], ...] = ("core_attn",)
    rampup_batch_size: RampupConfig | None = None
    early_stopping: EarlyStoppingConfig | None = None
    compile: bool = False
    loss_chunk_size: PositiveInt = 1024
    loss_scale: NonNegative = 0.0
    initial_loss_scale_power: Annotated[int, Field(ge=0, le=32)] = 16
    loss_scale_window: PositiveInt = 1000
    loss_scale_hysteresis: PositiveInt = 2
    min_loss_scale: PositiveInt = 1


class OptimizerConfig(Section):
    """`weight_decay` applies to matrices only. L1 and L2 penalties are added to the gradient's loss, not decoupled."""

    type: Literal["adamw", "adam", "sgd"] = "adamw"
    backend: Literal["auto", "torch", "torch_fused", "deepspeed_fused", "deepspeed_cpu"] = "auto"
    lr: Positive
    min_lr: NonNegative = 0.0
    lr_decay_style: Literal["linear", "cosine", "exponential", "polynomial", "inverse-square-root", "constant", "WSD"] = "cosine"
    lr_warmup_iters: Annotated[int, Field(ge=0)] | None = None
    lr_decay_iters: PositiveInt | None = None
    lr_wsd_decay_iters: PositiveInt | None = None
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential"] = "linear"
    weight_decay: NonNegative = 0.1
    betas: tuple[Probability, Probability] = (0.9, 0.95)
    eps: Positive = 1.0e-8
    momentum: Probability = 0.9
    clip_grad: NonNegative = 1.0
    l1_penalty: NonNegative = 0.0
    l2_penalty: NonNegative = 0.0


class GenerateConfig(Section):
    """Sampling for `generate`, and for the sample shown after training. Temperature 0 is greedy."""

    max_new_tokens: PositiveInt = 64
    temperature: NonNegative = 0.8
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    seed: Annotated[int, Field(ge=0)] = 0


class Recipe(Section):
    """Everything about a run. Only stages and the trainer see the whole of it."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    tokenizer: TokenizerConfig
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig
    optimizer: OptimizerConfig
    deepspeed: str = "ds_configs/zero1.json"
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    generate: GenerateConfig = GenerateConfig()
    guards: GuardsConfig = GuardsConfig()
    plan: PlanConfig = PlanConfig()
    prune: PruneConfig = PruneConfig()
    distill: DistillConfig = DistillConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    export: ExportConfig = ExportConfig()
    quality: QualityConfig = QualityConfig()

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary, padded so that every tensor-parallel rank holds an equal share."""
        return padded_vocab_size(
            self.tokenizer.vocab_size, self.model.make_vocab_size_divisible_by, self.parallel.tensor_model_parallel_size
        )

    @property
    def warmup_iters(self) -> int:
        """Steps of linear warmup: as given, else 2 % of the steps."""
        given = self.optimizer.lr_warmup_iters
        return given if given is not None else round(0.02 * self.train.train_iters)

    def layout(self, world_size: int) -> Layout:
        """The layout of this recipe on `world_size` ranks. Raises BadInputError where the degrees do not divide it."""
        p = self.parallel
        try:
            return Layout(
                world_size=world_size,
                tensor=p.tensor_model_parallel_size,
                pipeline=p.pipeline_model_parallel_size,
                virtual=p.virtual_pipeline_model_parallel_size or 1,
                sequence_parallel=p.sequence_parallel,
            )
        except ValueError as error:
            raise BadInputError(str(error)) from None

    def identity(self, stage: str) -> dict[str, Any]:
        """What makes the result of `stage` what it is: never the layout, ZeRO, micro batch, tracking, intervals or names. A stage that
        works on an earlier one's model adds that one's identity, which says the rest."""
        unused = {"num_workers", "prepare_workers", "quarantine_threshold"}
        tokenizer_and_data: dict[str, Any] = {
            "tokenizer": self.tokenizer.identity(),
            "data": self.data.model_dump(mode="json", exclude={*unused, *(READING if stage == "prepare" else ())}),
            "seed": self.run.seed,
        }
        if stage == "prepare":
            return {"stage": stage, **tokenizer_and_data}
        train = self.train.model_dump(
            mode="json", include={"precision", "global_batch_size", "train_iters", "rampup_batch_size", "early_stopping"}
        )
        training = {
            "train": train,
            "optimizer": self.optimizer.model_dump(mode="json", exclude={"backend"}),
            # Only a guard that leaves samples out changes what a run comes to.
            **({"guards": self.guards.what_is_left_out} if self.guards.rewinds else {}),
        }
        section = getattr(self, stage, None)
        if section is not None:
            own = {"stage": stage, "seed": self.run.seed, stage: section.model_dump(mode="json", exclude=_NOT_ITS_OWN)}
            if not isinstance(section, TrainedSection):
                return own
            if section.trains:
                return {**own, **training, "data": self.data.model_dump(mode="json", include=set(READING))}
            # What does not train computes and writes in that precision all the same.
            return {**own, "train": {"precision": self.train.precision}}
        return {
            "stage": stage,
            **tokenizer_and_data,
            "model": self.model.model_dump(mode="json", exclude={"attention_backend"}),
            **training,
            **({"load": self.checkpoint.load} if self.checkpoint.load is not None else {}),
        }
