"""The compiled twin of the offload model: the same semantics as `offload_model`, as array loops.

Modelled: a compute stream in program order, a host→device copy engine that serves demands before prefetches and one
transfer (or chunk) at a time, a device→host engine in order, and a host whose operations precede what they submit. While
several lanes are busy each may run slower: an activity has whole work left and a rate that changes when its companions do.
At one instant, completions come first, then submissions, then one arbitration. Ignored: what the decisions are; they are
made by `policies.offload.decide_visit`, as in the model. One function is long on purpose: its scalars live in registers,
which is where its speed comes from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..jit import jit_lean
from .costs import D2H, H2D, HOST, HOST_KERNEL, HOST_LAYER, HOST_STEP, HOST_TRANSFER, RATE_ONE, CostTables
from .policies.offload import begin_step, decide_visit
from .policies.state import (
    DEMAND, FIRST_BACK, FIRST_TRANSFER, SIZE_BACKS, SIZE_ITEMS, SIZE_KERNELS, SIZE_MOVES, SIZE_PROMOTED,
    Array, Decision, PolicyConfig, PolicyState,
)  # fmt: skip
from .timeline import (
    OP_BACK, OP_DEMAND, OP_DENSE, OP_EXPERT, OP_HEAD, OP_HOST_LAYER, OP_HOST_LAUNCH, OP_HOST_STEP, OP_HOST_SUBMIT, OP_PREFETCH,
    ROW_BYTES, ROW_END, ROW_EXPERT, ROW_LANE, ROW_LAYER, ROW_OP, ROW_START, ROW_STEP, ROW_TOKENS,
)  # fmt: skip

if TYPE_CHECKING:
    from .workload import Steps

# `clock` indices: what a run carries from one piece of a recording to the next, and what it adds up.
(
    NOW, COMPUTE_END, KERNELS_DONE, BACKS_DONE, ROWS, STUCK, READY, LATE,
    BUSY_DENSE, BUSY_EXPERT, BUSY_HEAD, BUSY_DEMAND, BUSY_PREFETCH, BUSY_BACK, BUSY_HOST,
    STALL_COPY, STALL_HOST, BYTES_H2D, BYTES_D2H, MAKESPAN, STEP, LIMIT, NUM_CLOCK,
) = range(23)  # fmt: skip

# Fields of a queued transfer.
Q_ID, Q_KEY, Q_TARGET, Q_KERNEL, Q_BACK, Q_LEFT, Q_CLASS, Q_FIELDS = range(8)

_NEVER = 2**62
# Values of `clock[STUCK]`.
DEADLOCK, QUEUE_FULL, ABANDONED = 1, 2, 3
NUM_OP_FIELDS = 5


@jit_lean
def _row(rows: Array, clock: Array, lane: int, op: int, step: int, layer: int, expert: int, start: int, end: int,
         num_bytes: int, tokens: int) -> None:  # fmt: skip
    """Count one timeline row and write it where rows are wanted; activities that take no time leave none."""
    if end > start:
        at = clock[ROWS]
        if at < rows.shape[0]:
            rows[at, ROW_LANE] = lane
            rows[at, ROW_OP] = op
            rows[at, ROW_STEP] = step
            rows[at, ROW_LAYER] = layer
            rows[at, ROW_EXPERT] = expert
            rows[at, ROW_START] = start
            rows[at, ROW_END] = end
            rows[at, ROW_BYTES] = num_bytes
            rows[at, ROW_TOKENS] = tokens
        clock[ROWS] = at + 1


@jit_lean
def _packed(queue: Array, head: int, tail: int) -> int:
    """Move a queue's entries to its front; return where they now end."""
    for at in range(head, tail):
        for field in range(Q_FIELDS):
            queue[at - head, field] = queue[at, field]
    return tail - head


