"""A question people have before they measure anything, answered: a model that does not fit a card, on the cores or on both.

Modelled: one bundled model, one machine made of parts, one engine; the three ways of placing experts that the engine has, each with
its interval, its memory and what binds; the count of layers for which the card is just large enough. Ignored: everything else the
planner would search.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...base.errors import DoesNotFit
from ...reports import numbers

if TYPE_CHECKING:
    from ...api.subject import Subject
    from ...reports.page import Section
    from ...sim.offload.simulate import Prediction

MODEL, QUANT, ENGINE = "gpt-oss-120b", "MXFP4_MOE", "llama.cpp"
HARDWARE = "rtx-4090 + ryzen-9-7950x + ddr5-5600x2:96GiB"
PROMPT_TOKENS, REPLY_TOKENS = 2048, 256
TITLE = (
    "gpt-oss-120b does not fit an RTX 4090: how many layers' experts go to the cores, how fast is it, and what binds?"
)
_BINDS = {
    "cpu": "the cores, which read their experts from main memory", "memory": "the card's memory", "compute": "the card's arithmetic",
    "launch": "what launching kernels takes", "copy": "the link to the card", "host": "what handing work over takes", "disk": "the disk",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The three placements compared."""

    machine: str
    resident_bytes: int
    missing_bytes: int
    cpu_layers: int
    """For which the experts of the other layers just fit the card."""
    num_layers: int
    rows: tuple[tuple[str, Prediction], ...]
    """What the engine is told, and the prediction."""
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the answer as plain values."""
        rows = [
            {
                "told": told, "schedule": one.schedule.name, "decode_tokens_per_s": one.metrics.decode_tokens_per_s,
                "decode_tokens_per_s_interval": _both(one.metrics.decode_tokens_per_s_interval),
                "prefill_tokens_per_s": one.metrics.prefill_tokens_per_s,
                "prefill_tokens_per_s_interval": _both(one.metrics.prefill_tokens_per_s_interval), "ttft_s": one.metrics.ttft_s,
                "bound": one.metrics.bound, "device_bytes": one.memory_breakdown.device_bytes,
                "host_bytes": one.memory_breakdown.host_bytes,
            }
            for told, one in self.rows
        ]  # fmt: skip
        return {
            "question": TITLE, "machine": self.machine, "engine": ENGINE, "model": MODEL, "quant": QUANT,
            "resident_bytes": self.resident_bytes, "missing_bytes": self.missing_bytes, "cpu_layers": self.cpu_layers,
            "num_layers": self.num_layers, "rows": rows, "notes": list(self.notes),
        }  # fmt: skip

    def lines(self) -> list[str]:
        """Return the answer in words, one sentence or row a line."""
        found = [
            TITLE,
            f"  on {HARDWARE}, {ENGINE}, {QUANT}; a prompt of {PROMPT_TOKENS:,} tokens, an answer of {REPLY_TOKENS}; nothing measured.",
            f"  all on the card: needs {numbers.size(self.resident_bytes)}, does not fit by {numbers.size(self.missing_bytes)}.",
        ]  # fmt: skip
        for told, one in self.rows:
            metrics, memory = one.metrics, one.memory_breakdown
            found.append(
                f"  {told}: {_rate(metrics.decode_tokens_per_s, metrics.decode_tokens_per_s_interval)} generated tokens/s, "
                f"{_rate(metrics.prefill_tokens_per_s, metrics.prefill_tokens_per_s_interval)} prompt tokens/s, first token after "
                f"{numbers.seconds(metrics.ttft_s or 0.0)}; {numbers.size(memory.device_bytes)} on the card, "
                f"{numbers.size(memory.host_bytes)} in the host."
            )
        last = self.rows[-1][1].metrics
        found.append(
            f"  So: --n-cpu-moe {self.cpu_layers} (of {self.num_layers} layers). What binds is {_BINDS.get(last.bound, last.bound)}."
        )
        return [*found, f"  Ask your own: {self.command}"]

    @property
    def command(self) -> str:
        """The command that makes the last row."""
        return (f'moeplan simulate --model {MODEL} --quant {QUANT} --engine {ENGINE} --hardware "{HARDWARE}" --schedule '
                f"n-cpu-moe={self.cpu_layers} --prompt-tokens {PROMPT_TOKENS} --reply-tokens {REPLY_TOKENS}")  # fmt: skip

    def section(self) -> Section:
        """Return the answer as a part of a report."""
        from ...reports.page import Column, Section, bullet_list, code_block, paragraph, table

        columns = (Column(title="placement", is_name=True), Column(title="generated tokens/s"), Column(title="prompt tokens/s"),
                   Column(title="on the card", is_number=True), Column(title="in the host", is_number=True),
                   Column(title="what binds"))  # fmt: skip
        missing = f"does not fit: {numbers.size(self.missing_bytes)} are missing"
        rows = [("all on the card", missing, "", numbers.size(self.resident_bytes), "", "memory")]
        for told, one in self.rows:
            metrics, memory = one.metrics, one.memory_breakdown
            rows.append(
                (
                    told, _rate(metrics.decode_tokens_per_s, metrics.decode_tokens_per_s_interval),
                    _rate(metrics.prefill_tokens_per_s, metrics.prefill_tokens_per_s_interval), numbers.size(memory.device_bytes),
                    numbers.size(memory.host_bytes), _BINDS.get(metrics.bound, metrics.bound),
                )
            )  # fmt: skip
        lines = self.lines()
        parts = (paragraph(lines[1].strip()), table(columns, rows, marked=frozenset({len(rows) - 1})), paragraph(lines[-2].strip()),
                 code_block(self.command), bullet_list(self.notes))  # fmt: skip
        return Section(id="question", title=TITLE, parts=parts)

    def page(self) -> str:
        """Return the answer as a page of its own."""
        from ...reports.page import paragraph, render

        lead = [paragraph(self.lines()[-2].strip(), "answer")]
        footer = "This file is complete: it opens without a network."
        return render(title=f"{MODEL} on an RTX 4090", lead=lead, sections=[self.section()], footer=footer)


def first_answer() -> Answer:
    """Return the answer, predicted in a second or two: no recording, nothing measured."""
    from ...api.subject import open_subject

    subject = open_subject(
        model=MODEL, hardware=HARDWARE, trace=None, engine=ENGINE, quant=QUANT, prompt_tokens=PROMPT_TOKENS, reply_tokens=REPLY_TOKENS,
    )  # fmt: skip
    simulation = subject.simulation
    layers, each = simulation.model.num_moe_layers, simulation.model.num_experts
    on_card = simulation.slots_that_fit(_preset(subject, "n-cpu-moe")) // each
    on_cores = max(0, layers - on_card)
    placements = (("--cpu-moe", "cpu-moe"), (f"--n-cpu-moe {on_cores}", f"n-cpu-moe={on_cores}"))
    needed, missing = _resident(subject)
    return Answer(
        machine=simulation.profile.description, resident_bytes=needed, missing_bytes=missing, cpu_layers=on_cores, num_layers=layers,
        rows=tuple((told, simulation.predict(_preset(subject, name))) for told, name in placements), notes=subject.notes,
    )  # fmt: skip


def _preset(subject: Subject, name: str) -> Any:
    from ...specs.schedules.presets import load_preset

    return subject.at_once(load_preset(name))


def _resident(subject: Subject) -> tuple[int, int]:
    """Return the bytes that everything on the card needs, and how many of them it lacks."""
    simulation = subject.simulation
    schedule = _preset(subject, "resident")
    needed = simulation.memory_breakdown(schedule, cached_experts=simulation.num_experts).device_bytes
    try:
        simulation.slots_that_fit(schedule, least=simulation.num_experts)
    except DoesNotFit as error:
        return needed, error.missing_bytes
    return needed, 0


def _both(interval: Any) -> list[float] | None:
    return None if interval is None else [float(one) for one in interval]


def _rate(value: float | None, interval: Any) -> str:
    if value is None or interval is None:
        return "no figure"
    low, high = interval
    return f"{numbers.significant(value)} ({numbers.significant(low)} to {numbers.significant(high)} likely)"
