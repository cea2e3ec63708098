"""The keys of a DeepSpeed JSON: which are known, and which are refused because the recipe, or nothing yet, owns them.

DeepSpeed ignores a top-level key that it does not know, so a slip of the pen would silently train something else. The tests
compare these tables with DeepSpeed's own classes.
"""

from __future__ import annotations

TOP_LEVEL = frozenset(
    {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "fp16",
        "bf16",
        "data_types",
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "aio",
        "communication_data_type",
        "seq_parallel_communication_data_type",
        "prescale_gradients",
        "gradient_predivide_factor",
        "disable_allgather",
        "disable_python_gc",
        "steps_per_print",
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "log_level",
        "comms_logger",
        "flops_profiler",
        "timers",
    }
)

SECTIONS: dict[str, frozenset[str]] = {
    "zero_optimization": frozenset(
        {
            "stage",
            "contiguous_gradients",
            "reduce_scatter",
            "reduce_bucket_size",
            "use_multi_rank_bucket_allreduce",
            "allgather_partitions",
            "allgather_bucket_size",
            "overlap_comm",
            "load_from_fp32_weights",
            "offload_param",
            "offload_optimizer",
            "sub_group_size",
            "stage3_prefetch_bucket_size",
            "stage3_param_persistence_threshold",
            "stage3_model_persistence_threshold",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "stage3_gather_16bit_weights_on_model_save",
            "stage3_use_all_reduce_for_fetch_params",
            "stage3_allgather_sequential",
            "ignore_unused_parameters",
            "parameter_alignment",
            "zero_hpz_partition_size",
            "zero_quantized_weights",
            "zero_quantized_nontrainable_weights",
            "zero_quantized_gradients",
            "memory_efficient_linear",
            "override_module_apply",
            "log_trace_cache_warnings",
            "enable_sanity_checks",
        }
    ),
    "zero_optimization.offload_param": frozenset({"device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"}),
    "zero_optimization.offload_optimizer": frozenset(
        {"device", "nvme_path", "buffer_count", "pin_memory", "pipeline_read", "pipeline_write", "fast_init"}
    ),
    "bf16": frozenset({"enabled", "immediate_grad_update", "check_grad_overflow"}),
    "fp16": frozenset(
        {
            "enabled",
            "loss_scale",
            "initial_scale_power",
            "loss_scale_window",
            "hysteresis",
            "consecutive_hysteresis",
            "min_loss_scale",
        }
    ),
    "data_types": frozenset({"grad_accum_dtype"}),
    "aio": frozenset({"block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"}),
}

_RECIPE = "the recipe owns it"
_REMOVED = "DeepSpeed has removed it"
_NOT_HERE = "largeformer does not drive it"
_FLOAT_MASTERS = "masters and moments are float32, in memory and in checkpoints: remove it"

# Key -> why it is refused, and what to use instead. A value that switches nothing on is accepted and dropped: null, "auto", what
# HARMLESS names for the key or, where it names nothing, false and {"enabled": false}.
HARMLESS: dict[str, object] = {
    "gradient_allreduce_op": "mean",
    "managed_gradient_accumulation": True,
    "sequence_parallel_size": 1,
    "zero_optimization.compute_grad_norm": True,
    "zero_optimization.stage3_module_granularity_threshold": 0,
    "zero_optimization.offload_optimizer.ratio": 1.0,
    "data_types.keep_in_fp32_modules": "auto",
}

