"""The one console command: `readme-jax <stage> ...` starts a stage's program; programs parse their config here.

Nothing heavy is imported before the stage is known, so `--help`, `--version` and a mistyped stage answer at once.
"""

import contextlib
import gc
import importlib
import importlib.metadata
import io
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from readme_jax.config import ConfigError, ReadMeError, Stopped, exit_code, load_yaml, require

STAGES = {
    "quickstart": ("readme_jax.train.quickstart", "every stage below on a small real model, with a report"),
    "import": ("readme_jax.train.import_hf", "a Hugging Face checkpoint, local or from the hub, into a model folder"),
    "data": ("readme_jax.train.prepare", "text by domain, tokenised and packed into records"),
    "calibrate": ("readme_jax.train.calibrate", "activation statistics of the FFN channels by domain"),
    "carve": ("readme_jax.train.carve", "statistics into experts: a permuted model and its expert table"),
    "masks": ("readme_jax.train.masks", "experts' channels learned with frozen weights"),
    "separate": ("readme_jax.train.separate", "tied experts into experts that own their rows"),
    "plan": ("readme_jax.train.plan", "what a run of alternate will need: memory, FLOPs, hours, and whether it fits"),
    "alternate": ("readme_jax.train.alternate", "train router and experts in turns"),
    "evaluate": ("readme_jax.train.evaluate", "perplexity by domain and routing statistics on held-out text"),
    "study": ("readme_jax.train.study", "recipes compared at equal tokens: a table, pictures, study.json"),
    "tasks": ("readme_jax.train.tasks", "scores on tasks of the lm-evaluation-harness, beside a dense model's"),
    "generate": ("readme_jax.infer.generate", "text from a dense or carved model"),
    "bench": ("readme_jax.infer.bench", "a trace of requests through the engine, for any pair of policies"),
    "simulate": ("readme_jax.infer.simulate", "serving on machines that are not at hand, by policy"),
    "export": ("readme_jax.infer.export", "a folder that transformers loads in PyTorch"),
}


def parse(
    cls: type, argv: list[str] | None, description: str, *, prog: str | None = None, first: str | None = None
) -> Any:
    """The config `cls` of a program from its command line.

    `--config FILE` (YAML, or the folder of an earlier result) gives the values, every other option overrides one.
    `argv` None means sys.argv; what stands before all options is the option `first`. `description` heads the help,
    which explains every field by its docstring. A bad option raises ConfigError in one line; `--help` prints and exits
    with code 0.
    """
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    if first is not None and argv and not argv[0].startswith("-"):
        argv.insert(0, f"--{first}")
    path, rest = _take_config(argv)
    usage = description.strip() + "\n\n--config FILE: YAML or earlier result whose values become the defaults below."
    values = {} if path is None else {"default": load_yaml(cls, path)}
    text = io.StringIO()
    try:
        with contextlib.redirect_stderr(text), _no_collection():
            return tyro.cli(cls, args=rest, description=usage, prog=prog, **values)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(_one_line(text.getvalue())) from None


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector out of the block.

    tyro reads docstrings by `ast.parse`. CPython 3.11 and 3.12.0 raise SystemError (gh-106905) when a finalizer that
    the collector runs inside it parses too, as formatting a traceback does.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _take_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """Split `--config FILE` or `--config=FILE` off the arguments; given twice or without a file is an error."""
    path, rest, i = None, [], 0
    while i < len(argv):
        word, value = argv[i], None
        if word == "--config":
            require(i + 1 < len(argv), "--config: needs a file")
            value, i = argv[i + 1], i + 1
        elif word.startswith("--config="):
            value = word.removeprefix("--config=")
        if value is None:
            rest.append(word)
        else:
            require(path is None, f"--config: given twice ({path}, {value})")
            path = value
        i += 1
    return path, rest


def _one_line(box: str) -> str:
    """The message inside the box that tyro draws: its first paragraph, without the frame."""
    words = []
    for line in box.splitlines()[1:]:  # the first holds the box's title
        line = line.strip("╭╮╰╯│─ ")
        if words and not line:  # the rule between message and advice
            break
        words.append(line)
    return " ".join(words) or "bad command line; see --help"


def run(main: Callable[[list[str] | None], Any], argv: list[str] | None = None) -> None:
    """Run a program's `main`. A ReadMeError becomes one line `error: ...` on stderr and its exit code (2, for a lost
    process of the run 76); so does a file that the system refuses to read or write, and memory that does not suffice.
    What is none of these shows where it came from, and the program leaves with 70. A run that was asked to stop and
    has saved itself says so and leaves with 75."""
    try:
        main(argv)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
    except (ReadMeError, OSError, MemoryError) as error:
        _fail(_explain(error), exit_code(error))
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        traceback.print_exc()
        _fail(f"{type(error).__name__}: {error}", exit_code(error))


def _fail(message: str, code: int) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _explain(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return f"out of memory: {error}" if str(error) else "out of memory"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def dispatch(argv: list[str] | None = None) -> None:
    """Start the program of `argv[0]`. ConfigError on an unknown stage or none; `--help` and `--version` print."""
    argv = list(sys.argv[1:] if argv is None else argv)
    known = ", ".join(STAGES)
    require(bool(argv), f"no stage given; one of {known}, or --help")
    stage, rest = argv[0], argv[1:]
    if stage in ("-h", "--help"):
        print(usage())
    elif stage == "--version":
        print(importlib.metadata.version("readme-jax"))
    else:
        require(stage in STAGES, f"{stage}: no such stage; one of {known}")
        if stage == "evaluate" and any(word.partition("=")[0] == "--tasks" for word in rest):
            stage = "tasks"  # both spellings, one program
        importlib.import_module(STAGES[stage][0]).main(rest)


def usage() -> str:
    """The text of `readme-jax --help`: one line a stage."""
    width = max(map(len, STAGES))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in STAGES.items()]
    head = "usage: readme-jax <stage> [options]\n\nA dense LLM becomes a Read-ME mixture of experts. Stages:\n"
    return "\n".join([head, *lines, "", "`readme-jax <stage> --help` explains the options of a stage."])


def main() -> None:
    """Entry point of the console command."""
    run(dispatch)
