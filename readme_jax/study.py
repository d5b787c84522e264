"""A study: recipes compared on the same model, text, tokens and seeds. What is run, in which order, what comes of it.

A recipe is options of stages. With a number of tuned tokens and a seed it becomes a chain of stages, each a folder
named by what decides its content: what two recipes have in common is run once.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from readme_jax import artifacts
from readme_jax.alternate import AlternateConfig
from readme_jax.calibrate import CalibrateConfig
from readme_jax.carve import CarveConfig
from readme_jax.config import ArtifactError, ConfigError, from_dict, load_yaml, require, to_dict
from readme_jax.data import DataConfig, DomainConfig
from readme_jax.evaluate import ORACLES, EvaluateConfig
from readme_jax.masks import MasksConfig
from readme_jax.quickstart import DOMAINS, SEQ

ONE = {"mesh": {"data": 1}}  # steps of one record: one device, however many there are
PACE = {"checkpoint": {"minutes": 2.0}}
NONE = {"steps": 0, "batch": 1}  # a phase of `alternate` that is left out
TEXT = DataConfig(
    domains={name: DomainConfig(source="fallback") for name in DOMAINS},
    seq=SEQ,
    train_tokens=20480,
    eval_tokens=1536,
    calibration_tokens=1024,
)
ALWAYS = ("static", "paper")
DRAWS = 2000
REFIT = ("batch", "accum", "cut", "refit", "optim", "tuned")  # what a closed form without steps takes of a phase
FEW = 8  # records of a domain below which it has no interval of its own
CONFIGS = {
    "calibrate": CalibrateConfig,
    "carve": CarveConfig,
    "alternate": AlternateConfig,
    "masks": MasksConfig,
    "evaluate": EvaluateConfig,
}
TAKEN = {  # what the study itself says
    "calibrate": ("model", "data", "out", "mesh"),
    "carve": ("model", "statistics", "out"),
    "router": (),
    "masks": ("model", "data", "out", "steps", "seed", "checkpoint"),
    "experts": ("steps",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a dense model becomes experts and a router: options of the stages, one file a recipe, its name the file's."""

    carve: dict[str, Any]
    """Options of `carve`; `carving: static` makes one mask, which has no router."""
    calibrate: dict[str, Any] | None = None
    """Options of `calibrate`; without, its statistics are those of all recipes that have none."""
    router: dict[str, Any] | None = None
    """Options of the router phase of `alternate`, steps and batch among them. Tuned without any tuned tokens too, and
    again when masks were learned."""
    masks: dict[str, Any] | None = None
    """Options of `masks`, and `share`: of the tuned tokens, those that masks are learned from, with frozen weights and
    before the experts are tuned."""
    experts: dict[str, Any] | None = None
    """Options of the expert phase of `alternate`, without its steps; none: weights stay as they are, and `masks` has
    all tokens. Without either there is nothing to tune: the recipe is run untuned only. `refit` is of calibration text:
    the untuned recipe has it too."""
    retune: bool = True
    """Tune the router again on the labels of learned masks; false: it stays the one they were learned with."""
    rounds: int = 1
    """Rounds of `alternate`."""

    def __post_init__(self):
        for part, taken in TAKEN.items():
            for key in taken:
                require(key not in (getattr(self, part) or {}), f"{part}.{key}: the study sets it")
        for part in ("masks", "experts"):
            for key in ("batch", "accum"):
                value = (getattr(self, part) or {}).get(key, 1)
                whole = isinstance(value, int) and value >= 1
                require(whole, f"{part}.{key}={value!r} must be a whole number of at least 1")
        alone, found = self.carve.get("carving") == "static", self.carve.get("carving") == "discovered"
        window = (self.calibrate or {}).get("window", 0)
        require(not found or window, "calibrate.window: missing; carving=discovered groups windows of text")
        require(self.carve.get("storage", "tied") == "tied", "carve.storage: recipes are tuned with tied experts")
        require(alone or self.router is not None, "router: missing; only carving=static has none")
        require(not alone or self.router is None, "router: has no meaning with carving=static, there is no choice")
        require(self.rounds >= 1, f"rounds={self.rounds} must be at least 1")
        learned = self.masks is not None and self.router is not None
        require(self.retune or learned, "retune=false has no meaning without masks and router")
        whole = isinstance(self.cut, int) and self.cut >= 1
        require(whole, f"experts.cut={self.cut!r} must be a whole number of at least 1")
        if self.masks is not None:
            share = self.masks.get("share", 1.0)
            require(isinstance(share, int | float), f"masks.share={share!r} must be a number")
            if self.experts is None:
                require(share == 1, f"masks.share={share}: without experts all tokens are for masks")
            else:
                require(0 < share < 1, f"masks.share={share} must be above 0 and below 1: the rest tunes experts")

    @property
    def cut(self) -> int:
        """Rows that a record is cut into where experts are tuned."""
        return (self.experts or {}).get("cut", 1)

    @property
    def tuned(self) -> bool:
        """True when there is anything to spend tuned tokens on."""
        return self.masks is not None or self.experts is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """One study."""

    out: Path
    """Folder to work in; the same command goes on where an interrupted one stopped."""
    recipes: tuple[Path, ...]
    """One YAML file a recipe, its name the file's: `static` and `paper` must be among them. `dense` is always there."""
    data: DataConfig = TEXT
    """Domains, record length and tokens of each split: the quickstart's domains unless the YAML names others."""
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Dense model: hub name, local folder or .gguf file."""
    unseen: tuple[str, ...] = ()
    """Domains that take no part in calibration and tuning; their test records are evaluated apart."""
    tokens: tuple[int, ...] = (0,)
    """Tuned tokens (of masks and of experts, together) to compare at, whole records each; 0, untuned, among them."""
    default: str = "paper"
    """The recipe that is the default: run first of all."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of data order and router. All recipes run with the first; the `finalists`, and `static` and `paper` with
    them, with the others too, at the largest number of tokens."""
    finalists: tuple[str, ...] = ()
    """Recipes that run with every seed."""
    bounds: tuple[str, ...] = ()
    """Arms of `evaluate` beside the router's, `oracle` and `oracle_layers`, for routed recipes. Run last of all; tokens
    are labelled by the weights before they were tuned."""

    def __post_init__(self):
        seq, names = self.data.seq, [path.stem for path in self.recipes]
        for name in names:
            require(names.count(name) == 1, f"recipes: {name} is given twice")
        require("dense" not in names, "recipes: dense is the model itself, and always there")
        for name in ALWAYS:
            require(name in names, f"recipes: {name} is missing; every study compares with it")
        for field, given in (("default", (self.default,)), ("finalists", self.finalists)):
            for name in given:
                require(name in names, f"{field}={name} is not one of the recipes: {', '.join(names)}")
        for arm in self.bounds:
            require(arm in ORACLES, f"bounds={arm} is not one of: {', '.join(ORACLES)}")
        require(0 in self.tokens, f"tokens={list(self.tokens)}: 0, untuned, must be among them")
        for count in self.tokens:
            require(count >= 0 and count % seq == 0, f"tokens={count} must be whole records of {seq}")
        for field in ("tokens", "seeds", "finalists", "unseen"):
            values = getattr(self, field)
            require(len(set(values)) == len(values), f"{field}={list(values)} names one twice")
        require(len(self.seeds) > 0, "seeds: at least one is needed")
        require(
            0 <= min(self.seeds) <= max(self.seeds) < 2**32 - 1, f"seeds={list(self.seeds)}: each in 0 .. 2**32 - 2"
        )
        require(len(self.seeds) == 1 or len(self.finalists) > 0, "finalists: none, so a second seed has no meaning")
        for name in self.unseen:
            require(name in self.data.domains, f"unseen={name} is not one of data.domains")
        require(len(self.unseen) < len(self.data.domains), "unseen: no domain is left to calibrate and tune on")
        there = len(self.seen.domains) * (self.data.train_tokens // seq) * seq
        require(max(self.tokens) <= there, f"tokens={max(self.tokens)}: data has only {there} to train on")

    @property
    def seen(self) -> DataConfig:
        """The domains that calibration and tuning take their text from."""
        domains = {name: domain for name, domain in self.data.domains.items() if name not in self.unseen}
        return dataclasses.replace(self.data, domains=domains)

    @property
    def held_out(self) -> DataConfig:
        """Test records of the unseen domains; train and calibration are empty."""
        domains = {name: self.data.domains[name] for name in self.unseen}
        return dataclasses.replace(self.data, domains=domains, train_tokens=0, calibration_tokens=0)

    @property
    def most(self) -> int:
        """The largest number of tuned tokens."""
        return max(self.tokens)


def read_recipes(config: StudyConfig) -> dict[str, Recipe]:
    """The recipes by name, those first that the others are judged by."""
    files = {path.stem: path for path in config.recipes}
    names = dict.fromkeys([config.default, *ALWAYS, *files])
    return {name: load_yaml(Recipe, files[name]) for name in names}


# ---- stages -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """One run of a stage's program. `config` is its whole config, `out` in it named by `key`."""

    program: str
    key: str
    config: Any
    options: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where its result is."""
        return self.config.out

    @property
    def finished(self) -> bool:
        """True when its result is there."""
        return (self.folder / artifacts.MANIFEST).is_file()


def make_stage(
    out: Path, program: str, options: dict[str, Any], parents: Mapping[str, Stage | str], where: str
) -> Stage:
    """The stage with these options and parents (another stage, or a folder's name below `out`); ConfigError, beginning
    with `where`, for what its program would refuse."""
    heads = {role: parent if isinstance(parent, str) else parent.key for role, parent in parents.items()}
    paths = {r: str(out / parent if isinstance(parent, str) else parent.folder) for r, parent in parents.items()}
    config = from_dict(CONFIGS[program], {**options, **paths, "out": str(out)}, where)
    fields = {name: value for name, value in artifacts.result_fields(config).items() if name not in parents}
    text = json.dumps([program, fields, heads], sort_keys=True)
    key = f"{program}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    config = dataclasses.replace(config, out=out / "stages" / key)
    return Stage(program, key, config, {**options, **paths, "out": str(config.out)})


def plain(options: Any) -> Any:
    """What YAML can hold of options: dataclasses become mappings, paths text."""
    return json.loads(json.dumps(to_dict(options), default=str))


def split_steps(recipe: Recipe, tokens: int, seq: int) -> tuple[int, int]:
    """(mask steps, expert steps of a round) that read exactly `tokens`; ConfigError where no whole numbers do."""
    records = tokens // seq

    def size(options: dict[str, Any] | None) -> int:
        return (options or {}).get("batch", 1) * (options or {}).get("accum", 1)

    step = size(recipe.experts) * recipe.rounds
    masks = 0
    if recipe.masks is not None:
        masks = records // size(recipe.masks)
        if recipe.experts is not None:
            masks = round(recipe.masks.get("share", 1.0) * records / size(recipe.masks))
            require(masks > 0, f"masks.share={recipe.masks.get('share')}: no step of {records} records")
    left = records - masks * size(recipe.masks)
    require(recipe.experts is None or left > 0, f"masks.share={(recipe.masks or {}).get('share')}: no step is left")
    left, row = left * recipe.cut, seq // recipe.cut
    whole = left % step == 0 if recipe.experts is not None else left == 0
    asked = f"{recipe.rounds} rounds of steps of {size(recipe.experts)}" if recipe.experts is not None else "mask steps"
    require(whole, f"tokens={tokens}: {left} rows of {row} tokens do not divide into {asked}")
    return masks, left // step if recipe.experts is not None else 0


def chain(config: StudyConfig, name: str, recipe: Recipe, tokens: int, seed: int) -> list[Stage]:
    """The stages from statistics to the model of a recipe with this many tuned tokens and this seed; the last one is
    the model. Nothing is run."""
    out, where = config.out, f"recipe {name}"
    dense = {"model": "dense", "data": "data"}
    stages = [make_stage(out, "calibrate", {**(recipe.calibrate or {}), **ONE}, dense, f"{where}.calibrate")]
    cut = {"model": "dense", "statistics": stages[0]}
    stages.append(make_stage(out, "carve", recipe.carve, cut, f"{where}.carve"))
    tune = {"rounds": recipe.rounds, "seed": seed, **ONE, **PACE}

    def alternate(router: dict[str, Any] | None, experts: dict[str, Any] | None, rounds: int = recipe.rounds) -> None:
        options = tune | {"rounds": rounds, "router": router or NONE, "experts": experts or NONE}
        stages.append(make_stage(out, "alternate", options, {"model": stages[-1], "data": "data"}, where))

    whole = config.data.seq % recipe.cut == 0
    require(whole, f"{where}: experts.cut={recipe.cut} does not divide data.seq={config.data.seq}")
    try:
        masks, experts = split_steps(recipe, tokens, config.data.seq) if tokens else (0, 0)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    tuned = {**(recipe.experts or {}), "steps": experts} if experts else None
    if not experts and (recipe.experts or {}).get("refit"):  # calibration text alone: tuned tokens are none
        tuned = {key: value for key, value in (recipe.experts or {}).items() if key in REFIT} | {"steps": 0}
    # Labels are the dense model's: in one round the untuned recipe's router is the one to go on with.
    first = recipe.router is not None and (masks > 0 or experts == 0 or recipe.rounds == 1)
    if first:
        alternate(recipe.router, None)
    if masks:
        options = {key: value for key, value in (recipe.masks or {}).items() if key != "share"}
        options |= {"steps": masks, "seed": seed, **PACE}
        stages.append(make_stage(out, "masks", options, {"model": stages[-1], "data": "data"}, f"{where}.masks"))
    again = recipe.router if (masks and recipe.retune) or not first else None
    if again or tuned:
        alternate(again, tuned)
    return stages


def evaluations(config: StudyConfig, model: Stage | str) -> dict[str, Stage]:
    """The evaluations of a model (`dense` by its folder's name): `test`, and `unseen` where there are such domains."""
    options = {"arms": ["dense" if isinstance(model, str) else "routed"], **ONE}
    folders = {"test": "data"} | ({"unseen": "unseen"} if config.unseen else {})
    return {
        name: make_stage(config.out, "evaluate", options, {"model": model, "data": folder}, name)
        for name, folder in folders.items()
    }


def bounds(config: StudyConfig, recipe: Recipe, stages: list[Stage]) -> Stage | None:
    """The evaluation of what an oracle would choose for the last of a chain's stages; None where nobody asks, or where
    there is no choice. Labels are of a run with all channels, which half of them were not tuned for: where the last
    stage tuned experts, the one before it is asked."""
    if not config.bounds or recipe.router is None:
        return None
    model = stages[-1]
    tuned = model.program == "alternate" and model.config.experts.steps + model.config.experts.refit > 0
    parents: dict[str, Stage | str] = {"model": model, "data": "data"} | ({"labeller": stages[-2]} if tuned else {})
    return make_stage(config.out, "evaluate", {"arms": list(config.bounds), **ONE}, parents, "bounds")


@dataclasses.dataclass(frozen=True)
class Job:
    """One recipe with a number of tuned tokens and a seed: its chain of stages, its evaluations, and the bounds'."""

    recipe: str
    tokens: int
    seed: int
    stages: list[Stage]
    evaluations: dict[str, Stage]
    bounds: Stage | None = None

    @property
    def finished(self) -> bool:
        """True when all evaluations are there; the bounds may still be missing."""
        return all(stage.finished for stage in self.evaluations.values())


def plan(config: StudyConfig, recipes: dict[str, Recipe]) -> list[Job]:
    """Every job, in the order to run them: untuned first, which is cheap, then the largest number of tokens, those
    between, and last the other seeds. ConfigError for anything that a stage would refuse of its options."""
    rest = sorted(set(config.tokens) - {0, config.most})
    counts = [(config.seeds[0], n) for n in dict.fromkeys([0, config.most, *rest])]
    found = []
    for seed, count in counts + [(seed, config.most) for seed in config.seeds[1:]]:
        for name, recipe in recipes.items():
            extra = seed != config.seeds[0] and name not in (*config.finalists, *ALWAYS)
            if extra or (count and not recipe.tuned):
                continue
            stages = chain(config, name, recipe, count, seed)
            asked = bounds(config, recipe, stages)
            found.append(Job(name, count, seed, stages, evaluations(config, stages[-1]), asked))
    return found


# ---- statistics -------------------------------------------------------------------------------

Rows = dict[str, dict[str, list[float]]]  # domain -> loss sums and tokens of its records


def mean_loss(rows: Rows) -> tuple[float, dict[str, float]]:
    """Loss in nats per token: the mean over domains, and by domain."""
    by = {name: sum(own["loss"]) / max(sum(own["tokens"]), 1.0) for name, own in rows.items()}
    return float(np.mean(list(by.values()))), by


def difference(first: Rows, second: Rows, draws: int = DRAWS, seed: int = 0) -> dict[str, Any]:
    """first - second, nats per token, paired by record: `mean` over domains, its 95 % interval `ci` by bootstrap, and
    both `by_domain`.

    Of the n records of each domain n - 1 are drawn with replacement: with n, the variance of a mean of few records
    would come out too small by (n - 1) / n. Percentiles, with 3 records a domain somewhat too narrow (93 % of normal
    draws for seven domains, 87 % for two). No interval (None) where a domain has a single record, nor for a domain by
    itself that has fewer than FEW.
    """
    require(first.keys() == second.keys(), "records of other domains", ArtifactError)
    rng, by, drawn = np.random.default_rng(seed), {}, []
    for name in first:
        weight_N = np.asarray(first[name]["tokens"], np.float64)
        same = np.array_equal(weight_N, np.asarray(second[name]["tokens"]))
        require(same, f"domain {name}: other records, nothing to pair", ArtifactError)
        gap_N = np.asarray(first[name]["loss"], np.float64) - np.asarray(second[name]["loss"], np.float64)
        own_K, n = None, len(gap_N)
        if n > 1:
            pick_KN = rng.integers(0, n, (draws, n - 1))
            own_K = gap_N[pick_KN].sum(1) / np.maximum(weight_N[pick_KN].sum(1), 1.0)
        few = n < FEW  # their percentiles would be of a handful of different draws
        by[name] = {"mean": float(gap_N.sum() / max(weight_N.sum(), 1.0)), "ci": None if few else interval(own_K)}
        drawn.append(own_K)
    whole = None if any(own_K is None for own_K in drawn) else np.mean(drawn, axis=0)
    return {"mean": float(np.mean([own["mean"] for own in by.values()])), "ci": interval(whole), "by_domain": by}


def interval(drawn_K: np.ndarray | None) -> list[float] | None:
    """The middle 95 % of draws."""
    return None if drawn_K is None else [float(x) for x in np.percentile(drawn_K, (2.5, 97.5))]


def quality(rows: Rows, dense: Rows, static: Rows | None) -> dict[str, Any]:
    """Figures of one arm on one set of domains. `r`: perplexity over the dense model's; `ci`: of its logarithm, the
    excess loss. `static_gap`: how far the loss lies below the static mask's (positive: better)."""
    loss, by = mean_loss(rows)
    over = difference(rows, dense)
    entry = {"loss": loss, "r": float(np.exp(over["mean"])), "excess": over["mean"], "ci": over["ci"]}
    if static is not None:
        gain = difference(static, rows)
        entry |= {"static_gap": gain["mean"], "static_gap_ci": gain["ci"]}
    own = over["by_domain"]
    entry["by_domain"] = {n: {"loss": by[n], "excess": own[n]["mean"], "ci": own[n]["ci"]} for n in rows}
    return entry
