"""What the server counts, for Prometheus."""

import dataclasses

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# In seconds. Long answers, and those that wait for their turn, take minutes.
_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 240, 480, 960)


@dataclasses.dataclass(frozen=True)
class Metrics:
    """What ``/metrics`` shows."""

    registry: CollectorRegistry
    requests: Counter
    tokens: Counter
    drafted: Counter
    seconds: Histogram
    active: Gauge

    @classmethod
    def new(cls) -> "Metrics":
        """Returns metrics that have counted nothing."""
        registry = CollectorRegistry()
        return cls(
            registry,
            Counter(
                "overnight_requests",
                "Requests answered, by path and HTTP status.",
                ["path", "status"],
                registry=registry,
            ),
            Counter("overnight_tokens", "Tokens read and written.", ["kind"], registry=registry),
            Counter("overnight_drafted_tokens", "Guesses, by whether they came.", ["accepted"], registry=registry),
            Histogram(
                "overnight_completion_seconds",
                "From a request's arrival to its last token.",
                registry=registry,
                buckets=_BUCKETS,
            ),
            Gauge(
                "overnight_active_requests",
                "Requests whose texts are written or wait for their turn.",
                registry=registry,
            ),
        )
