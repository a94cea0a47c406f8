"""The plans that the scheduler makes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from shoal.replicas.engine.scheduler import Scheduler
from shoal.replicas.plan import DEVICE_TOKEN, StepPlan, StepResult
from shoal.replicas.protocol import BlockReport, Request, SamplingParams
from tests.support.engines import make_engine

PROMPT = tuple(range(4, 24))  # 20 tokens


def make_scheduler(**sizes: Any) -> Scheduler:
    return make_engine(**sizes)[0].scheduler


def request(request_id: str, prompt: tuple[int, ...] = PROMPT, n: int = 1, priority: int = 0, **sampling) -> Request:
    params = SamplingParams(**{"max_tokens": 8, "ignore_eos": True, **sampling})
    return Request(request_id, prompt, params, num_samples=n, priority=priority)


def plan_of(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.plan()
    assert plan is not None
    return plan


def answer(plan: StepPlan, token: int = 7) -> StepResult:
    return StepResult(plan.step, np.full(len(plan.sample_rows), token, np.int32))


def spans(plan: StepPlan) -> list[tuple[int, int]]:
    return [(part.start, part.num_tokens) for part in plan.slices()]


def test_a_prompt_is_cut_into_chunks_of_the_budget():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(request("a"))
    plans = [plan_of(scheduler) for _ in range(4)]
    assert [spans(plan) for plan in plans] == [[(0, 8)], [(8, 8)], [(16, 4)], [(20, 1)]]
    assert [len(plan.sample_rows) for plan in plans] == [0, 0, 1, 1]
    assert plans[0].token_ids.tolist() == list(PROMPT[:8])
    assert plans[3].token_ids.tolist() == [DEVICE_TOKEN]
    assert [len(plan.row_starts) for plan in plans] == [1, 0, 0, 0]


def test_decodes_come_first_and_prefills_share_what_is_left():
    scheduler = make_scheduler(max_num_batched_tokens=24)
    scheduler.add(request("a", PROMPT[:3]))
    plan_of(scheduler)
    scheduler.add(request("b"))
    scheduler.add(request("c"))
    plan = plan_of(scheduler)
    assert spans(plan) == [(3, 1), (0, 20), (0, 3)]
    assert plan.sample_slices.tolist() == [0, 1]


def test_chunks_of_one_token_stand_before_longer_ones():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(request("a", PROMPT[:9]))
    plan_of(scheduler)
    scheduler.add(request("b", PROMPT[9:13]))
    scheduler.add(request("c", PROMPT[13:14]))
    plan = plan_of(scheduler)
    assert spans(plan) == [(8, 1), (0, 1), (0, 4)]
    assert sorted(plan.sample_slices.tolist()) == [0, 1, 2]


def test_without_chunked_prefill_a_prompt_waits_for_a_step_that_holds_it():
    scheduler = make_scheduler(max_num_batched_tokens=32, max_model_len=32, enable_chunked_prefill=False)
    scheduler.add(request("a"))
    scheduler.add(request("b", PROMPT[::-1]))
    assert spans(plan_of(scheduler)) == [(0, 20)]
    assert spans(plan_of(scheduler)) == [(20, 1), (0, 20)]


def test_no_step_is_planned_past_max_tokens():
    scheduler = make_scheduler(max_num_batched_tokens=32)
    scheduler.add(request("a", max_tokens=2))
    plans = [plan_of(scheduler), plan_of(scheduler)]
    assert scheduler.plan() is None
    assert not scheduler.update(answer(plans[0])).finished
    assert len(scheduler.update(answer(plans[1])).finished) == 1
    assert not scheduler.requests


def test_results_of_ended_rows_are_discarded_though_the_row_is_taken_again():
    scheduler = make_scheduler(max_num_batched_tokens=32, max_num_seqs=1)
    scheduler.add(request("a", stop_token_ids=(9,)))
    scheduler.add(request("b", PROMPT[::-1]))
    prefill, decode = plan_of(scheduler), plan_of(scheduler)
    ended = scheduler.update(answer(prefill, 9))
    assert ended.finished[0].stop_reason == 9
    successor = plan_of(scheduler)
    assert successor.rows.tolist() == decode.rows.tolist()
    assert scheduler.update(answer(decode)).sequences.size == 0
    outcome = scheduler.update(answer(successor, 5))
    assert [(s.request_id, t) for s, t in zip(outcome.sequences, outcome.token_ids, strict=True)] == [("b", 5)]
    assert scheduler.table.context(successor.rows[0]).tolist() == [*PROMPT[::-1], 5]


def test_requests_start_in_order_of_priority_then_arrival():
    scheduler = make_scheduler(max_num_seqs=1, max_num_batched_tokens=32)
    order = []
    for name, priority in (("late", 5), ("first", 0), ("second", 0), ("urgent", -1)):
        scheduler.add(request(name, priority=priority, max_tokens=1))
    while scheduler.requests:
        order += [s.request_id for s in scheduler.update(answer(plan_of(scheduler))).sequences]
    assert order == ["urgent", "first", "second", "late"]


def test_a_fork_samples_all_rows_from_one_slice():
    scheduler = make_scheduler(max_num_batched_tokens=16)
    scheduler.add(request("a", n=3, seed=10))
    first, last = plan_of(scheduler), plan_of(scheduler)
    assert [start.seed for start in first.row_starts] == [10]
    assert [start.seed for start in last.row_starts] == [11, 12]
    assert last.sample_slices.tolist() == [0, 0, 0]
    assert len(set(last.sample_rows.tolist())) == 3


def test_only_the_written_block_of_a_fork_is_copied_and_the_last_holder_keeps_it():
    scheduler = make_scheduler(block_size=8, max_num_batched_tokens=32)
    scheduler.add(request("a", n=3))  # 20 tokens: blocks of 8, 8 and 4
    plan_of(scheduler)
    assert scheduler.load().blocks == BlockReport(shared=3, private=0, copied=0)
    plan = plan_of(scheduler)
    assert len(plan.copies) == 2
    assert len({copy.source for copy in plan.copies}) == 1
    assert scheduler.load().blocks == BlockReport(shared=2, private=3, copied=2)
    assert not plan_of(scheduler).copies
    scheduler.check()


def test_samples_that_just_fit_the_pool_are_not_preempted():
    scheduler = make_scheduler(num_blocks=6, max_num_batched_tokens=16, max_model_len=24)
    scheduler.add(request("a", PROMPT[:10], n=4, max_tokens=3))  # two whole blocks shared, and one of its own for each
    while scheduler.requests:
        scheduler.update(answer(plan_of(scheduler)))
    assert scheduler.load().num_preemptions == 0
    assert scheduler.load().blocks.copied == 3


def test_eight_samples_hold_a_prompt_of_512_tokens_once():
    scheduler = make_scheduler(num_blocks=64, block_size=16, max_model_len=640, max_num_batched_tokens=512)
    prompt = tuple(int(token) for token in np.random.default_rng(0).integers(4, 40, 512))
    scheduler.add(request("a", prompt, n=8))
    plan_of(scheduler)
    plan_of(scheduler)
    report = scheduler.block_report(scheduler.requests["a"])
    assert report == BlockReport(shared=32, private=8, copied=0)
    assert scheduler.load().num_free_blocks == 64 - 32 - 8


def test_a_prefix_is_reused_by_the_next_plan_but_never_whole():
    scheduler = make_scheduler(max_num_batched_tokens=32)
    scheduler.add(request("a"))
    plan_of(scheduler)
    scheduler.add(request("b"))
    assert spans(plan_of(scheduler)) == [(20, 1), (16, 4)]  # five full blocks of 4; the last is run again
    assert scheduler.load().prefix_cache_hits == 16
    assert scheduler.load().prefix_cache_queries == 40
    scheduler.check()


def test_tenants_do_not_share_prefixes():
    scheduler = make_scheduler(max_num_batched_tokens=64)
    scheduler.add(Request("a", PROMPT, cache_salt="red"))
    plan_of(scheduler)
    scheduler.add(Request("b", PROMPT, cache_salt="blue"))
    scheduler.add(Request("c", PROMPT, cache_salt="red"))
    assert spans(plan_of(scheduler)) == [(20, 1), (0, 20), (16, 4)]


def test_the_prefix_cache_can_be_switched_off():
    scheduler = make_scheduler(max_num_batched_tokens=64, enable_prefix_caching=False)
    scheduler.add(request("a"))
    plan_of(scheduler)
    scheduler.add(request("b"))
    assert spans(plan_of(scheduler)) == [(20, 1), (0, 20)]
    assert scheduler.load().num_cached_blocks == 0


def test_the_last_arrived_is_preempted_and_resumes_over_prompt_and_output():
    scheduler = make_scheduler(num_blocks=8, max_num_batched_tokens=32, max_model_len=32, enable_prefix_caching=False)
    scheduler.add(request("old", PROMPT[:8], max_tokens=16))
    scheduler.add(request("young", PROMPT[8:16], max_tokens=20))
    plans = [plan_of(scheduler)]
    while not scheduler.load().num_preemptions:
        scheduler.update(answer(plans.pop(0)))
        while len(plans) < 2:
            plans.append(plan_of(scheduler))
    young = scheduler.requests["young"].leader
    num_known = int(scheduler.table.known[young.row])
    assert scheduler.table.num_blocks[young.row] == 0
    assert scheduler.table.in_flight[young.row] == 1
    row = young.row
    resumed = None
    while resumed is None:
        scheduler.update(answer(plans.pop(0)))
        plan = scheduler.plan()
        plans += [plan] if plan is not None else []
        resumed = plan if plan is not None and row in plan.rows else None
    assert resumed.rows.tolist() == [row]
    assert not resumed.row_starts
    assert spans(resumed) == [(0, num_known + 1)]
    assert resumed.token_ids.tolist() == [*PROMPT[8:16], *[7] * (num_known + 1 - 8)]


def test_what_a_failed_row_computed_is_forgotten_though_it_was_preempted_in_between():
    scheduler = make_scheduler(num_blocks=8, max_num_batched_tokens=32, max_model_len=32)
    scheduler.add(request("old", PROMPT[:8], max_tokens=16))
    scheduler.add(request("young", PROMPT[8:16], max_tokens=20))
    plans = [plan_of(scheduler)]
    while not scheduler.load().num_preemptions:
        scheduler.update(answer(plans.pop(0)))
        while len(plans) < 2:
            plans.append(plan_of(scheduler))
    young = scheduler.requests["young"].leader
    assert scheduler.pool.lookup(young.hashes).size > 0
    failed = answer(plans[0])
    outcome = scheduler.update(replace(failed, failed_rows=((young.row, "no finite logit"),)))
    assert [ending.error for ending in outcome.failures] == ["no finite logit"]
    assert scheduler.pool.lookup(young.hashes).size == 0
    scheduler.check()


def test_a_request_that_waits_for_rows_does_not_hold_up_who_has_them():
    scheduler = make_scheduler(num_blocks=8, max_num_seqs=2, max_num_batched_tokens=32, max_model_len=32)
    scheduler.add(request("a", PROMPT[:12], max_tokens=20))
    scheduler.add(request("b", PROMPT[4:16], max_tokens=20))
    scheduler.add(request("wide", PROMPT[:2], n=2, priority=-1))
    scheduler.abort("wide")
    plans = [plan_of(scheduler)]
    scheduler.add(request("urgent", PROMPT[:2], n=2, priority=-1, max_tokens=2))
    ended = []
    for _ in range(200):
        if not scheduler.requests:
            break
        outcome = scheduler.update(answer(plans.pop(0)))
        ended += [ending.sequence.request_id for ending in outcome.finished.values()]
        while len(plans) < 2 and (plan := scheduler.plan()) is not None:
            plans.append(plan)
    assert sorted(ended) == ["a", "b", "urgent", "urgent"]
    assert scheduler.load().num_preemptions > 0


def test_history_is_sent_only_to_samplers_that_use_it():
    scheduler = make_scheduler(max_num_batched_tokens=64)
    scheduler.add(request("plain"))
    scheduler.add(request("penalised", presence_penalty=0.5))
    plain, penalised = plan_of(scheduler).row_starts
    assert plain.prompt_token_ids == ()
    assert penalised.prompt_token_ids == PROMPT
    assert plain.prompt_len == penalised.prompt_len == len(PROMPT)


def test_scored_slices_name_the_token_that_follows_each_chunk():
    scheduler = make_scheduler(max_num_batched_tokens=16)
    scheduler.add(request("a", prompt_logprobs=0))
    first, last = plan_of(scheduler), plan_of(scheduler)
    assert first.scored_slices.tolist() == [0]
    assert first.scored_next.tolist() == [PROMPT[16]]
    assert last.scored_next.tolist() == [DEVICE_TOKEN]
    assert plan_of(scheduler).scored_slices.size == 0


def test_load_counts_who_runs_and_who_waits():
    scheduler = make_scheduler(max_num_seqs=2, max_num_batched_tokens=64)
    for name in "abc":
        scheduler.add(request(name))
    assert (scheduler.load().num_running, scheduler.load().num_waiting) == (0, 3)
    plan_of(scheduler)
    load = scheduler.load()
    assert (load.num_running, load.num_waiting, load.num_steps, load.prompt_tokens) == (2, 1, 1, 40)
    scheduler.abort("a")
    scheduler.abort("a")
    assert scheduler.load().num_waiting + scheduler.load().num_running == 2
