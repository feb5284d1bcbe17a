"""Record the routing of the int8 tiny model on held-out text: what tokens chose, what earlier layers guessed.

Each request prefills a prompt cut from a held-out document and then decodes with a KV cache, one sampled byte per
step. For every token and layer the recording holds the router's own choice (top-2 ids, best first, and their
normalised weights) and, for distances 1 to 3, the best guesses made early: layer l's gate applied to the normed
hidden state that entered the router `distance` layers earlier, with its softmax probabilities.

The last sampled byte of a request is never fed back, so it has no row. Sampling draws from a per-request generator;
arithmetic is fp32 on one thread. Another processor may round differently and, once a sampled byte differs, take
another path through that request.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import corpus
import numpy as np
import numpy.typing as npt
import torch
import transformers
from quantise import WEIGHTS, load_int8
from torch import Tensor, nn

from moeplan.traces.format import RoutingTrace, save_trace

BUNDLED = Path(__file__).resolve().parents[2] / "traces" / "bundled" / "tiny-moe.safetensors"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What determines a recording besides the weights and the corpus; the defaults give the bundled one."""

    num_requests: int = 50
    """Requests, domains in turn."""
    min_prompt: int = 48
    """Shortest prompt in bytes."""
    max_prompt: int = 80
    """Longest prompt in bytes."""
    num_decode: int = 161
    """Decode steps per request; with the longest prompt the model stays inside the 256 bytes it was trained on."""
    distance: int = 3
    """How many layers early guesses are made, at most."""
    width: int = 3
    """Guesses kept per layer and distance."""
    temperature: float = 0.8
    """Divides the logits before sampling."""
    seed: int = 7
    """Of the prompts and of the sampling."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Where a prompt was cut."""

    domain: str
    document: str
    start: int
    text: bytes


def prompts(found: list[corpus.Document], settings: Settings) -> list[Prompt]:
    """Held-out prompts, domains in turn, each starting at a line of a document drawn by the seed."""
    documents = [document for document in found if document.held_out and len(document.text) >= 2000]
    domains = [domain for domain in corpus.DOMAINS if any(document.domain == domain for document in documents)]
    drawn = []
    for index in range(settings.num_requests):
        random = np.random.default_rng((settings.seed, index))
        domain = domains[index % len(domains)]
        choices = [document for document in documents if document.domain == domain]
        document = choices[int(random.integers(len(choices)))]
        length = int(random.integers(settings.min_prompt, settings.max_prompt + 1))
        near = int(random.integers(0, len(document.text) - settings.max_prompt - 200))
        start = document.text.find(b"\n", near, near + 200) + 1 or near
        text = document.text[start : start + length]
        drawn.append(Prompt(domain=domain, document=document.name, start=start, text=text))
    return drawn


class RouterHooks:
    """Keeps, for the latest forward pass, each router's input and what it chose; a context that removes its hooks."""

    def __init__(self, model: transformers.MixtralForCausalLM) -> None:
        """Hook the router of every layer of `model`."""
        self._gates: list[nn.Module] = [layer.mlp.gate for layer in model.model.layers]
        self.inputs: list[Tensor] = [torch.empty(0)] * len(self._gates)
        self.weights: list[Tensor] = [torch.empty(0)] * len(self._gates)
        self.indices: list[Tensor] = [torch.empty(0)] * len(self._gates)
        self._handles = [gate.register_forward_hook(self._hook(layer)) for layer, gate in enumerate(self._gates)]

    def _hook(self, layer: int) -> Any:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor, Tensor]) -> None:
            self.inputs[layer] = inputs[0].reshape(-1, inputs[0].shape[-1])
            _, self.weights[layer], self.indices[layer] = outputs

        return keep

    def __enter__(self) -> Self:
        """The hooks themselves."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    @torch.inference_mode()
    def early(self, layer: int, distance: int, width: int) -> tuple[Tensor, Tensor]:
        """Ids and probabilities [tokens, width] by `layer`'s gate for the router input `distance` layers earlier."""
        logits = nn.functional.linear(self.inputs[layer - distance], self._gates[layer].weight)
        best = logits.float().softmax(dim=-1).topk(width, dim=-1)
        return best.indices, best.values

    @torch.inference_mode()
    def rows(self, settings: Settings) -> dict[str, npt.NDArray[Any]]:
        """Arrays of the latest pass: experts, weights, predicted and predicted_prob, first axis tokens."""
        num_tokens, num_layers = len(self.inputs[0]), len(self.inputs)
        shape = (num_tokens, num_layers, settings.distance, settings.width)
        predicted, probability = np.full(shape, -1, np.int16), np.zeros(shape, np.float16)
        for layer in range(num_layers):
            for distance in range(1, min(layer, settings.distance) + 1):
                ids, values = self.early(layer, distance, settings.width)
                predicted[:, layer, distance - 1] = ids.numpy()
                probability[:, layer, distance - 1] = values.numpy()
        return {
            "experts": torch.stack(self.indices, dim=1).numpy().astype(np.uint8),
            "weights": torch.stack(self.weights, dim=1).numpy().astype(np.float16),
            "predicted": predicted,
            "predicted_prob": probability,
        }


