"""The report of a run: one HTML file without outside links, and the dataset card (README.md).

Everything comes from metrics.json, manifest.json and the pairs, so it can be made again at any time: `rc-ray report RUN`.
"""

from __future__ import annotations

import html
import io
import json
from itertools import islice
from typing import Any

from rc_ray.config.selection import OPTIONS
from rc_ray.ledger.rundir import RunDir

NUM_EXAMPLES = 5
# What a reward comes from: the first of these that its kind has.
SOURCES = ("model", "policy", "function", "class", "url")
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #ccc;padding:.3rem .6rem;text-align:right}"
    "td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}"
    "blockquote{border-left:4px solid #2a7;margin:.5rem 0;padding:.1rem 1rem;white-space:pre-wrap}"
    "blockquote.rejected{border-color:#c55}pre{background:#f6f6f6;padding:1rem;overflow:auto}"
)


def write_report(run: RunDir) -> str:
    """Writes report/index.html and README.md; returns the path of the report."""
    metrics, manifest = run.root.read_json("metrics.json"), run.manifest()
    examples = list(
        islice((pair for table in run.pairs.tables() for pair in table.slice(0, NUM_EXAMPLES).to_pylist()), NUM_EXAMPLES)
    )
    run.report.write_bytes("index.html", _html(metrics, manifest, examples).encode())
    run.root.write_bytes("README.md", _card(metrics, manifest).encode())
    return (run.report / "index.html").uri


def plot_rewards(comparison: dict[str, Any]) -> Any:
    """A matplotlib figure: mean reward per objective before and after, with intervals. `comparison` as in metrics.json."""
    from matplotlib.figure import Figure

    objectives = comparison["objectives"]
    figure = Figure(figsize=(2.6 * len(objectives) + 1, 3.2), layout="constrained")
    for number, (name, values) in enumerate(objectives.items()):
        axes = figure.add_subplot(1, len(objectives), number + 1)
        for x, (label, colour) in enumerate((("before", "#888888"), ("after", "#22aa77"))):
            interval = values[label]
            errors = [[interval["mean"] - interval["low"]], [interval["high"] - interval["mean"]]]
            axes.errorbar([x], [interval["mean"]], yerr=errors, fmt="o", color=colour, capsize=6, markersize=8)
        axes.set_xticks([0, 1], ["before", "after"])
        axes.set_xlim(-0.5, 1.5)
        axes.set_title(f"{name}: {values['difference']['mean']:+.3f}")
    return figure


def plot_training(history: list[dict[str, float]]) -> Any:
    """A matplotlib figure of loss, accuracy, margin, and what the rewards of both answers became, over steps. `history` as the trainer logs it."""
    from matplotlib.figure import Figure

    steps = [entry for entry in history if "loss" in entry]
    figure = Figure(figsize=(12, 2.6), layout="constrained")
    panels = {
        "loss": ["loss"],
        "accuracy": ["rewards/accuracies"],
        "margin": ["rewards/margins"],
        "beta x change of log-prob": ["rewards/chosen", "rewards/rejected"],
    }
    for number, (title, keys) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), number + 1)
        for key, colour in zip(keys, ("#22aa77", "#cc5555"), strict=False):
            shown = [(entry["step"], entry[key]) for entry in steps if key in entry]
            axes.plot([s for s, _ in shown], [v for _, v in shown], color=colour, label=key.split("/")[-1])
        if len(keys) > 1:
            axes.legend()
        axes.set_title(title)
        axes.set_xlabel("step")
    return figure


