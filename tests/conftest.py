"""What every test may ask for."""

import logging

import structlog

pytest_plugins = ["tests.postgres_plugin"]

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
