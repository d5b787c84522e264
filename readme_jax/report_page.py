"""The HTML page of a report: one string, nothing loaded from outside, no script. See `report` for the dict."""

import json
import math
from typing import Any, NamedTuple

from readme_jax.report_parts import CSS, bar, esc, heat, line_chart, section, table


class Arm(NamedTuple):
    """How an arm of the ladder is named and explained."""

    title: str
    short: str
    text: str


ARMS = {
    "dense": Arm(
        "Dense model",
        "dense",
        "The original model, every FFN channel on. The reference, R = 1, and what the others try to keep.",
    ),
    "static": Arm(
        "Static mask",
        "static",
        "One mask for all tokens, of the size of an expert: plain pruning. No routing, nothing trained.",
    ),
    "own_domain": Arm(
        "Own-domain expert",
        "own domain",
        "Each text runs on the expert of the domain it was taken from. Nothing is trained, and the domain is told, not "
        "guessed: a yardstick for the router, not something that can be deployed.",
    ),
    "routed": Arm(
        "Routed",
        "routed",
        "The same experts; the router picks one per token from the token ids alone. The router is trained, the model's "
        "own weights are the original ones.",
    ),
    "static_tuned": Arm(
        "Static mask, tuned",
        "static+",
        "The static mask with its weights tuned by the same loss on as many tokens as the routed model. The baseline "
        "to beat: a gain over it is a gain of routing, not of training.",
    ),
    "routed_tuned": Arm(
        "Routed, tuned",
        "routed+",
        "The routed model with router and weights tuned: the result of this run, and the model that was exported.",
    ),
}
HUES = 8  # colours of the strip; further experts repeat them with another underline


# ---- figures shared with the terminal table ---------------------------------------------------


def relative(ladder: dict[str, float], arm: str) -> tuple[float, float | None]:
    """(R, ln R over the static mask's ln R). The second is None when the static mask loses nothing."""
    log_r, log_static = ladder[arm] - ladder["dense"], ladder["static"] - ladder["dense"]
    return math.exp(min(log_r, 700.0)), log_r / log_static if log_static > 0 else None


def best_arms(report: dict) -> dict[str, str]:
    """Per domain the arm with the lowest loss among those that run at an expert's size. A static mask may win."""
    return {
        name: min((a for a in ARMS if a in row and a != "dense"), key=row.__getitem__)
        for name, row in report["domains"].items()
    }


def perplexity(loss: float) -> str:
    """exp(loss) as text of at most 8 characters."""
    value = math.exp(min(loss, 700.0))
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def gain(report: dict) -> tuple[str, str]:
    """(verdict, one sentence): the tuned routed model against the equally tuned static mask, ladder losses.

    The verdict is `wins` or `loses`, or `noise` when the difference is below two of its standard errors (where known).
    """
    ladder, error = report["ladder"], (report.get("errors") or {}).get("gain")
    nats = ladder["static_tuned"] - ladder["routed_tuned"]
    known = f" +- {error:.3f} (paired standard error)" if error is not None else ""
    text = (
        f"After tuning, routing is {abs(nats):.3f}{known} nats {'lower' if nats > 0 else 'higher'} than a static mask "
        f"of the same size (perplexity {math.expm1(min(-nats, 700.0)):+.1%})."
    )
    return "noise" if abs(nats) <= 2 * (error or 0.0) else "wins" if nats > 0 else "loses", text


def check_text(check: Any) -> tuple[bool | None, str]:
    """(passed, or None where nothing was judged; the figure and its rule in words) of one export check."""
    if isinstance(check, bool):
        return check, ""
    if isinstance(check, dict):
        value = "" if check.get("value") is None else _short(check["value"])
        rule = f" ({check['rule']})" if check.get("rule") else ""
        return check.get("ok"), (value + rule).strip()
    return None, "not run" if check is None else _short(check)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- sections ---------------------------------------------------------------------------------


def _head(report: dict) -> str:
    model, experts, router, ladder = (report[k] for k in ("model", "experts", "router", "ladder"))
    verdict, sentence = gain(report)
    size = experts["channels"] / experts["mlp"]
    tiles = [
        (f"{relative(ladder, 'routed_tuned')[0]:.2f}", "R, routed and tuned", "perplexity / dense"),
        (f"{relative(ladder, 'static_tuned')[0]:.2f}", "R, static mask, tuned", "the baseline to beat"),
        (f"{router['agreement']:.1%}", "router agreement", "tokens that get their label's expert"),
        (f"{size:.0%}", "of the FFN per token", f"{experts['channels']:,} of {experts['mlp']:,} channels a layer"),
    ]
    boxes = "".join(
        f'<div class="tile"><b>{esc(value)}</b><span>{esc(label)}</span><small>{esc(more)}</small></div>'
        for value, label, more in tiles
    )
    mark = {"wins": "Routing wins.", "loses": "Routing does not win here.", "noise": "No clear winner."}[verdict]
    return (
        f'<header><p class="kicker">Read-ME mixture of experts</p><h1>{esc(model["name"])}</h1>'
        f'<p class="note">{len(experts["names"])} experts, made from {esc(model["source"])}</p>'
        f'<p class="verdict {verdict}"><b>{mark}</b> {esc(sentence).replace("+-", "&#177;")}</p>'
        f'<div class="tiles">{boxes}</div></header>'
    )


