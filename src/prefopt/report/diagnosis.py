"""What the numbers of a run say about it: findings, from its logged rows and what is known of its data.

docs/numbers.md explains each, with its sources. A finding needs an effect that matters and that chance does not
explain: a false alarm is worse than silence. Of findings that explain each other the cause is named alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prefopt.report.data_findings import data_findings, sample_findings
from prefopt.report.findings import Finding, Level, Run
from prefopt.report.learning_findings import learning_findings
from prefopt.report.stability_findings import stability_findings

__all__ = ["Finding", "Level", "diagnose"]


def diagnose(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> list[Finding]:
    """The findings of a run: of its data, then in the order of their steps.

    Args:
        rows: of ``metrics.jsonl``, or the log of a run that goes on.
        facts: of ``run.json``, as far as they are known: ``method``; ``options``; ``data``, of which ``train`` has
            ``rows``, ``truncated`` and ``skipped`` (reason -> ``num``); ``status``. Beside it ``samples``, the rows
            of ``samples.jsonl``, and for a run that goes on ``progress``, the share of its steps that are done.
    """
    run = Run(rows, facts)
    of_run = found(run, stability_findings) or found(run, learning_findings)  # one that broke says nothing of learning
    of_data = [*found(run, data_findings), *found(run, sample_findings)]
    return of_data + sorted(of_run, key=lambda finding: finding.step or 0)


def found(run: Run, rules: Callable[[Run], list[Finding]]) -> list[Finding]:
    """What the rules find; where they fail, that, as neither a run nor its report may end for it."""
    try:
        return rules(run)
    except Exception as error:
        text = f"The numbers could not be gone through for {rules.__name__.replace('_', ' ')}: {error!r}."
        return [Finding("diagnosis failed", "warn", None, text, "The run is not concerned; please report it.")]
