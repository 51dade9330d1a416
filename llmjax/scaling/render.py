"""Plans, and searches among plans, as text."""

from collections.abc import Sequence
from typing import Any

from llmjax import human

Plan = dict[str, Any]
PHASES = {"forward": "forward", "again": "computed again", "backward": "backward", "other": "update and others"}
PARTS = {  # of the memory table, in order
    "parameters": "parameters",
    "frozen": "frozen parameters",
    "optimizer": "optimizer state",
    "average": "moving average",
    "gradients": "gradients",
    "cast parameters": "parameters, cast",
    "gathered parameters": "parameters, gathered",
    "activations kept": "activations kept",
    "activations of a layer": "activations of a layer",
    "logits": "logits",
    "reference": "reference",
    "teacher": "teacher",
    "engine's weights": "weights of the engine",
    "engine's cache": "cache of the engine's slots",
    "rollouts beyond an update": "rollouts, beyond the memory of an update",
}


def gib(size: float) -> str:
    """Bytes as GiB, the compiler's unit."""
    return f"{size / 2**30:.2f} GiB"


def render(plan: Plan) -> str:
    """The plan on one screen."""
    mesh = " ".join(f"{axis}={size}" for axis, size in plan["mesh"].items()) or "one device"
    s = plan["settings"]
    lines = [
        f"{plan['config']}: {human.count(plan['parameters'])} parameters on {plan['topology']} "
        f"({plan['chips']:,} chips{_devices(plan)}), mesh {mesh}",
        f"  {s['rows']:,} rows of {s['sequence_length']:,} tokens a step in {s['micro_batches']} micro-batch{'es' if s['micro_batches'] > 1 else ''}, "
        f"remat {s['remat']}, attention {s['attention']}, zero {s['zero']}"
        f"{', residual stream over tensor' if s['sequence_over_tensor'] or s['features_over_tensor'] else ''}, "
        f"{s['optimizer']}",
    ]
    if "pipeline" in plan:
        p = plan["pipeline"]
        rounds = f", {p['rounds']} rounds" if p["rounds"] > 1 else ""
        lines.append(f"  pipeline: {p['parts']} parts{rounds}, bubble {p['bubble']:.1%}")
    if plan["exact"]:
        how = f"compiled in {human.duration(plan['seconds_to_compile'])}" if "seconds_to_compile" in plan else "refused"
        lines.append(f"  {how} by {plan['made_by']}")
        if chosen := plan["compiler_options"]["chosen"]:
            options = " ".join(f"{name}={value}" for name, value in plan["compiler_options"]["options"].items())
            lines.append(f"  compiler options {' '.join(chosen)}: {options or 'none for this chip'}")
    else:
        lines.append("  on paper: every number is by formula, not by a compiler")
    lines += ["", *_memory(plan)]
    if "seconds" in plan:
        lines += ["", *_sent(plan), "", *_time(plan)]
    if plan["fits"]:
        lines += ["", *_run(plan), _checkpoint(plan)]
    return "\n".join(lines)


def _devices(plan: Plan) -> str:
    return f", {plan['devices']:,} devices; numbers are a device's" if plan["devices"] != plan["chips"] else ""


def _memory(plan: Plan) -> list[str]:
    m, available = plan["memory"], plan["available"]
    verdict = "fits" if plan["fits"] else f"DOES NOT FIT: {gib(plan.get('over_by', m['peak'] - available))} too much"
    lines = [f"memory of a chip: {gib(m['peak'])} of {gib(available)}, {verdict}"]
    names = PARTS if not plan["exact"] else dict(list(PARTS.items())[:4])
    lines += [f"  {gib(m[key]):>12}  {name}" for key, name in names.items() if m.get(key)]
    if "temporaries" in m:
        padding = m["arguments"] - sum(m[key] for key in ("parameters", "frozen", "optimizer", "average"))
        lines.append(f"  {gib(m['temporaries']):>12}  gradients, activations and other temporaries")
        lines.append(f"  {gib(padding + m['outputs'] + m['code']):>12}  batch, layout of the state, code")
    if "evaluation" in m:
        lines.append(f"  {gib(m['evaluation']):>12}  in all while held-out text is measured")
    if plan["exact"] and plan["fits"] and m["peak"] > available:
        lines.append(
            "  (more than available, but the compiler accepts it, because not all temporaries exist at the same time)"
        )
    if plan["exact"]:
        paper = plan["on_paper"]["memory"]["peak"]
        error = f", {paper / m['peak'] - 1:+.0%}" if m["peak"] else ""
        lines.append(f"  ({gib(paper)} on paper{error})")
    return lines


def _sent(plan: Plan) -> list[str]:
    """The table of collectives."""
    if not plan["exact"]:
        lines = ["what a device sends in a step (by formula):"]
        for one in plan["collectives"]:
            how = "beside products" if one["hidden"] else "waited for"
            lines.append(
                f"  {one['kind']:<20} {'+'.join(one['axes']):<14} {human.size(one['sent']):>9}  {one['why']}, {how}"
            )
        return lines
    lines = [
        "what a device sends in a step (exposed: no other instruction runs at the same time):",
        f"  {'kind':<20} {'axes':<14} {'count':>8} {'bytes':>9} {'sent':>9} {'on links':>9} {'exposed':>9}",
    ]
    for one in plan["collectives"]:
        lines.append(
            f"  {one['kind']:<20} {'+'.join(one['axes']) or 'none':<14} {one['count']:>8,.0f} {human.size(one['bytes']):>9} "
            f"{human.size(one['sent']):>9} {human.duration(one['seconds']):>9} {human.duration(one['exposed']):>9}"
        )
    return lines


