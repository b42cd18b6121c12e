import os

from hypothesis import settings

from ..optimizer.conftest import _one_thread_and_seed  # noqa: F401

settings.register_profile("ci", max_examples=80, derandomize=True, deadline=None, database=None)
settings.register_profile("long", max_examples=20_000, deadline=None)
settings.load_profile(os.environ.get("GRNG_FUZZ", "ci"))
