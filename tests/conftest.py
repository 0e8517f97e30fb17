"""What every test may ask for."""

import logging

import structlog

pytest_plugins = ["tests.postgres_plugin"]

structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
