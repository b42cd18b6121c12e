"""The front end: which gradient is handed on."""

from grng.regularizers.explicit import double_backward_gradients, finite_difference_gradients

__all__ = ["double_backward_gradients", "finite_difference_gradients"]
