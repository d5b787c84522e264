"""Imports run one way, files stay readable, every YAML in the repository loads, every program explains itself."""

import ast
import importlib
from pathlib import Path

import pytest

from readme_jax.cli import STAGES
from readme_jax.config import load_yaml
from readme_jax.study import Recipe

ROOT = Path(__file__).resolve().parents[1]

# A module may import only what stands before it. A new module needs a place here.
ORDER = """
    config accelerators peers sharding distributed artifacts metrics checkpoint
    registry gguf_convert domain_text sources weights hf_config hf placement corpus packing data routing
    models models.layers models.parallel models.experts models.backbone models.router
    models.expert_kernels models.expert_pages models.expert_whole models.paged
    statistics calibrate discover carve labels losses optim steps masks evaluate loop refit alternate
    routed teacher flops abstract jaxprs liveness planning
    generation api task_data tasks serving serving.request serving.pages serving.policies serving.scheduler
    serving.traces serving.trace_files serving.bank serving.eviction serving.residency serving.optimum serving.link
    serving.machines serving.report serving.options serving.simulate serving.study serving.paper serving.plots
    serving.sampling serving.segments serving.programs serving.runner serving.mesh_segments serving.mesh_runner
    serving.text serving.outputs serving.transfers serving.recorder serving.parts serving.engine serving.replay
    export report_parts report_page report quickstart study study_result study_page cli
""".split()
LIBRARY = sorted(p for p in (ROOT / "readme_jax").rglob("*.py") if "hf_code" not in p.parts)
PROGRAMS = sorted(p for folder in ("train", "infer") for p in (ROOT / folder).glob("*.py") if p.stem != "__init__")
HF_CODE = sorted((ROOT / "readme_jax" / "hf_code").glob("*.py"))


def dotted(path):
    """`models.experts` of readme_jax/models/experts.py; the facade readme_jax/__init__.py is the empty name."""
    parts = path.relative_to(ROOT / "readme_jax").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(path, *, top_level=False):
    """Dotted names of what a file imports, functions' own imports too unless `top_level`."""
    tree = ast.parse(path.read_text())
    names = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def own_modules(path):
    """Modules of the library (names in ORDER) that a file imports, wherever in the file."""
    found = set()
    for name in imported(path):
        if name.startswith("readme_jax."):
            name = name.removeprefix("readme_jax.")
            while name and name not in ORDER:
                name = name.rpartition(".")[0]
            found.add(name)
    return found - {""}


def test_every_module_has_a_place():
    assert sorted(filter(None, map(dotted, LIBRARY))) == sorted(ORDER)


@pytest.mark.parametrize("path", [p for p in LIBRARY if dotted(p)], ids=dotted)
def test_imports_run_one_way(path):
    name = dotted(path)
    later = {other for other in own_modules(path) if ORDER.index(other) >= ORDER.index(name)}
    assert not later, f"{name} imports {sorted(later)}, which come after it"


@pytest.mark.parametrize("path", LIBRARY + PROGRAMS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_relative_import_no_torch_at_import(path):
    names = imported(path, top_level=True)
    assert not [name for name in imported(path) if name.startswith(".")]
    assert not [name for name in names if name.split(".")[0] in ("torch", "transformers", "matplotlib", "datasets")], (
        "slow or optional packages are imported where they are used"
    )


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_program_imports_no_other_program(path):
    if path.stem in ("quickstart", "study"):
        return  # they chain the stages
    others = [name for name in imported(path) if name.startswith(("readme_jax.train", "readme_jax.infer"))]
    assert not others
    assert own_modules(path), "a program calls the library"


def test_exported_code_stands_alone():
    for path in HF_CODE:
        assert not [name for name in imported(path) if name.split(".")[0] in ("readme_jax", "jax", "flax")], path


@pytest.mark.parametrize("limit, paths", [(420, LIBRARY + HF_CODE), (220, PROGRAMS)], ids=["library", "programs"])
def test_files_stay_short(limit, paths):
    sizes = {p.relative_to(ROOT).as_posix(): len(p.read_text().splitlines()) for p in paths}
    assert {name: lines for name, lines in sizes.items() if lines > limit} == {}


def config_class(stage):
    """The config class of a stage: what its program parses."""
    program = importlib.import_module(STAGES[stage][0])
    word = {"import": "Import", "data": "Prepare"}.get(stage, stage.capitalize())
    return getattr(program, f"{word}Config")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_yaml_loads(path):
    """configs/<run>/<stage>.yaml or <stage>-<variant>.yaml, configs/recipes/<recipe>.yaml,
    configs/study/<study>.yaml."""
    if path.parent.name == "recipes":
        load_yaml(Recipe, path)
        return
    stage = "study" if path.parent.name == "study" else path.stem.split("-")[0]
    assert stage in STAGES, f"{path.name} is not named after a stage"
    load_yaml(config_class(stage), path)


def test_there_are_runs():
    assert {p.name for p in (ROOT / "configs").iterdir() if list(p.glob("*.yaml"))} >= {"quickstart"}


@pytest.mark.parametrize("stage", STAGES)
def test_every_program_answers_help(stage, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(STAGES[stage][0]).main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--config" in shown and "options" in shown


def test_every_program_is_a_stage():
    modules = {f"readme_jax.{p.parent.name}.{p.stem}" for p in PROGRAMS}
    assert modules == {module for module, _ in STAGES.values()}
