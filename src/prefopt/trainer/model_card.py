"""The model card that goes with every checkpoint."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from prefopt.reference.adapters import is_peft
from prefopt.scoring.forward import innermost
from prefopt.terminal import harmless
from prefopt.trainer.citations import Paper, cited_papers
from prefopt.trainer.installed import versions
from prefopt.trainer.saving.masking import without_secrets

__all__ = ["model_card", "write_model_card"]

METHODS = {
    "dpo": "Direct Preference Optimization (DPO)",
    "cpo": "Contrastive Preference Optimization (CPO)",
    "tpo": "Triple Preference Optimization (TPO)",
}
SETTINGS = (
    *("loss_type", "loss_weights", "beta", "label_smoothing", "ld_alpha", "use_weighting", "f_divergence_type"),
    *("cpo_alpha", "simpo_gamma", "alpha", "tpo_alpha", "tpo_l_gamma", "sync_ref_model", "ref_model_mixup_alpha"),
    *("ref_model_sync_steps", "max_length", "truncation_mode", "layout", "learning_rate", "lr_scheduler_type"),
    *("optim", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("seed", "bf16", "fp16"),
)
"""The options of a config that a reader of the card wants to know."""

UNINTERESTING = re.compile(r"_runtime$|_per_second$|^total_flos$")
SECRET = re.compile(r"(^|_)(token|key|secret|password)(_|$)", re.IGNORECASE)
HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
DATA_FILE = re.compile(r"\.(jsonl?|csv|parquet|arrow|txt)$")


def model_card(
    *,
    method: str,
    losses: Sequence[str] = (),
    model_name: str = "model",
    base_model: str | None = None,
    datasets: Mapping[str, int | None] | None = None,
    settings: Mapping[str, object] | None = None,
    metrics: Mapping[str, object] | None = None,
    tags: Sequence[str] = (),
    license: str | None = None,
    language: str | None = None,
    is_adapter: bool = False,
) -> str:
    """A Markdown card with YAML front matter. What is not known is not mentioned.

    Text that comes from the user stands in code spans, in which nothing is interpreted. Local paths are shown by their
    last part, secrets not at all.

    Args:
        method: ``dpo``, ``cpo`` or ``tpo``.
        losses: names of the losses.
        model_name: name of the trained model.
        base_model: path or hub id of the model that was trained.
        datasets: name -> number of rows, where known.
        settings: options of the run; those that are None are left out.
        metrics: last value of each; those that are no finite number are left out.
        tags: beyond ``prefopt`` and the method.
        license: SPDX name, if the model has one.
        language: language code.
        is_adapter: the checkpoint holds an adapter, not a model.
    """
    datasets, settings, metrics = datasets or {}, settings or {}, metrics or {}
    header = ModelCardData(
        base_model=base_model if base_model is not None and is_hub_id(base_model) else None,
        datasets=[name for name in datasets if "/" in name and is_hub_id(name)] or None,
        language=language,
        library_name="peft" if is_adapter else "transformers",
        license=license,
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["prefopt", method, *tags])),
    )
    papers = cited_papers(method, losses, settings)
    parts = [
        f"---\n{header.to_yaml()}\n---",
        f"# {code(shown(model_name))}",
        introduction(method, losses, base_model, is_adapter),
        section("Data", table(("data set", "rows"), data_rows(datasets))),
        section("Settings", table(("option", "value"), setting_rows(settings))),
        section("Results", table(("metric", "last value"), metric_rows(metrics))),
        section("Versions", table(("library", "version"), [*versions().items()])),
        section("Citation", citation(papers)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_model_card(trainer: Any, folder: str | os.PathLike[str]) -> Path:
    """Write the card of a trainer's run so far to ``README.md`` in ``folder``; it is there in full or not at all."""
    path = Path(folder) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name("README.md.writing")
    beside.write_text(card_of(trainer), encoding="utf-8")
    os.replace(beside, path)
    return path


