"""Evaluation: exact sums over the rows of a set, on any number of ranks and with any batch size."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, denumpify_detensorize

from prefopt.metrics import NUM_TOKENS, MetricSums, accumulator_dtype, means
from prefopt.normalise import term_sum
from prefopt.reference.weights import reshard
from prefopt.scoring.plain import full_logits
from prefopt.step import StepResult, preference_step
from prefopt.trainer.sharding import prepared_for_scoring
from prefopt.trainer.steps import StepTrainer
from prefopt.types import PAIR, PreferenceBatch

__all__ = ["EvaluatingTrainer", "PairLengths", "PairPredictions"]

TERM = "loss_term/"


class PairPredictions(NamedTuple):
    """``predictions`` for ``compute_metrics``: an entry per evaluated pair, in the order of the set."""

    rewards_chosen: np.ndarray
    rewards_rejected: np.ndarray
    logps_chosen: np.ndarray
    """log p of the completion, nats."""
    logps_rejected: np.ndarray
    logits: list[np.ndarray] | None = None
    """With ``full_logits_for_metrics``: [2, T, V] of each pair, chosen and rejected; T differs between batches."""


class PairLengths(NamedTuple):
    """``label_ids`` for ``compute_metrics``: scored tokens of each completion."""

    chosen: np.ndarray
    rejected: np.ndarray


class PairRecord(NamedTuple):
    """What one pair contributes to the predictions; ``place`` orders the pairs of all micro-batches and ranks."""

    place: tuple[int, int]
    """Number of the loader's item, and place among its pairs."""
    rewards: tuple[float, float]
    logps: tuple[float, float]
    lengths: tuple[int, int]
    logits: np.ndarray | None


