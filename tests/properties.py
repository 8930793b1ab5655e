"""How often a property is tried; not in conftest.py, so that tests can run without hypothesis."""

import os

from hypothesis import HealthCheck, settings

# By default 60 fixed cases; HYPOTHESIS=5000 tries 5,000 random ones. All cases share one tmp_path.
TRIES = int(os.environ.get("HYPOTHESIS", 0))
repeated = settings(
    max_examples=TRIES or 60, derandomize=not TRIES, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
