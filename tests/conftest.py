"""What every test may ask for."""

import logging

import structlog
from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.postgres_plugin"]

# `make test` tries the same examples each time: whether a change is in order does not hang on chance. `make search`
# tries others, and remembers those that fail.
settings.register_profile(
    "others",
    settings.get_profile("default"),  # not that of CI, which Hypothesis makes the present one where it sees one
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.register_profile("same", settings.get_profile("others"), derandomize=True, database=None)
settings.load_profile("same")

# As the service configures it: a traceback with the values of all frames, which structlog would print otherwise, takes
# many seconds of the event loop that the other requests of a test wait for.
structlog.configure(
    processors=[
        structlog.processors.add_log_level,
        structlog.processors.format_exc_info,
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
    ],
    wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
)
