"""The same model with wide experts: every unit of an expert many times over, so that moving an expert costs real time.

A copy of a unit answers as the unit does, so its column of `down_proj` is divided by the number of copies and the model computes what
it did: the same text, the same choices, the same guesses (Chen, Goodfellow and Shlens, Net2Net, ICLR 2016). Copies stand one whole
set after the other, so groups of quantised weights hold what they would hold without them.

Nothing is learnt by it. It is for measuring schedules with a router that was trained, at sizes that were not.
"""

import argparse
from pathlib import Path

import torch
import transformers
from pre_gate import load_pre_gated
from quantise import WEIGHTS, load_int8
from torch import Tensor

OUT = Path("out") / "tiny-moe-wide"


def widened(name: str, weight: Tensor, times: int) -> Tensor:
    """A weight of the wide model: `gate_up_proj` [experts, 2·units, hidden] and `down_proj` [experts, hidden, units] grow."""
    if name.endswith("gate_up_proj"):
        return torch.cat([half.repeat(1, times, 1) for half in weight.chunk(2, dim=1)], dim=1)
    if name.endswith("down_proj"):
        return weight.repeat(1, 1, times) / times
    return weight


def main() -> None:
    """Write the checkpoint and say where it is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--times", type=int, default=16)
    parser.add_argument(
        "--pre-gate", type=int, default=0, help="the fine-tuned model whose gates choose so many blocks early"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    a = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    model = load_pre_gated(a.pre_gate) if a.pre_gate else load_int8(a.weights)
    options = model.config.to_dict()
    options["intermediate_size"] *= a.times
    wide = transformers.MixtralForCausalLM(transformers.MixtralConfig(**options))
    state = {name: widened(name, weight, a.times) for name, weight in model.state_dict().items()}
    wide.load_state_dict(state)
    wide.save_pretrained(a.out)
    print(f"{sum(path.stat().st_size for path in a.out.iterdir()):,} bytes -> {a.out}")


if __name__ == "__main__":
    main()
