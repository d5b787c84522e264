"""Text from any model folder: dense, carved and tuned, or exported. Several prompts run as one batch.

readme-jax generate --model runs/tuned --prompts "The capital of France is" "def fibonacci(n):" --max-new-tokens 40

In: a model folder or hub name and prompts. Out: the prompts and their continuations on stdout; rates on stderr.
"""

import dataclasses
import sys

from readme_jax import api, cli
from readme_jax.config import ConfigError, require
from readme_jax.generation import Sampling
from readme_jax.metrics import Stopwatch, progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """One call of the generator."""

    model: str
    """Model folder, .gguf file or hub name."""
    prompts: tuple[str, ...] = ()
    """Texts to continue, as one batch; none: one prompt per line of standard input."""
    max_new_tokens: int = 64
    """Tokens to add to each prompt at most."""
    temperature: float = 0.0
    """0 is greedy; above, logits are divided by it before sampling."""
    top_k: int = 0
    """Sample among the k most probable tokens; 0: all."""
    top_p: float = 1.0
    """Sample among the smallest set of tokens with this probability."""
    seed: int = 0
    """Seed of the sampling."""
    chat: bool = False
    """Wrap each prompt as a user's turn in the chat template."""
    experts: bool = False
    """Also print the experts that the tokens of prompt and continuation took."""

    def __post_init__(self):
        self.sampling()

    def sampling(self) -> dict:
        """The options of `generation.Sampling`, checked."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(Sampling)}
        return dataclasses.asdict(Sampling(**options))


def main(argv: list[str] | None = None) -> None:
    """Generate and print."""
    config: GenerateConfig = cli.parse(GenerateConfig, argv, __doc__ or "", prog="readme-jax generate")
    prompts = list(config.prompts) or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    require(bool(prompts), "prompts: none given, on the command line or on standard input", ConfigError)
    model = api.load(config.model)
    require(not config.experts or model.experts is not None, f"experts: {config.model} is dense, it has none")
    watch = Stopwatch()
    with progress(len(prompts) * config.max_new_tokens, "generate") as bar:
        ids = [model.encode(prompt, config.chat) for prompt in prompts]
        made = model.generate(ids, **config.sampling(), on_token=lambda row, token: bar.update(1))
    for prompt, start, new in zip(prompts, ids, made):
        print(f"> {prompt}\n{model.tokenizer.decode(new, skip_special_tokens=True)}\n")
        experts = model.route([[*start, *new]]) if config.experts else None
        if experts is not None:
            print("experts:", " ".join(map(str, experts[0].tolist())), "\n")
    count = sum(map(len, made))
    print(f"{count} tokens, {count / watch.seconds:.1f} tokens/s with compilation", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