def sample(logits: Tensor, temperature: float, random: np.random.Generator) -> int:
    """One byte drawn from softmax(logits / temperature): the inverse cumulative distribution in double precision."""
    scaled = logits.double().numpy() / temperature
    cumulative = np.exp(scaled - scaled.max()).cumsum()
    return min(int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right")), len(cumulative) - 1)


@torch.inference_mode()
def record_request(
    model: transformers.MixtralForCausalLM, hooks: RouterHooks, prompt: bytes, settings: Settings, seed: tuple[int, ...]
) -> tuple[dict[str, npt.NDArray[Any]], bytes]:
    """Rows of one request (prompt, then `num_decode` steps) and the bytes it sampled, one more than it fed back."""
    random = np.random.default_rng(seed)
    cache = transformers.DynamicCache(config=model.config)
    feed, parts, sampled = torch.tensor([list(prompt)]), [], bytearray()
    for _ in range(settings.num_decode + 1):
        logits = model(feed, past_key_values=cache, use_cache=True).logits[0, -1]
        parts.append(hooks.rows(settings))
        sampled.append(sample(logits, settings.temperature, random))
        feed = torch.tensor([[sampled[-1]]])
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    rows["phase"] = (np.arange(len(rows["experts"])) >= len(prompt)).astype(np.uint8)
    return rows, bytes(sampled)


def record(
    model: transformers.MixtralForCausalLM, given: list[Prompt], settings: Settings
) -> tuple[RoutingTrace, list[bytes]]:
    """The recording of all prompts, request after request, and what was sampled for each."""
    parts, texts = [], []
    with RouterHooks(model) as hooks:
        for index, prompt in enumerate(given):
            rows, text = record_request(model, hooks, prompt.text, settings, (settings.seed, index, 1))
            rows["request"] = np.full(len(rows["phase"]), index, np.int32)
            rows["position"] = np.arange(len(rows["phase"]), dtype=np.int32)
            parts.append(rows)
            texts.append(text)
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    trace = RoutingTrace(
        **arrays,
        num_experts=model.config.num_local_experts,
        model="tiny-moe",
        layer_ids=tuple(range(model.config.num_hidden_layers)),
        source="examples/tiny_moe/record.py, int8 weights, held-out text of a Python installation",
        licence="Apache-2.0",
        metadata={
            "domains": json.dumps([prompt.domain for prompt in given]),
            "prompts": json.dumps([[prompt.document, prompt.start, len(prompt.text)] for prompt in given]),
            "settings": json.dumps(dataclasses.asdict(settings)),
            "weights": "normalised over the chosen experts",
            "predicted": "layer l's gate on the normed hidden state that entered the router of layer l - distance",
        },
    )
    return trace, texts


def save_npz(trace: RoutingTrace, path: Path) -> None:
    """Write the recording as the npz layout that `moeplan trace import --from npz` reads."""
    domains = json.loads(trace.metadata["domains"])
    names = sorted(set(domains))
    np.savez_compressed(
        path,
        meta=json.dumps(
            {
                "source": trace.source,
                "model": trace.model,
                "experts": trace.num_experts,
                "top_k": trace.top_k,
                "licence": "own",
            }
        ),
        layer_ids=np.array(trace.layer_ids, np.int16),
        domain_names=np.array(names),
        experts=trace.experts,
        weights=trace.weights,
        spec=trace.predicted,
        spec_prob=trace.predicted_prob,
        seq=trace.request,
        pos=trace.position,
        phase=trace.phase.astype(np.int8),
        domain=np.array([names.index(domains[request]) for request in trace.request], np.int16),
    )


def main() -> None:
    """Record and write; the defaults reproduce the bundled recording."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=BUNDLED, help="a .safetensors recording, or a .npz")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--texts", type=Path, help="also write prompts and sampled texts, for reading")
    for field in dataclasses.fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    a = parser.parse_args()
    settings = Settings(**{field.name: getattr(a, field.name) for field in dataclasses.fields(Settings)})
    torch.set_num_threads(1)
    given = prompts(corpus.documents(), settings)
    trace, texts = record(load_int8(a.weights), given, settings)
    if a.out.suffix == ".npz":
        save_npz(trace, a.out)
    else:
        save_trace(trace, a.out)
    if a.texts:
        shown = [
            f"[{p.domain} {p.document}]\n{p.text.decode('utf-8', 'replace')}│{t.decode('utf-8', 'replace')}\n"
            for p, t in zip(given, texts, strict=True)
        ]
        a.texts.write_text("\n".join(shown))
    print(
        f"{trace.num_tokens} tokens, {int(trace.phase.sum())} of them decode, {a.out.stat().st_size:,} bytes -> {a.out}"
    )


if __name__ == "__main__":
    main()