def _time(plan: Plan) -> list[str]:
    f, t = plan["flops"], plan["seconds"]
    lines = [
        f"FLOPs of a device and step: {human.count(f['model'])} of the model, {human.count(f['executed'])} executed "
        f"({human.count(f['recomputed'])} more: recomputation{', bubbles' if 'pipeline' in plan and plan['exact'] else ''})",
        f"time of a step: at least {human.duration(t['step'])}, MFU at most {plan['mfu']:.1%} ({'roofline of every instruction' if plan['exact'] else 'by formula'}; "
        f"products alone {human.duration(t['products'])}, exposed collectives {human.duration(t['exposed'])})",
    ]
    beside = {"rollouts": "rollouts", "forward": "forward passes beside the update"}
    if found := [f"{name} {human.duration(t[key])}" for key, name in beside.items() if t.get(key)]:
        lines.append(f"  of it {', '.join(found)}")
    if "compiler" in t:
        lines.append(
            f"  {human.duration(t['compiler'])}, MFU {plan['mfu_by_compiler']:.1%}, with the compiler's own estimate of the "
            "cycles of its instructions"
        )
    if plan.get("work"):
        phases = {name: sum(w["seconds"] for w in plan["work"] if w["phase"] == name) for name in PHASES}
        lines.append(
            "  of it " + ", ".join(f"{PHASES[name]} {human.duration(took)}" for name, took in phases.items() if took)
        )
        lost = sorted(plan["work"], key=lambda w: w["at_peak"] - w["seconds"])[:4]
        said = (f"{w['phase']} {w['part']} {human.duration(w['seconds'] - w['at_peak'])}" for w in lost)
        lines.append(f"  beyond the peak of the products: {', '.join(said)}")
    missing = plan.get("not_counted", {})
    if missing.get("kernels"):
        names = ", ".join(f"{name} x {count:,.0f}" for name, count in missing["kernels"].items())
        lines.append(f"  kernels whose FLOPs are not known, taken by their bytes: {names}")
    if missing.get("loops"):
        lines.append(f"  {missing['loops']} loops of unknown length are counted once")
    return lines


def _checkpoint(plan: Plan) -> str:
    """The size of a checkpoint beside the shortest notice before machines are taken away."""
    made, seconds = plan["checkpoint"], 15
    return (
        f"a checkpoint: {gib(made['bytes'])}, {gib(made['bytes_of_host'])} from each of {made['hosts']:,} hosts; to save it "
        f"within the {seconds} s of a spot pod a host must write {human.size(made['bytes_of_host'] / seconds)}/s"
    )


def _run(plan: Plan) -> list[str]:
    r = plan["run"]
    energy = (
        f"{r['megawatt_hours']:,.1f} MWh" if r["megawatt_hours"] < 1000 else f"{r['megawatt_hours'] / 1000:,.1f} GWh"
    )
    cost = f"at least ${r['price']:,.0f} at ${r['price_per_chip_hour']:.2f} a chip-hour ({r['price_source']})" if r["price"] else (
        "no price is known for this chip: give --price"
    )  # fmt: skip
    return [
        f"the run: {r['steps']:,} steps, {human.count(r['tokens'])} tokens, at least {r['days']:.1f} days without a failure, "
        f"at most {r['tokens_per_second_per_chip']:,.0f} tokens/s a chip",
        f"  at least {human.count(r['chip_hours'])} chip-hours, {cost}",
        f"  at least {energy} if every chip draws {r['watts']:.0f} W all the time ({r['watts_source']}), without cooling",
    ]


def render_search(tried: Sequence[tuple[dict[str, Any], Plan | str]]) -> str:
    """The results of a search: plans that fit by time, then the others by memory."""
    lines = [f"  {'step':>9} {'MFU':>6} {'memory':>11}  changes"]

    def order(item: tuple[dict[str, Any], Plan | str]) -> tuple[int, float]:
        plan = item[1]
        if isinstance(plan, str):
            return 2, 0.0
        return (0, slowest(plan)) if plan["fits"] else (1, plan["memory"]["peak"])

    for changes, plan in sorted(tried, key=order):
        said = " ".join(
            f"--config.{key}={value!r}" if " " in str(value) else f"--config.{key}={value}"
            for key, value in changes.items()
        )
        said = said or "(as it is)"
        if isinstance(plan, str):
            lines.append(f"  {'-':>9} {'-':>6} {'-':>11}  {said}: {plan}")
        elif plan["fits"]:
            mfu = plan.get("mfu_by_compiler", plan["mfu"])
            lines.append(f"  {human.duration(slowest(plan)):>9} {mfu:>6.1%} {gib(plan['memory']['peak']):>11}  {said}")
        else:
            lines.append(f"  {'refused':>9} {'':>6} {gib(plan['memory']['peak']):>11}  {said}")
    return "\n".join(lines)


def slowest(plan: Plan) -> float:
    """The longest estimate of a step in a plan, in seconds."""
    return max(plan["seconds"]["step"], plan["seconds"].get("compiler", 0.0))
