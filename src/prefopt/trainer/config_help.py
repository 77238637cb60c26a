"""What each option of the configs means: one text, wherever the option appears."""

from __future__ import annotations

from dataclasses import field
from typing import Any

__all__ = ["HELP", "option"]

HELP = {
    # Changed defaults of transformers.
    "learning_rate": "Initial learning rate of the optimizer.",
    "logging_steps": "Optimizer steps between two log lines; below 1: a share of all steps.",
    "logging_nan_inf_filter": "No effect: a NaN is shown as NaN, see on_nonfinite.",
    "gradient_checkpointing": "Recompute activations in the backward pass: less memory, more time. Unset: only where "
    "the largest micro-batch would not fit otherwise.",
    "bf16": "Mixed precision in bfloat16. Unset: on where the hardware has it and fp16 is not set, else float32.",
    "lr_scheduler_kwargs": "Keyword arguments of the learning-rate schedule, as JSON on the command line.",
    # Model.
    "model_init_kwargs": "Keyword arguments of from_pretrained for a model given by name, as JSON on the command line. "
    "`revision` also applies to the tokenizer or processor.",
    "trust_remote_code": "Run Python code that comes with a model or tokenizer from the Hub.",
    "router_aux_loss_coef": "Weight of the load-balancing loss of a mixture-of-experts model. Unset: what the model's "
    "config says; 0: off.",
    "disable_dropout": "Set all dropout of the policy and the reference to 0.",
    "is_encoder_decoder": "Whether the model that model_init makes is an encoder-decoder; any other model says so "
    "itself.",
    "model_adapter_name": "PEFT adapter of the given model that is trained, where it has several.",
    "ref_adapter_name": "PEFT adapter of the given model that acts as the reference.",
    "force_use_ref_model": "Let the reference be a model of its own although the model has an adapter.",
    # Data.
    "dataset_num_proc": "Processes that prepare the data set.",
    "max_length": "Longest prompt plus completion in tokens; what is longer is cut. None: nothing is cut.",
    "max_completion_length": "Longest completion in tokens, for encoder-decoder models (unset: 128); max_length is "
    "then the prompt's.",
    "truncation_mode": "Which end of a sequence that is too long is kept.",
    "pad_token": "Deprecated: set the tokenizer's pad_token and pass it as processing_class.",
    "num_completions": "Most completions that a row ranks, in its column completions; 2: pairs.",
    "on_bad_row": "What a row with nothing to learn does: it is skipped and counted, or it stops the run.",
    "image_roots": "Folders, and beginnings of URLs, within which images must lie that the data name by path or URL. "
    "Unset: the folder of the data set given on the command line, else the working directory, and the Hub's caches.",
    # Batches.
    "padding_free": "Batches without padding: the same as layout=packed.",
    "pad_to_multiple_of": "Pad the padded layout to a multiple of this many tokens. auto: 128 on Neuron, else nothing.",
    "layout": "How sequences lie in a batch: the prompt once for all its completions, all sequences one after another, "
    "rows padded to one length, or the best of these that the model can do.",
    "tokens_per_batch": "Most tokens in a micro-batch, into which the pairs of a step are packed. Unset: micro-batches "
    "of the per-device batch size.",
    # Reference.
    "precompute_ref_log_probs": "Score all data with the reference first; what was scored once is read from the cache.",
    "precompute_ref_batch_size": "Pairs per batch of that pass; unset: the per-device batch size.",
    "sync_ref_model": "TR-DPO: move the reference towards the policy now and then.",
    "ref_model_mixup_alpha": "TR-DPO: the policy's share in the reference after a move.",
    "ref_model_sync_steps": "TR-DPO: optimizer steps between two moves.",
    # Objective.
    "loss_type": "Loss, or several losses that are added with loss_weights.",
    "loss_weights": "Weight of each loss in loss_type; unset: 1 for each.",
    "beta": "Strength of the preference term: how fast it saturates, or how far the policy may leave the reference. "
    "For ipo it is the paper's tau.",
    "label_smoothing": "Assumed share of preferences that are the wrong way round.",
    "ld_alpha": "LD-DPO: weight, from 0 to 1, of the tokens by which one completion is longer than the other.",
    "ranking": "How a row of more than two completions becomes one loss: the mean over its pairs, or the likelihood of "
    "its order.",
    "use_weighting": "WPO: weight each pair by how likely the policy finds its completions.",
    "f_divergence_type": "Divergence between policy and reference.",
    "f_alpha_divergence_coef": "The alpha of f_divergence_type=alpha_divergence.",
    "discopop_tau": "Temperature of the discopop loss.",
    "bco_shift": "Subtract the running mean reward in bco_pair, as in its paper.",
    "cpo_alpha": "Weight of the chosen completion's negative log-likelihood; 0 with loss_type=simpo is SimPO.",
    "simpo_gamma": "Target margin of the simpo and alphapo losses.",
    "alpha": "AlphaPO: shape of the reward (1 - p^-alpha) / alpha; 0: the log-probability.",
    "tpo_alpha": "Weight of the gold completion's negative log-likelihood; with 0 the gold completion is not needed.",
    "tpo_l_gamma": "Target margin of the tpo-l loss.",
    # Run.
    "activation_offloading": "Keep saved activations in CPU memory.",
    "generate_during_eval": "Let policy and reference complete a few prompts of the evaluation set before training, at "
    "every evaluation and after training; for the log, the trackers and samples.jsonl.",
    "num_eval_samples": "How many prompts generate_during_eval completes of each evaluation set.",
    "eval_sample_tokens": "Longest completion of generate_during_eval; unset: max_completion_length, or 128.",
    "on_nonfinite": "What a step with a NaN or infinite loss or gradient does: it stops the run before the update, or "
    "it is left out with a warning; ten in a row stop it too.",
    "allow_changes": "Resume although options, data, model or reference are not those of the checkpoint's run: what "
    "differs is said, and the new values act.",
    "full_logits_for_metrics": "Give compute_metrics the full logits too; they take much memory.",
    # The model of a command line, and its adapter.
    "model_name_or_path": "Folder or Hub name of the model to train.",
    "model_revision": "Branch, tag or commit of the model on the Hub.",
    "dtype": "Precision of the loaded weights.",
    "attn_implementation": "Attention implementation of the model; unset: its default.",
    "use_peft": "Train a LoRA adapter instead of all weights.",
    "lora_r": "Rank of the adapter.",
    "lora_alpha": "Scale of the adapter, before the division by its rank.",
    "lora_dropout": "Dropout in front of the adapter.",
    "lora_target_modules": "Modules with an adapter; unset: the model's default.",
    "lora_target_parameters": "Parameters with an adapter.",
    "lora_modules_to_save": "Modules that are trained in full beside the adapter.",
    "lora_task_type": "Task that PEFT is told.",
    "use_rslora": "Scale by lora_alpha / sqrt(rank).",
    "use_dora": "Split weights into magnitude and direction (DoRA).",
    "load_in_8bit": "Quantise the base model to 8 bits; needs an adapter.",
    "load_in_4bit": "Quantise the base model to 4 bits; needs an adapter.",
    "bnb_4bit_quant_type": "Data type of 4-bit weights.",
    "use_bnb_nested_quant": "Quantise the quantisation constants too.",
    "bnb_4bit_quant_storage": "Data type in which 4-bit weights are stored.",
    # The data set of a command line.
    "dataset_name": "Hub name, folder or file of the data set.",
    "dataset_config": "Configuration of the data set, where it has several.",
    "dataset_train_split": "Split to train on.",
    "dataset_test_split": "Split to evaluate on.",
    "dataset_streaming": "Stream the data set instead of loading it.",
    "ignore_bias_buffers": "Leave boolean buffers out of what distributed training synchronises.",
    "user_set": "Names of the options that were set by hand. Filled in by itself.",
}


def option(
    name: str,
    default: Any,
    *,
    choices: tuple[str, ...] = (),
    bare_flag: bool = False,
    several: bool = False,
    kw_only: bool = False,
) -> Any:
    """A dataclass field for ``name`` with its help text. A list as default is copied for each config.

    For parsers of the command line: ``bare_flag`` lets a ``bool | None`` be given without a value, meaning True;
    ``several`` says that a ``str | list[str]`` has a default, which parsers expect of lists as a factory.
    """
    metadata: dict[str, Any] = {"help": HELP[name]}
    if choices:
        metadata["choices"] = list(choices)
    if bare_flag:
        metadata |= {"nargs": "?", "const": True}
    if several:
        metadata["default"] = default
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata, kw_only=kw_only)
    return field(default=default, metadata=metadata, kw_only=kw_only)
