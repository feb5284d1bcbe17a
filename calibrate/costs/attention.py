"""How much causal attention there is in a layer of a pass: pairs of query and context, and context read.

Modelled: requests of equal lengths, windows, compressed entries, an index that selects. Ignored: what a pair or a byte costs.
"""

from __future__ import annotations

from ...specs.models import AttentionSpec


def attention_work(tokens: int, context_tokens: int, num_requests: int, window: int | None) -> tuple[float, float]:
    """Return (query–context pairs, context tokens read) of one layer's causal attention.

    The pass's tokens are the last ones of their requests' contexts, spread evenly over `num_requests`. With a window each
    token meets at most that many, and a request's tokens read its window before the first of them and everything since.
    """
    if tokens == 0:
        return 0.0, 0.0
    new = tokens / num_requests
    context = max(context_tokens / num_requests, new)
    before = context - new
    if window is None or context <= window:
        return tokens * (before + (new + 1) / 2), context * num_requests
    growing = min(max(window - before, 0.0), new)  # tokens that still see less than a full window
    each = growing * (min(before, window) + (growing + 1) / 2) + (new - growing) * window
    return each * num_requests, min(context, window + new - 1) * num_requests


def attended(
    attention: AttentionSpec, window: int | None, tokens: int, context_tokens: int, num_requests: int
) -> tuple[float, float, float]:
    """Return (query–entry pairs, entries read, values of an index read) of one layer's causal attention.

    Beyond a window there are compressed entries, or none; sparse attention reads the entries it selects, a token at most
    `selected` of them, and its whole index.
    """
    pairs, read = attention_work(tokens, context_tokens, num_requests, window)
    all_pairs, all_read = attention_work(tokens, context_tokens, num_requests, None)
    index = all_read / attention.tokens_per_index * attention.index_values
    if window is not None and not attention.compressed:
        return pairs, read, index
    entry_pairs, entries = all_pairs / attention.tokens_per_entry, all_read / attention.tokens_per_entry
    if attention.selected is not None:
        most = tokens * float(attention.selected)
        entry_pairs, entries = min(entry_pairs, most), min(entries, most)
    return (entry_pairs, entries, index) if window is None else (pairs + entry_pairs, read + entries, index)
