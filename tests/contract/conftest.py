from ..optimizer.conftest import _one_thread_and_seed  # noqa: F401
