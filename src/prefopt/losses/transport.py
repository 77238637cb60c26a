"""AOT: losses of sorted values, which make one distribution of rewards dominate the other.

Each element's partner is found by sorting among the P pairs, which are those of a whole optimizer step.
"""

from __future__ import annotations

from torch import Tensor

from prefopt.losses.logistic import smoothed_logistic

__all__ = ["aot", "aot_unpaired", "ascending"]


def ascending(values: Tensor) -> Tensor:
    """[P] where each element of the sorted ``values`` stood; equal ones keep their order.

    Example:
        >>> import torch
        >>> ascending(torch.tensor([3.0, 1.0, 2.0]))
        tensor([1, 2, 0])
    """
    return values.argsort(stable=True)


def aot(policy_ratios: Tensor, reference_ratios: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT, paired: the policy's chosen-to-rejected ratios dominate the reference's in distribution.

    ``l(beta u)``, ``u = sort(log p_w - log p_l) - sort(log p_ref,w - log p_ref,l)``, with the smoothed logistic loss
    ``l`` of `sigmoid`

    Args:
        policy_ratios: [P] log p(y_w) - log p(y_l), nats.
        reference_ratios: [P] the same of the reference, nats.
        beta: strength of the penalty.
        label_smoothing: eps in [0, 0.5].

    Returns:
        [P] loss of each quantile, in ascending order of ``policy_ratios`` (`ascending`); for P = 1 it is `sigmoid`.

    Example:
        >>> import torch
        >>> aot(torch.tensor([10.0, 0.0]), torch.tensor([-10.0, 0.0]), beta=0.1)
        tensor([0.3133, 0.3133])

    References:
        AOT, arXiv:2406.05882.
    """
    margin = policy_ratios[ascending(policy_ratios)] - reference_ratios[ascending(reference_ratios)]
    return smoothed_logistic(beta * margin, label_smoothing=label_smoothing)


def aot_unpaired(
    chosen_log_ratio: Tensor, rejected_log_ratio: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """AOT, unpaired: the chosen completions' log-ratios dominate the rejected ones' in distribution.

    ``l(beta u)``, ``u = sort(d_w) - sort(d_l)``, with the smoothed logistic loss ``l`` of `sigmoid`

    Args:
        chosen_log_ratio: [P] d_w, nats.
        rejected_log_ratio: [P] d_l, nats.
        beta: strength of the penalty.
        label_smoothing: eps in [0, 0.5].

    Returns:
        [P] loss of each quantile, ascending; for P = 1 it is `sigmoid`.

    Example:
        >>> import torch
        >>> aot_unpaired(torch.tensor([10.0, 0.0]), torch.tensor([-10.0, 0.0]), beta=0.1)
        tensor([0.3133, 0.3133])

    References:
        AOT, arXiv:2406.05882.
    """
    margin = chosen_log_ratio[ascending(chosen_log_ratio)] - rejected_log_ratio[ascending(rejected_log_ratio)]
    return smoothed_logistic(beta * margin, label_smoothing=label_smoothing)
