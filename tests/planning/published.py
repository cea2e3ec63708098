"""Published training runs whose layout and speed are both stated: what a plan's times are fitted to, and checked against.

Every second row, in the order of the table, is what the constants of `planning/efficiency.py` are fitted to; the others are held out.
FLOPs that a source states are turned into seconds by the source's own formula. MPT's long sequences are left out: its attention of
that time was another kernel. So are runs with recomputation that this package does not have ("selective op").
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from largeformer.config.deepspeed import ZeroConfig
from largeformer.config.schema import Recipe
from largeformer.planning.hardware import Cluster, cluster_of
from largeformer.planning.inventory import inventories
from largeformer.planning.step import Job

KORTHIKANTI = "Korthikanti et al. 2022, arXiv:2205.05198, tables 3 and 5"
MT_NLG = "Smith et al. 2022, arXiv:2201.11990, sections 2.3, 2.4 and 3.2"
LLAMA3 = "Grattafiori et al. 2024, arXiv:2407.21783, tables 3 and 4"
TITAN_A100 = "pytorch/torchtitan, docs/performance.md at 0413364"
TITAN_H100 = "pytorch/torchtitan, benchmarks/asyncTP_llama3_h100_2025-06_torchtitan.md at 2887250"
MPT = "mosaicml/llm-foundry, scripts/train/benchmarking/README.md at 061f2c7"

GPT = {"normalization": "LayerNorm", "activation": "gelu_tanh", "position_embedding": "learned", "add_bias_linear": True}
UNFUSED = {**GPT, "attention_backend": "local", "tie_embeddings": True, "seq_length": 2048}
LLAMA = {"normalization": "RMSNorm", "activation": "swiglu", "position_embedding": "rope"}
MPT_SHAPE = {"normalization": "LayerNorm", "activation": "gelu", "position_embedding": "none", "tie_embeddings": True}

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CORE = {"recompute_granularity": "selective"}


def shape(layers: int, hidden: int, heads: int, **more: Any) -> dict[str, Any]:
    return {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, **more}


MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "GPT 22B": ({**UNFUSED, **shape(48, 6144, 64)}, 51200),
    "GPT 175B": ({**UNFUSED, **shape(96, 12288, 96)}, 51200),
    "GPT 530B": ({**UNFUSED, **shape(105, 20480, 128)}, 51200),
    "GPT 1T": ({**UNFUSED, **shape(128, 25600, 160)}, 51200),
    "Llama 3 405B": ({**LLAMA, **shape(126, 16384, 128, num_query_groups=8, ffn_hidden_size=53248, seq_length=8192)}, 128256),
    "Llama 3 405B, 128 layers": (
        {**LLAMA, **shape(128, 16384, 128, num_query_groups=8, ffn_hidden_size=53248, seq_length=8192)},
        128256,
    ),
    "Llama 3 70B": ({**LLAMA, **shape(80, 8192, 64, num_query_groups=8, ffn_hidden_size=28672, seq_length=8192)}, 128256),
    "Llama 3 8B": ({**LLAMA, **shape(32, 4096, 32, num_query_groups=8, ffn_hidden_size=14336, seq_length=8192)}, 128256),
    "Llama 2 70B": ({**LLAMA, **shape(80, 8192, 64, num_query_groups=8, ffn_hidden_size=28672, seq_length=4096)}, 32000),
    "Llama 2 13B": ({**LLAMA, **shape(40, 5120, 40, ffn_hidden_size=13824, seq_length=4096)}, 32000),
    "MPT 1B": ({**MPT_SHAPE, **shape(24, 2048, 16)}, 50368),
    "MPT 3B": ({**MPT_SHAPE, **shape(32, 2560, 20)}, 50368),
    "MPT 7B": ({**MPT_SHAPE, **shape(32, 4096, 32)}, 50368),
    "MPT 13B": ({**MPT_SHAPE, **shape(40, 5120, 40)}, 50368),
    "MPT 30B": ({**MPT_SHAPE, **shape(48, 7168, 56)}, 50368),
    "MPT 70B": ({**MPT_SHAPE, **shape(80, 8192, 64)}, 50368),
}


@dataclass(frozen=True)
class Run:
    """tokens_per_gpu_s: as measured. zero: the stage that partitions as the run did; overlap: whether its system hides the exchange
    between data-parallel ranks behind computation."""

    model: str
    gpu: str
    gpus: int
    tokens_per_gpu_s: float
    source: str
    global_batch: int
    micro_batch: int = 1
    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    first: int | None = None
    last: int | None = None
    sequence_parallel: bool = False
    zero: int = 1
    overlap: bool = True
    seq_length: int | None = None
    train: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        degrees = "".join(
            f", {name}{size}" for name, size in (("TP", self.tensor), ("PP", self.pipeline), ("VP", self.virtual or 1)) if size > 1
        )
        length = f", s={self.seq_length}" if self.seq_length else ""
        recompute = {"full": ", recomputed", "selective": ", attention recomputed"}.get(self.train.get("recompute_granularity", ""), "")
        sharded = ", ZeRO 3" if self.zero == 3 else ""
        return f"{self.model}, {self.gpus} x {self.gpu}{degrees}{sharded}{length}{recompute}"

    @property
    def recipe(self) -> Recipe:
        model, vocabulary = MODELS[self.model]
        model = {**model, **({"seq_length": self.seq_length} if self.seq_length else {})}
        parallel = {
            "tensor_model_parallel_size": self.tensor,
            "pipeline_model_parallel_size": self.pipeline,
            "virtual_pipeline_model_parallel_size": self.virtual,
            "sequence_parallel": self.sequence_parallel,
            "num_layers_in_first_pipeline_stage": self.first,
            "num_layers_in_last_pipeline_stage": self.last,
        }
        train = {"micro_batch_size": self.micro_batch, "global_batch_size": self.global_batch, "train_iters": 1, **self.train}
        return Recipe.model_validate(
            {
                "run": {"name": self.model},
                "model": model,
                "tokenizer": {"vocab_size": vocabulary},
                "data": {"sources": [{"path": "mock"}]},
                "parallel": parallel,
                "train": train,
                "optimizer": {"lr": 1e-4},
                "plan": {"gpu": self.gpu},
            }
        )

    @property
    def cluster(self) -> Cluster:
        return cluster_of(self.recipe.plan)

    @property
    def deepspeed(self) -> dict[str, Any]:
        return {"zero_optimization": {"stage": self.zero, "overlap_comm": self.overlap, "reduce_bucket_size": 50_000_000}}

    @property
    def job(self) -> Job:
        recipe = self.recipe
        assert ZeroConfig.of(self.deepspeed).stage == self.zero
        return Job(recipe, recipe.layout(self.gpus), self.deepspeed, self.cluster, inventories(recipe))


def seconds(model: str, gpus: int, batch: int, step: float) -> float:
    """Tokens a GPU and second, from the seconds of a step."""
    return batch * MODELS[model][0]["seq_length"] / (step * gpus)


def megatron(model: str, gpus: int, batch: int, step: float, **more: Any) -> Run:
    """A row of Korthikanti et al.: tensor parallel 8, no overlap of the gradients' reduction."""
    return Run(model, "a100", gpus, seconds(model, gpus, batch, step), KORTHIKANTI, batch, tensor=8, zero=1, overlap=False, **more)


