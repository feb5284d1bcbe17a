"""Train the tiny model on the corpus of this machine: a fixed number of steps, fixed seeds, resumable.

Every sequence is 256 bytes from one domain (domains take equal turns), cut at a random place of that domain's
training text. The load-balancing loss is taken per layer (transformers' own mixes all layers, which lets single
layers collapse onto few experts). Checkpoints go to `out/tiny_moe/` and hold model, optimiser and step; the data
order is a function of seed and step, so an interrupted run continues with the same data. The same number of threads
and the same library versions are needed for the same bits.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import corpus
import numpy as np
import torch
from model import build
from torch import Tensor

OUT = Path(__file__).resolve().parents[2] / "out" / "tiny_moe"


def batch(texts: list[np.ndarray], *, seed: int, step: int, num_sequences: int, length: int) -> Tensor:
    """Token ids [num_sequences, length + 1]; sequence i comes from domain i mod the number of domains."""
    random = np.random.default_rng((seed, step))
    rows = []
    for index in range(num_sequences):
        text = texts[(step * num_sequences + index) % len(texts)]
        start = int(random.integers(0, len(text) - length - 1))
        rows.append(text[start : start + length + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def balance_loss(router_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """Mean over layers of num_experts * sum(share of choices * mean probability), 1 at balance (arXiv:2101.03961)."""
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(dim=-1)
        chosen = probabilities.topk(top_k, dim=-1).indices
        share = torch.bincount(chosen.reshape(-1), minlength=logits.shape[-1]) / chosen.numel()
        losses.append(logits.shape[-1] * (share * probabilities.mean(dim=0)).sum())
    return torch.stack(losses).mean()


def learning_rate(step: int, *, num_steps: int, peak: float, warm_up: int, horizon: int, cooldown: int) -> float:
    """Linear warm-up, a cosine towards 3 % of the peak at `horizon`, a line to nothing over the last `cooldown` steps.

    Until the cooldown begins nothing depends on `num_steps`, so a run can be made shorter or longer from a checkpoint
    and stays reproducible.
    """
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = min(1.0, (step - warm_up) / max(1, horizon - warm_up))
    cosine = peak * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * progress)))
    return cosine * min(1.0, (num_steps - step) / max(1, cooldown))


def save(path: Path, payload: dict[str, object]) -> None:
    """Write a checkpoint aside, then move it into place."""
    aside = path.with_suffix(".part")
    torch.save(payload, aside)
    os.replace(aside, path)


def main() -> None:
    """Train (or resume), then write the weights and what the run was."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2.0e-3)
    parser.add_argument("--horizon", type=int, default=3600, help="steps after which the cosine would end")
    parser.add_argument("--cooldown", type=int, default=600, help="last steps, with the rate falling to nothing")
    parser.add_argument("--warm-up", type=int, default=120)
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the balancing loss")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--experts", default="grouped_mm", choices=["eager", "grouped_mm"])
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--out", type=Path, default=OUT)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    a.out.mkdir(parents=True, exist_ok=True)
    found = corpus.documents()
    (a.out / "manifest.tsv").write_text(corpus.manifest(found))
    domains = [domain for domain in corpus.DOMAINS if corpus.joined(found, domain, held_out=False)]
    texts = [np.frombuffer(corpus.joined(found, domain, held_out=False), np.uint8) for domain in domains]

    model = build(seed=a.seed, experts=a.experts)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=a.learning_rate, betas=(0.9, 0.95), fused=True)
    first, spent_s, path = 0, 0.0, a.out / "checkpoint.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        first, spent_s = state["step"], state["spent_s"]
        print(f"resuming at step {first}", flush=True)

    started = time.perf_counter() - spent_s
    model.train()
    for step in range(first, a.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(
                step,
                num_steps=a.steps,
                peak=a.learning_rate,
                warm_up=a.warm_up,
                horizon=a.horizon,
                cooldown=a.cooldown,
            )
        tokens = batch(texts, seed=a.seed, step=step, num_sequences=a.sequences, length=a.length)
        with torch.autocast("cpu", torch.bfloat16, enabled=a.precision == "bf16"):
            output = model(tokens[:, :-1], use_cache=False, output_router_logits=True)
        loss = torch.nn.functional.cross_entropy(output.logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        balance = balance_loss(output.router_logits, model.config.num_experts_per_tok)
        (loss + a.balance * balance).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step % 25 == 0 or step + 1 == a.steps:
            spent_s = time.perf_counter() - started
            rate = (step + 1) * a.sequences * a.length / max(spent_s, 1e-9)
            print(
                f"step {step:5d}  bits/byte {loss.item() / math.log(2):.4f}  balance {balance.item():.3f}"
                f"  |g| {norm.item():.2f}  {rate:,.0f} B/s  {spent_s:,.0f} s",
                flush=True,
            )
        if (step + 1) % 200 == 0 or step + 1 == a.steps:
            spent_s = time.perf_counter() - started
            state = {
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
                "step": step + 1,
                "spent_s": spent_s,
            }
            save(path, state)

    save(a.out / "weights.pt", {"model": model.state_dict()})
    run = {key: str(value) if isinstance(value, Path) else value for key, value in vars(a).items() if key != "out"}
    run |= {"bytes_seen": a.steps * a.sequences * a.length, "train_s": round(spent_s, 1), "torch": torch.__version__}
    (a.out / "run.json").write_text(json.dumps(run, indent=2) + "\n")
    print(json.dumps(run))


if __name__ == "__main__":
    main()