class EvaluatingTrainer(StepTrainer):
    """Replaces transformers' evaluation loop.

    That loop repeats rows to even out the ranks, averages batch means and takes the batch size from the first tensor's
    shape. Here every row counts once: sums over rows, dummies where a rank has none, one reduction at the end.
    """

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Metrics of a set under ``metric_key_prefix``, and per-pair predictions unless only the loss is wanted."""
        wants_pairs = not (self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only)
        model = self.model_for_evaluation()
        sums, records, custom = MetricSums(), [], {}
        for number, (step, last) in enumerate(with_last(dataloader)):
            step = step.to(self.args.device)
            for batch, places in zip(step.micro_batches, step.places, strict=True):
                with torch.no_grad(), self.compute_loss_context_manager():
                    result = preference_step(model, self.reference, batch, self.preference, aux_weight=self.aux_weight)
                sums.merge(evaluation_sums(result, batch))
                if wants_pairs:
                    records += self.pair_records(model, batch, result, [(number, place) for place in places])
            if wants_pairs and self.args.batch_eval_metrics:
                custom = self.custom_metrics(*collected(gather_object(records)), last=last)
                records = []
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        reshard(model)  # an optimizer that is made while the head is whole would train a copy of it
        metrics, num_pairs = self.evaluated_metrics(sums)
        predictions = lengths = None
        if wants_pairs and not self.args.batch_eval_metrics:
            predictions, lengths = collected(gather_object(records))
            custom = self.custom_metrics(predictions, lengths, last=True)
        metrics.update(denumpify_detensorize(custom))  # type: ignore[arg-type]
        return EvalLoopOutput(
            predictions=predictions,  # type: ignore[arg-type]
            label_ids=lengths,  # type: ignore[arg-type]
            metrics={prefixed(name, metric_key_prefix): value for name, value in metrics.items()},
            num_samples=num_pairs,
        )

    def model_for_evaluation(self) -> nn.Module:
        """The model as training left it, or prepared for evaluation where no training came before."""
        model = self._wrap_model(self.model, training=False)
        if model is self.model and not any(model is prepared for prepared in self.accelerator._models):
            start = time.time()
            if self.is_deepspeed_enabled or (self.is_fsdp_enabled and not self.accelerator.is_fsdp2):
                model = self.accelerator.prepare(model)
            else:
                model = prepared_for_scoring(self.accelerator, model)
            self.model_preparation_time = round(time.time() - start, 4)
            if self.is_fsdp_enabled:
                self.model = model
            if model is not self.model:
                self.model_wrapped = model
        if not self.is_in_train and (self.args.fp16_full_eval or self.args.bf16_full_eval):
            dtype = torch.float16 if self.args.fp16_full_eval else torch.bfloat16
            model = model.to(dtype=dtype, device=self.args.device)
        model.eval()
        if callable(getattr(self.optimizer, "eval", None)):  # schedule-free optimizers
            self.optimizer.eval()
        return model

    def evaluated_metrics(self, sums: MetricSums) -> tuple[dict[str, float], int]:
        """The means over the set and all ranks, with the loss they make; and the number of pairs."""
        reduced = sums.reduced(self.sum_over_ranks)
        if not reduced:
            raise ValueError("The evaluation set has no rows left; the log says which were skipped and why.")
        _, num_pairs = reduced["rewards/margins"]
        terms = {name: reduced.pop(name) for name in list(reduced) if name.startswith(TERM)}
        metrics = means(reduced)
        metrics[NUM_TOKENS] = self.window.num_tokens  # evaluation does not move the training's token count
        metrics["loss"] = sum(total / count for total, count in terms.values() if count)
        return metrics, int(num_pairs)

    def pair_records(
        self, model: nn.Module, batch: PreferenceBatch, result: StepResult, places: list[tuple[int, int]]
    ) -> list[PairRecord]:
        """A record per pair of a micro-batch, for its place; none for dummies."""
        if not batch.num_model_tokens:
            return []
        rewards = [result.terms.rewards[branch].tolist() for branch in PAIR]
        logps = [result.policy[branch].sum_logps.tolist() for branch in PAIR]
        lengths = [batch.layout.num_tokens[batch.layout.sequence_slice(branch)].tolist() for branch in PAIR]
        logits = self.pair_logits(model, batch) if self.args.full_logits_for_metrics else [None] * len(batch.rows)
        by_pair = (zip(*by_branch, strict=True) for by_branch in (rewards, logps, lengths))
        return [PairRecord(*columns) for columns in zip(places, *by_pair, logits, strict=True)]

    def pair_logits(self, model: nn.Module, batch: PreferenceBatch) -> list[np.ndarray]:
        """[2, T, V] per pair, after ``preprocess_logits_for_metrics``; the batch is a padded one."""
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = full_logits(model, batch)
        if self.preprocess_logits_for_metrics is not None:
            labels = torch.full_like(batch.model_inputs["input_ids"], -100).flatten()
            labels[batch.predict_from + 1] = batch.targets
            logits = self.preprocess_logits_for_metrics(logits, labels.view(batch.model_inputs["input_ids"].shape))
        num_pairs = batch.layout.num_pairs
        return [logits[[pair, num_pairs + pair]].float().cpu().numpy() for pair in range(num_pairs)]

    def custom_metrics(self, predictions: PairPredictions, lengths: PairLengths, *, last: bool) -> Mapping[str, Any]:
        """What the user's ``compute_metrics`` makes of the pairs."""
        if self.compute_metrics is None:
            return {}
        prediction = EvalPrediction(predictions=predictions, label_ids=lengths)  # type: ignore[arg-type]
        options: dict[str, Any] = {"compute_result": last} if self.args.batch_eval_metrics else {}
        return self.compute_metrics(prediction, **options)


def evaluation_sums(result: StepResult, batch: PreferenceBatch) -> MetricSums:
    """The metrics of a micro-batch, with a sum for each loss term (weighted, to be divided by its own units)."""
    sums = result.metrics
    for index, term in enumerate(result.terms.terms):
        value, count = (number.detach().to(accumulator_dtype(number.device)) for number in term_sum(term, batch))
        sums.add_sum(f"{TERM}{index}", term.weight * value, count)
    return sums


def with_last(items: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Each item, and whether it is the last one."""
    iterator = iter(items)
    for item in iterator:
        for following in iterator:
            yield item, False
            item = following
        yield item, True


def collected(records: list[PairRecord]) -> tuple[PairPredictions, PairLengths]:
    """The records of all ranks as arrays, in the order of the set."""
    records = sorted(records, key=lambda record: record.place)
    rewards, logps, lengths = (np.array([record[i] for record in records]).reshape(-1, 2) for i in (1, 2, 3))
    logits = [record.logits for record in records if record.logits is not None]
    return (
        PairPredictions(rewards[:, 0], rewards[:, 1], logps[:, 0], logps[:, 1], logits or None),
        PairLengths(lengths[:, 0], lengths[:, 1]),
    )


def prefixed(name: str, prefix: str) -> str:
    return name if name.startswith(f"{prefix}_") else f"{prefix}_{name}"
