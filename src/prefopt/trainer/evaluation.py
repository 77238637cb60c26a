"""Evaluation: exact sums over the rows of a set, on any number of ranks and with any batch size."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, denumpify_detensorize

from prefopt.metrics import NUM_TOKENS, MetricSums, accumulator_dtype, means
from prefopt.normalise import term_sum
from prefopt.reference.weights import reshard
from prefopt.scoring.plain import full_logits, target_labels
from prefopt.step import StepResult, preference_step
from prefopt.trainer.best_metric import check_is_measured, prefixed
from prefopt.trainer.ending.interrupting import InterruptibleTrainer
from prefopt.trainer.ending.pairs import Extremes, ScoredPairs
from prefopt.trainer.guards.nonfinite import say_what_is_not_finite
from prefopt.trainer.guards.pair_values import pair_losses
from prefopt.trainer.sharding import prepared_for_scoring
from prefopt.trainer.whole_step import pair_table, shares_of_pairs
from prefopt.types import PAIR, OptimizerStep, PreferenceBatch

__all__ = ["EvaluatingTrainer", "PairLengths", "PairPredictions"]

TERM = "loss_term/"


class PairPredictions(NamedTuple):
    """``predictions`` for ``compute_metrics``: an entry per evaluated pair, in the order of the set."""

    rewards_chosen: np.ndarray
    rewards_rejected: np.ndarray
    logps_chosen: np.ndarray
    """log p of the completion, nats."""
    logps_rejected: np.ndarray
    logits: list[Any] | None = None
    """Where wanted (`wants_logits`): [2, T, V] of each pair, chosen and rejected, T differs between batches; or what
    ``preprocess_logits_for_metrics`` makes of them, an array or several."""


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
    row: int
    loss: float
    logits: Any


class EvaluatedStep(NamedTuple):
    """What one item of the loader gives on this rank."""

    sums: MetricSums
    tables: list[Tensor]
    """[P, 9] of each micro-batch, for losses that sort."""
    records: list[PairRecord]
    pairs: list[ScoredPairs]


class EvaluatingTrainer(InterruptibleTrainer):
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
        self.callback_handler.eval_dataloader = dataloader
        sums, records, tables, custom = MetricSums(), [], [], {}
        self.extremes = Extremes()  # the worst and best pairs of this set, on this rank
        collate = functools.partial(self.new_collate, padded=self.wants_logits)
        for number, (step, last) in enumerate(with_last(dataloader)):
            self.leave_if_asked(model)
            evaluate = functools.partial(self.evaluated_step, model, number, wants_pairs)
            of_step = self.in_fitting_batches(evaluate, "the evaluation", step, collate)
            sums.merge(of_step.sums)
            tables += of_step.tables
            self.extremes.add(of_step.pairs)
            records += of_step.records
            if wants_pairs and self.args.batch_eval_metrics:
                custom = self.custom_metrics(self.prediction(gather_object(records)), last=last)
                records = []
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        reshard(model)  # an optimizer that is made while the head is whole would train a copy of it
        self.add_losses_of_the_set(sums, tables)
        metrics, num_pairs = self.evaluated_metrics(sums)
        prediction = None
        if wants_pairs and not self.args.batch_eval_metrics:
            prediction = self.prediction(gather_object(records))
            custom = self.custom_metrics(prediction, last=True)
        metrics.update(denumpify_detensorize(custom))  # type: ignore[arg-type]
        say_what_is_not_finite(metrics, metric_key_prefix)
        return EvalLoopOutput(
            predictions=None if prediction is None else prediction.predictions,  # type: ignore[arg-type]
            label_ids=None if prediction is None else prediction.label_ids,
            metrics={prefixed(name, metric_key_prefix): value for name, value in metrics.items()},
            num_samples=num_pairs,
        )

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        check_is_measured(self.args, metrics)
        return super()._determine_best_metric(metrics, trial)

    def evaluated_step(self, model: nn.Module, number: int, wants_pairs: bool, step: OptimizerStep) -> EvaluatedStep:
        """The micro-batches of an item of the loader.

        Args:
            model: as `model_for_evaluation` gives it.
            number: of the item, from 0.
            wants_pairs: whether predictions are made.
            step: the item.
        """
        found, step = EvaluatedStep(MetricSums(), [], [], []), step.to(self.args.device)
        for batch, places, rows in zip(step.micro_batches, step.places, step.sources, strict=True):
            with torch.no_grad(), self.compute_loss_context_manager():
                result = preference_step(model, self.reference, batch, self.preference, aux_weight=self.aux_weight)
            found.sums.merge(evaluation_sums(result, batch, self.preference.sorted_losses))
            found.pairs.append(ScoredPairs.of(result, batch, rows))
            if self.preference.sorted_losses:
                found.tables.append(pair_table(result, batch)[batch.pair_weights > 0].cpu())
            if wants_pairs:
                found.records.extend(self.pair_records(model, batch, result, [(number, place) for place in places]))
        return found

    def model_for_evaluation(self) -> nn.Module:
        """The model as training left it, or prepared for evaluation where no training came before."""
        model = self._wrap_model(self.model, training=False)
        trained = self.is_deepspeed_enabled and self.model_wrapped is not self.model  # within its engine
        if model is self.model and not trained and not any(model is other for other in self.accelerator._models):
            start = time.time()
            if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
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

    def add_losses_of_the_set(self, sums: MetricSums, tables: list[Tensor]) -> None:
        """The losses that sort, over all pairs of all ranks; they are added on the main process."""
        if not self.preference.sorted_losses:
            return
        whole = torch.cat(gather_object(tables or [torch.zeros(0, 9)]))
        own = float(self.args.process_index == 0)
        for number, share in shares_of_pairs(self.preference, whole).items():
            total = (own * share.weight * share.values.double().sum()).to(
                self.args.device, accumulator_dtype(self.args.device)
            )
            sums.add_sum(f"{TERM}{number}", total, torch.full_like(total, own * len(whole)))

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
        # a dummy's too: where the model is wrapped, all ranks must run it equally often
        logits = self.pair_logits(model, batch) if self.wants_logits else [None] * len(batch.rows)
        if not batch.num_model_tokens:
            return []
        rewards = [result.terms.rewards[branch].tolist() for branch in PAIR]
        logps = [result.policy[branch].sum_logps.tolist() for branch in PAIR]
        lengths = [batch.layout.num_tokens[batch.layout.sequence_slice(branch)].tolist() for branch in PAIR]
        by_pair = (zip(*by_branch, strict=True) for by_branch in (rewards, logps, lengths))
        losses = pair_losses(result.terms, batch).tolist()
        return [PairRecord(*columns) for columns in zip(places, *by_pair, batch.rows, losses, logits, strict=True)]

    @property
    def wants_logits(self) -> bool:
        """Whether predictions have full logits: where they are asked for, or a function of the user's takes them."""
        reduced = self.preprocess_logits_for_metrics is not None
        return self.args.full_logits_for_metrics or (reduced and not self.args.was_set("full_logits_for_metrics"))

    def pair_logits(self, model: nn.Module, batch: PreferenceBatch) -> list[Any]:
        """Of each pair [2, T, V], or what ``preprocess_logits_for_metrics`` leaves of it; the batch is a padded one."""
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = full_logits(model, batch)
        if self.preprocess_logits_for_metrics is not None:
            logits = self.preprocess_logits_for_metrics(logits, target_labels(batch))
        num_pairs = batch.layout.num_pairs
        arrays = tree_map(as_array, logits)
        return [tree_map(lambda array, pair=pair: array[[pair, num_pairs + pair]], arrays) for pair in range(num_pairs)]

    def prediction(self, records: list[PairRecord]) -> EvalPrediction:
        """What ``compute_metrics`` gets: the records of all ranks as arrays, in the order of the set."""
        records = sorted(records, key=lambda record: record.place)
        rewards, logps, lengths = (np.array([record[i] for record in records]).reshape(-1, 2) for i in (1, 2, 3))
        logits = [record.logits for record in records] if self.wants_logits else None
        predictions = PairPredictions(rewards[:, 0], rewards[:, 1], logps[:, 0], logps[:, 1], logits)
        wanted = self.args.include_for_metrics
        return EvalPrediction(
            predictions=predictions,  # type: ignore[arg-type]
            label_ids=PairLengths(lengths[:, 0], lengths[:, 1]),  # type: ignore[arg-type]
            inputs=np.array([record.row for record in records]) if "inputs" in wanted else None,
            losses=np.array([record.loss for record in records]) if "loss" in wanted else None,
        )

    def custom_metrics(self, prediction: EvalPrediction, *, last: bool) -> Mapping[str, Any]:
        """What the user's ``compute_metrics`` makes of the pairs."""
        if self.compute_metrics is None:
            return {}
        options: dict[str, Any] = {"compute_result": last} if self.args.batch_eval_metrics else {}
        return self.compute_metrics(prediction, **options)


def evaluation_sums(result: StepResult, batch: PreferenceBatch, left_out: Sequence[str] = ()) -> MetricSums:
    """The metrics of a micro-batch, with a sum for each loss term (weighted, to be divided by its own units).

    Args:
        result: of the micro-batch.
        batch: the micro-batch.
        left_out: names of terms that are no sums over micro-batches.
    """
    sums = result.metrics
    for index, term in enumerate(result.terms.terms):
        if term.name in left_out:
            continue
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


def as_array(tensor: Tensor) -> np.ndarray:
    """On the host; numpy has no bfloat16."""
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
