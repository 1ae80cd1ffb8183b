"""Layer and component of a tensor by its name: the rows and columns of the coefficient plots.

The layer is the first number in the name (`model.layers.3.mlp.up_proj.weight`: 3), with the next
one if that counts layers, too (`stages.1.layers.0`: 1.0). Names that differ in what stands before
the number are different stacks (`encoder`, `decoder`). A tensor without a number, or with the only
number of its stack, is outside of the layers.

The component is what the rest of the name says, without `weight` and `bias` and other numbers:
q, k, v, qkv, o, gate, up, gate+up, down, router and norms under the names that transformers,
timm and torch use, with `cross`, `experts` or `shared` before it. Any other is the rest itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gradmerge.sources.names import is_embedding

_NUMBERED = re.compile(r"(?:(?:layer|stage|block)_?)?(\d+)")
_NESTED = ("layers", "blocks")
_PARAMETERS = ("weight", "bias", "gamma", "beta")
_NORM = re.compile(r"(^|_)(\w*norm\w*|ln(_\w+)?|ln\d|bn\d?)$")
_NAMES = {
    "q": "q q_proj query q_lin wq query_proj to_q",
    "k": "k k_proj key k_lin wk key_proj to_k",
    "v": "v v_proj value v_lin wv value_proj to_v",
    "qkv": "qkv c_attn query_key_value wqkv qkv_proj in_proj_weight in_proj_bias w_pack",
    "o": "o o_proj out_proj out_lin to_out",
    "gate": "gate_proj w1 wi_0",
    "up": "up_proj w3 wi wi_1 c_fc fc1 lin1 linear1 fc_in dense_h_to_4h ffn",
    "gate+up": "gate_up_proj gate_and_up_proj",
    "down": "down_proj w2 fc2 lin2 linear2 fc_out dense_4h_to_h ffn_output",
    "router": "router gate classifier",
}
_COMPONENTS = {name: label for label, names in _NAMES.items() for name in names.split()}
_IN_ATTENTION = ("c_proj", "dense", "wo", "proj")
_ORDER = [
    f"{group}{label}"
    for group in ("", "cross ", "experts ", "shared ")
    for label in _NAMES
    if group or label != "router"
]


@dataclass(frozen=True)
class Place:
    """Position of a tensor in its network."""

    stack: str
    """What stands before the number of the layer; empty outside of the layers."""
    layer: tuple[int, ...]
    """Numbers of the layer; empty outside of the layers."""
    component: str
    """Its kind within the layer; outside of the layers, its name."""


def place_of(name: str) -> Place:
    """Return the place of a tensor, taken by itself.

    Examples:
        >>> place_of("model.layers.3.self_attn.q_proj.weight")
        Place(stack='model.layers', layer=(3,), component='q')
        >>> place_of("encoder.block.0.layer.1.DenseReluDense.wo.weight").component
        'down'
        >>> place_of("lm_head.weight")
        Place(stack='', layer=(), component='lm_head')
    """
    parts = name.split(".")
    found = [(at, match) for at, part in enumerate(parts) if (match := _NUMBERED.fullmatch(part))]
    if not found or found[0][0] + 1 == len(parts):
        return Place("", (), _without_parameter(parts))
    at, match = found[0]
    stack, numbers, rest = parts[:at], [int(match[1])], parts[at + 1 :]
    if len(rest) > 1 and rest[0].isdigit():
        numbers, rest = [*numbers, int(rest[0])], rest[1:]
    elif len(rest) > 2 and rest[0] in _NESTED and rest[1].isdigit():
        numbers, rest = [*numbers, int(rest[1])], rest[2:]
    return Place(".".join(stack), tuple(numbers), _component(rest))


def _without_parameter(parts: Sequence[str]) -> str:
    kept = parts[:-1] if len(parts) > 1 and parts[-1] in _PARAMETERS else parts
    return ".".join(kept)


def _component(parts: Sequence[str]) -> str:
    rest = _without_parameter([part for part in parts if not part.isdigit()])
    words = rest.lower().split(".")
    last = words[-1]
    if any(_NORM.search(word) for word in words):
        return "norms"
    attends = any("attention" in word or "attn" in word for word in words)
    if attends and last in _IN_ATTENTION:
        label = "o"
    elif attends and last == "in_proj":
        label = "qkv"
    elif words[-2:] == ["intermediate", "dense"]:
        label = "up"
    elif words[-2:] == ["output", "dense"] or (not attends and last in ("c_proj", "wo")):
        label = "down"
    elif last == "classifier" and "router" not in words:
        return rest
    else:
        label = _COMPONENTS.get(last, "")
    if not label:
        return rest
    if any("encdec" in w or "cross" in w or w in ("encoder_attn", "multihead_attn") for w in words):
        return f"cross {label}"
    if any(word.startswith("shared_expert") for word in words[:-1]):
        return f"shared {label}"
    return f"experts {label}" if "experts" in words else label


@dataclass(frozen=True)
class Grid:
    """Rows and columns of a network's tensors, first layer to last."""

    rows: list[str]
    """Labels: layers, and tensors outside of them."""
    columns: list[str]
    """Components."""
    cells: dict[str, tuple[int, int | None]]
    """Row and column of each tensor; one outside of the layers spans all columns (None)."""
    stacks: list[str | None]
    """Stack of each row; None for a tensor outside of the layers."""


