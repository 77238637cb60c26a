"""Which options a resumed run may have other values of."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

__all__ = ["CHANGES", "Change", "change_of", "changed_options", "depends_on_total"]


class Change(StrEnum):
    """What another value of an option does to a run that is resumed."""

    REFUSED = "refused"
    """Other numbers from here on."""
    FREE = "free"
    """The same numbers, up to rounding where it says how they are computed."""
    TOTAL = "total"
    """How long the run is: allowed; a schedule that depends on it is said."""
    PAIRS = "pairs"
    """A factor of the pairs per optimizer step, of which the product counts."""
    ROWS = "rows"
    """Acts through the prepared rows: these are compared; of a stream, whose rows are not all known, it is refused."""
    OUTCOME = "outcome"
    """Acts through the model that is loaded, its reference or its precision: these are compared."""


_NAMES: dict[Change, str] = {
    Change.REFUSED: """
        accelerator_config adam_beta1 adam_beta2 adam_epsilon alpha bco_shift beta cpo_alpha data_seed
        dataloader_drop_last dataloader_in_order deepspeed disable_dropout discopop_tau f_alpha_divergence_coef
        f_divergence_type ignore_data_skip label_smoothing ld_alpha learning_rate loss_type loss_weights
        lr_scheduler_kwargs lr_scheduler_type max_grad_norm model_adapter_name neftune_noise_alpha num_completions
        optim optim_args optim_target_modules ranking ref_adapter_name ref_model_mixup_alpha ref_model_sync_steps
        router_aux_loss_coef seed simpo_gamma sync_ref_model tf32 tpo_alpha tpo_l_gamma train_sampling_strategy
        use_weighting warmup_steps weight_decay""",
    Change.FREE: """
        activation_checkpointing activation_checkpointing_kwargs activation_offloading allow_changes
        auto_find_batch_size average_tokens_across_devices batch_eval_metrics bf16_full_eval
        dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers
        dataloader_pin_memory dataloader_prefetch_factor dataset_num_proc ddp_backend ddp_broadcast_buffers
        ddp_bucket_cap_mb ddp_find_unused_parameters
        ddp_static_graph ddp_timeout debug disable_tqdm do_eval do_predict do_train enable_jit_checkpoint
        eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start eval_sample_tokens eval_steps
        eval_strategy eval_use_gather_object fp16_full_eval fsdp fsdp_config full_determinism full_logits_for_metrics
        generate_during_eval gradient_checkpointing gradient_checkpointing_kwargs greater_is_better hub_always_push
        hub_model_id hub_private_repo hub_revision hub_strategy hub_token image_roots include_for_metrics
        include_num_input_tokens_seen label_names label_smoothing_factor layout length_column_name
        liger_kernel_config load_best_model_at_end local_rank log_level log_level_replica log_on_each_node
        logging_first_step logging_nan_inf_filter logging_steps logging_strategy metric_for_best_model
        num_eval_samples on_nonfinite output_dir pad_to_multiple_of padding_free parallelism_config
        per_device_eval_batch_size precompute_ref_batch_size precompute_ref_log_probs prediction_loss_only project
        push_to_hub remove_unused_columns report_to restore_callback_states_from_checkpoint resume_from_checkpoint
        run_name save_on_each_node save_only_model save_steps save_strategy save_total_limit skip_memory_metrics
        tokens_per_batch torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps
        trackio_bucket_id trackio_space_id trackio_static_space_id use_cache use_cpu use_liger_kernel user_set""",
    Change.TOTAL: "max_steps num_train_epochs",
    Change.PAIRS: "gradient_accumulation_steps per_device_train_batch_size",
    Change.ROWS: "max_completion_length max_length on_bad_row pad_token truncation_mode",
    Change.OUTCOME: "bf16 force_use_ref_model fp16 is_encoder_decoder model_init_kwargs trust_remote_code",
}

CHANGES: dict[str, Change] = {name: change for change, names in _NAMES.items() for name in names.split()}
"""Option -> what a change of it does."""

OF_ANY_LENGTH = frozenset({"constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy"})
"""Learning-rate schedules that do not know how many steps there will be."""


def change_of(option: str) -> Change:
    """What a change of ``option`` does; one that nobody has judged is refused."""
    return CHANGES.get(option, Change.REFUSED)


def changed_options(was: Mapping[str, Any], now: Mapping[str, Any], change: Change) -> dict[str, tuple[Any, Any]]:
    """Options of one kind that differ -> (value then, value now). Options that only one of the two knows are left out:
    another version of a library has them.

    Args:
        was: option -> value, as JSON has them.
        now: the same.
        change: the kind.
    """
    return {
        name: (was[name], now[name])
        for name in sorted(was.keys() & now.keys())
        if change_of(name) is change and was[name] != now[name]
    }


def depends_on_total(options: Mapping[str, Any]) -> bool:
    """Whether the learning rate of a step depends on how many steps the run has."""
    warmup = options.get("warmup_steps") or 0
    return options["lr_scheduler_type"] not in OF_ANY_LENGTH or 0 < warmup < 1