def llama3(gpus: int, batch: int, tflops: float, virtual: int | None = None) -> Run:
    """Tensor parallel 8, pipeline 16; the first and the last stage hold one layer less. TFLOP/s are 6 a parameter and token, and
    attention over half of the square."""
    tokens = tflops * 1e12 / (6 * 405.9e9 + 6 * 126 * 8192 * 16384)
    model, ends = ("Llama 3 405B, 128 layers", None) if virtual else ("Llama 3 405B", 7)
    return Run(
        model, "h100", gpus, tokens, LLAMA3, batch, tensor=8, pipeline=16, virtual=virtual, first=ends, last=ends, sequence_parallel=True
    )


def mpt(model: str, gpu: str, gpus: int, length: int, micro: int, batch: int, rate: float, recomputed: bool) -> Run:
    return Run(model, gpu, gpus, rate, MPT, batch, micro, zero=3, seq_length=length, train=FULL if recomputed else {})


RUNS: tuple[Run, ...] = (
    megatron("GPT 22B", 8, 4, 1.42, micro_batch=4, train=FULL),
    megatron("GPT 22B", 8, 4, 1.10, micro_batch=4, train=CORE, sequence_parallel=True),
    megatron("GPT 175B", 64, 64, 18.13, pipeline=8, virtual=3, train=FULL),
    megatron("GPT 175B", 64, 64, 13.75, pipeline=8, virtual=3, train=CORE, sequence_parallel=True),
    megatron("GPT 530B", 280, 280, 49.05, pipeline=35, virtual=3, train=FULL),
    megatron("GPT 530B", 280, 280, 37.83, pipeline=35, virtual=3, train=CORE, sequence_parallel=True),
    megatron("GPT 530B", 2240, 2240, 39.15, pipeline=35, virtual=3, train=CORE, sequence_parallel=True),
    megatron("GPT 1T", 512, 512, 94.42, pipeline=64, train=FULL),
    megatron("GPT 1T", 512, 512, 71.49, pipeline=64, train=CORE, sequence_parallel=True),
    Run("GPT 530B", "a100", 2240, seconds("GPT 530B", 2240, 1920, 60.1), MT_NLG, 1920, tensor=8, pipeline=35, overlap=False, train=FULL),
    Run("GPT 530B", "a100", 3360, seconds("GPT 530B", 3360, 1920, 44.4), MT_NLG, 1920, tensor=8, pipeline=35, overlap=False, train=FULL),
    Run("Llama 3 70B", "a100", 64, 331.0, TITAN_A100, 64, zero=3, train=FULL),
    Run("Llama 2 70B", "a100", 64, 353.0, TITAN_A100, 128, 2, zero=3, train=FULL),
    Run("Llama 2 13B", "a100", 64, 2162.0, TITAN_A100, 128, 2, zero=3),
    Run("Llama 3 70B", "h100", 256, 597.3, TITAN_H100, 512, 16, tensor=8, sequence_parallel=True, zero=3, train=FULL),
    mpt("MPT 70B", "h100", 64, 2048, 8, 2048, 1039, True),
    mpt("MPT 70B", "a100", 64, 2048, 8, 2048, 410, True),
    mpt("MPT 30B", "h100", 32, 2048, 14, 1344, 2308, True),
    mpt("MPT 30B", "a100", 8, 2048, 3, 504, 916, True),
    mpt("MPT 30B", "h100", 8, 4096, 1, 168, 1802, True),
    mpt("MPT 13B", "h100", 64, 2048, 2, 128, 4800, False),
    mpt("MPT 13B", "a100", 8, 2048, 2, 48, 2262, False),
    mpt("MPT 13B", "h100", 8, 4096, 10, 240, 4717, True),
    mpt("MPT 13B", "a100", 8, 4096, 10, 240, 2060, True),
    mpt("MPT 7B", "h100", 8, 2048, 6, 48, 10643, False),
    mpt("MPT 7B", "h100", 8, 4096, 16, 256, 8611, True),
    mpt("MPT 7B", "a100", 8, 2048, 6, 96, 4641, False),
    mpt("MPT 7B", "a100", 8, 4096, 16, 256, 3684, True),
    mpt("MPT 3B", "h100", 64, 2048, 6, 1152, 22525, False),
    mpt("MPT 3B", "h100", 8, 4096, 5, 240, 20964, False),
    mpt("MPT 3B", "a100", 8, 2048, 10, 160, 10811, False),
    mpt("MPT 1B", "h100", 8, 2048, 14, 112, 45455, False),
    mpt("MPT 1B", "a100", 8, 4096, 7, 224, 17807, False),
)
# The number of virtual stages is not stated: 1 and, with two layers more to make them equal, 8. Beside the table.
UNDERSTATED = (llama3(8192, 2048, 430.0), llama3(16384, 2048, 400.0), llama3(8192, 2048, 430.0, 8), llama3(16384, 2048, 400.0, 8))
FITTED, HELD_OUT = RUNS[::2], RUNS[1::2]
