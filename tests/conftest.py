"""What every test may ask for."""

import logging

import structlog
from hypothesis import settings

pytest_plugins = ["tests.postgres_plugin"]

# `make test` tries the same examples each time: whether a change is in order does not hang on chance. `make search`
# tries others, and remembers those that fail.
settings.register_profile("same", derandomize=True)
settings.register_profile("others", print_blob=True)
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
