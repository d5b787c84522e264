"""What an engine tells about its steps and requests, kept for figures and for routing traces."""

from collections.abc import Sequence

from readme_jax.serving.report import Served, Step
from readme_jax.serving.request import Request


class Recorder:
    """Keeps all it is told. steps: one `report.Step` a batch. served: one `report.Served` for each request that has
    ended. routed: for each of those its arrival, prompt tokens and the experts of all its tokens, which `traces` writes
    for the simulator. planned: of each batch its experts, those of the batches expected after it, and its tokens by
    expert: all that a residency policy is told. sent: (start, end, bytes) of each transfer."""

    def __init__(self):
        self.steps: list[Step] = []
        self.served: list[Served] = []
        self.routed: list[tuple[float, int, Sequence[int]]] = []
        self.planned: list[tuple[frozenset[int], tuple[frozenset[int], ...], dict[int, int]]] = []
        self.sent: list[tuple[float, float, int]] = []
        self._times: dict[Request, list[float]] = {}

    def step(self, **figures) -> None:
        """A batch has come back; figures are those of `report.Step`."""
        self.steps.append(Step(**figures))

    def token(self, request: Request) -> None:
        """A request has got its last token so far."""
        assert request.last_token is not None
        self._times.setdefault(request, []).append(request.last_token)

    def ended(self, request: Request) -> None:
        """A request has ended."""
        times = self._times.pop(request, [])
        self.served.append(
            Served(
                request.arrival, times, len(request.prompt), request.reason == "cancelled", request.passed_over,
                request.preempted,
            )  # fmt: skip
        )
        self.routed.append((request.arrival, len(request.prompt), request.experts))
