"""Fine-tune the tiny model so that its gates choose some blocks early, and set its quality beside the conventional model's.

    block t < N chooses for itself; the gate of every later block reads what the gate of block t − N reads

As in Pre-gated MoE (arXiv 2308.12066) the model is trained on with gates in their new places; here all of it but its experts, so
that what is stored beside the conventional weights is small: `weights/pre-gate-N.safetensors`, int8 as the conventional weights are,
gates and norms fp32. Gates start as the target block's own, aligned linearly (moeplan's lookahead gates without a hidden layer). N = 0
trains the conventional model on in the same way over the same text: what the others are compared with. What is scored is what is
stored. Checkpoints go to `out/pre_gate/`: an interrupted run continues where the last one stands.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path

import corpus
import numpy as np
import torch
import transformers
from evaluate import COUNTED, LENGTH, model_bits
from quantise import WEIGHTS, dequantise, load_int8, quantise
from safetensors.torch import load_file, save_file
from torch import Tensor
from train import balance_loss, batch, save
from transformers import MixtralForCausalLM

from moeplan.executor.model.loading.pre_gates import KEY, PreGates

FOLDER = Path(__file__).with_name("weights")
OUT = Path(__file__).resolve().parents[2] / "out" / "pre_gate"
COMMITTED = "committed"
"""The row of the conventional weights as they are, not trained on."""
_SETTINGS = ("steps", "align_steps", "learning_rate", "seed")
_SHOWN, _SAVED = 10, 20


def routers_of(model: MixtralForCausalLM) -> list[torch.nn.Module]:
    """The gates, by block."""
    return [layer.mlp.gate for layer in model.model.layers]


def path_of(distance: int) -> Path:
    """Where fine-tuned weights of gates so many blocks early are kept."""
    return FOLDER / f"pre-gate-{distance}.safetensors"


def load_pre_gated(distance: int) -> MixtralForCausalLM:
    """The conventional model with the weights that were fine-tuned; its gates are where they were (`PreGates` moves them)."""
    model = load_int8(WEIGHTS)
    model.load_state_dict(dequantise(load_file(path_of(distance))), strict=False)
    setattr(model.config, KEY, distance)
    return model


def aligned(model: MixtralForCausalLM, texts: list[np.ndarray], distance: int, steps: int, seed: int) -> None:
    """Move each gate towards what it would choose at its own place, by gradient descent on the divergence; the rest is frozen."""
    routers = routers_of(model)
    targets = [router.weight.detach().clone() for router in routers]
    weights = torch.stack(targets[distance:]).requires_grad_()
    reads: list[torch.Tensor] = [torch.empty(0)] * len(routers)
    hooks = [
        router.register_forward_hook(
            lambda _, given, __, at=at: reads.__setitem__(at, given[0].detach().flatten(0, -2))
        )
        for at, router in enumerate(routers)
    ]
    chooser = torch.optim.Adam([weights], lr=3e-3)
    for step in range(steps):
        chooser.param_groups[0]["lr"] = 3e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.no_grad():
            model(batch(texts, seed=seed + 1, step=step, num_sequences=8, length=256)[:, :-1], use_cache=False)
        wanted = torch.stack([reads[at] @ targets[at].T for at in range(distance, len(routers))]).softmax(-1)
        logits = torch.stack(reads[: len(routers) - distance]) @ weights.transpose(1, 2)
        loss = torch.nn.functional.kl_div(logits.log_softmax(-1), wanted, reduction="none").sum(-1).mean()
        chooser.zero_grad()
        loss.backward()
        chooser.step()
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        for router, weight in zip(routers[distance:], weights, strict=True):
            router.weight.copy_(weight)


def trained_part(model: MixtralForCausalLM) -> dict[str, Tensor]:
    """The parameters that fine-tuning changes: all but the experts'."""
    return {name: p for name, p in model.named_parameters() if ".experts." not in name}


