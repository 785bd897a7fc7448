"""An analysis as one HTML page."""

from torch_influence.pages._report import report

__all__ = ["report"]
