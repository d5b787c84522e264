"""A carved model folder -> a folder that PyTorch's transformers load, and the check that it computes the same.

In: one of our model folders (Hugging Face layout with `readme` tensors). Out: the same tensors, byte for byte, with the
two Python files of `hf_code`, an `auto_map`, the tokenizer and a model card. The check runs in a process of its own.
"""

import importlib.resources
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from readme_jax import artifacts, hf
from readme_jax.config import ArtifactError, ExpertConfig, ModelConfig, RouterConfig, require

CODE = ("configuration_readme.py", "modeling_readme.py")
CLASS = {"llama": "ReadMeLlama", "mistral": "ReadMeMistral", "qwen2": "ReadMeQwen2", "qwen3": "ReadMeQwen3"}
CARD = {
    "name": str,  # title of the card
    "base_model": str,  # hub name of the dense model
    "license": str,  # SPDX-like name, of the weights
    "language": (str, list),
    "summary": str,  # one paragraph of the author's own
    "figures": dict,  # title -> {row: value} or {row: {column: value}}
}


def export(model_folder: str | Path, out: str | Path, *, card: dict | None = None) -> Path:
    """Write `out`, which `AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)` opens. Returns `out`.

    `card`: the keys of CARD, all optional, for the README.md. A finished `out` of the same input is left as it is.
    Raises ConfigError (dense model, unknown card key), CheckpointError (bad weights), ArtifactError (`out` taken).
    """
    folder, out = Path(model_folder), Path(out)
    card = card or {}
    for key, value in card.items():
        require(key in CARD, f"card.{key}: no such key; known keys: {', '.join(CARD)}")
        require(isinstance(value, CARD[key]), f"card.{key}: {value!r} has the wrong type")
    cfg, experts, router = hf.read_config(folder)
    require(experts is not None, f"{folder / 'config.json'}: readme is missing: a dense model has nothing to export")
    assert experts is not None
    reader = hf.Reader(folder)
    hf.check(reader, cfg, experts, router)
    made = (folder / artifacts.MANIFEST).is_file()
    if made:
        artifacts.verify(folder, hashes="changed")
    parents = {"model": folder} if made else {}
    config = {"card": card, "model": None if made else _identity(folder)}
    if artifacts.finished(out, "export", config, parents):
        return out
    readme = model_card(cfg, experts, router, card)
    code = importlib.resources.files("readme_jax.hf_code")
    with artifacts.building(out, "export", config, parents) as work:
        writer = hf.Writer(work.path)
        for name in reader.names():
            writer.add(name, reader.get(name))
        writer.close()
        hf.copy_side_files(folder, work.path)
        for name in CODE:
            artifacts.write_text(work.path / name, code.joinpath(name).read_text())
        base = json.loads((folder / "config.json").read_text())
        artifacts.write_text(work.path / "config.json", json.dumps(exported_config(base, cfg), indent=2) + "\n")
        artifacts.write_text(work.path / "README.md", readme)
        work.info.update(family=cfg.family, experts=experts.experts, tensors=len(reader.names()))
    return out


def exported_config(base: dict, cfg: ModelConfig) -> dict:
    """config.json of the exported folder: `base` (the model folder's own) under our model type and classes."""
    name = CLASS[cfg.family]
    return base | {
        "architectures": [f"{name}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_readme.{name}Config",
            "AutoModelForCausalLM": f"modeling_readme.{name}ForCausalLM",
        },
        "base_model_type": cfg.family,
        "model_type": f"readme_{cfg.family}",
    }


