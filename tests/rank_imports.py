"""What the process imports from which test ranks are forked. Importing it anywhere else changes the accelerator of that process."""

import os

os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}  # DeepSpeed decides as it is imported

import deepspeed  # noqa: F401
import megatron.core.models.gpt  # noqa: F401

import largeformer.stages.pretrain
import largeformer.training.trainer  # noqa: F401
