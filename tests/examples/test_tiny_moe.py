"""The tiny model and its bundled recording: corpus, yardstick, int8 weights, hooks, and what the READMEs state."""

import dataclasses
import importlib
import itertools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import moeplan.traces
from moeplan.traces.format import RoutingTrace, load_trace

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "tiny_moe"
BUNDLED = Path(next(iter(moeplan.traces.__path__))) / "bundled" / "tiny-moe.safetensors"


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    """Gives modules of the example by name: scripts beside each other, so their folder is put on the path meanwhile."""
    before = set(sys.modules)
    sys.path.insert(0, str(EXAMPLE))

    def load(name: str) -> ModuleType:
        if name in {"model", "quantise", "record", "train", "evaluate", "pre_gate"}:
            pytest.importorskip("torch", reason="torch is not installed (extra: run)")
            pytest.importorskip("transformers", reason="transformers is not installed (extra: hf)")
        return importlib.import_module(name)

    yield load
    sys.path.remove(str(EXAMPLE))
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(str(sys.modules[name].__file__)).parent == EXAMPLE:
            del sys.modules[name]


@pytest.fixture(scope="module")
def corpus_documents(example: Any) -> list[Any]:
    """The corpus of this machine."""
    return list(example("corpus").documents())


@pytest.fixture(scope="module")
def int8_model(example: Any) -> Any:
    """The committed weights as a transformers model."""
    quantise = example("quantise")
    importlib.import_module("torch").set_num_threads(1)
    return quantise.load_int8()


@pytest.fixture(scope="module")
def bundled() -> RoutingTrace:
    """The recording that ships with the package."""
    return load_trace(BUNDLED)


# ---- corpus


def test_corpus_split_keeps_docstrings_beside_their_file(corpus_documents: list[Any]) -> None:
    sides = {document.name: document.held_out for document in corpus_documents}
    both = [name for name in sides if name.endswith("#docstrings") and name.removesuffix("#docstrings") in sides]
    assert len(both) > 100
    assert all(sides[name] == sides[name.removesuffix("#docstrings")] for name in both)


def test_corpus_has_no_text_twice_and_a_small_held_out_share(example: Any, corpus_documents: list[Any]) -> None:
    assert len({document.text for document in corpus_documents}) == len(corpus_documents)
    held_out = sum(document.held_out for document in corpus_documents) / len(corpus_documents)
    assert 0.05 < held_out < 0.12  # one in twelve by hash
    assert all(b"\x00" not in document.text for document in corpus_documents)
    assert {document.domain for document in corpus_documents} <= set(example("corpus").DOMAINS)


def test_manifest_lists_documents_with_the_split_of_their_names(example: Any) -> None:
    corpus = example("corpus")
    lines = (EXAMPLE / "manifest.tsv").read_text().splitlines()
    assert lines[0].startswith("# Python ")
    for line in lines[1:]:
        domain, side, size, digest, name = line.split("\t")
        document = corpus.Document(domain=domain, name=name, text=b"")
        assert (domain in corpus.DOMAINS, int(size) >= 400, len(digest)) == (True, True, 32)
        assert side == ("held-out" if document.held_out else "train")


# ---- yardstick


def slow_order2(text: bytes, before: bytes, here: int) -> float:
    """Witten-Bell by the book: recursion over orders with loops."""
    probability = 1 / 256
    for order in range(3):
        context = before[len(before) - order :]
        followers = [text[i + order] for i in range(len(text) - order) if text[i : i + order] == context]
        if followers:
            kinds = len(set(followers))
            probability = (followers.count(here) + kinds * probability) / (len(followers) + kinds)
    return probability


def test_order2_equals_a_slow_reference_and_sums_to_one(example: Any) -> None:
    text = b"abracadabra abba cadabra"
    fast = example("order2").Order2(text)
    for before in (b"ab", b"ra", b"zz", b"bz", b"za"):
        contexts = np.tile(np.frombuffer(before, np.uint8), (256, 1))
        found = fast.probability(contexts, np.arange(256, dtype=np.uint8))
        assert found.sum() == pytest.approx(1.0)
        assert found == pytest.approx([slow_order2(text, before, here) for here in range(256)])


