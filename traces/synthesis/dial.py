"""The dials of synthetic routing: what each means, their limits, and how they are changed by name.

Modelled: a token's choices in a layer come from four places. Some repeat the layer's choices of a token shortly
before (`reuse_short`), some those of a token further back in the request (`reuse_long`). The others are new: some of
them follow what the token chooses in all layers alike (`affinity`), the rest is the layer's own. New choices are
drawn with probabilities that are skewed, and shifted from request to request and from domain to domain. All layers
share these dials; each layer has its own experts in each role. Ignored: what makes real layers differ (except the
strength of reuse, `layer_reuse`), and router weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...base.errors import InputError, UnknownName
from ..validate import MAX_EXPERTS, MAX_LAYERS, MAX_TOP_K

LONG_WINDOW = 4096  # tokens that `reuse_long` can reach back; bounds the memory of synthesis
_MAX_REQUEST_TOKENS = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Dials:
    """Everything a synthetic recording depends on, besides its seed and length."""

    num_layers: int
    """MoE layers."""
    num_experts: int
    """Experts per layer."""
    top_k: int
    """Experts per token and layer."""
    layer_ids: tuple[int, ...] = ()
    """Model layer of each column; empty means 0, 1, …"""
    skew: float = 0.5
    """Standard deviation of the logarithm of popularity over experts; 0 makes all equally popular."""
    popularity: tuple[float, ...] = ()
    """Relative popularity of each expert when drawn anew; given, it replaces `skew`."""
    request_shift: float = 0.5
    """Standard deviation by which a request shifts the logarithm of each expert's popularity."""
    domain_share: float = 0.5
    """Share (0 to 1) of that shift's variance that all requests of a domain have in common."""
    num_domains: int = 1
    """Domains that requests come from."""
    requests_per_domain: int = 1
    """Consecutive requests of one domain before the next one's turn: how fast traffic drifts."""
    reuse_short: float = 0.2
    """Probability (0 to 1) that a choice repeats one of a token shortly before."""
    short_span: float = 1.2
    """Mean distance in tokens of that repetition (geometric, at least 1)."""
    reuse_long: float = 0.2
    """Probability that a choice repeats one of a token further back in the request (at most 4096 tokens)."""
    long_decay: float = 1.0
    """Exponent of the power law of that distance: 0 reaches evenly over the whole request, 2 stays close."""
    layer_reuse: tuple[float, ...] = (1.0,)
    """Factor on both reuse probabilities, evenly spaced over depth from the first to the last layer."""
    affinity: float = 0.5
    """Probability that a new choice is one that the token makes in all layers alike."""
    affinity_spread: float = 0.1
    """Probability (0 to 1) that such a choice goes to the expert's twin instead."""
    prompt_tokens: tuple[int, ...] = (512,)
    """Evenly spaced quantiles of prompt lengths, from the shortest to the longest; one number makes all alike."""
    decode_tokens: tuple[int, ...] = (256,)
    """The same for generated tokens."""
    guess_recall: tuple[tuple[float, ...], ...] = ()
    """[distance − 1][width − 1].

    Share of a token's experts among the first `width` guesses; empty records no guesses.
    """

    def __post_init__(self) -> None:
        """Raise InputError when a dial is out of its range."""
        _check_shape(self)
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if not low <= value <= high:
                _refuse(name, value, f"must be {low:g} to {high:g}")
        if self.reuse_short + self.reuse_long > 1:
            _refuse("reuse_short + reuse_long", self.reuse_short + self.reuse_long, "must be at most 1")
        strongest = (self.reuse_short + self.reuse_long) * max(self.layer_reuse, default=1.0)
        if not self.layer_reuse or min(self.layer_reuse) < 0 or not strongest <= 1:
            _refuse("layer_reuse", self.layer_reuse, "must be factors that leave reuse at 0 to 1 in every layer")
        _check_lengths(self)
        _check_guesses(self)


_RANGES = (
    ("skew", 0, 5),
    ("request_shift", 0, 5),
    ("domain_share", 0, 1),
    ("num_domains", 1, 1 << 20),
    ("requests_per_domain", 1, 1 << 30),
    ("reuse_short", 0, 1),
    ("short_span", 1, LONG_WINDOW),
    ("reuse_long", 0, 1),
    ("long_decay", 0, 10),
    ("affinity", 0, 1),
    ("affinity_spread", 0, 1),
)


def change_dials(dials: Dials, changes: Mapping[str, object]) -> Dials:
    """Return dials with some changed by name; text is read as JSON ("0.3", "[16, 64, 512]").

    Raises UnknownName for a dial that does not exist and InputError for a value that is no number or out of range.
    """
    known = {field.name: getattr(dials, field.name) for field in dataclasses.fields(Dials)}
    values: dict[str, object] = {}
    for name, value in changes.items():
        if name not in known:
            raise UnknownName("dial", name, known)
        try:
            read: object = json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError):
            read = None
        values[name] = _like(name, known[name], read, value)
    if "skew" in values and "popularity" not in values:
        values["popularity"] = ()
    return dataclasses.replace(dials, **values)  # type: ignore[arg-type]


def reshape_dials(
    dials: Dials, *, num_layers: int, num_experts: int, top_k: int, layer_ids: tuple[int, ...] = ()
) -> Dials:
    """Return the same locality for a model of another shape. Raises InputError.

    Popularity keeps its curve over rank; the recall of guesses, which depends on how many experts a token has, is dropped
    where `top_k` changes.
    """
    curve = dials.popularity
    if curve and num_experts != len(curve):
        ranks = (np.arange(num_experts) + 0.5) / num_experts
        known = (np.arange(len(curve)) + 0.5) / len(curve)
        logarithm = np.interp(ranks, known, np.log(np.maximum(sorted(curve, reverse=True), 1e-9)))
        curve = tuple(np.exp(logarithm).tolist())
    return dataclasses.replace(
        dials,
        num_layers=num_layers,
        num_experts=num_experts,
        top_k=top_k,
        layer_ids=layer_ids,
        popularity=curve,
        guess_recall=dials.guess_recall if top_k == dials.top_k else (),
    )


