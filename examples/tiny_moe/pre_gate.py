"""Fine-tune the tiny model so that its gates choose some blocks early, and set its quality beside the conventional model's.

    block t < N chooses for itself; the gate of every later block reads what the gate of block t − N reads

As in Pre-gated MoE (arXiv 2308.12066) the model is trained on with gates in their new places; here all of it but its experts, so
that what is stored beside the conventional weights is small: `weights/pre-gate-N.safetensors`, fp16, gates and norms fp32. Gates start as
the target block's own, aligned linearly (moeplan's lookahead gates without a hidden layer). N = 0 trains the conventional model
on in the same way over the same text: what the others are compared with.
"""

import argparse
import json
import math
import time
from pathlib import Path

import corpus
import numpy as np
import torch
from evaluate import COUNTED, LENGTH, model_bits
from quantise import WEIGHTS, load_int8, stays_fp32
from safetensors.torch import load_file, save_file
from train import balance_loss, batch
from transformers import MixtralForCausalLM

from moeplan.executor.model.loading.pre_gates import KEY, PreGates

FOLDER = Path(__file__).with_name("weights")


def routers_of(model: MixtralForCausalLM) -> list[torch.nn.Module]:
    """The gates, by block."""
    return [layer.mlp.gate for layer in model.model.layers]


def path_of(distance: int) -> Path:
    """Where fine-tuned weights of gates so many blocks early are kept."""
    return FOLDER / f"pre-gate-{distance}.safetensors"


def load_pre_gated(distance: int) -> MixtralForCausalLM:
    """The conventional model with the weights that were fine-tuned; its gates are where they were (`PreGates` moves them)."""
    model = load_int8(WEIGHTS)
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(path_of(distance)).items()}, strict=False)
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


def fine_tuned(
    texts: list[np.ndarray], held_out: dict[str, np.ndarray], distance: int, a: argparse.Namespace
) -> tuple[MixtralForCausalLM, dict[str, float], dict[str, np.ndarray]]:
    """The model trained on with its gates in their new places, what that took, and bits per byte of each held-out window."""
    began, busy = time.perf_counter(), time.process_time()
    model = load_int8(WEIGHTS)
    model.set_experts_implementation("grouped_mm")
    early = None
    if distance:
        aligned(model, texts, distance, a.align_steps, a.seed)
        early = PreGates(routers_of(model), distance)
    trained = {name: p for name, p in model.named_parameters() if ".experts." not in name}
    for name, p in model.named_parameters():
        p.requires_grad_(name in trained)
    chooser = torch.optim.AdamW(trained.values(), lr=a.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    for step in range(a.steps):
        chooser.param_groups[0]["lr"] = a.learning_rate * min(1.0, (step + 1) / 10, 2 * (a.steps - step) / a.steps)
        tokens = batch(texts, seed=a.seed + 2, step=step, num_sequences=8, length=256)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(tokens[:, :-1], use_cache=False, output_router_logits=True)
        loss = torch.nn.functional.cross_entropy(output.logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        (loss + 0.01 * balance_loss(output.router_logits, model.config.num_experts_per_tok)).backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        chooser.step()
        chooser.zero_grad(set_to_none=True)
        if step % 20 == 0 or step + 1 == a.steps:
            print(f"N {distance}  step {step}  bits/byte {loss.item() / math.log(2):.4f}", flush=True)
    taken = {"seconds": time.perf_counter() - began, "processor_s": time.process_time() - busy}
    model.eval()
    model.set_experts_implementation("eager")
    bits = {name: model_bits(model, rows).mean(axis=1) for name, rows in held_out.items()}
    if early is not None:
        early.undo()
    return model, taken, bits


def windows(text: bytes, count: int) -> np.ndarray:
    """Windows of held-out text as `evaluate` has them, but `count` of them."""
    symbols = np.frombuffer(text, np.uint8)
    stride = (len(symbols) - LENGTH - 1) // count
    if stride < COUNTED:
        raise ValueError(f"{len(symbols)} held-out bytes are too few for {count} windows")
    return np.stack([symbols[start : start + LENGTH + 1] for start in range(0, stride * count, stride)])


def main() -> None:
    """Fine-tune for each N, say how good each is, and keep what `--keep` names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--distances", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--align-steps", type=int, default=30)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--windows", type=int, default=40, help="of held-out text a domain, 128 bytes each scored")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=int, nargs="*", default=[1])
    parser.add_argument("--figures", type=Path, default=FOLDER / "pre-gate.json")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    found = corpus.documents()
    joined = [corpus.joined(found, domain, held_out=False) for domain in corpus.DOMAINS]
    texts = [np.frombuffer(text, np.uint8) for text in joined if text]
    held = {domain: corpus.joined(found, domain, held_out=True) for domain in corpus.DOMAINS}
    held_out = {domain: windows(text, a.windows) for domain, text in held.items() if text}
    facts = {
        "steps": a.steps,
        "align_steps": a.align_steps,
        "bytes_seen": a.steps * 8 * 256,
        "windows_a_domain": a.windows,
    }
    rows: dict[str, dict[str, object]] = {}
    conventional: np.ndarray | None = None
    for distance in a.distances:
        model, taken, bits = fine_tuned(texts, held_out, distance, a)
        every = np.concatenate(list(bits.values()))
        row: dict[str, object] = {name: round(value, 1) for name, value in taken.items()}
        row |= {
            "bits_per_byte": {name: round(float(each.mean()), 4) for name, each in bits.items()}
            | {"mean": round(float(every.mean()), 4)}
        }
        if distance == 0:
            conventional = every
        elif conventional is not None:
            worse = every - conventional
            row |= {
                "worse_by": round(float(worse.mean()), 4),
                "standard_error": round(float(worse.std(ddof=1) / math.sqrt(len(worse))), 4),
            }
        rows[str(distance)] = row
        print(f"N {distance}", json.dumps(row), flush=True)
        if distance in a.keep:
            state = {name: p.detach() for name, p in model.named_parameters() if ".experts." not in name}
            kept = {name: p.float() if stays_fp32(name, p) else p.half() for name, p in state.items()}
            save_file({name: p.contiguous() for name, p in kept.items()}, path_of(distance))
        a.figures.write_text(json.dumps(facts | {"by_distance": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