def _ladder(report: dict) -> str:
    ladder, errors = report["ladder"], report.get("errors") or {}
    arms = [arm for arm in ARMS if arm in ladder]
    top = max(relative(ladder, arm)[0] * math.exp(min(errors.get(arm, 0.0), 5.0)) for arm in arms)
    bars, rows = [], []
    for arm in arms:
        r, rest = relative(ladder, arm)
        error = errors.get(arm)
        whisker = None
        if error and arm != "dense":
            whisker = (r * math.exp(-error) / top, r * math.exp(min(error, 5.0)) / top)
        part = "-" if rest is None else f"{rest:.2f}"
        bars.append(
            bar(
                esc(ARMS[arm].title),
                r / top,
                f"<b>{r:.2f}</b>",
                f"arm-{arm}",
                whisker,
                f"{ARMS[arm].title}: R = {r:.3f}",
            )
        )
        loss = f"{ladder[arm]:.4f}" + (f" <small>&#177; {error:.4f}</small>" if error is not None else "")
        rows.append([esc(ARMS[arm].title), loss, perplexity(ladder[arm]), f"{r:.3f}", part])
    head = ["Arm", "Loss, nats", "Perplexity", "R", "ln R / static"]
    note = (
        "Held-out text, mean over domains. R is perplexity over the dense model's, lower is better. "
        "ln R / static puts the untuned static mask at 1 and the dense model at 0. Pale bars: weights not tuned."
        + (" Lines on the bars: one standard error of the arm's loss." if any(a in errors for a in arms) else "")
    )
    means = "".join(f"<dt>{esc(ARMS[a].title)}</dt><dd>{esc(ARMS[a].text)}</dd>" for a in arms)
    caution = (
        '<p class="note">How far to trust this: one run, one seed, short training and few held-out tokens per '
        "domain. R depends on the text, so compare arms on this page with each other, not with figures from other "
        "texts; a difference smaller than its standard error shows nothing.</p>"
    )
    body = f'<div class="bars wide">{"".join(bars)}</div>{table(head, rows, "ladder")}'
    return section("Perplexity ladder", body, note) + section("What each arm is", f"<dl>{means}</dl>{caution}")


def _domains(report: dict) -> str:
    arms, best = [arm for arm in ARMS if arm in report["ladder"]], best_arms(report)
    rows = []
    for name, losses in report["domains"].items():
        cells = [
            f'<td class="best" title="best at this size">{perplexity(losses[a])}</td>'
            if a == best[name]
            else perplexity(losses[a])
            for a in arms
        ]
        rows.append([esc(name), *cells])
    note = "Token-weighted over held-out documents. Marked: the best arm that runs at an expert's size."
    return section(
        "Perplexity by domain", table(["Domain", *(esc(ARMS[a].title) for a in arms)], rows, "domains"), note
    )


def _router(report: dict) -> str:
    router, experts = report["router"], report["experts"]
    count = len(experts["names"])
    facts = [
        ("Agreement with its labels", f"{router['agreement']:.1%} of tokens"),
        ("Keeps the previous token's expert", f"{router['keeps_previous']:.1%} of tokens"),
        ("Entropy", f"{router['entropy']:.3f} nats, at most {math.log(count):.3f}"),
        ("Training", f"{router['steps']:,} steps"),
        ("Largest load over mean", f"{experts['load_max_over_mean']:.2f}"),
        ("Channels in every expert", f"{experts['shared_share']:.1%} of an expert"),
        ("Channels in any expert", f"{experts['union_share']:.1%} of the FFN"),
    ]
    top = max(max(experts["load"]), 1 / count)
    bars = "".join(
        bar(esc(name), load / top, f"{load:.1%}", "arm-routed_tuned", tip=f"{name}: {load:.1%} of held-out tokens")
        for name, load in zip(experts["names"], experts["load"])
    )
    figures = table([], [[esc(a), esc(b)] for a, b in facts], "router", "facts")
    body = f'<div class="two"><div><h3>Figures</h3>{figures}</div>'
    body += f'<div><h3>Expert load, share of held-out tokens</h3><div class="bars">{bars}</div></div></div>'
    return section("Router and experts", body)