def test_evaluation_scores_each_byte_once_with_its_own_context(example: Any) -> None:
    evaluate = example("evaluate")
    text = bytes(np.random.default_rng(0).integers(0, 256, 300 * 130 + 257, dtype=np.uint8))
    rows = evaluate.windows(text)
    assert rows.shape == (300, 257)
    assert rows[1].tobytes() == text[130 : 130 + 257]
    counts = example("order2").Order2(text[:1000])
    bits = evaluate.order2_bits(counts, rows[:2])
    expected = -math.log2(slow_order2(text[:1000], rows[1, 129 - 2 : 129].tobytes(), int(rows[1, 129])))
    assert (bits.shape, bits[1, 0]) == ((2, 128), pytest.approx(expected))
    with pytest.raises(ValueError, match="too few"):
        evaluate.windows(text[:1000])


# ---- training


def test_learning_rate_depends_on_the_number_of_steps_only_in_the_cooldown(example: Any) -> None:
    train = example("train")
    settings = {"peak": 1.0, "warm_up": 10, "horizon": 100, "cooldown": 20}
    short = [train.learning_rate(step, num_steps=60, **settings) for step in range(60)]
    long = [train.learning_rate(step, num_steps=90, **settings) for step in range(90)]
    assert short[:41] == long[:41]
    assert (short[0], max(short), short[9]) == (0.1, 1.0, 1.0)
    assert all(a > b for a, b in itertools.pairwise(short[10:]))
    assert 0 < short[-1] < 0.05


def test_batches_follow_from_seed_and_step_and_take_domains_in_turn(example: Any) -> None:
    train = example("train")
    texts = [np.full(40, value, np.uint8) for value in (1, 2, 3)]
    first = train.batch(texts, seed=5, step=1, num_sequences=4, length=7)
    assert first.tolist() == [[2] * 8, [3] * 8, [1] * 8, [2] * 8]
    long = [np.arange(250, dtype=np.uint8)]
    again = [train.batch(long, seed=5, step=step, num_sequences=2, length=7).tolist() for step in (3, 3, 4)]
    assert again[0] == again[1] != again[2]
    assert all(row == list(range(row[0], row[0] + 8)) for row in again[0])


def test_balance_loss_is_one_for_even_choices_and_grows_with_skew(example: Any) -> None:
    train, torch = example("train"), importlib.import_module("torch")
    even = torch.eye(4).repeat(8, 1) + 0.5 * torch.eye(4).roll(1, 1).repeat(8, 1)
    assert float(train.balance_loss((even,), 2)) == pytest.approx(1.0)
    skewed = torch.tensor([[9.0, 8.0, 0.0, 0.0]]).repeat(32, 1)
    assert float(train.balance_loss((skewed,), 2)) == pytest.approx(2.0, abs=0.01)


# ---- weights


def test_int8_rows_are_within_half_a_step_and_stable(example: Any) -> None:
    quantise, torch = example("quantise"), importlib.import_module("torch")
    weight = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    weight[1, 2] = 0
    values, scale = quantise.quantise_rows(weight)
    assert (values.dtype, values.shape, scale.shape) == (torch.int8, weight.shape, (3, 5))
    back = quantise.dequantise_rows(values, scale)
    assert bool(((back - weight).abs() <= scale[..., None] * 0.5001).all())
    assert values.abs().amax(dim=-1).tolist() == [[127] * 5, [127, 127, 0, 127, 127], [127] * 5]
    again, same_scale = quantise.quantise_rows(back)
    assert torch.equal(again, values)
    assert torch.allclose(same_scale, scale)


def test_state_survives_storage_with_norms_and_routers_untouched(example: Any) -> None:
    quantise, torch = example("quantise"), importlib.import_module("torch")
    state = example("model").build(seed=3).state_dict()
    back = quantise.dequantise(quantise.quantise(state))
    assert back.keys() == state.keys()
    for name, weight in state.items():
        exact = "norm" in name or name.endswith("mlp.gate.weight")
        assert torch.equal(back[name], weight) == exact, name
        assert float((back[name] - weight).abs().max()) <= float(weight.abs().max()) / 127