REFUSED: dict[str, str] = {
    "optimizer": f"{_RECIPE}: use the section optimizer",
    "scheduler": f"{_RECIPE}: use optimizer.lr_decay_style and its neighbours",
    "activation_checkpointing": f"{_RECIPE}: use train.recompute_granularity",
    "torch_autocast": f"{_RECIPE}: use train.precision",
    "compile": f"{_RECIPE}: use train.compile",
    "tensor_parallel": f"{_RECIPE}: use parallel.tensor_model_parallel_size",
    "pipeline": f"{_RECIPE}: use parallel.pipeline_model_parallel_size",
    "sequence_parallel_size": f"{_RECIPE}: use parallel.sequence_parallel",
    "data_parallel_size": f"{_RECIPE}: it follows from the world size and the section parallel",
    "tensorboard": f"{_RECIPE}: use tracking.tensorboard",
    "wandb": f"{_RECIPE}: use tracking.wandb",
    "csv_monitor": f"{_RECIPE}: metrics.jsonl holds the same numbers",
    "comet": f"{_RECIPE}: use tracking.wandb",
    "monitor_config": f"{_RECIPE}: use the section tracking",
    "vocabulary_size": f"{_RECIPE}: use tokenizer.vocab_size",
    "checkpoint": f"{_RECIPE}: use the section checkpoint",
    "datastates_ckpt": f"{_RECIPE}: use the section checkpoint",
    "dataloader_drop_last": f"{_RECIPE}: a last incomplete batch is never dropped",
    "gradient_allreduce_op": "the loss is a mean over the whole global batch, so gradients are averaged: remove it",
    "managed_gradient_accumulation": "largeformer manages the accumulation boundary: remove it",
    "expert_parallel": "mixture of experts is not supported yet: remove it",
    "use_data_before_expert_parallelism": "mixture of experts is not supported yet: remove it",
    "bfloat16": "it is the old name of bf16: write bf16",
    "ddp_bf16": "it is the old name of bf16: write bf16",
    "autotuning": f"{_NOT_HERE}: remove it",
    "data_efficiency": f"{_NOT_HERE}: remove it",
    "hybrid_engine": f"{_NOT_HERE}: remove it",
    "weight_quantization": f"{_NOT_HERE}: remove it",
    "amp": f"{_REMOVED}: use train.precision",
    "nebula": f"{_REMOVED}: remove it",
    "compression_training": f"{_REMOVED}: remove it",
    "quantize_training": f"{_REMOVED}: remove it",
    "sparse_gradients": f"{_REMOVED}: remove it",
    "eigenvalue": f"{_REMOVED}: remove it",
    "sparse_attention": f"{_REMOVED}: remove it",
    "elasticity": f"{_REMOVED}: remove it",
    "graph_harvesting": f"{_REMOVED}: remove it",
    "curriculum_learning": f"{_REMOVED}: remove it",
    "progressive_layer_drop": f"{_REMOVED}: remove it",
    "zero_optimization.round_robin_gradients": "checkpoints would get one parameter's state for another's: remove it",
    "zero_optimization.offload_optimizer.ratio": "what stays on the GPU would train at a constant rate, and could not be saved: remove it",
    "bf16.bf16_master_weights_and_grads": f"{_FLOAT_MASTERS}",
    "bf16.bf16_optimizer_states": f"{_FLOAT_MASTERS}",
    "fp16.fp16_master_weights_and_grads": f"{_FLOAT_MASTERS}",
    "zero_optimization.cpu_offload": "it is the old name of offload_optimizer: write offload_optimizer",
    "zero_optimization.cpu_offload_param": "it is the old name of offload_param: write offload_param",
    "zero_optimization.cpu_offload_use_pin_memory": "it is now offload_optimizer.pin_memory and offload_param.pin_memory: write those",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "it is now stage3_gather_16bit_weights_on_model_save: write that",
    "zero_optimization.compute_grad_norm": "clipping and the log need the gradient norm: remove it",
    "zero_optimization.zenflow": f"{_NOT_HERE}: remove it",
    "zero_optimization.leaf_module": "mixture of experts is not supported yet: remove it",
    "zero_optimization.stage3_module_granularity_threshold": "modules that are gathered whole fail in the backward pass: remove it",
    "zero_optimization.save_muon_momentum_buffer_in_memory": "there is no Muon optimizer here: remove it",
    "zero_optimization.elastic_checkpoint": "largeformer's own checkpoints load at any layout: remove it",
    "zero_optimization.pipeline_loading_checkpoint": "largeformer's own checkpoints load at any layout: remove it",
    "zero_optimization.legacy_stage1": f"{_REMOVED}: remove it",
    "zero_optimization.mics_shard_size": f"{_REMOVED}: remove it",
    "zero_optimization.mics_hierarchical_params_gather": f"{_REMOVED}: remove it",
    "zero_optimization.zeropp_loco_param": f"{_REMOVED}: remove it",
    "zero_optimization.offload_optimizer.super_offload": f"{_NOT_HERE}: remove it",
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": f"{_NOT_HERE}: remove it",
    "data_types.param_dtype": f"{_RECIPE}: use train.precision",
    "data_types.buffer_dtype": f"{_RECIPE}: use train.precision",
    "data_types.keep_in_fp32_modules": f"{_RECIPE}: use train.precision",
    "fp16.auto_cast": f"{_RECIPE}: use train.precision",
}
