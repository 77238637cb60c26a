"""Each recipe says where its numbers come from, is the objective of its paper, and trains."""

from __future__ import annotations

import json
import logging
import math
import re
import warnings
from collections.abc import Callable
from math import exp, log
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import save_rows, save_tiny

from prefopt.cli.launch import CONFIGS, LAUNCHED, plan_launch
from prefopt.cli.main import main
from prefopt.cli.names import check_names
from prefopt.cli.train import make_parser
from prefopt.recipes.catalogue import FIRST as METHODS_FIRST
from prefopt.recipes.catalogue import FOLDER, recipe, recipe_names
from prefopt.trainer.citations import cited_papers
from prefopt.types import SequenceStats

NAMES = recipe_names()


def configs(name: str) -> Any:
    return make_parser(recipe(name).method).parse_args_and_config(
        ["--config", str(FOLDER / f"{name}.yaml"), "--use_cpu"], return_remaining_strings=True
    )


# -- what they say -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_it_is_how_it_runs_and_whose_numbers_it_has(name: str) -> None:
    own = recipe(name)
    first, second, third, *lines = own.text.splitlines()
    assert re.fullmatch(r"# [\w -]+: [^:].*\.", first)
    assert (second, third) == (f"# prefopt train {name}.yaml", "#")
    assert lines[0].startswith("# Paper")
    assert own.papers
    assert re.search(r"^# Values: ", own.text, flags=re.MULTILINE)
    assert max(map(len, own.text.splitlines())) <= 120


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_a_comment(name: str) -> None:
    without = [line for line in recipe(name).text.splitlines() if re.match(r"\w+: ", line) and "  # " not in line]
    assert without == []


def test_every_file_is_a_recipe_and_no_two_are_alike() -> None:
    assert sorted(NAMES) == sorted(path.stem for path in FOLDER.glob("*.yaml"))
    assert len({recipe(name).purpose for name in NAMES}) == len({recipe(name).options["output_dir"] for name in NAMES})
    assert all(recipe(name).options["output_dir"] == f"runs/{name}" for name in NAMES)


@pytest.mark.parametrize("name", METHODS_FIRST)
def test_papers_have_the_numbers_that_the_model_card_cites(name: str) -> None:
    args = configs(name)[1]
    cited = cited_papers(recipe(name).method, args.loss_names, vars(args))
    assert set(recipe(name).papers) <= {paper.arxiv for paper in cited}


# -- what they mean ----------------------------------------------------------------------------------------------------

CHOSEN, REJECTED, GOLD = (-30.0, 20), (-50.0, 25), (-12.0, 10)
"""Sum of log-probs (nats) and tokens of each completion under the policy."""
REFERENCE = {"chosen": -34.0, "rejected": -47.0}
W, L, MEAN_W, MEAN_L, MEAN_GOLD = -30.0, -50.0, -1.5, -2.0, -1.2
D_W, D_L = 4.0, -3.0
"""Log-ratios: -30 + 34 and -50 + 47."""


def sigma(z: float) -> float:
    return 1 / (1 + exp(-z))


DPO = -log(sigma(0.1 * (D_W - D_L)))  # eq. 7 at beta 0.1
SHIFT = (0.1 * D_W + 0.1 * D_L) / 2  # BCO's delta after this one pair
EQUATIONS: dict[str, float] = {
    "dpo": DPO,
    "simpo": -log(sigma(2.5 / 20 * W - 2.5 / 25 * L - 1.375)),  # eq. 6
    "cpo": -log(sigma(0.1 * W - 0.1 * L)) - 1.0 * MEAN_W,  # eq. 3 and its NLL, per token here
    "cpo-simpo": -log(sigma(10 * MEAN_W - 10 * MEAN_L - 5.4)) - 0.05 * MEAN_W,
    "alphapo": -log(sigma(2.5 * ((1 - exp(1.5) ** 0.25) / 0.25 - (1 - exp(2.0) ** 0.25) / 0.25) - 0.1)),
    "tpo": -log(sigma(0.01 * (W - L))) - 1.0 * MEAN_GOLD,
    "tpo-l": -log(sigma(2.0 * (MEAN_W - MEAN_L) - 1.6)) - 0.05 * MEAN_GOLD,
    "mpo": 0.8 * DPO
    + 0.2 * (-log(sigma(0.1 * D_W - SHIFT)) - log(sigma(-(0.1 * D_L - SHIFT))))
    + 1.0 * -MEAN_W,  # w_p preference + w_q quality + w_g generation
    "ipo": (D_W / 20 - D_L / 25 - 1 / (2 * 0.5)) ** 2,  # eq. 17, log-ratios per token
    "robust": (-0.9 * log(sigma(0.1 * 7)) + 0.1 * log(sigma(-0.1 * 7))) / (1 - 2 * 0.1),
    "tr-dpo": -log(sigma(0.05 * (D_W - D_L))),
    "lora": DPO,
    "qlora": -log(sigma(0.01 * (D_W - D_L))),
    "vlm": DPO,
    "fsdp2": -log(sigma(0.01 * (D_W - D_L))),
    "long-context": DPO,
    "cluster": DPO,
}
"""The loss of one pair by the paper's equation, with the paper's numbers written out."""


