"""The report of a whole run: one plain dict in, `report.json`, one self-contained `report.html` and a table out.

The dict (every number finite; NumPy scalars and arrays are turned into plain Python; * marks what may be left out):

    model    {name: str, source: str}
    ladder   {arm: loss}                mean held-out loss in nats per token, mean over domains; arms `dense, static,
                                        static_tuned, routed, routed_tuned` and *`own_domain`
    domains  {domain: {arm: loss}}      the same for each domain, with the arms of the ladder
    errors*  {arm: float}               standard error of the ladder loss, nats; *`gain`: standard error of the paired
                                        difference static_tuned - routed_tuned
    router   {agreement,                share of held-out tokens where argmax of the router = argmax of its label
              entropy,                  nats, at most ln(experts)
              keeps_previous,           share of tokens that keep the previous token's expert
              steps: int, loss_curve: [[step, loss], ...]}
    experts  {names: [str] of E, channels: int (each expert's, a layer), mlp: int (dense channels of a layer),
              load: [share] of E,       share of held-out tokens, sums to 1
              load_by_domain: [[share] of E] in the order of `domains`, each row sums to 1,
              overlap: [[share] of E] of E, share of an expert's channels that the other has too, mean over layers,
              shared_share,             channels that every expert has / channels of an expert
              union_share,              channels that any expert has / mlp
              load_max_over_mean}       largest load / mean load
    curves   {static_tuned, routed_tuned, router: [[step, loss], ...]}   training losses, each may be empty
    strip    [[piece: str, expert: int], ...]   a held-out text, token by token, with the expert of each token
    samples  [{prompt: str, arm: str, ...}]     arms among `dense, static_tuned, routed_tuned`
    stages   {stage: {seconds, tokens, tokens_per_s, peak_memory_gb}}    None where a stage has no such figure;
                                                                         memory is that of the host's process
    export   {folder: str, checks: {name: bool | number | str | None | {ok: bool, value*, rule*: str}}}
    versions {package: str}
    config   {...}                              the resolved configuration, JSON-able

R of an arm is its perplexity over the dense model's, exp(loss - dense); "lnR/static" is ln R over that of the untuned
static mask on the same text. The page itself is made by `report_page`.
"""

import contextlib
import json
import math
import os
import textwrap
import unicodedata
from pathlib import Path
from typing import Any

from readme_jax.artifacts import write_text
from readme_jax.config import ArtifactError, require
from readme_jax.report_page import ARMS, best_arms, check_text, gain, html_page, perplexity, relative

REQUIRED = {
    "model": ("name", "source"),
    "ladder": ("dense", "static", "static_tuned", "routed", "routed_tuned"),
    "domains": (),
    "router": ("agreement", "entropy", "keeps_previous", "steps", "loss_curve"),
    "experts": (
        *("names", "channels", "mlp", "load", "load_by_domain", "overlap"),
        *("shared_share", "union_share", "load_max_over_mean"),
    ),
    "curves": ("static_tuned", "routed_tuned", "router"),
    "strip": None,
    "samples": None,
    "stages": (),
    "export": ("folder", "checks"),
    "versions": (),
    "config": (),
}
STAGE_KEYS = ("seconds", "tokens", "tokens_per_s", "peak_memory_gb")
WIDTH = 100


# ---- the rules --------------------------------------------------------------------------------


def _rule(ok: bool, message: str) -> None:
    require(ok, f"report: {message}", ArtifactError)


