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
from prefopt.trainer.card_facts import DataSet, data_sets, has_curves, how_it_went, recorded, settings_of, shown
from prefopt.trainer.citations import Paper, cited_papers
from prefopt.trainer.ending.record import CURVES
from prefopt.trainer.installed import versions
from prefopt.trainer.saving.masking import without_known_secrets, without_secrets

__all__ = ["model_card", "write_model_card"]

METHODS = {
    "dpo": "Direct Preference Optimization (DPO)",
    "cpo": "Contrastive Preference Optimization (CPO)",
    "tpo": "Triple Preference Optimization (TPO)",
}
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
    datasets: Sequence[DataSet] = (),
    settings: Mapping[str, object] | None = None,
    metrics: Mapping[str, object] | None = None,
    run: Mapping[str, str] | None = None,
    curves: str | None = None,
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
        datasets: those of training and evaluation.
        settings: options of the run; those that are None are left out.
        metrics: last value of each; those that are no finite number are left out.
        run: how it went: what -> value.
        curves: name of a picture beside the card.
        tags: beyond ``prefopt`` and the method.
        license: SPDX name, if the model has one.
        language: language code.
        is_adapter: the checkpoint holds an adapter, not a model.
    """
    settings, metrics = settings or {}, metrics or {}
    header = ModelCardData(
        base_model=base_model if base_model is not None and is_hub_id(base_model) else None,
        datasets=hub_names(datasets) or None,
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
        section("Run", table(("", ""), [(what, code(value)) for what, value in (run or {}).items()])),
        section("Data", table(("data set", "used for", "rows"), data_rows(datasets))),
        section("Settings", table(("option", "value"), setting_rows(settings))),
        section("Results", table(("metric", "last value"), metric_rows(metrics))),
        section("Curves", f"![Loss, margins and accuracies over the steps]({curves})" if curves else ""),
        section("Versions", table(("library", "version"), [*versions().items()])),
        section("Citation", citation(papers)),
    ]
    return without_known_secrets("\n\n".join(part for part in parts if part) + "\n")


def write_model_card(
    trainer: Any,
    folder: str | os.PathLike[str],
    *,
    model_name: str | None = None,
    dataset_name: str | None = None,
    finetuned_from: str | None = None,
    tags: str | Sequence[str] | None = None,
    language: str | None = None,
    license: str | None = None,
    **_: Any,
) -> Path:
    """Write the card of a trainer's run so far to ``README.md`` in ``folder``; it is there in full or not at all.

    Args:
        trainer: whose run it is.
        folder: where to.
        model_name, tags, language, license: of the card.
        dataset_name: of the training set, where that does not know its own.
        finetuned_from: name of the model that training started from, if not the one that its config has.
        _: what else transformers' trainers take for their card; nothing is made of it.
    """
    path = Path(folder) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    named = [tags] if isinstance(tags, str) else tags
    given = {"model_name": model_name, "base_model": finetuned_from, "tags": named}
    given |= {"language": language, "license": license}
    facts = facts_of(trainer, path.parent, dataset_name)
    card = model_card(**facts | {name: value for name, value in given.items() if value is not None})
    beside = path.with_name("README.md.writing")
    beside.write_text(card, encoding="utf-8")
    os.replace(beside, path)
    return path


def facts_of(trainer: Any, folder: Path, dataset_name: str | None) -> dict[str, Any]:
    """What a trainer's run knows, as arguments of `model_card`, for a card in ``folder``."""
    args, config = trainer.args, innermost(trainer.model).config
    logged = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    record = recorded(trainer)
    return {
        "method": trainer.method,
        "losses": trainer.preference.names,
        "model_name": args.hub_model_id or Path(args.output_dir).name,
        "base_model": config._name_or_path or None,
        "datasets": data_sets(trainer, record, dataset_name),
        "settings": settings_of(trainer),
        "metrics": {name: value for name, value in logged.items() if not UNINTERESTING.search(name)},
        "run": how_it_went(trainer, record),
        "curves": CURVES if has_curves(folder, record) else None,
        "is_adapter": is_peft(trainer.model),
    }


def hub_names(datasets: Iterable[DataSet]) -> list[str]:
    """The data sets that are on the Hub, each once."""
    names = dict.fromkeys(name for own in datasets for name in own.name.split(", "))
    return [name for name in names if "/" in name and is_hub_id(name)]


def introduction(method: str, losses: Sequence[str], base_model: str | None, is_adapter: bool) -> str:
    what = "This adapter was trained" if is_adapter else "This model was trained"
    start = f" from {code(shown(base_model))}" if base_model else ""
    kinds = ", ".join(code(loss) for loss in losses)
    loss = f" (loss: {kinds})" if kinds else ""
    return f"{what}{start} on preference data with {METHODS[method]}{loss}, by prefopt."


def section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def table(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table; nothing where there are no rows."""
    lines = [f"| {' | '.join(map(cell, row))} |" for row in rows]
    return "\n".join([f"| {' | '.join(titles)} |", "|" + "---|" * len(titles), *lines]) if lines else ""


def data_rows(datasets: Iterable[DataSet]) -> list[tuple[str, ...]]:
    return [(code(shown(own.name)), code(own.use), own.rows) for own in datasets]


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


def is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not DATA_FILE.search(name) and not os.path.exists(name)
