"""What is measured in the layers: capture, geometry, likelihoods, statistics, and the coverage report."""

from grng.curvature.capture import Capture
from grng.curvature.config import Curvature
from grng.curvature.coverage import Coverage, Row
from grng.curvature.geometry import conv_windows
from grng.curvature.layers import Layer, make_layer
from grng.curvature.passes import Batch
from grng.curvature.statistics import DenseStatistics, IndexStatistics, Statistics

__all__ = [
    "Batch",
    "Capture",
    "Coverage",
    "Curvature",
    "DenseStatistics",
    "IndexStatistics",
    "Layer",
    "Row",
    "Statistics",
    "conv_windows",
    "make_layer",
]
