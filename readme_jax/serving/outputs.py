"""What an engine gives back: the news of a step, finished continuations, counters."""

import collections
import dataclasses

from readme_jax.serving.request import Reason
from readme_jax.serving.sampling import Score


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """What a continuation took. cached_tokens: of the prompt, found in pages of earlier requests. experts: tokens that
    ran each expert, prompt and output. first_token_s, total_s: seconds since arrival."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    experts: dict[int, int]
    preemptions: int
    first_token_s: float | None
    total_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Update:
    """News of one continuation: text that may be shown now, tokens sampled since the last news.

    id: of `Engine.add_request`. choice: 0 .. n - 1. reason, usage: once it has ended.
    """

    id: int
    choice: int
    text: str
    tokens: tuple[int, ...]
    scores: tuple[Score, ...] = ()
    reason: Reason | None = None
    usage: Usage | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """A finished continuation. tokens: without the stop token that ended it, with those of a stop string."""

    text: str
    tokens: list[int]
    reason: Reason
    usage: Usage
    scores: list[Score] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """A prompt's token ids and its n continuations."""

    prompt: list[int]
    choices: list[Choice]

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text

    @property
    def tokens(self) -> list[int]:
        """Tokens of the first choice."""
        return self.choices[0].tokens


@dataclasses.dataclass
class Counters:
    """Sums since the engine was made, of what its parts do not count themselves.

    steps: batches. tokens: run through the layers; decode: of them, single next ones. generated: sampled. routed:
    prompt tokens routed on arrival. unique_experts: of each batch, summed. step_s, route_s: seconds in all steps, and
    of them in routing prompts. busy_s: seconds with a batch on the device.
    """

    steps: int = 0
    tokens: int = 0
    decode: int = 0
    generated: int = 0
    routed: int = 0
    unique_experts: int = 0
    step_s: float = 0.0
    route_s: float = 0.0
    busy_s: float = 0.0
    finished: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
