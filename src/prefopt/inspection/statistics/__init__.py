"""What is in a data set, before anything is trained on it, counted by the functions that prepare a run's rows."""

from prefopt.inspection.statistics.measure import measure
from prefopt.inspection.statistics.result import Statistics

__all__ = ["Statistics", "measure"]