def test_committed_weights_load_the_same_every_time_and_predict_text(example: Any, int8_model: Any) -> None:
    quantise, torch = example("quantise"), importlib.import_module("torch")
    text = b"def __init__(self, name):\n        self.name = name\n\n    def __repr__(self):\n        return self."
    tokens = torch.tensor([list(text)])
    with torch.inference_mode():
        logits = int8_model(tokens).logits
        assert torch.equal(logits, quantise.load_int8()(tokens).logits)
    assert bool(torch.isfinite(logits).all())
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])
    assert float(loss) / math.log(2) < 2.5  # a uniform guess costs 8 bits a byte


def test_committed_weights_are_small_and_described_by_their_configuration(example: Any) -> None:
    quantise = example("quantise")
    assert quantise.WEIGHTS.stat().st_size < 17_000_000
    config = json.loads((EXAMPLE / "config.json").read_text())
    assert config == json.loads((quantise.WEIGHTS.parent / "config.json").read_text())
    assert 3 * config["hidden_size"] * config["intermediate_size"] * 4 >= 500_000  # bytes of an expert in fp32
    figures = json.loads((quantise.WEIGHTS.parent / "figures.json").read_text())
    parameters = sum(weight.numel() for weight in example("model").build(seed=0).parameters())
    assert (figures["num_parameters"], figures["num_weight_file_bytes"]) == (
        parameters,
        quantise.WEIGHTS.stat().st_size,
    )


# ---- recording


@pytest.mark.parametrize("distance", [1, 2, 3])
def test_committed_pre_gates_predict_text_where_they_were_trained_to_choose(
    distance: int, example: Any, int8_model: Any, corpus_documents: list[Any]
) -> None:
    pre_gate, corpus, evaluate = (example(name) for name in ("pre_gate", "corpus", "evaluate"))
    rows = pre_gate.windows(corpus.joined(corpus_documents, "c", held_out=True), 8)
    mine = pre_gate.load_pre_gated(distance)
    assert getattr(mine.config, pre_gate.KEY) == distance
    trained = pre_gate.scored(mine, distance, {"c": rows})["c"].mean()
    moved = pre_gate.scored(int8_model, distance, {"c": rows})[
        "c"
    ].mean()  # gates that were never trained for their new places
    conventional = evaluate.model_bits(int8_model, rows).mean()
    assert conventional < trained < moved


def test_figures_of_pre_gates_are_those_that_the_readme_states(example: Any) -> None:
    stored = json.loads((EXAMPLE / "weights" / "pre-gate.json").read_text())
    readme = (EXAMPLE / "README.md").read_text()
    rows = stored["by_distance"]
    assert set(rows) == {"committed", "0", "1", "2", "3"}
    for name, row in rows.items():
        assert f"{row['bits_per_byte']['mean']:.3f}" in readme, name
        if "worse_by" in row:
            assert f"+{row['worse_by']:.3f} ± {row['standard_error']:.3f}" in readme, name
    files = [path.stat().st_size for path in (EXAMPLE / "weights").iterdir()]
    assert sum(files) < 30e6


def test_hooks_record_exactly_what_the_model_chose(example: Any, int8_model: Any) -> None:
    record, torch = example("record"), importlib.import_module("torch")
    tokens = torch.tensor([list(b"The value of the argument is converted to a string; see also")])
    settings = record.Settings(width=4)
    with torch.inference_mode(), record.RouterHooks(int8_model) as hooks:
        logits = int8_model(tokens, output_router_logits=True).router_logits
        rows = hooks.rows(settings)
        for layer, of_layer in enumerate(logits):
            best = of_layer.float().softmax(dim=-1).topk(2, dim=-1)
            assert rows["experts"][:, layer].tolist() == best.indices.tolist()
            shares = best.values / best.values.sum(dim=-1, keepdim=True)
            assert np.array_equal(rows["weights"][:, layer], shares.numpy().astype(np.float16))
            own = hooks.early(layer, 0, 2)  # the gate on its own input is the choice itself
            assert torch.equal(own[0], best.indices)
            assert torch.equal(own[1], best.values)
    kept = hooks.inputs[0]
    int8_model(tokens[:, :3])
    assert hooks.inputs[0] is kept  # the hooks are gone