def _svg(figure: Any) -> str:
    import matplotlib

    buffer = io.StringIO()
    # Ids in the drawing are random unless salted; the same run gives the same file.
    with matplotlib.rc_context({"svg.hashsalt": "rc_ray"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _table(header: list[str], rows: list[list[Any]]) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _interval(interval: dict[str, float], sign: str = "") -> str:
    return f"{interval['mean']:{sign}.3f} [{interval['low']:{sign}.3f}, {interval['high']:{sign}.3f}]"


def _html(metrics: dict[str, Any], manifest: dict[str, Any], examples: list[dict[str, Any]]) -> str:
    counts = metrics["identity"]
    parts = [
        f"<h1>rc_ray run</h1><p>{counts['prompts']} prompts = {counts['paired']} paired + {counts['dropped']} dropped</p>",
        _table(["drop reason", "prompts"], sorted(counts["drops"].items(), key=lambda i: -i[1])),
    ]
    policies = metrics["sampling"].get("policies")
    if policies:
        columns = ["candidates", "tokens", "chosen", "rejected"]
        parts.append(_table(["policy", *columns], [[name, *(p[c] for c in columns)] for name, p in policies.items()]))
    scoring = metrics.get("scoring")
    if scoring:
        columns = list(dict.fromkeys(column for summary in scoring.values() for column in summary))
        rows = [[name, *(summary.get(column, "") for column in columns)] for name, summary in scoring.items()]
        parts += ["<h2>Scoring</h2>", _table(["objective", *columns], rows)]
    comparison = metrics.get("evaluation")
    if comparison:
        rows = [
            [name, _interval(c["before"]), _interval(c["after"]), _interval(c["difference"], "+"), _interval(c["win_rate"])]
            for name, c in comparison["objectives"].items()
        ]
        parts += [
            f"<h2>Rewards before and after</h2><p>{comparison['num_prompts']} held-out prompts, "
            f"{comparison['confidence']:.0%} paired bootstrap intervals</p>",
            _table(["objective", "before", "after", "difference", "win rate"], rows),
            _svg(plot_rewards(comparison)),
        ]
    training = metrics.get("training")
    if training:
        parts += [
            f"<h2>Training</h2><p>{training['num_pairs']} pairs, {training['steps']} steps, longest pair "
            f"{training['longest_pair']} tokens, {training['repeated']} pairs taken twice per epoch to fill the last batch</p>",
            *(f"<p>{html.escape(line)}</p>" for line in training.get("remarks", [])),
            _svg(plot_training(training["log_history"])),
        ]
    if examples:
        parts.append("<h2>Some pairs</h2>")
    for pair in examples:
        parts.append(
            f"<h3>{html.escape(pair['prompt'][-1]['content'])}</h3><p>gap {pair['gap']:.3f}</p>"
            f"<blockquote>{html.escape(pair['chosen'][-1]['content'])}</blockquote>"
            f"<blockquote class=rejected>{html.escape(pair['rejected'][-1]['content'])}</blockquote>"
        )
    parts.append(f"<h2>Where it comes from</h2><pre>{html.escape(json.dumps(manifest, indent=1, ensure_ascii=False))}</pre>")
    return f"<!doctype html><meta charset=utf-8><title>rc_ray run</title><style>{STYLE}</style>" + "\n".join(parts)


def _source(fields: dict[str, Any]) -> str:
    """What the answers were sampled from."""
    generation = fields["generation"]
    policies = generation.get("policies") or {}
    if not policies:
        return f"`{fields['model']}`" + (f" with the adapter `{generation['adapter']}`" if generation.get("adapter") else "")
    whole = sum(p["weight"] for p in policies.values())
    return "; ".join(
        f"{100 * p['weight'] / whole:.1f} % {name}: `{p['model'] or fields['model']}`"
        + (f" with the adapter `{p['adapter']}`" if p["adapter"] else "")
        for name, p in policies.items()
    )


def _card(metrics: dict[str, Any], manifest: dict[str, Any]) -> str:
    counts, fields = metrics["identity"], manifest["result_fields"]
    drops = "\n".join(f"| {reason} | {n} |" for reason, n in sorted(counts["drops"].items(), key=lambda i: -i[1]))
    rewards = "\n".join(
        f"| {name} | {r['kind']} | {next(r[key] for key in SOURCES if key in r)} |" for name, r in fields["rewards"].items()
    )
    selection = fields["selection"]
    consistent = selection["strategy"] in ("rcs", "rc_all")
    rule = f"{selection['consistency']} Reward Consistency (arXiv 2504.11337), " if consistent else ""
    gap = f", gap `{selection['gap']}`" if "gap" in OPTIONS[selection["strategy"]] else ""
    tags = ", ".join(["preference", "dpo", *(["reward-consistency"] if consistent else [])])
    return f"""---
task_categories: [text-generation]
tags: [{tags}]
configs: [{{config_name: default, data_files: "pairs/*.parquet"}}]
---
# {"Reward-consistent preference" if consistent else "Preference"} pairs

Made with rc_ray {manifest["versions"].get("rc-ray", "")}: {fields["generation"]["num_candidates"]} answers per prompt from {_source(fields)},
pairs selected by {rule}strategy `{selection["strategy"]}`{gap}.

    datasets.load_dataset("parquet", data_files="pairs/*.parquet")

{counts["prompts"]} prompts = {counts["paired"]} paired + {counts["dropped"]} dropped; {counts["pairs"]} pairs

| drop reason | prompts |
|---|---|
{drops}

| objective | kind | source |
|---|---|---|
{rewards}

Prompts: `{fields["prompts"]["path"]}` (content {manifest["data_hashes"]["prompts"]}). Seed {manifest["seed"]}. Fingerprint {manifest["fingerprint"]}.
The licences of the prompts, of the policy and of the reward models apply to what was made with them.
"""
