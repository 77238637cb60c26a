"""What the numbers of a run say about it: findings, from its logged rows and what is known of its data.

docs/numbers.md explains each, with its sources. A finding needs an effect that matters and that chance does not
explain: a false alarm is worse than silence. Of findings that explain each other the cause is named alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    of_run = stability_findings(run) or learning_findings(run)  # numbers of a run that broke say nothing about learning
    of_data = [*data_findings(run), *sample_findings(run)]
    return of_data + sorted(of_run, key=lambda finding: finding.step or 0)