@jit_lean
def _find(queue: Array, head: int, tail: int, target: int, transfer: int) -> int:
    """Return where a transfer stands in a queue sorted by (target, id), or -1 when it is not waiting there any more."""
    end = tail
    while head < tail:
        middle = (head + tail) // 2
        if queue[middle, Q_TARGET] < target or (queue[middle, Q_TARGET] == target and queue[middle, Q_ID] < transfer):
            head = middle + 1
        else:
            tail = middle
    found = head < end and queue[head, Q_ID] == transfer and queue[head, Q_LEFT] > 0
    return head if found else -1


@jit_lean
def _copy_entry(queue: Array, source: int, target: int) -> None:
    for field in range(Q_FIELDS):
        queue[target, field] = queue[source, field]


@jit_lean
def kernel_work(costs: CostTables, out: Decision, base: int, first: int, last: int) -> int:
    """Return the nanoseconds of one launch over items `first` to `last` (exclusive)."""
    work = int(costs.grouped_ns[0])
    for at in range(first, last):
        work += int(costs.kernel_ns[costs.expert_format[base + out.item_expert[at]], out.item_tokens[at]])
    return work


@jit_lean
def run_serial(config: PolicyConfig, steps: Steps, costs: CostTables, state: PolicyState, out: Decision, clock: Array,
               later: Array, step_end: Array, rows: Array) -> None:  # fmt: skip
    """Advance `clock` over `steps` when copies and kernels share one stream, writing each step's end."""
    layers, experts = config.num_layers, config.num_experts
    host = costs.host_ns
    rowing = rows.shape[0] > 0
    now = clock[NOW]
    compute_end = clock[COMPUTE_END]
    for step in range(step_end.shape[0]):
        begin_step(config, steps, state, step)
        line = costs.step_class[clock[STEP]]
        tokens = steps.step_start[step + 1] - steps.step_start[step]
        stamp = clock[STEP]
        launched = now + host[HOST_KERNEL]
        _row(rows, clock, HOST, OP_HOST_LAUNCH, stamp, 0, -1, now, launched, 0, 0)
        clock[BUSY_HOST] += host[HOST_KERNEL]
        stream = now
        for layer in range(layers):
            begin = max(stream, launched)
            stream = begin + costs.dense_ns[line, layer]
            clock[STALL_HOST] += begin - compute_end
            clock[BUSY_DENSE] += stream - begin
            compute_end = stream
            _row(rows, clock, 0, OP_DENSE, stamp, layer, -1, begin, stream, 0, tokens)
            decide_visit(config, steps, state, out, step, layer)
            base = layer * experts
            moves, kernels, items = out.size[SIZE_MOVES], out.size[SIZE_KERNELS], out.size[SIZE_ITEMS]
            for at in range(items):  # on one stream every earlier copy has ended before this layer began
                clock[READY] += out.item_transfer[at] >= 0 and out.item_transfer[at] < out.size[FIRST_TRANSFER]
            backs = out.size[SIZE_BACKS]
            # Host first: the routing is read, every copy is submitted, every kernel launched, in this order.
            at_layer = stream + host[HOST_LAYER]
            _row(rows, clock, HOST, OP_HOST_LAYER, stamp, layer, -1, stream, at_layer, 0, 0)
            submits = at_layer
            for _ in range(moves + backs):
                _row(rows, clock, HOST, OP_HOST_SUBMIT, stamp, layer, -1, submits, submits + host[HOST_TRANSFER], 0, 0)
                submits += host[HOST_TRANSFER]
            for number in range(kernels + 1):
                begin = submits + number * host[HOST_KERNEL]
                _row(rows, clock, HOST, OP_HOST_LAUNCH, stamp, layer, -1, begin, begin + host[HOST_KERNEL], 0, 0)
            clock[BUSY_HOST] += (
                host[HOST_LAYER] + (moves + backs) * host[HOST_TRANSFER] + (kernels + 1) * host[HOST_KERNEL]
            )
            launched = submits + (kernels + 1) * host[HOST_KERNEL]
            move = 0
            back = 0
            item = 0
            copied = 0
            for kernel in range(kernels + 1):
                # Before a kernel run the copies it needs, each behind the write-backs submitted with it; prefetches and
                # what is left come after the last kernel.
                while move < moves and (
                    kernel == kernels or (out.move_class[move] == DEMAND and out.move_kernel[move] <= kernel)
                ):
                    while back < backs and out.back_move[back] <= move:
                        begin = max(stream, at_layer + (move + back + 1) * host[HOST_TRANSFER])
                        stream = _serial_back(costs, out, clock, rows, stamp, experts, back, begin)
                        copied += stream - begin
                        back += 1
                    begin = max(stream, at_layer + (move + back + 1) * host[HOST_TRANSFER])
                    stream = _serial_move(costs, out, clock, rows, stamp, layers, experts, move, begin)
                    copied += stream - begin
                    move += 1
                if kernel == kernels:
                    break
                first = item
                while item < items and out.item_kernel[item] == kernel:
                    item += 1
                begin = max(stream, submits + (kernel + 1) * host[HOST_KERNEL])
                stream = begin + kernel_work(costs, out, base, first, item)
                clock[STALL_COPY] += copied
                clock[STALL_HOST] += begin - compute_end - copied
                clock[BUSY_EXPERT] += stream - begin
                compute_end = stream
                copied = 0
                if rowing:
                    _kernel_row(rows, clock, out, stamp, layer, first, item, begin, stream)
            while back < backs:
                begin = max(stream, at_layer + (move + back + 1) * host[HOST_TRANSFER])
                stream = _serial_back(costs, out, clock, rows, stamp, experts, back, begin)
                copied += stream - begin
                back += 1
            clock[STALL_COPY] += copied
            clock[STALL_HOST] -= copied
        begin = max(stream, launched)
        stream = begin + costs.head_ns[line]
        clock[STALL_HOST] += begin - compute_end
        clock[BUSY_HEAD] += stream - begin
        compute_end = stream
        _row(rows, clock, 0, OP_HEAD, stamp, layers - 1, -1, begin, stream, 0, tokens)
        now = stream + host[HOST_STEP]
        _row(rows, clock, HOST, OP_HOST_STEP, stamp, layers - 1, -1, stream, now, 0, 0)
        clock[BUSY_HOST] += host[HOST_STEP]
        step_end[step] = now
        if clock[LIMIT] and now + later[step + 1] > clock[LIMIT]:
            clock[STUCK] = ABANDONED
            return
        clock[STEP] += 1
    clock[NOW] = now
    clock[COMPUTE_END] = compute_end
    clock[MAKESPAN] = now


