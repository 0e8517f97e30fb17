"""What the service counts, for Prometheus. One registry an app: two in one process share no figures."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import Scope

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Meters:
    """Requests by route, workers that wait, rounds by outcome."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "isthmus_requests", "Requests answered.", ["method", "route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "isthmus_request_seconds",
            "Seconds until a request was answered; claims wait on purpose.",
            ["method", "route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.waiting = Gauge(
            "isthmus_workers_waiting", "Workers in a long poll at this process.", registry=self.registry
        )
        self.aggregations = Counter(
            "isthmus_aggregations", "Rounds aggregated by this process.", ["outcome"], registry=self.registry
        )
        self.aggregation_seconds = Histogram(
            "isthmus_aggregation_seconds",
            "Seconds from the frozen set to the published checkpoint.",
            buckets=_SECONDS,
            registry=self.registry,
        )

    def answered(self, scope: Scope, status: int, seconds: float) -> None:
        """Count one request by its route's pattern, never by its path: ids would make a series each."""
        route = _pattern(scope)
        self.requests.labels(scope["method"], route, str(status)).inc()
        self.seconds.labels(scope["method"], route).observe(seconds)

    def rendered(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)


def _pattern(scope: Scope) -> str:
    if scope.get("route") is None:
        return "unknown"
    names = {str(value): f"{{{name}}}" for name, value in scope.get("path_params", {}).items()}
    return "/".join(names.get(part, part) for part in scope["path"].split("/"))