def plain(value: Any, where: str = "") -> Any:
    """The same content as dicts with str keys, lists, str, int, float, bool and None.

    NumPy scalars and arrays and paths are converted; a number that is not finite, or any other type, raises
    ArtifactError that names the place.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(k): plain(v, f"{where}.{k}" if where else str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float):
        _rule(math.isfinite(value), f"{where} is {value}, a finite number is needed")
    _rule(value is None or isinstance(value, (bool, int, float, str)), f"{where} is a {type(value).__name__}")
    return value


def _number(value: Any, where: str, low: float = -math.inf, high: float = math.inf) -> float:
    _rule(isinstance(value, (int, float)) and not isinstance(value, bool), f"{where}={value!r} is not a number")
    _rule(low <= value <= high, f"{where}={value} must lie in {low:g} to {high:g}")
    return value


def _keys(part: Any, keys: tuple[str, ...], where: str) -> None:
    _rule(isinstance(part, dict), f"{where} must be a table of names and values")
    for key in keys:
        _rule(key in part, f"{where}.{key} is missing")


def _shares(row: Any, count: int, where: str, total: float | None = None) -> None:
    _rule(isinstance(row, list) and len(row) == count, f"{where} must be a list of {count} numbers")
    for i, value in enumerate(row):
        _number(value, f"{where}[{i}]", 0.0, 1.0 + 1e-6)
    if total is not None:
        _rule(abs(sum(row) - total) < 0.01, f"{where} sums to {sum(row):.4g}, shares must sum to {total:g}")


def _curve(points: Any, where: str) -> None:
    _rule(isinstance(points, list), f"{where} must be a list of [step, loss]")
    for i, point in enumerate(points):
        _rule(isinstance(point, list) and len(point) == 2, f"{where}[{i}] must be [step, loss]")
        for value in point:
            _number(value, f"{where}[{i}]")


def validate(report: dict) -> dict:
    """Check a report against the shape in the module's docstring; returns it with plain Python values only.

    Raises ArtifactError in one line for the first key that is missing or value that breaks a rule.
    """
    report = plain(report)
    for key, inner in REQUIRED.items():
        _rule(key in report, f"{key} is missing")
        if inner is None:
            _rule(isinstance(report[key], list), f"{key} must be a list")
        else:
            _keys(report[key], inner, key)
    for where, losses in {
        "ladder": report["ladder"],
        **{f"domains.{k}": v for k, v in report["domains"].items()},
    }.items():
        _keys(losses, tuple(report["ladder"]), where)
        for arm, loss in losses.items():
            _rule(arm in ARMS, f"{where}.{arm}: no such arm; arms are {', '.join(ARMS)}")
            _number(loss, f"{where}.{arm}", 0.0)
            _rule(arm in report["ladder"], f"{where}.{arm} is not in the ladder")
    _rule(bool(report["domains"]), "domains is empty")
    errors = report.get("errors") or {}
    _keys(errors, (), "errors")
    for arm, value in errors.items():
        _rule(arm == "gain" or arm in report["ladder"], f"errors.{arm} is not in the ladder")
        _number(value, f"errors.{arm}", 0.0)

    router, experts = report["router"], report["experts"]
    for key in ("agreement", "keeps_previous"):
        _number(router[key], f"router.{key}", 0.0, 1.0)
    _number(router["entropy"], "router.entropy", -1e-6)
    _number(router["steps"], "router.steps", 0)
    _curve(router["loss_curve"], "router.loss_curve")
    for arm in ("static_tuned", "routed_tuned", "router"):
        _curve(report["curves"][arm], f"curves.{arm}")

    names, domains = experts["names"], report["domains"]
    _rule(isinstance(names, list) and len(names) > 0, "experts.names must be a list of at least one name")
    count = len(names)
    for key in ("mlp", "channels"):
        _number(experts[key], f"experts.{key}", 1, experts["mlp"] if key == "channels" else math.inf)
    for key in ("shared_share", "union_share"):
        _number(experts[key], f"experts.{key}", 0.0, 1.0)
    _number(experts["load_max_over_mean"], "experts.load_max_over_mean", 0.0)
    _shares(experts["load"], count, "experts.load", 1.0)
    for key, rows, total in (("load_by_domain", len(domains), 1.0), ("overlap", count, None)):
        table = experts[key]
        _rule(isinstance(table, list) and len(table) == rows, f"experts.{key} must have {rows} rows")
        for i, row in enumerate(table):
            _shares(row, count, f"experts.{key}[{i}]", total)
    for i, item in enumerate(report["strip"]):
        ok = isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) and type(item[1]) is int
        _rule(ok and 0 <= item[1] < count, f"strip[{i}]={item!r} must be [piece, expert], expert in 0 to {count - 1}")
    for i, sample in enumerate(report["samples"]):
        _keys(sample, ("prompt", "dense", "routed_tuned"), f"samples[{i}]")
    for name, stage in report["stages"].items():
        _keys(stage, STAGE_KEYS, f"stages.{name}")
        for key in STAGE_KEYS:
            if stage[key] is not None:
                _number(stage[key], f"stages.{name}.{key}", 0.0)
    _keys(report["export"]["checks"], (), "export.checks")
    return report


# ---- the terminal -----------------------------------------------------------------------------


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _cell(text: str, width: int, right: bool = False) -> str:
    """`text` without unprintable characters, cut and padded to `width` terminal columns."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    if _columns(text) > width:
        while _columns(text) > width - 1:
            text = text[:-1]
        text += "~"
    pad = " " * (width - _columns(text))
    return pad + text if right else text + pad


