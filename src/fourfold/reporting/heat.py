"""The page's section on calibration: which expert of which layer saw how many tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fourfold.reporting.charts import COLD, LEVELS, HeatRow, heat_map
from fourfold.reporting.document import Calibration, Document, ExpertTokens
from fourfold.reporting.marks import Html, details, element, join, paragraph, section, tile
from fourfold.reporting.tally import Coldness, coldness, labelled
from fourfold.reporting.words import clipped, figure, plural, runs, whole

SHOWN_LAYERS = 12
"""More lines of cold experts than these are folded away."""

_PERCENT = f"{COLD * 100:g}\u00a0%"


def calibration_tile(document: Document) -> Html:
    """What was calibrated, in one figure."""
    known = document.calibration
    if known is None:
        return tile("Calibration", "none", _without(document))
    return tile("Calibration", f"{whole(known.tokens) or '?'} tokens", _short_verdict(document))


def calibration_section(document: Document) -> Html:
    """The data, the heat map, the cold experts by name; one line where nothing was calibrated."""
    if document.calibration is None and not document.experts:
        return paragraph(
            f"No calibration: {_without(document)}, so there are no token counts to show.",
            classes="muted",
        )
    parts: list[Html] = []
    if document.calibration is not None:
        parts.append(_data(document.calibration))
    rows = labelled(document.experts)
    all_experts = document.calibration is not None and document.calibration.all_experts
    if rows:
        parts += _experts(rows, all_experts=all_experts)
    else:
        parts.append(_no_rows(document.calibration))
    return section("Calibration tokens by expert", *parts)


def _without(document: Document) -> str:
    if document.recipe.get("activations", "none") == "none":
        return "activations stay at 16 bits"
    return "the document holds no account of it"


def _short_verdict(document: Document) -> str:
    rows = labelled(document.experts)
    if rows:
        seen = coldness(rows)
        return f"{plural(seen.unreached_count, 'expert')} unreached, {seen.cold_count:,} cold"
    unreached = document.calibration.unreached_experts if document.calibration else None
    return "no routed experts" if unreached is None else f"{plural(unreached, 'expert')} unreached"


def _data(known: Calibration) -> Html:
    times = f"{whole(known.samples)} samples × {whole(known.seq)} tokens"
    amount = f"{times}, {whole(known.tokens)} in all" if known.samples and known.seq else ""
    amount = amount or (f"{whole(known.tokens)} tokens" if known.tokens else "")
    parts = [part for part in (clipped(known.origin), amount) if part]
    if known.digest:
        parts.append(join(["sha256 ", element("code", known.digest[:16])]))
    return paragraph(join(["Data: ", join(parts, " · ")]), classes="small muted wide")


def _no_rows(known: Calibration | None) -> Html:
    unreached = known.unreached_experts if known else None
    if unreached is None:
        return paragraph("The document counts no tokens by expert.")
    return paragraph(
        f"{plural(unreached, 'expert')} saw no token; the document counts none by expert."
    )


def _experts(rows: Mapping[str, ExpertTokens], *, all_experts: bool) -> list[Html]:
    seen = coldness(rows)
    heat = heat_map([_heat_row(seen, label, row) for label, row in rows.items()])
    return [
        _explanation(rows, all_experts=all_experts),
        element("div", Html(heat), "scroll"),
        _legend(seen),
        _cold_list("Unreached, no token", seen.unreached),
        _cold_list(f"Cold, under {_PERCENT} of an even share", seen.cold),
    ]


def _heat_row(seen: Coldness, label: str, row: ExpertTokens) -> HeatRow:
    unreached, cold = seen.unreached.get(label, ()), seen.cold.get(label, ())
    return HeatRow(label, row.tokens, len(unreached), len(cold))


def _explanation(rows: Mapping[str, ExpertTokens], *, all_experts: bool) -> Html:
    cold = (
        "Every expert was shown every token all the same (all_experts), so the input scales have "
        "seen each of them."
        if all_experts
        else "The experts of a layer have one input scale for gate and up and one for down, so a "
        "cold expert takes the scales that its neighbours' tokens gave."
    )
    return paragraph(
        "One cell for each expert of each layer, coloured by the tokens that the router sent to "
        "it, against an even share: the layer's tokens divided by its experts"
        f"{_even_share(rows)}. An expert under {_PERCENT} of an even share is cold; one without a "
        f"token is unreached. {cold}"
    )


def _even_share(rows: Mapping[str, ExpertTokens]) -> str:
    shares = [sum(row.tokens) / len(row.tokens) for row in rows.values()]
    low, high = figure(min(shares)), figure(max(shares))
    return f" (here {low})" if low == high else f" (here {low} to {high})"


def _legend(seen: Coldness) -> Html:
    entries = (
        element(
            "li",
            join(
                [
                    Html(f'<i class="swatch {level.name}"></i>'),
                    level.label,
                    element("span", f"{seen.levels[level.name]:,}"),
                ],
                " ",
            ),
        )
        for level in LEVELS
    )
    return element("ul", Html("".join(entries)), "legend")


def _cold_list(title: str, found: Mapping[str, Sequence[int]]) -> Html:
    many = sum(map(len, found.values()))
    if not many:
        return paragraph(element("b", f"{title}:"), " none.", classes="small")
    lines = [_cold_line(label, experts) for label, experts in found.items()]
    head = f"{title}: {plural(many, 'expert')} in {plural(len(lines), 'layer')}"
    if len(lines) > SHOWN_LAYERS:
        return details(head, element("div", join(lines, Html("<br>")), "small"))
    return paragraph(element("b", f"{head}."), " ", join(lines, " · "), classes="small wide")


def _cold_line(label: str, experts: Sequence[int]) -> Html:
    words = f"layer {label}: {runs(experts)}"
    return element("span", words, "together" if len(words) <= 40 else "")
