"""How often a property is tried; not in conftest.py, so that tests can run without hypothesis."""

import os

from hypothesis import HealthCheck, settings

# Often, in one folder, the same cases each time. HYPOTHESIS=5000 tries so many others.
TRIES = int(os.environ.get("HYPOTHESIS", 0))
repeated = settings(
    max_examples=TRIES or 60, derandomize=not TRIES, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