def card_of(trainer: Any) -> str:
    """The `model_card` of a trainer's run so far."""
    args, config = trainer.args, innermost(trainer.model).config
    options = {name: getattr(args, name, None) for name in SETTINGS}
    logged = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    return model_card(
        method=trainer.method,
        losses=trainer.preference.names,
        model_name=args.hub_model_id or Path(args.output_dir).name,
        base_model=config._name_or_path or None,
        datasets=dict(filter(None, [named_rows(trainer.train_dataset)])),
        settings={name: value for name, value in options.items() if value is not None and value is not False},
        metrics={name: value for name, value in logged.items() if not UNINTERESTING.search(name)},
        is_adapter=is_peft(trainer.model),
    )


def named_rows(dataset: Any) -> tuple[str, int | None] | None:
    """Name and number of rows of a data set, as far as it knows them."""
    if dataset is None:
        return None
    info = getattr(dataset, "info", None)
    sources = " ".join(getattr(info, "download_checksums", None) or {})
    from_hub = re.search(r"hf://datasets/([\w.-]+/[\w.-]+)@", sources)
    name = from_hub.group(1) if from_hub else getattr(info, "dataset_name", None)
    return name or "training data", len(dataset) if hasattr(dataset, "__len__") else None


def introduction(method: str, losses: Sequence[str], base_model: str | None, is_adapter: bool) -> str:
    what = "This adapter was trained" if is_adapter else "This model was trained"
    start = f" from {code(shown(base_model))}" if base_model else ""
    kinds = ", ".join(code(loss) for loss in losses)
    loss = f" (loss: {kinds})" if kinds else ""
    return f"{what}{start} on preference data with {METHODS[method]}{loss}, by prefopt."


def section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def table(titles: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    """A table of two columns; nothing where there are no rows."""
    lines = [f"| {cell(left)} | {cell(right)} |" for left, right in rows]
    return "\n".join([f"| {titles[0]} | {titles[1]} |", "|---|---|", *lines]) if lines else ""


def data_rows(datasets: Mapping[str, int | None]) -> list[tuple[str, str]]:
    return [(code(shown(name)), "" if count is None else f"{count:,}") for name, count in datasets.items()]


def setting_rows(settings: Mapping[str, object]) -> list[tuple[str, str]]:
    """Settings whose value is a number, a text or a list of them."""
    rows = []
    for name, value in settings.items():
        value = getattr(value, "value", value)  # an option that is an enum
        if isinstance(value, (list, tuple)):
            value = ", ".join(str(item) for item in value)
        if isinstance(value, (str, int, float)) and not SECRET.search(name):
            rows.append((code(name), code(shown(str(value)))))
    return rows


def metric_rows(metrics: Mapping[str, object]) -> list[tuple[str, str]]:
    return [
        (code(name), f"{value:.4g}")
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    ]


def citation(papers: Sequence[Paper]) -> str:
    links = "\n".join(f"- [{paper.title}]({paper.url})" for paper in papers)
    entries = "\n\n".join(paper.bibtex() for paper in papers)
    return f"{links}\n\n```bibtex\n{entries}\n```"


def code(text: str) -> str:
    """``text`` as a code span on one line, whatever is in it."""
    text = harmless(" ".join(without_secrets(text).split()))
    runs = [len(run) for run in re.findall(r"`+", text)]
    fence = "`" * (max(runs, default=0) + 1)
    space = " " if runs else ""
    return f"{fence}{space}{text}{space}{fence}"


def cell(text: str) -> str:
    """In a table a bar ends the cell even inside a code span."""
    return text.replace("|", "\\|")


def shown(name: str) -> str:
    """A path by its last part: where it lies is nobody else's business."""
    if name.startswith(("/", "~", ".", "file:")) or re.match(r"[A-Za-z]:\\", name) or os.path.exists(name):
        return re.split(r"[/\\]", name.rstrip("/\\"))[-1] or name
    return name


def is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not DATA_FILE.search(name) and not os.path.exists(name)