def _identity(folder: Path) -> list:
    """Stands for the content of a folder without a manifest: names, sizes and times of change."""
    stats = [(p.name, p.stat()) for p in sorted(folder.iterdir()) if p.is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


# ---- the model card ---------------------------------------------------------------------------


def model_card(cfg: ModelConfig, experts: ExpertConfig, router: RouterConfig | None, card: dict) -> str:
    """README.md of an exported folder: YAML front matter, what it is, how to load it, the figures of `card`."""
    front = {key: card[key] for key in ("base_model", "license", "language") if key in card}
    front |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mixture-of-experts", "pre-gating", "read-me", cfg.family],
    }
    # JSON is YAML, and quotes whatever needs it.
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    lines += [f"# {card.get('name', 'Read-ME mixture of experts')}", ""]
    if "summary" in card:
        lines += [card["summary"].strip(), ""]
    source = f"`{card['base_model']}`" if "base_model" in card else f"a dense {cfg.family} model"
    chosen = (
        f"A causal router of {router.layers} layer(s), width {router.width}, reads the token ids alone and names one "
        "expert for each token, used in every layer, before the backbone runs (pre-gating)."
        if router
        else "There is no router: one static expert serves every token."
        if experts.experts == 1
        else "There is no router: the expert of each token is passed as `expert_ids`."
    )
    lines += [
        f"A mixture of experts refactored from {source} after *Read-ME: Refactorizing LLMs as Router-Decoupled Mixture "
        "of Experts with System Co-Design* (arXiv 2410.19123).",
        "",
        f"- {cfg.layer} layers, {experts.experts} expert(s) of {experts.channels} FFN channels each, "
        f"{experts.storage} storage ({cfg.mlp} channels stored in a layer).",
        f"- Channels chosen by `{experts.importance}`, carving `{experts.carving}`; experts: "
        + ", ".join(f"{i} {name}" for i, name in enumerate(experts.names))
        + ".",
        f"- {chosen}",
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'path = "path/to/this/folder"',
        "tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)",
        "model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)",
        'inputs = tokenizer("The capital of France is", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))",
    ]
    if router:
        lines += ["print(model.route(inputs.input_ids))  # the expert of each token"]
    lines += ["```", ""]
    if experts.storage == "tied":
        lines += [
            f"The weights are also a valid dense {cfg.family} checkpoint with the FFN channels permuted: opened with "
            f"`{_plain(cfg.family)}.from_pretrained(path)` all channels run (the `readme.*` tensors are reported as "
            "unused).",
            "",
        ]
    if card.get("figures"):
        lines += ["## Measured", ""]
        for title, rows in card["figures"].items():
            lines += [f"### {title}", "", *_markdown(rows, f"card.figures.{title}"), ""]
    return "\n".join(lines)


def _plain(family: str) -> str:
    return CLASS[family].removeprefix("ReadMe") + "ForCausalLM"