def _maps(report: dict) -> str:
    experts = report["experts"]
    chance = experts["channels"] / experts["mlp"]
    names = [str(n) for n in experts["names"]]
    load = heat(list(report["domains"]), names, experts["load_by_domain"], 0.0, "domain by expert", "Domain")
    same = heat(names, names, experts["overlap"], chance, "overlap", "Expert")
    return section(
        "Who goes where",
        load,
        "Percent of a domain's held-out tokens (row) that the router sends to an expert (column).",
    ) + section(
        "Overlap between experts",
        same,
        f"Percent of an expert's channels that the other has too, mean over layers. Two random choices share "
        f"{chance:.0%}: no shade there, full shade at 100%.",
    )


def _curves(report: dict) -> str:
    curves = report["curves"]
    tuning = {ARMS[a].title: (f"arm-{a}", curves[a]) for a in ("static_tuned", "routed_tuned")}
    router = {"Router": ("arm-own_domain", curves["router"] or report["router"]["loss_curve"])}
    return section(
        "Loss curves",
        f'<div class="two">{line_chart("Tuning of the weights, training loss", tuning)}'
        f"{line_chart('Router, training loss', router)}</div>",
    )


def _hue(expert: int) -> str:
    return f"e{expert % HUES}" + (f" again{min(expert // HUES, 2)}" if expert >= HUES else "")


def _strip(report: dict) -> str:
    names, strip = [str(n) for n in report["experts"]["names"]], report["strip"]
    if not strip:
        return ""
    keys = "".join(
        f'<span><i class="swatch {_hue(e)}"></i><b>{e + 1}</b> {esc(name)}</span>' for e, name in enumerate(names)
    )
    parts, previous = [], -1
    for piece, expert in strip:
        mark = f'<sup aria-hidden="true">{expert + 1}</sup>' if expert != previous else ""
        parts.append(f'<span class="t {_hue(expert)}" title="{esc(names[expert])}">{mark}{esc(piece)}</span>')
        previous = expert
    note = (
        "A held-out text, each token in the colour of the expert that runs it; a small number where the expert changes."
    )
    return section("A text by expert", f'<div class="legend">{keys}</div><p class="strip">{"".join(parts)}</p>', note)


def _samples(report: dict) -> str:
    cards = []
    for sample in report["samples"]:
        texts = "".join(
            f'<div><h3>{esc(ARMS[a].title)}</h3><p class="text">{esc(str(sample[a]).strip(chr(10)))}</p></div>'
            for a in ("dense", "static_tuned", "routed_tuned")
            if sample.get(a) is not None
        )
        cards.append(
            f'<article><p class="prompt">{esc(sample["prompt"])}</p><div class="three">{texts}</div></article>'
        )
    note = "Continuations of the same prompts. They show what the text is like; they measure nothing."
    return section("Samples", "".join(cards), note) if cards else ""


def _run(report: dict) -> str:
    def number(value: float | None, form: str) -> str:
        return "&#8211;" if value is None else format(value, form)

    rows = [
        [
            esc(name),
            number(s["seconds"], ",.1f"),
            number(s["tokens"], ",.0f"),
            number(s["tokens_per_s"], ",.0f"),
            number(s["peak_memory_gb"], ".2f"),
        ]
        for name, s in report["stages"].items()
    ]
    total = sum(s["seconds"] or 0.0 for s in report["stages"].values())
    peak = max((s["peak_memory_gb"] or 0.0 for s in report["stages"].values()), default=0.0)
    stages = section(
        "Stages",
        table(["Stage", "Seconds", "Tokens", "Tokens / s", "Peak host memory, GB"], rows, "stages"),
        f"{total / 60:.1f} minutes in all, peak {peak:.2f} GB of host memory.",
    )
    checks = []
    for name, check in report["export"]["checks"].items():
        ok, text = check_text(check)
        state = (
            ""
            if ok is None
            else '<span class="pass">&#10003; pass</span>'
            if ok
            else '<span class="fail">&#10007; FAIL</span>'
        )
        checks.append([esc(name), state, esc(text)])
    export = section(
        "Export to PyTorch",
        table(["Check", "Result", "Figure"], checks, "export checks", "words"),
        f"Folder <code>{esc(report['export']['folder'])}</code>",
    )
    versions = table(["Package", "Version"], [[esc(k), esc(v)] for k, v in report["versions"].items()], "versions")
    config = esc(json.dumps(report["config"], indent=2, ensure_ascii=False))
    more = (
        f"<details><summary>Versions</summary>{versions}</details>"
        f"<details><summary>Configuration</summary><pre>{config}</pre></details>"
    )
    return stages + export + section("How it was made", more)


def html_page(report: dict) -> str:
    """The page of a validated report as one ASCII string (so no reader can mistake its encoding)."""
    parts = (_head, _ladder, _domains, _router, _maps, _curves, _strip, _samples, _run)
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{esc(report['model']['name'])}: Read-ME report</title><style>{CSS}</style></head>"
        f"<body><main>{''.join(part(report) for part in parts)}</main></body></html>\n"
    )
    return page.encode("ascii", "xmlcharrefreplace").decode()