def test_early_guesses_are_the_target_gate_on_an_earlier_hidden_state(example: Any, int8_model: Any) -> None:
    record, torch = example("record"), importlib.import_module("torch")
    tokens = torch.tensor([list(b"#include <stdio.h>\n")])
    normed: list[Any] = []
    watch = [
        layer.post_attention_layernorm.register_forward_hook(lambda module, given, out: normed.append(out[0]))
        for layer in int8_model.model.layers
    ]
    with torch.inference_mode(), record.RouterHooks(int8_model) as hooks:
        int8_model(tokens)
        rows = hooks.rows(record.Settings(width=4))
    for handle in watch:
        handle.remove()
    for layer, distance in itertools.product(range(6), (1, 2, 3)):
        ids, probability = rows["predicted"][:, layer, distance - 1], rows["predicted_prob"][:, layer, distance - 1]
        if layer < distance:
            assert (ids == -1).all()
            assert (probability == 0).all()
            continue
        scores = (normed[layer - distance] @ int8_model.model.layers[layer].mlp.gate.weight.detach().t()).softmax(
            dim=-1
        )
        order = scores.sort(dim=-1, descending=True)
        assert ids.tolist() == order.indices[:, :4].tolist()
        assert probability == pytest.approx(order.values[:, :4].detach().numpy(), abs=1e-3)


def test_decoding_with_a_cache_routes_like_one_pass_over_the_same_bytes(example: Any, int8_model: Any) -> None:
    record, torch = example("record"), importlib.import_module("torch")
    settings = record.Settings(num_decode=12)
    prompt = b"=head1 NAME\n\nFile::Temp - "
    with record.RouterHooks(int8_model) as hooks:
        rows, text = record.record_request(int8_model, hooks, prompt, settings, (1, 2))
        with torch.inference_mode():
            int8_model(torch.tensor([list(prompt + text[:-1])]))
        whole = hooks.rows(settings)
        assert record.record_request(int8_model, hooks, prompt, settings, (1, 2))[1] == text
    assert len(text) == 13
    assert rows["phase"].tolist() == [0] * len(prompt) + [1] * 12
    assert (rows["experts"] == whole["experts"]).mean() > 0.99  # a near tie may fall the other way
    assert np.abs(rows["weights"].astype(float) - whole["weights"]).max() < 0.01


def test_sampling_inverts_the_cumulative_distribution(example: Any) -> None:
    record, torch = example("record"), importlib.import_module("torch")
    logits = torch.tensor([0.5, 0.25, 0.25]).log()
    random = np.random.default_rng(0)
    drawn = [record.sample(logits, 1.0, random) for _ in range(4000)]
    assert np.bincount(drawn) / 4000 == pytest.approx([0.5, 0.25, 0.25], abs=0.03)
    assert {record.sample(logits, 0.01, random) for _ in range(50)} == {0}


def test_prompts_are_held_out_and_follow_from_the_seed(example: Any, corpus_documents: list[Any]) -> None:
    record = example("record")
    found = record.prompts(corpus_documents, record.Settings(num_requests=10))
    assert found == record.prompts(corpus_documents, record.Settings(num_requests=12))[:10]
    texts = {document.name: document for document in corpus_documents}
    for prompt in found:
        assert texts[prompt.document].held_out
        assert texts[prompt.document].text[prompt.start :].startswith(prompt.text)
        assert 48 <= len(prompt.text) <= 80


# ---- bundled recording


