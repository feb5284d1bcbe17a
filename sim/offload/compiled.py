"""The compiled twin of the offload model: the same semantics as `offload_model`, as array loops.

Modelled: a compute stream in program order, a host→device copy engine that serves demands before prefetches and one
transfer (or chunk) at a time, a device→host engine and a disk in order, the host's cores on one expert at a time, and a
host whose operations precede what they submit. While several lanes are busy each may run slower: an activity has whole
work left and a rate that changes when its companions do. At one instant, completions come first, then submissions, then
one arbitration. Ignored: what the decisions are; they are made by `policies.offload.decide_visit`, as in the model. One
function is long on purpose: its scalars live in registers, which is where its speed comes from. (`offload_serial` has the
schedules in which nothing overlaps.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...base.jit import jit_lean
from .clock_fields import (
    ABANDONED, AFTER_D2H, AFTER_DISK, AFTER_H2D, BACKS_DONE, BUSY_BACK, BUSY_CPU, BUSY_DEMAND, BUSY_DENSE, BUSY_DISK, BUSY_EXPERT,
    BUSY_HEAD, BUSY_HOST, BUSY_PREFETCH, BYTES_D2H, BYTES_H2D, COMPUTE_END, KERNELS_DONE, LATE, LIMIT, MAKESPAN, NOW, QUEUE_FULL,
    READY, STALL_COPY, STALL_CPU, STALL_HOST, STEP, STUCK,
    count_bytes, kernel_work, write_copy_row, write_host_rows, write_kernel_row, write_row,
)  # fmt: skip
from ..timeline import CPU, D2H, DISK, H2D, HOST, RATE_ONE
from .costs import HOST_KERNEL, HOST_LAYER, HOST_STEP, HOST_TRANSFER, CostTables
from .compiled_queues import (
    Q_BACK, Q_BEGAN, Q_CLASS, Q_FORMAT, Q_ID, Q_KERNEL, Q_KEY, Q_LEFT, Q_READ, Q_TARGET,
    copy_entry, find_entry, pack, settle_demand, settle_prefetch, shift_back,
)  # fmt: skip
from ..policies.offload import begin_step, cancel_prefetch, decide_visit
from ..policies.state import (
    BACK_FORMAT, BACK_KEY, BACK_MOVE, BACK_WAIT_KERNEL, DEMAND, FIRST_BACK, FIRST_TRANSFER, ITEM_EXPERT, ITEM_FORMAT,
    ITEM_KERNEL, ITEM_KEY, ITEM_TOKENS, ITEM_TRANSFER, MOVE_CLASS, MOVE_DISK, MOVE_FORMAT, MOVE_KEY, MOVE_TARGET,
    MOVE_WAIT_BACK, MOVE_WAIT_KERNEL, NONE, PREFETCH, PROMOTED, PROMOTED_TARGET, SIZE_BACKS, SIZE_CPU, SIZE_ITEMS, SIZE_KERNELS,
    SIZE_MOVES, SIZE_PROMOTED,
    Array, Decision, PolicyConfig, PolicyState,
)  # fmt: skip
from ..timeline import (
    OP_BACK, OP_CPU, OP_DEMAND, OP_DENSE, OP_DISK, OP_EXPERT, OP_HEAD, OP_HOST_LAUNCH, OP_HOST_STEP, OP_PREFETCH,
)  # fmt: skip

if TYPE_CHECKING:
    from ..policies.steps import Steps

# `held` indices: what lanes and queues carry from one piece of a recording to the next. MORE: further steps follow; BEGIN: when
# the next step begins; then the lanes that may be busy between two steps, the queues' heads and tails, the reads done.
(
    MORE, BEGIN, H_BUSY, H_FIN, H_WORK, H_UPD, H_RATE, H_START, D_BUSY, D_FIN, D_WORK, D_UPD, D_RATE, D_START, R_BUSY, R_FIN, R_START,
    DQ_HEAD, DQ_TAIL, PQ_HEAD, PQ_TAIL, BQ_HEAD, BQ_TAIL, R_HEAD, R_TAIL, READS_DONE, NUM_HELD,
) = range(27)  # fmt: skip

_NEVER = 2**62
NUM_OP_FIELDS = 5


@jit_lean
def run_overlapped(config: PolicyConfig, steps: Steps, costs: CostTables, state: PolicyState, out: Decision, clock: Array,
                   demand: Array, ahead: Array, backlog: Array, reads: Array, moving: Array, held: Array,
                   ops: Array, arrived: Array, later: Array,
                   step_end: Array, rows: Array) -> None:  # fmt: skip
    """Advance `clock` over `steps` when copies overlap kernels, writing each step's end; all queues end empty.

    demand, ahead, backlog, reads: int64 [room, Q_FIELDS], the queues; when one has too little room the run stops with
    `clock[STUCK] = QUEUE_FULL` and is to be repeated with more. moving: int64 [1, Q_FIELDS], what the host→device engine moves.
    held: int64 [NUM_HELD], zeros at the start of a run. With `held[MORE]` the run goes on in another call: this one returns when
    its last step's head is done and leaves lanes and queues as they then are. ops: int64 [5, num_experts + 2], scratch.
    arrived: int64 [num_keys], the latest transfer of each expert that has arrived, -1 at the start.
    later: int64 [num_steps + 1], the least time from each step to the end; with `clock[LIMIT]` set, the run is abandoned
    once a step's end plus what must follow exceeds it.
    """
    layers, experts = config.num_layers, config.num_experts
    host, chunk_ns, expert_bytes = costs.host_ns, costs.chunk_ns, costs.expert_bytes
    items, cores, size = out.items, out.cores, out.size
    rowing = rows.shape[0] > 0
    coupled = False
    for lane in range(costs.rate.shape[0]):
        for mask in range(costs.rate.shape[1]):
            coupled = coupled or costs.rate[lane, mask] != RATE_ONE
    now = clock[NOW]
    compute_end = clock[COMPUTE_END]
    kernels_done = clock[KERNELS_DONE]
    backs_done = clock[BACKS_DONE]
    # Lanes: compute, host→device, device→host, the host's cores (x), the disk (r).
    c_busy, h_busy, d_busy, x_busy, r_busy = False, False, False, False, False
    c_fin, h_fin, d_fin, x_fin, r_fin = _NEVER, _NEVER, _NEVER, _NEVER, _NEVER
    c_work, h_work, d_work, x_work = 0, 0, 0, 0
    c_upd, h_upd, d_upd, x_upd = now, now, now, now
    c_rate, h_rate, d_rate, x_rate = RATE_ONE, RATE_ONE, RATE_ONE, RATE_ONE
    c_start, h_start, d_start, x_start, r_start = now, now, now, now, now
    # The visit's experts on the host's cores, run one after the other, and when the last one ended.
    x_next, x_count, x_avail, x_end = 0, 0, 0, 0
    # Compute and cores are idle between two steps; copies and reads may be under way.
    if held[H_BUSY]:
        h_busy = True
        h_fin, h_work, h_upd, h_rate, h_start = held[H_FIN], held[H_WORK], held[H_UPD], held[H_RATE], held[H_START]
    if held[D_BUSY]:
        d_busy = True
        d_fin, d_work, d_upd, d_rate, d_start = held[D_FIN], held[D_WORK], held[D_UPD], held[D_RATE], held[D_START]
    if held[R_BUSY]:
        r_busy = True
        r_fin, r_start = held[R_FIN], held[R_START]
    r_head, r_tail, reads_done = held[R_HEAD], held[R_TAIL], held[READS_DONE]
    dq_head, dq_tail, pq_head, pq_tail = held[DQ_HEAD], held[DQ_TAIL], held[PQ_HEAD], held[PQ_TAIL]
    bq_head, bq_tail = held[BQ_HEAD], held[BQ_TAIL]
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
    end = _NEVER  # of the last step, once it is known
    if num_steps > 0:
        begin_step(config, steps, state, 0)
        begin = held[BEGIN]
        if rowing:
            write_row(rows, clock, HOST, OP_HOST_LAUNCH, stamp, 0, -1, begin, begin + host[HOST_KERNEL], 0, 0)
        clock[BUSY_HOST] += host[HOST_KERNEL]
        op_avail[0] = begin + host[HOST_KERNEL]
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
                    write_kernel_row(rows, clock, out, stamp, layer, op_first[op], op_last[op], c_start, now)
            else:
                clock[BUSY_DENSE if code == OP_DENSE else BUSY_HEAD] += now - c_start
                if rowing:
                    tokens = steps.step_start[step + 1] - steps.step_start[step]
                    at = layer + 1 if code == OP_DENSE else layer
                    write_row(rows, clock, 0, code, stamp, at, -1, c_start, now, 0, tokens)
            op += 1
            finished = op == num_ops
        if h_busy and h_fin <= now:
            h_busy = False
            h_fin = _NEVER
            fmt = moving[0, Q_FORMAT]
            began, key = moving[0, Q_BEGAN], moving[0, Q_KEY]
            clock[BUSY_DEMAND if began == DEMAND else BUSY_PREFETCH] += now - h_start
            num_bytes = costs.chunk_bytes[fmt, int(moving[0, Q_LEFT] == 0)]
            count_bytes(clock, BYTES_H2D, AFTER_H2D, num_bytes, now > end)
            if rowing:
                code = OP_DEMAND if began == DEMAND else OP_PREFETCH
                write_copy_row(rows, clock, config, H2D, code, moving[0, Q_TARGET], key, h_start, now, num_bytes)
            if moving[0, Q_LEFT] == 0:
                arrived[key] = max(arrived[key], moving[0, Q_ID])
            elif moving[0, Q_CLASS] == DEMAND:  # the rest of a cut transfer goes back to the front of its queue
                if dq_head == 0:
                    if dq_tail == demand.shape[0]:
                        clock[STUCK] = QUEUE_FULL
                        return
                    shift_back(demand, dq_tail)
                    dq_tail += 1
                    dq_head = 1
                dq_head -= 1
                settle_demand(demand, dq_head, dq_tail, moving)
            else:
                if pq_head == 0:
                    if pq_tail == ahead.shape[0]:
                        clock[STUCK] = QUEUE_FULL
                        return
                    shift_back(ahead, pq_tail)
                    pq_tail += 1
                    pq_head = 1
                pq_head -= 1
                settle_prefetch(ahead, pq_head, pq_tail, moving)
        if d_busy and d_fin <= now:
            d_busy = False
            d_fin = _NEVER
            backs_done += 1
            key, fmt = backlog[bq_head, Q_KEY], backlog[bq_head, Q_FORMAT]
            clock[BUSY_BACK] += now - d_start
            count_bytes(clock, BYTES_D2H, AFTER_D2H, expert_bytes[fmt], now > end)
            if rowing:
                target = backlog[bq_head, Q_TARGET]
                write_copy_row(rows, clock, config, D2H, OP_BACK, target, key, d_start, now, expert_bytes[fmt])
            bq_head += 1
        if x_busy and x_fin <= now:
            x_busy = False
            x_fin = _NEVER
            clock[BUSY_CPU] += now - x_start
            if rowing:
                expert, tokens = cores[x_next, ITEM_EXPERT], cores[x_next, ITEM_TOKENS]
                write_row(rows, clock, CPU, OP_CPU, stamp, layer, expert, x_start, now, 0, tokens)
            x_next += 1
            x_end = now
        if r_busy and r_fin <= now:
            r_busy = False
            r_fin = _NEVER
            reads_done += 1
            key, fmt = reads[r_head, Q_KEY], reads[r_head, Q_FORMAT]
            clock[BUSY_DISK] += now - r_start
            clock[AFTER_DISK] += expert_bytes[fmt] * int(now > end)
            if rowing:
                target = reads[r_head, Q_TARGET]
                write_copy_row(rows, clock, config, DISK, OP_DISK, target, key, r_start, now, expert_bytes[fmt])
            r_head += 1
        # 2. The program: what the compute stream's last operation lets the host do.
        if finished:
            code = op_code[op - 1]
            op = 0
            if code == OP_DENSE:
                layer += 1
                if config.cancel:
                    visit = steps.first_visit + step * layers + layer
                    for at in range(pq_head, pq_tail):
                        if ahead[at, Q_TARGET] > visit:
                            break
                        untouched = ahead[at, Q_LEFT] == costs.num_chunks[ahead[at, Q_FORMAT]]
                        # What must be read from disk first is kept: its read has been asked for.
                        if (
                            untouched
                            and ahead[at, Q_READ] < 0
                            and cancel_prefetch(config, steps, state, step, layer, ahead[at, Q_KEY], ahead[at, Q_ID])
                        ):
                            ahead[at, Q_LEFT] = 0
                decide_visit(config, steps, state, out, step, layer)
                base = layer * experts
                moves, backs, kernels = size[SIZE_MOVES], size[SIZE_BACKS], size[SIZE_KERNELS]
                for at in range(size[SIZE_ITEMS]):
                    if items[at, ITEM_TRANSFER] >= 0 and items[at, ITEM_TRANSFER] < size[FIRST_TRANSFER]:
                        late = arrived[base + items[at, ITEM_EXPERT]] < items[at, ITEM_TRANSFER]
                        clock[LATE if late else READY] += 1
                s_time = now + host[HOST_LAYER]
                s_next, s_count, s_move, s_back = 0, 1 + moves + backs, 0, 0
                x_next, x_count, x_avail, x_end = 0, size[SIZE_CPU], s_time, 0
                submits = s_time + (moves + backs) * host[HOST_TRANSFER]
                clock[BUSY_HOST] += submits - now + (kernels + 1) * host[HOST_KERNEL]
                if rowing:
                    write_host_rows(rows, clock, host, stamp, layer, now, moves + backs, kernels + 1)
                item = 0
                for kernel in range(kernels):
                    first = item
                    while item < size[SIZE_ITEMS] and items[item, ITEM_KERNEL] == kernel:
                        item += 1
                    op_avail[kernel] = submits + (kernel + 1) * host[HOST_KERNEL]
                    op_work[kernel] = kernel_work(costs, out, first, item)
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
                if rowing:
                    write_row(rows, clock, HOST, OP_HOST_STEP, stamp, layer, -1, now, begin, 0, 0)
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
                    if rowing:
                        write_row(
                            rows, clock, HOST, OP_HOST_LAUNCH, stamp, 0, -1, begin, begin + host[HOST_KERNEL], 0, 0
                        )
                    clock[BUSY_HOST] += host[HOST_KERNEL]
                    op_avail[0] = begin + host[HOST_KERNEL]
                    op_work[0] = costs.dense_ns[costs.step_class[stamp], 0]
                    op_code[0] = OP_DENSE
                    op_first[0] = op_last[0] = op_wait = 0
                    num_ops = 1
                else:
                    draining = True
                    clock[STEP] = stamp + 1
                    if held[MORE]:
                        held[BEGIN] = begin
                        break
                    end = begin
        # 3. Submissions that are due.
        while s_next < s_count and s_time <= now:
            if s_next == 0:
                if dq_head == dq_tail:
                    dq_head = dq_tail = 0
                for index in range(size[SIZE_PROMOTED]):
                    wanted = out.promotions[index, PROMOTED]
                    if h_busy and moving[0, Q_ID] == wanted:
                        moving[0, Q_CLASS] = DEMAND  # its current chunk is already running; the rest is demanded
                        continue
                    at = find_entry(ahead, pq_head, pq_tail, out.promotions[index, PROMOTED_TARGET], wanted)
                    if at >= 0:
                        if dq_tail == demand.shape[0]:
                            clock[STUCK] = QUEUE_FULL
                            return
                        copy_entry(ahead, at, demand, dq_tail)
                        dq_tail += 1
                        ahead[at, Q_LEFT] = 0  # nothing is left to move: passed over when its turn comes
            elif s_back < size[SIZE_BACKS] and (out.backs[s_back, BACK_MOVE] <= s_move or s_move == size[SIZE_MOVES]):
                if bq_tail == backlog.shape[0]:
                    bq_tail = pack(backlog, bq_head, bq_tail)
                    bq_head = 0
                    if bq_tail == backlog.shape[0]:
                        clock[STUCK] = QUEUE_FULL
                        return
                backlog[bq_tail, Q_ID] = size[FIRST_BACK] + s_back
                backlog[bq_tail, Q_KEY] = out.backs[s_back, BACK_KEY]
                backlog[bq_tail, Q_FORMAT] = out.backs[s_back, BACK_FORMAT]
                backlog[bq_tail, Q_KERNEL] = out.backs[s_back, BACK_WAIT_KERNEL]
                backlog[bq_tail, Q_TARGET] = steps.first_visit + step * layers + layer
                bq_tail += 1
                s_back += 1
            else:
                key = out.moves[s_move, MOVE_KEY]
                if out.moves[s_move, MOVE_CLASS] == DEMAND:
                    if dq_head == dq_tail:
                        dq_head = dq_tail = 0
                    if dq_tail == demand.shape[0]:
                        dq_tail = pack(demand, dq_head, dq_tail)
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
                        pq_tail = pack(ahead, pq_head, pq_tail)
                        pq_head = 0
                        if pq_tail == ahead.shape[0]:
                            clock[STUCK] = QUEUE_FULL
                            return
                    at = pq_tail
                    pq_tail += 1
                    while at > pq_head and ahead[at - 1, Q_TARGET] > out.moves[s_move, MOVE_TARGET]:
                        copy_entry(ahead, at - 1, ahead, at)
                        at -= 1
                    entry = ahead
                entry[at, Q_ID] = size[FIRST_TRANSFER] + s_move
                entry[at, Q_KEY] = key
                entry[at, Q_TARGET] = out.moves[s_move, MOVE_TARGET]
                entry[at, Q_KERNEL] = out.moves[s_move, MOVE_WAIT_KERNEL]
                entry[at, Q_BACK] = out.moves[s_move, MOVE_WAIT_BACK]
                entry[at, Q_FORMAT] = out.moves[s_move, MOVE_FORMAT]
                entry[at, Q_LEFT] = costs.num_chunks[out.moves[s_move, MOVE_FORMAT]]
                entry[at, Q_READ] = out.moves[s_move, MOVE_DISK]
                if out.moves[s_move, MOVE_DISK] >= 0:
                    if r_tail == reads.shape[0]:
                        r_tail = pack(reads, r_head, r_tail)
                        r_head = 0
                        if r_tail == reads.shape[0]:
                            clock[STUCK] = QUEUE_FULL
                            return
                    copy_entry(entry, at, reads, r_tail)
                    r_tail += 1
                s_move += 1
            s_next += 1
            if s_next < s_count:
                s_time += host[HOST_TRANSFER]
        # 4. One arbitration: each idle lane takes its first request, if that may start.
        if not h_busy:
            if dq_head == dq_tail:
                while pq_head < pq_tail and ahead[pq_head, Q_LEFT] == 0:
                    pq_head += 1
                if (
                    pq_head < pq_tail
                    and ahead[pq_head, Q_KERNEL] < kernels_done
                    and ahead[pq_head, Q_BACK] < backs_done
                    and ahead[pq_head, Q_READ] < reads_done
                ):
                    copy_entry(ahead, pq_head, moving, 0)
                    moving[0, Q_CLASS] = PREFETCH
                    pq_head += 1
                    h_busy = True
            elif (
                demand[dq_head, Q_KERNEL] < kernels_done
                and demand[dq_head, Q_BACK] < backs_done
                and demand[dq_head, Q_READ] < reads_done
            ):
                copy_entry(demand, dq_head, moving, 0)
                moving[0, Q_CLASS] = DEMAND
                dq_head += 1
                h_busy = True
            if h_busy:
                moving[0, Q_LEFT] -= 1
                moving[0, Q_BEGAN] = moving[0, Q_CLASS]
                duration = chunk_ns[moving[0, Q_FORMAT], int(moving[0, Q_LEFT] == 0)]
                h_start = h_upd = now
                h_work = duration * RATE_ONE
                h_rate = RATE_ONE
                h_fin = now + duration
        if not d_busy and bq_head < bq_tail and backlog[bq_head, Q_KERNEL] < kernels_done:
            duration = costs.back_ns[backlog[bq_head, Q_FORMAT]]
            d_busy = True
            d_start = d_upd = now
            d_work = duration * RATE_ONE
            d_rate = RATE_ONE
            d_fin = now + duration
        if not x_busy and x_next < x_count and x_avail <= now:
            duration = costs.cpu_ns[cores[x_next, ITEM_FORMAT], cores[x_next, ITEM_TOKENS]]
            x_busy = True
            x_start = x_upd = now
            x_work = duration * RATE_ONE
            x_rate = RATE_ONE
            x_fin = now + duration
        if not r_busy and r_head < r_tail:
            r_busy = True
            r_start = now
            r_fin = now + costs.disk_ns[reads[r_head, Q_FORMAT]]
        # What follows a visit's experts waits for those on the host's cores and for all that the visit demanded: also for
        # guesses that nobody used, whose places were given away. Without a cache the experts themselves wait for such.
        may_run = not c_busy and op < num_ops and op_avail[op] <= now
        if may_run and op_code[op] != OP_EXPERT:
            may_run = x_next == x_count and dq_head == dq_tail and not (h_busy and moving[0, Q_CLASS] == DEMAND)
        elif may_run and op == 0 and config.policy == NONE:
            may_run = (dq_head == dq_tail or demand[dq_head, Q_ID] >= size[FIRST_TRANSFER]) and not (
                h_busy and moving[0, Q_CLASS] == DEMAND and moving[0, Q_ID] < size[FIRST_TRANSFER]
            )
        if may_run:
            while op_wait < op_last[op]:
                transfer = items[op_wait, ITEM_TRANSFER]
                if transfer >= 0 and arrived[items[op_wait, ITEM_KEY]] < transfer:
                    break
                op_wait += 1
            if op_wait >= op_last[op]:
                stalled_host = max(0, min(now, op_avail[op]) - compute_end)
                stalled_cpu = max(0, x_end - compute_end - stalled_host) if op_code[op] != OP_EXPERT else 0
                clock[STALL_HOST] += stalled_host
                clock[STALL_CPU] += stalled_cpu
                clock[STALL_COPY] += now - compute_end - stalled_host - stalled_cpu
                c_busy = True
                c_start = c_upd = now
                c_work = op_work[op] * RATE_ONE
                c_rate = RATE_ONE
                c_fin = now + op_work[op]
                if op + 1 < num_ops:
                    op_wait = op_first[op + 1]
        # 5. Rates follow the set of busy lanes.
        if coupled:
            mask = int(c_busy) | int(h_busy) << 1 | int(d_busy) << 2 | int(x_busy) << 3
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
            if x_busy:
                x_work -= x_rate * (now - x_upd)
                x_upd = now
                x_rate = costs.rate[3, mask]
                x_fin = now + (x_work + x_rate - 1) // x_rate
        # 6. The next instant at which anything can happen.
        then = min(c_fin, h_fin, d_fin, x_fin, r_fin)
        if s_next < s_count:
            then = min(then, s_time)
        if not x_busy and x_next < x_count and x_avail > now:
            then = min(then, x_avail)
        if not c_busy and op < num_ops and op_avail[op] > now:
            then = min(then, op_avail[op])
        if then == _NEVER:
            clock[STUCK] = int(not draining or dq_head < dq_tail or pq_head < pq_tail or bq_head < bq_tail)
            break
        now = then
    clock[KERNELS_DONE] = kernels_done
    clock[BACKS_DONE] = backs_done
    clock[COMPUTE_END] = compute_end
    clock[NOW] = now
    clock[MAKESPAN] = max(now, step_end[num_steps - 1]) if num_steps > 0 else now
    held[H_BUSY], held[D_BUSY], held[R_BUSY] = h_busy, d_busy, r_busy
    held[H_FIN], held[H_WORK], held[H_UPD], held[H_RATE], held[H_START] = h_fin, h_work, h_upd, h_rate, h_start
    held[D_FIN], held[D_WORK], held[D_UPD], held[D_RATE], held[D_START] = d_fin, d_work, d_upd, d_rate, d_start
    held[R_FIN], held[R_START], held[R_HEAD], held[R_TAIL], held[READS_DONE] = (
        r_fin,
        r_start,
        r_head,
        r_tail,
        reads_done,
    )
    held[DQ_HEAD], held[DQ_TAIL], held[PQ_HEAD], held[PQ_TAIL] = dq_head, dq_tail, pq_head, pq_tail
    held[BQ_HEAD], held[BQ_TAIL] = bq_head, bq_tail
