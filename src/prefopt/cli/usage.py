"""What ``--help`` prints: short, and without importing anything heavy. ``--help-all`` of a method asks the parser."""

from __future__ import annotations

import textwrap

__all__ = ["ALONE", "COMMANDS", "METHODS", "TRAIN", "method_usage", "usage"]

METHODS = {
    "dpo": "DPO and its 15 losses, against a reference model",
    "cpo": "CPO, SimPO, AlphaPO: no reference model",
    "tpo": "TPO: pairs, and a gold completion (column 'reference')",
}
COMMANDS = {
    **{name: f"Train with {text}." for name, text in METHODS.items()},
    "train": "Train as a YAML file says: prefopt train RUN.yaml (its key 'method' names dpo, cpo or tpo).",
    "check": "Before a run: options, every row, one real step, memory and time. Status 0: it will run.",
    "show": "Before a run: what the model sees of rows, token by token, and what it is trained on.",
    "stats": "What is in a data set: lengths, duplicates, bias to length, what is cut, what is saved.",
    "recipes": "Commented run files for every method: prefopt recipes ls, prefopt recipes cp NAME.",
    "report": "After runs: one HTML file of curves, diagnosis, pairs and samples; of several, side by side.",
    "compare": "A tuned model beside its base on preference data: accuracy, margins, KL, length, samples.",
    "merge": "Merge a run's adapter into its base, checked: the same logits, the same text.",
    "sweep": "Many configurations over one data set, at the same time: all curves early.",
    "env": "Show versions, devices, and what this machine can do. Paste it into a bug report.",
    "quickstart": "Train a small model on generated preferences and show before and after. No download.",
}

ALONE = {"recipes", "env", "quickstart"}
"""What does something without arguments; all others show their help."""
WIDTH = 80
"""Characters of a line of help."""
TRAIN = """\
usage: prefopt train RUN.yaml [--option value ...]

Train as a YAML file says; its key 'method' names dpo (the default), cpo or tpo.

  --option value                wins over the file
  prefopt METHOD --help         the common options of the file's method
  prefopt METHOD --help-all     every option

  prefopt recipes cp dpo        a commented file to begin with
  prefopt check dpo.yaml        will it go through?
  prefopt train dpo.yaml --beta 0.2 --num_processes 8
"""

COMMON = """\
model
  --model_name_or_path NAME     folder or Hub name
  --dtype float32               auto, bfloat16, float16, float32:
                                precision of the weights
  --attn_implementation NAME    attention of the model
  --use_peft                    train a LoRA adapter: --lora_r 16,
                                --lora_alpha 32, --lora_target_modules ...
  --load_in_4bit                quantise the base model (with --use_peft)

data
  --dataset_name NAME           Hub name, folder or file
                                (JSON, JSONL, Parquet, CSV, Arrow)
  --dataset_train_split train   and --dataset_test_split test,
                                --dataset_config, --dataset_streaming
  --max_length 1024             prompt and completion; 'none' cuts nothing
  --on_bad_row skip             or error: rows with nothing to learn

training
  --output_dir DIR              checkpoints, model, tokenizer
  --learning_rate {rate:<14}--num_train_epochs 3, --max_steps N,
                                --lr_scheduler_type cosine
  --per_device_train_batch_size 8  --gradient_accumulation_steps 1
  --eval_strategy steps         with --eval_steps N: evaluate on the test split
  --bf16 / --fp16               mixed precision
                                (bf16 is on where the hardware has it)
  --layout auto                 shared_prompt, packed or padded batches
  --report_to none              trackers
"""

OBJECTIVE = {
    "dpo": """\
loss
  --beta 0.1                    --label_smoothing 0.0
  --loss_type sigmoid           hinge ipo exo_pair nca_pair robust bco_pair
                                sppo_hard aot aot_unpaired apo_zero apo_down
                                discopop sft sigmoid_norm
                                several, with --loss_weights
  --precompute_ref_log_probs    score the data with the reference first
  --sync_ref_model              TR-DPO
                                --ld_alpha A: LD-DPO; --use_weighting: WPO
  --f_divergence_type NAME      reverse_kl forward_kl js_divergence
                                alpha_divergence
""",
    "cpo": """\
loss
  --beta 0.1                    --label_smoothing 0.0
  --loss_type sigmoid           hinge ipo simpo alphapo
                                several, with --loss_weights
  --cpo_alpha 1.0               weight of the chosen completion's likelihood
                                0 with simpo is SimPO
  --simpo_gamma 0.5             target margin of simpo
  --alpha 0.0                   AlphaPO's shape of the reward
""",
    "tpo": """\
loss
  --beta 0.01                   --label_smoothing 0.0
  --loss_type sigmoid           hinge ipo tpo-l; several, with --loss_weights
  --tpo_alpha 1.0               weight of the gold completion's likelihood
                                0: no gold column needed
  --tpo_l_gamma 0.5             target margin of tpo-l
""",
}

LAUNCH = """\
several processes
  --num_processes N             hands over to accelerate launch,
                                with any other flag of it
  --accelerate_config NAME      single_gpu multi_gpu fsdp2 zero1 zero2 zero3
                                cpu, or a file

  --config RUN.yaml             the same options in YAML; the command line wins
  --help-all                    every option
"""


def usage() -> str:
    """The overview of all commands."""
    margin = " " * 14
    lines = [textwrap.fill(f"  {name:<12}{text}", WIDTH, subsequent_indent=margin) for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: prefopt COMMAND [options]",
            "",
            "Preference training of language models.",
            "",
            *lines,
            "",
            "  prefopt quickstart",
            "  prefopt recipes cp dpo && prefopt check dpo.yaml && prefopt train dpo.yaml",
            "  prefopt dpo --model_name_or_path MODEL --dataset_name DATA --output_dir OUT",
            "  prefopt cpo --config run.yaml --loss_type simpo --cpo_alpha 0",
            "",
            "prefopt COMMAND --help shows the options of a command,",
            "prefopt METHOD --help-all (dpo, cpo, tpo) every option of a run.",
        ]
    )


def method_usage(method: str) -> str:
    """The common options of ``prefopt METHOD``."""
    rate = "5e-7" if method == "tpo" else "1e-6"
    head = f"usage: prefopt {method} [--config RUN.yaml] [--option value ...]\n\n{METHODS[method]}.\n"
    return "\n".join([head, COMMON.format(rate=rate), OBJECTIVE[method], LAUNCH])
