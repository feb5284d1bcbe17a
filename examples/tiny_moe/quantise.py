"""The trained weights as int8 with one scale per output row, and the way back to a transformers model.

Every matrix (embedding, attention, experts, head) becomes int8 `round(weight / scale)` with `scale = max|row| / 127`
in fp32, stored under the weight's name and `<name>.scale`. Norms and routers stay fp32: they are 0.2 % of the bytes,
and a rounded router would choose other experts. Experts are fused per layer as transformers holds them:
`gate_up_proj` [experts, 2 * intermediate, hidden], `down_proj` [experts, hidden, intermediate].
"""

import argparse
import json
import os
from pathlib import Path

import torch
import transformers
from model import CONFIG_PATH, build
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = Path(__file__).with_name("weights") / "tiny-moe-int8.safetensors"
SCALE = ".scale"


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values shaped like `weight` and fp32 scales [..., rows], one per output row (the last axis is the input)."""
    scale = weight.float().abs().amax(dim=-1) / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return torch.round(weight.float() / scale[..., None]).to(torch.int8), scale


def dequantise_rows(values: Tensor, scale: Tensor) -> Tensor:
    """fp32 weights from int8 values and row scales."""
    return values.float() * scale[..., None]


def stays_fp32(name: str, weight: Tensor) -> bool:
    """Whether a weight is stored as it is: norms and routers."""
    return weight.ndim < 2 or name.endswith("mlp.gate.weight")


def quantise(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors to store, from a model's state."""
    stored: dict[str, Tensor] = {}
    for name, weight in state.items():
        if stays_fp32(name, weight):
            stored[name] = weight.float().contiguous()
        else:
            stored[name], stored[name + SCALE] = quantise_rows(weight)
    return stored


def dequantise(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's state, from stored tensors."""
    return {
        name: dequantise_rows(value, stored[name + SCALE]) if value.dtype == torch.int8 else value
        for name, value in stored.items()
        if not name.endswith(SCALE)
    }


def load_int8(path: Path = WEIGHTS) -> transformers.MixtralForCausalLM:
    """The int8 model as an ordinary `MixtralForCausalLM` in fp32, ready for inference."""
    model = build(seed=0)
    model.load_state_dict(dequantise(load_file(path)))
    return model.eval()


def main() -> None:
    """Quantise what `train.py` left, evaluate both on held-out text, write weights, configuration and figures."""
    import evaluate
    import train

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trained", type=Path, default=train.OUT)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    a = parser.parse_args()
    full = build(seed=0)
    full.load_state_dict(torch.load(a.trained / "weights.pt", weights_only=True)["model"])
    full.eval()
    a.weights.parent.mkdir(parents=True, exist_ok=True)
    aside = a.weights.with_suffix(".part")
    save_file(
        quantise(full.state_dict()), aside, metadata={"format": "pt", "scheme": "int8, one fp32 scale per output row"}
    )
    os.replace(aside, a.weights)
    (a.weights.parent / "config.json").write_text(CONFIG_PATH.read_text())
    run = json.loads((a.trained / "run.json").read_text())
    figures = {
        "run": run,
        "num_parameters": sum(weight.numel() for weight in full.parameters()),
        "num_weight_file_bytes": a.weights.stat().st_size,
        "held_out": evaluate.compare({"fp32": full, "int8": load_int8(a.weights)}),
    }
    a.weights.with_name("figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