def stats(total: float, num_tokens: int) -> SequenceStats:
    each = torch.full((num_tokens,), total / num_tokens, dtype=torch.float64)
    return SequenceStats(each.sum()[None], torch.tensor([float(num_tokens)], dtype=torch.float64), token_logps=each)


@pytest.mark.parametrize("name", NAMES)
def test_the_objective_is_the_papers_equation(name: str) -> None:
    objective = configs(name)[1].objective()
    policy = {"chosen": stats(*CHOSEN), "rejected": stats(*REJECTED), "gold": stats(*GOLD)}
    reference = {"chosen": stats(REFERENCE["chosen"], 20), "rejected": stats(REFERENCE["rejected"], 25)}
    terms = objective(policy, reference if objective.needs_reference else None).terms
    loss = sum(term.weight * float(term.values.mean()) for term in terms)
    assert loss == pytest.approx(EQUATIONS[name], rel=1e-9)


# learning rate, pairs of a step on one device (fsdp2: on eight), schedule, warm-up, tokens: what the source says
TRAINING: dict[str, tuple[float, int, str, float, int]] = {
    "dpo": (1e-6, 64, "constant_with_warmup", 150, 1024),
    "simpo": (1e-6, 128, "cosine", 0.1, 2048),
    "cpo": (1e-4, 128, "inverse_sqrt", 0.01, 512),
    "cpo-simpo": (1e-6, 128, "cosine", 0.1, 2048),
    "alphapo": (7e-7, 128, "cosine", 0.1, 2048),
    "tpo": (5e-7, 64, "cosine", 0.1, 1024),
    "tpo-l": (5e-7, 64, "cosine", 0.1, 1024),
    "mpo": (5e-6, 256, "cosine", 0.03, 2048),
    "ipo": (1e-6, 64, "cosine", 0.1, 1024),
    "robust": (1e-6, 64, "cosine", 0.1, 512),
    "tr-dpo": (1e-6, 16, "cosine", 100, 1024),
    "lora": (1e-5, 64, "cosine", 0.1, 1024),
    "qlora": (5e-6, 32, "cosine", 0.1, 1024),
    "vlm": (5e-7, 32, "cosine", 0.05, 2048),
    "fsdp2": (5e-7, 128, "cosine", 0.1, 1024),
    "long-context": (1e-6, 16, "cosine", 0.1, 32768),
    "cluster": (1e-6, 64, "constant_with_warmup", 150, 1024),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_training_is_that_of_the_source(name: str) -> None:
    args = configs(name)[1]
    pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps * (8 if name == "fsdp2" else 1)
    schedule = str(args.lr_scheduler_type.value)
    assert (args.learning_rate, pairs, schedule, args.warmup_steps, args.max_length) == TRAINING[name]


OWN: dict[str, Callable[[Any, Any], bool]] = {
    "cpo": lambda args, model: (model.lora_r, model.lora_alpha, model.lora_target_modules) == (16, 32, "down_proj"),
    "mpo": lambda args, model: args.bco_shift and args.weight_decay == 0.05,
    "tr-dpo": lambda args, model: (
        (args.sync_ref_model, args.ref_model_mixup_alpha, args.ref_model_sync_steps, args.max_grad_norm)
        == (True, 0.6, 512, 2.0)
    ),
    "lora": lambda args, model: model.use_peft and model.lora_target_modules == "all-linear",
    "qlora": lambda args, model: (
        (model.load_in_4bit, model.bnb_4bit_quant_type, model.use_bnb_nested_quant, model.lora_r, model.lora_alpha)
        == (True, "nf4", True, 16, 16)
    ),
    "vlm": lambda args, model: args.weight_decay == 0.01,
    "long-context": lambda args, model: args.precompute_ref_log_probs and args.tokens_per_batch == 65536,
    "cluster": lambda args, model: args.resume_from_checkpoint == "true",
}


@pytest.mark.parametrize("name", OWN)
def test_what_a_recipe_is_for_is_in_it(name: str) -> None:
    _, args, model, *_ = configs(name)
    assert OWN[name](args, model)


def test_the_reference_moves_several_times_in_an_epoch_of_its_data() -> None:
    """A run of fewer steps than ``ref_model_sync_steps`` is plain DPO; the data set has 43,800 rows."""
    args = configs("tr-dpo")[1]
    steps = 43_800 // (args.per_device_train_batch_size * args.gradient_accumulation_steps)
    assert steps >= 3 * args.ref_model_sync_steps


@pytest.mark.parametrize("name", NAMES)
def test_no_option_is_unknown_or_without_effect(name: str, caplog: pytest.LogCaptureFixture) -> None:
    path = str(FOLDER / f"{name}.yaml")
    check_names(recipe(name).method, ["--config", path])
    with warnings.catch_warnings(record=True) as given, caplog.at_level(logging.WARNING):
        warnings.simplefilter("always", UserWarning)
        *_, rest = configs(name)
    assert [str(warning.message) for warning in given if issubclass(warning.category, UserWarning)] == []
    about_this_machine = "prefopt.trainer.precision"  # said once in a process, where there is no bfloat16
    assert [record.getMessage() for record in caplog.records if record.name != about_this_machine] == []
    assert rest == (["--accelerate_config", "fsdp2"] if name == "fsdp2" else [])


# -- that they train ---------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> str:
    return save_rows(tmp_path / "data")


def overrides(model: str, data: str, folder: Path) -> list[str]:
    """What makes two short steps of a recipe on a tiny model; everything else is the recipe's."""
    return [
        *("--model_name_or_path", model, "--dataset_name", data, "--output_dir", str(folder), "--use_cpu"),
        *("--max_steps", "2", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"),
        *("--per_device_eval_batch_size", "4", "--logging_steps", "1", "--eval_steps", "2", "--report_to", "none"),
        *("--save_strategy", "no", "--disable_tqdm", "true"),
    ]


def trained(name: str, model: str, data: str, folder: Path, *more: str) -> list[dict[str, Any]]:
    """The rows that the run has logged."""
    assert main(["train", str(FOLDER / f"{name}.yaml"), *overrides(model, data, folder), *more]) == 0
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check_rows(name: str, rows: list[dict[str, Any]]) -> None:
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in steps)
    assert any("eval_loss" in row for row in rows) == ("eval_strategy" in recipe(name).options)


NEEDS_MORE = {"vlm", "qlora"}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NEEDS_MORE])
def test_it_trains(name: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "use_peft" in recipe(name).options:
        pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(LAUNCHED, "1")  # fsdp2: this process is one that was launched
    samples = ["--num_eval_samples", "1", "--eval_sample_tokens", "2"] if name == "dpo" else []
    check_rows(name, trained(name, save_tiny(tmp_path / "model"), data, tmp_path / "out", *samples))
    adapter, model = (tmp_path / "out" / f"{kind}.safetensors" for kind in ("adapter_model", "model"))
    assert (adapter.exists(), model.exists()) == (
        "use_peft" in recipe(name).options,
        "use_peft" not in recipe(name).options,
    )


def test_it_trains_on_a_quantised_base(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    model = save_tiny(tmp_path / "model")
    check_rows("qlora", trained("qlora", model, data, tmp_path / "out", "--optim", "adamw_torch"))
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (16, 16)
    assert {"q_proj", "down_proj"} <= {name.rpartition(".")[2] for name in settings["target_modules"]}


def test_it_trains_on_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL")
    from trainer.test_vision import rows as rows_with_images
    from vision_models import processor_of, tiny_vision

    monkeypatch.chdir(tmp_path)
    processor = processor_of("llava")
    tiny_vision("llava", processor).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        rows_with_images().to_parquet(str(tmp_path / "data" / f"{split}.parquet"))
    check_rows("vlm", trained("vlm", str(tmp_path / "model"), str(tmp_path / "data"), tmp_path / "out"))


def test_fsdp2_hands_over_to_accelerate() -> None:
    *_, rest = configs("fsdp2")
    plan = plan_launch("dpo", ["--config", "fsdp2.yaml"], rest)
    assert plan is not None
    assert plan.command[plan.command.index("--config_file") + 1] == str(CONFIGS / "fsdp2.yaml")
    assert plan.command[-3:] == ("dpo", "--config", "fsdp2.yaml")
    assert yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())["fsdp_config"]["fsdp_version"] == 2


SAME_WEIGHTS = 1e-5
"""Relative norm in float32 after two steps of SGD; sums are taken in another order."""


@pytest.mark.distributed
def test_fsdp2_trains_on_two_ranks_as_on_one(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recipes.fsdp2_ranks import accelerate_environment, run, worlds

    monkeypatch.chdir(tmp_path)
    model = save_tiny(tmp_path / "model")
    *_, rest = configs("fsdp2")
    plan = plan_launch("dpo", ["--config", str(FOLDER / "fsdp2.yaml")], rest)
    assert plan is not None
    more = ["--optim", "sgd", "--learning_rate", "0.05", "--eval_strategy", "no"]
    monkeypatch.setenv(LAUNCHED, "1")
    sharded = [*overrides(model, data, tmp_path / "two"), *more, "--per_device_train_batch_size", "2"]
    world = worlds().start_world(2, tmp_path, run, sharded, tmp_path, **accelerate_environment(plan.command))
    alone = trained("fsdp2", model, data, tmp_path / "one", *more)
    world.finish()
    assert json.loads((tmp_path / "kind.json").read_text()) == "FSDP"
    both = [weights_in(tmp_path / name / "model.safetensors") for name in ("two", "one", "model")]
    difference = float((both[0] - both[1]).norm() / both[1].norm())
    assert difference <= SAME_WEIGHTS < float((both[2] - both[1]).norm() / both[1].norm())
    assert alone[0]["loss"] == pytest.approx(log(2), rel=1e-4)


def weights_in(path: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return torch.cat([tensor.flatten().double() for _, tensor in sorted(load_file(path).items())])