@jit_lean
def _kernel_row(
    rows: Array, clock: Array, out: Decision, step: int, layer: int, first: int, last: int, start: int, end: int
) -> None:
    """Write one kernel's row: an expert of its own, or -1 for a group, with the tokens of all."""
    tokens = 0
    for at in range(first, last):
        tokens += out.item_tokens[at]
    expert = out.item_expert[first] if last - first == 1 else -1
    _row(rows, clock, 0, OP_EXPERT, step, layer, expert, start, end, 0, tokens)


@jit_lean
def _serial_move(costs: CostTables, out: Decision, clock: Array, rows: Array, step: int, layers: int, experts: int,
                 move: int, begin: int) -> int:  # fmt: skip
    """Run one transfer's chunks back to back; return when they end."""
    key = out.move_key[move]
    fmt = costs.expert_format[key]
    demand = out.move_class[move] == DEMAND
    for chunk in range(costs.num_chunks[fmt]):
        last = int(chunk == costs.num_chunks[fmt] - 1)
        end = begin + costs.chunk_ns[fmt, last]
        _row(rows, clock, H2D, OP_DEMAND if demand else OP_PREFETCH, step, key // experts, key % experts, begin, end,
             costs.chunk_bytes[fmt, last], 0)  # fmt: skip
        clock[BUSY_DEMAND if demand else BUSY_PREFETCH] += end - begin
        begin = end
    clock[BYTES_H2D] += costs.expert_bytes[fmt]
    return begin


