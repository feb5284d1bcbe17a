"""The nouns of a model: how weights are stored, how a layer mixes tokens, what a model consists of."""

from .mixers import AttentionSpec as AttentionSpec
from .mixers import LayerVariant as LayerVariant
from .mixers import RecurrentSpec as RecurrentSpec
from .mixes.stored import quantised_as as quantised_as
from .model import ModelSpec as ModelSpec
from .weights import BITS_PER_BYTE as BITS_PER_BYTE
from .weights import FLOPS_PER_WEIGHT as FLOPS_PER_WEIGHT
from .weights import WEIGHT_FORMATS as WEIGHT_FORMATS
from .weights import WeightFormat as WeightFormat
from .weights import format_with_bits as format_with_bits
from .weights import is_codebook as is_codebook
from .weights import is_repacked as is_repacked
from .weights import stated_format as stated_format
from .weights import weight_format as weight_format