def _row(first: str, cells: list[str], first_width: int, width: int) -> str:
    return (_cell(first, first_width) + "".join(_cell(c, width, right=True) for c in cells)).rstrip()


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def terminal_table(report: dict) -> str:
    """The report as plain monospaced text of at most 100 columns, no colours; ends with a line feed."""
    report = validate(report)
    ladder, experts, router = report["ladder"], report["experts"], report["router"]
    arms = [arm for arm in ARMS if arm in ladder]
    errors = report.get("errors") or {}
    share = experts["channels"] / experts["mlp"]
    lines = [
        f"{report['model']['name']}: {len(experts['names'])} experts of {experts['channels']} of {experts['mlp']} "
        f"FFN channels ({share:.0%})",
        "",
        _row("Held-out text, mean over domains", ["loss", "+- s.e.", "perplexity", "R", "lnR/static"], 36, 12),
    ]
    for arm in arms:
        r, rest = relative(ladder, arm)
        cells = [f"{ladder[arm]:.4f}", _figure(errors.get(arm), ".4f"), perplexity(ladder[arm])]
        lines.append(_row(ARMS[arm].title, [*cells, f"{r:.3f}", _figure(rest, ".2f")], 36, 12))
    lines += ["", *textwrap.wrap(gain(report)[1], WIDTH), ""]

    marked = best_arms(report)
    lines.append(_row("Perplexity (* best at this size)", [ARMS[a].short for a in arms], 34, 11))
    for name, losses in report["domains"].items():
        cells = [f"{perplexity(losses[a])}{'*' if a == marked[name] else ' '}" for a in arms]
        lines.append(_row(name, cells, 34, 11))
    lines += [
        "",
        f"Router   agrees with its labels on {router['agreement']:.1%} of tokens, "
        f"{router['keeps_previous']:.1%} keep the previous expert,",
        f"         entropy {router['entropy']:.3f} nats, {router['steps']} steps",
        f"Experts  channels in every expert {experts['shared_share']:.1%} of an expert, in any "
        f"{experts['union_share']:.1%} of the FFN; load max/mean {experts['load_max_over_mean']:.2f}",
        "",
        _row("Expert", ["load"], 34, 11),
    ]
    for name, load in zip(experts["names"], experts["load"]):
        lines.append(_row(str(name), [f"{load:.1%}"], 34, 11) + "  " + "#" * round(50 * load))
    lines += ["", _row("Stage", ["seconds", "tokens", "tokens/s", "peak GB"], 34, 13)]
    for name, stage in report["stages"].items():
        forms = (".1f", ",.0f", ",.0f", ".2f")
        lines.append(_row(name, [_figure(stage[k], f) for k, f in zip(STAGE_KEYS, forms)], 34, 13))
    lines += ["", f"Export   {report['export']['folder']}"]
    for name, check in report["export"]["checks"].items():
        ok, text = check_text(check)
        lines.append(f"  {'' if ok is None else 'pass ' if ok else 'FAIL '}{name}{': ' + text if text else ''}")
    return "\n".join(_cell(line, WIDTH).rstrip() for line in lines) + "\n"


# ---- the files --------------------------------------------------------------------------------


def write_report(report: dict, folder: str | Path) -> tuple[Path, Path]:
    """Write `report.json` and `report.html` into `folder` (made when it is missing); returns the two paths.

    Both are rendered before the first is written, and each is written whole or not at all. ArtifactError for a report
    that `validate` refuses or a folder that cannot be written.
    """
    report = validate(report)
    texts = {"report.json": json.dumps(report, indent=1) + "\n", "report.html": html_page(report)}
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_text(folder / name, text)
    except OSError as error:
        for name in texts:
            with contextlib.suppress(OSError):
                (folder / f".{name}.tmp").unlink()
        raise ArtifactError(f"report: {folder} cannot be written ({os.strerror(error.errno or 0)})") from None
    return folder / "report.json", folder / "report.html"