def fine_tuned(
    texts: list[np.ndarray], distance: int, a: argparse.Namespace
) -> tuple[MixtralForCausalLM, dict[str, float]]:
    """The model trained on with its gates in their new places, which `PreGates` still has to move, and what that took."""
    model, path = load_int8(WEIGHTS), a.out / f"{distance}.pt"
    model.set_experts_implementation("grouped_mm")
    settings = {name: getattr(a, name) for name in _SETTINGS}
    state = torch.load(path, weights_only=True) if path.exists() else None
    if state is not None and state["settings"] != settings:
        raise SystemExit(f"{path} is of a run with other settings ({state['settings']}); move it away")
    first, spent_s, busy_s = 0, 0.0, 0.0
    began, busy = time.perf_counter(), time.process_time()
    if state is not None:
        model.load_state_dict(state["model"], strict=False)
        first, spent_s, busy_s = state["step"], state["seconds"], state["processor_s"]
        print(f"N {distance}  resuming at step {first}", flush=True)
    elif distance:
        aligned(model, texts, distance, a.align_steps, a.seed)
    early = PreGates(routers_of(model), distance) if distance else None
    trained = trained_part(model)
    for name, p in model.named_parameters():
        p.requires_grad_(name in trained)
    chooser = torch.optim.AdamW(trained.values(), lr=a.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    if state is not None:
        chooser.load_state_dict(state["optimiser"])
    model.train()
    for step in range(first, a.steps):
        chooser.param_groups[0]["lr"] = a.learning_rate * min(1.0, (step + 1) / 10, 2 * (a.steps - step) / a.steps)
        tokens = batch(texts, seed=a.seed + 2, step=step, num_sequences=8, length=256)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(tokens[:, :-1], use_cache=False, output_router_logits=True)
        loss = torch.nn.functional.cross_entropy(output.logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        (loss + 0.01 * balance_loss(output.router_logits, model.config.num_experts_per_tok)).backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        chooser.step()
        chooser.zero_grad(set_to_none=True)
        taken = spent_s + time.perf_counter() - began
        if step % _SHOWN == 0 or step + 1 == a.steps:
            print(f"N {distance}  step {step}  bits/byte {loss.item() / math.log(2):.4f}  {taken:,.0f} s", flush=True)
        if (step + 1) % _SAVED == 0 or step + 1 == a.steps:
            done = {"settings": settings, "model": {name: p.detach() for name, p in trained.items()}, "step": step + 1}
            done |= {"seconds": taken, "processor_s": busy_s + time.process_time() - busy}
            save(path, done | {"optimiser": chooser.state_dict()})
    if early is not None:
        early.undo()
    found = torch.load(path, weights_only=True)
    return model, {name: found[name] for name in ("seconds", "processor_s")}


def scored(model: MixtralForCausalLM, distance: int, held_out: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Bits per byte of each held-out window, by domain, under a model whose gates choose `distance` blocks early."""
    model.eval()
    model.set_experts_implementation("eager")
    early = PreGates(routers_of(model), distance) if distance else None
    bits = {name: model_bits(model, rows).mean(axis=1) for name, rows in held_out.items()}
    if early is not None:
        early.undo()
    return bits


def windows(text: bytes, count: int) -> np.ndarray:
    """Windows of held-out text as `evaluate` has them, but `count` of them."""
    symbols = np.frombuffer(text, np.uint8)
    stride = (len(symbols) - LENGTH - 1) // count
    if stride < COUNTED:
        raise ValueError(f"{len(symbols)} held-out bytes are too few for {count} windows")
    return np.stack([symbols[start : start + LENGTH + 1] for start in range(0, stride * count, stride)])


def row_of(bits: dict[str, np.ndarray], conventional: dict[str, np.ndarray] | None) -> dict[str, object]:
    """Bits per byte by domain and over all windows, and how much worse than `conventional` on the same windows."""
    every = np.concatenate(list(bits.values()))
    means = {name: round(float(each.mean()), 4) for name, each in bits.items()}
    row: dict[str, object] = {"bits_per_byte": means | {"mean": round(float(every.mean()), 4)}}
    if conventional is not None:
        worse = every - np.concatenate(list(conventional.values()))
        error = worse.std(ddof=1) / math.sqrt(len(worse))
        row |= {"worse_by": round(float(worse.mean()), 4), "standard_error": round(float(error), 4)}
    return row


def main() -> None:
    """Fine-tune for each N, keep what comes of it, and say how good each is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--distances", type=int, nargs="+", default=[1, 2, 3], help="after N = 0, which is always made")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--align-steps", type=int, default=30)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--windows", type=int, default=100, help="of held-out text a domain, 128 bytes each scored")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT, help="checkpoints")
    parser.add_argument("--figures", type=Path, default=FOLDER / "pre-gate.json")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    a.out.mkdir(parents=True, exist_ok=True)
    found = corpus.documents()
    joined = [corpus.joined(found, domain, held_out=False) for domain in corpus.DOMAINS]
    texts = [np.frombuffer(text, np.uint8) for text in joined if text]
    held = {domain: corpus.joined(found, domain, held_out=True) for domain in corpus.DOMAINS}
    held_out = {domain: windows(text, a.windows) for domain, text in held.items() if text}
    facts = {"bytes_seen": a.steps * 8 * 256, "windows_a_domain": a.windows, "threads": a.threads}
    facts |= {name: getattr(a, name) for name in _SETTINGS}
    facts |= {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    rows = {COMMITTED: row_of(scored(load_int8(WEIGHTS), 0, held_out), None)}
    print(COMMITTED, json.dumps(rows[COMMITTED]), flush=True)
    conventional: dict[str, np.ndarray] | None = None
    for distance in [0, *sorted(set(a.distances) - {0})]:
        model, taken = fine_tuned(texts, distance, a)
        stored = quantise({name: p.detach() for name, p in trained_part(model).items()})
        if distance:
            save_file(stored, path_of(distance), metadata={"format": "pt", KEY: str(distance)})
        model.load_state_dict(dequantise(stored), strict=False)
        bits = scored(model, distance, held_out)
        rows[str(distance)] = row_of(bits, conventional) | {name: round(value, 1) for name, value in taken.items()}
        conventional = conventional or bits
        print(f"N {distance}", json.dumps(rows[str(distance)]), flush=True)
        a.figures.write_text(json.dumps(facts | {"by_distance": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
