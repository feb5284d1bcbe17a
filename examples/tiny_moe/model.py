"""The tiny model: a Mixtral configuration small enough to train on two cores.

The architecture and the weight names are those of transformers' `MixtralForCausalLM`; nothing is added. The
vocabulary is the 256 bytes. `config.json` is an ordinary Hugging Face configuration: 6 layers, 16 experts of 3 x 256
x 192 weights, two of them per token.
"""

import json
from pathlib import Path

import torch
import transformers

CONFIG_PATH = Path(__file__).with_name("config.json")


def load_config() -> transformers.MixtralConfig:
    """The committed configuration, as transformers reads it."""
    return transformers.MixtralConfig(**json.loads(CONFIG_PATH.read_text()))


def build(*, seed: int, experts: str = "eager") -> transformers.MixtralForCausalLM:
    """A freshly initialised model in fp32; `experts` names one of transformers' ways through the experts.

    "grouped_mm" (tokens sorted by expert) is the quickest for training, "eager" (a loop over the experts that were
    hit) for single tokens.
    """
    torch.manual_seed(seed)
    model = transformers.MixtralForCausalLM._from_config(load_config(), experts_implementation=experts)
    return model.float()