def dials_as_json(dials: Dials) -> dict[str, object]:
    """Return the dials as plain values, ready for JSON and for `dials_from_json`."""
    return dataclasses.asdict(dials)


def dials_from_json(values: Mapping[str, object]) -> Dials:
    """Return dials from what `dials_as_json` gave. Raises InputError."""
    try:
        smallest = Dials(num_layers=1, num_experts=1, top_k=1)
        shape = change_dials(smallest, {name: values[name] for name in ("num_layers", "num_experts", "top_k")})
    except KeyError as missing:
        raise InputError("dials", str(missing), "is missing", "give num_layers, num_experts and top_k") from None
    return change_dials(shape, values)


def _like(name: str, example: object, value: Any, given: object) -> object:
    """Return `value` with the type of `example`: an integer, a number, or tuples of numbers. Raises InputError."""
    row: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
    if name == "guess_recall":
        if all(isinstance(inner, (list, tuple)) and _numbers(inner) for inner in row):
            return tuple(tuple(float(cell) for cell in inner) for inner in row)
    elif isinstance(example, tuple):
        if name in ("popularity", "layer_reuse") and _numbers(row):
            return tuple(float(cell) for cell in row)
        if name not in ("popularity", "layer_reuse") and all(type(cell) is int for cell in row):
            return tuple(row)
    elif type(value) is int and isinstance(example, int):
        return value
    elif isinstance(example, float) and _numbers([value]):
        return float(value)
    raise InputError(name, given, "is not of the kind this dial takes", f"give it like {example!r}")


def _numbers(values: Iterable[object]) -> bool:
    """Return whether all values are finite numbers."""
    return all(type(value) in (int, float) and math.isfinite(value) for value in values)  # type: ignore[arg-type]


def _check_shape(dials: Dials) -> None:
    """Raise InputError when layers, experts, top_k, layer_ids or popularity do not make a model."""
    if not (1 <= dials.num_layers <= MAX_LAYERS):
        _refuse("num_layers", dials.num_layers, f"must be 1 to {MAX_LAYERS}")
    if not (1 <= dials.num_experts <= MAX_EXPERTS):
        _refuse("num_experts", dials.num_experts, f"must be 1 to {MAX_EXPERTS}")
    if not (1 <= dials.top_k <= min(MAX_TOP_K, dials.num_experts)):
        _refuse("top_k", dials.top_k, f"must be 1 to num_experts ({dials.num_experts}) and at most {MAX_TOP_K}")
    ids = dials.layer_ids
    increasing = all(a < b for a, b in zip((-1, *ids), ids, strict=False))
    if ids and (len(ids) != dials.num_layers or not increasing):
        _refuse("layer_ids", ids, f"must be {dials.num_layers} increasing numbers, or none")
    if dials.popularity and (
        len(dials.popularity) != dials.num_experts
        or not all(math.isfinite(weight) and weight >= 0 for weight in dials.popularity)
        or sum(weight > 0 for weight in dials.popularity) < dials.top_k
    ):
        rule = f"must be {dials.num_experts} numbers, none negative and at least top_k ({dials.top_k}) above 0"
        _refuse("popularity", dials.popularity, rule)


def _check_lengths(dials: Dials) -> None:
    """Raise InputError when request lengths are negative, out of order or all zero."""
    for name in ("prompt_tokens", "decode_tokens"):
        lengths: tuple[int, ...] = getattr(dials, name)
        ordered = all(a <= b for a, b in zip((0, *lengths), lengths, strict=False))
        if not lengths or not ordered or lengths[-1] > _MAX_REQUEST_TOKENS:
            _refuse(name, lengths, f"must be lengths from the shortest to the longest, at most {_MAX_REQUEST_TOKENS}")
    if dials.prompt_tokens[-1] + dials.decode_tokens[-1] == 0:
        _refuse("prompt_tokens, decode_tokens", 0, "requests need at least one token")


def _check_guesses(dials: Dials) -> None:
    """Raise InputError when the recall of guesses cannot be reached: a rank holds one expert only."""
    for distance, recall in enumerate(dials.guess_recall, 1):
        steps = [b - a for a, b in zip((0.0, *recall), recall, strict=False)]
        if not recall or not all(0 <= step * dials.top_k <= 1 + 1e-9 for step in steps) or recall[-1] > 1:
            rule = f"must not fall with width, and rise by at most 1/top_k ({1 / dials.top_k:.3g}) per guess"
            _refuse(f"guess_recall[{distance - 1}]", recall, rule)
    widths = {len(recall) for recall in dials.guess_recall}
    if len(widths) > 1 or len(dials.guess_recall) > dials.num_layers:
        _refuse(
            "guess_recall", sorted(widths), "must be equally wide at every distance, with at most num_layers distances"
        )
    if widths and max(widths) > dials.num_experts - dials.top_k:
        rule = f"must be at most num_experts − top_k ({dials.num_experts - dials.top_k}) wide"
        _refuse("guess_recall", max(widths), rule)


def _refuse(name: str, value: object, rule: str) -> None:
    """Raise the InputError about one dial."""
    raise InputError(name, value, rule, "see the dials of trace synth")