def test_bundled_recording_has_its_shapes_and_order(bundled: RoutingTrace) -> None:
    settings = json.loads(bundled.metadata["settings"])
    prompts = json.loads(bundled.metadata["prompts"])
    assert BUNDLED.stat().st_size < 3_000_000
    assert (bundled.num_layers, bundled.top_k, bundled.num_experts, bundled.model) == (6, 2, 16, "tiny-moe")
    assert bundled.predicted is not None and bundled.predicted_prob is not None and bundled.weights is not None
    assert bundled.predicted.shape == (bundled.num_tokens, 6, settings["distance"], settings["width"])
    assert bundled.num_tokens == sum(length for _, _, length in prompts) + len(prompts) * settings["num_decode"]
    assert int(bundled.phase.sum()) == len(prompts) * settings["num_decode"] >= 8000
    assert len(json.loads(bundled.metadata["domains"])) == len(prompts) == int(bundled.request[-1]) + 1
    for layer, distance in itertools.product(range(6), (1, 2, 3)):
        assert ((bundled.predicted[:, layer, distance - 1] >= 0) == (layer >= distance)).all()
    assert (np.diff(bundled.predicted_prob.astype(np.float32), axis=-1) <= 0).all()
    assert bundled.weights.astype(np.float32).sum(axis=-1) == pytest.approx(1.0, abs=2e-3)
    assert (bundled.weights[..., 0] >= bundled.weights[..., 1]).all()


def test_bundled_recording_comes_from_the_committed_weights(
    example: Any, int8_model: Any, corpus_documents: list[Any], bundled: RoutingTrace
) -> None:
    record = example("record")
    settings = record.Settings(**json.loads(bundled.metadata["settings"]))
    given = record.prompts(corpus_documents, settings)
    if [[prompt.document, prompt.start, len(prompt.text)] for prompt in given] != json.loads(
        bundled.metadata["prompts"]
    ):
        pytest.skip("this machine's text differs from the recording's (another Python version)")
    again, _ = record.record(int8_model, given[:3], dataclasses.replace(settings, num_decode=0))
    prefill = (bundled.request < 3) & (bundled.phase == 0)
    assert (again.experts == bundled.experts[prefill]).mean() > 0.99  # rounding differs between processors
    assert (again.predicted == bundled.predicted[prefill]).mean() > 0.99


def test_figures_of_a_recording_small_enough_to_count_by_hand(example: Any) -> None:
    figures = example("figures")
    experts = np.array([[[0, 1], [0, 1]], [[1, 2], [2, 3]], [[2, 1], [3, 0]]], np.uint8)
    predicted = np.full((3, 2, 1, 2), -1, np.int16)
    predicted[:, 1, 0] = [[0, 1], [2, 0], [1, 3]]
    trace = RoutingTrace(
        experts=experts,
        request=np.zeros(3, np.int32),
        position=np.arange(3, dtype=np.int32),
        phase=np.array([0, 1, 1], np.uint8),
        num_experts=4,
        model="",
        layer_ids=(0, 1),
        source="",
        licence="",
        predicted=predicted,
    )
    assert figures.recall(trace).tolist() == [[1 / 4, 2 / 4]]  # decode tokens 1, 2 choose {2, 3}, {3, 0} in layer 1
    assert figures.load(trace).tolist() == [[0, 2, 2, 0], [1, 0, 1, 2]]
    again, chance = figures.reuse(trace)
    assert again == pytest.approx((1 + 0 + 2 + 1) / 8)
    assert chance == pytest.approx(((1 + 1) / 2 + (0.25 + 0.25 + 1) / 2) / 2)


def test_early_guesses_beat_blind_ones_and_nearer_ones_are_better(example: Any, bundled: RoutingTrace) -> None:
    table = example("figures").recall(bundled)
    assert (np.diff(table, axis=1) > 0).all()
    assert (np.diff(table, axis=0) < 0).all()
    assert (table > np.arange(1, table.shape[1] + 1) / bundled.num_experts).all()


def test_readmes_state_the_figures_that_the_files_give(example: Any, bundled: RoutingTrace) -> None:
    figures = example("figures")
    weights = json.loads(figures.WEIGHT_FIGURES.read_text())
    readme = (EXAMPLE / "README.md").read_text()
    assert figures.markdown(bundled) in readme
    assert figures.held_out_markdown(weights["held_out"]) in readme
    assert f"{weights['num_parameters']:,} parameters" in readme
    assert f"{weights['run']['train_s'] / 60:.0f} minutes" in readme
    assert figures.markdown(bundled) in (ROOT / "traces" / "bundled" / "README.md").read_text()
