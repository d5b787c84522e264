"""What an engine tells about its steps and requests, kept for figures and for routing traces."""

import dataclasses
from pathlib import Path

import numpy as np

from readme_jax.serving.report import Served, Step
from readme_jax.serving.request import Request
from readme_jax.serving.trace_files import RoutingRecorder
from readme_jax.serving.traces import RoutedRequest
from readme_jax.serving.transfers import Sent


class Recorder:
    """Keeps all it is told.

    steps: one `report.Step` a batch. served: one `report.Served` for each request that has ended. routed: the experts
    of those that got a token. planned: of each batch its experts, those of the batches expected after it, and its
    tokens by expert: all that a residency policy is told. sent: each transfer.
    """

    def __init__(self):
        self.steps: list[Step] = []
        self.served: list[Served] = []
        self.routed: list[RoutedRequest] = []
        self.planned: list[tuple[frozenset[int], tuple[frozenset[int], ...], dict[int, int]]] = []
        self.sent: list[Sent] = []
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
                request.arrival,
                times,
                len(request.prompt),
                request.reason == "cancelled",
                request.passed_over,
                request.preempted,
            )  # fmt: skip
        )
        if len(request.experts) > len(request.prompt):
            experts_T, prompt = np.array(request.experts, np.int16), len(request.prompt)
            self.routed.append(RoutedRequest(request.arrival, experts_T[:prompt], experts_T[prompt:]))

    def write_routing(self, path: str | Path, experts: int) -> None:
        """The routing trace of the requests so far, for `readme-jax simulate`; the first arrives at 0 s.

        experts: of the model.
        """
        first = min((routed.arrival for routed in self.routed), default=0.0)
        with RoutingRecorder(path, experts) as file:
            for routed in sorted(self.routed, key=lambda routed: routed.arrival):
                file.write(dataclasses.replace(routed, arrival=routed.arrival - first))