def grid_of(names: Iterable[str]) -> Grid:
    """Return the grid of a network's tensors.

    Rows are embeddings (by name), the layers of each stack (an encoder first), final norms, and all
    else. A network without layers has a row per module and a column per parameter.
    """
    places = {name: place_of(name) for name in names}
    counted: dict[str, set[tuple[int, ...]]] = {}
    for place in places.values():
        counted.setdefault(place.stack, set()).update([place.layer] if place.layer else [])
    most = max(map(len, counted.values()), default=0)
    for name, place in places.items():
        if place.layer and len(counted[place.stack]) < min(2, most):
            places[name] = Place("", (), _without_parameter(name.split(".")))
    if not any(place.layer for place in places.values()):
        return _flat(list(places))

    order = {name: at for at, name in enumerate(places)}
    ((top, _),) = Counter(name.partition(".")[0] for name in places).most_common(1)
    stacks = sorted(
        {place.stack for place in places.values() if place.layer},
        key=lambda stack: (_is_decoder(stack), stack),
    )
    labels = _short(stacks)

    def key(name: str) -> tuple[int, int, tuple[int, ...], int]:
        place = places[name]
        if place.layer:
            return 1, stacks.index(place.stack), place.layer, 0
        if is_embedding(name):
            return 0, 0, (), order[name]
        return (
            (2 if _NORM.search(place.component.split(".")[-1].lower()) else 3),
            0,
            (),
            order[name],
        )

    rows: dict[tuple[str, tuple[int, ...], str], str] = {}
    for name in sorted(places, key=key):
        place = places[name]
        outside = "" if place.layer else place.component
        number = ".".join(map(str, place.layer))
        label = f"{labels.get(place.stack, '')} {number}".strip()
        shown = outside.removeprefix(f"{top}.") if outside else label
        rows.setdefault((place.stack, place.layer, outside), shown)
    found = dict.fromkeys(p.component for p in places.values() if p.layer)
    known = [component for component in _ORDER if component in found]
    last = [component for component in ("router", "norms") if component in found]
    columns = [*known, *last, *(c for c in found if c not in {*known, *last})]
    at = {row: number for number, row in enumerate(rows)}
    cells: dict[str, tuple[int, int | None]] = {}
    for name, place in places.items():
        row = at[place.stack, place.layer, "" if place.layer else place.component]
        cells[name] = row, columns.index(place.component) if place.layer else None
    stacks_of_rows = [None if outside else stack for stack, _, outside in rows]
    return Grid(list(rows.values()), columns, cells, stacks_of_rows)


def _flat(names: Sequence[str]) -> Grid:
    split = {name: name.rpartition(".") for name in names}
    rows = list(dict.fromkeys(head or name for name, (head, _, _) in split.items()))
    columns = list(dict.fromkeys(tail for _, _, tail in split.values()))
    cells: dict[str, tuple[int, int | None]] = {
        name: (rows.index(head or name), columns.index(tail))
        for name, (head, _, tail) in split.items()
    }
    return Grid(rows, columns, cells, [None] * len(rows))


def _is_decoder(stack: str) -> bool:
    return "decoder" in stack.lower()


def _short(stacks: Sequence[str]) -> dict[str, str]:
    """Return the parts by which stacks differ; a single one needs no name."""
    split = [stack.split(".") for stack in stacks]
    if len(split) < 2:
        return dict.fromkeys(stacks, "")
    start = 0
    while all(len(s) > start + 1 and s[: start + 1] == split[0][: start + 1] for s in split):
        start += 1
    end = 0
    while all(len(s) > start + end + 1 and s[-1 - end] == split[0][-1 - end] for s in split):
        end += 1
    kept = (parts[start : len(parts) - end] for parts in split)
    return {stack: ".".join(parts) for stack, parts in zip(stacks, kept, strict=True)}
