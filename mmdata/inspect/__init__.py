"""Looking at datasets: what differs between two selections of samples."""

from mmdata.inspect.diff import Difference, diff

__all__ = ["Difference", "diff"]
