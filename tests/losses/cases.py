"""Every loss with the hyper-parameters it is tried with, and what it takes."""

from __future__ import annotations

from prefopt import losses

MARGIN = {
    "sigmoid": [{"beta": 0.1}, {"beta": 0.7, "label_smoothing": 0.2}],
    "sigmoid_norm": [{"beta": 0.3}, {"beta": 1.5, "label_smoothing": 0.1}],
    "hinge": [{"beta": 0.1}, {"beta": 0.7}],
    "ipo": [{"beta": 0.1}, {"beta": 0.7}],
    "exo_pair": [{"beta": 0.1, "label_smoothing": 1e-3}, {"beta": 0.7, "label_smoothing": 0.3}],
    "robust": [{"beta": 0.1, "label_smoothing": 0.0}, {"beta": 0.7, "label_smoothing": 0.3}],
    "discopop": [{"beta": 0.1, "tau": 0.05}, {"beta": 0.7, "tau": 0.5}, {"beta": 0.7, "tau": 2.0}],
    "simpo": [{"beta": 2.0, "gamma": 0.5}, {"beta": 0.7, "gamma": 1.4, "label_smoothing": 0.1}],
    "tpo_l": [{"beta": 0.01, "gamma": 0.5}, {"beta": 0.7, "gamma": -0.3, "label_smoothing": 0.1}],
}
"""Losses of one value per pair."""

LOG_RATIOS = {
    "nca_pair": [{"beta": 0.1}, {"beta": 0.7}],
    "bco_pair": [{"beta": 0.1}, {"beta": 0.7, "shift": 0.9}],
    "sppo_hard": [{"beta": 0.1}, {"beta": 0.7}],
    "apo_zero": [{"beta": 0.1}, {"beta": 0.7}],
    "apo_down": [{"beta": 0.1}, {"beta": 0.7}],
}
"""Losses of the two log-ratios of a pair."""

SORTED = {
    "aot": [{"beta": 0.1, "label_smoothing": 0.0}, {"beta": 0.7, "label_smoothing": 0.2}],
    "aot_unpaired": [{"beta": 0.1, "label_smoothing": 0.0}, {"beta": 0.7, "label_smoothing": 0.2}],
}
"""Losses of two values per pair, each sorted among the pairs."""

ALL = {**MARGIN, **LOG_RATIOS, **SORTED}
CASES = [(name, hyper) for name, settings in ALL.items() for hyper in settings]
IDS = [f"{name}-{'-'.join(str(value) for value in hyper.values())}" for name, hyper in CASES]


def loss_of(name: str, values, hyper: dict):
    """The package's loss of ``values`` [2, P]: their difference, or both."""
    function = getattr(losses, name)
    return function(values[0] - values[1], **hyper) if name in MARGIN else function(values[0], values[1], **hyper)
