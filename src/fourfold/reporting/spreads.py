"""The page's sections of lines over the layers: errors, input amax, KV scales."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

from fourfold.reporting.charts import WIDTH, Band, Scale, bands
from fourfold.reporting.document import Document, KVScale, Linear
from fourfold.reporting.marks import (
    NUMBER,
    Column,
    Html,
    details,
    element,
    join,
    paragraph,
    section,
    table,
)
from fourfold.reporting.tally import (
    Figure,
    Spread,
    by_layer,
    by_role,
    by_site,
    is_fine,
    layers_of,
    spread,
)
from fourfold.reporting.words import clipped, figure, plural, whole

MOST_PANELS = 12
relative_error: Figure = operator.attrgetter("relative_error")
input_amax: Figure = operator.attrgetter("input_amax")


def error_section(document: Document) -> Html:
    """Relative errors: a panel for each role, and the figures of each role."""
    text = paragraph(
        "‖w − ŵ‖ / ‖w‖ of each linear weight: the line is the layer's median, the band goes from "
        "its smallest to its largest. All panels have one scale, which need not begin at zero."
    )
    parts = _panels("role", by_role(document.linears), relative_error, log=False)
    if not parts:
        return section("Relative error by layer and role", paragraph("The document holds none."))
    return section("Relative error by layer and role", text, *parts)


def activation_section(document: Document) -> Html:
    """The largest magnitudes of inputs that calibration saw; nothing where none were observed."""
    text = paragraph(
        "The largest magnitude that calibration saw at the input of each linear weight, on a "
        "logarithmic scale: line, the layer's median; band, smallest to largest. Weights that "
        "read the same input share a panel, and the largest of a layer sets their input scale."
    )
    parts = _panels("input site", by_site(document.linears), input_amax, log=True)
    return section("Input amax by layer and input site", text, *parts) if parts else Html("")


def _panels(
    kind: str, groups: Sequence[tuple[str, Sequence[Linear]]], of: Figure, *, log: bool
) -> list[Html]:
    """A panel for each named group that has the figure, all of one scale, and a table of them."""
    found = [(name, each, all_of) for name, each in groups if (all_of := spread(each, of))]
    if not found:
        return []
    layers = layers_of(linear for _, each, _ in found for linear in each)
    points = {name: by_layer(each, of) for name, each, _ in found[:MOST_PANELS]}
    bands = [band for each in points.values() for band in each.values()]
    scale = Scale.around((edge for band in bands for edge in (band.low, band.high)), log=log)
    panels = [_panel(name, each, layers, scale) for name, each in points.items() if each]
    columns = [Column(kind), *_SPREAD_COLUMNS]
    rows = [[clipped(name, 60), *_spread_cells(all_of)] for name, _, all_of in found]
    return [element("div", Html("".join(panels)), "panels"), table(columns, rows)]


def _panel(name: str, points: Mapping[int, Band], layers: Sequence[int], scale: Scale) -> Html:
    drawn = Html(bands([points], layers, scale, label=f"{clipped(name, 60)} by layer"))
    head = element("figcaption", element("b", clipped(name, 60)))
    return element("figure", join([head, element("div", drawn, "scroll")]))


_SPREAD_COLUMNS = (
    Column("linear weights", NUMBER),
    Column("smallest", NUMBER),
    Column("median", NUMBER),
    Column("largest", NUMBER),
    Column("the largest is", "name"),
)


def _spread_cells(found: Spread) -> list[str]:
    figures = [figure(found.low), figure(found.mid), figure(found.high)]
    return [whole(found.count), *figures, clipped(found.worst.name)]


def kv_section(document: Document) -> Html:
    """Calibrated scales of keys and values; nothing where there are none."""
    found = [each for each in document.kv_cache if is_fine(each.k_scale) or is_fine(each.v_scale)]
    if not found:
        return Html("")
    rows = [[each.name, figure(each.k_scale), figure(each.v_scale)] for each in found]
    columns = (Column("attention", "name"), Column("k_scale", NUMBER), Column("v_scale", NUMBER))
    text = paragraph(
        "FP8 scales of ",
        element("span", "keys", "key1"),
        " and ",
        element("span", "values", "key2"),
        " by layer, as engines read them.",
    )
    scales = details(f"{plural(len(found), 'layer')} in figures", table(columns, rows))
    return section("KV cache", text, _kv_chart(found), scales)


def _kv_chart(found: Sequence[KVScale]) -> Html:
    series = [_kv_points(found, "k_scale"), _kv_points(found, "v_scale")]
    values = [band.mid for points in series for band in points.values()]
    if not values:
        return Html("")
    layers = sorted({layer for points in series for layer in points})
    scale = Scale.around(values, log=max(values) > 10 * min(values))
    drawn = bands(series, layers, scale, width=WIDTH, height=170, label="KV scales by layer")
    return element("div", Html(drawn), "scroll")


def _kv_points(found: Sequence[KVScale], name: str) -> dict[int, Band]:
    points = {}
    for each in found:
        value = getattr(each, name)
        if each.layer is not None and is_fine(value):
            scales = f"k_scale {figure(each.k_scale)}, v_scale {figure(each.v_scale)}"
            points[each.layer] = Band(value, value, value, f"layer {each.layer}: {scales}")
    return points
