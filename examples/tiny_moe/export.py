"""The committed weights as an ordinary checkpoint: a folder that transformers, and `moeplan run`, open like any other.

Numbers are the int8 ones, expanded to fp32, so that what is run is what was recorded and scored.
"""

import argparse
from pathlib import Path

import transformers
from pre_gate import load_pre_gated
from quantise import WEIGHTS, load_int8

OUT = Path("out") / "tiny-moe"


def main() -> None:
    """Write the checkpoint and say where it is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument(
        "--pre-gate", type=int, default=0, help="the fine-tuned model whose gates choose so many blocks early"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    a = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    model = load_pre_gated(a.pre_gate) if a.pre_gate else load_int8(a.weights)
    model.save_pretrained(a.out)
    print(f"{sum(path.stat().st_size for path in a.out.iterdir()):,} bytes -> {a.out}")


if __name__ == "__main__":
    main()
