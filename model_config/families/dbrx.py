"""DBRX (Databricks): fine-grained experts, sizes in nested tables.

Ignored: clipping of queries, keys and values.
"""

from ..family import Family

FAMILIES = {
    "dbrx": Family(
        # Its `ffn_config` repeats hidden_size with a default that is not the model's (transformers DbrxFFNConfig).
        names={"hidden": ("d_model",), "expert_width": ("ffn_hidden_size",), "width": ("intermediate_size",)},
        harmless=("hidden_size", "max_seq_len"),
    ),
}
