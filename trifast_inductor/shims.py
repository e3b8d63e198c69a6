"""Opt-in repairs for graph breaks inside the attention of published models; each names its cause."""

import importlib

import torch


def esmfold() -> None:
    """Let transformers' ESMFold compile without graph breaks in bfloat16 and under autocast.

    Its `softmax_no_cast` asks `is_deepspeed_initialized()`, which imports deepspeed in a `try`: a graph break between
    the logits and the softmax. The answer does not change in a process, so Dynamo may take it as a constant.
    Needed for transformers 5.x; remove once it asks without importing.
    """
    module = importlib.import_module("transformers.models.esm.modeling_esmfold")
    torch.compiler.assume_constant_result(module.is_deepspeed_initialized)