def _markdown(rows: Any, where: str) -> list[str]:
    require(isinstance(rows, dict) and len(rows) > 0, f"{where}: a mapping of rows is needed")
    nested = [isinstance(row, dict) for row in rows.values()]
    require(all(nested) or not any(nested), f"{where}: rows are all values or all mappings of columns")
    table = rows if all(nested) else {name: {"value": value} for name, value in rows.items()}
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    lines = ["| | " + " | ".join(map(str, columns)) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in table.items():
        lines.append(f"| {name} | " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |")
    return lines


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- the check --------------------------------------------------------------------------------


def check_export(
    folder: str | Path,
    ids_BT: np.ndarray,
    expert_BT: np.ndarray,
    logits_BTV: np.ndarray,
    *,
    prompts: Sequence[Sequence[int]] = (),
    continuations: Sequence[Sequence[int]] = (),
    dense_logits_BTV: np.ndarray | None = None,
    tolerance: float = 1e-3,
) -> dict:
    """Open `folder` in PyTorch as a user would, in float32 on the CPU, and compare with what JAX computed.

    ids_BT int, full rows without padding; expert_BT int and logits_BTV float are the answers for them.
    prompts / continuations: token ids and the greedy tokens that must follow; end-of-text does not stop them.
    dense_logits_BTV: answers with all channels on, compared with the folder opened as the plain family (tied storage).
    Returns figures: tokens, expert_mismatches, logits_max_abs, greedy_tokens, greedy_mismatches, plain_opens,
    plain_max_abs (None without dense logits), tolerance, seconds. ArtifactError when anything differs or does not load.
    """
    require(_has_torch(), "the export check needs PyTorch: pip install 'readme-jax[torch]'")
    require(len(prompts) == len(continuations), f"{len(prompts)} prompts for {len(continuations)} continuations")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        arrays = {"ids": ids_BT, "expert": expert_BT, "logits": logits_BTV}
        if dense_logits_BTV is not None:
            arrays["dense"] = dense_logits_BTV
        for name, array in arrays.items():
            np.save(Path(scratch) / f"{name}.npy", np.asarray(array))
        greedy = [[list(map(int, p)), list(map(int, c))] for p, c in zip(prompts, continuations)]
        request = {"folder": str(Path(folder).resolve()), "greedy": greedy}
        (Path(scratch) / "request.json").write_text(json.dumps(request))
        # A fresh process: nothing of it stays in memory, and the code files are copied into the scratch folder and not
        # into the user's cache. Offline: a local folder needs no hub.
        env = os.environ | {"HF_MODULES_CACHE": f"{scratch}/modules", "HF_HUB_OFFLINE": "1"}
        program = "import sys; from readme_jax import export; export._answer(sys.argv[1])"
        done = subprocess.run([sys.executable, "-c", program, scratch], env=env, capture_output=True, text=True)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise ArtifactError(f"{folder}: cannot be opened and run in PyTorch: {last}")
        figures = json.loads((Path(scratch) / "answer.json").read_text())
    figures |= {"tolerance": tolerance, "seconds": time.monotonic() - start}
    wrong, greedy = figures["expert_mismatches"], figures["greedy_mismatches"]
    problems = [f"the tensors {figures['missing']} are missing"] if figures["missing"] else []
    if wrong:
        problems.append(f"{wrong} of {figures['tokens']} tokens take another expert")
    for key, what in (("logits_max_abs", "logits"), ("plain_max_abs", "dense logits")):
        if figures[key] is not None and figures[key] > tolerance:
            problems.append(f"{what} differ by {figures[key]:.3g}, at most {tolerance:g} is allowed")
    if greedy:
        problems.append(f"{greedy} of {figures['greedy_tokens']} greedy tokens differ")
    require(not problems, f"{folder}: in PyTorch {'; '.join(problems)}", ArtifactError)
    return figures


def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def _answer(scratch: str) -> None:
    """The other process of `check_export`: reads request.json and the arrays, writes answer.json."""
    import torch
    import transformers

    where = Path(scratch)
    request = json.loads((where / "request.json").read_text())
    folder = request["folder"]
    want = {name: np.load(where / f"{name}.npy", mmap_mode="r") for name in ("ids", "expert", "logits")}
    ids_BT = torch.from_numpy(np.array(want["ids"], np.int64))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    model.eval()
    missing = sorted(info["missing_keys"])
    mismatches, worst = 0, 0.0
    with torch.inference_mode():
        for ids_1T, expert_T, logits_TV in zip(ids_BT.split(1), want["expert"], want["logits"]):
            out = model(ids_1T, use_cache=False)
            mismatches += int((out.expert_ids[0].numpy() != expert_T).sum())
            worst = _worst(worst, out.logits[0].numpy(), logits_TV)
        # No end token and none of the folder's own sampling settings: only the arg max counts.
        model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
        greedy, wrong = 0, 0
        for prompt, continuation in request["greedy"]:
            if not continuation:
                continue
            made = model.generate(torch.tensor([prompt]), max_new_tokens=len(continuation))[0, len(prompt) :].tolist()
            greedy += len(continuation)
            wrong += sum(a != b for a, b in zip(made, continuation)) + abs(len(continuation) - len(made))
        config = model.config
        del model
        plain_class = getattr(transformers, _plain(config.base_model_type))
        plain, info = plain_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        missing += sorted(info["missing_keys"])
        plain_worst = None
        if (where / "dense.npy").exists():
            plain_worst = 0.0
            for ids_1T, logits_TV in zip(ids_BT.split(1), np.load(where / "dense.npy", mmap_mode="r")):
                plain_worst = _worst(plain_worst, plain(ids_1T, use_cache=False).logits[0].numpy(), logits_TV)
    answer = {
        "tokens": ids_BT.numel(),
        "expert_mismatches": mismatches,
        "logits_max_abs": worst,
        "greedy_tokens": greedy,
        "greedy_mismatches": wrong,
        "plain_opens": True,
        "plain_max_abs": plain_worst,
        "missing": missing,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    (where / "answer.json").write_text(json.dumps(answer))


def _worst(so_far: float, got: np.ndarray, want: np.ndarray) -> float:
    """The larger of `so_far` and the largest difference; a NaN counts as infinite."""
    difference = float(np.abs(got - want).max())
    return max(so_far, difference if np.isfinite(difference) else float("inf"))