@jit_lean
def _serial_back(
    costs: CostTables, out: Decision, clock: Array, rows: Array, step: int, experts: int, back: int, begin: int
) -> int:
    """Run one write-back; return when it ends."""
    key = out.back_key[back]
    fmt = costs.expert_format[key]
    end = begin + int(costs.back_ns[fmt])
    _row(rows, clock, D2H, OP_BACK, step, key // experts, key % experts, begin, end, costs.expert_bytes[fmt], 0)
    clock[BUSY_BACK] += end - begin
    clock[BYTES_D2H] += costs.expert_bytes[fmt]
    return end


@jit_lean
def run_overlapped(config: PolicyConfig, steps: Steps, costs: CostTables, state: PolicyState, out: Decision, clock: Array,
                   demand: Array, ahead: Array, backlog: Array, ops: Array, arrived: Array, later: Array,
                   step_end: Array, rows: Array) -> None:  # fmt: skip
    """Advance `clock` over `steps` when copies overlap kernels, writing each step's end; all queues end empty.

    demand, ahead, backlog: int64 [room, Q_FIELDS], the queues; when one has too little room the run stops with
    `clock[STUCK] = QUEUE_FULL` and is to be repeated with more. ops: int64 [5, num_experts + 2], scratch.
    arrived: int64 [num_keys], the latest transfer of each expert that has arrived, -1 at the start.
    later: int64 [num_steps + 1], the least time from each step to the end; with `clock[LIMIT]` set, the run is abandoned
    once a step's end plus what must follow exceeds it.
    """
    layers, experts = config.num_layers, config.num_experts
    host = costs.host_ns
    rowing = rows.shape[0] > 0
    coupled = False
    for lane in range(costs.rate.shape[0]):
        for mask in range(costs.rate.shape[1]):
            coupled = coupled or costs.rate[lane, mask] != RATE_ONE
    now = clock[NOW]
    compute_end = clock[COMPUTE_END]
    kernels_done = clock[KERNELS_DONE]
    backs_done = clock[BACKS_DONE]
    # Lanes: compute, host→device, device→host.
    c_busy, h_busy, d_busy = False, False, False
    c_fin, h_fin, d_fin = _NEVER, _NEVER, _NEVER
    c_work, h_work, d_work = 0, 0, 0
    c_upd, h_upd, d_upd = now, now, now
    c_rate, h_rate, d_rate = RATE_ONE, RATE_ONE, RATE_ONE
    c_start, h_start, d_start = now, now, now
    # The transfer on the host→device engine.
    h_id, h_key, h_target, h_kernel, h_back, h_left, h_class = -1, 0, 0, 0, 0, 0, 0
    h_began = 0  # its class when the chunk began: that is what its row says
    dq_head, dq_tail, pq_head, pq_tail, bq_head, bq_tail = 0, 0, 0, 0, 0, 0
    num_ops = 0
    op = 0
    op_avail, op_work, op_first, op_last, op_code = ops[0], ops[1], ops[2], ops[3], ops[4]
    op_wait = 0  # first item of the next kernel that has not been seen to have arrived
    # Submissions of the current visit: first the promotions, then moves and write-backs in order.
    s_next, s_count, s_time = 0, 0, 0
    s_move, s_back = 0, 0
    step, layer, stamp = 0, -1, clock[STEP]
    num_steps = step_end.shape[0]
    draining = False
    if num_steps > 0:
        begin_step(config, steps, state, 0)
        _row(rows, clock, HOST, OP_HOST_LAUNCH, stamp, 0, -1, now, now + host[HOST_KERNEL], 0, 0)
        clock[BUSY_HOST] += host[HOST_KERNEL]
        op_avail[0] = now + host[HOST_KERNEL]
        op_work[0] = costs.dense_ns[costs.step_class[stamp], 0]
        op_code[0] = OP_DENSE
        num_ops = 1
    while True:
        # 1. Completions.
        finished = False
        if c_busy and c_fin <= now:
            c_busy = False
            c_fin = _NEVER
            compute_end = now
            code = op_code[op]
            if code == OP_EXPERT:
                kernels_done += 1
                clock[BUSY_EXPERT] += now - c_start
                if rowing:
                    _kernel_row(rows, clock, out, stamp, layer, op_first[op], op_last[op], c_start, now)
            else:
                tokens = steps.step_start[step + 1] - steps.step_start[step]
                at = layer + 1 if code == OP_DENSE else layer
                clock[BUSY_DENSE if code == OP_DENSE else BUSY_HEAD] += now - c_start
                _row(rows, clock, 0, code, stamp, at, -1, c_start, now, 0, tokens)
            op += 1
            finished = op == num_ops
        if h_busy and h_fin <= now:
            h_busy = False
            h_fin = _NEVER
            fmt = costs.expert_format[h_key]
            last = int(h_left == 0)
            clock[BUSY_DEMAND if h_began == DEMAND else BUSY_PREFETCH] += now - h_start
            place = h_target - steps.first_visit
            began = OP_DEMAND if h_began == DEMAND else OP_PREFETCH
            _row(rows, clock, H2D, began, stamp - step + place // layers, h_key // experts,
                 h_key % experts, h_start, now, costs.chunk_bytes[fmt, last], 0)  # fmt: skip
            if h_left == 0:
                arrived[h_key] = max(arrived[h_key], h_id)
                clock[BYTES_H2D] += costs.expert_bytes[fmt]
            elif h_class == DEMAND:  # the rest of a cut transfer goes back to the front of its queue
                if dq_head == 0:
                    if dq_tail == demand.shape[0]:
                        clock[STUCK] = QUEUE_FULL
                        return
                    for index in range(dq_tail, 0, -1):
                        _copy_entry(demand, index - 1, index)
                    dq_tail += 1
                    dq_head = 1
                dq_head -= 1
                at = dq_head
                while at + 1 < dq_tail and demand[at + 1, Q_ID] < h_id:
                    _copy_entry(demand, at + 1, at)
                    at += 1
                demand[at, Q_ID] = h_id
                demand[at, Q_KEY] = h_key
                demand[at, Q_TARGET] = h_target
                demand[at, Q_KERNEL] = h_kernel
                demand[at, Q_BACK] = h_back
                demand[at, Q_LEFT] = h_left
            else:
                if pq_head == 0:
                    if pq_tail == ahead.shape[0]:
                        clock[STUCK] = QUEUE_FULL
                        return
                    for index in range(pq_tail, 0, -1):
                        _copy_entry(ahead, index - 1, index)
                    pq_tail += 1
                    pq_head = 1
                pq_head -= 1
                at = pq_head
                while at + 1 < pq_tail and (
                    ahead[at + 1, Q_TARGET] < h_target
                    or (ahead[at + 1, Q_TARGET] == h_target and ahead[at + 1, Q_ID] < h_id)
                ):
                    _copy_entry(ahead, at + 1, at)
                    at += 1
                ahead[at, Q_ID] = h_id
                ahead[at, Q_KEY] = h_key
                ahead[at, Q_TARGET] = h_target
                ahead[at, Q_KERNEL] = h_kernel
                ahead[at, Q_BACK] = h_back
                ahead[at, Q_LEFT] = h_left
        if d_busy and d_fin <= now:
            d_busy = False
            d_fin = _NEVER
            backs_done += 1
            key = backlog[bq_head, Q_KEY]
            bq_head += 1
            fmt = costs.expert_format[key]
            clock[BUSY_BACK] += now - d_start
            clock[BYTES_D2H] += costs.expert_bytes[fmt]
            place = backlog[bq_head - 1, Q_TARGET] - steps.first_visit
            _row(rows, clock, D2H, OP_BACK, stamp - step + place // layers, key // experts, key % experts, d_start, now,
                 costs.expert_bytes[fmt], 0)  # fmt: skip
        # 2. The program: what the compute stream's last operation lets the host do.
        if finished:
            code = op_code[op - 1]
            op = 0
            if code == OP_DENSE:
                layer += 1
                decide_visit(config, steps, state, out, step, layer)
                base = layer * experts
                moves, backs, kernels = out.size[SIZE_MOVES], out.size[SIZE_BACKS], out.size[SIZE_KERNELS]
                for at in range(out.size[SIZE_ITEMS]):
                    if out.item_transfer[at] >= 0 and out.item_transfer[at] < out.size[FIRST_TRANSFER]:
                        late = arrived[base + out.item_expert[at]] < out.item_transfer[at]
                        clock[LATE if late else READY] += 1
                s_time = now + host[HOST_LAYER]
                s_next, s_count, s_move, s_back = 0, 1 + moves + backs, 0, 0
                submits = s_time + (moves + backs) * host[HOST_TRANSFER]
                clock[BUSY_HOST] += submits - now + (kernels + 1) * host[HOST_KERNEL]
                if rowing:
                    _row(rows, clock, HOST, OP_HOST_LAYER, stamp, layer, -1, now, s_time, 0, 0)
                    for number in range(moves + backs):
                        begin = s_time + number * host[HOST_TRANSFER]
                        _row(
                            rows,
                            clock,
                            HOST,
                            OP_HOST_SUBMIT,
                            stamp,
                            layer,
                            -1,
                            begin,
                            begin + host[HOST_TRANSFER],
                            0,
                            0,
                        )
                    for number in range(kernels + 1):
                        begin = submits + number * host[HOST_KERNEL]
                        _row(
                            rows, clock, HOST, OP_HOST_LAUNCH, stamp, layer, -1, begin, begin + host[HOST_KERNEL], 0, 0
                        )
                item = 0
                for kernel in range(kernels):
                    first = item
                    while item < out.size[SIZE_ITEMS] and out.item_kernel[item] == kernel:
                        item += 1
                    op_avail[kernel] = submits + (kernel + 1) * host[HOST_KERNEL]
                    op_work[kernel] = kernel_work(costs, out, base, first, item)
                    op_first[kernel] = first
                    op_last[kernel] = item
                    op_code[kernel] = OP_EXPERT
                op_avail[kernels] = submits + (kernels + 1) * host[HOST_KERNEL]
                op_first[kernels] = op_last[kernels] = 0
                line = costs.step_class[stamp]
                if layer + 1 < layers:
                    op_code[kernels] = OP_DENSE
                    op_work[kernels] = costs.dense_ns[line, layer + 1]
                else:
                    op_code[kernels] = OP_HEAD
                    op_work[kernels] = costs.head_ns[line]
                num_ops = kernels + 1
                op_wait = op_first[0]
            else:  # the head is done: the step ends after the host's share
                begin = now + host[HOST_STEP]
                _row(rows, clock, HOST, OP_HOST_STEP, stamp, layer, -1, now, begin, 0, 0)
                clock[BUSY_HOST] += host[HOST_STEP]
                step_end[step] = begin
                if clock[LIMIT] and begin + later[step + 1] > clock[LIMIT]:
                    clock[STUCK] = ABANDONED
                    return
                layer = -1
                num_ops = 0
                if step + 1 < num_steps:
                    step += 1
                    stamp += 1
                    begin_step(config, steps, state, step)
                    _row(rows, clock, HOST, OP_HOST_LAUNCH, stamp, 0, -1, begin, begin + host[HOST_KERNEL], 0, 0)
                    clock[BUSY_HOST] += host[HOST_KERNEL]
                    op_avail[0] = begin + host[HOST_KERNEL]
                    op_work[0] = costs.dense_ns[costs.step_class[stamp], 0]
                    op_code[0] = OP_DENSE
                    op_first[0] = op_last[0] = op_wait = 0
                    num_ops = 1
                else:
                    draining = True
                    clock[STEP] = stamp + 1
        # 3. Submissions that are due.
        while s_next < s_count and s_time <= now:
            if s_next == 0:
                if dq_head == dq_tail:
                    dq_head = dq_tail = 0
                for index in range(out.size[SIZE_PROMOTED]):
                    wanted = out.promoted[index]
                    if h_busy and h_id == wanted:
                        h_class = DEMAND  # its current chunk is already running; the rest is demanded
                        continue
                    at = _find(ahead, pq_head, pq_tail, out.promoted_target[index], wanted)
                    if at >= 0:
                        if dq_tail == demand.shape[0]:
                            clock[STUCK] = QUEUE_FULL
                            return
                        for field in range(Q_FIELDS):
                            demand[dq_tail, field] = ahead[at, field]
                        dq_tail += 1
                        ahead[at, Q_LEFT] = 0  # nothing is left to move: passed over when its turn comes
            elif s_back < out.size[SIZE_BACKS] and (out.back_move[s_back] <= s_move or s_move == out.size[SIZE_MOVES]):
                if bq_tail == backlog.shape[0]:
                    bq_tail = _packed(backlog, bq_head, bq_tail)
                    bq_head = 0
                    if bq_tail == backlog.shape[0]:
                        clock[STUCK] = QUEUE_FULL
                        return
                backlog[bq_tail, Q_ID] = out.size[FIRST_BACK] + s_back
                backlog[bq_tail, Q_KEY] = out.back_key[s_back]
                backlog[bq_tail, Q_KERNEL] = out.back_wait_kernel[s_back]
                backlog[bq_tail, Q_TARGET] = steps.first_visit + step * layers + layer
                bq_tail += 1
                s_back += 1
            else:
                key = out.move_key[s_move]
                if out.move_class[s_move] == DEMAND:
                    if dq_head == dq_tail:
                        dq_head = dq_tail = 0
                    if dq_tail == demand.shape[0]:
                        dq_tail = _packed(demand, dq_head, dq_tail)
                        dq_head = 0
                        if dq_tail == demand.shape[0]:
                            clock[STUCK] = QUEUE_FULL
                            return
                    at = dq_tail
                    dq_tail += 1
                    entry = demand
                else:
                    if pq_head == pq_tail:
                        pq_head = pq_tail = 0
                    if pq_tail == ahead.shape[0]:
                        pq_tail = _packed(ahead, pq_head, pq_tail)
                        pq_head = 0
                        if pq_tail == ahead.shape[0]:
                            clock[STUCK] = QUEUE_FULL
                            return
                    at = pq_tail
                    pq_tail += 1
                    while at > pq_head and ahead[at - 1, Q_TARGET] > out.move_target[s_move]:
                        _copy_entry(ahead, at - 1, at)
                        at -= 1
                    entry = ahead
                entry[at, Q_ID] = out.size[FIRST_TRANSFER] + s_move
                entry[at, Q_KEY] = key
                entry[at, Q_TARGET] = out.move_target[s_move]
                entry[at, Q_KERNEL] = out.move_wait_kernel[s_move]
                entry[at, Q_BACK] = out.move_wait_writeback[s_move]
                entry[at, Q_LEFT] = costs.num_chunks[costs.expert_format[key]]
                s_move += 1
            s_next += 1
            if s_next < s_count:
                s_time += host[HOST_TRANSFER]
        # 4. One arbitration: each idle lane takes its first request, if that may start.
        if not h_busy:
            if dq_head < dq_tail:
                if demand[dq_head, Q_KERNEL] < kernels_done and demand[dq_head, Q_BACK] < backs_done:
                    h_id, h_key, h_target = demand[dq_head, Q_ID], demand[dq_head, Q_KEY], demand[dq_head, Q_TARGET]
                    h_kernel, h_back = demand[dq_head, Q_KERNEL], demand[dq_head, Q_BACK]
                    h_left, h_class = demand[dq_head, Q_LEFT] - 1, DEMAND
                    dq_head += 1
                    h_busy = True
            if not h_busy and dq_head == dq_tail:
                while pq_head < pq_tail and ahead[pq_head, Q_LEFT] == 0:
                    pq_head += 1
            if (
                dq_head == dq_tail
                and not h_busy
                and pq_head < pq_tail
                and ahead[pq_head, Q_KERNEL] < kernels_done
                and ahead[pq_head, Q_BACK] < backs_done
            ):
                h_id, h_key, h_target = ahead[pq_head, Q_ID], ahead[pq_head, Q_KEY], ahead[pq_head, Q_TARGET]
                h_kernel, h_back = ahead[pq_head, Q_KERNEL], ahead[pq_head, Q_BACK]
                h_left, h_class = ahead[pq_head, Q_LEFT] - 1, DEMAND + 1
                pq_head += 1
                h_busy = True
            if h_busy:
                duration = costs.chunk_ns[costs.expert_format[h_key], int(h_left == 0)]
                h_began = h_class
                h_start = h_upd = now
                h_work = duration * RATE_ONE
                h_rate = RATE_ONE
                h_fin = now + duration
        if not d_busy and bq_head < bq_tail and backlog[bq_head, Q_KERNEL] < kernels_done:
            duration = costs.back_ns[costs.expert_format[backlog[bq_head, Q_KEY]]]
            d_busy = True
            d_start = d_upd = now
            d_work = duration * RATE_ONE
            d_rate = RATE_ONE
            d_fin = now + duration
        if not c_busy and op < num_ops and op_avail[op] <= now:
            while op_wait < op_last[op]:
                transfer = out.item_transfer[op_wait]
                if transfer >= 0 and arrived[out.item_wait_key[op_wait]] < transfer:
                    break
                op_wait += 1
            if op_wait >= op_last[op]:
                stalled_host = max(0, min(now, op_avail[op]) - compute_end)
                clock[STALL_HOST] += stalled_host
                clock[STALL_COPY] += now - compute_end - stalled_host
                c_busy = True
                c_start = c_upd = now
                c_work = op_work[op] * RATE_ONE
                c_rate = RATE_ONE
                c_fin = now + op_work[op]
                if op + 1 < num_ops:
                    op_wait = op_first[op + 1]
        # 5. Rates follow the set of busy lanes.
        if coupled:
            mask = int(c_busy) | int(h_busy) << 1 | int(d_busy) << 2
            if c_busy:
                c_work -= c_rate * (now - c_upd)
                c_upd = now
                c_rate = costs.rate[0, mask]
                c_fin = now + (c_work + c_rate - 1) // c_rate
            if h_busy:
                h_work -= h_rate * (now - h_upd)
                h_upd = now
                h_rate = costs.rate[1, mask]
                h_fin = now + (h_work + h_rate - 1) // h_rate
            if d_busy:
                d_work -= d_rate * (now - d_upd)
                d_upd = now
                d_rate = costs.rate[2, mask]
                d_fin = now + (d_work + d_rate - 1) // d_rate
        # 6. The next instant at which anything can happen.
        then = min(c_fin, h_fin, d_fin)
        if s_next < s_count:
            then = min(then, s_time)
        if not c_busy and op < num_ops and op_avail[op] > now:
            then = min(then, op_avail[op])
        if then == _NEVER:
            clock[STUCK] = int(not draining or dq_head < dq_tail or pq_head < pq_tail or bq_head < bq_tail)
            break
        now = then
    clock[KERNELS_DONE] = kernels_done
    clock[BACKS_DONE] = backs_done
    clock[COMPUTE_END] = compute_end
    clock[NOW] = step_end[num_steps - 1] if num_steps > 0 else now
    clock[MAKESPAN] = max(now, clock[NOW])
